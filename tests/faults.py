"""Failures on order, in functions of the product that know nothing of them.

    TEST_FAULT=step:kill@7             SIGKILL to this process before its 7th step
    TEST_FAULT=load:raise@3:rank=1     an error where rank 1 loads its 3rd sample
    TEST_FAULT=step:hang@5,save.write:kill@2

A place is reached when the code passes it; the number counts that for each process by itself (1 if
left out). `:rank=R` means one rank only, and `:start=N` the N-th restart by torchrun: a fault
without it comes in the first start only, so that a restart shows recovery.

Whoever starts a script calls `install` first: tests/distributed.py, or tests/struck.py where the
launch is a real one. A loader's workers have the faults of their script where they are forked from
it. A test must see that its fault struck.
"""

import functools
import math
import os
import pkgutil
import re
import signal
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

from torch import Tensor

from train_utils.errors import UserError

VARIABLE = "TEST_FAULT"
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
                f"{VARIABLE}={item}: not PLACE:ACTION[@N][:rank=R][:start=N] with a place of "
                f"{', '.join(PLACES)} and an action of {', '.join(ACTIONS)}. Mend it or unset it."
            )
        rank = int(match["rank"]) if match["rank"] else None
        time, start = int(match["time"] or 1), int(match["start"] or 0)
        faults.append(Fault(match["place"], match["action"], time, rank, start))
    return tuple(faults)


def install(text: str, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Wrap the product's functions so that the faults that `text` names happen in this process.

    put: monkeypatch.setattr where the process goes on without them. Raises AttributeError where the
    product has no function of that name any more, and UserError as `parse` does.
    """
    ordered = _Ordered(parse(text))
    wrappers = {
        (name, function): (wrap, fault.place)
        for fault in ordered.faults
        for name, function, wrap in PLACES[fault.place]
    }
    for (owner_name, name), (wrap, place) in wrappers.items():
        owner = pkgutil.resolve_name(owner_name)
        function = getattr(owner, name)
        put(owner, name, functools.wraps(function)(wrap(function, ordered, place)))


class _Ordered:
    """The faults ordered for one process, which counts how often it reaches their places."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.faults = faults
        self.spoil = 1.0  # what the step's losses are multiplied by before their backward pass
        self._times = {place: count(1) for place in PLACES}  # evaluation takes them from threads

    def reach(self, place: str) -> float:
        """Let the faults ordered for `place` happen; nan if one wants a value spoilt, else 1."""
        start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        rank, factor = int(os.environ.get("RANK", 0)), 1.0
        here = place, next(self._times[place]), start
        for fault in self.faults:
            if (fault.place, fault.time, fault.start) == here and fault.rank in (None, rank):
                factor *= _happen(fault)
        return factor


def _happen(fault: Fault) -> float:
    if fault.action == "raise":
        raise UserError(f"{VARIABLE}: {fault.place}, as ordered")
    if fault.action == "hang":
        time.sleep(24 * 3600)
    elif fault.action == "nan":
        return math.nan
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGTERM)
    return 1.0


# -- wrappers: (the product's function, what is ordered, the place) → what is called instead -------


def _before(function: Callable, ordered: _Ordered, place: str) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        ordered.reach(place)
        return function(*args, **kwargs)

    return call


def _after(function: Callable, ordered: _Ordered, place: str) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        ordered.reach(place)
        return result

    return call


def _halfway(save: Callable, ordered: _Ordered, place: str) -> Callable:
    def call(state: Any, file: IO[bytes]) -> None:
        save(state, _HalfwayFile(file, _size(state), lambda: ordered.reach(place)))

    return call


def _before_the_last(replace: Callable, ordered: _Ordered, place: str) -> Callable:
    def call(source: Any, target: Any) -> Any:
        if Path(target).name == "last.pth":  # not the files that are linked to it
            ordered.reach(place)
        return replace(source, target)

    return call


def _spoilt_gradients(spoilt_if_nonfinite: Callable, ordered: _Ordered, place: str) -> Callable:
    def call(loss: Tensor) -> Tensor:
        return spoilt_if_nonfinite(loss) * ordered.spoil

    return call


def _spoilt_losses(gradients: Callable, ordered: _Ordered, place: str) -> Callable:
    def call(step: Any, synchronise: bool = True) -> dict[str, Tensor]:
        if not synchronise:  # once more, to find whose gradients were spoilt
            return gradients(step, synchronise)
        spoilt_loss = ordered.reach("loss")
        ordered.spoil = spoilt_loss * ordered.reach("gradient")
        return {name: loss * spoilt_loss for name, loss in gradients(step).items()}

    return call


class _HalfwayFile:
    """Passes a checkpoint of about `size` bytes on, and calls a function when half is written."""

    def __init__(self, file: IO[bytes], size: int, reach: Callable[[], object]) -> None:
        self.file, self.until_half, self.reach = file, size // 2, reach

    def write(self, data: memoryview) -> None:
        if 0 <= self.until_half < len(data):
            self.file.write(data[: self.until_half])
            self.file.flush()
            self.reach()
            self.file.write(data[self.until_half :])
        else:
            self.file.write(data)
        self.until_half -= len(data)

    def flush(self) -> None:
        self.file.flush()


def _size(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


_LOOP, _CHECKPOINT = "train_utils.train_and_eval", "train_utils.checkpoint"
_SPOILT = (
    (f"{_LOOP}:_Step", "_gradients", _spoilt_losses),
    (_LOOP, "spoilt_if_nonfinite", _spoilt_gradients),
)
# Where each place is: the owners of functions, their names, and what is wrapped around them.
PLACES = {
    # before the samples of a step are trained on
    "step": ((f"{_LOOP}:_Step", "take", _before),),
    # before a training or validation sample is read
    "load": (("train_utils.data:KeyedDataset", "_keyed", _before),),
    # before validation samples, or those of a sheet of predictions, go through the network
    "evaluate": ((_LOOP, "forward_chunk", _before),),
    # when a checkpoint is half written
    "save.write": (("torch", "save", _halfway),),
    # before a whole checkpoint takes the old one's name, last.pth
    "save.replace": (("pathlib:Path", "replace", _before_the_last),),
    # after it has
    "saved": ((_CHECKPOINT, "save_checkpoint", _after),),
    # spoils the losses of the step, and so its gradients
    "loss": _SPOILT,
    # spoils the gradients alone
    "gradient": _SPOILT,
}
