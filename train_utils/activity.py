"""What this process does at present, for whoever asks why it takes so long.

Everything that may wait for another process notes it here; `watch.py` reads it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

LOADING = "waiting for the loader's workers"  # what an activity begins with where it is so
SAVING = "saving a checkpoint"


class Activity(NamedTuple):
    """What a process does, since when, and whether it `waits` for other processes in that."""

    name: str
    waits: bool
    since: float  # of time.monotonic
    details: Callable[[], str]


def _no_details() -> str:
    return ""


_current = Activity("starting", False, time.monotonic(), _no_details)


def set_activity(name: str, details: Callable[[], str] = _no_details) -> None:
    """Note what this process does from now on; `details` are asked for only if it hangs there."""
    global _current
    _current = Activity(name, False, time.monotonic(), details)


def current_activity() -> Activity:
    return _current


@contextmanager
def waiting(name: str) -> Iterator[None]:
    """Note that this process waits for others in a block, and then goes on as before."""
    global _current
    before = _current
    _current = Activity(f"{before.name}: {name}", True, time.monotonic(), before.details)
    yield
    _current = before._replace(since=time.monotonic())


def leave_out_of_activity(seconds: float) -> None:
    """Do not count time that this process spent stopped (Ctrl-Z, a paused container or job)."""
    global _current
    _current = _current._replace(since=_current.since + seconds)
