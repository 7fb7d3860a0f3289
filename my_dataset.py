"""The datasets: DUTS, any two folders of images and masks, and the embedded shapes.

An item is (image, target): a `tv_tensors.Image`, uint8 [3, H, W], and a `tv_tensors.Mask`, uint8
[1, H, W] in 0…255 (255 salient), both of one size; then `transforms(image, target)` is applied.
Every dataset has `name(index)`, what to call an item in messages and reports, and `pairs`, the
files behind the items (none for the embedded data).
"""

import difflib
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

import shapes
from train_utils.data import collate
from train_utils.errors import UserError
from train_utils.image_io import image_size, list_images, printable, read_image, read_mask

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


class PairFolderDataset(Dataset):
    """Images and masks of any two folders, paired by their path in the folder without the suffix.

    `images/city/a.jpg` belongs to `masks/city/a.png`. Masks without an image are left out and
    counted in `unmatched_masks`. Raises UserError if an image has no mask, or if a folder holds two
    files that differ in nothing but the suffix.
    """

    collate_fn = staticmethod(collate)

    def __init__(
        self,
        images: str | PathLike[str],
        masks: str | PathLike[str],
        transforms: JointTransform | None = None,
    ) -> None:
        images, masks = Path(images), Path(masks)
        image_files, mask_files = _by_stem(images, leave_out=masks), _by_stem(masks)
        _require_masks(image_files, mask_files, images, masks)
        self.stems = list(image_files)
        self.pairs: list[Pair] = [(image_files[stem], mask_files[stem]) for stem in self.stems]
        self.unmatched_masks = len(mask_files) - len(image_files)
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, mask_path = self.pairs[index]
        image, mask = read_image(image_path), read_mask(mask_path)
        if image.shape[-2:] != mask.shape[-2:]:
            sizes = [(x.shape[-1], x.shape[-2]) for x in (image, mask)]
            raise UserError(_size_mismatch(self.pairs[index], *sizes))
        return _transformed(image, mask, self.transforms)

    def name(self, index: int) -> str:
        """The path of the image."""
        return printable(self.pairs[index][0])


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
    come as `tv_tensors.Mask`, "labels" (RGB) as `tv_tensors.Image`.

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
        self.scenes = range(first, first + count)
        self.transforms = transforms
        self.pairs: list[Pair] = []
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}
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

    def _draw(self, number: int) -> tuple[Tensor, Tensor]:
        if number in self._drawn:
            return self._drawn[number]
        scene = shapes.render_scene(self.seed, number, self.size)
        drawn = scene.image, getattr(scene, self.target)
        size = sum(tensor.nbytes for tensor in drawn)
        if self._drawn_bytes + size <= _SHAPES_CACHE_BYTES:
            self._drawn[number] = drawn
            self._drawn_bytes += size
        return drawn


def split_pairs(
    dataset: PairFolderDataset, val_fraction: float, seed: int
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
        problems = [problem for problem in pool.map(_pair_problem, _pairs(dataset)) if problem]
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


def _transformed(
    image: Tensor, target: Tensor, transforms: JointTransform | None
) -> tuple[Tensor, Tensor]:
    return transforms(image, target) if transforms else (image, target)


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
    image_files: dict[str, Path], mask_files: dict[str, Path], images: Path, masks: Path
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
        f"{printable(masks)}: no mask for {len(missing)} of the {len(image_files)} images in "
        f"{printable(images)}: {_listed([printable(image_files[stem].name) for stem in missing])}."
        f"{look_close} "
        "Name each mask like its image (photo.jpg, photo.png), or remove these images."
    )


def _closest(stem: str, candidates: Sequence[str]) -> str | None:
    """The shortest candidate that contains `stem` (cat in cat_mask), else the most similar one."""
    containing = [candidate for candidate in candidates if stem in candidate]
    if containing:
        return min(containing, key=len)
    return next(iter(difflib.get_close_matches(stem, candidates, n=1)), None)


def _layout_error(root: Path, part: str) -> str:
    looked_for = f"{part}/{part}-Image and {part}/{part}-Mask"
    if not root.is_dir():
        found = "no such folder"
    else:
        names = sorted(printable(path.name) for path in root.iterdir())
        found = f"found {_listed(names) if names else 'an empty folder'}"
    return (
        f"{printable(root)}: looked for {looked_for}, {found}. Give the folder that holds {part}, "
        "or your own pairs by --images DIR --masks DIR."
    )


def _size_mismatch(pair: Pair, image_wh: tuple[int, int], mask_wh: tuple[int, int]) -> str:
    image, mask = map(printable, pair)
    return (
        f"{image}: {image_wh[0]}×{image_wh[1]} pixels, but its mask {mask} has "
        f"{mask_wh[0]}×{mask_wh[1]}. Replace the one that is wrong."
    )


def _listed(items: Sequence[str]) -> str:
    rest = len(items) - _MAX_LISTED
    return "; ".join(items[:_MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
