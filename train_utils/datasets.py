"""Pairs of image files: found by name, checked, read, split, and told apart from other data."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from train_utils.data import collate, unwrap_subset
from train_utils.errors import UserError, printable, shortened
from train_utils.image_io import (
    MaskReader,
    image_size,
    read_image,
    read_image_and_mask,
)
from train_utils.pairing import Pair
from train_utils.sample_cache import SampleCache

IGNORE = 255  # the class index of pixels that count in no loss and no score

# (image, target) → an item, which may have more parts behind these two
JointTransform = Callable[..., tuple[Tensor, ...]]
Reader = Callable[[Path], Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")

_CHECK_THREADS = 8  # files are read from disks that may be far away


class TwoParts:
    """A transform of a pair whose first part is not random, so that its result can be kept.

    `prepare(image, target)` is that part, `augment` the rest, which may draw random numbers.
    `preparation()` says what the result of `prepare` depends on, besides the files. To learn the
    sizes of results, a cache calls `prepare` with tensors on the meta device, which hold no values.
    """

    def __call__(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.augment(*self.prepare(image, target))

    def prepare(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def preparation(self) -> str:
        raise NotImplementedError

    def augment(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return as_tv_tensor(image), as_tv_tensor(target)

    @classmethod
    def is_all_of(cls, transforms: Any) -> bool:
        """Whether a transform is its two parts, and no subclass has put more around them."""
        return isinstance(transforms, cls) and type(transforms).__call__ is cls.__call__


class PathPairs(Sequence[Pair]):
    """Pairs of paths in two arrays, made anew whenever one is asked for.

    Looking at an object writes to it, its reference count, so that a list of paths is copied page
    by page into every loader process: the more epochs, the more memory. Arrays stay shared.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        names = [os.fsencode(path) for pair in pairs for path in pair]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._bounds = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._bounds) // 2

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        first, second, end = self._bounds[2 * range(len(self))[index] :][:3]
        names = self._names[first:second], self._names[second:end]
        return tuple(Path(os.fsdecode(name.tobytes())) for name in names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class PairDataset(Dataset):
    """Given (image, target) files; `stems` name the pairs independently of where they lie.

    read_target: makes a tensor [C, H, W] of a target's path; None: `MaskReader()`. at_least: have
    the decoder scale large JPEG images down, see `read_image`. A cache (see
    `train_utils.prepare_data.cached`) keeps what the first one of transforms in `TwoParts` makes of
    a pair, else what is read.
    """

    collate_fn = staticmethod(collate)
    # What becomes of targets of another size than their image, as `data.unequal` says ("": nothing
    # says so); and whether headers have shown that all others fit.
    unequal = ""
    checked = False

    def __init__(
        self,
        pairs: Sequence[Pair],
        stems: Sequence[str],
        transforms: JointTransform | None = None,
        read_target: Reader | None = None,
        at_least: int | None = None,
    ) -> None:
        self.pairs, self.stems = PathPairs(pairs), list(stems)
        self.transforms: Any = transforms
        self.read_target, self.at_least = read_target or MaskReader(), at_least
        self.cache: SampleCache | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        transforms = self.transforms
        parts = self.cache.get(index, self.prepared) if self.cache else self.prepared(index)
        if TwoParts.is_all_of(transforms):
            return transforms.augment(*parts)
        image, target = map(as_tv_tensor, parts)
        return transforms(image, target) if transforms else (image, target)

    def prepared(self, index: int) -> tuple[Tensor, Tensor]:
        """What a cache keeps of a pair."""
        pair = self.read(index)
        return self.transforms.prepare(*pair) if TwoParts.is_all_of(self.transforms) else pair

    def prepared_sizes(self, index: int) -> list[tuple[int, int]]:
        """(height, width) of both parts that a cache keeps, by the files' headers."""
        if not TwoParts.is_all_of(self.transforms):
            return self.sizes(index, self.at_least)
        (height, width), _ = self.sizes(index)
        image, target = torch.empty(2, 3, height, width, dtype=torch.uint8, device="meta")
        return [(x.shape[-2], x.shape[-1]) for x in self.transforms.prepare(image, target)]

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The image and the target as they are in their files."""
        pair = self.pairs[index]
        if isinstance(self.read_target, MaskReader):
            parts = read_image_and_mask(pair[0], pair[1], self.at_least, self.read_target)
        else:
            parts = self.read_image(pair[0]), self.read_target(pair[1])
        return of_one_size(pair, *parts, self.unequal, self.read_target)

    def read_image(self, path: Path) -> Tensor:
        return read_image(path, self.at_least)

    def sizes(self, index: int, at_least: int | None = None) -> list[tuple[int, int]]:
        """(height, width) of an image, read with `at_least`, and of its target."""
        pair = self.pairs[index]
        sizes = [image_size(path) for path in pair]
        if sizes[0] != sizes[1]:
            check_pair(pair, self.unequal)  # which says so
            sizes[1] = sizes[0]
        if at_least:
            sizes[0] = image_size(pair[0], at_least)
        return [(height, width) for width, height in sizes]

    def files(self, index: int) -> tuple[Path, ...]:
        """All files that an item is made of."""
        also_reads = getattr(self.read_target, "also_reads", lambda path: ())
        return *self.pairs[index], *also_reads(self.pairs[index][1])

    def name(self, index: int) -> str:
        """The path of the image, as it may be printed."""
        return printable(self.pairs[index][0])


def as_tv_tensor(tensor: Tensor) -> tv_tensors.TVTensor:
    """A tensor as torchvision's transforms know it: a picture of three channels, or a mask."""
    return tv_tensors.Image(tensor) if len(tensor) == 3 else tv_tensors.Mask(tensor)


def of_one_size(
    pair: Pair,
    first: Tensor,
    second: Tensor,
    unequal: str = "",
    read_second: Reader | None = None,
) -> tuple[Tensor, Tensor]:
    """What was read of both files of a pair, [C, H, W] each.

    unequal: with "resize" the second one is brought to the first one's size, by `resized` or by its
    reader's own way. Raises UserError if the files' sizes differ otherwise.
    """
    if first.shape[-2:] == second.shape[-2:]:
        return first, second
    # By the headers, as either may have been read at a reduced size.
    if sizes := check_pair(pair, unequal):
        width, height = sizes[0]
        second = getattr(read_second, "resized", resized)(second, [height, width])
    return first, second


def resized(values: Tensor, size: list[int]) -> Tensor:
    """Grey values or colours [C, h, w] at another size (H, W), as transforms bring them to one."""
    return F.resize(values.as_subclass(Tensor), size, antialias=True)


# --- checking -----------------------------------------------------------------------------------


def check_pairs(dataset: Dataset) -> None:
    """Raise one UserError that lists the pairs which cannot be read or differ in size, if any.

    Reads the headers only, of all files of a dataset or of a `Subset` of one.
    """
    full, _ = unwrap_subset(dataset)
    if not getattr(full, "checked", False):
        check_all(pairs_of(dataset), partial(check_pair, unequal=getattr(full, "unequal", "")))


def check_pair(pair: Pair, unequal: str = "") -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(width, height) of both files where they differ, and `unequal` lets them ("skip", "resize").

    By the headers. Raises a UserError if one of two files cannot be read, if both are one file, and
    if sizes may not differ; neither may one image be the other one turned, if it is to be resized.
    """
    image, target = pair
    image_wh, target_wh = image_size(image), image_size(target)
    if image.samefile(target):
        raise UserError(f"{target}: is the same file as {image}. Give the image's own target.")
    if image_wh == target_wh:
        return None
    is_turned = image_wh == target_wh[::-1]
    if unequal == "skip" or (unequal == "resize" and not is_turned):
        return image_wh, target_wh
    turned = " (EXIF rotations applied)" if is_turned else ""
    fix = ", or leave such pairs out: --set data.unequal=skip" if unequal else ""
    if unequal == "refuse" and not is_turned:
        fix += ", or scale their masks: --set data.unequal=resize"
    raise UserError(
        f"{image}: {image_wh[0]}×{image_wh[1]} pixels{turned}, but {target} has "
        f"{target_wh[0]}×{target_wh[1]}. Replace the one that is wrong{fix}."
    )


def check_all(items: Iterable[Item], check: Callable[[Item], Result]) -> dict[Item, Result]:
    """`check(item)` of every item; one UserError that lists the UserErrors which it raises, if any.

    On several threads, and once for every item, however often it comes.
    """
    results, problems = try_all(items, check)
    if problems:
        raise UserError(shortened(list(problems.values()), separator="; "))
    return results


def try_all(
    items: Iterable[Item], check: Callable[[Item], Result]
) -> tuple[dict[Item, Result], dict[Item, str]]:
    """As `check_all`, but with the results of some items and the messages of the others."""

    def attempt(item: Item) -> Result | UserError:
        try:
            return check(item)
        except UserError as error:
            return error

    distinct = list(dict.fromkeys(items))
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        found = dict(zip(distinct, pool.map(attempt, distinct), strict=True))
    problems = {item: str(x) for item, x in found.items() if isinstance(x, UserError)}
    results = {item: x for item, x in found.items() if not isinstance(x, UserError)}
    return results, problems


def pairs_of(dataset: Dataset) -> list[Pair]:
    """The files behind the items of a dataset or of a `Subset` of one, item by item."""
    full, indices = unwrap_subset(dataset)
    pairs = getattr(full, "pairs", None)
    return [pairs[index] for index in indices] if pairs else []


# --- telling data apart -------------------------------------------------------------------------


def split_pairs(dataset: Any, val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split a dataset's indices into (training, validation), at least one on either side.

    The pairs are ranked by a hash of the seed and of their names, and the first `val_fraction` of
    them validate: the split depends neither on the order nor on the place of the files, and a few
    new pairs move few of the old ones. Raises UserError for fewer than two pairs.
    """
    count = len(dataset)
    if count < 2:
        raise UserError(
            f"{dataset.name(0)}: one pair cannot be split into training and validation. "
            "Add pairs, or give validation folders of their own."
        )
    ranked = sorted(range(count), key=lambda index: name_hash(f"{seed}/{dataset.stems[index]}"))
    held_out = min(max(round(count * val_fraction), 1), count - 1)
    return sorted(ranked[held_out:]), sorted(ranked[:held_out])


def fingerprint(dataset: Dataset) -> str:
    """A hash of the names of a dataset's samples, in order, and of what else they are made of.

    Where the files lie does not matter: a run may continue after its data have moved, but not with
    other data, which would change its samples unnoticed.
    """
    full, indices = unwrap_subset(dataset)
    stems = getattr(full, "stems", None)
    names = [stems[index] if stems else full.name(index) for index in indices]
    names += getattr(full, "ingredients", [])
    return name_hash("\n".join(names)).hex()


def name_hash(text: str) -> bytes:
    """A hash of file names, also of such that are not UTF-8, the same on every machine."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


def found_in(root: Path) -> str:
    """What a folder holds, for messages that said what was looked for."""
    if not root.is_dir():
        return "no such folder"
    names = sorted(path.name for path in root.iterdir())
    return f"found {shortened(names) if names else 'an empty folder'}"
