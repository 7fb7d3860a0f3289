"""From mask files to class indices, and the scan that shows what a set of masks holds.

`LabelReader` is a mask map: it declares how the pixels of a file name their classes. `scan_masks`
reads all masks through it before training, so that a wrong map is one clear error at the start, and
not a device assert, a meaningless loss or a black output later.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from train_utils.data import follow_the_script
from train_utils.errors import UserError, shortened
from train_utils.files import user_cache, write_text
from train_utils.image_io import PathLike, printable, read_image, read_label_file, read_mask
from transforms import IGNORE

VOC_VOID = (224, 224, 192)  # the colour of the borders between PASCAL VOC's objects

_MAX_VALUES = 3  # an error names so many values of a file and counts the others
_NEAR = 32  # grey levels around a threshold that a two-level mask hardly has …
_MAX_NEAR = 0.05  # … at most on this share of its pixels
_CACHE_FORMAT = 1  # to be raised when the meaning of a cached number changes

_USE_BRIGHT = "--set data.mask_values=threshold --set data.mask_object=bright"


@dataclass
class LabelReader:
    """Reads a mask file as class indices, `tv_tensors.Mask` uint8 [1, H, W], 255 being ignored.

    index: the numbers that the file stores (`read_label_file`) are the classes.
    colour: pixels have exactly the colours (`read_image`) of `palette`, which is in class order.
    threshold: two classes; grey levels (`read_mask`) below `threshold` are dark, and the object,
    class 1, is dark or bright.

    Raises ValueError ("key: cause", keys as in a recipe's data section) for settings that make no
    sense; a call raises UserError for a file that does not fit them or cannot be read.
    """

    num_classes: int
    class_names: Sequence[str] | None = None  # None: class 0, class 1, …
    ignore_index: int | None = 255  # index: the value of pixels that do not count
    ignore_beyond: bool = False  # index: values from num_classes on do not count either
    mode: Literal["index", "colour", "threshold"] = "index"
    palette: Sequence[Sequence[int]] | None = None  # colour: (red, green, blue) of each class
    threshold: int = 128
    object: Literal["dark", "bright"] = "dark"
    void_colour: Sequence[int] | None = VOC_VOID  # colour: of pixels that do not count

    def __post_init__(self) -> None:
        count = self.num_classes
        _require(2 <= count <= IGNORE, "class_names", f"must be 2 to {IGNORE}")
        if not self.class_names:
            self.class_names = [f"class {index}" for index in range(count)]
        _require(len(self.class_names) == count, "class_names", f"must be {count}, one per class")
        index = self.ignore_index
        _require(index is None or 0 <= index <= 255, "ignore_index", "must lie between 0 and 255")
        _require(1 <= self.threshold <= 255, "mask_threshold", "must lie between 1 and 255")
        if self.mode == "threshold":
            _require(count == 2, "class_names", "must be two for masks cut at a threshold")
        if self.mode == "colour":
            colours = [tuple(colour) for colour in self.palette or ()]
            _require(len(colours) == count, "palette", f"must hold {count} colours, one per class")
            _require(len(set(colours)) == count, "palette", "must not hold a colour twice")
            for colour in [*colours, self.void_colour or VOC_VOID]:
                _require(_is_rgb(colour), "palette", "colours are three values from 0 to 255")

    def __call__(self, path: PathLike) -> tv_tensors.Mask:
        return tv_tensors.Mask(torch.from_numpy(self.table()[self.values(path)])[None])

    def values(self, path: PathLike) -> np.ndarray:
        """What `table` turns into classes, uint8 [H, W].

        The file's values or its grey levels; of colours the class index, as there is no table of
        16 million. Every value that is not in the table has been refused.
        """
        if self.mode == "threshold":
            return read_mask(path)[0].numpy()
        return self._index_values(path) if self.mode == "index" else self._colour_values(path)

    def table(self) -> np.ndarray:
        """The class of each of 256 values, uint8."""
        if self.mode == "threshold":
            dark = np.arange(256) < self.threshold
            return (dark == (self.object == "dark")).astype(np.uint8)
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[: self.num_classes] = np.arange(self.num_classes)
        if self.mode == "index" and self.ignore_index is not None:
            table[self.ignore_index] = IGNORE
        return table

    def _index_values(self, path: PathLike) -> np.ndarray:
        values = read_label_file(path)
        if values.ndim == 3:
            if (values != values[..., :1]).any():
                raise UserError(
                    f"{printable(path)}: holds colours, but data.mask_values=index expects class "
                    "indices. Set data.mask_values=colour and data.palette, the RGB of each class."
                )
            values = np.ascontiguousarray(values[..., 0])
        if not self.ignore_beyond and values.max() >= self.num_classes:
            self._refuse_values_beyond(path, values)
        return values

    def _refuse_values_beyond(self, path: PathLike, values: np.ndarray) -> None:
        histogram = _histogram(values)
        beyond = histogram.copy()
        beyond[: self.num_classes] = 0
        if self.ignore_index is not None:
            beyond[self.ignore_index] = 0
        wrong = np.flatnonzero(beyond)
        if not len(wrong):
            return
        found = [f"{value} on {_pixels(beyond[value])}" for value in wrong]
        if not histogram[1:255].any():
            fix = f"The only values are 0 and 255, as in a binary mask: {_USE_BRIGHT}."
        elif _is_jpeg(path):
            fix = (
                "JPEG blurs labels. If the mask has two levels, set data.mask_values=threshold "
                "and data.mask_object=dark or bright; else save labels as PNG."
            )
        else:
            fix = (
                f"If these are classes, data.class_names must name {wrong[-1] + 1}; if not, "
                f"data.ignore_index={wrong[0]} leaves out one value, and data.ignore_beyond=true "
                "all that are no classes."
            )
        raise UserError(
            f"{printable(path)}: label {shortened(found, _MAX_VALUES)}, but the "
            f"{self.num_classes} classes are 0 to {self.num_classes - 1}. {fix}"
        )

    def _colour_values(self, path: PathLike) -> np.ndarray:
        red, green, blue = read_image(path).numpy().astype(np.int32)
        codes = (red << 16) | (green << 8) | blue
        # One more than the class, 0 being unknown: zeroed memory is not touched before it is read.
        classes = np.zeros(2**24, dtype=np.int16)
        if self.void_colour is not None:
            classes[_code(self.void_colour)] = IGNORE + 1
        for index, colour in enumerate(self.palette or ()):
            classes[_code(colour)] = index + 1
        found = classes[codes]
        if not found.all():
            self._refuse_colour(path, codes, found == 0)
        return (found - 1).astype(np.uint8)

    def _refuse_colour(self, path: PathLike, codes: np.ndarray, unknown: np.ndarray) -> None:
        y, x = divmod(int(unknown.argmax()), codes.shape[1])
        code = int(codes[y, x])
        colour = (code >> 16, code >> 8 & 255, code & 255)
        pixels, all_pixels = _pixels((codes == code).sum()), _pixels(unknown.sum())
        fix = (
            "JPEG blurs colours: save labels as PNG."
            if _is_jpeg(path)
            else "Add it to data.palette, or correct the mask."
        )
        raise UserError(
            f"{printable(path)}: colour {colour} at x={x}, y={y} is not in data.palette; "
            f"in all, {all_pixels} of colours that are no class ({pixels} of this one). {fix}"
        )


@dataclass
class MaskScan:
    """What a set of masks holds, as read by `reader`; counts of pixels where nothing else is said.

    raw_histogram: of the 256 values behind the classes, see `LabelReader.values`.
    class_extent: by class, the pixels that count in those files in which the class occurs.
    ignored: pixels that do not count; blank_files: files without any pixel that counts.
    """

    reader: LabelReader
    files: int
    raw_histogram: list[int]
    class_counts: list[int]
    class_files: list[int]
    class_extent: list[int]
    ignored: int
    ignored_files: int
    blank_files: int

    @property
    def absent(self) -> list[str]:
        """Names of the classes that occur nowhere."""
        counts = zip(_names(self.reader), self.class_counts, strict=True)
        return [name for name, count in counts if not count]

    def class_weights(self) -> list[float]:
        """Median-frequency balancing: median(freq) / freq(c), by class; 0 for absent classes.

        freq(c) is the share of class c among the pixels that count of the files in which it occurs,
        and the median is over the classes that occur (Eigen & Fergus, "Predicting Depth, Surface
        Normals and Semantic Labels with a Common Multi-Scale Convolutional Architecture", ICCV
        2015, section 6.1; SegNet trains with these weights).
        """
        counts = np.array(self.class_counts, dtype=np.float64)
        present = counts > 0
        frequency = counts[present] / np.array(self.class_extent)[present]
        weights = np.zeros(len(counts))
        weights[present] = np.median(frequency) / frequency
        return weights.tolist()

    def text(self) -> str:
        """The histogram as lines to print: class, pixels, share, files; then what stands out."""
        total = sum(self.raw_histogram)
        rows = [
            (f"{index} {name}", count, self.class_files[index])
            for index, name in enumerate(_names(self.reader))
            if (count := self.class_counts[index])
        ]
        if self.ignored:
            rows.append((f"ignored{self._ignored_values()}", self.ignored, self.ignored_files))
        width = max(len(label) for label, *_ in rows)
        lines = [f"masks: {self.files} files, {total} pixels"]
        lines += [
            f"  {label:{width}}  {count:>{len(str(total))}} pixels  {count / total:7.2%}"
            f"  in {files} files"
            for label, count, files in rows
        ]
        return "\n".join([*lines, *(f"  {remark}" for remark in self._remarks())])

    def _ignored_values(self) -> str:
        if self.reader.mode != "index":
            return ""
        found = np.flatnonzero((self.reader.table() == IGNORE) & (np.array(self.raw_histogram) > 0))
        return f" ({shortened([str(value) for value in found], _MAX_VALUES)})"

    def _remarks(self) -> list[str]:
        remarks = []
        if self.absent:
            remarks.append(f"in no mask: {shortened(self.absent)}")
        if self.blank_files:
            remarks.append(f"{self.blank_files} files hold nothing but ignored pixels")
        if self.reader.mode == "threshold":
            remarks.append(
                f"{self._near_threshold():.2%} of the pixels are within {_NEAR} grey levels of the "
                f"threshold {self.reader.threshold}"
            )
            if 2 * self.class_counts[1] > sum(self.class_counts):
                other = "bright" if self.reader.object == "dark" else "dark"
                remarks.append(
                    "warning: the object covers more than half of all pixels; if what was meant as "
                    f"background is trained as object, set data.mask_object={other}"
                )
        return remarks

    def _near_threshold(self) -> float:
        threshold = self.reader.threshold
        near = self.raw_histogram[max(0, threshold - _NEAR) : threshold + _NEAR + 1]
        return sum(near) / sum(self.raw_histogram)


def scan_masks(
    paths: Sequence[PathLike],
    reader: LabelReader,
    workers: int,
    cache_dir: PathLike | None = None,
    refuse_single_class: bool = True,
) -> MaskScan:
    """Read all masks in `workers` processes (0: in this one) and count what they hold.

    Counts are kept in `cache_dir` (by default in pixtrain/mask_scans below $XDG_CACHE_HOME or
    ~/.cache) under a hash of the reader and of each file's path, size and time of change; a cache
    that cannot be written, or holds nonsense, is none.

    Raises one UserError that names the masks which `reader` refuses; and UserErrors for masks to be
    cut at a threshold that do not have two levels, and, with `refuse_single_class`, for masks from
    which nothing can be learned.
    """
    if not paths:
        raise ValueError("no masks to scan")
    cache = _cache_file(paths, reader, cache_dir)
    scan = _cached(cache, reader)
    if scan is None:
        scan = _count(paths, reader, workers)
        _keep(cache, scan)
    place = printable(Path(paths[0]).parent)
    if refuse_single_class and sum(count > 0 for count in scan.class_counts) < 2:
        raise UserError(f"{place}: {_single_class(scan)}")
    if reader.mode == "threshold" and scan._near_threshold() > _MAX_NEAR:
        raise UserError(
            f"{place}: {scan._near_threshold():.0%} of the masks' pixels are within {_NEAR} grey "
            f"levels of the threshold {reader.threshold}, so these are no two-level masks. Set "
            "data.mask_values=index if they hold class indices, or another data.mask_threshold."
        )
    return scan


# --- counting ------------------------------------------------------------------------------------


class _Histograms(Dataset):
    """Of each file the histograms of values and of classes, int64 [2, 256]; or what is wrong."""

    def __init__(self, paths: Sequence[PathLike], reader: LabelReader) -> None:
        self.paths, self.reader = paths, reader

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            values = self.reader.values(self.paths[index])
        except UserError as error:
            return str(error)
        histogram = _histogram(values)
        classes = np.bincount(self.reader.table(), weights=histogram, minlength=256)
        return np.stack([histogram, classes.astype(np.int64)])


def _count(paths: Sequence[PathLike], reader: LabelReader, workers: int) -> MaskScan:
    loader = DataLoader(
        _Histograms(paths, reader),
        batch_size=None,
        num_workers=min(workers, len(paths)),
        # As they are: of tensors, each would keep a file descriptor.
        collate_fn=_as_it_is,
        worker_init_fn=follow_the_script,
        generator=torch.Generator(),  # by default the global one would be drawn from
    )
    problems = []
    raw, counts, files, extent = np.zeros((4, 256), dtype=np.int64)
    blank_files = 0
    for item in loader:
        if isinstance(item, str):
            problems.append(item)
            continue
        histogram, pixels = item
        counting = pixels[:IGNORE].sum()
        raw += histogram
        counts += pixels
        files += pixels > 0
        extent += (pixels > 0) * counting
        blank_files += int(counting == 0)
    if problems:
        raise UserError(
            f"{len(problems)} of {len(paths)} masks cannot be used: "
            f"{shortened(problems, separator='; ')}"
        )
    classes = slice(reader.num_classes)
    return MaskScan(
        reader,
        files=len(paths),
        raw_histogram=raw.tolist(),
        class_counts=counts[classes].tolist(),
        class_files=files[classes].tolist(),
        class_extent=extent[classes].tolist(),
        ignored=int(counts[IGNORE]),
        ignored_files=int(files[IGNORE]),
        blank_files=blank_files,
    )


def _as_it_is(item: Any) -> Any:
    return item


def _histogram(values: np.ndarray) -> np.ndarray:
    return np.bincount(values.ravel(), minlength=256)


def _single_class(scan: MaskScan) -> str:
    """Cause and fix where all pixels that count are of one class."""
    reader = scan.reader
    levels = np.flatnonzero(scan.raw_histogram)
    if reader.mode == "threshold":
        return (
            f"all grey levels of all masks ({levels[0]} to {levels[-1]}) lie on one side of the "
            f"threshold {reader.threshold}. Check that these are the masks, or set another "
            "data.mask_threshold."
        )
    if not sum(scan.class_counts):
        return "all pixels of all masks are ignored. Check data.ignore_index and data.class_names."
    index = next(index for index, count in enumerate(scan.class_counts) if count)
    cause = f"all pixels that count are class {index} ({_names(reader)[index]})"
    if reader.mode == "index" and levels.tolist() == [0, 255]:
        return f"{cause}, the others are 255: these look like binary masks. Use {_USE_BRIGHT}."
    ignored = f", and what is ignored{scan._ignored_values()}" if scan.ignored else ""
    return f"{cause}, so there is nothing to learn. Check that these are the masks{ignored}."


# --- cache ---------------------------------------------------------------------------------------


def _cache_file(
    paths: Sequence[PathLike], reader: LabelReader, cache_dir: PathLike | None
) -> Path | None:
    """Where the counts of these files belong; None where there is no place for them."""
    cache_dir = cache_dir or user_cache("mask_scans")
    if cache_dir is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([_CACHE_FORMAT, asdict(reader)]).encode())
    for path in paths:
        try:
            stat = Path(path).stat()
        except OSError:
            return None  # reading it will say why
        name = os.fsencode(Path(path).absolute())
        digest.update(b"\0%b\0%d %d" % (name, stat.st_size, stat.st_mtime_ns))
    return Path(cache_dir, f"{digest.hexdigest()}.json")


def _cached(cache: Path | None, reader: LabelReader) -> MaskScan | None:
    try:
        scan = cache and MaskScan(reader, **json.loads(cache.read_text(encoding="utf-8")))
        return scan if scan and _adds_up(scan) else None
    except (OSError, ValueError, TypeError):
        return None


def _adds_up(scan: MaskScan) -> bool:
    by_class = (scan.class_counts, scan.class_files, scan.class_extent)
    return (
        len(scan.raw_histogram) == 256
        and all(len(counts) == scan.reader.num_classes for counts in by_class)
        and sum(scan.raw_histogram) == sum(scan.class_counts) + scan.ignored > 0
        and max(scan.class_files) <= scan.files
    )


def _keep(cache: Path | None, scan: MaskScan) -> None:
    counts = {item.name: getattr(scan, item.name) for item in fields(scan) if item.name != "reader"}
    if cache:
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_text(cache, json.dumps(counts))


# --- wording -------------------------------------------------------------------------------------


def _require(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{key}: {problem}")


def _is_rgb(colour: Sequence[int]) -> bool:
    return len(colour) == 3 and all(0 <= value <= 255 for value in colour)


def _code(colour: Sequence[int]) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def _names(reader: LabelReader) -> list[str]:
    return list(reader.class_names or ())


def _is_jpeg(path: PathLike) -> bool:
    return Path(path).suffix.lower() in (".jpg", ".jpeg")


def _pixels(count: int) -> str:
    return f"{count} pixel" if count == 1 else f"{count} pixels"
