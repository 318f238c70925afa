"""Parts of well-known vision networks that use channels in their own way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chains import conv_bn
from .pattern import image, pattern


@pattern("ghost_module", "primary.weight:0", "cheap.weight:0", "head.weight:1")
class GhostModule(nn.Module):
    """GhostNet: half the maps are made by a depthwise convolution of the other half, then sliced to an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.oup = 16
        self.primary, self.cheap = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = F.relu(self.primary(x))
        out = torch.cat([x1, self.cheap(x1)], dim=1)[:, : self.oup, :, :]
        return self.head(F.relu(self.bn(out)))


@pattern("res2net", "conv1.0.weight:0", "convs.0.weight:0", "convs.1.weight:0", "conv3.weight:1")
class Res2Net(nn.Module):
    """Res2Net: the width is split in scales, each convolution also sees the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.scale = 6, 3
        self.conv1 = conv_bn(3, 18, 1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.conv3 = nn.Conv2d(18, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.conv1(x), self.width, 1)
        outs, last = [], pieces[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            last = pieces[i] if i == 0 else last + pieces[i]
            last = F.relu(bn(conv(last)))
            outs.append(last)
        outs.append(pieces[self.scale - 1])
        return self.head(F.relu(self.conv3(torch.cat(outs, 1))))


@pattern("blur_pool", "conv.weight:0", "head.weight:1")
class BlurPool(nn.Module):
    """Antialiased downsampling: a fixed kernel is expanded to as many channels as come in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 5, 1)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (kernel[:, None] * kernel / 16)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.relu(self.conv(x)), (1, 1, 1, 1), mode="reflect")
        x = F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])
        return self.head(x)


@pattern("repvgg_train", "stem.0.weight:0", "dense.weight:0", "point.weight:0", "bn_id.weight:0", "head.weight:1")
class RepVGG(nn.Module):
    """Three parallel branches, one of them only a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.dense, self.point = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.Conv2d(12, 12, 1, bias=False)
        self.bn3, self.bn1, self.bn_id = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.bn3(self.dense(x)) + self.bn1(self.point(x)) + self.bn_id(x)))


@pattern("bottleneck_resnet", "conv1.weight:0", "conv2.weight:0", "conv3.weight:0", "down.0.weight:0", "fc.weight:1")
class Bottleneck(nn.Module):
    """ResNet-50's block with stride and projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv3, self.bn3 = nn.Conv2d(10, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.down = nn.Sequential(nn.Conv2d(8, 24, 1, stride=2, bias=False), nn.BatchNorm2d(24))
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.relu(self.bn3(self.conv3(y)) + self.down(x)).mean((2, 3)))


@pattern("fpn_topdown", "c3.0.weight:0", "lat3.weight:0", "lat4.weight:0", "out3.weight:1", "head.weight:1")
class FPN(nn.Module):
    """Feature pyramid: lateral convolutions, upsample and add, a shared head on a list of levels."""

    def __init__(self) -> None:
        super().__init__()
        self.c3, self.c4 = conv_bn(3, 8), conv_bn(8, 16, stride=2)
        self.lat3, self.lat4 = nn.Conv2d(8, 12, 1), nn.Conv2d(16, 12, 1)
        self.out3, self.out4 = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.head = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        c3 = self.c3(x)
        p4 = self.lat4(self.c4(c3))
        p3 = self.lat3(c3) + F.interpolate(p4, scale_factor=2.0, mode="nearest")
        return tuple(self.head(F.relu(f(p))) for f, p in ((self.out3, p3), (self.out4, p4)))


@pattern(
    "aspp", "stem.weight:0", "branches.0.0.weight:0", "branches.2.0.weight:0", "pool.1.weight:0", "project.weight:1"
)
class ASPP(nn.Module):
    """DeepLab: dilated branches and an image-level one that is stretched back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(10, 6, 3, padding=d, dilation=d, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            for d in (1, 2, 4)
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(10, 8, 1), nn.ReLU())
        self.project = nn.Conv2d(26, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        pooled = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))


@pattern("maxout", "conv.weight:0", "head.weight:1")
class Maxout(nn.Module):
    """Maximum over pairs of neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.shape
        return self.head(x.view(b, c // 2, 2, h, w).max(dim=2)[0])


@pattern("light_cnn_mfm", "conv.weight:0", "head.weight:1")
class MaxFeatureMap(nn.Module):
    """Max-feature-map: maximum of the two halves of a split by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = 10
        self.conv, self.head = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.conv(x), self.out_channels, 1)
        return self.head(torch.max(a, b))


@pattern("flatten_channels_last", "conv.weight:0", "fc.weight:1")
class FlattenChannelsLast(nn.Module):
    """SSD heads: channels are moved last before flattening, so a channel owns every C-th column."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).permute(0, 2, 3, 1).contiguous()
        return self.fc(x.view(x.size(0), -1))


@pattern("detector_reshape", "stem.0.weight:0", "tower.weight:0", must_refuse=("pred.weight:0",))
class DetectorReshape(nn.Module):
    """YOLO head: predictions are viewed as anchors x values; they are the output, what is before can go."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors, self.values = 3, 7
        self.stem, self.tower = conv_bn(3, 8), nn.Conv2d(8, 12, 3, padding=1)
        self.pred = nn.Conv2d(12, 21, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pred(F.relu(self.tower(self.stem(x))))
        b, _, h, w = x.shape
        x = x.view(b, self.anchors, self.values, h, w).permute(0, 1, 3, 4, 2)
        return x.reshape(b, -1, self.values).sigmoid()


@pattern(
    "weight_standardised",
    "conv1.weight:0",
    "conv2.weight:0",
    "head.weight:1",
    inexact=("weight", "over channels"),
    independent_oracle=False,
)
class WeightStandardised(nn.Module):
    """Big Transfer's convolution: rows of the weight are normalised over all their columns before use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 8, 3), nn.Conv2d(8, 5, 1)

    @staticmethod
    def _standard(conv: nn.Conv2d, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(conv.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (conv.weight - mean) / torch.sqrt(variance + 1e-6), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self._standard(self.conv1, x))
        return self.head(F.relu(self._standard(self.conv2, x)))


@pattern(
    "conv1d_causal_gated", "inp.weight:0", "blocks.0.weight:0", "skip.weight:0", "out.weight:1", inputs=image(2, 4, 16)
)
class WaveNet(nn.Module):
    """WaveNet: tanh and sigmoid halves, residual and skip sums, causal padding and trimming."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.skip, self.out = nn.Conv1d(4, 8, 1), nn.Conv1d(10, 12, 1), nn.Conv1d(12, 5, 1)
        self.blocks = nn.ModuleList(nn.Conv1d(8, 20, 2, padding=d, dilation=d) for d in (1, 2))
        self.res = nn.ModuleList(nn.Conv1d(10, 8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        skips = 0
        for conv, res in zip(self.blocks, self.res, strict=True):
            a, b = conv(x)[:, :, : x.shape[-1]].chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            skips = skips + self.skip(y)
            x = x + res(y)
        return self.out(F.relu(skips))
