"""Failures on order, to rehearse what a run does about them.

    PIXTRAIN_FAULT=step:kill@7             SIGKILL to this process before its 7th step
    PIXTRAIN_FAULT=load:raise@3:rank=1     an error where rank 1 loads its 3rd sample
    PIXTRAIN_FAULT=step:hang@5,save.write:kill@2

A place is reached when the code passes it; the number counts that for each process by itself (1 if
left out). `:rank=R` means one rank only, and `:start=N` the N-th restart by torchrun: a fault
without it comes in the first start only, so that a restart shows recovery.
"""

import math
import os
import re
import signal
import time
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from train_utils.errors import UserError
from train_utils.log import get_logger

PLACES = {
    "step": "before the samples of a step are trained on",
    "load": "before a training or validation sample is read",
    "evaluate": "before a validation sample is scored",
    "save.write": "when a checkpoint is half written",
    "save.replace": "before a whole checkpoint takes the old one's name",
    "saved": "after it has",
    "loss": "spoils the losses of the step, and so its gradients",
    "gradient": "spoils the gradients alone",
}
ACTIONS = ("kill", "raise", "hang", "term", "nan")
_GRAMMAR = re.compile(
    r"(?P<place>[a-z.]+):(?P<action>[a-z]+)"
    r"(@(?P<time>\d+))?(:rank=(?P<rank>\d+))?(:start=(?P<start>\d+))?"
)


class Fault(NamedTuple):
    """What happens when `place` is reached for the `time`-th time since restart `start`."""

    place: str
    action: str
    time: int
    rank: int | None  # None: on all
    start: int


_reached: Counter[str] = Counter()


@lru_cache
def parse(text: str) -> tuple[Fault, ...]:
    """The faults that a comma-separated list names; UserError for what it does not understand."""
    faults = []
    for item in filter(None, text.split(",")):
        match = _GRAMMAR.fullmatch(item)
        if (
            not match
            or match["place"] not in PLACES
            or match["action"] not in ACTIONS
            or (match["time"] and int(match["time"]) == 0)
        ):
            raise UserError(
                f"PIXTRAIN_FAULT={item}: not PLACE:ACTION[@N][:rank=R][:start=N] with a place of "
                f"{', '.join(PLACES)} and an action of {', '.join(ACTIONS)}. Mend it or unset it."
            )
        rank = int(match["rank"]) if match["rank"] else None
        time, start = int(match["time"] or 1), int(match["start"] or 0)
        faults.append(Fault(match["place"], match["action"], time, rank, start))
    return tuple(faults)


def announce() -> None:
    """Say in every log that faults are ordered; UserError for an order without sense."""
    if text := os.environ.get("PIXTRAIN_FAULT"):
        parse(text)
        get_logger().info(f"PIXTRAIN_FAULT={text}: failing as ordered")


def reach(place: str) -> float:
    """Let the faults ordered for `place` happen; nan if one wants a value spoilt, else 1."""
    text = os.environ.get("PIXTRAIN_FAULT")
    if not text:
        return 1.0
    _reached[place] += 1
    here = place, _reached[place], int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    rank, factor = int(os.environ.get("RANK", 0)), 1.0
    for fault in parse(text):
        if (fault.place, fault.time, fault.start) == here and fault.rank in (None, rank):
            factor *= _happen(fault)
    return factor


def _happen(fault: Fault) -> float:
    if fault.action == "raise":
        raise UserError(f"PIXTRAIN_FAULT: {fault.place}, as ordered. Unset it.")
    if fault.action == "hang":
        time.sleep(24 * 3600)
    elif fault.action == "nan":
        return math.nan
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGTERM)
    return 1.0
