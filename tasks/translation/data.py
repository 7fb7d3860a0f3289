"""Pairs of images for translation: files of A|B side by side, or a folder of A and one of B.

An item is (A, B): two `tv_tensors.Image`, uint8 [3, H, W], of one size; then `transforms(a, b)` is
applied. Which of the two is the network's input is the transform's business.
"""

from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

from my_dataset import PairFolderDataset, folder_pairs
from train_utils.data import unwrap_subset
from train_utils.datasets import (
    JointTransform,
    PairDataset,
    Reader,
    check_all,
    check_pairs,
    pairs_of,
    split_pairs,
)
from train_utils.errors import UserError
from train_utils.image_io import image_size, read_image
from train_utils.listing import list_images, remark
from train_utils.log import say_once
from train_utils.pairing import PLAIN, Names, files_by_stem, named_files, require_masks


class SideBySideDataset(PairDataset):
    """Pairs in files of double width, image A on the left and image B on the right.

    Takes all images below `folder`; both images of a pair are `tv_tensors.Image`, uint8 [3, H, W].
    Raises UserError for a width that cannot be halved, and as `list_images` does.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        transforms: JointTransform | None = None,
        names: Names = PLAIN[0],
    ) -> None:
        files, left_out = named_files(Path(folder), names, "data.image_suffix")
        pairs = [(file, file) for file in files.values()]
        super().__init__(pairs, list(files), transforms, read_image)
        if line := remark(folder, len(pairs), "images A|B", left_out):
            say_once(line)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        return read_halves(self.pairs[index][0])

    def sizes(self, index: int, at_least: int | None = None) -> list[tuple[int, int]]:
        path = self.pairs[index][0]
        width, height = image_size(path)
        _require_even(path, width)
        return [(height, width // 2)] * 2


def read_halves(path: str | PathLike[str]) -> tuple[tv_tensors.Image, tv_tensors.Image]:
    """The left and the right half of an image, uint8 [3, H, W] each.

    Raises UserError for a width that cannot be halved, and as `read_image` does.
    """
    image = read_image(path)
    width = image.shape[-1]
    _require_even(path, width)
    left, right = image.as_subclass(Tensor).split(width // 2, dim=-1)
    return tv_tensors.Image(left), tv_tensors.Image(right)


def translation_pairs(
    data: Any,
    train: bool,
    transforms: JointTransform | None = None,
    all_pairs: bool = False,
    at_least: int | None = None,
) -> Dataset:
    """Training or validation pairs (A, B) of the folders that `data` (a `FolderData`) names.

    `images` and `masks` are the folders of A and B, `list` lists them. Else `root` holds
    side-by-side files in `train/`, and `val/` or `test/` (or in no part at all), or one of the
    layouts of two folders: `A/train B/train`, `train/A train/B`, `trainA trainB`, or `A B` without
    parts. Without a validation part, `val_fraction` of the pairs is held out; `all_pairs` gives
    them all.
    at_least: for `read_image` of sources, by `data.direction`; not for side-by-side files.
    Raises UserError if nothing of this is there, or if an image of A or B has no partner.
    """

    def pairs_in(a: Path, b: Path | None) -> PairDataset:
        return _translation_dataset(a, b, transforms, data, at_least)

    if data.list:
        read_b, at_least_a = _readers(data.direction, at_least)
        return folder_pairs(data, train, transforms, read_b, all_pairs, at_least_a)
    val_folders = _translation_folders(data, "val") or _translation_folders(data, "test")
    if val_folders and not train:
        return pairs_in(*val_folders)
    folders = _translation_folders(data, "train") or _whole_folders(data)
    pairs = pairs_in(*folders)
    if val_folders or all_pairs:
        return pairs
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[0 if train else 1])


def check_translation_pairs(dataset: Dataset) -> None:
    """Like `check_pairs`, and side-by-side files must have an even width."""
    if isinstance(unwrap_subset(dataset)[0], SideBySideDataset):
        check_all([file for file, _ in pairs_of(dataset)], _check_width)
    else:
        check_pairs(dataset)


def pair_aspect(dataset: Dataset) -> float | None:
    """Width / height of the files A|B behind a dataset: None if they differ, 0 without any."""
    if not isinstance(unwrap_subset(dataset)[0], SideBySideDataset):
        return 0.0
    sizes = check_all([file for file, _ in pairs_of(dataset)], image_size).values()
    found = {width / height for width, height in sizes}
    return found.pop() if len(found) == 1 else None


def _check_width(path: Path) -> None:
    _require_even(path, image_size(path)[0])


def _require_even(path: str | PathLike[str], width: int) -> None:
    if width % 2:
        raise UserError(
            f"{path}: {width} pixels wide, which cannot be halved into A|B. Crop it to "
            "an even width, or keep A and B in two folders: --images A --masks B."
        )


def _readers(direction: str, at_least: int | None) -> tuple[Reader, int | None]:
    """`read_target` and `at_least` of a `PairDataset` whose sources may be scaled down."""
    if direction == "AtoB":
        return read_image, at_least
    return partial(read_image, at_least=at_least), None


def _translation_dataset(
    a: Path, b: Path | None, transforms: JointTransform | None, data: Any, at_least: int | None
) -> PairDataset:
    """The pairs of two folders, or of one folder of side-by-side files if `b` is None."""
    if b is None:
        if at_least:
            raise UserError(
                f"data.draft: {a} holds A|B side by side, and targets are read at their "
                "own size. Set it to false, or keep A and B in two folders."
            )
        return SideBySideDataset(a, transforms, data.names[0])
    how = _readers(data.direction, at_least)
    pairs = PairFolderDataset(a, b, transforms, *how, data.names)
    if pairs.unmatched_masks:  # more often a lost partner than meant
        of_a, of_b = data.names
        require_masks(files_by_stem(b, of_b), files_by_stem(a, of_a), b, a)
    return pairs


def _translation_folders(data: Any, part: str) -> tuple[Path, Path | None] | None:
    """Where a part lies: (A, B), or (folder of side-by-side files, None), or None."""
    if data.images:
        named = {"train": (data.images, data.masks), "val": (data.val_images, data.val_masks)}
        a, b = named.get(part, (None, None))
        return (Path(a), Path(b)) if a else None
    root = Path(data.root)
    for a, b in (
        (root / "A" / part, root / "B" / part),
        (root / part / "A", root / part / "B"),
        (root / f"{part}A", root / f"{part}B"),
    ):
        if a.is_dir() and b.is_dir():
            return a, b
        if a.is_dir() or b.is_dir():
            there, missing = (a, b) if a.is_dir() else (b, a)
            raise UserError(f"{missing}: no such folder, though {there} is there. Add its partner.")
    return (root / part, None) if (root / part).is_dir() else None


def _whole_folders(data: Any) -> tuple[Path, Path | None]:
    """Where all pairs lie below a root without parts."""
    root = Path(data.root)
    a, b = root / "A", root / "B"
    if a.is_dir() and b.is_dir():
        return a, b
    try:
        list_images(root)
    except UserError as error:
        raise UserError(
            f"{error} Looked for images A|B side by side, there or in train, for A and B, and for "
            "trainA and trainB. Two folders of any names go by --images A --masks B."
        ) from error
    return root, None
