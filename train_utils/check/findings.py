"""What a check finds: findings ranked by what they cost, and the report that holds them."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from train_utils.check.sections import Section
from train_utils.errors import printable

Severity = Literal["error", "warning", "note"]
Split = Literal["train", "val"]
# What the second file of a pair is: grey levels of an object, classes, an alpha matte, a picture.
Targets = Literal["masks", "classes", "mattes", "pictures"]

Likeness = Literal["bytes", "pixels", "near", "similar"]

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_EXAMPLES = 3  # in a line; a report has them all


@dataclass
class Finding:
    """Something that costs accuracy or time, and what mends it.

    kind: a word that stays the same, for programs. message: the cause, without names of files.
    count: how many files, pairs or classes it concerns. examples: their names. pairs: the indices
    of those among `Report.pairs` that it concerns, the clearest cases first. settings: what --set
    mends it ("data.mask_values=threshold"); the command that the report proposes has them.
    """

    kind: str
    severity: Severity
    message: str
    fix: str = ""
    count: int = 1
    examples: list[str] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The finding in one line, as it may be printed."""
        shown = ", ".join(self.examples[:_EXAMPLES])
        more = self.count - len(self.examples[:_EXAMPLES])
        shown += f" and {more} more" if shown and more > 0 else ""
        count = f"{self.count:,} × " if self.pairs else ""
        line = f"{self.severity}: {self.kind}: {count}{self.message}"
        return printable(f"{line}{f' ({shown})' if shown else ''}. {self.fix}".rstrip())


@dataclass
class CheckedPair:
    """An image and its target."""

    split: Split
    name: str
    image: str
    target: str


@dataclass
class Alike:
    """Pairs whose images are the same picture; indices into `Report.pairs`.

    how: the same "bytes" or "pixels"; "near": the picture saved anew, at another size or quality;
    "similar": cut, or a neighbouring frame or slice. transforms: what turns the first one into each
    ("same", "mirrored", "turned by 90°", …). across: training and validation both have one.
    contradicting: their targets differ.
    """

    how: Likeness
    pairs: list[int]
    transforms: list[str]
    across: bool = False
    contradicting: bool = False


@dataclass
class Report:
    """All that a check has found of a task's data, and of its set-up where that was asked for.

    statistics: by name ("width", "height", "object share", "brightness", …), one number per pair,
    nan where it was not looked at. decoded: the pairs whose pixels were looked at. classes: name →
    (share of the pixels, images) where targets are classes. command: what to train with, as it is
    typed. read: (index, longest side) → the pair as pictures, image uint8 [h, w, 3], and target
    uint8 [h, w], or [h, w, 3] where it is a picture; a UserError for a file that cannot be read.
    sections: what was found of the set-up.
    """

    task: str
    targets: Targets
    pairs: list[CheckedPair] = field(default_factory=list)
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    decoded: list[int] = field(default_factory=list)
    classes: dict[str, tuple[float, int]] = field(default_factory=dict)
    palette: Sequence[Sequence[int]] = ()
    alike: list[Alike] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unusable: set[int] = field(default_factory=set)
    held_out: bool = False
    command: str = ""
    read: Callable[[int, int], tuple[np.ndarray, np.ndarray]] | None = None
    sections: list[Section] = field(default_factory=list)

    def add(
        self,
        kind: str,
        severity: Severity,
        message: str,
        pairs: Sequence[int],
        fix: str = "",
        examples: Sequence[str] = (),
        settings: Sequence[str] = (),
    ) -> None:
        """A finding about pairs, if there are any; their images are its examples by default."""
        if len(pairs):
            names = list(examples) or [self.pairs[index].image for index in pairs]
            self.findings.append(
                Finding(
                    kind, severity, message, fix, len(pairs), names, list(pairs), list(settings)
                )
            )

    def add_names(self, kind: str, severity: Severity, message: str, names: Sequence[str]) -> None:
        """A finding about what has names, such as classes, if there are any."""
        if names:
            self.findings.append(Finding(kind, severity, message, "", len(names), list(names)))

    def ranked(self) -> list[Finding]:
        """The findings, those first that cost most."""
        order = sorted(enumerate(self.findings), key=lambda x: (_rank(x[1]), -x[1].count, x[0]))
        return [finding for _, finding in order]

    @property
    def failed(self) -> bool:
        """Whether something must be mended before a training."""
        return any(finding.severity == "error" for finding in self.findings)

    def scope(self) -> str:
        """What was looked at, in a line."""
        splits = Counter(pair.split for pair in self.pairs)
        seen = len(self.decoded)
        how = (
            "of all"
            if seen + len(self.unusable) >= len(self.pairs)
            else f"of {seen:,} (--full: of all)"
        )
        return f"{splits['train']:,} pairs to train on, {splits['val']:,} to validate; pixels {how}"

    def to_json(self) -> str:
        """The report as JSON; nan becomes null."""
        values = {
            "task": self.task,
            "targets": self.targets,
            "findings": [vars(finding) for finding in self.ranked()],
            "command": self.command,
            "classes": self.classes,
            "alike": [vars(group) for group in self.alike],
            "decoded": self.decoded,
            "pairs": [vars(pair) for pair in self.pairs],
            "statistics": {name: _numbers(column) for name, column in self.statistics.items()},
            "sections": {section.title: section.values for section in self.sections},
        }
        return json.dumps(values, indent=1)


def _rank(finding: Finding) -> int:
    return _SEVERITIES.index(finding.severity)


def _numbers(column: np.ndarray) -> list[Any]:
    return [None if value != value else round(float(value), 5) for value in column]
