"""The datasets: DUTS, any two folders of images and masks, and the embedded shapes.

An item is (image, target): a `tv_tensors.Image`, uint8 [3, H, W], and a `tv_tensors.Mask`, uint8
[1, H, W] in 0…255 (255 salient), both of one size; then `transforms(image, target)` is applied.
Every dataset has `name(index)`, what to call an item in messages and reports, and `pairs`, the
files behind the items (none for the embedded data).

What one task alone needs lies in `tasks/<name>/data.py`.
"""

import difflib
import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import is_dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

import shapes
from train_utils.data import behind_subsets, collate
from train_utils.distributed_utils import call_on_main
from train_utils.errors import UserError, shortened
from train_utils.image_io import (
    DraftReader,
    image_size,
    is_damaged,
    list_images,
    printable,
    read_image,
    read_image_and_mask,
    read_mask,
)
from train_utils.log import get_logger
from train_utils.sample_cache import SampleCache, open_cache
from train_utils.setup import worker_count
from train_utils.task import BaseTask
from transforms import IGNORE, TwoParts

JointTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Pair = tuple[Path, Path]
Item = TypeVar("Item")

_MAX_HINTS = 3  # comparing names is slow in folders of many thousands
_LOOKED_AT = 8  # items of a dataset of one's own, before the first step
_CHECK_THREADS = 8  # headers are read from disks that may be far away

_SHAPES_CACHE_BYTES = 512 * 2**20
_SHAPES_TARGETS = {
    "mask": tv_tensors.Mask,
    "classes": tv_tensors.Mask,
    "alpha": tv_tensors.Mask,
    "labels": tv_tensors.Image,
}


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

    `read_first` and `read_target` make tensors of the paths: `read_image`, `read_mask`, a
    `DraftReader` or a task's own. A cache (see `cached`) keeps what the first one of transforms in
    `TwoParts` makes of a pair, else what is read.
    """

    collate_fn = staticmethod(collate)

    def __init__(
        self,
        pairs: Sequence[Pair],
        stems: Sequence[str],
        transforms: JointTransform | None = None,
        read_target: Callable[[Path], Tensor] = read_mask,
        read_first: Callable[[Path], Tensor] = read_image,
    ) -> None:
        self.pairs, self.stems = PathPairs(pairs), list(stems)
        self.transforms, self.read_target, self.read_first = transforms, read_target, read_first
        self.cache: SampleCache | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.cache.get(index, self._prepared) if self.cache else self._read(index)
        if self.cache and _has_two_parts(self.transforms):
            return self.transforms.augment(*pair)
        kinds = tv_tensors.Image, tv_tensors.Image if self._coloured_target() else tv_tensors.Mask
        # From a cache come plain tensors; to wrap a wrapped one takes its time.
        image, target = (
            tensor if type(tensor) is kind else kind(tensor)
            for tensor, kind in zip(pair, kinds, strict=True)
        )
        return _transformed(image, target, self.transforms)

    def _prepared(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self._read(index)
        return self.transforms.prepare(*pair) if _has_two_parts(self.transforms) else pair

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        return read_pair(self.pairs[index], self.read_first, self.read_target)

    def _coloured_target(self) -> bool:
        return self.read_target is read_image or isinstance(self.read_target, DraftReader)

    def prepared_shapes(self, index: int) -> list[tuple[int, int, int]]:
        """(channels, height, width) of both parts that a cache keeps, by the files' headers."""
        if _has_two_parts(self.transforms):
            sizes = self.transforms.prepared_sizes(*self._sizes(index, as_read=False)[0])
        else:
            sizes = self._sizes(index, as_read=True)
        target_channels = 3 if self._coloured_target() else 1
        channels = 3, getattr(self.read_target, "channels", target_channels)
        return [(c, *size) for c, size in zip(channels, sizes, strict=True)]

    def _sizes(self, index: int, as_read: bool) -> list[tuple[int, int]]:
        """(height, width) of both files; `as_read`: the first as a `DraftReader` reads it."""
        pair = self.pairs[index]
        sizes = [image_size(path) for path in pair]
        _require_one_size(pair, *sizes)
        if as_read and isinstance(self.read_first, DraftReader):
            sizes[0] = image_size(pair[0], self.read_first.at_least)
        return [(height, width) for width, height in sizes]

    def files(self, index: int) -> tuple[Path, ...]:
        """All files that an item is made of."""
        also_reads = getattr(self.read_target, "also_reads", lambda path: ())
        return *self.pairs[index], *also_reads(self.pairs[index][1])

    def name(self, index: int) -> str:
        """The path of the image."""
        return printable(self.pairs[index][0])


class PairFolderDataset(PairDataset):
    """Images and masks of any two folders, paired by their path in the folder without the suffix.

    `images/city/a.jpg` belongs to `masks/city/a.png`. Masks without an image are left out and
    counted in `unmatched_masks`. Raises UserError if an image has no mask, or if a folder holds two
    files that differ in nothing but the suffix.
    """

    def __init__(
        self,
        images: str | PathLike[str],
        masks: str | PathLike[str],
        transforms: JointTransform | None = None,
        read_target: Callable[[Path], Tensor] = read_mask,
        read_first: Callable[[Path], Tensor] = read_image,
    ) -> None:
        images, masks = Path(images), Path(masks)
        image_files, mask_files = files_by_stem(images, leave_out=masks), files_by_stem(masks)
        require_masks(image_files, mask_files, images, masks)
        stems = list(image_files)
        pairs = [(image_files[stem], mask_files[stem]) for stem in stems]
        super().__init__(pairs, stems, transforms, read_target, read_first)
        self.unmatched_masks = len(mask_files) - len(image_files)


class DUTSDataset(PairFolderDataset):
    """DUTS (Wang et al., CVPR 2017), or any set in its layout.

    Below `root`, the training pairs lie in `DUTS-TR/DUTS-TR-Image` and `DUTS-TR/DUTS-TR-Mask`, the
    test pairs likewise with `TE`. Raises UserError if they do not.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        train: bool = True,
        transforms: JointTransform | None = None,
        read_first: Callable[[Path], Tensor] = read_image,
    ) -> None:
        part = "DUTS-TR" if train else "DUTS-TE"
        images, masks = (Path(root, part, f"{part}-{kind}") for kind in ("Image", "Mask"))
        if not (images.is_dir() and masks.is_dir()):
            raise UserError(_layout_error(Path(root), part))
        super().__init__(images, masks, transforms, read_first=read_first)


class ShapesDataset(Dataset):
    """`count` scenes of the embedded data set, drawn on demand, from scene `first` on.

    Ranges that do not overlap share no scene, so one `seed` serves training and validation.
    `target` names the field of `shapes.Scene` to pair with the image: "mask", "classes" and "alpha"
    come as `tv_tensors.Mask`, "labels" (RGB) as `tv_tensors.Image`. All but scenes with "mask" are
    `familiar` ones.

    Scenes never change, so each process (each worker of a loader, too) keeps those it has drawn, in
    at most 512 MiB: 4·size² bytes a scene with a mask, 400 kB at 320×320. What does not fit is
    drawn anew every time.
    Raises UserError for a size that is too small or an empty range.
    """

    collate_fn = staticmethod(collate)

    def __init__(
        self,
        size: int,
        seed: int,
        count: int,
        first: int = 0,
        transforms: JointTransform | None = None,
        target: str = "mask",
    ) -> None:
        if size < shapes.MIN_SIZE:
            raise UserError(f"size {size}: too small for a scene. Use {shapes.MIN_SIZE} or more.")
        if count < 1:
            raise UserError(f"count {count}: no scenes to draw. Use 1 or more.")
        if target not in _SHAPES_TARGETS:
            raise ValueError(f"target {target!r}: not one of {', '.join(_SHAPES_TARGETS)}")
        self.size, self.seed, self.target = size, seed, target
        self.fields: tuple[str, ...] = "image", target
        self.scenes = range(first, first + count)
        self.transforms = transforms
        self.pairs: list[Pair] = []
        self._drawn: dict[int, tuple[Tensor, ...]] = {}
        self._drawn_bytes = 0

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self._draw(self.scenes[index])
        # Clones, so that a transform which works in place leaves the kept scene alone.
        return _transformed(
            tv_tensors.Image(image.clone()),
            _SHAPES_TARGETS[self.target](target.clone()),
            self.transforms,
        )

    def name(self, index: int) -> str:
        """The scene's number and the data set's seed."""
        return f"scene {self.scenes[index]} (seed {self.seed})"

    def _draw(self, number: int) -> tuple[Tensor, ...]:
        if number in self._drawn:
            return self._drawn[number]
        familiar = self.target != "mask"
        scene = shapes.render_scene(self.seed, number, self.size, familiar)
        drawn = tuple(getattr(scene, field) for field in self.fields)
        size = sum(tensor.nbytes for tensor in drawn)
        if self._drawn_bytes + size <= _SHAPES_CACHE_BYTES:
            self._drawn[number] = drawn
            self._drawn_bytes += size
        return drawn


class AnyDataset(Dataset):
    """A dataset of one's own, whose items may be PIL images, numpy arrays or tensors.

    Images: uint8 [3, H, W] or [H, W, 3], which are normalised on the device, or floats, which are
    taken as they are. Targets: [H, W], [1, H, W] or [H, W, 1]; with `labels` class indices of any
    integer type (negative ones are ignored), else uint8 codes, bool or floats in [0, 1]. More parts
    may follow, as the task's losses want them. Items of one training batch must have one size.
    """

    collate_fn = staticmethod(collate)

    def __init__(self, dataset: Any, labels: bool) -> None:
        self.dataset, self.labels = dataset, labels
        self.pairs: list[Pair] = []  # no files that are known of
        self.name = getattr(dataset, "name", lambda index: f"sample {index}")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, target, *more = self.dataset[index]
        try:
            first = _as_image(image)
            second = _as_labels(target) if self.labels else _as_map(target)
        except (TypeError, ValueError) as error:
            what = type(self.dataset).__name__
            raise UserError(f"{what}, {self.name(index)}: {error}") from error
        return first, second, *map(_planes, more)

    def check(self, one_size: bool) -> None:
        """Look at the first items; raise UserError for such as could not be trained on or scored.

        one_size: all images must have the size of the first one.
        """
        items = [self[index] for index in range(min(_LOOKED_AT, len(self)))]
        what = type(self.dataset).__name__
        if not items:
            raise UserError(f"{what}: is empty.")
        sizes = [tuple(image.shape) for image, *_ in items]
        if one_size and len(set(sizes)) > 1:
            raise UserError(
                f"{what}: images of several sizes, {sizes[0]} and {max(sizes, key=sizes.count)} "
                "among them, do not fit into a batch. Resize or crop them in its transforms."
            )
        targets = [target for _, target, *_ in items]
        if not self.labels and all(t.dtype == torch.uint8 and t.max() <= 1 for t in targets):
            raise UserError(
                f"{what}: its uint8 targets hold 0 and 1 only, which mean 0 and 1/255. Give 0 and "
                "255, bool, or floats from 0 to 1."
            )


def _planes(value: Any) -> Tensor:
    """A PIL image, array or tensor as [C, H, W]; channels come last in images and arrays."""
    if isinstance(value, Tensor):
        tensor, last = value.as_subclass(Tensor), False
    else:
        tensor, last = torch.from_numpy(np.array(value)), True
    if tensor.dim() == 2:
        return tensor[None]
    if tensor.dim() != 3:
        raise ValueError(f"{list(tensor.shape)} is no picture: give [C, H, W] or [H, W]")
    return tensor.permute(2, 0, 1).contiguous() if last and tensor.shape[-1] <= 4 else tensor


def _as_image(value: Any) -> Tensor:
    tensor = _planes(value.convert("RGB") if isinstance(value, PIL.Image.Image) else value)
    if tensor.dtype == torch.uint8 or tensor.dtype.is_floating_point:
        return tensor if tensor.dtype == torch.uint8 else tensor.float()
    raise TypeError(f"an image of {tensor.dtype}: give uint8, or floats that are normalised")


def _as_map(value: Any) -> Tensor:
    tensor = _planes(value)
    if tensor.dtype in (torch.uint8, torch.bool) or tensor.dtype.is_floating_point:
        return tensor.float() if tensor.dtype == torch.float64 else tensor
    raise TypeError(f"a target of {tensor.dtype} has no agreed scale: give uint8, bool or floats")


def _as_labels(value: Any) -> Tensor:
    tensor = _planes(value)
    if tensor.dtype.is_floating_point or len(tensor) != 1:
        shape = list(tensor.shape)
        raise TypeError(f"labels of {tensor.dtype}, {shape}: give integers [H, W]")
    if tensor.dtype == torch.uint8:
        return tensor
    if tensor.numel() and tensor.max() > IGNORE:
        raise ValueError(f"label {int(tensor.max())}: at most 254 classes, and {IGNORE} is ignored")
    return tensor.masked_fill(tensor < 0, IGNORE).to(torch.uint8)


def adapted(dataset: Any, labels: bool, one_size: bool) -> Dataset:
    """A dataset of this project as it is; any other with its items made alike: `AnyDataset`."""
    if getattr(behind_subsets(dataset)[0], "collate_fn", None) is collate:
        return dataset
    wrapped = AnyDataset(dataset, labels)
    wrapped.check(one_size)
    get_logger().info(
        f"{type(dataset).__name__}: a dataset of your own; its files are not checked, scanned or "
        "cached, and after a restart its samples are taken to be the same if their number is"
    )
    return wrapped


def folder_pairs(
    data: Any,
    train: bool,
    transforms: JointTransform | None = None,
    read_target: Callable[[Path], Tensor] = read_mask,
    all_pairs: bool = False,
    read_first: Callable[[Path], Tensor] = read_image,
) -> Dataset:
    """Training or validation pairs of the folders that `data` (a `FolderData`) names.

    Without validation folders of its own, `val_fraction` of the pairs is held out; `all_pairs`
    gives them all.
    """
    how = transforms, read_target, read_first
    if data.val_images and not train:
        return PairFolderDataset(data.val_images, data.val_masks, *how)
    pairs = PairFolderDataset(data.images, data.masks, *how)
    if all_pairs or data.val_images:
        return pairs
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[0 if train else 1])


def image_reader(data: Any, side: int) -> Callable[[Path], Tensor]:
    """What reads images that are resized to at most `side` pixels, see `FolderData.draft`."""
    return DraftReader(2 * side) if data.draft else read_image


def split_pairs(
    dataset: PairDataset, val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
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
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction {val_fraction}: not a share. Use a value between 0 and 1.")

    ranked = sorted(range(count), key=lambda index: name_hash(f"{seed}/{dataset.stems[index]}"))
    held_out = min(max(round(count * val_fraction), 1), count - 1)
    return sorted(ranked[held_out:]), sorted(ranked[:held_out])


def check_pairs(dataset: Dataset) -> None:
    """Raise one UserError that lists the pairs which cannot be read or differ in size, if any.

    Reads the headers only, of all files of a dataset or of a `Subset` of one.
    """
    refuse_faulty(pairs_of(dataset), check_pair)


def refuse_faulty(items: Iterable[Item], check: Callable[[Item], object]) -> None:
    """Raise one UserError that lists the items for which `check(item)` raises one, if any.

    Checks on several threads, and every item once, however often it comes.
    """
    problems = find_faulty(items, check)
    if problems:
        raise UserError(shortened(list(problems.values()), separator="; "))


def find_faulty(items: Iterable[Item], check: Callable[[Item], object]) -> dict[Item, str]:
    """The items for which `check(item)` raises a UserError, each with its message."""

    def problem(item: Item) -> str | None:
        try:
            check(item)
        except UserError as error:
            return str(error)
        return None

    distinct = list(dict.fromkeys(items))
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        found = zip(distinct, pool.map(problem, distinct), strict=True)
        return {item: text for item, text in found if text}


def check_pair(pair: Pair) -> None:
    """Raise a UserError if one of two files cannot be read, or if their headers' sizes differ."""
    image, target = map(image_size, pair)
    _require_one_size(pair, image, target)


def pairs_of(dataset: Dataset) -> Sequence[Pair]:
    """The files behind the items of a dataset or of a `Subset` of one, item by item."""
    if isinstance(dataset, Subset):
        pairs = pairs_of(dataset.dataset)
        return [pairs[index] for index in dataset.indices] if pairs else []
    return dataset.pairs


def prepare_datasets(
    args: Namespace, task: BaseTask, train_set: Dataset | None, val_set: Dataset
) -> tuple[BaseTask, Any, Dataset]:
    """The data checked and cached as the recipe says, and the task with what they decide."""
    device = torch.device(args.device)
    workers = worker_count(task.cfg.train.workers, device, args.local_world_size)
    given = [
        adapted(dataset, task.LABELS, one_size=dataset is train_set)
        for dataset in (train_set, val_set)
        if dataset is not None
    ]
    *first, val_set = readable(task.cfg.data, *given)
    train_set = first[0] if first else None
    found = call_on_main(lambda: task.prepare_data(train_set, val_set, workers))
    return task.with_values(found), train_set, val_set


def readable(data: Any, *datasets: Dataset) -> list[Dataset]:
    """Datasets, `cached`, whose files have all been decoded if `data` (a `FolderData`) says so.

    Rank 0 reads every file as the datasets do. With `data.skip_unreadable`, the pairs that have a
    damaged file are left out on all ranks, listed in the log, and replaced by nothing. To be called
    on every rank. Raises one UserError that lists the files which cannot be read and are not left
    out, and UserErrors if nothing is left.
    """
    damaged: list[Path] = []
    if data.verify or data.skip_unreadable:
        damaged = call_on_main(lambda: _find_damaged(datasets, data.skip_unreadable))
    return [cached(data, leave_out(dataset, damaged)) for dataset in datasets]


def cached(data: Any, dataset: Dataset) -> Dataset:
    """The dataset, which keeps its decoded items in a pack where `data` (a `FolderData`) says so.

    No item is another one by that. Raises UserError for files that do not fit together, and where
    there is no room for the pack.
    """
    whole, indices = behind_subsets(dataset)
    if data.cache == "none":
        return dataset
    if not isinstance(whole, PairDataset):
        get_logger().info("data.cache: not for data that are drawn or composed; nothing is cached")
        return dataset

    def shapes() -> list[list[tuple[int, int, int]]]:
        found: dict[int, list] = {}

        def note(index: int) -> None:
            found[index] = whole.prepared_shapes(index)

        refuse_faulty(indices, note)
        return [found[index] for index in indices]

    transforms = whole.transforms
    parts = [_described(reader) for reader in (whole.read_first, whole.read_target)]
    parts += [transforms.preparation()] if _has_two_parts(transforms) else []
    parts += [type(whole).__name__, type(transforms).__name__]
    folders = sorted({str(path.parent.absolute()) for path in whole.pairs[0]})
    whole.cache = open_cache(
        data.cache,
        data.cache_dir,
        indices,
        [whole.files(index) for index in indices],
        description=_code_of(whole.read_first, whole.read_target, type(whole), type(transforms)),
        family=" | ".join([*parts, *folders]),
        shapes=shapes,
    )
    return dataset


def _has_two_parts(transforms: Any) -> bool:
    """Whether a transform is its two parts and nothing more."""
    is_one = isinstance(transforms, TwoParts)
    return is_one and type(transforms).__call__ is TwoParts.__call__


def _described(reader: Any) -> str:
    """A reader and its settings as text, the same in every process."""
    if isinstance(reader, partial):
        return f"{_described(reader.func)} {reader.args} {sorted(reader.keywords.items())}"
    if is_dataclass(reader):
        return repr(reader)
    return getattr(reader, "__qualname__", None) or f"{type(reader).__name__} {vars(reader)}"


def _code_of(*parts: Any) -> str:
    """A hash of the source that makes items of files, and versions of the libraries in it.

    An edit to a transform must not go unseen for items that an earlier run has kept.
    """
    parts = tuple(part.func if isinstance(part, partial) else part for part in parts)
    names = {part.__module__ for part in parts} | {__name__, TwoParts.__module__}
    names |= {read_image.__module__, "tasks.segmentation.label_maps"}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in names}
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(filter(None, files), key=lambda file: Path(file).name):
        digest.update(Path(file).read_bytes())
    return f"{digest.hexdigest()} {torch.__version__} {torchvision.__version__} {PIL.__version__}"


def _find_damaged(datasets: Sequence[Dataset], skip: bool) -> list[Path]:
    """The damaged files behind datasets; all others that cannot be read are refused."""
    readers = {path: read for dataset in datasets for path, read in _readers(dataset).items()}
    problems = find_faulty(readers, lambda path: readers[path](path))
    damaged = {path: text for path, text in problems.items() if skip and is_damaged(path)}
    refused = [text for path, text in problems.items() if path not in damaged]
    if refused:
        listed = shortened(refused, separator="; ")
        raise UserError(f"{len(refused)} of {len(readers)} files cannot be used: {listed}")
    lines = [f"decoded all {len(readers)} files of the data"]
    if damaged:
        lines[0] += f"; {len(damaged)} are damaged, and what they belong to is left out:"
    get_logger().info("\n  ".join([*lines, *damaged.values()]))
    return list(damaged)


def _readers(dataset: Dataset) -> dict[Path, Callable[[Path], object]]:
    """Every file behind a dataset, with what reads it there."""
    whole, _ = behind_subsets(dataset)
    readers: dict[Path, Callable[[Path], object]] = {}
    for first, target in pairs_of(dataset):
        readers |= {first: whole.read_first, target: whole.read_target}
    return readers | dict.fromkeys(getattr(whole, "backgrounds", []), read_image)


def leave_out(dataset: Dataset, files: Collection[Path]) -> Dataset:
    """A dataset without the pairs, and in place without the backgrounds, that are among `files`.

    Raises UserError if nothing is left.
    """
    if not files:
        return dataset
    gone = set(files)
    whole, indices = behind_subsets(dataset)
    kept = [index for index in indices if gone.isdisjoint(whole.pairs[index])]
    backgrounds = [path for path in getattr(whole, "backgrounds", []) if path not in gone]
    if not kept or (hasattr(whole, "backgrounds") and not backgrounds):
        raise UserError(
            f"{printable(whole.pairs[0][0].parent)}: nothing is left of the {len(indices)} "
            f"pairs to train or to validate with, or of their backgrounds, without damaged files "
            f"such as {printable(next(iter(files)))}. Replace them by intact copies."
        )
    if backgrounds:
        whole.backgrounds = backgrounds
    return Subset(whole, kept) if len(kept) < len(indices) else dataset


def fingerprint(dataset: Dataset) -> str:
    """A hash of the names of a dataset's samples, in order, and of what else they are made of.

    Where the files lie does not matter: a run may continue after its data have moved, but not with
    other data, which would change its samples unnoticed.
    """
    whole, indices = behind_subsets(dataset)
    stems = getattr(whole, "stems", None)
    names = [stems[index] if stems else whole.name(index) for index in indices]
    names += getattr(whole, "ingredients", [])
    return name_hash("\n".join(names)).hex()


def name_hash(text: str) -> bytes:
    """A hash of file names, also of such that are not UTF-8, the same on every machine."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()


def read_pair(
    pair: Pair, read_first: Callable[[Path], Tensor], read_target: Callable[[Path], Tensor]
) -> tuple[Tensor, Tensor]:
    """Both files of a pair, [C, H, W] each. Raises UserError if the files' sizes differ."""
    if read_first is read_image and read_target is read_mask:
        image, target = read_image_and_mask(*pair)
    else:
        image, target = read_first(pair[0]), read_target(pair[1])
    if image.shape[-2:] != target.shape[-2:]:
        _require_one_size(pair, *map(image_size, pair))  # either may be read at a reduced size
    return image, target


def _transformed(
    image: Tensor, target: Tensor, transforms: JointTransform | None
) -> tuple[Tensor, Tensor]:
    return transforms(image, target) if transforms else (image, target)


# --- pairing ------------------------------------------------------------------------------------


def files_by_stem(folder: Path, leave_out: Path | None = None) -> dict[str, Path]:
    """A folder's images by their path in it without the suffix, in the order of `list_images`.

    Files below `leave_out` do not count, unless it is the folder itself: masks may lie in a folder
    among the images. Raises UserError for two files of one stem, and if no file is left.
    """
    inner = leave_out and leave_out.resolve()
    outer = folder.resolve()
    files: dict[str, Path] = {}
    for path in list_images(folder, recursive=True):
        relative = path.relative_to(folder)
        if inner and inner != outer and inner in (outer / relative).parents:
            continue
        stem = relative.with_suffix("").as_posix()
        if stem in files:
            raise UserError(
                f"{printable(path)}: only the suffix tells it from {printable(files[stem].name)}, "
                "and pairs go by the name without it. Remove or rename one of the two."
            )
        files[stem] = path
    if not files:
        raise UserError(f"{printable(folder)}: holds no images but the masks. Check the path.")
    return files


def require_masks(
    image_files: dict[str, Path],
    mask_files: dict[str, Path],
    images: Path,
    masks: Path,
    kind: str = "mask",
) -> None:
    """Raise a UserError that lists the images without a partner of their stem, if any.

    `images` and `masks` are the folders of both; `kind` says what a partner is.
    """
    missing = [stem for stem in image_files if stem not in mask_files]
    if not missing:
        return
    spare = [stem for stem in mask_files if stem not in image_files]
    hints = [
        f"{printable(stem)} ~ {printable(close)}"
        for stem in missing[:_MAX_HINTS]
        if (close := _closest(stem, spare))
    ]
    look_close = f" Names that look close: {'; '.join(hints)}." if hints else ""
    names = shortened([printable(image_files[stem].name) for stem in missing])
    raise UserError(
        f"{printable(masks)}: no {kind} for {len(missing)} of the {len(image_files)} images in "
        f"{printable(images)}: {names}."
        f"{look_close} "
        f"Name each {kind} like its image (photo.jpg, photo.png), or remove these images."
    )


def _closest(stem: str, candidates: Sequence[str]) -> str | None:
    """The shortest candidate that contains `stem` (cat in cat_mask), else the most similar one."""
    containing = [candidate for candidate in candidates if stem in candidate]
    if containing:
        return min(containing, key=len)
    return next(iter(difflib.get_close_matches(stem, candidates, n=1)), None)


def _layout_error(root: Path, part: str) -> str:
    looked_for = f"{part}/{part}-Image and {part}/{part}-Mask"
    return (
        f"{printable(root)}: looked for {looked_for}, {found_in(root)}. Give the folder that "
        f"holds {part}, or your own pairs by --images DIR --masks DIR."
    )


def found_in(root: Path) -> str:
    """What a folder holds, for messages that said what was looked for."""
    if not root.is_dir():
        return "no such folder"
    names = sorted(printable(path.name) for path in root.iterdir())
    return f"found {shortened(names) if names else 'an empty folder'}"


def _require_one_size(pair: Pair, image_wh: tuple[int, int], mask_wh: tuple[int, int]) -> None:
    if image_wh == mask_wh:
        return
    image, mask = map(printable, pair)
    turned = " (EXIF rotations applied)" if image_wh == mask_wh[::-1] else ""
    raise UserError(
        f"{image}: {image_wh[0]}×{image_wh[1]} pixels{turned}, but {mask} has "
        f"{mask_wh[0]}×{mask_wh[1]}. Replace the one that is wrong."
    )
