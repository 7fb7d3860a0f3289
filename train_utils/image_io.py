"""Reading and writing image files: one rule per pixel format, in training and prediction alike.

| in the file             | `read_image`, uint8 RGB          | `read_mask`, uint8 grey           |
|-------------------------|----------------------------------|-----------------------------------|
| EXIF orientation        | applied                          | applied (the mask's own tag)      |
| several frames          | the first                        | the first                         |
| 1 bit                   | 0 or 255                         | 0 or 255                          |
| grey, up to 8 bits      | replicated to three channels     | as stored                         |
| grey, 16 bits           | v·255/65535, rounded, replicated | v·255/65535, rounded              |
| RGB                     | as stored (of 16 bits, upper 8)  | luminance (ITU-R BT.601)          |
| CMYK, YCbCr, LAB, HSV   | converted to RGB                 | luminance of the RGB              |
| palette                 | the palette's colours            | grey if all colours in use are    |
|                         |                                  | grey; else index 0 is 0, all      |
|                         |                                  | other indices are 255             |
| alpha, transparent key  | composited over white            | composited over black             |
| 0 and 1 only, lossless  | as stored                        | a 0/1 mask: multiplied by 255     |
| 16 bits, 2…255 at most  | refused: it would be black       | refused: it would be black        |
| grey, 12 or 32 bits     | refused                          | refused                           |
| float                   | refused                          | refused                           |

`read_trimap` takes grey levels as they are stored (of a palette, its colours) and guesses nothing:
any transparency, any colour and any fourth level are refused.

An EXIF tag counts where it stands before the pixels (as in every JPEG); one that cannot be parsed
counts as absent. PNG checksums are verified: a damaged PNG gives its own pixels or none. The other
formats have none, so damage that their decoders conceal, as in the middle of a JPEG or of a plain
TIFF, cannot be seen; nor can rows that the writer of a PNG has left out. Pipes and devices are
refused unopened. Every error is a `UserError` that names the file, the cause and the fix.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo, PngStream
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    TiffImageFile,
)
from torchvision import tv_tensors

from train_utils.errors import UserError, shortened
from train_utils.files import written_whole

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000
BACKGROUND, UNKNOWN, FOREGROUND = 0, 128, 255  # the values of a trimap

# Formats are recognised by content, not by suffix; naming them keeps Pillow's rarer parsers (and
# the external programs that some of them start) away from untrusted files.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
_LOSSLESS_FORMATS = ("PNG", "BMP", "TIFF", "GIF")
_LOSSY_TIFF_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")
_WHITE, _BLACK = 255, 0
_PNG_SIGNATURE = 8  # bytes before the first chunk
_SOFTWARE = "pixtrain"
_COMPRESSION = 1  # zlib's: a third of the default's time, for photographs 5 % larger, maps a third

_REPLACE = "Replace the file by an intact copy, or remove it."
_MAKE_SMALLER = "Scale it down or cut it into tiles."
_SAVE_AS_PNG = "Scale its values and save it as a PNG of 8 or 16 bits."
_SAVE_8_BITS = "Save it with 8 bits."
_SAVE_LABELS = "Save it as a grey or palette PNG of class indices."

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

PathLike = str | os.PathLike[str]
Pixels = TypeVar("Pixels")
Options = ParamSpec("Options")


def _within_memory(
    read: Callable[Concatenate[PathLike, Options], Pixels],
) -> Callable[Concatenate[PathLike, Options], Pixels]:
    """A reader whose MemoryError is a UserError."""

    @wraps(read)
    def reader(path: PathLike, *args: Options.args, **kwargs: Options.kwargs) -> Pixels:
        try:
            return read(path, *args, **kwargs)
        except MemoryError as error:
            raise _explained(path, error) from error

    return reader


@_within_memory
def read_image(path: PathLike, at_least: int | None = None) -> tv_tensors.Image:
    """Read a file as RGB, uint8 [3, H, W], by the rules of this module's table.

    The memory is laid out pixel by pixel (channels last), which resizing is fastest on.

    at_least: decode a JPEG at 1/2, 1/4 or 1/8 of its size, at the smallest of these at which
    neither side is below so many pixels. The decoder scales in the frequency domain and rounds
    sides up, so what lies at the far edges can be up to a pixel off: resized further, the image is
    nearly, not exactly, that of the whole file.
    Raises UserError for a file that cannot be read as asked.
    """
    pixels = np.array(_rgb(path, at_least))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


@dataclass(frozen=True)
class DraftReader:
    """`read_image` with `at_least` given."""

    at_least: int

    def __call__(self, path: PathLike) -> tv_tensors.Image:
        return read_image(path, self.at_least)


@_within_memory
def read_foreground(path: PathLike) -> tv_tensors.Image:
    """`read_image`, except that an alpha channel is dropped: the colours are as stored.

    The colours of a cut-out reach beyond its alpha; over white, soft edges would get a white halo.
    """
    with _opened(path) as image:
        if image.mode not in ("RGBA", "LA"):
            return read_image(path)
    pixels = np.array(_decode(path)[0].convert("RGB"))
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))


@_within_memory
def read_mask(path: PathLike) -> tv_tensors.Mask:
    """Read a file as a grey mask, uint8 [1, H, W] in 0…255, by the rules of this module's table.

    Raises UserError for a file that cannot be read as asked.
    """
    return tv_tensors.Mask(torch.from_numpy(_grey(path))[None])


@_within_memory
def read_image_and_mask(
    image: PathLike, mask: PathLike
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """`read_image` and `read_mask` of two files.

    If they are of one size, both are views of one memory, uint8 [H, W, 4]: a mask that lies beside
    its image is resized along with it at no further cost.
    """
    picture, grey = _rgb(image), _grey(mask)
    if picture.size == grey.shape[::-1]:
        # Four bytes per pixel, as in Pillow's own memory: one of each is to spare for the mask.
        pixels = np.frombuffer(bytearray(picture.tobytes("raw", "RGBX")), np.uint8)
        pixels = pixels.reshape(*grey.shape, 4)
        pixels[..., 3] = grey
        both = torch.from_numpy(pixels).permute(2, 0, 1)
        return tv_tensors.Image(both[:3]), tv_tensors.Mask(both[3:])
    alone = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return tv_tensors.Image(alone), tv_tensors.Mask(torch.from_numpy(grey)[None])


def _rgb(path: PathLike, at_least: int | None = None) -> Image.Image:
    image, _ = _decode(path, at_least)
    if _is_wide(image):
        image = Image.fromarray(_to_8_bits(_wide_values(path, image, _WHITE)))
    if image.has_transparency_data:
        image = _composite(image, _WHITE)
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(path: PathLike) -> np.ndarray:
    """The grey levels of `read_mask`, uint8 [H, W]."""
    image, lossless = _decode(path)
    if _is_wide(image):
        grey = _wide_values(path, image, _BLACK)
    elif image.mode in ("P", "PA"):
        grey = _palette_greys(image)
    else:
        if image.has_transparency_data:
            image = _composite(image, _BLACK)
        if image.mode not in ("1", "L"):
            image = image.convert("RGB")  # first: from LAB there is no direct way to luminance
        grey = np.array(image if image.mode == "L" else image.convert("L"))

    # Many tools write the truth values 0 and 1. Read as grey levels they are 0 and 1/255: a network
    # would learn, without any error, to answer black. In a lossy file a 1 can be noise on black.
    if lossless and grey.max() == 1:
        return grey.astype(np.uint8) * 255
    return _to_8_bits(grey) if grey.dtype == np.uint16 else grey


@_within_memory
def read_trimap(path: PathLike) -> tv_tensors.Mask:
    """Read a file as a trimap, uint8 [1, H, W] of BACKGROUND, UNKNOWN and FOREGROUND only.

    Exactly black is background, exactly white is foreground, and one grey level between 64 and 192
    of 255 is the unknown region: tools write 127, 128 or 102 there. A trimap may lack any of them.
    Raises UserError for everything else: an alpha matte, JPEG noise, class codes, colours, pixels
    that are not opaque.
    """
    image, lossless = _decode(path)
    values, white = _grey_levels(path, image)
    counts = np.bincount(values.ravel(), minlength=white + 1)
    levels = np.flatnonzero(counts)
    between = levels[(levels > 0) & (levels < white)]
    if len(between) > 1 or any(not 64 <= level * 255 / white <= 192 for level in between):
        found = _most_frequent({str(level): counts[level] for level in levels})
        raise UserError(
            f"{printable(path)}: a trimap has 0, {white} and one grey level between for the "
            f"unknown region, but this file has {found}. {_trimap_fix(levels, lossless)}"
        )
    trimap = np.full(values.shape, UNKNOWN, dtype=np.uint8)
    trimap[values == 0] = BACKGROUND
    trimap[values == white] = FOREGROUND
    return tv_tensors.Mask(torch.from_numpy(trimap)[None])


def image_size(path: PathLike, at_least: int | None = None) -> tuple[int, int]:
    """The upright (width, height) that `read_image` will give, from the header only.

    Raises UserError where the header already shows that the file cannot be read.
    """
    with _opened(path) as image:
        _scale_down(image, at_least)
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def is_damaged(path: PathLike) -> bool:
    """Whether a file cannot be read because of what it holds: it is empty, cut, altered, no image.

    Not so where the way to it is at fault (missing, not permitted, too little memory), or where an
    intact file is not of a kind that is taken.
    """
    try:
        _decode(path)
    except UserError as error:
        cause = error.__cause__
        elsewhere = isinstance(cause, MemoryError | Image.DecompressionBombError)
        return cause is not None and not elsewhere and not getattr(cause, "errno", None)
    return False


def list_images(folder: PathLike, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by their path in it: the same order on every platform.

    A file counts by its suffix (`IMAGE_SUFFIXES`, in any case). Hidden files and folders, among
    them the `._*` files of macOS archives, are left out; links to folders are not followed.
    Raises UserError if the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{printable(folder)}: {kind}. Check the path.")
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [Path(parent, name) for name in files if _is_image_name(name)]
    if not found:
        raise UserError(
            f"{printable(folder)}: holds no images ({' '.join(IMAGE_SUFFIXES)}). Check the path."
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def save_image(image: Image.Image, path: PathLike) -> None:
    """Write a PNG (lossless) so that `path` holds either its old content or all of the new.

    Not so after a power failure, which waiting for the disk would guard against: pictures can be
    made again, and the waiting costs more than all the rest. Missing parent folders are made. The
    file says in a text field that it comes from here, which `saved_here` reads. Raises UserError if
    the file system refuses, and ValueError if `path` does not end in `.png`.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{printable(path)}: images are saved as .png")
    note = PngInfo()
    note.add_text("Software", _SOFTWARE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, durable=False) as file:
            image.save(file, format="PNG", pnginfo=note, compress_level=_COMPRESSION)
    except OSError as error:
        raise UserError(
            f"{printable(path)}: cannot be written ({error.strerror}). "
            "Make room, or choose an output folder that can be written to."
        ) from error


def saved_here(path: PathLike) -> bool:
    """Whether `save_image` wrote this file."""
    try:
        with _opened(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except UserError:
        return False


def printable(path: PathLike) -> str:
    """A path as text that any terminal or log can take.

    Bytes that are not UTF-8 (surrogate escapes in a str) and control characters become backslash
    escapes; everything else stays as it is.
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in os.fspath(path)
    )


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _raise_unreadable(error: OSError) -> None:
    raise UserError(
        f"{printable(error.filename)}: cannot be listed ({error.strerror}). Check its permissions."
    ) from error


# --- label files ---------------------------------------------------------------------------------


@_within_memory
def read_label_file(path: PathLike) -> np.ndarray:
    """The numbers that a label file stores, upright and never scaled: uint8 [H, W] or [H, W, 3].

    Palette files give their indices, never their colours; grey files their values (of 1, 2 and 4
    bits, too; of 16 bits, if none exceeds 255); RGB files give [H, W, 3], of 16 bits the upper 8.
    Alpha may be there, but opaque throughout. Raises UserError for other files, among them grey
    TIFFs in which 0 is white, and for those that cannot be read.
    """
    image, _ = _decode(path)
    if _is_wide(image):
        return _narrow_labels(path, np.array(image))
    pixels = np.array(image).astype(np.uint8, copy=False)
    if image.mode in ("LA", "PA", "RGBA"):
        if (pixels[..., -1] != 255).any():
            raise UserError(
                f"{printable(path)}: some pixels are transparent, which no label is. {_SAVE_LABELS}"
            )
        pixels = pixels[..., :3] if image.mode == "RGBA" else pixels[..., 0]
    elif image.mode not in ("1", "L", "P", "RGB"):
        raise UserError(f"{printable(path)}: {image.mode} pixels hold no labels. {_SAVE_LABELS}")
    return pixels // _label_step(path) if image.mode in ("1", "L") else pixels


def _narrow_labels(path: PathLike, values: np.ndarray) -> np.ndarray:
    if values.max() > 255:
        raise UserError(
            f"{printable(path)}: 16-bit labels up to {values.max()}, but a label is 0 to 255. Save "
            "class indices, not the numbers of objects or scaled values."
        )
    return values.astype(np.uint8)


def _label_step(path: PathLike) -> int:
    """What the values of a grey label file are to be divided by."""
    with _opened(path) as image:
        if "I" in _raw_mode(image).partition(";")[2]:  # Pillow has inverted them
            raise UserError(f"{printable(path)}: a TIFF in which 0 is white. {_SAVE_LABELS}")
        return _grey_step(image)


# --- opening and decoding ------------------------------------------------------------------------


@contextmanager
def _opened(path: PathLike) -> Iterator[Image.Image]:
    """Open a file and check its header; whatever Pillow raises within the block is a UserError."""
    try:
        _require_file(path)
        with _as_path(path).open("rb") as file, Image.open(file, formats=_FORMATS) as image:
            _check_header(path, image)
            yield image
    except UserError:
        raise
    except Exception as error:  # on damaged files Pillow's parsers raise nearly every type there is
        raise _explained(path, error) from error


def _decode(path: PathLike, at_least: int | None = None) -> tuple[Image.Image, bool]:
    """The first frame, loaded and upright in the file's own mode, and whether it is lossless.

    at_least: see `read_image`.
    """
    with _opened(path) as image:
        if isinstance(image, PngImageFile):
            # Loading skips the checksums of the pixel data, and then most flipped bits go
            # unnoticed. An image that has verified itself cannot be loaded: so by another reader.
            assert image.fp  # for mypy: it is open
            image.fp.seek(_PNG_SIGNATURE)
            PngStream(image.fp).verify()
        _scale_down(image, at_least)
        return _load(path, image)


def _scale_down(image: Image.Image, at_least: int | None) -> None:
    """Have a JPEG that is not loaded yet decoded at a reduced size, see `read_image`."""
    if at_least and isinstance(image, JpegImageFile):
        image.draft(None, (at_least, at_least))


def _load(path: PathLike, image: Image.Image) -> tuple[Image.Image, bool]:
    lossless = (
        image.format in _LOSSLESS_FORMATS
        and image.info.get("compression") not in _LOSSY_TIFF_COMPRESSIONS
    )
    method = _TRANSPOSE.get(_orientation(image))
    narrowed = not _is_wide(image) and ";16" in _raw_mode(image)
    if "transparency" in image.info and (step := _grey_step(image)) > 1:
        image.info["transparency"] *= step  # Pillow scales the pixels, but not their key
    image.load()
    if narrowed and not _has_colour(image):
        raise UserError(
            f"{printable(path)}: 16-bit colours of which none exceeds 255: all would be read as 0. "
            f"{_SAVE_8_BITS}"
        )
    return (image if method is None else image.transpose(method)), lossless


def _has_colour(image: Image.Image) -> bool:
    colours = [image.getchannel(band) for band in image.getbands() if band != "A"]
    return any(colour.getbbox() for colour in colours)


def _raw_mode(image: Image.Image) -> str:
    """How the pixels lie in the file, in Pillow's words ("RGB;16B"); "" where they do not say.

    To be asked before the pixels are loaded.
    """
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _grey_step(image: Image.Image) -> int:
    """What Pillow multiplies the values of a grey file of 2 or 4 bits by, to fill 8 bits."""
    mode, _, packing = _raw_mode(image).partition(";")
    return {"2": 85, "4": 17}.get(packing[:1], 1) if mode == "L" else 1


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is left to apply, 1…8; to be asked before the pixels are loaded."""
    if image.format == "TIFF":
        return 1  # Pillow itself turns TIFFs when it loads them, and reports their upright size
    try:
        # The base class's method, since PNG's own loads all pixels to look for a tag behind them.
        tag = Image.Image.getexif(image).get(ExifTag.Orientation, 1)
    except Exception:  # broken metadata is no reason to lose the picture
        return 1
    return tag if tag in _TRANSPOSE else 1


def _as_path(path: PathLike) -> Path:
    return path if isinstance(path, Path) else Path(path)  # which parses a Path anew


def _require_file(path: PathLike) -> None:
    """Raise a UserError for a pipe or a device, which might keep its reader waiting for ever."""
    mode = _as_path(path).stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{printable(path)}: a pipe or a device. Save its content to a file.")


def _check_header(path: PathLike, image: Image.Image) -> None:
    width, height = image.size
    problem = None
    if width * height > MAX_PIXELS:
        problem = f"{width}×{height} is more than {MAX_PIXELS:,} pixels. {_MAKE_SMALLER}"
    elif image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        problem = f"32-bit and float pixels have no fixed range. {_SAVE_AS_PNG}"
    elif isinstance(image, TiffImageFile) and not _is_wide(image):
        # Pillow reads only the first half of each plane, and that as 8 bits.
        if image.tag_v2.get(PLANAR_CONFIGURATION) == 2 and 16 in image.tag_v2[BITSPERSAMPLE]:
            problem = f"planes of 16 bits are not supported. {_SAVE_8_BITS}"
    elif isinstance(image, TiffImageFile):
        # Pillow hands both kinds over as if they were plain 16 bits: far too dark, or inverted.
        if image.tag_v2.get(BITSPERSAMPLE) == (12,):
            problem = f"12-bit pixels are not supported. {_SAVE_AS_PNG}"
        elif image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:
            problem = f"16-bit pixels with 0 for white are not supported. {_SAVE_AS_PNG}"
    elif ";16" in _raw_mode(image) and image.mode == "RGB" and "transparency" in image.info:
        # Pillow compares the key's 16 bits with the pixels' upper 8.
        problem = f"a transparent colour of 16 bits is not supported. {_SAVE_8_BITS}"
    if problem:
        raise UserError(f"{printable(path)}: {problem}")


def _explained(path: PathLike, error: Exception) -> UserError:
    """Cause and fix in the user's terms for an exception raised while reading `path`."""
    if isinstance(error, FileNotFoundError):
        problem = "no such file. Check the path."
    elif isinstance(error, OSError) and error.errno:
        problem = f"cannot be read ({error.strerror}). Check the path and its permissions."
    elif isinstance(error, Image.DecompressionBombError):
        problem = f"has far more than {MAX_PIXELS:,} pixels. {_MAKE_SMALLER}"
    elif isinstance(error, MemoryError):
        problem = f"too little memory to read it. {_MAKE_SMALLER}"
    elif not isinstance(error, UnidentifiedImageError):
        problem = f"damaged or truncated ({printable(str(error))}). {_REPLACE}"
    elif Path(path).stat().st_size == 0:
        problem = f"the file is empty. {_REPLACE}"
    else:
        problem = f"not an image that can be read ({', '.join(_FORMATS)}). {_REPLACE}"
    return UserError(f"{printable(path)}: {problem}")


# --- pixel formats -------------------------------------------------------------------------------


def _is_wide(image: Image.Image) -> bool:
    # Mode "I" is how older Pillow opens a 16-bit PNG; other files of that mode have been refused.
    return image.mode.startswith("I")


def _wide_values(path: PathLike, image: Image.Image, backdrop: int) -> np.ndarray:
    """The stored values of a 16-bit grey image, uint16 [H, W], a transparent value replaced.

    Raises UserError for values of 8 bits.
    """
    values = np.array(image).astype(np.uint16)
    if 1 < values.max() <= 255:
        raise UserError(
            f"{printable(path)}: 16-bit pixels of which none exceeds {values.max()} of 65535: it "
            f"would be read as black. {_SAVE_8_BITS}"
        )
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = backdrop * 257
    return values


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """round(v·255/65535) in integers: 65535/255 = 257 is odd, so there are no ties."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _composite(image: Image.Image, backdrop: int) -> Image.Image:
    """An image with transparency, over a plain backdrop; mode RGB."""
    canvas = Image.new("RGBA", image.size, (backdrop, backdrop, backdrop, 255))
    canvas.alpha_composite(_to_rgba(image))
    return canvas.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied grey, which Pillow converts to nothing else
        image = image.convert("LA")
    return image.convert("RGBA")


def _palette_greys(image: Image.Image) -> np.ndarray:
    """A palette mask by the table's rule, composited over black; uint8 [H, W]."""
    image.apply_transparency()  # moves a PNG's or GIF's transparent entries into the palette
    entries = np.array(image.getpalette("RGBA") or [], dtype=np.uint8).reshape(-1, 4)
    palette = np.zeros((256, 4))
    palette[: len(entries)] = entries
    pixels = np.array(image).reshape(image.height, image.width, -1)
    index = pixels[..., 0]

    colours = np.rint(palette[:, :3] * palette[:, 3:] / 255)
    used = np.bincount(index.ravel(), minlength=256) > 0
    if (colours[used] == colours[used, :1]).all():
        levels = colours[:, 0]
    else:  # the colours of class labels: what is not the background class is the object
        levels = palette[:, 3].copy()
        levels[0] = 0
    greys = levels[index]
    if image.mode == "PA":
        greys = np.rint(greys * pixels[..., 1] / 255)
    return greys.astype(np.uint8)


# --- trimaps -------------------------------------------------------------------------------------


def _grey_levels(path: PathLike, image: Image.Image) -> tuple[np.ndarray, int]:
    """A grey image's stored levels [H, W], and the one that is white: 255, or 65535 of 16 bits.

    Raises UserError for colours and for pixels that are not opaque.
    """
    wide = _is_wide(image)
    if image.has_transparency_data:
        if wide or np.array(_to_rgba(image))[..., 3].min() < 255:
            raise UserError(
                f"{printable(path)}: a trimap may not be transparent anywhere, as nobody can tell "
                "what is meant there. Save it without an alpha channel or transparent colour."
            )
        image = image if wide else _to_rgba(image)
    if wide:
        return np.array(image).astype(np.uint16), 65535
    if image.mode in ("1", "L"):
        return np.array(image.convert("L")), 255
    rgb = np.array(image.convert("RGB"))
    coloured = (rgb != rgb[..., :1]).any(axis=2)
    if coloured.any():
        colours, counts = np.unique(rgb[coloured], axis=0, return_counts=True)
        names = [str(tuple(colour)) for colour in colours.tolist()]
        raise UserError(
            f"{printable(path)}: a trimap is grey, but this file has the RGB colours "
            f"{_most_frequent(dict(zip(names, counts.tolist(), strict=True)))}. "
            "Give the trimap itself, in black, grey (128) and white."
        )
    return rgb[..., 0], 255


def _most_frequent(pixels: dict[str, int]) -> str:
    """Values with their numbers of pixels, the most frequent first, as text."""
    ordered = sorted(pixels, key=lambda value: -pixels[value])
    return shortened([f"{value} ({pixels[value]:,} px)" for value in ordered], limit=6)


def _trimap_fix(levels: np.ndarray, lossless: bool) -> str:
    if not lossless:
        return "Save it as a PNG: lossy compression blurs its levels."
    if len(levels) <= 3:
        return "Save it with 0 for background, 128 for unknown and 255 for foreground."
    return "Give the trimap, not the alpha matte, and resize it without smoothing."
