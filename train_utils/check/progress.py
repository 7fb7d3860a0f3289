"""A line that says how far something has come, on a terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_EVERY = 0.2  # seconds


def progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items; meanwhile their number and the time that is left, if stderr is a terminal."""
    start = shown = time.monotonic()
    seen = sys.stderr.isatty()
    for number, item in enumerate(items, 1):
        now = time.monotonic()
        if seen and (now - shown > _EVERY or number == total):
            left = (now - start) / number * (total - number)
            sys.stderr.write(f"\r{number:,} of {total:,} {what}, {left:.0f} s left\x1b[K")
            sys.stderr.flush()
            shown = now
        yield item
    if seen and total:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
