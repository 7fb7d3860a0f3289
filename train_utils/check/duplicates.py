"""Pictures that come more than once, also resized, recompressed, mirrored or turned.

Two small pictures are compared in three steps, each on what the last one left: a signature that is
the same for all eight symmetries of a square; their correlation under each symmetry; and that of
their fine structure, which a sunset shares with no other sunset.
"""

import itertools
from collections.abc import Iterator

import numpy as np

# name → (turned by so many right angles, then mirrored left to right?)
SYMMETRIES = {
    "same": (0, False),
    "mirrored": (0, True),
    "turned by 180°": (2, False),
    "upside down": (2, True),
    "turned by 90°": (1, False),
    "turned by 270°": (3, False),
    "transposed": (1, True),
    "transposed across": (3, True),
}
_COEFFICIENTS = 8  # of the cosine transform, a side
_COARSE_SIDE = 16
_FLAT = 2.0  # grey levels of spread: below it a picture has no structure to be recognised by
# Measured on 10,486 photographs of DUTS and copies of 300 of them: pictures that are not the same
# have a fine correlation of 0.45 at most, copies saved at JPEG quality 10 or at half their size one
# of 0.92 at least, and those cut by 2 % one of 0.7 in the middle.
_NEAR = 0.1  # squared distance of signatures
_COARSE = 0.85  # correlation of small pictures …
SIMILAR, SAME = 0.55, 0.85  # … and of their fine structure: of neighbouring frames, and of copies
_FRAME = 6  # pixels along the border that do not count: many pictures have a frame
_BLOCK = 2048  # pictures compared at a time
# What all pictures of a set show, such as the outline of a head in its scanner, makes none of them
# a copy. Of 60 drawn slices that were all different, every two had 0.86 in the middle with it, and
# 0.26 at most without.
_IN_COMMON_OF = 500  # pictures from which it is taken
_REST = 0.2  # of a picture's fine structure: with less left it is compared as it is


def symmetric(pictures: np.ndarray, name: str) -> np.ndarray:
    """Pictures [..., S, S] under one of SYMMETRIES."""
    turns, mirrored = SYMMETRIES[name]
    turned = np.rot90(pictures, turns, axes=(-2, -1))
    return turned[..., ::-1] if mirrored else turned


def combined(first: str, then: str) -> str:
    """The symmetry that two of them make, one after the other."""
    corners = np.arange(4).reshape(2, 2)
    made = symmetric(symmetric(corners, first), then)
    return next(name for name in SYMMETRIES if (symmetric(corners, name) == made).all())


def inverse(name: str) -> str:
    """The symmetry that undoes one."""
    return next(other for other in SYMMETRIES if combined(name, other) == "same")


def alike_pairs(pictures: np.ndarray) -> list[tuple[int, int, str, float]]:
    """(i, j, symmetry, fine correlation) of pictures that are alike: the symmetry turns i into j.

    The correlation is SIMILAR at least. pictures: uint8 [N, S, S]; i < j. Flat ones are like no
    other.
    """
    spread = np.array([picture.std() for picture in pictures])  # of all at once: in 8 bytes each
    structured = np.flatnonzero(spread >= _FLAT)
    if not len(structured):
        return []
    blocks = np.split(structured, range(_BLOCK, len(structured), _BLOCK))
    prepared = [_signatures(pictures[block]) for block in blocks]
    signatures, coarse = (np.concatenate(parts) for parts in zip(*prepared, strict=True))
    common = _in_common(pictures[structured])
    names, found = list(SYMMETRIES), []
    for first, second in _close(signatures):
        which, scores = _best_symmetries(coarse[first], coarse[second])
        for n in np.flatnonzero(scores >= _COARSE):
            i, j, name = structured[first[n]], structured[second[n]], names[which[n]]
            whole = fine(pictures[[i, j]].astype(np.float32))
            likeness = _likeness(whole, name)
            if min(likeness, _likeness(_peculiar(whole, common), name)) >= SIMILAR:
                found.append((int(i), int(j), name, likeness))
    return found


def _signatures(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [N, 64] that no symmetry changes, and no further apart than pictures of norm 1 are.

    Mirroring changes signs of a cosine transform, transposing transposes it: so magnitudes, and of
    those of (i, j) and (j, i) the sum and the difference. Neither increases a distance. Also gives
    the pictures at _COARSE_SIDE, [N, pixels], with mean 0 and norm 1.
    """
    side, count = pictures.shape[-1], _COEFFICIENTS
    normal = _normal(pictures.reshape(len(pictures), -1).astype(np.float32))
    place = (np.arange(side) + 0.5) * np.pi / side
    basis = np.cos(place[:, None] * np.arange(count)) * np.sqrt(2 / side)
    basis[:, 0] /= np.sqrt(2)
    columns = (normal.reshape(-1, side) @ basis.astype(np.float32)).reshape(-1, side, count)
    magnitudes = np.abs(np.einsum("nij,ik->nkj", columns, basis.astype(np.float32)))
    y, x = np.triu_indices(count, 1)
    one, other = magnitudes[:, y, x], magnitudes[:, x, y]
    diagonal = magnitudes[:, range(count), range(count)]
    folded = [(one + other) / np.sqrt(2), np.abs(one - other) / np.sqrt(2), diagonal]
    cells = normal.reshape(len(normal), _COARSE_SIDE, side // _COARSE_SIDE, _COARSE_SIDE, -1)
    coarse = cells.mean((2, 4)).reshape(len(normal), -1)
    return np.concatenate(folded, 1).astype(np.float32), _normal(coarse)


def _normal(rows: np.ndarray) -> np.ndarray:
    """Rows with mean 0 and norm 1; flat ones are 0."""
    centred = rows - rows.mean(1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)


def _close(points: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices (i, j), i < j, of points whose squared distance is _NEAR at most, block by block."""
    norms = (points**2).sum(1)
    starts = range(0, len(points), _BLOCK)
    for one, other in itertools.combinations_with_replacement(starts, 2):
        rows, columns = slice(one, one + _BLOCK), slice(other, other + _BLOCK)
        products = points[rows] @ points[columns].T
        i, j = np.nonzero(norms[rows, None] + norms[columns] - 2 * products <= _NEAR)
        keep = i + one < j + other
        yield i[keep] + one, j[keep] + other


def _best_symmetries(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By row the symmetry under which pictures correlate best, by its place, and how much."""
    places = np.arange(_COARSE_SIDE**2).reshape(_COARSE_SIDE, _COARSE_SIDE)
    orders = [symmetric(places, name).ravel() for name in SYMMETRIES]
    scores = np.stack([np.einsum("np,np->n", one[:, order], other) for order in orders])
    return scores.argmax(0), scores.max(0)


def _in_common(pictures: np.ndarray) -> np.ndarray:
    """The fine structure [S, S] that most of the pictures [N, S, S] have, with norm 1, or 0."""
    some = pictures[:: -(-len(pictures) // _IN_COMMON_OF)]
    middle = np.median(fine(some.astype(np.float32)).astype(np.float32), axis=0)
    return middle / max(float(np.linalg.norm(middle)), 1e-6)


def _peculiar(whole: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Fine structures [N, S, S] without what they have in common.

    Where next to nothing is left, most pictures are this one, and it stays whole.
    """
    shares = (whole * common).sum((1, 2), keepdims=True)
    rest = whole - shares * common
    left, all_of_it = (np.linalg.norm(each, axis=(1, 2), keepdims=True) for each in (rest, whole))
    return np.where(left < _REST * all_of_it, whole, rest)


def _likeness(two: np.ndarray, name: str) -> float:
    """The correlation of two fine structures, of the first under a symmetry, without frames."""
    inner = slice(_FRAME, -_FRAME)
    a, b = symmetric(two[0], name)[inner, inner], two[1, inner, inner]
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def fine(pictures: np.ndarray, radius: int = 2) -> np.ndarray:
    """Pictures [N, S, S] less their means over squares of 2 · radius + 1 pixels."""
    side = 2 * radius + 1
    padded = np.pad(pictures, ((0, 0), (radius + 1, radius), (radius + 1, radius)), mode="edge")
    sums = padded.cumsum(1, dtype=np.float64).cumsum(2)
    boxes = (sums[:, side:, side:] - sums[:, :-side, side:] - sums[:, side:, :-side]) + sums[
        :, :-side, :-side
    ]
    return pictures - boxes / side**2
