"""Matting data: embedded scenes in parts, foregrounds on backgrounds, and images with trimaps.

Transforms get foreground, alpha and background, uint8 [3 | 1 | 3, H, W], and composite them; or a
ready image and its alpha, uint8 [3 | 1, H, W]. A trimap that comes along is alpha's second channel.
"""

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from my_dataset import PairFolderDataset, folder_pairs
from tasks.matting.trimaps import TrimapReader
from train_utils.data import collate, unwrap_subset
from train_utils.datasets import (
    JointTransform,
    PairDataset,
    check_all,
    check_pairs,
    name_hash,
    of_one_size,
    pairs_of,
    split_pairs,
)
from train_utils.errors import UserError
from train_utils.image_io import (
    MAX_PIXELS,
    MaskReader,
    decode,
    image_size,
    image_tensor,
    in_srgb,
    read_image,
    to_rgb,
    within_memory,
)
from train_utils.listing import list_folder, no_images, remark
from train_utils.log import say_once
from train_utils.pairing import Names, named_files
from transforms import cover


class CutOuts(PairDataset):
    """The cut-outs of a folder: files whose alpha channel is the alpha of their colours.

    Each is a pair with itself. Raises UserError for a folder without images of such names, and for
    two files of one name.
    """

    def __init__(self, folder: Path, names: Names) -> None:
        found = named_files(folder, names)
        if not found.files:
            raise no_images(folder, found.left_out)
        super().__init__([(path, path) for path in found.files.values()], list(found.files))
        if line := remark(folder, len(self), "cut-outs", found.left_out):
            say_once(line)


class CompositionDataset(Dataset):
    """Each foreground of a folder on `per_foreground` backgrounds of another, composited on demand.

    Alphas belong to foregrounds as masks do to images in `PairFolderDataset`; a foreground's own
    transparency is ignored, unless both are one folder: then it is the alpha (`CutOuts`). Item
    (foreground, repeat) has the index foreground · per_foreground + repeat and is foreground, alpha
    and background, uint8 [3 | 1 | 3, H, W]; the background is cut to the foreground's size (see
    `transforms.cover`). In training, it and the place of the cut are drawn from torch's generator;
    otherwise names alone decide on it, and the middle is cut.

    `foregrounds` has each pair once; `pairs` and `stems` repeat as the items do.
    Raises UserError as `PairFolderDataset` does, and for a folder without backgrounds.
    """

    collate_fn = staticmethod(collate)
    unequal, checked = "", False  # see `PairDataset`

    def __init__(
        self,
        foregrounds: str | PathLike[str],
        alphas: str | PathLike[str],
        backgrounds: str | PathLike[str],
        per_foreground: int = 20,
        transforms: JointTransform | None = None,
        train: bool = True,
        read_alpha: MaskReader | None = None,
        names: tuple[Names, Names] | None = None,
    ) -> None:
        cut_outs = os.path.realpath(foregrounds) == os.path.realpath(alphas)
        if cut_outs and (names is None or names[0] == names[1]):
            folders: PairDataset = CutOuts(Path(foregrounds), names[0] if names else Names())
            read_alpha, self.checked = MaskReader("alpha"), True
        else:
            folders = PairFolderDataset(foregrounds, alphas, names=names)
        self.foregrounds, self.per_foreground = folders, per_foreground
        self.pairs = [pair for pair in folders.pairs for _ in range(per_foreground)]
        self.stems = [stem for stem in folders.stems for _ in range(per_foreground)]
        self.folder = Path(backgrounds)
        self.backgrounds, left_out = list_folder(self.folder)
        if not self.backgrounds:
            raise no_images(self.folder, left_out)
        if line := remark(self.folder, len(self.backgrounds), "backgrounds", left_out):
            say_once(line)
        self.transforms, self.train = transforms, train
        self.read_image, self.read_target = read_foreground, read_alpha or MaskReader()

    @property
    def ingredients(self) -> list[str]:
        """The names of the backgrounds."""
        return [path.relative_to(self.folder).as_posix() for path in self.backgrounds]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        pair = self.pairs[index]
        parts = self.read_image(pair[0]), self.read_target(pair[1])
        foreground, alpha = of_one_size(pair, *parts, self.unequal)
        if self.train:
            choice = self.backgrounds[int(torch.randint(len(self.backgrounds), ()))]
            place = torch.rand(2).tolist()
        else:
            choice, place = self._fixed_background(index), [0.5, 0.5]
        background = cover(read_image(choice), foreground.shape[-2:], place)
        item = foreground, alpha, background
        return self.transforms(*item) if self.transforms else item

    def name(self, index: int) -> str:
        """The path of the foreground, and what it lies on."""
        path = str(self.pairs[index][0])
        if self.train:
            return f"{path} (composite {index % self.per_foreground + 1})"
        return f"{path} on {self._fixed_background(index)}"

    def composites_of(self, foregrounds: Sequence[int]) -> list[int]:
        """The indices of these foregrounds' items."""
        count = self.per_foreground
        return [number * count + repeat for number in foregrounds for repeat in range(count)]

    def _fixed_background(self, index: int) -> Path:
        """The repeat-th of the backgrounds, ranked by a hash of the foreground's name and theirs.

        So a few new files change few composites, and no background comes twice before all have.
        """

        def rank(path: Path) -> bytes:
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            return name_hash(f"{self.stems[index]}/{name}")

        repeat = index % self.per_foreground
        return sorted(self.backgrounds, key=rank)[repeat % len(self.backgrounds)]


def read_foreground(path: str | PathLike[str]) -> Tensor:
    """`read_image`, except that an alpha channel is dropped: the colours are as stored.

    The colours of a cut-out reach beyond its alpha; over white, soft edges would get a white halo.
    """
    with within_memory(path):
        image = decode(path).image
        if image.mode not in ("RGBA", "LA"):
            return image_tensor(to_rgb(path, image))
        return image_tensor(in_srgb(path, image).convert("RGB"))


def matting_pairs(
    data: Any, train: bool, transforms: JointTransform | None = None, all_pairs: bool = False
) -> Dataset:
    """Images and alphas as `folder_pairs` gives them, with trimaps where validation has them.

    `data` also names `trimaps`, of `masks`, and `val_trimaps`, of `val_masks`. Training makes its
    own. Raises UserError if a trimap is missing.
    """
    read_alpha = MaskReader(data.mask_channel)
    if data.val_images:
        images, alphas, trimaps = data.val_images, data.val_masks, data.val_trimaps
    else:
        images, alphas, trimaps = data.images, data.masks, data.trimaps
    if train or not trimaps:
        return folder_pairs(data, train, transforms, read_alpha, all_pairs)
    reader = TrimapReader(alphas, trimaps, read_alpha, data.names[1])
    dataset = folder_pairs(data, train, transforms, reader, all_pairs)
    reader.require(pairs_of(dataset), images)
    return dataset


def composition_pairs(
    data: Any, train: bool, transforms: JointTransform | None = None, all_pairs: bool = False
) -> Dataset:
    """Training or validation composites of the folders that `data` names.

    `val_fraction` of the foregrounds, with all their composites, is held out; `all_pairs` gives
    them all. Backgrounds serve both. Raises UserError for a single foreground.
    """
    count = data.per_foreground if train else data.val_per_foreground
    foregrounds, alphas, backgrounds = data.composed_folders()
    how = transforms, train, MaskReader(data.mask_channel), data.names
    dataset = CompositionDataset(foregrounds, alphas, backgrounds, count, *how)
    if all_pairs:
        return dataset
    if len(dataset.foregrounds) == 1:
        raise UserError(
            f"{dataset.foregrounds.name(0)}: one foreground cannot be split into training and "
            "validation. Add foregrounds with their alphas."
        )
    parts = split_pairs(dataset.foregrounds, data.val_fraction, data.seed)
    return Subset(dataset, dataset.composites_of(parts[0 if train else 1]))


def check_matting_files(dataset: Dataset) -> None:
    """`check_pairs`, and the same for trimaps, which are read whole, and for backgrounds."""
    check_pairs(dataset)
    full, _ = unwrap_subset(dataset)
    if isinstance(full, CompositionDataset):
        sizes = [image_size(path) for path in {path for path, _ in pairs_of(dataset)}]
        widest, highest = (max(sides) for sides in zip(*sizes, strict=True))
        check_all(full.backgrounds, lambda path: _require_cover(path, widest, highest))
    elif isinstance(getattr(full, "read_target", None), TrimapReader):

        def check_trimap(alpha: Path) -> None:
            full.read_target(alpha)

        check_all([alpha for _, alpha in pairs_of(dataset)], check_trimap)


def _require_cover(path: Path, widest: int, highest: int) -> None:
    """Raise a UserError for a background so narrow that, enlarged to cover, it fills the memory."""
    width, height = image_size(path)
    scale = max(widest / width, highest / height)
    if scale > 1 and scale * width * scale * height > MAX_PIXELS:
        raise UserError(
            f"{path}: {width}×{height} pixels, which would be enlarged {scale:.0f} "
            f"times to cover the foregrounds (up to {widest}×{highest}): more than {MAX_PIXELS:,} "
            "pixels. Take it out of the backgrounds, or cut it to a less narrow shape."
        )
