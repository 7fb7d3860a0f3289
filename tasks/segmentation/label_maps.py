"""From mask files to class indices."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from train_utils.errors import UserError, require, shortened
from train_utils.image_io import (
    JPEG_SUFFIXES,
    Channel,
    MaskReader,
    PathLike,
    decode,
    grey_step,
    is_wide,
    read_colours,
    within_memory,
)
from transforms import IGNORE

VOC_VOID = (224, 224, 192)  # the colour of the borders between PASCAL VOC's objects

MAX_VALUES = 3  # an error names so many values of a file and counts the others
_SAVE_LABELS = "Save it as a grey or palette PNG of class indices."


def read_label_file(path: PathLike) -> np.ndarray:
    """The numbers that a label file stores, upright and never scaled: uint8 [H, W] or [H, W, 3].

    Palette files give their indices, never their colours; grey files their values (of 1, 2 and 4
    bits, too; of 16 bits, if none exceeds 255); RGB files give [H, W, 3], of 16 bits the upper 8.
    Alpha may be there, but opaque throughout. Raises UserError for other files, among them grey
    TIFFs in which 0 is white, and for those that cannot be read.
    """
    with within_memory(path):
        image, _, raw_mode = decode(path)
        values, problem = np.array(image), ""
        if is_wide(image):
            if values.max() > 255:
                problem = (
                    f"16-bit labels up to {values.max()}, but a label is 0 to 255. Save class "
                    "indices, not the numbers of objects or scaled values."
                )
        elif image.mode in ("LA", "PA", "RGBA"):
            if (values[..., -1] != 255).any():
                problem = f"some pixels are transparent, which no label is. {_SAVE_LABELS}"
            values = values[..., :3] if image.mode == "RGBA" else values[..., 0]
        elif image.mode in ("1", "L"):
            if "I" in raw_mode.partition(";")[2]:  # Pillow has inverted them
                problem = f"a TIFF in which 0 is white. {_SAVE_LABELS}"
            values = values // grey_step(raw_mode)
        elif image.mode not in ("P", "RGB"):
            problem = f"{image.mode} pixels hold no labels. {_SAVE_LABELS}"
        if problem:
            raise UserError(f"{path}: {problem}")
        return values.astype(np.uint8, copy=False)


@dataclass
class LabelReader:
    """Reads a mask file as class indices, `tv_tensors.Mask` uint8 [1, H, W], 255 being ignored.

    It is a mask map: it declares how the pixels of a file name their classes.

    index: the numbers that the file stores (`read_label_file`) are the classes.
    colour: pixels have exactly the colours (`read_colours`) of `palette`, which is in class order;
        those of VOC_VOID do not count, unless it is a class's.
    threshold: two classes; grey levels (by a `MaskReader` of `channel`) below `threshold` are dark,
        and the object, class 1, is dark or bright.

    Raises ValueError ("key: cause", keys as in a recipe's data section) for settings that make no
    sense; a call raises UserError for a file that does not fit them or cannot be read.
    """

    num_classes: int
    class_names: Sequence[str] = ()  # empty: class 0, class 1, …
    ignore_index: int | None = 255  # index: the value of pixels that do not count
    ignore_beyond: bool = False  # index: values from num_classes on do not count either
    mode: Literal["index", "colour", "threshold"] = "index"
    palette: Sequence[Sequence[int]] | None = None  # colour: (red, green, blue) of each class
    threshold: int = 128
    object: Literal["dark", "bright"] = "dark"
    channel: Channel | None = None  # threshold: where the mask of a file with alpha lies

    def __post_init__(self) -> None:
        count = self.num_classes
        require(2 <= count <= IGNORE, "class_names", f"must be 2 to {IGNORE}")
        if not self.class_names:
            self.class_names = [f"class {index}" for index in range(count)]
        require(len(self.class_names) == count, "class_names", f"must be {count}, one per class")
        index = self.ignore_index
        require(index is None or 0 <= index <= 255, "ignore_index", "must lie between 0 and 255")
        require(1 <= self.threshold <= 255, "mask_threshold", "must lie between 1 and 255")
        if self.mode == "threshold":
            require(count == 2, "class_names", "must be two for masks cut at a threshold")
        if self.mode == "colour":
            colours = [tuple(colour) for colour in self.palette or ()]
            require(len(colours) == count, "palette", f"must hold {count} colours, one per class")
            require(len(set(colours)) == count, "palette", "must not hold a colour twice")
            for colour in colours:
                rgb = len(colour) == 3 and all(0 <= value <= 255 for value in colour)
                require(rgb, "palette", "colours are three values from 0 to 255")

    def resized(self, labels: Tensor, size: list[int]) -> Tensor:
        """Classes at another size (H, W): between two of them there is none."""
        return F.resize(labels, size, interpolation=F.InterpolationMode.NEAREST_EXACT)

    def __call__(self, path: PathLike) -> tv_tensors.Mask:
        return tv_tensors.Mask(torch.from_numpy(self.table()[self.values(path)])[None])

    def values(self, path: PathLike) -> np.ndarray:
        """What `table` turns into classes, uint8 [H, W].

        The file's values or its grey levels; of colours the class index, as there is no table of
        16 million. Every value that is not in the table has been refused.
        """
        if self.mode == "threshold":
            return MaskReader(self.channel)(path)[0].numpy()
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
                    f"{path}: holds colours, but data.mask_values=index expects class "
                    "indices. Set data.mask_values=colour and data.palette, the RGB of each class."
                )
            values = np.ascontiguousarray(values[..., 0])
        if not self.ignore_beyond and values.max() >= self.num_classes:
            self._refuse_values_beyond(path, values)
        return values

    def _refuse_values_beyond(self, path: PathLike, values: np.ndarray) -> None:
        histogram = np.bincount(values.ravel(), minlength=256)
        beyond = histogram.copy()
        beyond[: self.num_classes] = 0
        if self.ignore_index is not None:
            beyond[self.ignore_index] = 0
        wrong = np.flatnonzero(beyond)
        if not len(wrong):
            return
        found = [f"{value} on {_pixels(beyond[value])}" for value in wrong]
        if not histogram[1:255].any():
            fix = f"The only values are 0 and 255, as in a binary mask: {use_bright(self)}."
        elif _is_jpeg(path):
            fix = (
                f"JPEG blurs labels. If the mask has two levels: {use_bright(self)} (or dark); "
                "else save labels as PNG."
            )
        else:
            fix = (
                f"If these are classes, data.class_names must name {wrong[-1] + 1}; if not, "
                f"data.ignore_index={wrong[0]} leaves out one value, and data.ignore_beyond=true "
                "all that are no classes."
            )
        raise UserError(
            f"{path}: label {shortened(found, MAX_VALUES)}, but the "
            f"{self.num_classes} classes are 0 to {self.num_classes - 1}. {fix}"
        )

    def _colour_values(self, path: PathLike) -> np.ndarray:
        image = read_colours(path).numpy()
        codes = np.zeros(image.shape[1:], dtype=np.int32)
        for channel in image:
            codes <<= 8
            codes |= channel
        # One more than the class, 0 being unknown: zeroed memory is not touched before it is read.
        classes = np.zeros(2**24, dtype=np.int16)
        classes[_code(VOC_VOID)] = IGNORE + 1
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
            f"{path}: colour {colour} at x={x}, y={y} is not in data.palette; "
            f"in all, {all_pixels} of colours that are no class ({pixels} of this one). {fix}"
        )


def use_bright(reader: LabelReader) -> str:
    """What to type where masks have two levels, of which the bright one is the object."""
    two = "" if reader.num_classes == 2 else " --set data.class_names=[background,object]"
    return f"--set data.mask_values=threshold{two} --set data.mask_object=bright"


def _code(colour: Sequence[int]) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def _is_jpeg(path: PathLike) -> bool:
    return Path(path).suffix.lower() in JPEG_SUFFIXES


def _pixels(count: int) -> str:
    return f"{count} pixel" if count == 1 else f"{count} pixels"
