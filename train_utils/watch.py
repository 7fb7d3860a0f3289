"""Which process keeps the others waiting, and since when.

A process that waits for one that hangs cannot tell which one it is, and would wait for as long as
the collective's timeout. So a thread of each process carries what that does (`activity.py`) to the
store that all processes share, and whoever waits for long reads what the others do.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from train_utils.activity import (
    LOADING,
    SAVING,
    current_activity,
    leave_out_of_activity,
    set_activity,
)
from train_utils.log import get_logger

_FINISHED = "finished"
_TICK = 1.0  # seconds between two looks; a request to stop reaches all processes as fast
_SUSPENDED = 5.0  # seconds between two looks that only a suspended process lets pass
_LOST = 10  # ticks without a sign after which a process is taken for stopped or gone
_STOP_KEY = "watch/stop"
_MOST_TEXT = 2000  # characters of one text in a report
_MOST_BYTES = 2**16  # of a report; JSON takes up to 12 for a character
_FIELDS = [int, str, str, bool, float, str, int]


class Report(NamedTuple):
    """What a process does, as the others read it; `quiet` counts the looks without a new one."""

    rank: int
    host: str
    activity: str
    waits: bool
    seconds: float
    details: str
    number: int
    quiet: int = 0

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host})"
        if self.quiet >= _LOST:
            return f"{who} gives no sign of life; its last was '{self.activity}'"
        details = f" ({self.details})" if self.details else ""
        return f"{who} has been at '{self.activity}' for {self.seconds:.0f} s{details}"


def _parsed(text: bytes, rank: int) -> Report:
    """The report of a rank; ValueError or RecursionError for what anyone else may have written."""
    if len(text) > _MOST_BYTES:
        raise ValueError("too long")
    fields = json.loads(text)
    if type(fields) is not list or list(map(type, fields)) != _FIELDS:
        raise ValueError("other fields")
    of, host, activity, waits, seconds, details, number = fields
    if of != rank or not 0 <= seconds < 1e9:
        raise ValueError("another rank, or no time")
    return Report(rank, host, activity, waits, seconds, details, number)


class Watch:
    """Looks after this process and its peers while a `with` block runs.

    patience: seconds after which a process that does not move, while others wait for it, is taken
    for hanging: all processes then end, naming it, through `give_up(reason)`; it is named in a
    warning after a quarter of that. One that is `SAVING` is named only: disks may be slow. A single
    process ends too if it waits so long at `LOADING`. 0: never (in a debugger, say).
    store: shared by all processes, None for a single one.
    """

    def __init__(
        self,
        patience: float,
        give_up: Callable[[str], None],
        stop_requested: Callable[[], bool] = lambda: False,
        store: Any = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.patience, self.give_up = patience, give_up
        self.stop_requested, self.stop_anywhere = stop_requested, False
        self.store, self.rank, self.world_size = store, rank, world_size
        self.host = f"{socket.gethostname()}, process {os.getpid()}"
        self._peers: dict[int, Report] = {}
        self._looks = 0
        self._warned_of: list[int] = []
        self._malformed: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        set_activity("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        set_activity(_FINISHED)
        self._ended.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        last = time.monotonic()
        with suppress(RuntimeError):  # the store goes with torchrun, which ends this process too
            while not self._ended.wait(_TICK):
                if (passed := time.monotonic() - last) > _SUSPENDED:
                    leave_out_of_activity(passed)
                last = time.monotonic()
                self.look()
            self._report()

    def look(self) -> None:
        """Report what this process does and read the others', as the thread does by itself."""
        self._looks += 1
        mine = self._report()
        if self.store is not None:
            if self.stop_requested() and not self.stop_anywhere:
                self.store.set(_STOP_KEY, "1")
            self.stop_anywhere = self.stop_anywhere or self.store.check([_STOP_KEY])
        if not self.patience or self._ended.is_set():
            return
        late, longest = self._late(mine)
        if late and longest > self.patience / 4:
            self._warn_or_give_up(late, longest)
        elif not late:
            self._warned_of = []

    def _report(self) -> Report:
        name, waits, since, details = current_activity()
        seconds = time.monotonic() - since
        about = details()[:_MOST_TEXT] if seconds > self.patience / 8 else ""
        name = name[:_MOST_TEXT]
        mine = Report(self.rank, self.host, name, waits, seconds, about, self._looks)
        if self.store is not None:
            self.store.set(f"watch/{self.rank}", json.dumps(mine[:-1]))
        return mine

    def _late(self, mine: Report) -> tuple[list[Report], float]:
        """The processes that others wait for, and how long these have been waiting."""
        if self.store is None:
            return ([mine] if mine.activity.startswith(LOADING) else []), mine.seconds
        # Two look, and those who may be late themselves: more would only load the store.
        looks = self.rank < 2 or not mine.waits
        if not looks or mine.seconds <= self.patience / 8:
            return [], 0.0
        others = (rank for rank in range(self.world_size) if rank != self.rank)
        reports = [mine, *map(self._read, others)]
        waiting_for = [report.seconds for report in reports if report.waits]
        # Processes that move are late, but do not hang; if all wait, the network may be to blame.
        reports = [report for report in reports if report.activity != _FINISHED]
        stuck = [r for r in reports if r.seconds > self.patience / 8 or r.quiet >= _LOST]
        late = [r for r in stuck if not r.waits or r.quiet >= _LOST]
        if len(waiting_for) == len(reports) == len(stuck):
            late = stuck
        return late, max(waiting_for, default=0.0)

    def _read(self, rank: int) -> Report:
        key = f"watch/{rank}"
        old = self._peers.get(rank, Report(rank, "no sign yet", "starting", False, 0.0, "", -1))
        new = old
        if self.store.check([key]):
            text = self.store.get(key)
            try:
                new = _parsed(text, rank)
            except (ValueError, RecursionError):
                if rank not in self._malformed:
                    self._malformed.add(rank)
                    get_logger().warning(
                        f"{key}: no report of rank {rank}, so it is ignored. Whoever reaches the "
                        "store can write there: docs/security.md."
                    )
        quiet = old.quiet + 1 if new.number == old.number else 0
        self._peers[rank] = new._replace(quiet=quiet)
        return self._peers[rank]

    def _warn_or_give_up(self, late: list[Report], longest: float) -> None:
        names = "; ".join(map(str, late))
        ranks = [report.rank for report in late]
        hang = all(
            r.quiet >= _LOST or (r.seconds > self.patience / 2 and r.activity != SAVING)
            for r in late
        )
        if longest > self.patience and hang:
            if self.rank in ranks:
                _print_main_stack(f"rank {self.rank} hangs here:")
            self.give_up(
                f"hang: {names}. Look at its data and its machine, or allow more time by "
                "--set train.hang_timeout=SECONDS."
            )
            return
        speaker = next((rank for rank in range(self.world_size) if rank not in ranks), 0)
        if ranks != self._warned_of and speaker == self.rank:
            self._warned_of = ranks
            get_logger().warning(f"waiting for {longest:.0f} s: {names}")


def _print_main_stack(header: str) -> None:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = "".join(traceback.format_stack(frame)) if frame else ""
    print(f"{header}\n{stack}", file=sys.stderr, flush=True)
