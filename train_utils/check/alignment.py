"""Whether masks lie where the objects of their images do: edges of one against edges of the other.

The outline of an object is an edge of the photograph as well. So the two maps of edges correlate
at no displacement, and hardly at any other one, nor mirrored, nor with another image's mask.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from train_utils.check.duplicates import SYMMETRIES, fine, symmetric
from train_utils.check.findings import Report, Severity, Targets
from train_utils.check.look import Look

_RADIUS = 4  # of the neighbourhood above whose mean an edge stands out
_AWAY = 3  # displacements closer than this belong to the same peak


def image_edges(pictures: np.ndarray) -> np.ndarray:
    """Edges of small pictures, uint8 [N, S, S], above those around them; norm 1."""
    return _outstanding(_gradient(pictures))


def target_edges(pictures: np.ndarray, targets: Targets) -> np.ndarray:
    """Edges of small targets; of classes, whose numbers have no order, where two meet."""
    if targets != "classes":
        return image_edges(pictures)
    borders = np.zeros(pictures.shape, np.float32)
    borders[:, 1:] += pictures[:, 1:] != pictures[:, :-1]
    borders[:, :, 1:] += pictures[:, :, 1:] != pictures[:, :, :-1]
    return _outstanding(np.minimum(borders, 1))


def _gradient(pictures: np.ndarray) -> np.ndarray:
    """The root of the gradient's length, so that a few hard edges do not outweigh all others."""
    values = pictures.astype(np.float32)
    squared = np.zeros_like(values)
    squared[:, :, 1:-1] += (values[:, :, 2:] - values[:, :, :-2]) ** 2
    squared[:, 1:-1] += (values[:, 2:] - values[:, :-2]) ** 2
    return squared**0.25


def _outstanding(edges: np.ndarray) -> np.ndarray:
    raised = fine(edges, _RADIUS).astype(np.float32)
    for border in (raised[:, :2], raised[:, -2:], raised[:, :, :2], raised[:, :, -2:]):
        border[...] = 0  # the frame of a picture is no edge of what it shows
    norms = np.linalg.norm(raised, axis=(1, 2), keepdims=True)
    return raised / np.maximum(norms, 1e-6)


def displaced(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The correlation of two maps of edges [N, S, S] at every displacement (dy, dx) of the target.

    [N, S, S], displacements counted around: −1 stands last.
    """
    product = np.fft.rfft2(images) * np.conj(np.fft.rfft2(targets))
    return np.fft.irfft2(product, s=images.shape[1:])


def scores(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """How far each pair's correlation at no displacement stands out of those at all others, in
    standard deviations; 0 for maps without an edge."""
    maps = displaced(images, targets)
    return maps[:, 0, 0] / np.maximum(maps.std((1, 2)), 1e-9)


# --- findings ------------------------------------------------------------------------------------

_FEWEST = 5  # pairs with edges from which a set is judged
_MOST = 500  # pairs of a set that are looked at, or compared with each other
_CLEAR = 8.0  # standard deviations by which the mean of a set stands out, if there is anything
_BETTER = 1.5  # times as high: another place fits a set better than its own
# Measured on the 11,639 pairs of DUTS that train: one has a mask that fits mirrored by more than
# 6.5 and one that fits shifted by more than 9, and both are wrong; of masks that were mirrored or
# turned on purpose, 55 to 70 % are found, of those shifted by 5 to 20 % of the side 44 to 49 %.
_MISFIT = 2.0  # score of a mask that does not seem to belong to its image
_FLIPPED, _SHIFTED, _OTHER = 6.5, 9.0, 7.0  # scores of masks that fit otherwise
_MIXED, _MIXED_SHARE = 5.0, 0.2  # the same for masks of a whole set; 3 % of DUTS have such a score
_BLOCK = 512  # pairs whose maps of edges are held at a time
_FARTHEST = 16  # displacement


def misplaced(report: Report, looks: Mapping[int, Look]) -> None:
    """Findings about masks that do not lie where their images have edges."""
    what = "pictures B" if report.targets == "pictures" else "masks"
    for split, name in (("train", "training"), ("val", "validation")):
        edged = [
            index
            for index, look in looks.items()
            if report.pairs[index].split == split and (look.target != look.target[0, 0]).any()
        ]
        if len(edged) < _FEWEST:
            continue
        some = edged[:_MOST]
        if found := _whole_set(*_edges(looks, some, report.targets), some):
            text, severity = found
            fix = "Make them anew from their source."
            report.add("misplaced masks", severity, f"{name} {what} {text}", edged, fix)
        elif report.targets != "pictures":
            _single_masks(report, looks, edged)


def _edges(
    looks: Mapping[int, Look], indices: Sequence[int], targets: Targets
) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([looks[index].image for index in indices])
    masks = np.stack([looks[index].target for index in indices])
    return image_edges(images), target_edges(masks, targets)


def _whole_set(
    images: np.ndarray, targets: np.ndarray, indices: Sequence[int]
) -> tuple[str, Severity] | None:
    """What is wrong with the masks of a set taken together; None where they fit."""
    fits = _fitting_others(images, targets, _MIXED)
    if len(fits) > _MIXED_SHARE * len(images):
        offs = Counter(indices[j] - indices[i] for i, j in fits)
        off, count = offs.most_common(1)[0]
        if count >= max(_FEWEST, len(fits) / 2):
            where = f"{abs(off)} {'before' if off > 0 else 'after'} theirs"
            return f"belong to the images {where} in the list", "error"
        return "are mixed up: many fit the image of another", "error"
    means = {name: displaced(images, symmetric(targets, name)).mean(0) for name in SYMMETRIES}
    own = means["same"]
    here = max(own[dy, dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    spread = _spread(own)
    name = max(means, key=lambda each: means[each].max())
    dy, dx = np.unravel_index(means[name].argmax(), own.shape)
    dy, dx = (int(d) - len(own) * (d > len(own) // 2) for d in (dy, dx))
    best = means[name].max()
    if here > _CLEAR * spread and best < _BETTER * here:
        return None
    percent = 100 / len(own)
    if best > _CLEAR * _spread(means[name]) and best > _BETTER * here:
        if name != "same":
            return f"fit their images only {name}", "error"
        return (
            f"lie {abs(dx) * percent:.0f} % of the width and {abs(dy) * percent:.0f} % of the "
            "height beside the edges of their images",
            "error",
        )
    if here < _CLEAR * spread / 2:
        return "follow no edges of their images: mixed up, or drawn very loosely", "warning"
    return None


def _spread(mean: np.ndarray) -> float:
    """The standard deviation of a map of correlations away from displacement 0."""
    away = np.roll(mean, (_AWAY, _AWAY), (0, 1))[2 * _AWAY + 1 :, 2 * _AWAY + 1 :]
    return float(away.std())


def _fitting_others(images: np.ndarray, targets: np.ndarray, least: float) -> list[tuple[int, int]]:
    """(i, j), i ≠ j: of all masks that of j fits image i best, and no image better than that one.

    least: the score that it must have. It also fits clearly better than i's own: of two frames of a
    film, each has a mask that fits both.
    """
    spread = displaced(images, targets).std((1, 2))
    matrix = np.tensordot(images, targets, ((1, 2), (1, 2))) / np.maximum(spread, 1e-9)[:, None]
    best = [(i, int(j)) for i, j in enumerate(matrix.argmax(1)) if i != j]
    return [
        (i, j)
        for i, j in best
        if matrix[i, j] >= max(least, _BETTER * matrix[i, i]) and matrix[:, j].argmax() == i
    ]


def _single_masks(report: Report, looks: Mapping[int, Look], indices: Sequence[int]) -> None:
    """Findings about single masks that fit their image better otherwise."""
    blocks = [indices[start : start + _BLOCK] for start in range(0, len(indices), _BLOCK)]
    own = np.concatenate([scores(*_edges(looks, block, report.targets)) for block in blocks])
    numbers = [indices[place] for place in np.argsort(own)[:_MOST] if own[place] <= _MISFIT]
    if not numbers:
        return
    images, targets = _edges(looks, numbers, report.targets)
    flipped = np.stack(
        [_near_zero(images, symmetric(targets, name)) for name in SYMMETRIES if name != "same"]
    ).max(0)
    shifted = _shifted(images, targets)
    others = set(_fitting_others(images, targets, _OTHER))
    exchanged = [i for i, j in sorted(others) if (j, i) in others]
    for kind, places, text in (
        ("mirrored mask", np.flatnonzero(flipped >= _FLIPPED), "mirrored or turned"),
        ("shifted mask", np.flatnonzero(shifted >= _SHIFTED), "shifted"),
        ("exchanged mask", exchanged, "on each other's image"),
    ):
        report.add(
            kind,
            "warning",
            f"masks do not fit the edges of their images, but would do so {text}",
            [numbers[place] for place in places],
            "Look at them on the page, and replace those that are wrong.",
        )


def _near_zero(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    maps = displaced(images, targets)
    near = np.roll(maps, (1, 1), (1, 2))[:, :3, :3].max((1, 2))
    return near / np.maximum(maps.std((1, 2)), 1e-9)


def _shifted(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The best score at a displacement of some cells; one by a single cell must be clearer."""
    maps = displaced(images, targets)
    maps = maps / np.maximum(maps.std((1, 2)), 1e-9)[:, None, None]
    near = np.roll(maps, (_FARTHEST, _FARTHEST), (1, 2))[
        :, : 2 * _FARTHEST + 1, : 2 * _FARTHEST + 1
    ]
    near = near.copy()
    middle = slice(_FARTHEST - 1, _FARTHEST + 2)
    near[:, middle, middle] -= 2
    return near.max((1, 2))
