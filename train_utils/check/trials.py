"""Steps of the training loop on copies: nothing that a training uses changes by them."""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.data import generators_kept
from train_utils.metric_logger import MetricLogger
from train_utils.nonfinite import NonfiniteError
from train_utils.setup import step_options
from train_utils.task import BaseTask
from train_utils.train_and_eval import (
    Batch,
    EpochRun,
    Models,
    Progress,
    learning_rates,
    train_one_epoch,
)

Factor = Callable[[int], float]  # step → what the recipe's learning rates are multiplied by


@dataclass
class Steps:
    """What some steps gave, step by step: of the first network its learning rate and its loss.

    seconds: of a step without the wait for its batches, which `waited` has. problem: what was said
    of a loss or gradient that became NaN or infinite, which ends the steps.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    problem: str = ""


class Trial:
    """Copies of networks, with optimizers of their own, that the training loop itself trains."""

    def __init__(
        self, task: BaseTask, networks: Models, device: torch.device, accumulate: int = 1
    ) -> None:
        self.task, self.device = task, device
        self.networks = copy.deepcopy(dict(networks))
        self.optimizers = task.build_optimizers(self.networks)
        amp_dtype = choose_amp_dtype(task.cfg.train.amp, device)
        self.scalers = {name: make_scaler(amp_dtype, device) for name in self.optimizers}
        options = step_options(task.cfg.train, amp_dtype, accumulate, {})
        self.options = replace(options, on_nonfinite="stop")
        self.rate = learning_rates(self.optimizers)["lr"]  # the recipe's, of the first network

    def take(
        self,
        batches: Iterable[Batch],
        seconds: float,
        factor: Factor | None = None,
        enough: Callable[[Steps], bool] = lambda steps: False,
    ) -> Steps:
        """Steps on sized batches, until they end, the time is over or `enough` of them says so."""
        watch = _Watch(_Timed(batches), time.monotonic() + seconds, enough)
        schedulers = {
            name: LambdaLR(optimizer, factor)
            for name, optimizer in self.optimizers.items()
            if factor
        }
        try:
            train_one_epoch(
                self.networks,
                self.optimizers,
                watch.batches,  # type: ignore[arg-type]
                self.device,
                0,
                schedulers,
                sys.maxsize,
                self.scalers,
                losses=self.task.losses,
                weight=self.task.weight,
                options=self.options,
                run=watch,
            )
        except NonfiniteError as error:
            watch.steps.problem = str(error)
        return watch.steps


class _Timed:
    """Sized batches, and the time that has been waited for those of the present step."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.waited = batches, 0.0

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.batches)
        for _ in range(len(self)):
            start = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - start
            yield batch


class _Silent(MetricLogger):
    """Meters without a line."""

    def log_every(
        self, iterable: Iterable, print_freq: int, header: str | None = None, start: int = 0
    ) -> Iterator[Any]:
        return iter(iterable)


class _Watch(EpochRun):
    """Notes every step, and ends them."""

    def __init__(self, batches: _Timed, end: float, enough: Callable[[Steps], bool]) -> None:
        super().__init__(_Silent(on_values=self._note))
        self.batches, self.end, self.enough = batches, end, enough
        self.steps, self._last = Steps(), time.monotonic()

    def _note(self, _: int, values: dict[str, float]) -> None:
        self.steps.rates.append(values["lr"])
        self.steps.losses.append(values["loss"])

    def after_step(self, progress: Progress) -> None:
        progress.logger.flush()  # here the host waits for the device
        now = time.monotonic()
        self.steps.waited.append(self.batches.waited)
        self.steps.seconds.append(now - self._last - self.batches.waited)
        self.batches.waited, self._last = 0.0, now

    def stop_requested(self) -> bool:
        """Asked before a step, which is taken all the same: one more must not last too long."""
        each = max(map(sum, zip(self.steps.seconds, self.steps.waited, strict=True)), default=0.0)
        return time.monotonic() + 2 * each > self.end or self.enough(self.steps)


class Epochs:
    """The first `count` batches of a training, epoch after epoch."""

    def __init__(self, loader: DataLoader, count: int) -> None:
        self.loader, self.count = loader, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        sampler: Any = self.loader.batch_sampler
        epoch, left = 0, self.count
        while left > 0:
            sampler.set_position(epoch)
            for batch in self.loader:
                yield batch
                left -= 1
                if not left:
                    break
            epoch += 1


def cut(batch: Batch, images: int) -> Batch:
    """So many images of a batch, from the first on; again from there if it has fewer."""
    indices = torch.arange(images) % len(batch[0])
    return tuple(part[indices] if isinstance(part, Tensor) else part for part in batch)


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Put all random generators back after a block, those of the device too."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    state = module and module.get_rng_state()
    with generators_kept():
        try:
            yield
        finally:
            if module:
                module.set_rng_state(state)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
