"""Layers that several networks are built of."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ConvBNReLU(nn.Sequential):
    """3×3 convolution, batch norm and ReLU: [B, in_ch, H, W] → [B, out_ch, H, W]."""

    def __init__(self, in_ch: int, out_ch: int, dilation: int = 1):
        super().__init__()
        # No bias: batch norm subtracts the mean, and any constant with it.
        conv = nn.Conv2d(in_ch, out_ch, 3, padding=dilation, dilation=dilation, bias=False)
        self.add_module("conv", conv)
        self.add_module("bn", nn.BatchNorm2d(out_ch))
        self.add_module("relu", nn.ReLU(inplace=True))


def halve(x: Tensor) -> Tensor:
    """2×2 max-pooling in ceil mode: a side of one pixel stays one, so any size can be pooled."""
    return F.max_pool2d(x, 2, ceil_mode=True)


def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Resize bilinearly, corners not aligned, if the size differs."""
    if x.shape[-2:] == size:
        return x
    if x.requires_grad and torch.is_grad_enabled() and _has_slow_gradient(x, size):
        return _Doubling.apply(x)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class _Doubling(torch.autograd.Function):
    """Bilinear resizing to twice the size, with a gradient that is several times as fast on CPUs.

    A pixel spreads over the 4×4 pixels around its place by (1, 3, 3, 1)/4 in each direction, so
    the gradient is a convolution of stride 2 with those weights. Outermost pixels also stand for
    what lies beyond the border, hence the replicated gradient there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        channels = gradient.shape[1]
        line = torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=gradient.dtype)
        kernel = torch.outer(line, line).expand(channels, 1, 4, 4)
        padded = F.pad(gradient, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, kernel, stride=2, groups=channels)


def _has_slow_gradient(x: Tensor, size: torch.Size) -> bool:
    """Whether a resizing is a doubling on a CPU in a dtype that oneDNN convolves.

    torch's own gradient leaves channels-last there and comes back, at a tenth of a training step.
    """
    doubles = size == (2 * x.shape[-2], 2 * x.shape[-1])
    return doubles and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def join(below: Tensor, skip: Tensor) -> Tensor:
    """A decoder's two inputs as one: the map below, resized to the skip, and the skip."""
    return torch.cat((resize(below, skip.shape[-2:]), skip), dim=1)


def autocast_off(device_type: str) -> AbstractContextManager:
    """Full precision for a block inside autocast."""
    # Entered only where autocast is on: it would stay in an exported graph, and meta has none.
    available = torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
