"""What the mask files of a data set hold: all are read once, before the first step.

A mask that no rule fits is then a clear error at the start, and not a meaningless loss or a black
output later. Counts are kept, so that a second start reads no mask.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from train_utils.datasets import pairs_of, try_all
from train_utils.errors import UserError, shortened
from train_utils.files import hash_of_files, user_cache
from train_utils.image_io import MASK_RULES, MaskReader, PathLike, within_memory
from train_utils.log import get_logger
from train_utils.private_files import new_private_file, open_private, private_folder

_CHECKSUM = 16  # bytes
_CACHE_FORMAT = 5  # to be raised when the meaning of a cached number changes
_OBJECT = 128  # the level from which on a grey pixel is more object than background
_FEW_LEVELS, _RARE = 32, 0.001  # of class codes; what a share of the pixels at most may be noise


def count_masks(
    paths: Sequence[PathLike],
    measure: Callable[[Any], np.ndarray],
    summarise: Callable[[np.ndarray], np.ndarray],
    size: int,
    description: object,
    cache_dir: PathLike | None = None,
) -> np.ndarray:
    """`summarise` of what `measure` gives of every mask, stacked: `size` numbers, int64.

    They are kept in `cache_dir` (by default in pixtrain/mask_scans below $XDG_CACHE_HOME or
    ~/.cache) under a hash of the description, of what reads the masks, and of each file's path,
    size and times of change; a cache that cannot be written, is not ours or holds nonsense is none.
    Raises one UserError that names the masks which `measure` refuses.
    """
    cache = _cache_file(paths, description, cache_dir)
    numbers = _cached(cache, size) if cache else None
    if numbers is not None:
        return numbers
    found, problems = try_all(paths, measure)
    if problems:
        listed = shortened(list(problems.values()), separator="; ")
        raise UserError(f"{len(problems)} of {len(paths)} masks cannot be used: {listed}")
    numbers = summarise(np.stack([found[path] for path in paths]))
    if cache:
        with suppress(OSError), new_private_file(cache) as file:
            file.write(_checksum(cache, numbers.tobytes()) + numbers.tobytes())
    return numbers


def _cache_file(
    paths: Sequence[PathLike], description: object, cache_dir: PathLike | None
) -> Path | None:
    """Where the counts of these files belong; None where there is no place for them."""
    folder = Path(cache_dir) if cache_dir else user_cache("mask_scans")
    if folder is None:
        return None
    try:
        name = hash_of_files(map(Path, paths), f"{_CACHE_FORMAT} {description}")
        private_folder(folder, "set XDG_CACHE_HOME to a folder of your own", named=bool(cache_dir))
    except OSError:
        return None  # of a mask: reading it will say why
    except UserError as error:
        get_logger().warning(f"warning: what the masks hold is counted at every start: {error}")
        return None
    return folder / f"{name}.scan"


def _cached(cache: Path, size: int) -> np.ndarray | None:
    try:
        with open_private(cache) as file:
            checksum, content = file.read(_CHECKSUM), file.read(8 * size + 1)
    except (OSError, UserError):  # there is none, or it is not ours
        return None
    whole = len(content) == 8 * size and checksum == _checksum(cache, content)
    return np.frombuffer(content, np.int64) if whole else None


def _checksum(cache: Path, content: bytes) -> bytes:
    return hashlib.blake2b(cache.name.encode() + content, digest_size=_CHECKSUM).digest()


# --- grey masks ----------------------------------------------------------------------------------


class GreyScan:
    """What a set of grey masks holds, as a `MaskReader` reads them.

    files, pixels; `object`: pixels of 128 or more, half of white; empty, dark: files without any
    such pixel, and those among them that are not black. rules: of how many files each of MASK_RULES
    made the mask. histogram: pixels by grey level.
    """

    SIZE = 5 + len(MASK_RULES) + 256

    def __init__(self, numbers: np.ndarray) -> None:
        counts, rest = numbers[:5].tolist(), numbers[5:].tolist()
        self.files, self.pixels, self.object, self.empty, self.dark = counts
        self.rules = dict(zip(MASK_RULES, rest, strict=False))
        self.histogram = rest[len(MASK_RULES) :]

    @staticmethod
    def measure(path: PathLike, reader: MaskReader) -> np.ndarray:
        """The numbers of one mask, int64 [SIZE]; those of several are their sum."""
        with within_memory(path):
            grey, rules = reader.levels(path)
        histogram = np.bincount(grey.ravel(), minlength=256)
        inside = histogram[_OBJECT:].sum()
        counts = [1, grey.size, inside, not inside, not inside and histogram[1:].any()]
        used = [rule in rules for rule in MASK_RULES]
        return np.concatenate([np.array([*counts, *used], np.int64), histogram])

    def line(self) -> str:
        """What the masks hold, in a few words."""
        return (
            f"masks: {self.files} files, {self.object / self.pixels:.2%} of the pixels are object, "
            f"{self.empty} files hold none"
        )

    def remarks(self) -> list[str]:
        """What is unusual, counted."""
        remarks = []
        if self.empty > self.dark:
            remarks.append(f"{self.empty - self.dark} of {self.files} masks are black")
        if self.dark:
            remarks.append(f"{self.dark} hold nothing from {_OBJECT} of 255 on, but are not black")
        if self.object and self._dark_codes():
            remarks.append(f"few and dark grey levels: {self._levels()}")
        texts = (
            ("alpha", "of {} the alpha channel is taken as the mask"),
            ("colours", "{} hold colours, of which the luminance is taken"),
            ("coloured palette", "{} are palettes of colours: all but index 0 is the object"),
        )
        remarks += [text.format(self.rules[rule]) for rule, text in texts if self.rules[rule]]
        return remarks

    def mixture(self) -> str:
        """Cause and fix where alpha is the mask of some files, and opaque in others; else ""."""
        taken, opaque = self.rules["alpha"], self.rules["opaque alpha"]
        if not (taken and opaque):
            return ""
        return (
            f"of {taken} masks the alpha channel varies and so is the mask, of {opaque} others it "
            "is opaque. Say where all of them have it: --set data.mask_channel=alpha, or luminance."
        )

    def problem(self, too_dark: str) -> str:
        """Cause and fix of masks from which nothing can be learned; "" for others.

        too_dark: the fix where there is something, but no object, with a {level} to cut at.
        """
        other = " Or set data.mask_channel=luminance." if self.rules["alpha"] else ""
        if mixture := self.mixture():
            return mixture
        if self.rules["0 and 1"] and self.dark:
            return (
                f"{self.rules['0 and 1']} masks hold 0 and 1 only, taken as 0 and 255, but "
                f"{self.dark} others are as dark: {self._levels()}. {too_dark.format(level=1)}"
            )
        if self.object == self.pixels:
            return f"all pixels of all masks are object. Check that these are the masks.{other}"
        if self.object:
            return ""
        if not self.dark:
            return f"all masks are black. Check that these are the masks.{other}"
        level = 1 if len(self._found()) <= _FEW_LEVELS else max(self._found()) // 2
        return (
            f"no mask holds an object, which begins at {_OBJECT} of 255: the grey levels are "
            f"{self._levels()}. {too_dark.format(level=level)}{other}"
        )

    def _found(self) -> list[int]:
        return [level for level, count in enumerate(self.histogram) if count]

    def _levels(self) -> str:
        return shortened(
            [f"{n} ({self.histogram[n] / self.pixels:.2%})" for n in self._found()], limit=6
        )

    def _dark_codes(self) -> bool:
        """Whether the grey levels are few, as of class codes, and some of them dark."""
        common = [n for n in self._found() if self.histogram[n] > _RARE * self.pixels]
        few = sum(self.histogram[n] for n in common) > (1 - _RARE) * self.pixels
        return few and len(common) <= _FEW_LEVELS and any(0 < n < _OBJECT for n in common)


def check_grey_masks(
    train_set: Dataset | None, val_set: Dataset, reader: MaskReader, too_dark: str
) -> None:
    """Say what the masks behind datasets hold, and refuse those that nothing can be learned from.

    too_dark: see `GreyScan.problem`. Masks to validate with are only warned of where all is object,
    and where nothing is, if they are held out of the training's: a few can well be so. Datasets
    without files pass.
    """
    learned_from: set[Path] = set()
    for dataset, part in ((train_set, "training"), (val_set, "validation")):
        pairs = pairs_of(dataset) if dataset is not None else []
        masks = list(dict.fromkeys(mask for _, mask in pairs))
        if masks:
            scan = scan_grey_masks(masks, reader)
            get_logger().info(f"{part} {scan.line()}")
            remarks, problem = scan.remarks(), scan.problem(too_dark)
            held_out = masks[0].parent in learned_from
            spared = scan.object == scan.pixels or (held_out and not scan.object)
            if problem and (dataset is train_set or not spared):
                raise UserError(f"{masks[0].parent}: {problem}")
            if problem or remarks:
                remarks += [problem] if problem else []
                get_logger().warning(f"warning: {part} masks: {'; '.join(remarks)}")
            learned_from.update(mask.parent for mask in masks)


def scan_grey_masks(
    paths: Sequence[PathLike], reader: MaskReader, cache_dir: PathLike | None = None
) -> GreyScan:
    """Read all masks and count what they hold; see `count_masks`."""

    def measure(path: PathLike) -> np.ndarray:
        return GreyScan.measure(path, reader)

    def total(rows: np.ndarray) -> np.ndarray:
        return rows.sum(0)

    return GreyScan(count_masks(paths, measure, total, GreyScan.SIZE, reader, cache_dir))
