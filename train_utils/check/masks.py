"""What is unusual about masks: nothing in them, all of them, inside out, of another scale."""

from collections.abc import Mapping

import numpy as np

from train_utils.check.findings import Report, Severity
from train_utils.check.look import Look
from train_utils.task import BaseTask

_INVERT = {
    "masks": "Invert them, or train two classes, whose data.mask_object says which is the object.",
    "classes": "Say which side the object is.",
    "mattes": "Invert them.",
}
_BORDER, _MOST = 0.9, 0.5  # of the frame and of all pixels: what a mask inside out has as object
_USUAL_BORDER = 0.5  # of the frame, in a set whose masks are not inside out
_OFF_BORDER = 0.1  # of the frame, in a set of which a part is inside out
_RARE = 0.1  # share of the masks: what so few have is more often a mistake than meant
_TINY = 16  # pixels of an object at the network's size
_SOFT = 0.02  # share of the pixels with levels between object and background
_SAME = 3.0  # grey levels by which a mask differs from its image, if it is a copy of it


def find(report: Report, looks: Mapping[int, Look], task: BaseTask) -> None:
    """What the pixels of targets show."""
    _copies_of_images(report, looks)
    if report.targets == "pictures" or not looks:
        return
    if report.targets == "classes":
        _count_classes(report, looks, task)
    indices = np.array(list(looks))
    share, border, soft = (
        np.array([look.numbers[name] for look in looks.values()])
        for name in ("object share", "border share", "soft share")
    )
    binary = report.targets != "classes" or len(task.legend) == 2
    if binary:
        _find_empty_and_full(report, indices, share)
        _find_inside_out(report, indices, share, border)
        _find_tiny(report, indices, share, task.cfg.data.image_size)
    if report.targets == "masks":
        report.add(
            "grey levels",
            "note",
            "masks with levels between object and background, as JPEG leaves them, which are "
            "trained as they are",
            indices[soft > _SOFT].tolist(),
            "Save masks as PNG if they are to be exact.",
        )


def _find_empty_and_full(report: Report, indices: np.ndarray, share: np.ndarray) -> None:
    empty, full = indices[share == 0], indices[share == 1]
    few = len(empty) <= _RARE * len(indices)
    train = [index for index in indices if report.pairs[index].split == "train"]
    if train and set(train) <= set(empty):
        text = "training masks, all that were looked at, hold no object"
        report.add("no object", "error", text, train, "Check that these are the masks.")
    else:
        report.add(
            "empty mask",
            "warning" if few else "note",
            "masks without an object" + ("" if few else f", {len(empty) / len(indices):.0%}"),
            empty.tolist(),
            "Check that their images show none.",
        )
    report.add(
        "full mask",
        "warning",
        "masks that are object everywhere",
        full.tolist(),
        "Check that these are the masks.",
    )


def _find_inside_out(
    report: Report, indices: np.ndarray, share: np.ndarray, border: np.ndarray
) -> None:
    inside_out = (border >= _BORDER) & (share > _MOST) & (share < 1)
    partly = (share > 0) & (share < 1)
    if not partly.any():
        return
    if np.mean(inside_out[partly]) > _MOST:
        mends = report.targets == "classes"
        report.add(
            "inside out",
            "error",
            "masks have their object along most of the frame: what is meant as background is "
            "trained as object",
            indices[inside_out].tolist(),
            _INVERT[report.targets],
            settings=["data.mask_values=threshold", "data.mask_object=dark"] if mends else (),
        )
        return
    # Few may lie among masks of any kind; many are mistakes if all others keep off the frame.
    most = _USUAL_BORDER if np.mean(inside_out[partly]) < _RARE else _OFF_BORDER
    if np.median(border[partly & ~inside_out]) < most:
        report.add(
            "inside out",
            "warning",
            "masks have their object along most of the frame, as others of the set do not",
            indices[inside_out].tolist(),
            "Check whether they are inverted.",
        )


def _find_tiny(report: Report, indices: np.ndarray, share: np.ndarray, image_size: int) -> None:
    tiny = (share > 0) & (share * image_size**2 < _TINY)
    report.add(
        "tiny object",
        "warning",
        f"masks hold less than {_TINY} pixels of object at {image_size} × {image_size}",
        indices[tiny].tolist(),
        "Train at a larger data.image_size, or remove specks.",
    )


def _copies_of_images(report: Report, looks: Mapping[int, Look]) -> None:
    same = []
    for index, look in looks.items():
        difference = np.abs(look.image.astype(int) - look.target).mean()
        if difference <= _SAME and look.numbers["contrast"] > 0.05:
            same.append(index)
    all_of_them = len(same) > len(looks) / 2
    report.add(
        "mask is image",
        "error" if all_of_them else "warning",
        "masks are the image itself",
        same,
        "Put the masks in their place.",
    )


def _count_classes(report: Report, looks: Mapping[int, Look], task: BaseTask) -> None:
    """Classes by pixels and images, and those that a split lacks."""
    names = list(task.legend)
    counts = np.stack([look.histogram[: len(names)] for look in looks.values()])
    pixels = counts.sum(0)
    files = (counts > 0).sum(0)
    total = max(int(pixels.sum()), 1)
    report.classes = {
        name: (float(pixels[number] / total), int(files[number]))
        for number, name in enumerate(names)
    }
    train = np.array([report.pairs[index].split == "train" for index in looks])
    seen = [(counts[which] > 0).any(0) for which in (train, ~train)]
    texts: tuple[tuple[np.ndarray, Severity, str], ...] = (
        (~seen[0] & seen[1], "warning", "occur in validation only, and so are not to be learned"),
        (~seen[0] & ~seen[1], "note", "occur in no mask that was looked at"),
        (seen[0] & ~seen[1], "note", "occur in no validation mask that was looked at"),
    )
    for missing, severity, text in texts:
        report.add_names(
            "missing class",
            severity,
            f"classes {text}",
            [name for name, is_missing in zip(names, missing, strict=True) if is_missing],
        )
