"""Trimaps: files of what is known of an alpha matte, and where it is to be found."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from train_utils.datasets import of_one_size, resized
from train_utils.errors import UserError, shortened
from train_utils.image_io import MaskReader, decode, is_wide, to_rgba, within_memory
from train_utils.pairing import PLAIN, Names, Pair, files_by_stem, require_masks
from transforms import BACKGROUND, FOREGROUND, UNKNOWN

_MAX_COLOURS = 1024  # that are counted for a message


def read_trimap(path: str | PathLike[str]) -> tv_tensors.Mask:
    """Read a file as a trimap, uint8 [1, H, W] of BACKGROUND, UNKNOWN and FOREGROUND only.

    Exactly black is background, exactly white is foreground, and one grey level between 64 and 192
    of 255 is the unknown region: tools write 127, 128 or 102 there. A trimap may lack any of them.
    Grey levels are taken as they are stored, those of a palette as its colours say.
    Raises UserError for everything else: an alpha matte, JPEG noise, class codes, colours, pixels
    that are not opaque.
    """
    with within_memory(path):
        image, lossless, _ = decode(path)
        values, white = _grey_levels(path, image)
        counts = np.bincount(values.ravel(), minlength=white + 1)
        levels = np.flatnonzero(counts)
        between = levels[(levels > 0) & (levels < white)]
        if len(between) > 1 or any(not 64 <= level * 255 / white <= 192 for level in between):
            if not lossless:
                fix = "Save it as a PNG: lossy compression blurs its levels."
            elif len(levels) <= 3:
                fix = "Save it with 0 for background, 128 for unknown and 255 for foreground."
            else:
                fix = "Give the trimap, not the alpha matte, and resize it without smoothing."
            raise UserError(
                f"{path}: a trimap has 0, {white} and one grey level between for the "
                f"unknown region, but this file has {_most_frequent(levels, counts[levels])}. {fix}"
            )
        trimap = np.full(values.shape, UNKNOWN, dtype=np.uint8)
        trimap[values == 0] = BACKGROUND
        trimap[values == white] = FOREGROUND
        return tv_tensors.Mask(torch.from_numpy(trimap)[None])


def _grey_levels(path: str | PathLike[str], image: Image.Image) -> tuple[np.ndarray, int]:
    """A grey image's stored levels [H, W], and the one that is white: 255, or 65535 of 16 bits.

    Raises UserError for colours and for pixels that are not opaque.
    """
    wide = is_wide(image)
    if image.has_transparency_data:
        if wide or np.array(to_rgba(image))[..., 3].min() < 255:
            raise UserError(
                f"{path}: a trimap may not be transparent anywhere, as nobody can tell "
                "what is meant there. Save it without an alpha channel or transparent colour."
            )
        image = to_rgba(image)
    if wide:
        return np.array(image).astype(np.uint16), 65535
    rgb = image.convert("RGB")
    # Counting is given up at one more, or a photograph would cost minutes and gigabytes.
    colours = rgb.getcolors(_MAX_COLOURS)
    coloured = [each for each in colours or [] if len(set(np.atleast_1d(each[1]))) > 1]
    if colours is None or coloured:
        found = f"more than {_MAX_COLOURS} colours"
        if coloured:
            counts, names = zip(*sorted(coloured, key=str), strict=True)
            found = f"the RGB colours {_most_frequent(names, np.array(counts))}"
        raise UserError(
            f"{path}: a trimap is grey, but this file has {found}. "
            "Give the trimap itself, in black, grey (128) and white."
        )
    return np.array(rgb.getchannel(0)), 255


def _most_frequent(values: Sequence | np.ndarray, counts: np.ndarray) -> str:
    """Values with their numbers of pixels, the most frequent first, as text."""
    order = np.argsort(-counts, kind="stable")
    return shortened([f"{values[i]} ({counts[i]:,} px)" for i in order], limit=6)


class TrimapReader:
    """Reads an alpha and the trimap of its name as one target, uint8 [2, H, W].

    A `read_target` for `PairDataset`. `alphas`, `trimaps`: the folders of both. `read_alpha`: None
    is `MaskReader()`. `names`: those of alphas; a trimap is named as its image (`x`, `x_trimap`) or
    as its alpha.
    """

    def __init__(
        self,
        alphas: str | PathLike[str],
        trimaps: str | PathLike[str],
        read_alpha: MaskReader | None = None,
        names: Names = PLAIN[1],
    ) -> None:
        self.alphas, self.trimaps, self.names = Path(alphas), Path(trimaps), names
        self.read_alpha = read_alpha or MaskReader()
        self.files = files_by_stem(self.trimaps)

    def __call__(self, alpha: Path) -> tv_tensors.Mask:
        pair = alpha, self._trimap(alpha)
        parts = of_one_size(pair, self.read_alpha(pair[0]), read_trimap(pair[1]))
        return tv_tensors.Mask(torch.cat([part.as_subclass(Tensor) for part in parts]))

    def also_reads(self, alpha: Path) -> tuple[Path]:
        """The trimap's file."""
        return (self._trimap(alpha),)

    def resized(self, target: Tensor, size: list[int]) -> Tensor:
        """Alpha and trimap at another size; a trimap has three values only."""
        trimap = F.resize(target[1:], size, interpolation=F.InterpolationMode.NEAREST_EXACT)
        return torch.cat([resized(target[:1], size), trimap])

    def require(self, pairs: Sequence[Pair], folder: str | PathLike[str]) -> None:
        """Raise a UserError that lists the images of `folder` without a trimap, if any."""
        images = {self._stem(alpha): image for image, alpha in pairs}
        require_masks(images, self.files, Path(folder), self.trimaps, "trimap")

    def _trimap(self, alpha: Path) -> Path:
        return self.files[self._stem(alpha)]

    def _stem(self, alpha: Path) -> str:
        relative = alpha.relative_to(self.alphas)
        stem = str(self.names.stem(relative))
        choices = f"{stem}_trimap", stem, str(PLAIN[1].stem(relative))
        return next((choice for choice in choices if choice in self.files), stem)
