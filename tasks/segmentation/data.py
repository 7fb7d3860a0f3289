"""Layouts of segmentation data: PASCAL VOC, CamVid, and folders of images and masks.

Each layout is a function from a root to (pairs, stems), the (image, mask) files and what to call
them whatever the place, as `PairDataset` takes them. Nothing of a mask is read here: what its
pixels mean is `tasks.segmentation.label_maps`' to say.
"""

import filecmp
import re
import unicodedata
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from my_dataset import PairFolderDataset
from train_utils.datasets import found_in
from train_utils.errors import UserError, shortened, typed
from train_utils.image_io import IMAGE_SUFFIXES
from train_utils.pairing import (
    PLAIN,
    Names,
    Pair,
    columns,
    files_by_stem,
    listed_file,
    read_lines,
)

Entry = tuple[Path | None, Path | None]  # the image and the mask of a name, where there are any

_VOC_KINDS = "JPEGImages", "SegmentationClass"


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
        f"{root}: looked for VOCdevkit/VOC2012 or VOC2007 (voc), train and trainannot "
        f"(camvid), image and mask (bag), {found_in(root)}. Give the folder that holds these, or "
        "your own pairs by --images DIR --masks DIR."
    )


def voc_pairs(
    root: str | PathLike[str], train: bool, names: tuple[Names, Names] = PLAIN
) -> tuple[Sequence[Pair], list[str]]:
    """Pairs that PASCAL VOC's ImageSets/Segmentation/train.txt (or val.txt) names, and stems.

    `root` holds VOCdevkit, or is it, or is one year of it (VOC2012); all years are joined. Later
    years list older photos again, VOC2007's 000032 as 2007_000032: the latest year decides whether
    such a photo trains or validates. names: what those of the files have around those in the lists.

    Raises UserError for a missing list, for names without image or mask, and for names in both
    lists of a year.
    """
    years = _voc_years(Path(root))
    if not years:
        raise UserError(
            f"{root}: looked for VOCdevkit/VOC2012 or VOC2007, {found_in(Path(root))}. "
            "Give the folder that holds VOCdevkit."
        )
    pairs: list[Pair] = []
    stems: list[str] = []
    photos: set[str] = set()
    for year in reversed(years):
        files = [files_by_stem(year / kind, of) for kind, of in zip(_VOC_KINDS, names, strict=True)]
        listed = _voc_listed(year, train, files)
        others = _voc_listed(year, not train, files, missing_ok=not train)
        _refuse_leak(year / "ImageSets" / "Segmentation", sorted(listed.keys() & others.keys()))
        new = {n: pair for n, pair in listed.items() if _voc_photo(year, n) not in photos}
        photos.update(_voc_photo(year, name) for name in (*listed, *others))
        pairs += _voc_files(year, new)
        stems += [Path(year.name, name).as_posix() for name in new]
    return pairs, stems


def camvid_pairs(
    root: str | PathLike[str], train: bool, names: tuple[Names, Names] = PLAIN
) -> tuple[Sequence[Pair], list[str]]:
    """Pairs of train and trainannot, or of val and valannot (without val: of test), and stems.

    Raises UserError if folders are missing, an image has no mask, or a training image is a copy of
    a validation image of the same name.
    """
    root = Path(root)
    held_out = "val" if (root / "val").is_dir() else "test"
    part, other = ("train", held_out) if train else (held_out, "train")
    dataset = PairFolderDataset(root / part, root / f"{part}annot", names=names)
    others = files_by_stem(root / other, names[0]) if (root / other).is_dir() else {}
    # Names alone say little: many sets number the images of each folder from 1.
    leaked = [
        stem
        for stem, (image, _) in zip(dataset.stems, dataset.pairs, strict=True)
        if stem in others and filecmp.cmp(image, others[stem], shallow=False)
    ]
    _refuse_leak(root, leaked)
    return dataset.pairs, dataset.stems


def bag_pairs(
    root: str | PathLike[str], names: tuple[Names, Names] = PLAIN
) -> tuple[Sequence[Pair], list[str]]:
    """All pairs of image and mask (or images and masks), and stems.

    Raises UserError if these folders are missing or an image has no mask.
    """
    folders = _bag_folders(Path(root))
    if not folders:
        raise UserError(
            f"{root}: looked for image and mask, {found_in(Path(root))}. Give the "
            "folder that holds these, or your own pairs by --images DIR --masks DIR."
        )
    dataset = PairFolderDataset(*folders, names=names)
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


def _voc_listed(
    year: Path, train: bool, files: Sequence[Mapping[str, Path]], missing_ok: bool = False
) -> dict[str, Entry]:
    """The photos of a list, each once, in its order, by their names: image and mask, where there.

    files: images and masks by name. Raises UserError for a list that is missing or empty, and for
    lines of which nobody can tell what they name.
    """
    path = year / "ImageSets" / "Segmentation" / ("train.txt" if train else "val.txt")
    if not path.is_file():
        if missing_ok:
            return {}
        raise UserError(
            f"{path}: no such list. Write the names of the images to "
            f"{'train on' if train else 'validate with'} there, one per line, without suffix."
        )
    found = dict(_voc_entry(year, path, line, files) for _, line in read_lines(path))
    if not found and not missing_ok:
        raise UserError(f"{path}: the list is empty. Write names of images there.")
    return found


def _voc_entry(
    year: Path, path: Path, line: str, files: Sequence[Mapping[str, Path]]
) -> tuple[str, Entry]:
    """What a line of the list `path` names: a photo, or the paths of an image and its mask.

    A name may hold spaces. It may come with folder and suffix, and with a column that says that a
    class is in the photo. Raises UserError where it says that it is not.
    """
    images, masks = files
    name_alone, _, column = line.rpartition(" ")
    for text in (line, name_alone.strip() if column in ("1", "0", "-1") else ""):
        name = unicodedata.normalize("NFC", text.rpartition("JPEGImages/")[2])
        if name.lower().endswith(IMAGE_SUFFIXES) and name not in images:
            name = name.rpartition(".")[0]
        if name not in images:
            continue
        if text != line and column != "1":
            command = f"sed -i.bak -E '/[[:space:]](-1|0)[[:space:]]*$/d' {typed(path)}"
            raise UserError(
                f"{path}: {line}: says that a class is not in the photo. Take such lines out "
                f"(for example by {command}), or the column, to use them all."
            )
        return name, (images[name], masks.get(name))
    for base in (year, year.parent, year.parent.parent):
        paths = [listed_file(base, text.lstrip("/")) for text in columns(line)]
        if len(paths) == 2 and all(paths):
            return Path(columns(line)[0]).stem, (paths[0], paths[1])
    return line, (None, masks.get(line))


def _voc_photo(year: Path, name: str) -> str:
    """A name that is the same in every year of VOC."""
    return name if re.match(r"20\d\d_", name) else f"{year.name.removeprefix('VOC')}_{name}"


def _voc_files(year: Path, entries: Mapping[str, Entry]) -> list[Pair]:
    pairs: list[Pair] = []
    missing = []
    for name, (image, mask) in entries.items():
        missing += [f"{name} ({kind})" for kind, x in (("image", image), ("mask", mask)) if not x]
        if image and mask:
            pairs.append((image, mask))
    if missing:
        raise UserError(
            f"{year}: {len(missing)} files are listed in ImageSets/Segmentation, but "
            f"missing in JPEGImages or SegmentationClass: {shortened(missing)}. Add them, "
            "or take their names off the list; a line is a name, or the paths of image and mask."
        )
    return pairs


def _refuse_leak(place: Path, names: Sequence[str]) -> None:
    if names:
        raise UserError(
            f"{place}: {len(names)} images are to train and to validate, which makes "
            f"scores worthless: {shortened(names)}. Remove each from one of the two."
        )
