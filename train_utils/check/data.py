"""What the files behind a task's data hold: pairs, headers, copies, pixels."""

import itertools
import logging
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as F

from train_utils.check import copies, images, masks
from train_utils.check.alignment import misplaced
from train_utils.check.findings import CheckedPair, Finding, Report, Severity, Split, Targets
from train_utils.check.look import Look, Reader, look_at, reader_of
from train_utils.check.progress import progress
from train_utils.data import follow_the_script, unwrap_subset
from train_utils.datasets import name_hash, pairs_of, try_all
from train_utils.distributed_utils import cpu_cores
from train_utils.errors import UserError, plain_message
from train_utils.image_io import is_damaged, read_header
from train_utils.log import get_logger
from train_utils.task import BaseTask
from train_utils.threads import in_threads

Configure = Callable[[Sequence[str]], BaseTask]  # words of a command line → the task

SAMPLE = 200  # pairs whose pixels are looked at without --full …
PROCESSES_FROM = 500  # pairs; fewer take less than processes take to start
_AT_ONCE = 16  # pairs that a process hands over
_RUN = 4  # … in runs of neighbours, so that masks that are one name off are seen


@dataclass
class _Part:
    """The pairs of a split: `indices` in the dataset behind it, by the order in the report."""

    split: Split
    dataset: Dataset
    full: Any
    indices: list[int]
    read: Reader


def check_data(task: BaseTask, full: bool) -> Report:
    """Look at the files behind a task's training and validation data; full: at all of their pixels.

    What a training would refuse becomes a finding.
    """
    report = Report(task.name, task.TARGETS, palette=list(task.legend.values()))
    with _said() as lines:
        datasets = _built(task, report)
    report.findings += [Finding("left out", "note", line.rstrip(".")) for line in lines]
    if not datasets:
        return report
    report.held_out = all(isinstance(each, Subset) for each in datasets)
    for dataset in filter(pairs_of, datasets):
        unwrap_subset(dataset)[0].unequal = task.cfg.data.on_unequal
    parts = [_part("train", datasets[0]), _part("val", datasets[1])]
    for part in parts:
        report.pairs += _pairs_of_part(part)
    if not report.pairs:
        what = type(unwrap_subset(datasets[0])[0]).__name__
        report.findings.append(
            Finding("not looked at", "note", f"{what} has no pairs of files to look at")
        )
        return report
    places = [(part, index) for part in parts for index in part.indices]
    report.read = partial(_pictures, places)
    sound = _look_at_headers(task, report)
    links = copies.same_bytes(report, sound)
    copied = {index for link in links for index in link}
    chosen = sound if full else _sample(report, sound, copied)
    looks = _look_at_pixels(places, chosen, report, task)
    copies.find(report, links, looks)
    images.find(report, looks)
    masks.find(report, looks, task)
    misplaced(report, looks)
    _ask_the_task(task, report, parts, looks, full)
    return report


def check_as_proposed(
    task: BaseTask, words: Sequence[str], configure: Configure, full: bool
) -> tuple[BaseTask, Report]:
    """As `check_data`; where the task refuses the data, again with the settings that it proposes.

    What was refused stays among the findings, with these settings. words: the command line.
    """
    report = check_data(task, full)
    refused = next((x for x in report.findings if x.kind in ("pairs", "refused")), None)
    settings = proposed(refused.message) if refused else []
    if not refused or not settings:
        return task, report
    try:
        other = configure([*words, *(word for each in settings for word in ("--set", each))])
        again = check_data(other, full)
    except UserError:
        return task, report
    if any(finding.kind == refused.kind for finding in again.findings):
        return task, report
    again.findings.append(replace(refused, settings=settings))
    return other, again


def proposed(message: str) -> list[str]:
    """The settings that an error proposes first ("key=value")."""
    first = re.split(r",? or ", message)[0] if "--set" in message else ""
    words = shlex.split(first.rpartition("--set")[0] and first[first.index("--set") :].rstrip("."))
    return [word for before, word in itertools.pairwise(words) if before == "--set"]


def _built(task: BaseTask, report: Report) -> Sequence[Dataset]:
    try:
        return task.build_datasets()
    except UserError as error:
        report.findings.append(Finding("pairs", "error", plain_message(error).rstrip(".")))
        return ()


def _part(split: Split, dataset: Dataset) -> _Part:
    full, indices = unwrap_subset(dataset)
    pairs = pairs_of(dataset)
    once = {pair: index for index, pair in zip(indices, pairs, strict=False)}
    return _Part(split, dataset, full, list(once.values()), reader_of(dataset))


def _pairs_of_part(part: _Part) -> list[CheckedPair]:
    named = [(part.full.stems[index], *map(str, part.full.pairs[index])) for index in part.indices]
    return [CheckedPair(part.split, *names) for names in named]


def _pictures(
    places: Sequence[tuple[_Part, int]], index: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """A pair as pictures, as `Report.read` gives them."""
    part, place = places[index]
    image, target = part.read(place)
    height, width = image.shape[-2:]
    scale = side / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    nearest, smooth = F.InterpolationMode.NEAREST, F.InterpolationMode.BILINEAR
    labels = getattr(part.full, "read_target", None) and len(target) == 1
    image = F.resize(image.as_subclass(torch.Tensor), size, smooth, antialias=True)
    target = F.resize(target.as_subclass(torch.Tensor), size, nearest if labels else smooth)
    shown = target.permute(1, 2, 0).numpy() if len(target) == 3 else target[0].numpy()
    return image.permute(1, 2, 0).numpy(), shown


# --- headers -------------------------------------------------------------------------------------


def _look_at_headers(task: BaseTask, report: Report) -> list[int]:
    """Sizes of all files; returns the pairs whose two files can be opened and are of one size."""
    paths = [Path(path) for pair in report.pairs for path in (pair.image, pair.target)]
    headers, problems = try_all(paths, read_header)
    size = np.full((len(report.pairs), 2), np.nan)
    unreadable: list[int] = []
    unequal: list[int] = []
    turned: list[int] = []
    sound: list[int] = []
    for index, pair in enumerate(report.pairs):
        image, target = (headers.get(Path(path)) for path in (pair.image, pair.target))
        if image:
            size[index] = image.size
        if not (image and target):
            unreadable.append(index)
        elif image.size == target.size or pair.image == pair.target:
            sound.append(index)
        else:
            (turned if image.size == target.size[::-1] else unequal).append(index)
    unequal_is = task.cfg.data.on_unequal
    if unequal_is == "resize":
        sound = sorted({*sound, *unequal})
    report.unusable |= {*unreadable, *turned, *([] if unequal_is == "resize" else unequal)}
    width, height = size.T
    if any(pair.image == pair.target for pair in report.pairs):  # A|B side by side
        width = width / 2
    report.statistics |= {"width": width, "height": height}
    _add_unreadable(task, report, _texts_of_pairs(report, unreadable, problems))
    report.add(
        "unequal size",
        "error" if unequal_is == "refuse" else "warning",
        "the mask has another size than its image",
        unequal,
        {
            "refuse": "Make the masks anew, or leave such pairs out by --set data.unequal=skip.",
            "skip": "Such pairs are left out (data.unequal=skip).",
            "resize": "Such masks are resized (data.unequal=resize).",
        }[unequal_is],
    )
    report.add(
        "turned",
        "error",
        "the mask has its image's sides exchanged: an EXIF orientation was applied to one only",
        turned,
        "Turn the masks as their images are shown, or save the images without the tag.",
    )
    images.find_sizes(report, task.cfg.data.image_size)
    images.find_kinds(report, [headers.get(Path(pair.image)) for pair in report.pairs])
    return sound


def _texts_of_pairs(
    report: Report, indices: Sequence[int], problems: Mapping[Path, str]
) -> dict[int, str]:
    """What is wrong with either file of these pairs."""
    named = {index: (report.pairs[index].image, report.pairs[index].target) for index in indices}
    return {
        index: ", ".join(problems[Path(path)] for path in paths if Path(path) in problems)
        for index, paths in named.items()
    }


def _add_unreadable(task: BaseTask, report: Report, problems: Mapping[int, str]) -> None:
    """Findings about pairs that cannot be read: those with a damaged file, and others.

    To be called after `report.unusable` has them.
    """
    left = {pair.split for index, pair in enumerate(report.pairs) if index not in report.unusable}
    skipped = task.cfg.data.skip_unreadable and len(left) == 2
    damaged = [
        index
        for index in problems
        if any(map(is_damaged, (report.pairs[index].image, report.pairs[index].target)))
    ]
    others = [index for index in problems if index not in damaged]
    severity: Severity = "warning" if skipped else "error"
    fix = "Replace them, or leave them out by --set data.skip_unreadable=true."
    if skipped:
        fix = "Such pairs are left out (data.skip_unreadable=true)."
    texts = {index: text.rstrip(".") for index, text in problems.items()}
    what = "pairs with a damaged file"
    report.add("unreadable", severity, what, damaged, fix, [texts[index] for index in damaged])
    what, fix = "pairs that cannot be read", "Mend what the messages name."
    report.add("unreadable", "error", what, others, fix, [texts[index] for index in others])


# --- pixels --------------------------------------------------------------------------------------


def _sample(report: Report, sound: Sequence[int], copied: Collection[int]) -> list[int]:
    """Pairs to look at, in runs of neighbours that a hash of their names has chosen, and copies."""
    runs = [sound[start : start + _RUN] for start in range(0, len(sound), _RUN)]
    runs.sort(key=lambda run: name_hash(report.pairs[run[0]].name))
    chosen = {index for run in runs[: SAMPLE // _RUN] for index in run}
    return sorted(chosen.union(list(set(sound) & set(copied))[:SAMPLE]))


class _Looks(Dataset):
    """What `look_at` gives of some pairs, or the UserError that it raises."""

    def __init__(
        self, places: Sequence[tuple[_Part, int]], chosen: Sequence[int], targets: Targets
    ) -> None:
        self.reads = [(places[index][0].read, places[index][1]) for index in chosen]
        self.targets = targets

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, number: int) -> Look | UserError:
        try:
            return look_at(*self.reads[number], self.targets)
        except UserError as error:
            return error


def _all_looks(looks: _Looks) -> Iterator[Look | UserError]:
    """All in order; many by processes: on two cores 3,000 pairs took them 6 s, and threads 10."""
    if len(looks) < PROCESSES_FROM:
        yield from in_threads(looks.__getitem__, range(len(looks)), cpu_cores())
        return
    loader = DataLoader(
        looks,
        batch_size=_AT_ONCE,
        num_workers=cpu_cores(),
        collate_fn=list,
        worker_init_fn=follow_the_script,
    )
    for several in loader:
        yield from several


def _look_at_pixels(
    places: Sequence[tuple[_Part, int]], chosen: Sequence[int], report: Report, task: BaseTask
) -> dict[int, Look]:
    """What the pixels of these pairs are; those that cannot be read are found, not returned."""

    found = progress(_all_looks(_Looks(places, chosen, task.TARGETS)), len(chosen), "pairs decoded")
    looks, failed = {}, {}
    for index, each in zip(chosen, found, strict=True):
        if isinstance(each, Look):
            looks[index] = each
        else:
            failed[index] = str(each)
    report.unusable |= failed.keys()
    _add_unreadable(task, report, failed)
    report.decoded = list(chosen)
    for name in dict.fromkeys(name for one in looks.values() for name in one.numbers):
        column = np.full(len(report.pairs), np.nan)
        column[list(looks)] = [one.numbers[name] for one in looks.values()]
        report.statistics[name] = column
    return looks


# --- what the task itself says -------------------------------------------------------------------


def _ask_the_task(
    task: BaseTask, report: Report, parts: Sequence[_Part], looks: dict[int, Look], full: bool
) -> None:
    """Have the task check what was decoded as a training would check all: findings of its words."""
    offset, kept = 0, []
    for part in parts:
        here = range(offset, offset + len(part.indices))
        kept.append(Subset(part.full, [part.indices[i - offset] for i in here if i in looks]))
        offset += len(part.indices)
    if not all(map(len, kept)):
        return
    with _said(logging.WARNING) as lines:
        try:
            task.prepare_data(*kept)
        except UserError as error:
            text = plain_message(error).rstrip(".")
            report.findings.append(Finding("refused", "error", text))
    where = "" if full else f" (among the {len(looks)} pairs that were decoded)"
    for line in lines:
        text = line.removeprefix("warning: ").rstrip(".") + where
        report.findings.append(Finding("masks", "warning", text))


@contextmanager
def _said(level: int = logging.INFO) -> Iterator[list[str]]:
    """What is logged meanwhile, from this level on, in place of being printed."""
    lines: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= level:
                lines.append(record.getMessage())

    logger = get_logger()
    handlers, logger.handlers = logger.handlers, [Keeper()]
    try:
        yield lines
    finally:
        logger.handlers = handlers
