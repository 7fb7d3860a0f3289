"""What is unusual about images: their sizes, and pictures of nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from train_utils.check.findings import Report
from train_utils.check.look import Look
from train_utils.image_io import Header

_NARROW = 4.0  # longer side / shorter side
_LARGE = 4.0  # times the size that the network is trained on: detail is lost
_HUGE = 20_000_000  # pixels, which take a decoder a quarter of a second
_FLAT = 0.01  # spread of the brightness


def find_sizes(report: Report, image_size: int) -> None:
    """What headers show: images that are narrow, tiny or huge for a network of this size."""
    width, height = report.statistics["width"], report.statistics["height"]
    longer, shorter = np.fmax(width, height), np.fmin(width, height)
    with np.errstate(invalid="ignore"):
        narrow = np.flatnonzero(longer > _NARROW * shorter)
        tiny = np.flatnonzero(longer < image_size / _LARGE)
        huge = np.flatnonzero(width * height > _HUGE)
    report.add(
        "narrow",
        "warning",
        f"images more than {_NARROW:g} times as long as they are wide, which a square distorts",
        narrow.tolist(),
        "Cut them, or leave them out.",
    )
    report.add(
        "tiny image",
        "warning",
        f"images with less than a quarter of the {image_size} pixels that they are enlarged to",
        tiny.tolist(),
        "Leave them out, or train at a smaller data.image_size.",
    )
    report.add(
        "huge image",
        "note",
        f"images of more than {_HUGE // 1_000_000} million pixels, which take long to read",
        huge.tolist(),
        "Scale them down once, or decode JPEG images at a reduced size: --set data.draft=true.",
    )
    typical = float(np.nanmedian(longer)) if np.isfinite(longer).any() else 0.0
    large = np.flatnonzero(longer >= typical)
    if typical > _LARGE * image_size:
        report.add(
            "image size",
            "note",
            f"images of {typical:.0f} pixels or more, trained on at {image_size}, which loses what "
            "is small",
            large.tolist(),
            "Set data.image_size to 320 or more, unless the objects are large.",
        )


def find_kinds(report: Report, headers: Sequence[Header | None]) -> None:
    """What else headers show: several modes, orientations and profiles, all of which are undone."""
    modes = Counter(header.mode for header in headers if header)
    usual = modes.most_common(1)[0][0] if modes else ""
    counts = ", ".join(f"{mode} {count:,}" for mode, count in modes.most_common())
    texts = (
        ("modes", lambda h: h.mode != usual, f"images of other kinds than most: {counts}"),
        ("orientation", lambda h: h.turned, "images that an EXIF tag turns; they are read upright"),
        ("profile", lambda h: h.profile, "images with a colour profile; they are read as sRGB"),
    )
    for kind, applies, text in texts:
        report.add(kind, "note", text, [i for i, h in enumerate(headers) if h and applies(h)])


def find(report: Report, looks: Mapping[int, Look]) -> None:
    """What pixels show: images of one colour."""
    flat = [index for index, look in looks.items() if look.numbers["contrast"] < _FLAT]
    report.add(
        "blank image",
        "warning",
        "images of a single colour, or nearly so",
        flat,
        "Remove them, or replace them by the right ones.",
    )
