"""What a set of masks holds, counted before training.

All masks are read through their mask map, so that a wrong one is a clear error at the start, and
not a device assert, a meaningless loss or a black output later.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from tasks.segmentation.label_maps import MAX_VALUES, USE_BRIGHT, LabelReader
from train_utils.errors import UserError, shortened
from train_utils.image_io import PathLike
from train_utils.mask_scan import count_masks
from transforms import IGNORE

_NEAR = 32  # grey levels around a threshold that a two-level mask hardly has …
_MAX_NEAR = 0.05  # … at most on this share of its pixels
_COUNT = np.uint32  # image_io.MAX_PIXELS fit


class MaskScan:
    """What a set of masks holds, as read by `reader`; counts of pixels where nothing else is said.

    numbers: what `summary` makes of them.
    raw_histogram: of the 256 values behind the classes (see `LabelReader.values`).
    class_extent: by class, the pixels that count in those files in which the class occurs.
    ignored: pixels that do not count; blank_files: files without any pixel that counts.
    """

    def __init__(self, reader: LabelReader, numbers: np.ndarray) -> None:
        self.reader = reader
        self.files, self.ignored, self.ignored_files, self.blank_files = numbers[:4].tolist()
        self.raw_histogram = numbers[4:260].tolist()
        by_class = numbers[260:].reshape(3, reader.num_classes)
        self.class_counts, self.class_files, self.class_extent = by_class.tolist()

    @property
    def absent(self) -> list[str]:
        """Names of the classes that occur nowhere."""
        counts = zip(self.reader.class_names, self.class_counts, strict=True)
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

    def lines(self) -> list[str]:
        """The histogram by line: class, pixels, share, files; then what stands out."""
        total = sum(self.raw_histogram)
        rows = [
            (f"{index} {name}", count, self.class_files[index])
            for index, name in enumerate(self.reader.class_names)
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
        return [*lines, *(f"  {remark}" for remark in self._remarks())]

    def _ignored_values(self) -> str:
        if self.reader.mode != "index":
            return ""
        found = np.flatnonzero((self.reader.table() == IGNORE) & (np.array(self.raw_histogram) > 0))
        return f" ({shortened([str(value) for value in found], MAX_VALUES)})"

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


def summary(reader: LabelReader, histograms: np.ndarray) -> np.ndarray:
    """The numbers of a `MaskScan`, int64 [4 + 256 + 3 · classes], of histograms [files, 256]."""
    table = reader.table()

    def pixels(index: int) -> np.ndarray:
        return histograms[:, table == index].sum(1, dtype=np.int64)

    classes, ignored = np.stack([pixels(c) for c in range(reader.num_classes)], 1), pixels(IGNORE)
    counting = classes.sum(1)
    numbers = (
        (len(histograms), ignored.sum(), (ignored > 0).sum(), (counting == 0).sum()),
        histograms.sum(0, dtype=np.int64),
        classes.sum(0),
        (classes > 0).sum(0),
        ((classes > 0) * counting[:, None]).sum(0),
    )
    return np.concatenate(numbers)


def scan_masks(
    paths: Sequence[PathLike],
    reader: LabelReader,
    cache_dir: PathLike | None = None,
    refuse_single_class: bool = True,
) -> MaskScan:
    """Read all masks and count what they hold; see `count_masks`.

    Raises UserErrors for masks that `reader` refuses, for masks to be cut at a threshold that do
    not have two levels, and, with `refuse_single_class`, for masks from which nothing can be
    learned.
    """

    def histogram(path: PathLike) -> np.ndarray:
        return np.bincount(reader.values(path).ravel(), minlength=256).astype(_COUNT)

    size, of_all = 260 + 3 * reader.num_classes, partial(summary, reader)
    numbers = count_masks(paths, histogram, of_all, size, reader, cache_dir)
    scan = MaskScan(reader, numbers)
    place = Path(paths[0]).parent
    if refuse_single_class and sum(count > 0 for count in scan.class_counts) < 2:
        raise UserError(f"{place}: {_single_class(scan)}")
    if reader.mode == "threshold" and scan._near_threshold() > _MAX_NEAR:
        raise UserError(
            f"{place}: {scan._near_threshold():.0%} of the masks' pixels are within {_NEAR} grey "
            f"levels of the threshold {reader.threshold}, so these are no two-level masks. Set "
            "data.mask_values=index if they hold class indices, or another data.mask_threshold."
        )
    return scan


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
    cause = f"all pixels that count are class {index} ({reader.class_names[index]})"
    if reader.mode == "index" and levels.tolist() == [0, 255]:
        return f"{cause}, the others are 255: these look like binary masks. Use {USE_BRIGHT}."
    ignored = f", and what is ignored{scan._ignored_values()}" if scan.ignored else ""
    return f"{cause}, so there is nothing to learn. Check that these are the masks{ignored}."
