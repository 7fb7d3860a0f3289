"""Data before the first step: any Dataset is taken, its files are verified and cached."""

import hashlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, Subset

from train_utils import colour_profiles, image_bounds, image_io
from train_utils.check.first_look import first_look
from train_utils.collectives import call_on_main
from train_utils.data import KeyedDataset, collate, generators_kept, item_name, unwrap_subset
from train_utils.datasets import (
    IGNORE,
    PairDataset,
    Reader,
    TwoParts,
    check_all,
    check_pair,
    pairs_of,
    try_all,
)
from train_utils.errors import UserError, described, shortened
from train_utils.image_io import is_damaged, read_image
from train_utils.log import get_logger
from train_utils.sample_cache import Shape, open_cache
from train_utils.task import BaseTask

_LOOKED_AT = 8  # items of a dataset of one's own, before the first step
_LISTED = 10  # files of a kind, in the log


def prepare_datasets(
    task: BaseTask, train_set: Dataset | None, val_set: Dataset
) -> tuple[BaseTask, Any, Any]:
    """The data checked and cached as the recipe says, and the task with what they decide."""
    given = [
        wrap_dataset(dataset, task, training=dataset is train_set)
        for dataset in (train_set, val_set)
        if dataset is not None
    ]
    if own := [type(each.dataset).__name__ for each in given if isinstance(each, AnyDataset)]:
        get_logger().info(
            f"{', '.join(dict.fromkeys(own))}: a dataset of your own. Its files are not checked, "
            "scanned or cached; after a restart its samples are taken to be the same if their "
            "number is; --test-only and validation.py score what build_val_dataset gives"
        )
    data = task.cfg.data
    given = without_unequal(data, *verify_files(data, *given))
    *first, val_set = [cached(data, dataset) for dataset in given]
    train_set = first[0] if first else None

    def values_of_data() -> dict[str, Any]:
        _check_alike(train_set, val_set)
        _refuse_shared(train_set, val_set)
        for finding in first_look(train_set, data.image_size) if train_set else []:
            get_logger().info(finding.line())
        return task.prepare_data(train_set, val_set)

    return task.with_values(call_on_main(values_of_data)), train_set, val_set


def _check_alike(train_set: Any, val_set: Any) -> None:
    """UserError where images of one set are normalised on the device and those of the other not."""
    if not train_set:
        return
    with generators_kept():
        kinds = [KeyedDataset(each, 0).item(0)[0].dtype for each in (train_set, val_set)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"training images are {kinds[0]}, validation images {kinds[1]}: only uint8 is "
            "normalised on the device. Have the transforms of both return uint8 (round first)."
        )


def _refuse_shared(train_set: Any, val_set: Any) -> None:
    """UserError where images to train on also validate, behind whichever names and links."""

    def files(dataset: Any) -> dict[tuple[int, int], Path]:
        images = {image for image, _ in pairs_of(dataset)} if dataset else set()
        about = [(image.stat(), image) for image in sorted(images) if image.exists()]
        return {(found.st_dev, found.st_ino): image for found, image in about}

    train, val = files(train_set), files(val_set)
    if both := [str(val[key]) for key in val if key in train]:
        raise UserError(
            f"{len(both)} of {len(val)} images that validate are trained on, too, which makes "
            f"scores worthless: {shortened(both)}. Give folders that share no image, or leave "
            "--val-images and --val-masks out: then a tenth of the images is held out."
        )


# --- datasets of a user's own -------------------------------------------------------------------


def wrap_dataset(dataset: Any, task: BaseTask, training: bool) -> Dataset:
    """A dataset of this project unchanged, and any other one, checked, in an `AnyDataset`."""
    if getattr(unwrap_subset(dataset)[0], "collate_fn", None) is collate:
        return dataset
    wrapped = AnyDataset(dataset, task.LABELS)
    wrapped.check(task, training)
    return wrapped


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

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        item = self.dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise UserError(f"{self._what(index)} is {described(item)}. Return (image, target).")
        convert = [_as_image, _as_labels if self.labels else _as_map, *[_planes] * (len(item) - 2)]
        parts = []
        for number, value in enumerate(item):
            try:
                parts.append(convert[number](value))
            except (TypeError, ValueError) as error:
                what = f"{self._what(index)}, part {number + 1}"
                raise UserError(f"{what} of the item: {error}") from error
        return tuple(parts)

    def name(self, index: int) -> str:
        return item_name(self.dataset, index)

    def _what(self, index: int) -> str:
        return f"{type(self.dataset).__name__}, {self.name(index)}"

    def check(self, task: BaseTask, training: bool) -> None:
        """Look at the first items; raise UserError for such as could not be trained on or scored.

        training: all images must have the size of the first one, since they share batches.
        """
        items = [self[index] for index in range(min(_LOOKED_AT, len(self)))]
        what = type(self.dataset).__name__
        if not items:
            raise UserError(f"{what}: is empty.")
        for index, (image, target, *_) in enumerate(items):
            try:
                task.check_item(image, target, training)
            except ValueError as error:
                raise UserError(f"{self._what(index)}: {error}") from error
        sizes = [tuple(image.shape) for image, *_ in items]
        if training and len(set(sizes)) > 1:
            raise UserError(
                f"{what}: images of several sizes, {sizes[0]} and {max(sizes, key=sizes.count)} "
                "among them, do not fit into a batch. Resize or crop them in its transforms."
            )
        if items[0][0].is_floating_point():
            low, high = items[0][0].aminmax()
            get_logger().info(
                f"{what}: its float images are taken as they are, the first one with values from "
                f"{low:.3g} to {high:.3g}; uint8 ones would be normalised"
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
        array = np.array(value)
        if array.dtype.kind not in "buif":
            raise TypeError(f"{described(value)} is no picture: give an image, array or tensor")
        if array.dtype.kind == "u" and array.itemsize > 1:  # torch computes little with them
            array = array.astype(np.int64)
        tensor, last = torch.from_numpy(array), True
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


# --- verified files -----------------------------------------------------------------------------


def verify_files(data: Any, *datasets: Dataset) -> list[Dataset]:
    """Decode every file behind datasets if `data` (a `FolderData`) says so, as the datasets do.

    With `data.skip_unreadable`, the pairs that have a damaged file are left out, on all ranks,
    listed in the log, and replaced by nothing. To be called on every rank, of which rank 0 reads.
    Raises one UserError that lists the files which cannot be read and are not left out, and
    UserErrors if nothing is left.
    """
    if not (data.verify or data.skip_unreadable):
        return list(datasets)
    found = call_on_main(lambda: _find_damaged(datasets, data.skip_unreadable))
    damaged = [Path(path) for path in found]
    return [without_files(dataset, damaged) for dataset in datasets]


def _find_damaged(datasets: Sequence[Dataset], skip: bool) -> list[str]:
    """The damaged files behind datasets; all others that cannot be read are refused."""
    readers = {path: read for dataset in datasets for path, read in _readers(dataset).items()}

    def check(path: Path) -> None:
        readers[path](path)

    _, problems = try_all(readers, check)
    damaged = {path: text for path, text in problems.items() if skip and is_damaged(path)}
    refused = [text for path, text in problems.items() if path not in damaged]
    if refused:
        listed = shortened(refused, separator="; ")
        raise UserError(f"{len(refused)} of {len(readers)} files cannot be used: {listed}")
    lines = [f"decoded all {len(readers)} files of the data"]
    if damaged:
        lines[0] += f"; {len(damaged)} are damaged, and what they belong to is left out:"
    for line in [*lines, *(f"  {text}" for text in damaged.values())]:
        get_logger().info(line)
    return [str(path) for path in damaged]


def _readers(dataset: Dataset) -> dict[Path, Reader]:
    """Every file behind a dataset, with what reads it there."""
    full, _ = unwrap_subset(dataset)
    readers: dict[Path, Reader] = {}
    for image, target in pairs_of(dataset):
        readers |= {image: full.read_image, target: full.read_target}
    return readers | dict.fromkeys(getattr(full, "backgrounds", []), read_image)


def without_unequal(data: Any, *datasets: Dataset) -> list[Dataset]:
    """Datasets whose pairs of unequal sizes are treated as `data.on_unequal` says.

    Pairs that are skipped are left out on all ranks, listed in the log, and replaced by nothing, as
    masks are listed that are resized; "refuse" leaves all to the task's own check. To be called on
    every rank, of which rank 0 reads the headers. Raises UserError if nothing is left.
    """
    how = data.on_unequal
    for dataset in filter(pairs_of, datasets):
        unwrap_subset(dataset)[0].unequal = how
    if how == "refuse":
        return list(datasets)
    found = call_on_main(lambda: _find_unequal(datasets, how))
    images = [Path(path) for path in found] if how == "skip" else []
    return [without_files(dataset, images, "images of unequal masks") for dataset in datasets]


def _find_unequal(datasets: Sequence[Dataset], how: str) -> list[str]:
    """The images whose mask has another size; what else is wrong is left to the task's check."""
    pairs = {pair for each in datasets for pair in pairs_of(each) if pair[0] != pair[1]}
    sizes, problems = try_all(pairs, partial(check_pair, unequal=how))
    if not problems:
        for dataset in filter(pairs_of, datasets):
            unwrap_subset(dataset)[0].checked = True
    unequal = {pair: found for pair, found in sorted(sizes.items()) if found}
    if unequal:
        done = "are left out" if how == "skip" else "get their mask resized"
        get_logger().info(
            f"{len(unequal)} of {len(pairs)} pairs, whose mask has another size than the image, "
            f"{done} (data.unequal={how}):"
        )
        for (image, _), ((width, height), (w, h)) in list(unequal.items())[:_LISTED]:
            get_logger().info(f"  {image}: {width}×{height}, mask {w}×{h}")
        if (more := len(unequal) - _LISTED) > 0:
            get_logger().info(f"  and {more} more")
    return [str(image) for image, _ in unequal]


def without_files(dataset: Dataset, files: Collection[Path], why: str = "damaged files") -> Dataset:
    """A dataset without the pairs, and in place without the backgrounds, that are among `files`.

    why: what these are, for the UserError if nothing is left.
    """
    if not files:
        return dataset
    gone = set(files)
    full, indices = unwrap_subset(dataset)
    if not pairs_of(dataset):
        return dataset
    kept = [index for index in indices if gone.isdisjoint(full.pairs[index])]
    backgrounds = [path for path in getattr(full, "backgrounds", []) if path not in gone]
    if not kept or (hasattr(full, "backgrounds") and not backgrounds):
        raise UserError(
            f"{full.pairs[0][0].parent}: nothing is left of the {len(indices)} "
            f"pairs to train or to validate with, or of their backgrounds, without {why} "
            f"such as {next(iter(files))}. Replace them."
        )
    if backgrounds:
        full.backgrounds = backgrounds
    return Subset(full, kept) if len(kept) < len(indices) else dataset


# --- cached samples -----------------------------------------------------------------------------


def cached(data: Any, dataset: Dataset) -> Dataset:
    """The dataset, which keeps its decoded items in a pack where `data` (a `FolderData`) says so.

    Samples stay the same to the bit. Raises UserError for files that do not fit together, and where
    there is no room for the pack.
    """
    full, indices = unwrap_subset(dataset)
    if data.cache == "none":
        return dataset
    if not isinstance(full, PairDataset):
        get_logger().info("data.cache: not for data that are drawn or composed; nothing is cached")
        return dataset

    def shapes() -> list[list[Shape]]:
        sizes = check_all(indices, full.prepared_sizes)
        channels = [len(part) for part in full.prepared(indices[0])]
        return [[(c, *wh) for c, wh in zip(channels, sizes[i], strict=True)] for i in indices]

    transforms = full.transforms
    settings = [_settings_of(full.read_target), f"at least {full.at_least}", full.unequal]
    settings += [transforms.preparation()] if TwoParts.is_all_of(transforms) else []
    settings += [type(full).__name__, type(transforms).__name__]
    folders = sorted({str(path.parent.absolute()) for path in full.pairs[0]})
    full.cache = open_cache(
        data.cache,
        data.cache_dir,
        indices,
        [path for index in indices for path in full.files(index)],
        description=_code_of(full.read_target, full, transforms),
        family=" | ".join([*settings, *folders]),
        shapes=shapes,
    )
    return dataset


def _settings_of(reader: Any) -> str:
    """A reader and its settings as text, the same in every process."""
    if isinstance(reader, partial):
        return f"{_settings_of(reader.func)} {reader.args} {sorted(reader.keywords.items())}"
    if is_dataclass(reader):
        return repr(reader)
    return getattr(reader, "__qualname__", None) or f"{type(reader).__name__} {vars(reader)}"


def _code_of(reader: Callable, *others: object) -> str:
    """A hash of the source that makes items of files, and versions of the libraries in it.

    An edit to a transform must not go unseen for items that an earlier run has kept.
    """
    reader = reader.func if isinstance(reader, partial) else reader
    classes = [cls for part in (reader, *others) for cls in type(part).__mro__]
    names = {cls.__module__ for cls in classes} | {reader.__module__}
    names |= {module.__name__ for module in (image_io, image_bounds, colour_profiles)}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in names}
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(filter(None, files), key=lambda file: Path(file).name):
        digest.update(Path(file).read_bytes())
    versions = torch.__version__, torchvision.__version__, PIL.__version__, colour_profiles.VERSION
    return " ".join([digest.hexdigest(), *versions])
