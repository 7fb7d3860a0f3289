"""Run a network over an image that is too large for one piece, with the result of the whole.

An output pixel depends on the input within a limited distance only, unless a network pools over
the whole image. So tiles that overlap by twice that distance, each cut in the middle of the
overlap, give what the whole image would have given: there is no seam to be blended.

What a network pools must fall on the same grid in a tile as in the image: tiles begin at multiples
of its stride.
"""

from collections.abc import Callable
from functools import partial
from math import ceil, isqrt
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

MIN_PIXELS = 2**18  # of a tile, 512 × 512: with smaller ones nearly all work is overlap

Networks = TypeVar("Networks")


class _Span(NamedTuple):
    """A tile's extent along one side, and the part of it that is kept."""

    seen: slice  # of the image
    kept: slice  # of the tile


def limited(
    predict: Callable[[Networks, Tensor], Tensor], max_pixels: int, stride: int, margin: int
) -> Callable[[Networks, Tensor], Tensor]:
    """`predict`(networks, images [B, C, H, W]), by tiles where H·W exceeds `max_pixels`.

    Its output must have the images' size. stride: of the deepest map. margin: the pixels along a
    cut edge that the cut can change, a multiple of the stride.
    """
    side = isqrt(max_pixels) // stride * stride

    def in_tiles(models: Networks, images: Tensor) -> Tensor:
        forward = partial(predict, models)
        if images.shape[-2] * images.shape[-1] <= max_pixels:
            return forward(images)
        return tiled(forward, images, side, 2 * margin, stride)

    return in_tiles


def tiled(
    forward: Callable[[Tensor], Tensor], images: Tensor, tile: int, overlap: int, align: int
) -> Tensor:
    """forward(images), [B, C, H, W] to [B, D, H, W], from tiles of at most `tile` × `tile` pixels.

    Neighbours overlap by `overlap` pixels. Raises ValueError unless both lengths are multiples of
    `align` and tiles are larger than their overlap.
    """
    if tile % align or overlap % align or not tile > overlap:
        raise ValueError(f"tiles of {tile}, overlapping by {overlap}, on a grid of {align} pixels")
    rows, columns = (_spans(side, tile, overlap, align) for side in images.shape[-2:])
    strips = []
    for row in rows:
        strip = images[..., row.seen, :]
        parts = [forward(strip[..., column.seen])[..., column.kept] for column in columns]
        strips.append(torch.cat(parts, dim=-1)[..., row.kept, :])
    return torch.cat(strips, dim=-2)


def by_rows(paint: Callable[[slice], Tensor], height: int, width: int) -> Tensor:
    """paint(rows), [h, W, …], for bands of a megapixel, put together to [H, W, …].

    For what is made pixel by pixel, and would take gigabytes for a large photograph at once.
    """
    step = max(1, 2**20 // width)
    return torch.cat([paint(slice(top, top + step)) for top in range(0, height, step)])


def _spans(length: int, tile: int, overlap: int, align: int) -> list[_Span]:
    """Tiles along a side of `length` pixels: as few as can be, and alike but for the last one."""
    if length <= tile:
        return [_Span(slice(0, length), slice(0, length))]
    count = ceil((length - overlap) / (tile - overlap))
    step = ceil((length - overlap) / count / align) * align
    spans = []
    for start in range(0, length - overlap, step):
        stop = min(start + step + overlap, length)
        first = start + overlap // 2 if start else 0
        last = stop - overlap // 2 if stop < length else length
        spans.append(_Span(slice(start, stop), slice(first - start, last - start)))
    return spans
