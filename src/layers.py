"""Layers that several networks are built of."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
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
    trains = x.requires_grad and torch.is_grad_enabled()
    with autocast_off(x.device.type):  # on GPUs it would go on, and be joined, in fp32
        if trains and x.device.type != "cpu":
            return GatheredResize.apply(x, size)
        if trains and _doubles_fast(x, size):
            return _Doubling.apply(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class GatheredResize(torch.autograd.Function):
    """Bilinear resizing whose gradient is gathered, for GPUs; torch's own is scattered there.

    Scattering adds atomically, in 16 bits and in an order of chance, and copies a gradient that
    comes out of a `cat`. Resizing is a matrix product over columns and one over rows, and so is its
    gradient: each product sums in fp32, always in the same order, channels-last to channels-last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: torch.Size) -> Tensor:
        ctx.size = x.shape[-2:]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        batch, channels, old, new = *gradient.shape[:2], ctx.size, gradient.shape[2:]
        # In a compiled gradient they are computed anew: what is traced is not kept.
        make = _weights.__wrapped__ if torch.compiler.is_compiling() else _weights
        sides = zip(old, new, strict=True)
        rows, columns = (make(*side, gradient.dtype, gradient.device) for side in sides)
        lines = gradient.permute(0, 2, 3, 1).flatten(0, 1)  # [batch · rows, columns, channels]
        with autocast_off(gradient.device.type):
            lines = torch.bmm(columns.expand(len(lines), -1, -1), lines)
            lines = lines.view(batch, new[0], old[1] * channels)
            lines = torch.bmm(rows.expand(batch, -1, -1), lines)
        return lines.view(batch, *old, channels).permute(0, 3, 1, 2), None


@lru_cache(maxsize=64)  # making them takes as many launches as the rest of the gradient
def _weights(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each of `new` pixels of a line takes from each of its `old` ones, [old, new].

    That is 1 − the distance of their centres, and 0 beyond a distance of 1.
    """
    wide = torch.promote_types(dtype, torch.float32)
    numbers = torch.arange(max(old, new), dtype=wide, device=device)
    centres = ((numbers[:new] + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    distances = centres - numbers[:old, None]
    return (1 - distances.abs()).clamp(min=0).to(dtype)


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
        with autocast_off(gradient.device.type):  # a compiled gradient is within its forward's
            padded = F.pad(gradient, (1, 1, 1, 1), mode="replicate")
            return F.conv2d(padded, kernel, stride=2, groups=channels)


def _doubles_fast(x: Tensor, size: torch.Size) -> bool:
    """Whether a resizing on a CPU is a doubling, in a dtype that oneDNN convolves.

    torch's own gradient leaves channels-last there and comes back, at a tenth of a training step.
    """
    doubles = size == (2 * x.shape[-2], 2 * x.shape[-1])
    return doubles and x.dtype in (torch.float32, torch.bfloat16)


def join(below: Tensor, skip: Tensor) -> Tensor:
    """A decoder's two inputs as one: the map below, resized to the skip, and the skip."""
    return torch.cat((resize(below, skip.shape[-2:]), skip), dim=1)


def extend(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples of a number."""
    missing = [-side % multiple for side in x.shape[-2:]]
    if not any(missing):
        return x  # a padding by nothing is a copy, and not channels-last on GPUs
    return F.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")


def unpool(x: Tensor, indices: Tensor) -> Tensor:
    """Undo a 2×2 max-pooling: each value at the place of its maximum, zeros elsewhere.

    indices: those of `F.max_pool2d`. Windows do not overlap, so no two values meet: the order of
    writing is of no consequence, although torch calls every unpooling nondeterministic.
    """
    if x.device.type == "cpu":
        return F.max_unpool2d(x, indices, (2, 2))
    return scatter_unpool(x, indices)


def scatter_unpool(x: Tensor, indices: Tensor) -> Tensor:
    """The same, channels-last, for GPUs: torch's own takes and gives NCHW there."""
    batch, channels, height, width = x.shape
    values, places = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, indices))
    empty = x.new_zeros(batch, 4 * height * width, channels)
    filled = empty.scatter_(1, places, values)
    return filled.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


_FEW_IMAGES = 4  # up to which launches by image are no more than those of conversions


class InstanceNorm(nn.GroupNorm):
    """Instance norm with a learned scale and shift: [B, C, H, W] → the same.

    torch's own InstanceNorm2d refuses empty batches, hence one group per channel.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        few = 0 < len(x) <= _FEW_IMAGES and not torch.compiler.is_compiling()
        if x.device.type == "cpu" or not few:
            return super().forward(x)
        return norm_by_image(x, self.weight, self.bias, self.eps)


def norm_by_image(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance norm as batch norm of one image after the other, for GPUs.

    They normalise groups in fp32 and NCHW, and a batch in the network's own precision and layout.
    """
    parts = [F.batch_norm(image, None, None, weight, bias, True, eps=eps) for image in x.split(1)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def autocast_off(device_type: str) -> AbstractContextManager:
    """Full precision for a block inside autocast."""
    # Entered only where autocast is on: it would stay in an exported graph, and meta has none, for
    # which torch's own is_autocast_available breaks the graph up to 2.11.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
