"""Pairs whose images are one picture: within a split, across splits, with other targets."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from train_utils.check.duplicates import SAME, alike_pairs, combined, inverse, symmetric
from train_utils.check.findings import Alike, Likeness, Report, Severity, Targets
from train_utils.check.look import Look
from train_utils.datasets import try_all
from train_utils.errors import UserError

_PIECE = 2**20  # bytes
_OVERLAP = 0.75  # of two masks of one picture: intersection over union; other annotators have 0.9
_FAINT = 16  # grey levels of a mask that may be noise
_EQUAL = 0.9  # share of the pixels with the same class
_SHOWN = 3  # names of a group; `Report.alike` has them all
_MATTES = 0.1  # mean difference of two mattes

Links = dict[tuple[int, int], tuple[Likeness, str]]  # pairs i < j → how, by which symmetry

_WORDS: dict[Likeness, str] = {
    "bytes": "the same files",
    "pixels": "the same pixels",
    "near": "saved anew",
    "similar": "cut, or neighbouring frames",
}


def same_bytes(report: Report, indices: Iterable[int]) -> Links:
    """Which of these pairs have image files of the same bytes: of one size, then of one hash."""
    by_size = defaultdict(list)
    for index in indices:
        with suppress(OSError):  # reading it will say so
            by_size[Path(report.pairs[index].image).stat().st_size].append(index)
    several = [index for group in by_size.values() if len(group) > 1 for index in group]
    hashes, _ = try_all([report.pairs[index].image for index in several], _hash_of_file)
    keys = {index: hashes.get(report.pairs[index].image) for index in several}
    return dict.fromkeys(_equal(keys), ("bytes", "same"))


def _hash_of_file(path: str) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with Path(path).open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Check the path.") from error
    return digest.digest()


def _equal(keys: Mapping[int, bytes | None]) -> list[tuple[int, int]]:
    """(first, other) of all that have one key."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, key in keys.items():
        if key:
            groups[key].append(index)
    return [(group[0], other) for group in groups.values() for other in group[1:]]


def find(report: Report, links: Links, looks: Mapping[int, Look]) -> None:
    """Groups of alike images, by copied files and by pixels, and what they mean."""
    indices = list(looks)
    links |= {
        link: ("pixels", "same")
        for link in _equal({index: looks[index].image_hash for index in looks})
        if link not in links
    }
    if indices:
        for i, j, name, likeness in alike_pairs(np.stack([looks[k].image for k in indices])):
            how: Likeness = "near" if likeness >= SAME else "similar"
            links.setdefault((indices[i], indices[j]), (how, name))
    # Those that are the same make groups of their own, which what is only similar does not join.
    same = {link: how for link, how in links.items() if how[0] != "similar"}
    members = {index for link in same for index in link}
    report.alike = [_alike(report, group, looks) for group in grouped(same)]
    others = {link: how for link, how in links.items() if not members.issuperset(link)}
    report.alike += [_alike(report, group, looks) for group in grouped(others)]
    _say(report)
    _same_targets(report, looks)


Group = dict[int, tuple[Likeness, str]]  # member → how it is like the first, by which symmetry


def grouped(links: Links) -> list[Group]:
    """What links connect; the first member comes first."""
    ways: dict[int, list[tuple[int, Likeness, str]]] = defaultdict(list)
    for (i, j), (how, name) in links.items():
        ways[i].append((j, how, name))
        ways[j].append((i, how, inverse(name)))
    groups: list[Group] = []
    seen: set[int] = set()
    for first in sorted(ways):
        if first in seen:
            continue
        group: Group = {first: ("bytes", "same")}
        queue = [first]
        for here in queue:
            for other, how, name in ways[here]:
                if other not in group:
                    least = max(how, group[here][0], key=list(_WORDS).index)
                    group[other] = least, combined(group[here][1], name)
                    queue.append(other)
        seen |= group.keys()
        groups.append(dict(sorted(group.items())))
    return groups


def _alike(report: Report, group: Group, looks: Mapping[int, Look]) -> Alike:
    first, *others = group
    how = max((group[index][0] for index in others), key=list(_WORDS).index)
    across = len({report.pairs[index].split for index in group}) > 1
    compared = [index for index in others if index in looks and group[index][0] != "similar"]
    contradicting = first in looks and any(
        not _targets_agree(looks[first], looks[index], group[index][1], report.targets)
        for index in compared
    )
    return Alike(how, list(group), [name for _, name in group.values()], across, contradicting)


def _targets_agree(one: Look, other: Look, symmetry: str, targets: Targets) -> bool:
    if targets == "pictures":
        return True
    turned = symmetric(one.target, symmetry)
    if targets == "mattes":
        return float(np.abs(turned.astype(int) - other.target).mean()) <= 255 * _MATTES
    if targets == "classes":
        return float((turned == other.target).mean()) >= _EQUAL
    # Smoothed: at this size, what is thin falls into one pixel or the next.
    faint = (np.where(mask < _FAINT, 0, mask.astype(int)) for mask in (turned, other.target))
    a, b = (sliding_window_view(np.pad(mask, 1), (3, 3)).sum((2, 3)) for mask in faint)
    union = int(np.maximum(a, b).sum())
    return union == 0 or int(np.minimum(a, b).sum()) / union >= _OVERLAP


def _say(report: Report) -> None:
    """Findings about groups: those across splits first, then those within one."""
    once, like = "pairs with a picture that", "pairs with a picture much like"
    texts: tuple[tuple[str, Severity, bool, bool, str, str], ...] = (
        ("leak", "error", True, False, f"{once} is in training and in validation", ""),
        ("neighbours", "warning", True, True, f"{like} one of the other split", ""),
        ("copies", "warning", False, False, f"{once} their split has again", "Keep one of each."),
        ("neighbours", "note", False, True, f"{like} another of their split", ""),
    )
    for kind, severity, across, similar, text, fix in texts:
        groups = [
            group
            for group in report.alike
            if group.across == across and (group.how == "similar") == similar
        ]
        what = f"{text}, {_pictures(len(groups))} in all: {_ways(groups)}"
        report.add(kind, severity, what, _members(groups), fix, examples=_shown(report, groups))
    differing = [group for group in report.alike if group.contradicting]
    report.add(
        "contradiction",
        "warning",
        f"pairs with one picture and different targets, {_pictures(len(differing))} in all",
        _members(differing),
        "Keep the target that is right.",
        examples=_shown(report, differing),
    )


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' if count > 1 else ''}"


def _ways(groups: Sequence[Alike]) -> str:
    """In which ways they are alike."""
    names = dict.fromkeys(name for group in groups for name in group.transforms)
    hows = dict.fromkeys(_WORDS[group.how] for group in groups)
    return ", ".join([*hows, *(name for name in names if name != "same")])


def _members(groups: Sequence[Alike]) -> list[int]:
    return [index for group in groups for index in group.pairs]


def _shown(report: Report, groups: Sequence[Alike]) -> list[str]:
    shown = []
    for group in groups:
        names = [report.pairs[index].image for index in group.pairs[:_SHOWN]]
        more = len(group.pairs) - len(names)
        shown.append(" = ".join([*names, *([f"{more} more"] if more else [])]))
    return shown


def _same_targets(report: Report, looks: Mapping[int, Look]) -> None:
    """Different images that have the very same mask, which is seldom so by chance."""
    partly = [i for i, look in looks.items() if 0 < look.numbers.get("object share", 0) < 1]
    alike = {index for group in report.alike for index in group.pairs}
    links = _equal({index: looks[index].target_hash for index in partly})
    shared = grouped(dict.fromkeys(links, ("pixels", "same")))
    groups = [group for group in shared if not alike.issuperset(group)]
    report.add(
        "same mask",
        "warning",
        "different images have the very same mask",
        [index for group in groups for index in group],
        "Check which of them it belongs to.",
    )
