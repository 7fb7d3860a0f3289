"""Meters and the progress line of a loop."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train_utils.activity import waiting
from train_utils.collectives import get_world_size, sum_over_ranks
from train_utils.device import fp64_device, peak_memory
from train_utils.log import get_logger

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Number = float | int | Tensor


class SmoothedValue:
    """A series of numbers, summed up over a window and over everything seen.

    `fmt` may use {median}, {avg} and {max} (of the last `window_size` values), {global_avg} (of
    all) and {value} (the last). Without values every figure is nan.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.window: deque[float] = deque(maxlen=window_size)
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"
        self.total, self.count = 0.0, 0

    def update(self, value: Number, n: int = 1) -> None:
        """Add a value that stands for `n` samples."""
        number = float(value)
        self.window.append(number)
        self.total += number * n
        self.count += n

    def synchronize_between_processes(self) -> None:
        """Sum count and total over ranks; the window stays this process's own."""
        count, self.total = sum_over_ranks([self.count, self.total])
        self.count = int(count)

    @property
    def median(self) -> float:
        return median(self.window) if self.window else math.nan

    @property
    def avg(self) -> float:
        return sum(self.window) / len(self.window) if self.window else math.nan

    @property
    def global_avg(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def max(self) -> float:
        return max(self.window, default=math.nan)

    @property
    def value(self) -> float:
        return self.window[-1] if self.window else math.nan

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median,
            avg=self.avg,
            global_avg=self.global_avg,
            max=self.max,
            value=self.value,
        )


class MetricLogger:
    """Named meters, and a progress line every `print_freq` steps.

    Values that are tensors stay on their device until a line is printed: one transfer (and with
    `reduce=True` one collective, which makes every value its mean over ranks) then brings over all
    steps since the last line. `on_values(step, {name: value})` receives each step's values as they
    arrive on the host, e.g. for TensorBoard.
    """

    def __init__(
        self,
        delimiter: str = "  ",
        reduce: bool = False,
        on_values: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.delimiter = delimiter
        self.reduce, self.on_values = reduce, on_values
        self.images, self.seconds = 0, 0.0  # of the loop that `log_every` runs
        self._meters: dict[str, SmoothedValue] = {}
        self._pending: list[tuple[int, int, dict[str, Number]]] = []
        self._steps = 0

    @property
    def meters(self) -> dict[str, SmoothedValue]:
        """All meters by name, with every pending value read."""
        self.flush()
        return self._meters

    @property
    def is_read(self) -> bool:
        """Whether no value is pending."""
        return not self._pending

    @property
    def read(self) -> dict[str, SmoothedValue]:
        """All meters by name, as far as they have been read from the device."""
        return self._meters

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self._meters[name] = meter

    def update(self, n: int = 1, /, **values: Number) -> None:
        """Add one step's values (numbers, or one-element tensors on any device) for `n` samples."""
        self._pending.append((self._steps, n, values))
        self._steps += 1

    def __getattr__(self, name: str) -> SmoothedValue:
        if not name.startswith("_") and name in self.meters:
            return self._meters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or meter '{name}'")

    def flush(self) -> None:
        """Bring all pending values to the host and into their meters."""
        pending, self._pending = self._pending, []
        tensors = [v for *_, values in pending for v in values.values() if isinstance(v, Tensor)]
        numbers = iter(self._fetch(tensors))
        for step, n, values in pending:
            row = {k: next(numbers) if isinstance(v, Tensor) else v for k, v in values.items()}
            for name, value in row.items():
                self._meters.setdefault(name, SmoothedValue()).update(value, n)
            if self.on_values:
                self.on_values(step, row)

    def _fetch(self, tensors: list[Tensor]) -> list[float]:
        if not tensors:
            return []
        stacked = torch.stack([tensor.detach().reshape(()).float() for tensor in tensors])
        stacked = stacked.to(fp64_device(stacked.device)).double()
        if self.reduce and get_world_size() > 1:
            with waiting("averaging the losses"):
                dist.all_reduce(stacked)
                # On a GPU the sum is only queued: it is here that the host waits for the others.
                return (stacked / get_world_size()).tolist()
        return stacked.tolist()

    def synchronize_between_processes(self) -> None:
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def state_dict(self) -> dict[str, list[float]]:
        """Totals of the loss meters, so that an epoch's means survive a restart in its middle."""
        return {name: [meter.total, meter.count] for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        for name, (total, count) in state.items():
            meter = self._meters.setdefault(name, SmoothedValue())
            meter.total, meter.count = total, int(count)

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def log_every(
        self, iterable: Iterable, print_freq: int, header: str | None = None, start: int = 0
    ) -> Iterator[Any]:
        """Yield the items of a sized iterable and print a line every `print_freq` of them.

        `start` is the number of steps done before (a resumed epoch). Raise `self.images` by the
        images of each step to have images/s printed. `self.seconds` is what the loop has taken.
        """
        header, total = header or "", start + len(iterable)  # type: ignore[arg-type]
        timer = _Timer()
        for step, item in enumerate(iterable, start):
            timer.loaded()
            yield item
            timer.stepped()
            if (step + 1) % print_freq == 0 or step == start or step + 1 == total:
                self._print_line(header, step + 1, total, timer)
        self.flush()
        self.seconds = seconds = timer.elapsed()
        steps = max(1, total - start)
        get_logger().info(
            f"{header} total time: {_clock(seconds)} ({seconds / steps:.4f} s / it)".strip()
        )

    def _print_line(self, header: str, step: int, total: int, timer: "_Timer") -> None:
        self.flush()  # first: this is where the host waits for the device
        timer.flushed()
        fields = [header, f"[{step:>{len(str(total))}}/{total}]"]
        fields += [f"eta: {_clock(timer.step.avg * (total - step))}", str(self)]
        fields += [f"time: {timer.step.avg:.4f}", f"data: {timer.data.avg:.4f}"]
        if self.images:
            fields.append(f"img/s: {self.images / timer.elapsed():.1f}")
        fields.append(f"max mem: {peak_memory_mb():.0f} MB")
        get_logger().info(self.delimiter.join(field for field in fields if field))


class _Timer:
    """Wall time per step and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self.step, self.data = SmoothedValue(), SmoothedValue()
        self.start = self.last = self.line = time.monotonic()
        self.steps = 0

    def loaded(self) -> None:
        self.data.update(time.monotonic() - self.last)

    def stepped(self) -> None:
        self.last = time.monotonic()
        self.steps += 1

    def flushed(self) -> None:
        # Steps are only queued on a GPU, so a single step's host time says little: the time between
        # two flushes, shared out over its steps, says all.
        now = time.monotonic()
        for _ in range(self.steps):
            self.step.update((now - self.line) / self.steps)
        self.last = self.line = now
        self.steps = 0

    def elapsed(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)


def peak_memory_mb() -> float:
    """Peak memory of the current GPU's allocator, or of this process without a GPU, in MB."""
    if (held := peak_memory()) is not None:
        return held / 2**20
    if resource is None:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds))) if math.isfinite(seconds) else "?"
