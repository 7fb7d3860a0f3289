"""Colour profiles (ICC) of photographs: how pixels of another colour space become sRGB ones."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, features

MAX_PROFILE = 2**22  # bytes; printers' have up to 3 million
_SAME = 2  # of 255 levels, by which descriptions of one space differ
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # of pixels → of a profile for them
_CLASSES = "scnr", "mntr", "prtr", "spac"  # of profiles that describe what images hold

HAS_LITTLE_CMS = features.check("littlecms2")
VERSION = f"littlecms {features.version('littlecms2') if HAS_LITTLE_CMS else None}"


@lru_cache(8)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts pixels of a mode (L, RGB or CMYK) to sRGB, relative colorimetric.

    None where nothing is to be done: for a profile under which no colour moves by more than _SAME
    levels, as sRGB's own, and for one that is broken, too large or of other pixels. Several threads
    may use the result at once.
    """
    if len(profile) > MAX_PROFILE:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        about = source.profile
        if about.xcolor_space.strip() != _SPACES[mode] or about.device_class not in _CLASSES:
            return None
        transform = ImageCms.ImageCmsTransform(
            source,
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.NOCACHE,  # which threads would share
        )
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether all greys, and for RGB a grid of colours, stay nearly as they are."""
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    grid = np.stack(np.meshgrid(*[greys[::17, 0]] * 3), -1).reshape(-1, 3)
    colours = (greys if mode == "L" else np.concatenate([greys, grid]))[None]
    before = Image.fromarray(colours).convert(mode)
    after = np.array(transform.apply(before)).astype(np.int16)
    return int(abs(after - colours).max()) <= _SAME
