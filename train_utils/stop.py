"""Stopping on request: a signal to any process ends the run after a step, on all ranks together."""

import signal
import sys
from types import FrameType

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


def exit_if_stopped(stop: StopRequest, run: RunFolder, state: TrainingState) -> None:
    """End a stopped run: say where it stands and how to continue, and exit as the signal would."""
    if not stop.agreed:
        return
    reason = stop.requested or "SIGTERM"  # another rank's
    run.status("stopped", reason=reason, epoch=state.epoch, step=state.step)
    get_logger().info(
        f"stopped by {reason} at epoch {state.epoch}, step {state.step}; saved in {run.path}. "
        f"Continue with --resume {run.path}"
    )
    sys.exit(128 + getattr(signal, reason))
