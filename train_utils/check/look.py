"""What the pixels of a pair are: a few numbers, and two small pictures that tell the rest."""

import hashlib
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from train_utils.check.findings import Targets
from train_utils.data import unwrap_subset
from train_utils.datasets import PairDataset

SIDE = 64  # of the small pictures, 8 KiB a pair: duplicates and misplaced masks show at this size
_READ_AT = 256  # large JPEG images are decoded at a reduced size, of no fewer pixels a side
_SHARP_AT = 256  # longest side at which sharpness is measured
_SOFT = 26, 230  # grey levels of a mask between these are neither object nor background

Reader = Callable[[int], tuple[Tensor, Tensor]]  # index in the whole dataset → image, target


class Look(NamedTuple):
    """What is kept of a pair.

    image, target: grey levels of the whole, uint8 [SIDE, SIDE], stretched; classes are as they are.
    histogram: of the target's 256 values; of a picture's, empty. image_hash, target_hash: of all
    pixels as they were read.
    """

    numbers: dict[str, float]
    image: np.ndarray
    target: np.ndarray
    histogram: np.ndarray
    image_hash: bytes
    target_hash: bytes


def reader_of(dataset: Dataset) -> Reader:
    """How the pairs behind a dataset are read, JPEG images at a reduced size where they are large.

    Raises UserError for a dataset without files in pairs.
    """
    full: Any = unwrap_subset(dataset)[0]
    if isinstance(full, PairDataset):
        reduced = copy(full)
        reduced.at_least = _READ_AT
        return reduced.read
    return partial(_read, full)


def _read(full: Any, index: int) -> tuple[Tensor, Tensor]:
    image, target = full.pairs[index]
    return full.read_image(image), full.read_target(target)


def look_at(read: Reader, index: int, targets: Targets) -> Look:
    """Read a pair and keep what `Look` names. Raises UserError for one that cannot be read."""
    image, target = (part.numpy() for part in read(index))
    grey, hashes = _grey(image), (_hash(image), _hash(target))
    numbers = _image_numbers(grey)
    if targets == "pictures":
        return Look(numbers, _small(grey), _small(_grey(target)), np.zeros(0, int), *hashes)
    mask = np.ascontiguousarray(target[0])
    how = Image.Resampling.NEAREST if targets == "classes" else Image.Resampling.BOX
    small = np.asarray(Image.fromarray(mask).resize((SIDE, SIDE), how))
    histogram = np.bincount(mask.ravel(), minlength=256)
    numbers |= _mask_numbers(mask, histogram, targets)
    numbers["objects"] = count_objects(is_object(small, targets))
    return Look(numbers, _small(grey), small, histogram, *hashes)


def is_object(mask: np.ndarray, targets: Targets) -> np.ndarray:
    """Where a mask, or the small picture of one, has an object: bool of the same shape."""
    if targets == "classes":
        return (mask != 0) & (mask != 255)
    return mask >= 128


def _image_numbers(grey: Image.Image) -> dict[str, float]:
    """Brightness and contrast in [0, 1], and sharpness: the spread of the Laplacian."""
    values = np.asarray(grey)
    reduced = grey.copy()
    reduced.thumbnail((_SHARP_AT, _SHARP_AT), Image.Resampling.BILINEAR)
    v = np.asarray(reduced, dtype=np.float32)
    laplacian = v[1:-1, :-2] + v[1:-1, 2:] + v[:-2, 1:-1] + v[2:, 1:-1] - 4 * v[1:-1, 1:-1]
    return {
        "brightness": float(values.mean() / 255),
        "contrast": float(values.std() / 255),
        "sharpness": float(laplacian.std() / 255) if laplacian.size else 0.0,
    }


def _mask_numbers(mask: np.ndarray, histogram: np.ndarray, targets: Targets) -> dict[str, float]:
    """Shares of the pixels: of the object, of the object along the border, and of soft levels."""
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    pixels = mask.size
    objects = is_object(np.arange(256), targets)
    return {
        "object share": float(histogram[objects].sum() / pixels),
        "border share": float(is_object(border, targets).mean()),
        "soft share": float(histogram[_SOFT[0] : _SOFT[1]].sum() / pixels),
    }


def count_objects(objects: np.ndarray) -> int:
    """The connected parts (also across corners) of a bool map [H, W], by runs of its rows."""
    rows, edges = np.nonzero(np.diff(objects.astype(np.int8), prepend=0, append=0))
    parents: list[int] = []
    runs: dict[int, list[tuple[int, int, int]]] = {}  # by row: start, end, label
    for row, start, end in zip(
        rows[::2].tolist(), edges[::2].tolist(), edges[1::2].tolist(), strict=True
    ):
        label = len(parents)
        parents.append(label)
        for other_start, other_end, other in runs.get(row - 1, ()):
            if other_start <= end and start <= other_end:
                parents[_root(parents, other)] = _root(parents, label)
        runs.setdefault(row, []).append((start, end, label))
    return sum(parent == label for label, parent in enumerate(parents))


def _root(parents: list[int], label: int) -> int:
    while parents[label] != label:
        label = parents[label]
    return label


def _grey(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).convert("L")


def _small(grey: Image.Image) -> np.ndarray:
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0))


def _hash(pixels: np.ndarray) -> bytes:
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.digest()
