"""The datasets: DUTS, any two folders of images and masks, and the embedded shapes.

An item is (image, target): a `tv_tensors.Image`, uint8 [3, H, W], and a `tv_tensors.Mask`, uint8
[1, H, W] in 0…255 (255 salient), both of one size; then `transforms(image, target)` is applied.
Every dataset has `name(index)`, what to call an item in messages and reports, and `pairs`, the
files behind the items (none for the embedded data).
"""

import difflib
import filecmp
import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

import shapes
from train_utils.data import collate
from train_utils.errors import UserError
from train_utils.image_io import (
    image_size,
    list_images,
    printable,
    read_foreground,
    read_image,
    read_mask,
    read_trimap,
)
from transforms import cover

JointTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Pair = tuple[Path, Path]

_MAX_LISTED = 10  # an error names so many files and counts the others
_MAX_HINTS = 3  # comparing names is slow in folders of many thousands
_CHECK_THREADS = 8  # headers are read from disks that may be far away

_SHAPES_CACHE_BYTES = 512 * 2**20
_SHAPES_TARGETS = {
    "mask": tv_tensors.Mask,
    "classes": tv_tensors.Mask,
    "alpha": tv_tensors.Mask,
    "labels": tv_tensors.Image,
}


class PairDataset(Dataset):
    """Given (image, target) files; `stems` name the pairs independently of where they lie.

    `read_target` makes a tensor of the target's path: `read_mask`, `read_image` or a task's own.
    """

    collate_fn = staticmethod(collate)

    def __init__(
        self,
        pairs: Sequence[Pair],
        stems: Sequence[str],
        transforms: JointTransform | None = None,
        read_target: Callable[[Path], Tensor] = read_mask,
    ) -> None:
        self.pairs, self.stems = list(pairs), list(stems)
        self.transforms, self.read_target = transforms, read_target

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = _read_pair(self.pairs[index], read_image, self.read_target)
        return _transformed(image, target, self.transforms)

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
    ) -> None:
        images, masks = Path(images), Path(masks)
        image_files, mask_files = _by_stem(images, leave_out=masks), _by_stem(masks)
        _require_masks(image_files, mask_files, images, masks)
        stems = list(image_files)
        pairs = [(image_files[stem], mask_files[stem]) for stem in stems]
        super().__init__(pairs, stems, transforms, read_target)
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
    ) -> None:
        part = "DUTS-TR" if train else "DUTS-TE"
        images, masks = (Path(root, part, f"{part}-{kind}") for kind in ("Image", "Mask"))
        if not (images.is_dir() and masks.is_dir()):
            raise UserError(_layout_error(Path(root), part))
        super().__init__(images, masks, transforms)


class ShapesDataset(Dataset):
    """`count` scenes of the embedded data set, drawn on demand, from scene `first` on.

    Ranges that do not overlap share no scene, so one `seed` serves training and validation.
    `target` names the field of `shapes.Scene` to pair with the image: "mask", "classes" and "alpha"
    come as `tv_tensors.Mask`, "labels" (RGB) as `tv_tensors.Image`. Scenes with "classes" or
    "labels" are `familiar` ones.

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
        familiar = self.target in ("classes", "labels")
        scene = shapes.render_scene(self.seed, number, self.size, familiar)
        drawn = tuple(getattr(scene, field) for field in self.fields)
        size = sum(tensor.nbytes for tensor in drawn)
        if self._drawn_bytes + size <= _SHAPES_CACHE_BYTES:
            self._drawn[number] = drawn
            self._drawn_bytes += size
        return drawn


def folder_pairs(
    data: Any,
    train: bool,
    transforms: JointTransform | None = None,
    read_target: Callable[[Path], Tensor] = read_mask,
    all_pairs: bool = False,
) -> Dataset:
    """Training or validation pairs of the folders that `data` (a `FolderData`) names.

    Without validation folders of its own, `val_fraction` of the pairs is held out; `all_pairs`
    gives them all.
    """
    if data.val_images and not train:
        return PairFolderDataset(data.val_images, data.val_masks, transforms, read_target)
    pairs = PairFolderDataset(data.images, data.masks, transforms, read_target)
    if all_pairs or data.val_images:
        return pairs
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[0 if train else 1])


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

    def rank(index: int) -> bytes:
        key = f"{seed}/{dataset.stems[index]}".encode(errors="surrogateescape")
        return hashlib.blake2b(key, digest_size=16).digest()

    ranked = sorted(range(count), key=rank)
    held_out = min(max(round(count * val_fraction), 1), count - 1)
    return sorted(ranked[held_out:]), sorted(ranked[:held_out])


def check_pairs(dataset: Dataset) -> None:
    """Raise one UserError that lists the pairs which cannot be read or differ in size, if any.

    Reads the headers only, of all files of a dataset or of a `Subset` of one.
    """
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        pairs = dict.fromkeys(_pairs(dataset))  # a pair may serve several items
        problems = [problem for problem in pool.map(_pair_problem, pairs) if problem]
    if problems:
        raise UserError(_listed(problems))


def _pairs(dataset: Dataset) -> Sequence[Pair]:
    if isinstance(dataset, Subset):
        pairs = _pairs(dataset.dataset)
        return [pairs[index] for index in dataset.indices] if pairs else []
    return dataset.pairs


def _pair_problem(pair: Pair) -> str | None:
    try:
        image, mask = (image_size(path) for path in pair)
    except UserError as error:
        return str(error)
    return None if image == mask else _size_mismatch(pair, image, mask)


def _read_pair(
    pair: Pair, read_first: Callable[[Path], Tensor], read_target: Callable[[Path], Tensor]
) -> tuple[Tensor, Tensor]:
    image, target = read_first(pair[0]), read_target(pair[1])
    if image.shape[-2:] != target.shape[-2:]:
        sizes = [(x.shape[-1], x.shape[-2]) for x in (image, target)]
        raise UserError(_size_mismatch(pair, *sizes))
    return image, target


def _transformed(
    image: Tensor, target: Tensor, transforms: JointTransform | None
) -> tuple[Tensor, Tensor]:
    return transforms(image, target) if transforms else (image, target)


# --- image translation --------------------------------------------------------------------------


class SideBySideDataset(PairDataset):
    """Pairs in files of double width, image A on the left and image B on the right.

    Takes all images below `folder`; both images of a pair are `tv_tensors.Image`, uint8 [3, H, W].
    Raises UserError for a width that cannot be halved, and as `list_images` does.
    """

    def __init__(self, folder: str | PathLike[str], transforms: JointTransform | None = None):
        files = _by_stem(Path(folder))
        super().__init__([(file, file) for file in files.values()], list(files), transforms)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return _transformed(*read_halves(self.pairs[index][0]), self.transforms)


def read_halves(path: str | PathLike[str]) -> tuple[tv_tensors.Image, tv_tensors.Image]:
    """The left and the right half of an image, uint8 [3, H, W] each.

    Raises UserError for a width that cannot be halved, and as `read_image` does.
    """
    image = read_image(path)
    width = image.shape[-1]
    if width % 2:
        raise UserError(_odd_width(path, width))
    left, right = image.as_subclass(Tensor).split(width // 2, dim=-1)
    return tv_tensors.Image(left), tv_tensors.Image(right)


def translation_pairs(
    data: Any, train: bool, transforms: JointTransform | None = None, all_pairs: bool = False
) -> Dataset:
    """Training or validation pairs (A, B) of the folders that `data` (a `FolderData`) names.

    `images` and `masks` are the folders of A and B. Else `root` holds side-by-side files in
    `train/`, and `val/` or `test/` (or in no part at all), or one of the layouts of two folders:
    `A/train B/train`, `train/A train/B`, `trainA trainB`, or `A B` without parts. Without a
    validation part, `val_fraction` of the pairs is held out; `all_pairs` gives them all.
    Raises UserError if nothing of this is there, or if an image of A or B has no partner.
    """
    val_folders = _translation_folders(data, "val") or _translation_folders(data, "test")
    if val_folders and not train:
        return _translation_dataset(*val_folders, transforms)
    folders = _translation_folders(data, "train") or _whole_folders(data)
    pairs = _translation_dataset(*folders, transforms)
    if val_folders or all_pairs:
        return pairs
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[0 if train else 1])


def check_translation_pairs(dataset: Dataset) -> None:
    """Like `check_pairs`, and side-by-side files must have an even width."""
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        found = [problem for problem in pool.map(_translation_problem, _pairs(dataset)) if problem]
    if found:
        raise UserError(_listed(found))


def _translation_problem(pair: Pair) -> str | None:
    if pair[0] != pair[1]:
        return _pair_problem(pair)
    try:
        width, _ = image_size(pair[0])
    except UserError as error:
        return str(error)
    return _odd_width(pair[0], width) if width % 2 else None


def _odd_width(path: str | PathLike[str], width: int) -> str:
    return (
        f"{printable(path)}: {width} pixels wide, which cannot be halved into A|B. Crop it to an "
        "even width, or keep A and B in two folders: --images A --masks B."
    )


def _translation_dataset(a: Path, b: Path | None, transforms: JointTransform | None) -> PairDataset:
    """The pairs of two folders, or of one folder of side-by-side files if `b` is None."""
    if b is None:
        return SideBySideDataset(a, transforms)
    pairs = PairFolderDataset(a, b, transforms, read_image)
    if pairs.unmatched_masks:  # more often a lost partner than meant
        _require_masks(_by_stem(b), _by_stem(a, leave_out=b), b, a)
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
            there, missing = map(printable, (a, b) if a.is_dir() else (b, a))
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


# --- data sets for segmentation -----------------------------------------------------------------


def segmentation_layout(root: str | PathLike[str]) -> str:
    """What a folder is laid out as: "voc", "camvid" or "bag", the first that fits.

    Raises UserError, saying what was looked for, if it is none of them.
    """
    root = Path(root)
    if _voc_years(root):
        return "voc"
    if all((root / name).is_dir() for name in ("train", "trainannot")):
        return "camvid"
    if _bag_folders(root):
        return "bag"
    raise UserError(
        f"{printable(root)}: looked for VOCdevkit/VOC2012 or VOC2007 (voc), train and trainannot "
        f"(camvid), image and mask (bag), {_found_in(root)}. Give the folder that holds these, or "
        "your own pairs by --images DIR --masks DIR."
    )


def voc_pairs(root: str | PathLike[str], train: bool) -> tuple[list[Pair], list[str]]:
    """Pairs that PASCAL VOC's ImageSets/Segmentation/train.txt (or val.txt) names, and stems.

    `root` holds VOCdevkit, or is it, or is one year of it (VOC2012); all years are joined. Later
    years list older photos again, VOC2007's 000032 as 2007_000032: the latest year decides whether
    such a photo trains or validates.

    Raises UserError for a missing list, for names without image or mask, and for names in both
    lists of a year.
    """
    years = _voc_years(Path(root))
    if not years:
        raise UserError(
            f"{printable(root)}: looked for VOCdevkit/VOC2012 or VOC2007, {_found_in(Path(root))}. "
            "Give the folder that holds VOCdevkit."
        )
    pairs: list[Pair] = []
    stems: list[str] = []
    photos: set[str] = set()
    for year in reversed(years):
        names = _voc_names(year, train)
        others = _voc_names(year, not train, missing_ok=not train)
        _refuse_leak(year / "ImageSets" / "Segmentation", sorted({*names} & {*others}))
        new = [name for name in names if _voc_photo(year, name) not in photos]
        photos.update(_voc_photo(year, name) for name in (*names, *others))
        pairs += _voc_files(year, new)
        stems += [Path(year.name, name).as_posix() for name in new]
    return pairs, stems


def camvid_pairs(root: str | PathLike[str], train: bool) -> tuple[list[Pair], list[str]]:
    """Pairs of train and trainannot, or of val and valannot (without val: of test), and stems.

    Raises UserError if folders are missing, an image has no mask, or a training image is a copy of
    a validation image of the same name.
    """
    root = Path(root)
    held_out = "val" if (root / "val").is_dir() else "test"
    part, other = ("train", held_out) if train else (held_out, "train")
    dataset = PairFolderDataset(root / part, root / f"{part}annot")
    others = _by_stem(root / other) if (root / other).is_dir() else {}
    # Names alone say little: many sets number the images of each folder from 1.
    leaked = [
        stem
        for stem, (image, _) in zip(dataset.stems, dataset.pairs, strict=True)
        if stem in others and filecmp.cmp(image, others[stem], shallow=False)
    ]
    _refuse_leak(root, leaked)
    return dataset.pairs, dataset.stems


def bag_pairs(root: str | PathLike[str]) -> tuple[list[Pair], list[str]]:
    """All pairs of image and mask (or images and masks), and stems.

    Raises UserError if these folders are missing or an image has no mask.
    """
    folders = _bag_folders(Path(root))
    if not folders:
        raise UserError(
            f"{printable(root)}: looked for image and mask, {_found_in(Path(root))}. Give the "
            "folder that holds these, or your own pairs by --images DIR --masks DIR."
        )
    dataset = PairFolderDataset(*folders)
    return dataset.pairs, dataset.stems


def _bag_folders(root: Path) -> tuple[Path, Path] | None:
    for folders in ((root / "image", root / "mask"), (root / "images", root / "masks")):
        if all(folder.is_dir() for folder in folders):
            return folders
    return None


def _voc_years(root: Path) -> list[Path]:
    """The folders VOC20xx that `root` means, the oldest first."""
    for years in ([root], root.glob("VOC20??"), root.glob("VOCdevkit/VOC20??")):
        if found := sorted(year for year in years if (year / "SegmentationClass").is_dir()):
            return found
    return []


def _voc_names(year: Path, train: bool, missing_ok: bool = False) -> list[str]:
    """The names in a list, each once, in its order; one per line, so that they may hold spaces."""
    path = year / "ImageSets" / "Segmentation" / ("train.txt" if train else "val.txt")
    if not path.is_file():
        if missing_ok:
            return []
        raise UserError(
            f"{printable(path)}: no such list. Write the names of the images to "
            f"{'train on' if train else 'validate with'} there, one per line, without suffix."
        )
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    names = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))
    if not names and not missing_ok:
        raise UserError(f"{printable(path)}: the list is empty. Write names of images there.")
    return names


def _voc_photo(year: Path, name: str) -> str:
    """A name that is the same in every year of VOC."""
    return name if re.match(r"20\d\d_", name) else f"{year.name.removeprefix('VOC')}_{name}"


def _voc_files(year: Path, names: Sequence[str]) -> list[Pair]:
    images, masks = _by_stem(year / "JPEGImages"), _by_stem(year / "SegmentationClass")
    missing = [
        f"{printable(name)} ({kind})"
        for name in names
        for kind, files in (("image", images), ("mask", masks))
        if name not in files
    ]
    if missing:
        raise UserError(
            f"{printable(year)}: {len(missing)} files are listed in ImageSets/Segmentation, but "
            f"missing in JPEGImages or SegmentationClass: {_listed(missing)}. Add them, or take "
            "their names off the list."
        )
    return [(images[name], masks[name]) for name in names]


def _refuse_leak(place: Path, names: Sequence[str]) -> None:
    if names:
        raise UserError(
            f"{printable(place)}: {len(names)} images are to train and to validate, which makes "
            f"scores worthless: {_listed([printable(name) for name in names])}. Remove each from "
            "one of the two."
        )


# --- image matting ------------------------------------------------------------------------------

# (image, alpha [, trimap below it]) → item, or (foreground, alpha, background) → item
MattingTransform = Callable[..., tuple[Tensor, ...]]


class MattingShapesDataset(ShapesDataset):
    """Scenes as their parts: foreground, alpha and background, uint8 [3 | 1 | 3, S, S].

    Takes what `ShapesDataset` takes, and keeps 7·size² bytes a scene.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        count: int,
        first: int = 0,
        transforms: MattingTransform | None = None,
    ) -> None:
        super().__init__(size, seed, count, first, transforms, target="alpha")
        self.fields = "foreground", "alpha", "background"

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        parts = tuple(part.clone() for part in self._draw(self.scenes[index]))
        return self.transforms(*parts) if self.transforms else parts


class CompositionDataset(Dataset):
    """Each foreground of a folder on `per_foreground` backgrounds of another, composited on demand.

    Alphas belong to foregrounds as masks do to images in `PairFolderDataset`; a foreground's own
    transparency is ignored. Item (foreground, repeat) has the index foreground · per_foreground +
    repeat and is foreground, alpha and background, uint8 [3 | 1 | 3, H, W]; the background is
    cut to the foreground's size (see `transforms.cover`). In training, it and the place of the cut
    are drawn from torch's generator; otherwise names alone decide on it, and the middle is cut.

    `foregrounds` has each pair once; `pairs` and `stems` repeat as the items do.
    Raises UserError as `PairFolderDataset` does, and for a folder without backgrounds.
    """

    collate_fn = staticmethod(collate)

    def __init__(
        self,
        foregrounds: str | PathLike[str],
        alphas: str | PathLike[str],
        backgrounds: str | PathLike[str],
        per_foreground: int = 20,
        transforms: MattingTransform | None = None,
        train: bool = True,
    ) -> None:
        folders = PairFolderDataset(foregrounds, alphas)
        self.foregrounds, self.per_foreground = folders, per_foreground
        self.pairs = [pair for pair in folders.pairs for _ in range(per_foreground)]
        self.stems = [stem for stem in folders.stems for _ in range(per_foreground)]
        self.folder = Path(backgrounds)
        self.backgrounds = list_images(self.folder, recursive=True)
        self.transforms, self.train = transforms, train

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        foreground, alpha = _read_pair(self.pairs[index], read_foreground, read_mask)
        if self.train:
            choice = self.backgrounds[int(torch.randint(len(self.backgrounds), ()))]
            place = torch.rand(2).tolist()
        else:
            choice, place = self._fixed_background(index), [0.5, 0.5]
        background = cover(read_image(choice), foreground.shape[-2:], place)
        parts = foreground, alpha, background
        return self.transforms(*parts) if self.transforms else parts

    def name(self, index: int) -> str:
        """The path of the foreground, and what it lies on."""
        path = printable(self.pairs[index][0])
        if self.train:
            return f"{path} (composite {index % self.per_foreground + 1})"
        return f"{path} on {printable(self._fixed_background(index))}"

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
            key = f"{self.stems[index]}/{name}".encode(errors="surrogateescape")
            return hashlib.blake2b(key, digest_size=16).digest()

        repeat = index % self.per_foreground
        return sorted(self.backgrounds, key=rank)[repeat % len(self.backgrounds)]


class TrimapReader:
    """Reads an alpha and the trimap of its name as one target, uint8 [2, H, W].

    A `read_target` for `PairDataset`. `alphas`, `trimaps`: the folders of both.
    """

    def __init__(self, alphas: str | PathLike[str], trimaps: str | PathLike[str]) -> None:
        self.alphas, self.trimaps = Path(alphas), Path(trimaps)
        self.files = _by_stem(self.trimaps)

    def __call__(self, alpha: Path) -> Tensor:
        parts = _read_pair((alpha, self.files[self._stem(alpha)]), read_mask, read_trimap)
        return torch.cat([part.as_subclass(Tensor) for part in parts])

    def require(self, pairs: Sequence[Pair], folder: str | PathLike[str]) -> None:
        """Raise a UserError that lists the images of `folder` without a trimap, if any."""
        images = {self._stem(alpha): image for image, alpha in pairs}
        _require_masks(images, self.files, Path(folder), self.trimaps, "trimap")

    def _stem(self, alpha: Path) -> str:
        return alpha.relative_to(self.alphas).with_suffix("").as_posix()


def matting_pairs(
    data: Any, train: bool, transforms: MattingTransform | None = None, all_pairs: bool = False
) -> Dataset:
    """Images and alphas as `folder_pairs` gives them, with trimaps where validation has them.

    `data` also names `trimaps`, of `masks`, and `val_trimaps`, of `val_masks`. Training makes its
    own. Raises UserError if a trimap is missing.
    """
    if data.val_images:
        images, alphas, trimaps = data.val_images, data.val_masks, data.val_trimaps
    else:
        images, alphas, trimaps = data.images, data.masks, data.trimaps
    if train or not trimaps:
        return folder_pairs(data, train, transforms, all_pairs=all_pairs)
    reader = TrimapReader(alphas, trimaps)
    dataset = folder_pairs(data, train, transforms, reader, all_pairs)
    reader.require(_pairs(dataset), images)
    return dataset


def composition_pairs(
    data: Any, train: bool, transforms: MattingTransform | None = None, all_pairs: bool = False
) -> Dataset:
    """Training or validation composites of the folders that `data` names.

    `val_fraction` of the foregrounds, with all their composites, is held out; `all_pairs` gives
    them all. Backgrounds serve both. Raises UserError for a single foreground.
    """
    count = data.per_foreground if train else data.val_per_foreground
    dataset = CompositionDataset(*data.composed_folders(), count, transforms, train)
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
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    if isinstance(whole, CompositionDataset):
        _check_all(image_size, whole.backgrounds)
    elif isinstance(getattr(whole, "read_target", None), TrimapReader):
        _check_all(whole.read_target, [alpha for _, alpha in _pairs(dataset)])


def _check_all(read: Callable[[Path], Any], paths: Sequence[Path]) -> None:
    """Raise one UserError that lists the files which `read` refuses, if any."""

    def problem(path: Path) -> str | None:
        try:
            read(path)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        problems = [text for text in pool.map(problem, paths) if text]
    if problems:
        raise UserError(_listed(problems))


# --- pairing ------------------------------------------------------------------------------------


def _by_stem(folder: Path, leave_out: Path | None = None) -> dict[str, Path]:
    """A folder's images by their path in it without the suffix, in the order of `list_images`.

    Files below `leave_out` do not count, unless it is the folder itself: masks may lie in a folder
    among the images.
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


def _require_masks(
    image_files: dict[str, Path],
    mask_files: dict[str, Path],
    images: Path,
    masks: Path,
    kind: str = "mask",
) -> None:
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
    raise UserError(
        f"{printable(masks)}: no {kind} for {len(missing)} of the {len(image_files)} images in "
        f"{printable(images)}: {_listed([printable(image_files[stem].name) for stem in missing])}."
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
        f"{printable(root)}: looked for {looked_for}, {_found_in(root)}. Give the folder that "
        f"holds {part}, or your own pairs by --images DIR --masks DIR."
    )


def _found_in(root: Path) -> str:
    if not root.is_dir():
        return "no such folder"
    names = sorted(printable(path.name) for path in root.iterdir())
    return f"found {_listed(names) if names else 'an empty folder'}"


def _size_mismatch(pair: Pair, image_wh: tuple[int, int], mask_wh: tuple[int, int]) -> str:
    image, mask = map(printable, pair)
    return (
        f"{image}: {image_wh[0]}×{image_wh[1]} pixels, but its mask {mask} has "
        f"{mask_wh[0]}×{mask_wh[1]}. Replace the one that is wrong."
    )


def _listed(items: Sequence[str]) -> str:
    rest = len(items) - _MAX_LISTED
    return "; ".join(items[:_MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
