"""Layers that several networks are built of."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


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
