"""Parts of a report that are lines, tables and curves: what the page shows of a set-up."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """Rows of text under a caption; the first column names its row."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Curve:
    """A measured curve (x, y), the same smoothed, and places on x that are named.

    log_x: draw x on a logarithmic scale; all x must be positive then.
    """

    caption: str
    x_name: str
    y_name: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: Sequence[float] = ()
    marks: dict[str, float] = field(default_factory=dict)
    log_x: bool = False


@dataclass
class Section:
    """A titled part: lines as they are printed, tables and curves; `values` are for programs."""

    title: str
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
