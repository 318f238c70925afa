"""Normalisation layers, frozen and live."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chains import conv_bn
from .pattern import image, pattern, tokens


@pattern("groupnorm", "conv1.weight:0", "gn.weight:0", "conv2.weight:1", inexact=("group norm",))
class GroupNorm(nn.Module):
    """Four groups of four: exact if whole groups go, else the statistics change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.gn, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.silu(self.gn(self.conv1(x))))


@pattern("groupnorm_one", "conv1.weight:0", "gn.weight:0", "head.weight:1", inexact=("group norm", "layer norm"))
class GroupNormOne(nn.Module):
    """GroupNorm(1, C), the layer norm of PoolFormer, inside a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.gn = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(1, 12)
        self.fc1, self.fc2 = nn.Conv2d(12, 24, 1), nn.Conv2d(24, 12, 1)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.head(x + self.fc2(F.gelu(self.fc1(self.gn(x)))))


@pattern("layernorm_chw", "conv1.weight:0", "ln.weight:0", "ln.bias:0", "head.weight:1", inexact=("layer norm",))
class LayerNormCHW(nn.Module):
    """Layer norm over channels and space together; normalized_shape holds the width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.ln = nn.Conv2d(3, 12, 3, padding=1), nn.LayerNorm([12, 8, 8])
        self.head = nn.Conv2d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.ln(self.conv1(x))))


class LayerNorm2d(nn.LayerNorm):
    """timm's LayerNorm2d: channels first, permuted twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@pattern(
    "layernorm2d_convnext",
    "stem.weight:0",
    "block_pw.weight:0",
    "norm.weight:0",
    "fc.weight:1",
    inexact=("layer norm",),
)
class LayerNormConvNeXt(nn.Module):
    """A ConvNeXt stage in small: stem, LayerNorm2d, depthwise, pointwise MLP, residual, head norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 2, stride=2), LayerNorm2d(12)
        self.block_dw = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.block_pw, self.block_out = nn.Conv2d(12, 20, 1), nn.Conv2d(20, 12, 1)
        self.head_norm, self.fc = nn.LayerNorm(12, eps=1e-6), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block_out(F.gelu(self.block_pw(self.norm(self.block_dw(x)))))
        return self.fc(self.head_norm(x.mean((-2, -1))))


@pattern("instancenorm_stats", "conv1.weight:0", "inorm.weight:0", "inorm.running_mean:0", "conv2.weight:1")
class InstanceNormStats(nn.Module):
    """Instance norm with affine parameters and running statistics; exact, since each channel stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 6, 1)
        self.inorm = nn.InstanceNorm2d(10, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.inorm(self.conv1(x))))


@pattern("instancenorm_live", "conv1.weight:0", "inorm.bias:0", "conv2.weight:1")
class InstanceNormLive(nn.Module):
    """Instance norm on the batch's own statistics, and one without any parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 8, 1), nn.Conv2d(8, 5, 1)
        self.inorm, self.plain = nn.InstanceNorm2d(10, affine=True), nn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.conv2(F.leaky_relu(self.inorm(self.conv1(x)), 0.2))))


@pattern("frozen_bn_mid", "conv1.weight:0", "bn.weight:0", "bn.running_var:0", "conv2.weight:1")
class FrozenBatchNormMid(nn.Module):
    """A batch norm whose parameters do not require gradients; it must stay that way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1)
        for p in self.bn.parameters():
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn(self.conv1(x))))


class FrozenBatchNorm2d(nn.Module):
    """Detection style: everything is a buffer and the scale is computed in forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


@pattern("frozen_bn_buffers", "conv1.weight:0", "bn.weight:0", "bn.running_var:0", "conv2.weight:1")
class FrozenBatchNormBuffers(nn.Module):
    """The same with a batch norm made of buffers only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), FrozenBatchNorm2d(12), nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn(self.conv1(x))))


@pattern("frozen_stem", "stem.0.weight:0", "layer.0.weight:1", "layer.0.weight:0", "head.weight:1")
class FrozenStem(nn.Module):
    """The stem is frozen and runs under no_grad: autograd never sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.head = conv_bn(3, 8), conv_bn(8, 12), nn.Conv2d(12, 5, 1)
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.head(self.layer(x))


@pattern("batchnorm1d_mlp", "net.0.weight:0", "net.1.running_mean:0", "net.4.weight:0", inputs=image(4, 10))
class BatchNormMLP(nn.Module):
    """Linear layers with BatchNorm1d and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 24),
            nn.BatchNorm1d(24),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(24, 16, bias=False),
            nn.BatchNorm1d(16, affine=False),
            nn.ELU(),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class RMSNorm(nn.Module):
    """Llama's own RMS norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pattern(
    "rmsnorm_manual",
    "embed.weight:0",
    "norm.weight:0",
    "up.weight:0",
    "down.weight:0",
    inputs=tokens(2, 5, 6),
    inexact=("mean over channels",),
    independent_oracle=False,
)
class RMSNormManual(nn.Module):
    """A pre-norm MLP block; the norm is written with a mean over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 12), RMSNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(F.silu(self.up(self.norm(x)))))


@pattern("weight_norm_param", "conv1.parametrizations.weight.original*:0", "conv1.bias:0", "conv2.weight:1")
class WeightNormParam(nn.Module):
    """torch's weight norm: the weight is computed from a length and a direction per output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 12, 3, padding=1))
        self.conv2 = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


@pattern("weight_norm_by_hand", "g:0", "v:0", "conv2.weight:1")
class WeightNormByHand(nn.Module):
    """The same by hand: parameters g and v, a functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(12, 3, 3, 3)), nn.Parameter(torch.ones(12, 1, 1, 1))
        self.bn, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.g * self.v / self.v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return self.conv2(F.relu(self.bn(F.conv2d(x, weight, padding=1))))


@pattern(
    "weight_norm_chain",
    "a.parametrizations.weight.original1:0",
    "b.parametrizations.weight.original1:1",
    inexact=("weight",),
    independent_oracle=False,
    note="columns of b carry part of the length of its rows",
)
class WeightNormChain(nn.Module):
    """Two weight-normed layers in a row: removing columns changes the length of the rows."""

    def __init__(self) -> None:
        super().__init__()
        weight_norm = nn.utils.parametrizations.weight_norm
        self.a, self.b = weight_norm(nn.Conv2d(3, 12, 3)), weight_norm(nn.Conv2d(12, 8, 3))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))
