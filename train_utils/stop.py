"""Stopping on request: a signal to any process ends the run after a step, on all ranks together."""

import signal
import sys
from types import FrameType
from typing import NoReturn

from train_utils.distributed_utils import sum_over_ranks
from train_utils.log import get_logger
from train_utils.run_folder import RunFolder
from train_utils.training_state import TrainingState

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopRequest:
    """Notes SIGTERM, SIGUSR1 (Slurm's preemption) and SIGINT; a second SIGINT stops at once.

    `requested` names this process's own signal; `agreed` is set once all ranks know of it.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.agreed = False
        for name in _SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested and name == "SIGINT":
            raise KeyboardInterrupt
        self.requested = name
        get_logger().warning(f"{name}: stopping after this step (Ctrl-C again: at once)")


def agree_to_stop(stop: StopRequest) -> None:
    """Learn at the end of an epoch whether any rank has been asked to stop meanwhile."""
    (requests,) = sum_over_ranks([stop.requested is not None])
    stop.agreed = stop.agreed or requests > 0


def exit_stopped(stop: StopRequest, run: RunFolder, state: TrainingState) -> NoReturn:
    """End a stopped run: say where it stands and how to continue, and exit as the signal would."""
    sum_over_ranks([0])  # rank 0 has saved: a rank that left earlier would have it terminated
    reason = stop.requested or "SIGTERM"  # another rank's
    run.status("stopped", reason=reason, epoch=state.epoch, step=state.step)
    get_logger().info(
        f"stopped by {reason} at epoch {state.epoch}, step {state.step}; saved in {run.path}. "
        f"Continue with --resume {run.path}"
    )
    sys.exit(128 + getattr(signal, reason))
