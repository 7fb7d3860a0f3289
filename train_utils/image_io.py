"""Reading and writing image files: one rule per pixel format, in training and prediction alike.

| in the file             | `read_image`, uint8 RGB          | `read_mask`, uint8 grey           |
|-------------------------|----------------------------------|-----------------------------------|
| EXIF orientation        | applied                          | applied (the mask's own tag)      |
| several pages, frames   | refused; `frames_of` has each    | refused                           |
| colour profile          | converted to sRGB, if another    | not looked at                     |
| 1 bit                   | 0 or 255                         | 0 or 255                          |
| grey, up to 8 bits      | replicated to three channels     | as stored                         |
| grey, 16 bits           | v·255/65535, rounded, replicated | v·255/65535, rounded              |
| RGB                     | as stored (of 16 bits, upper 8)  | luminance (ITU-R BT.601)          |
| CMYK, YCbCr, LAB, HSV   | converted to RGB                 | luminance of the RGB              |
| palette                 | the palette's colours            | grey if all colours in use are    |
|                         |                                  | grey; else index 0 is 0, all      |
|                         |                                  | other indices are 255             |
| alpha, all opaque       | dropped                          | dropped                           |
| alpha that varies       | composited over white            | is the mask, see `MaskReader`     |
| transparent key, of     | composited over white            | composited over black             |
| grey or RGB             |                                  |                                   |
| 0 and 1 only, lossless  | as stored                        | a 0/1 mask: multiplied by 255     |
| 16 bits, 2…255 at most  | refused: it would be black       | refused: it would be black        |
| grey, 12 or 32 bits     | refused                          | refused                           |
| float                   | refused                          | refused                           |

Files of other meanings are read by what a task builds on `decode`.

An EXIF tag counts where it stands before the pixels (as in every JPEG); one that cannot be parsed
counts as absent. A profile counts that describes such pixels (grey, RGB or CMYK; see
`colour_profiles`); 16 bits are converted by their 8-bit values. Reduced copies in a TIFF, and the
further pictures in a phone's JPEG, are no pages. PNG checksums are verified: a damaged PNG gives
its own pixels or none. The other formats have none, so damage that their decoders conceal, as in
the middle of a JPEG or of a plain TIFF, cannot be seen; nor can rows that the writer of a PNG has
left out. Every error is a `UserError` that names the file, the cause and the fix.

Files may come from anywhere. Pipes and devices are refused unopened, and small files that would
take a decoder much memory or time undecoded: see `image_bounds`. What is left is what MAX_PIXELS
implies.
"""

import hashlib
import io
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    TILELENGTH,
    TILEWIDTH,
    TiffImageFile,
)
from torchvision import tv_tensors

from train_utils.colour_profiles import HAS_LITTLE_CMS, to_srgb
from train_utils.errors import UserError
from train_utils.files import read_regular, written_whole
from train_utils.image_bounds import MAX_PAGES, MAX_PIXELS, TooManyPieces, bounded

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".mpo")
IMAGE_SUFFIXES = (
    *JPEG_SUFFIXES,
    *(".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif"),
)
# Pictures that are not read; whatever else is no image is another file.
UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".jxr"),
    *(".psd", ".psb", ".xcf", ".kra", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm"),
    *(".exr", ".hdr", ".svg", ".svgz", ".dds", ".pcx", ".ico", ".icns", ".qoi", ".wdp", ".dcm"),
    # camera raws
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc"),
    *(".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl"),
    *(".sr2", ".srf", ".srw", ".x3f"),
)
MAX_SIDE = 65_535  # as a JPEG's; Pillow needs far more memory for thin rows than for their pixels

# Formats are recognised by content, not by suffix; naming them keeps Pillow's rarer parsers (and
# the external programs that some of them start) away from untrusted files.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
_LOSSLESS_FORMATS = ("PNG", "BMP", "TIFF", "GIF")
_LOSSY_TIFF_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")
_WHITE, _BLACK = 255, 0
_GREY = 8  # levels by which the colours of what was grey may differ
_BLOCK = 2**18  # pixels that are looked at together
_FEW_LEVELS, _MOST = 16, 0.9  # of a mask: so many grey levels, or so much black and white
_MAX_FRAME_PIXELS = 100 * MAX_PIXELS  # of all frames of a file
_SUBFILE, _OLD_SUBFILE = 254, 255  # tags of TIFF that say what a page is for
_COPY_OR_MASK, _OLD_COPY = 1 | 4, 2
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MAX_TILE = 4096**2  # pixels, in an image that is smaller than its tile of a TIFF
_MAX_RUNS = 2**22  # pixels of a BMP in run-length code, which Pillow decodes in Python
_MAX_PNG = 2**29  # bytes; MAX_PIXELS with alpha have fewer, however badly they compress
_SOFTWARE = "pixtrain"
_COMPRESSION = 1  # zlib's: a third of the default's time, for photographs 5 % larger, maps a third

_REPLACE = "Replace the file by an intact copy, or remove it."
_MAKE_SMALLER = "Scale it down or cut it into tiles."
_SAVE_AS_PNG = "Scale its values and save it as a PNG of 8 or 16 bits."
_SAVE_8_BITS = "Save it with 8 bits."

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


def read_image(path: PathLike, at_least: int | None = None) -> tv_tensors.Image:
    """Read a file as RGB, uint8 [3, H, W], by the rules of this module's table.

    The memory is laid out pixel by pixel (channels last), which resizing is fastest on.

    at_least: decode a JPEG at 1/2, 1/4 or 1/8 of its size, at the smallest of these at which
    neither side is below so many pixels. The decoder scales in the frequency domain and rounds
    sides up, so what lies at the far edges can be up to a pixel off: resized further, the image is
    nearly, not exactly, that of the whole file.
    Raises UserError for a file that cannot be read as asked.
    """
    with within_memory(path):
        return image_tensor(to_rgb(path, decode(path, at_least).image))


def read_colours(path: PathLike) -> tv_tensors.Image:
    """As `read_image`, but without its profile: for colours that are codes."""
    with within_memory(path):
        return image_tensor(to_rgb(path, decode(path).image, managed=False))


def frames_of(path: PathLike) -> Generator[tv_tensors.Image, None, None]:
    """The frames or pages of a file in order, each as `read_image` gives a picture.

    Raises UserError, after the frames before, for one that cannot be read, and for too many.
    """
    with within_memory(path), _opened(path, whole=True, all_pages=True) as image:
        pages, left = _pages(image), _MAX_FRAME_PIXELS
        for number in pages:
            image.seek(number)
            _check_header(path, image)
            left -= image.width * image.height
            if len(pages) > MAX_PAGES or left < 0:
                raise UserError(
                    f"{path}: its {len(pages):,} frames are more than {MAX_PAGES:,}, or have more "
                    f"than {_MAX_FRAME_PIXELS:,} pixels together. Split it."
                )
            yield image_tensor(to_rgb(path, _load(path, image).image))


def count_frames(path: PathLike) -> int:
    """How many frames or pages a file has; 1 if it cannot be opened, as reading it will say.

    What is called a JPEG is not opened: an animation by such a name is refused when it is read.
    """
    if Path(path).suffix.lower() in JPEG_SUFFIXES:
        return 1
    try:
        with _opened(path, all_pages=True) as image:
            return len(_pages(image))
    except UserError:
        return 1


Channel = Literal["alpha", "luminance"]


@dataclass(frozen=True)
class MaskReader:
    """Reads a file as a grey mask, uint8 [1, H, W] in 0…255, by the rules of this module's table.

    channel: where the mask of a file with an alpha channel, or with transparent entries in its
    palette, lies; luminance: over black. None: in alpha, unless all of it is opaque. A file is then
    refused whose visible pixels hold greys that look like a mask, too (of a few levels, or black
    and white but for the edges), or a few colours of a palette with index 0 among them.
    threshold: grey levels from it on are 255, others 0; None: they are taken as they are.
    A call raises UserError for a file that cannot be read as asked.
    """

    channel: Channel | None = None
    threshold: int | None = None

    def __call__(self, path: PathLike) -> tv_tensors.Mask:
        with within_memory(path):
            return tv_tensors.Mask(torch.from_numpy(self.levels(path)[0])[None])

    def levels(self, path: PathLike) -> tuple[np.ndarray, list[str]]:
        """The mask, uint8 [H, W], and which rules made it of the file, of MASK_RULES."""
        grey, lossless, rules = _grey(path, self.channel)
        # Many tools write the truth values 0 and 1. Read as grey levels they are 0 and 1/255: a
        # network would learn, without any error, to answer black. In a lossy file a 1 can be noise.
        if lossless and grey.max() == 1:
            grey, rules = grey.astype(np.uint8) * 255, [*rules, "0 and 1"]
        if grey.dtype == np.uint16:
            grey = _to_8_bits(grey)
        if self.threshold is not None:
            grey = (grey >= self.threshold).astype(np.uint8) * 255
        return grey, rules


MASK_RULES = ("alpha", "opaque alpha", "colours", "coloured palette", "0 and 1")
_READ_MASK = MaskReader()


def read_mask(path: PathLike) -> tv_tensors.Mask:
    """Read a file as a grey mask, uint8 [1, H, W] in 0…255, by the rules of this module's table.

    Raises UserError for a file that cannot be read as asked.
    """
    return _READ_MASK(path)


def read_map(path: PathLike, channel: Channel | None = None) -> tv_tensors.Mask:
    """As `MaskReader`, but 0 and 1 are taken as they are stored: a prediction may be that dark.

    A file without alpha is taken, whatever the channel. Raises UserError for colours, too.
    """
    with within_memory(path):
        grey, _, rules = _grey(path, channel, needs_alpha=False)
        if "colours" in rules or "coloured palette" in rules:
            raise UserError(f"{path}: a map is grey, but this file holds colours. Save the map.")
        grey = _to_8_bits(grey) if grey.dtype == np.uint16 else grey
        return tv_tensors.Mask(torch.from_numpy(grey)[None])


def read_image_and_mask(
    image: PathLike,
    mask: PathLike,
    at_least: int | None = None,
    read_mask: MaskReader = _READ_MASK,
) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """`read_image` and a mask reader's mask of two files.

    If they are of one size, both are views of one memory, uint8 [H, W, 4]: a mask that lies beside
    its image is resized along with it at no further cost.
    """
    with within_memory(image):
        picture = to_rgb(image, decode(image, at_least).image)
        grey = read_mask(mask)
        if picture.size != (grey.shape[2], grey.shape[1]):
            return image_tensor(picture), grey
        # Four bytes per pixel, as in Pillow's own memory: one of each is to spare for the mask.
        pixels = torch.frombuffer(bytearray(picture.tobytes("raw", "RGBX")), dtype=torch.uint8)
        both = pixels.view(*grey.shape[1:], 4).permute(2, 0, 1)
        both[3:] = grey
        return tv_tensors.Image(both[:3]), tv_tensors.Mask(both[3:])


def image_tensor(picture: Image.Image) -> tv_tensors.Image:
    """An RGB picture of Pillow's as uint8 [3, H, W]."""
    return tv_tensors.Image(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def to_rgb(path: PathLike, image: Image.Image, managed: bool = True) -> Image.Image:
    """A decoded image in mode RGB, by the table's rules; managed: by its colour profile, if any."""
    if is_wide(image):
        about = image.info
        image = Image.fromarray(_to_8_bits(_wide_values(path, image, _WHITE)))
        image.info |= {key: about[key] for key in about.keys() & {"icc_profile"}}
    if managed:
        image = in_srgb(path, image)
    if image.has_transparency_data:
        image = _composite(image, _WHITE)
    return image if image.mode == "RGB" else image.convert("RGB")


def in_srgb(path: PathLike, image: Image.Image) -> Image.Image:
    """A decoded image of 8 bits whose colours are sRGB, alpha kept; itself if they were before.

    Raises UserError where Pillow cannot convert.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or image.mode == "1":  # black and white are always the same
        return image
    if not HAS_LITTLE_CMS:
        raise UserError(
            f"{path}: has a colour profile, and this Pillow cannot convert it, as it is built "
            "without LittleCMS. Install Pillow with it (pip install --force-reinstall pillow), or "
            "save the image as sRGB without a profile."
        )
    mode = "L" if image.mode in ("L", "LA", "La") else "CMYK" if image.mode == "CMYK" else "RGB"
    transform = to_srgb(profile, mode)
    if transform is None:
        return image
    if not image.has_transparency_data:
        return transform.apply(image.convert(mode))
    rgba = to_rgba(image)
    converted = transform.apply(rgba.getchannel("R") if mode == "L" else rgba.convert(mode))
    converted.putalpha(rgba.getchannel("A"))
    return converted


def image_size(path: PathLike, at_least: int | None = None) -> tuple[int, int]:
    """The upright (width, height) that `read_image` will give, from the header only.

    Raises UserError where the header already shows that the file cannot be read.
    """
    with _opened(path) as image:
        _scale_down(image, at_least)
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


class Header(NamedTuple):
    """What a file's header says: upright (width, height), Pillow's mode, and what is to be undone.

    turned: by an EXIF orientation. profile: whether it brings a colour profile.
    """

    size: tuple[int, int]
    mode: str
    turned: bool
    profile: bool


def read_header(path: PathLike) -> Header:
    """A file's header; UserError as `image_size` raises it."""
    with _opened(path) as image:
        orientation, size = _orientation(image), image.size
        upright = size[::-1] if orientation >= 5 else size
        return Header(upright, image.mode, orientation != 1, "icc_profile" in image.info)


def is_damaged(path: PathLike) -> bool:
    """Whether a file cannot be read because of what it holds: it is empty, cut, altered, no image.

    Not so where the way to it is at fault (missing, not permitted, too little memory), or where an
    intact file is not of a kind that is taken.
    """
    try:
        decode(path)
    except UserError as error:
        cause = error.__cause__
        elsewhere = isinstance(cause, MemoryError | Image.DecompressionBombError | TooManyPieces)
        return cause is not None and not elsewhere and not getattr(cause, "errno", None)
    return False


def save_image(image: Image.Image, path: PathLike) -> None:
    """Write a PNG (lossless) so that `path` holds either its old content or all of the new.

    Not so after a power failure, which waiting for the disk would guard against: pictures can be
    made again, and the waiting costs more than all the rest. Missing parent folders are made. The
    file says in a text field that it comes from here, with a hash of the rest, so that `saved_here`
    knows it as long as nobody has edited it. Raises UserError if the file system refuses, and
    ValueError if `path` does not end in `.png`.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: images are saved as .png")
    png = io.BytesIO()
    image.save(png, format="PNG", compress_level=_COMPRESSION)
    content = png.getvalue().removesuffix(_PNG_END)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, durable=False) as file:
            file.write(content)
            file.write(_marked_end(content))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). "
            "Make room, or choose an output folder that can be written to."
        ) from error


def saved_here(path: PathLike) -> bool:
    """Whether `save_image` wrote this file, and nobody has edited it; a link is somebody's own.

    Files of the first edition have a mark without a hash.
    """
    try:
        content = read_regular(Path(path), _MAX_PNG)
    except OSError:
        return False
    end = len(_marked_end(b""))
    if content[-end:] == _marked_end(content[:-end]):
        return True
    first_edition = _text_chunk(f"Software\0{_SOFTWARE}")
    return content.endswith(_PNG_END) and first_edition in content.partition(b"IDAT")[0]


def _marked_end(content: bytes) -> bytes:
    """What a PNG of ours ends with, after this content: our mark, and the chunk that ends it."""
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return _text_chunk(f"Software\0{_SOFTWARE} {digest}") + _PNG_END


def _text_chunk(text: str) -> bytes:
    chunk = io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"tEXt", text.encode())
    return chunk.getvalue()


# --- opening and decoding ------------------------------------------------------------------------


def require_file(path: PathLike) -> os.stat_result:
    """What the file system says of a file. Raises UserError if there is none, or no regular one."""
    try:
        found = Path(path).stat()
    except OSError as error:
        raise _explained(path, error) from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: cannot be read (it is a folder). Check the path.")
    if not stat.S_ISREG(found.st_mode):
        # A pipe, a socket or a device might keep its reader waiting for ever.
        raise UserError(f"{path}: a pipe or a device. Save its content to a file.")
    return found


@contextmanager
def _opened(path: PathLike, whole: bool = False, all_pages: bool = False) -> Iterator[Image.Image]:
    """Open a file and check its header; whatever Pillow raises within the block is a UserError.

    whole: check also what tells only from all of a file how long its decoding takes. all_pages:
    take a file with several pages or frames; else it is refused.
    """
    try:
        size = require_file(path).st_size
        with Path(path).open("rb") as file:
            checked = bounded(path, file, size, whole)
            with checked, Image.open(checked, formats=_FORMATS) as image:
                _check_header(path, image)
                if not all_pages:
                    _go_to_the_only_page(path, image)
                yield image
    except UserError:
        raise
    except Exception as error:  # on damaged files Pillow's parsers raise nearly every type there is
        raise _explained(path, error) from error


def _go_to_the_only_page(path: PathLike, image: Image.Image) -> None:
    """Raise UserError for an image with several pages or frames."""
    pages = _pages(image)
    if len(pages) > 1:
        what = "pages" if isinstance(image, TiffImageFile) else "frames"
        raise UserError(
            f"{path}: has {len(pages):,} {what}. Save each as a file of its own, or only the one "
            "that is meant."
        )
    if image.tell() != pages[0]:
        image.seek(pages[0])
        _check_header(path, image)


def _pages(image: Image.Image) -> Sequence[int]:
    """The numbers of the pages or frames that an open file has, at least one.

    The reduced copies and transparency masks in a TIFF are none, nor is the still of an animated
    PNG, nor what else lies in the JPEG of a phone (previews, depth).
    """
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return [0]
    count: int = image.n_frames  # type: ignore[attr-defined]
    if not isinstance(image, TiffImageFile):
        return range(1 if getattr(image, "default_image", False) else 0, count)
    pages = []
    for number in range(count):
        image.seek(number)
        kind = image.tag_v2.get(_SUBFILE, 0)
        is_copy = isinstance(kind, int) and kind & _COPY_OR_MASK
        if not is_copy and image.tag_v2.get(_OLD_SUBFILE) != _OLD_COPY:
            pages.append(number)
    image.seek(0)
    return pages or [0]


class Decoded(NamedTuple):
    """An image's only page, loaded and upright, in the file's own mode.

    raw_mode: how the pixels lie in the file, in Pillow's words ("RGB;16B"); "" if it does not say.
    """

    image: Image.Image
    lossless: bool
    raw_mode: str


def decode(path: PathLike, at_least: int | None = None) -> Decoded:
    """Read a file's pixels; at_least: see `read_image`. Raises UserError if it cannot be read."""
    with _opened(path, whole=True) as image:
        _scale_down(image, at_least)
        return _load(path, image)


@contextmanager
def within_memory(path: PathLike) -> Iterator[None]:
    """UserError where the memory does not suffice for what a block makes of a file."""
    try:
        yield
    except MemoryError as error:
        raise _explained(path, error) from error


def _scale_down(image: Image.Image, at_least: int | None) -> None:
    """Have a JPEG that is not loaded yet decoded at a reduced size, see `read_image`."""
    if at_least and isinstance(image, JpegImageFile):
        image.draft(None, (at_least, at_least))


def _load(path: PathLike, image: Image.Image) -> Decoded:
    lossless = (
        image.format in _LOSSLESS_FORMATS
        and image.info.get("compression") not in _LOSSY_TIFF_COMPRESSIONS
    )
    # To be asked before the pixels are loaded.
    method, raw_mode = _TRANSPOSE.get(_orientation(image)), _raw_mode(image)
    if "transparency" in image.info and (step := grey_step(raw_mode)) > 1 and not image.tell():
        image.info["transparency"] *= step  # Pillow scales the pixels, but not their key
    image.load()
    if not is_wide(image) and ";16" in raw_mode and not _has_colour(image):
        raise UserError(
            f"{path}: 16-bit colours of which none exceeds 255: all would be read as 0. "
            f"{_SAVE_8_BITS}"
        )
    return Decoded(image if method is None else image.transpose(method), lossless, raw_mode)


def _has_colour(image: Image.Image) -> bool:
    colours = [image.getchannel(band) for band in image.getbands() if band != "A"]
    return any(colour.getbbox() for colour in colours)


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", [])
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def grey_step(raw_mode: str) -> int:
    """What Pillow multiplies the values of a grey file of 2 or 4 bits by, to fill 8 bits."""
    mode, _, packing = raw_mode.partition(";")
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


def _check_header(path: PathLike, image: Image.Image) -> None:
    width, height = image.size
    problem = None
    if width * height > MAX_PIXELS:
        problem = f"{width}×{height} is more than {MAX_PIXELS:,} pixels. {_MAKE_SMALLER}"
    elif max(width, height) > MAX_SIDE:
        problem = f"{width}×{height} has a side of more than {MAX_SIDE:,} pixels. {_MAKE_SMALLER}"
    elif _tile_pixels(image) > max(width * height, _MAX_TILE):
        tile = f"{_tile_pixels(image):,}"
        problem = f"tiles of {tile} pixels, more than the image has. Save it with smaller ones."
    elif width * height > _MAX_RUNS and _is_run_length_bmp(image):
        problem = (
            f"more than {_MAX_RUNS:,} pixels in run-length code. Save it as a plain BMP or a PNG."
        )
    elif image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        problem = f"32-bit and float pixels have no fixed range. {_SAVE_AS_PNG}"
    elif isinstance(image, TiffImageFile) and not is_wide(image):
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
        raise UserError(f"{path}: {problem}")


def _tile_pixels(image: Image.Image) -> int:
    """The pixels of a tile of a TIFF, which its decoder needs memory for; 0 if it has none."""
    if not isinstance(image, TiffImageFile):
        return 0
    width, height = image.tag_v2.get(TILEWIDTH), image.tag_v2.get(TILELENGTH)
    return width * height if isinstance(width, int) and isinstance(height, int) else 0


def _is_run_length_bmp(image: Image.Image) -> bool:
    tiles = getattr(image, "tile", [])
    return image.format == "BMP" and bool(tiles) and tiles[0][0] == "bmp_rle"


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
    elif isinstance(error, TooManyPieces):
        problem = f"{error}. Save it anew."
    elif not isinstance(error, UnidentifiedImageError):
        problem = f"damaged or truncated ({error}). {_REPLACE}"
    elif Path(path).suffix.lower() in UNREAD_SUFFIXES:
        problem = "pictures of this format are not read. Convert it to PNG or JPEG."
    elif Path(path).stat().st_size == 0:
        problem = f"the file is empty. {_REPLACE}"
    else:
        problem = (
            f"not an image that can be read ({', '.join(_FORMATS)}). Replace it by an intact copy, "
            "or, if it is of another format, by a PNG or JPEG of it."
        )
    return UserError(f"{path}: {problem}")


# --- pixel formats -------------------------------------------------------------------------------


def is_wide(image: Image.Image) -> bool:
    """Whether a decoded image is grey of 16 bits."""
    # Mode "I" is how older Pillow opens a 16-bit PNG; other files of that mode have been refused.
    return image.mode.startswith("I")


def _wide_values(path: PathLike, image: Image.Image, backdrop: int) -> np.ndarray:
    """The stored values of a 16-bit grey image, uint16 [H, W], a transparent value replaced.

    Raises UserError for values of 8 bits.
    """
    values = np.array(image).astype(np.uint16)
    if 1 < values.max() <= 255:
        raise UserError(
            f"{path}: 16-bit pixels of which none exceeds {values.max()} of 65535: it "
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
    canvas.alpha_composite(to_rgba(image))
    return canvas.convert("RGB")


def to_rgba(image: Image.Image) -> Image.Image:
    """A decoded image of 8 bits in mode RGBA, transparent colours and palettes as alpha."""
    if image.mode == "La":  # premultiplied grey, which Pillow converts to nothing else
        image = image.convert("LA")
    return image.convert("RGBA")


def _grey(
    path: PathLike, channel: Channel | None, needs_alpha: bool = True
) -> tuple[np.ndarray, bool, list[str]]:
    """The grey levels of a mask, uint8 or uint16 [H, W]; whether lossless; by which MASK_RULES."""
    image, lossless, _ = decode(path)
    palette = image.mode in ("P", "PA")
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (
        palette and image.has_transparency_data
    )
    if channel == "alpha" and needs_alpha and not has_alpha:
        raise UserError(
            f"{path}: has no alpha channel, in which data.mask_channel=alpha looks for the mask. "
            "Set it to null if the masks are grey."
        )
    if is_wide(image):
        return _wide_values(path, image, _BLACK), lossless, []
    rules = []
    if has_alpha and channel != "luminance":
        rgba = to_rgba(image)
        alpha = np.array(rgba.getchannel("A"))
        if channel == "alpha" or alpha.min() < 255:
            if channel is None and (
                _also_look_like_a_mask(rgba) or (palette and _also_names_classes(image, alpha))
            ):
                raise UserError(
                    f"{path}: its alpha varies, and its colours look like a mask as well. Say "
                    "which of them is the mask: --set data.mask_channel=alpha, or luminance."
                )
            return alpha, lossless, [] if channel else ["alpha"]
        rules = ["opaque alpha"]
    if palette:
        grey, colours = _palette_greys(image)
        return grey, lossless, [*rules, "coloured palette"] if colours else rules
    if image.has_transparency_data:
        image = _composite(image, _BLACK)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")  # first: from LAB there is no direct way to luminance
        if any(_spread(pixels).max() > _GREY for pixels in _blocks(image)):
            rules = [*rules, "colours"]
    grey = np.array(image if image.mode == "L" else image.convert("L"))
    return grey, lossless, rules


def _also_look_like_a_mask(rgba: Image.Image) -> bool:
    """Whether the colours of a file whose alpha is not opaque may be its mask, too.

    They are grey and vary where they are visible, but not along with alpha, and have few levels or
    are nearly all black or white. Below an alpha that is the same everywhere, all of them count.
    """
    low, high = rgba.getchannel("A").getextrema()
    counts, follow_alpha = np.zeros(256, np.int64), True
    for pixels in _blocks(rgba):
        seen = pixels if low == high else pixels[pixels[:, 3] > 0]
        if len(seen) and _spread(seen).max() > _GREY:
            return False
        counts += np.bincount(seen[:, 1], minlength=256)
        follow_alpha = follow_alpha and bool((seen[:, 1] == seen[:, 3]).all())
    levels = np.flatnonzero(counts)
    if follow_alpha or levels[-1] - levels[0] <= _GREY:
        return False
    ends = counts[: _GREY + 1].sum() + counts[-_GREY - 1 :].sum()
    return bool(len(levels) <= _FEW_LEVELS or ends >= _MOST * counts.sum())


def _also_names_classes(image: Image.Image, alpha: np.ndarray) -> bool:
    """Whether a palette of few colours is a mask by the table's rule, too, and another than alpha.

    So it is where index 0, the background, is visible, and what is not so is clear altogether.
    """
    greys, colours = _palette_greys(image)
    clear = ((alpha == 0) | (alpha == 255)).all()
    return 0 < colours <= _FEW_LEVELS and bool(clear and (greys != alpha).any())


def _blocks(image: Image.Image) -> Iterator[np.ndarray]:
    """The pixels [N, C] of an image by some rows at a time, so that they take little memory."""
    rows = max(1, _BLOCK // image.width)
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield np.array(part).reshape(-1, len(image.getbands()))


def _spread(colours: np.ndarray) -> np.ndarray:
    """How far the levels of red, green and blue lie apart, of [N, 3 or 4] uint8."""
    red, green, blue = colours[:, 0], colours[:, 1], colours[:, 2]  # numpy is slow along so few
    highest = np.maximum(np.maximum(red, green), blue)
    return highest - np.minimum(np.minimum(red, green), blue)


def _palette_greys(image: Image.Image) -> tuple[np.ndarray, int]:
    """A palette mask by the table's rule, over black, uint8 [H, W]; how many colours, 0 if grey."""
    image.apply_transparency()  # moves a PNG's or GIF's transparent entries into the palette
    entries = np.array(image.getpalette("RGBA") or [], dtype=np.uint8).reshape(-1, 4)
    palette = np.zeros((256, 4))
    palette[: len(entries)] = entries
    pixels = np.array(image).reshape(image.height, image.width, -1)
    index = pixels[..., 0]

    colours = np.rint(palette[:, :3] * palette[:, 3:] / 255)
    used = np.bincount(index.ravel(), minlength=256) > 0
    coloured = (colours[used] != colours[used, :1]).any()
    if not coloured:
        levels = colours[:, 0]
    else:  # the colours of class labels: what is not the background class is the object
        levels = palette[:, 3].copy()
        levels[0] = 0
    greys = levels[index]
    if image.mode == "PA":
        greys = np.rint(greys * pixels[..., 1] / 255)
    return greys.astype(np.uint8), int(used.sum()) if coloured else 0
