"""Stopping on request: a signal to any process ends the run after a step, on all ranks together."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType

from train_utils.collectives import get_rank, get_world_size, shared_store
from train_utils.errors import UserError, tell
from train_utils.log import get_logger
from train_utils.run_folder import AT_ONCE, RunFolder
from train_utils.watch import Watch

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
_TIME_TO_UNWIND = 2.0  # seconds that a second SIGINT leaves to the main thread


class StopSignals:
    """Knows why a run must end early: a signal to any process, or a process that hangs.

    Notes SIGTERM, SIGUSR1 (Slurm's preemption) and SIGINT; a second SIGINT stops at once.
    `requested` names this process's own signal. hang_timeout: the patience of a `Watch`, which runs
    for the length of a `with` block.
    """

    def __init__(self, run: RunFolder, hang_timeout: float) -> None:
        self.run = run
        self.requested: str | None = None
        self.watch = Watch(
            hang_timeout,
            run.give_up,
            lambda: self.requested is not None,
            shared_store(),
            get_rank(),
            get_world_size(),
        )
        for name in SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._note)

    def __enter__(self) -> "StopSignals":
        self._arrived, arriving = socket.socketpair()
        arriving.setblocking(False)
        # Python runs `_note` between two steps of its own only, and once for several signals: a
        # backward pass of half a minute would outlast any number of Ctrl-C.
        signal.set_wakeup_fd(arriving.fileno(), warn_on_full_buffer=False)
        self._arriving = arriving
        threading.Thread(target=self._count_interrupts, name="signals", daemon=True).start()
        self.watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.watch.__exit__(*error)
        signal.set_wakeup_fd(-1)
        self._arriving.close()  # ends the thread

    def _count_interrupts(self) -> None:
        interrupts = 0
        while number := self._arrived.recv(1):
            interrupts += number[0] == signal.SIGINT
            if interrupts == 2:
                time.sleep(_TIME_TO_UNWIND)
                with suppress(UserError):  # it stops all the same
                    self.run.status("stopped", reason=AT_ONCE)
                tell("interrupted twice: stopped at once")
                os._exit(128 + signal.SIGINT)

    def requested_anywhere(self) -> bool:
        """Whether any process has been asked to stop, as far as this one knows by now."""
        return self.requested is not None or self.watch.stop_anywhere

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested and name == "SIGINT":
            raise KeyboardInterrupt
        self.requested = name
        get_logger().warning(f"{name}: stopping after this step (Ctrl-C again: at once)")
