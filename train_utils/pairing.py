"""Which image belongs to which mask: by the names in two folders, or by a list of pairs.

Names are compared without the file's suffix, in Unicode's form NFC, and without what `Names` says
that they have around the part in common.
"""

import codecs
import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import product, takewhile
from pathlib import Path, PurePath
from typing import NamedTuple

from train_utils.config import as_value, parse_value
from train_utils.errors import UserError, shortened, typed
from train_utils.files import open_regular
from train_utils.image_io import IMAGE_SUFFIXES, JPEG_SUFFIXES
from train_utils.listing import (
    BROKEN,
    OTHER,
    UNREAD,
    Kind,
    LeftOut,
    list_folder,
    no_images,
    remark,
)

Pair = tuple[Path, Path]

UNMATCHED = Kind("mask without an image", "masks without an image", by_name=True)
UNREAD_MASK = Kind("mask that is not read", "masks that are not read", "convert to PNG")
UNNAMED = Kind("file without the prefix or suffix", "files without the prefix or suffix")

_MAX_HINTS = 3  # comparing names is slow in folders of many thousands
_MAX_LIST = 2**28  # bytes
_SEPARATORS = "-_. "
_OF_MASKS = ("mask", "gt", "label", "seg", "annot", "alpha", "matte", "manual", "truth")
_MAX_TRIED = 12  # masks that an image is compared with to find what their names have around them


class Names(NamedTuple):
    """What the names of a folder's files have before and behind the part that makes pairs.

    A `suffix` that ends as image files do (.jpg, _mask.png) is the end of the whole name, in any
    case, any other one that of the name without the file's suffix.
    """

    prefix: str = ""
    suffix: str = ""

    def stem(self, path: PurePath) -> str | None:
        """What pairs go by of a path below its folder; None for a file that is named otherwise."""
        whole = self.suffix.lower().endswith(IMAGE_SUFFIXES)
        given = path.name if whole else path.stem, self.prefix, self.suffix
        name, prefix, suffix = map(_nfc, given)
        ends = name.lower().endswith(suffix.lower()) if whole else name.endswith(suffix)
        if not (ends and name.startswith(prefix) and len(name) > len(prefix) + len(suffix)):
            return None
        stem = name[len(prefix) : len(name) - len(suffix)]
        folder = _nfc(path.parent.as_posix())
        return stem if folder == "." else f"{folder}/{stem}"


PLAIN = Names(), Names()
_KEYS = "data.image_prefix", "data.image_suffix", "data.mask_prefix", "data.mask_suffix"


class Found(NamedTuple):
    """The pairs of two folders with their stems, and what is left out of the folders.

    line: says how many pairs there are and what is left out; "" if nothing is.
    """

    pairs: list[Pair]
    stems: list[str]
    left_out: dict[Kind, list[Path]]
    line: str


def pair_folders(images: Path, masks: Path, settings: tuple[Names, Names] | None = None) -> Found:
    """The files of two folders, which may be one or lie in each other, paired by their names.

    settings: what those of images and of masks have around the part in common; None: nothing, and
    there are no settings to propose. Raises UserError for an image without a mask, for two files of
    one stem, and for a folder of both in which nothing tells the ones from the others.
    """
    names = settings or PLAIN
    same = images.is_dir() and masks.is_dir() and images.samefile(masks)
    masks = images if same else masks
    if same and names[0] == names[1]:
        raise _one_folder(images, settings)
    of_images = named_files(images, names[0], _KEYS[1], masks, names[1] if same else None)
    of_masks = named_files(masks, names[1], _KEYS[3], images, names[0] if same else None)
    for folder, found, of in ((images, of_images, 0), (masks, of_masks, 1)):
        if not found.files:
            raise _none_so_named(folder, found.left_out[UNNAMED], names, of, images, masks)
    image_files, mask_files = of_images.files, of_masks.files
    require_masks(image_files, mask_files, images, masks, settings=settings)
    stems = list(image_files)
    left_out = _joined(of_images.left_out, of_masks.left_out, same)
    if unmatched := [path for stem, path in mask_files.items() if stem not in image_files]:
        left_out[UNMATCHED] = unmatched
    line = remark(images, len(stems), "pairs", left_out)
    # An image that is not read is the worst loss where it has a mask.
    skipped = [p for kind in (UNREAD, BROKEN, OTHER) for p in of_images.left_out.get(kind, [])]
    stems_of = {path: names[0].stem(path.relative_to(images)) for path in skipped}
    if lost := [p.name for p, s in stems_of.items() if s in mask_files and s not in image_files]:
        line += f"; of these {shortened(lost, 5)} {'have masks' if lost[1:] else 'has a mask'}"
    return Found([(image_files[s], mask_files[s]) for s in stems], stems, left_out, line)


def _joined(of_images: LeftOut, of_masks: LeftOut, same: bool) -> dict[Kind, list[Path]]:
    """What is left out of both folders, or of the one that both are: what neither of them takes."""
    if same:
        rest = set(of_masks.get(UNNAMED, []))
        joined = {**of_images, UNNAMED: [p for p in of_images.get(UNNAMED, []) if p in rest]}
    else:
        unread = {UNREAD_MASK if kind == UNREAD else kind: p for kind, p in of_masks.items()}
        kinds = of_images.keys() | unread.keys()
        joined = {kind: [*of_images.get(kind, []), *unread.get(kind, [])] for kind in kinds}
    return {kind: list(paths) for kind, paths in joined.items() if paths}


class NamedFiles(NamedTuple):
    """A folder's images by stem, in the order of their paths, and what is left out."""

    files: dict[str, Path]
    left_out: dict[Kind, list[Path]]


def named_files(
    folder: Path,
    names: Names = PLAIN[0],
    key: str = "",
    apart: Path | None = None,
    rival: Names | None = None,
) -> NamedFiles:
    """The images of a folder that are named as `names` says; maybe none.

    key: the setting of `names.suffix`. apart: a folder whose files do not count where it lies below
    this one, as masks may among their images. rival: the names of other files in this very folder.
    Raises UserError for two files of one stem, and for a folder without images.
    """
    images, left_out = list_folder(folder, apart=apart)
    if not images:
        raise no_images(folder, left_out, apart)
    stems, unnamed = _by_stem(images, folder, names, rival)
    if twice := next((paths for paths in stems.values() if len(paths) > 1), None):
        raise _two_of_one_stem(twice, folder, images, names, key)
    if unnamed:
        left_out[UNNAMED] = unnamed
    return NamedFiles({stem: path for stem, (path,) in stems.items()}, left_out)


def files_by_stem(folder: Path, names: Names = PLAIN[0], key: str = "") -> dict[str, Path]:
    """As `named_files`, the files alone."""
    return named_files(folder, names, key).files


def require_masks(
    image_files: dict[str, Path],
    mask_files: dict[str, Path],
    images: Path,
    masks: Path,
    kind: str = "mask",
    settings: tuple[Names, Names] | None = None,
) -> None:
    """Raise a UserError that lists the images without a partner of their stem, if any.

    `images` and `masks` are the folders of both; `kind` says what a partner is. settings: see
    `pair_folders`.
    """
    missing = [stem for stem in image_files if stem not in mask_files]
    if not missing:
        return
    spare = [stem for stem in mask_files if stem not in image_files]
    hints = [
        f"{stem} ~ {close}" for stem in missing[:_MAX_HINTS] if (close := _closest(stem, spare))
    ]
    look_close = f"Names that look close: {'; '.join(hints)}. " if hints else ""
    listed = shortened([image_files[stem].name for stem in missing])
    fix = f"Name each {kind} like its image (photo.jpg, photo.png), or remove these images."
    if settings:
        fix = f"{fix[:-1]}, or list all pairs in a text file: --set data.list=FILE."
        if flags := proposed(images, masks, settings):
            look_close, fix = "", f"Say what their names have around the common part: {flags}"
    raise UserError(
        f"{masks}: no {kind} for {len(missing)} of the {len(image_files)} images in "
        f"{images}: {listed}. {look_close}{fix}"
    )


def _one_folder(folder: Path, settings: tuple[Names, Names] | None) -> UserError:
    """The error for one folder of images and masks that are named alike."""
    fix = "Give two folders."
    if settings:
        fix = "Give two folders, or list all pairs in a text file: --set data.list=FILE."
        if flags := proposed(folder, folder, settings):
            fix = f"Say which of its files are masks: {flags}"
    return UserError(f"{folder}: is given for images and for masks, so each is its own mask. {fix}")


def _none_so_named(
    folder: Path,
    files: list[Path],
    names: tuple[Names, Names],
    of: int,
    images: Path,
    masks: Path,
) -> UserError:
    """The error for a folder in which no file is named as the settings say."""
    keys = " and ".join(key for key, name in zip(_KEYS[2 * of :], names[of], strict=False) if name)
    flags = proposed(images, masks, names)
    fix = f"Their names ask for {flags}" if flags else f"Set {keys} as the names are, or to null."
    return UserError(
        f"{folder}: none of its {len(files)} images ({shortened([p.name for p in files], 3)}) is "
        f"named {names[of].prefix}*{names[of].suffix}, as {keys} says. {fix}"
    )


def _two_of_one_stem(
    paths: list[Path], folder: Path, images: list[Path], names: Names, key: str
) -> UserError:
    """The error for files whose names are one, and which of them to take if that is clear."""
    first, second, *_ = paths
    what = "suffix" if first.suffix != second.suffix else "way in which its letters are encoded"
    fix, every = "", _by_stem(images, folder, names)[0].keys()
    for end in dict.fromkeys(path.suffix for path in images) if key else ():
        stems, _ = _by_stem(images, folder, Names(names.prefix, names.suffix + end))
        if stems.keys() == every and all(len(paths) == 1 for paths in stems.values()):
            fix = f", or take {end} only: --set {typed(f'{key}={_yaml(names.suffix + end)}')}"
            break
    return UserError(
        f"{second}: only the {what} tells it from {first.name}, and pairs go by the name without "
        f"it. Remove or rename one of the two{fix}."
    )


def _closest(stem: str, candidates: Sequence[str]) -> str | None:
    """The shortest candidate that contains `stem` (cat in cat_mask), else the most similar one."""
    containing = [candidate for candidate in candidates if stem in candidate]
    if containing:
        return min(containing, key=len)
    return next(iter(difflib.get_close_matches(stem, candidates, n=1)), None)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _by_stem(
    paths: Iterable[Path], folder: Path, names: Names, rival: Names | None = None
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Files by stem, and those that are named otherwise.

    rival: the names of others among them; where both fit, the longer ones decide.
    """
    stems: dict[str, list[Path]] = {}
    unnamed = []
    for path in paths:
        relative = path.relative_to(folder)
        stem = names.stem(relative)
        stronger = rival and len("".join(rival)) > len("".join(names))
        if stem is None or (rival and stronger and rival.stem(relative) is not None):
            unnamed.append(path)
        else:
            stems.setdefault(stem, []).append(path)
    return stems, unnamed


# --- what names have around them, found out ------------------------------------------------------


def proposed(images: Path, masks: Path, current: tuple[Names, Names]) -> str:
    """The flags that pair all images of a folder where `current` names do not; "" for none.

    Or else those that pair nine of ten, and how many they do not. Where several masks of an image
    have names of their own, all choices.
    """
    paths = list_folder(images, apart=masks).images, list_folder(masks, apart=images).images
    texts = []
    fitting = _fitting(paths, (images, masks), 0)
    for wanted, missing in fitting or _fitting(paths, (images, masks), len(paths[0]) // 10):
        values = zip(_KEYS, sum(wanted, ()), sum(current, ()), strict=True)
        changes = {key: _yaml(new) for key, new, old in values if new != old}
        if changes and all(changes.values()):
            flags = " ".join(f"--set {typed(f'{key}={text}')}" for key, text in changes.items())
            texts.append(f"{flags} (which finds no mask for {missing})" if missing else flags)
    return ", or ".join(texts)


def _yaml(value: str) -> str:
    """A text as the command line takes it; "" for one that no YAML can hold."""
    text = as_value(value) if value else "null"
    try:
        return text if parse_value(text) == (value or None) else ""
    except UserError:
        return ""


def _fitting(
    paths: tuple[list[Path], list[Path]], folders: tuple[Path, Path], spare: int
) -> list[tuple[tuple[Names, Names], int]]:
    """Names of images and masks that pair all images but `spare`, and how many they do not pair.

    Of those that choose the same masks the plainest ones.
    """
    same = folders[0] == folders[1]
    found: dict[Path, tuple[tuple[Names, Names], int]] = {}
    relative = [path.relative_to(folders[0]) for path in paths[0]]
    of_masks = [_nfc(path.relative_to(folders[1]).as_posix()) for path in paths[1]]
    ends = [
        (name[: -len(path.suffix)], path.suffix.lower())
        for name, path in zip(of_masks, paths[1], strict=True)
    ]
    known = {text for stem, end in ends for text in (stem, stem + end)}
    samples = sorted(paths[0], key=lambda path: (len(path.name), path.name))
    samples = [*samples[:2], *samples[2 :: 1 + len(samples) // 3]]
    tried = {names for path in samples for names in _candidates(path, paths, folders)}
    for names in sorted(tried, key=_oddity):
        if _told(names[0]) and not _told(names[1]):  # else masks would be taken for images
            continue
        if not _have_masks(relative, known, names, same, spare):
            continue
        images, rest = _by_stem(paths[0], folders[0], names[0], names[1] if same else None)
        masks, unnamed = _by_stem(paths[1], folders[1], names[1], names[0] if same else None)
        alone = all(len(files) == 1 for files in [*images.values(), *masks.values()])
        unused = set(rest) & set(unnamed) if same else rest
        sure = len({stem.rpartition("/")[2] for stem in images}) > 1 or not _cut(names)
        paired = [masks[stem][0] for stem in images if stem in masks]
        if paired and alone and sure and not unused and len(images) - len(paired) <= spare:
            found.setdefault(paired[0], (names, len(images) - len(paired)))
            if same:  # else images and masks the other way round
                break
    return list(found.values())


def _have_masks(
    images: list[Path], known: set[str], names: tuple[Names, Names], same: bool, spare: int
) -> bool:
    """Whether all images but `spare` have a mask of the right name: quickly no, as for most names.

    known: the names of the masks, with and without suffix. same: masks are among the images.
    """
    of_image, of_mask = names
    missing = 0
    for path in images:
        if same and of_mask.stem(path) is not None:
            continue
        stem = of_image.stem(path)
        folder, slash, name = (stem or "").rpartition("/")
        if stem is None:
            return False
        missing += f"{folder}{slash}{of_mask.prefix}{name}{of_mask.suffix}" not in known
        if missing > spare:
            return False
    return True


def _candidates(
    image: Path, paths: tuple[list[Path], list[Path]], folders: tuple[Path, Path]
) -> Iterator[tuple[Names, Names]]:
    """What the names of an image and of a mask can have around a common part."""
    beside = image.relative_to(folders[0]).parent
    name = _nfc(image.stem)
    others = [p for p in paths[1] if p != image and p.relative_to(folders[1]).parent == beside]
    others.sort(key=lambda path: -sum(_common(name, _nfc(path.stem))))
    for mask in others[:_MAX_TRIED]:
        other = _nfc(mask.stem)
        start, end = _common(name, other)
        block = difflib.SequenceMatcher(None, name, other, False).find_longest_match()
        cores = [name[:start], name[len(name) - end :], name[block.a : block.a + block.size]]
        for core in {part for each in cores for part in (each, *_trimmed(each))}:
            if core in name and core in other and core:
                yield _around(name, core, image.suffix), _around(other, core, mask.suffix)
    ends = ({path.suffix.lower() for path in some} for some in paths)
    for first, second in product(*ends):
        if first in JPEG_SUFFIXES and second not in JPEG_SUFFIXES:
            yield Names("", first), Names("", second)


def _common(first: str, second: str) -> tuple[int, int]:
    """How many characters two names have in common at their starts and at their ends."""
    pairs = zip(first, second, strict=False), zip(first[::-1], second[::-1], strict=False)
    start, end = (sum(1 for _ in takewhile(lambda x: x[0] == x[1], each)) for each in pairs)
    return start, end


def _trimmed(core: str) -> Iterator[str]:
    """A common part without the separators at its ends, and without what is only half a word."""
    yield core.strip(_SEPARATORS)
    yield core.rstrip(_SEPARATORS)
    yield core.lstrip(_SEPARATORS)
    if words := re.split(f"[{_SEPARATORS}]", core):
        yield core[: len(core) - len(words[-1])].rstrip(_SEPARATORS)
        yield core[len(words[0]) :].lstrip(_SEPARATORS)


def _around(name: str, core: str, end: str) -> Names:
    """What a name, without the file's suffix `end`, has around a part."""
    prefix, _, suffix = name.partition(core)
    return Names(prefix, suffix + (end if suffix.lower().endswith(IMAGE_SUFFIXES) else ""))


def _cut(names: tuple[Names, Names]) -> int:
    """How many of the four parts begin or end in the middle of a word."""
    ends = [(prefix[-1:], suffix[:1]) for prefix, suffix in names]
    return sum(end not in _SEPARATORS for pair in ends for end in pair)


def _told(names: Names) -> bool:
    """Whether names say that their files are masks."""
    return any(word in "".join(names).lower() for word in _OF_MASKS)


def _oddity(names: tuple[Names, Names]) -> tuple:
    """The lower, the likelier that names were meant so."""
    parts = [part for each in names for part in each if part]
    cut, told = _cut(names), _told(names[1])
    return len(parts), any(names[0]), cut, not told, len("".join(parts)), names


# --- lists ---------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, numbered from 1, without blanks at their ends.

    UTF-8, or UTF-16 by the mark at its start; with the line ends of any system. Raises UserError
    for a file that cannot be read so.
    """
    try:
        with open_regular(path, limit=_MAX_LIST, links=True) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Name a text file that can be read.") from None
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = (
        content.decode("utf-16", errors="replace")
        if wide
        else content.decode("utf-8-sig", errors="surrogateescape")
    )
    if "\0" in text:
        raise UserError(f"{path}: is no plain text. Save it in UTF-8.")
    lines = enumerate(re.split(r"\r\n|\r|\n", text), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def columns(line: str) -> list[str]:
    """The columns of a line: between tabs if there are any, else at a single comma, else blanks."""
    if "\t" in line:
        parts = line.split("\t")
    else:
        parts = line.split(",") if line.count(",") == 1 else line.split()
    return [part.strip().strip('"') for part in parts if part.strip()]


def listed_pairs(path: Path) -> tuple[list[Pair], list[str]]:
    """The pairs that a text file lists, an image and a mask in each line, and their stems.

    Paths are relative to the list's folder; see `columns` for what separates them. Lines that begin
    with # are comments. Raises UserError, with the lines, for what is no pair of files, and for an
    image that is listed twice.
    """
    pairs: list[Pair] = []
    stems: list[str] = []
    problems: list[str] = []
    lines: dict[str, int] = {}
    for number, line in read_lines(path):
        if line.startswith("#"):
            continue
        texts = columns(line)
        if len(texts) != 2:
            problems.append(f"line {number}: {len(texts)} columns, not an image and a mask")
            continue
        image, mask = (listed_file(path.parent, text) for text in texts)
        problems += [
            f"line {number}: no file {text}"
            for text, file in zip(texts, (image, mask), strict=True)
            if file is None
        ]
        if image and mask:
            first = lines.setdefault(os.path.normpath(image), number)
            if first != number:
                problems.append(f"line {number}: {texts[0]} is in line {first}, too")
            pairs.append((image, mask))
            stems.append(_nfc(PurePath(texts[0].replace("\\", "/")).with_suffix("").as_posix()))
    if problems:
        raise UserError(
            f"{path}: {shortened(problems, 5, '; ')}. Write an image and its mask in each line, "
            "with a tab between them, as paths from the list's folder; begin a heading with #."
        )
    if not pairs:
        raise UserError(f"{path}: lists no pairs. Write an image and its mask in each line.")
    return pairs, stems


def listed_file(folder: Path, text: str) -> Path | None:
    """A file that a list names, also with Windows' separators or in another Unicode form."""
    for plain in (text, text.replace("\\", "/")):
        for form in (plain, _nfc(plain), unicodedata.normalize("NFD", plain)):
            if os.path.exists(path := folder / form):  # noqa: PTH110 - never raises an error
                return path
    return None


def refuse_shared(train: Path, val: Path) -> None:
    """Raise UserError if two lists share an image."""
    images = [
        {os.path.realpath(image) for image, _ in listed_pairs(each)[0]} for each in (train, val)
    ]
    if both := sorted(images[0] & images[1]):
        raise UserError(
            f"{val}: {len(both)} images are in {train}, too, which makes scores worthless: "
            f"{shortened([Path(path).name for path in both])}. Remove each from one of the two."
        )
