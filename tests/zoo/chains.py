"""Chains, residuals, depthwise and transposed convolutions, shared layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pattern import image, pattern


def conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


@pattern("chain", "conv1.weight:0", "bn1.running_var:0", "conv2.weight:[01]", "fc.weight:1")
class Chain(nn.Module):
    """Two convolutions with batch norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@pattern("residual", "stem.0.weight:0", "conv1.weight:0", "conv2.weight:0", "fc.weight:1")
class Residual(nn.Module):
    """A basic block with an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.conv1, self.bn1 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.fc(F.adaptive_avg_pool2d(self.relu(out), 1).flatten(1))


@pattern("depthwise", "expand.0.weight:0", "depthwise.0.weight:0", "depthwise.1.weight:0", "project.0.weight:1")
class InvertedResidual(nn.Module):
    """MobileNetV2 block: expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.expand = nn.Sequential(nn.Conv2d(6, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(24, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.project(self.depthwise(self.expand(x))))


@pattern("depthwise_mult2", "conv1.weight:0", "depthwise.weight:0", "depthwise.bias:0", "head.weight:1")
class DepthwiseMultiplier(nn.Module):
    """A depthwise convolution with two outputs per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.head = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.depthwise(F.relu(self.conv1(x)))))


@pattern("convT", "conv.weight:0", "up.weight:0", "up.weight:1", "up.bias:0", "head.weight:1")
class TransposedConv(nn.Module):
    """Upsampling by a transposed convolution (weights are input x output)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
        self.head = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.up(F.leaky_relu(self.conv(x), 0.1)), 0.1))


@pattern("convT_depthwise", "conv.weight:0", "up.weight:0", "up.bias:0", "head.weight:1")
class TransposedDepthwise(nn.Module):
    """A depthwise transposed convolution, as in learned bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 12, 4, stride=2, padding=1, groups=12)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(F.relu(self.conv(x)))))


@pattern("convT_groups", "conv.weight:0", "up.weight:*", "head.weight:1")
class TransposedGrouped(nn.Module):
    """A transposed convolution with four groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.up(F.silu(self.conv(x)))))


@pattern("prelu", "conv1.weight:0", "act.weight:0", "conv2.weight:1")
class ParametricReLU(nn.Module):
    """One PReLU slope per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.act = nn.PReLU(12)
        self.conv2 = nn.Conv2d(12, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(x)))


@pattern("unet_up", "enc1.0.weight:0", "enc2.0.weight:0", "up.weight:1", "dec.0.weight:0", "dec.0.weight:1")
class UNet(nn.Module):
    """One level of a U-Net: down, up, concatenate with the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = conv_bn(3, 8)
        self.enc2 = conv_bn(8, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.dec = conv_bn(8 + 8, 12)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc1(x)
        low = self.enc2(F.max_pool2d(skip, 2))
        return self.out(self.dec(torch.cat([self.up(low), skip], dim=1)))


@pattern("unet_interpolate", "enc1.0.weight:0", "enc2.0.weight:0", "dec.0.weight:1")
class UNetInterpolate(nn.Module):
    """The same with bilinear upsampling to the skip's size and the skip first."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = conv_bn(3, 6)
        self.enc2 = conv_bn(6, 16)
        self.dec = conv_bn(6 + 16, 12)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enc1(x)
        low = self.enc2(F.avg_pool2d(skip, 2))
        low = F.interpolate(low, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(self.dec(torch.cat((skip, low), 1)))


@pattern("reuse_conv", "stem.weight:0", "shared.weight:0", "shared.weight:1", "head.weight:1")
class ReuseConv(nn.Module):
    """One convolution applied three times in a row: its inputs are its own outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.shared = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = F.relu(self.shared(x))
        return self.head(x)


@pattern("reuse_head_two_levels", "p3.weight:0", "p4.weight:0", "tower.weight:0", "tower.weight:1")
class SharedHead(nn.Module):
    """RetinaNet: one head on two feature levels."""

    def __init__(self) -> None:
        super().__init__()
        self.c3, self.c4 = conv_bn(3, 8), conv_bn(8, 16, stride=2)
        self.p3, self.p4 = nn.Conv2d(8, 12, 1), nn.Conv2d(16, 12, 1)
        self.tower = nn.Conv2d(12, 10, 3, padding=1)
        self.cls = nn.Conv2d(10, 4, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        c3 = self.c3(x)
        c4 = self.c4(c3)
        return [self.cls(F.relu(self.tower(level))) for level in (self.p3(c3), self.p4(c4))]


class PadShortcut(nn.Module):
    """CIFAR ResNet block whose shortcut pads the channels with zeros (option A)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.stride, self.pad = stride, (cout - cin) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        s = self.stride
        return F.relu(out + F.pad(x[:, :, ::s, ::s], (0, 0, 0, 0, self.pad, self.pad)))


@pattern("pad_shortcut_A", "stem.0.weight:0", "block.conv1.weight:0", "block.conv2.weight:0", "fc.weight:1")
class PadShortcutA(nn.Module):
    """Zero-padded shortcut without stride."""

    stride = 1

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.block = PadShortcut(8, 16, self.stride)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((-2, -1)))


@pattern("pad_shortcut_A_stride", "stem.0.weight:0", "block.conv1.weight:0", "block.conv2.weight:0", "fc.weight:1")
class PadShortcutAStride(PadShortcutA):
    """The shortcut of the CIFAR ResNets: strided slice and zero-pad."""

    stride = 2


@pattern("inplace_chain", "conv1.weight:0", "conv2.weight:0", inputs=image(2, 3, 9, 7))
class InplaceChain(nn.Module):
    """In-place arithmetic on views and on whole tensors, odd spatial sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 10, 3, stride=2), nn.Conv2d(10, 6, 1)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).mul_(1.5).clamp_(min=-1.0)
        x = self.conv2(x)
        x[:, :, 0] *= 0.5
        return self.head(F.hardswish(x, inplace=True))
