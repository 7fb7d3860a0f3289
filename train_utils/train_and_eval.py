"""The training loop and the evaluation loop that every task and both launchers share.

A loss is the mean over the batch it is given, as in every textbook. What a step averages over is
more than one such batch: its parts (`accumulate`), shared out over processes, some of them smaller
than others or empty. So the loop weighs each part's means by its share of the whole step.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from train_utils.activity import LOADING, set_activity, waiting
from train_utils.collectives import broadcast_tensors, get_rank, sum_over_ranks
from train_utils.data import sample_names, stable_seed
from train_utils.device import fp64_device
from train_utils.distributed_utils import no_sync, unwrap
from train_utils.ema import ExponentialMovingAverage
from train_utils.errors import UserError, described, memory_errors, shortened
from train_utils.inference import (
    GPU_CHUNK,
    SPARE_MEMORY,
    chunk_size,
    forward_chunk,
    in_order,
    prepare,
)
from train_utils.losses import criterion
from train_utils.metric_logger import MetricLogger, SmoothedValue
from train_utils.metrics import ExactMetric, F1Score, MeanAbsoluteError, reduce_metrics
from train_utils.nonfinite import (
    HOW_TO_LOG,
    HOW_TO_TAME,
    NonfiniteError,
    NonfiniteGuard,
    OnNonfinite,
    nonfinite_gradients,
    spoilt_if_nonfinite,
)
from train_utils.normalize import normalize_images

Models = Mapping[str, nn.Module]
Batch = tuple[Any, ...]
# (models, batch) → means over the batch by name; or (network, means), one network after the other.
Losses = Mapping[str, Tensor | float]
LossFunction = Callable[[Models, Batch], Losses | Iterable[tuple[str, Losses]]]
# batch → what its means stand for, instead of its number of images; one number, or one by loss.
Weight = Callable[[Batch], float | Mapping[str, float]]


@dataclass(frozen=True)
class StepOptions:
    """How a step is taken, whatever the task.

    amp_dtype: autocast to it (None: fp32, or fp16 where a GradScaler is given). accumulate:
    micro-batches per optimizer step. clip_norm, clip_value: gradient clipping. seed: reseed dropout
    by (seed, step, rank) in every step. ema: moving averages by network. on_nonfinite: what to do
    when a loss or gradient of any process is NaN or infinite: stop, or skip the step.
    """

    amp_dtype: torch.dtype | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    seed: int | None = None
    ema: Mapping[str, ExponentialMovingAverage] | None = None
    on_nonfinite: OnNonfinite = "stop"


class Progress(NamedTuple):
    """Where a training loop stands: `step` steps of the epoch are done; `stop` on all ranks.

    `read_values()` reads all values from the device, and raises UserError if any is not finite: to
    be called, on all ranks, before the state is saved.
    """

    epoch: int
    step: int
    logger: MetricLogger
    stop: bool
    read_values: Callable[[], None]


class EpochRun:
    """What goes on beside an epoch's steps: nothing, but in a run that saves and stops.

    start_step: optimizer steps of this epoch that were done before a restart.
    """

    def __init__(self, logger: MetricLogger | None = None, start_step: int = 0) -> None:
        self.logger, self.start_step = logger or MetricLogger(reduce=True), start_step

    def after_step(self, progress: Progress) -> None:
        """Called after every optimizer step, on all ranks."""

    def stop_requested(self) -> bool:
        """Whether this rank is to stop; once it is true on any, all end after the same step."""
        return False


def default_losses(models: Models, batch: Batch) -> Losses:
    """`criterion` of the one network on images and target, as users of the recipe know it."""
    images, target = batch
    (network,) = models.values()
    return {"loss": criterion(network(normalize_images(images)), target)}


def train_one_epoch(
    model: nn.Module | Models,
    optimizer: Optimizer | Mapping[str, Optimizer],
    data_loader: DataLoader,
    device: torch.device | str,
    epoch: int,
    lr_scheduler: Any,
    print_freq: int = 10,
    scaler: Any = None,
    *,
    losses: LossFunction = default_losses,
    weight: Weight | None = None,
    options: StepOptions = StepOptions(),
    run: EpochRun | None = None,
) -> tuple[float, float]:
    """Train for one epoch; returns (mean loss, last learning rate).

    Several networks: dicts with the same keys as `model`, `optimizer`, `lr_scheduler` and `scaler`.
    losses, weight: see `train_utils.task.Task`. Raises UserError, on all ranks alike, when a loss
    or a gradient is not finite, unless that is to be skipped, and when the memory does not suffice.
    """
    run = run or EpochRun()
    batches = StepBatches(data_loader, options.accumulate, epoch, run.start_step)
    by_name = _by_name(model), _by_name(optimizer), _by_name(lr_scheduler), _by_name(scaler)
    step = _Step(*by_name, torch.device(device), losses, weight, options, run.logger, batches)
    steps = run.logger.log_every(batches, print_freq, f"Epoch: [{epoch}]", run.start_step)
    for number, parts in enumerate(steps, run.start_step):
        stop = step.take(number, parts, run.stop_requested)
        run.after_step(Progress(epoch, number + 1, run.logger, stop, step.read_values))
        if stop:
            break
    step.read_values()
    means = mean_losses(run.logger)
    return next(iter(means.values()), math.nan), run.logger.read["lr"].value


def mean_losses(logger: MetricLogger) -> dict[str, float]:
    """An epoch's mean of every loss, by name."""
    return {
        name: meter.global_avg
        for name, meter in logger.meters.items()
        if name not in ("lr", "skipped") and not name.startswith("lr_")
    }


def learning_rates(optimizers: Mapping[str, Optimizer]) -> dict[str, float]:
    """The first network's as `lr`, any other's as lr_<network>."""
    rates = {f"lr_{name}": each.param_groups[0]["lr"] for name, each in optimizers.items()}
    first = next(iter(rates))
    return {"lr": rates.pop(first), **rates}


class StepBatches:
    """A loader's batches in groups of `size`, one for each step; the last may be smaller."""

    def __init__(self, loader: Iterable, size: int, epoch: int, start_step: int) -> None:
        self.loader, self.size = loader, size
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return -(-len(self.loader) // self.size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Batch]]:
        group, step, batches = [], self.start_step, len(self.loader)  # type: ignore[arg-type]
        self._note(step)
        for number, batch in enumerate(self.loader, 1):
            group.append(batch)
            if len(group) == self.size:
                yield group
                group, step = [], step + 1
            if number < batches:
                self._note(step)
        if group:
            yield group

    def _note(self, step: int) -> None:
        what = LOADING if getattr(self.loader, "num_workers", 0) else "loading"
        name = f"{what}: images of epoch {self.epoch}, step {step + 1}"
        set_activity(name, lambda: ", ".join(self.names(step)))

    def where(self, step: int) -> str:
        return f"epoch {self.epoch}, step {step + 1} of {self.steps}"

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole epoch."""
        return self.start_step + len(self)

    def names(self, step: int) -> list[str]:
        """The samples of a step on this process."""
        return sample_names(self.loader, step)


# -- one step -------------------------------------------------------------------------------------

_ANY = ""  # stands for all losses that have no weight of their own


def weights_of(weight: Weight | None, batch: Batch) -> dict[str, float]:
    """What a batch's means stand for: of the losses by name, and of all others together."""
    images = float(len(batch[0]))
    given = images if weight is None else weight(batch)
    return {_ANY: images, **given} if isinstance(given, Mapping) else {_ANY: float(given)}


def shares_of_step(
    parts: Sequence[Batch], weight: Weight | None, stop: bool
) -> tuple[list[dict[str, float]], int, bool]:
    """The parts' shares in a step, its number of images, and whether to stop, on all ranks.

    One sum of host numbers. DistributedDataParallel averages gradients over ranks, and the logger
    averages values: hence shares are multiplied by the number of ranks.
    """
    each = [weights_of(weight, batch) for batch in parts]
    local = [sum(weights[name] for weights in each) for name in each[0]]
    shown = sum(len(batch[0]) for batch in parts)
    *totals, images, stops, world = sum_over_ranks([*local, shown, stop, 1])
    sums = dict(zip(each[0], totals, strict=True))
    shares = [
        {name: world * w / sums[name] if sums[name] else 0.0 for name, w in weights.items()}
        for weights in each
    ]
    return shares, int(images), stops > 0


def losses_by_network(
    losses: LossFunction, models: Models, batch: Batch, first: str
) -> Iterator[tuple[str, Losses]]:
    """(network, means), one after the other; a dict alone is of the `first` network.

    Raises UserError for what is neither.
    """
    found: Any = losses(models, batch)
    form = "Return a dict of means by name, or yield (network, such a dict)."
    if isinstance(found, Mapping):
        found = [(first, found)]
    elif not isinstance(found, Iterable) or isinstance(found, Tensor):
        raise UserError(f"losses: {described(found)}. {form}")
    for pair in found:
        is_pair = isinstance(pair, tuple) and len(pair) == 2
        if not is_pair or pair[0] not in models or not isinstance(pair[1], Mapping):
            got = f"({pair[0]!r}, {described(pair[1])})" if is_pair else described(pair)
            raise UserError(f"losses: yields {got}. {form} Networks: {', '.join(models)}.")
        yield pair


def means_on(device: torch.device, given: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """Losses and scalars by name as tensors; UserError for what is no single number."""
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dim():
            raise UserError(f"losses: {name!r} has the shape {list(value.shape)}. Give its mean().")
        if not isinstance(value, (Tensor, float, int)):
            raise UserError(
                f"losses: {name!r} is a {type(value).__name__}. Give a tensor of no dimensions, or "
                "a number to be logged."
            )
    trained = [n for n, value in given.items() if getattr(value, "requires_grad", False)]
    for name in given:
        if (name == "loss" and trained[1:]) or name in ("lr", "skipped") or name.startswith("lr_"):
            raise UserError(f"losses: {name!r} is a column of the log already. Use another name.")
    return {name: torch.as_tensor(value, device=device) for name, value in given.items()}


def weighed(
    means: Mapping[str, Tensor],
    shares: Mapping[str, float],
    images: int,
    outputs: Sequence[Tensor],
    is_first: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of a network's losses that have a gradient, and what is logged of all by name.

    Each mean counts by its share, at least in fp32. One without a share counts as 0, with gradients
    of 0 in all layers, where the backward pass meets those of other processes. Where it is 0/0, as
    all pixels are ignored, so may its gradients be: the network's `outputs`, times 0, then stand
    for it. The first network's sum is logged as `loss`, beside its terms if they are several.
    """
    trained = [name for name, mean in means.items() if mean.requires_grad]
    if not trained:
        raise UserError(
            f"no loss has a gradient ({', '.join(means) or 'there is none'}). Return one that is "
            "computed from the network's output and not detached."
        )
    values, terms = {}, []
    for name, mean in means.items():
        share = shares.get(name, shares[_ANY])
        mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
        if not share and images and outputs and not mean.isfinite():
            terms += [output.sum() * 0 for output in outputs]
            mean = mean.new_zeros(())
        elif not share:
            mean = mean.nan_to_num(0.0, 0.0, 0.0)  # of no image, which has no gradients to spoil
        values[name] = mean if share == 1 else mean * share
    terms += [values[name] for name in trained]
    total = torch.stack(terms).sum() if terms[1:] else terms[0]
    if is_first and "loss" not in means:
        kept = {name: value for name, value in values.items() if trained[1:] or name != trained[0]}
        return total, {"loss": total, **kept}
    return total, values


@contextmanager
def outputs_of(models: Models, needed: Any) -> Iterator[dict[str, list[Tensor]]]:
    """What the networks return in a block, by network, where that is needed."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in models}

    def keep(name: str, output: Any) -> None:
        found = output.values() if isinstance(output, Mapping) else output
        found = [output] if isinstance(output, Tensor) else found
        outputs[name] += [x for x in found if isinstance(x, Tensor) and x.requires_grad]

    hooks = [
        model.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, model in models.items()
        if needed
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Step:
    """Optimizer steps: the parts of each one forward and backward, then the updates."""

    models: Models
    optimizers: Mapping[str, Optimizer]
    schedulers: Mapping[str, Any]
    scalers: Mapping[str, Any]
    device: torch.device
    losses: LossFunction
    weight: Weight | None
    options: StepOptions
    logger: MetricLogger
    batches: StepBatches

    def __post_init__(self) -> None:
        # A disabled scaler passes everything through: one loop serves all precisions.
        off = torch.amp.GradScaler(self.device.type, enabled=False)
        self.scalers = {name: self.scalers.get(name) or off for name in self.optimizers}
        scaled = any(scaler.is_enabled() for scaler in self.scalers.values())
        self.amp_dtype = self.options.amp_dtype or (torch.float16 if scaled else None)
        about = self.models, self.batches.where, self.batches.names
        self.guard = NonfiniteGuard(self.options.on_nonfinite, self.device, scaled, *about)
        self._checked = False
        self.only_logged: set[str] = set()
        for network in self.models.values():
            network.train()
        for name in learning_rates(self.optimizers):
            self.logger.add_meter(name, SmoothedValue(window_size=1, fmt="{value:.6f}"))

    def take(self, number: int, parts: Sequence[Batch], stop_requested: Callable[[], bool]) -> bool:
        """Take the epoch's step `number`; returns whether any rank is to stop."""
        set_activity(self.batches.where(number))  # first: what reading waits for is no loader
        if self.logger.is_read:
            self.read_values()
        shares, images, stop = shares_of_step(parts, self.weight, stop_requested())
        self._parts = list(zip(parts, shares, strict=True))
        self._steps_before = self.batches.epoch * self.batches.steps + number
        rates = learning_rates(self.optimizers)
        self.guard.keep_buffers()
        losses = self._gradients()
        if not self._checked:
            self._refuse_unused_parameters()
        if skipped := self.guard.found(number, losses, self.only_logged):
            self.guard.stop_or_skip(number, losses, self._own_bad_gradients())
        self._update(skipped)
        self.logger.images += images
        if self.options.on_nonfinite == "skip":
            rates["skipped"] = float(skipped)
        self.logger.update(images, **({} if skipped else losses), **rates)
        return stop

    def read_values(self) -> None:
        """Read all values from the device; UserError if any is not finite."""
        self.logger.flush()
        self.guard.review()
        meters = self.logger.read.items()
        if bad := [name for name, meter in meters if not math.isfinite(meter.total)]:
            advice = HOW_TO_LOG if self.only_logged.issuperset(bad) else HOW_TO_TAME
            raise NonfiniteError(
                f"epoch {self.batches.epoch}: {', '.join(bad)} became NaN or infinite. {advice}"
            )

    def _gradients(self, synchronise: bool = True) -> dict[str, Tensor]:
        """Gradients of the whole step; returns its losses by name."""
        if self.options.seed is not None:
            torch.manual_seed(stable_seed(self.options.seed, self._steps_before, get_rank()))
        total: dict[str, Tensor] = {}
        for number, (batch, shares) in enumerate(self._parts, 1):
            with ExitStack() as stack:
                if number < len(self._parts) or not synchronise:
                    for model in self.models.values():
                        stack.enter_context(no_sync(model))
                losses = self._forward_backward(batch, shares)
            for name, loss in losses.items():
                total[name] = total[name] + loss if name in total else loss
        return total

    def _own_bad_gradients(self) -> int:
        """How many gradients are not finite in this process's own part of the step."""
        self._forget_gradients()
        self._gradients(synchronise=False)
        with waiting("gradients of this process alone"):  # batch norm may be over all of them
            bad = int(nonfinite_gradients(self.models.values()))
        self._forget_gradients()
        return bad

    def _forward_backward(self, batch: Batch, shares: Mapping[str, float]) -> dict[str, Tensor]:
        """Add the gradients of one part; returns its losses by name, times its shares."""
        images, first = len(batch[0]), next(iter(self.optimizers))
        logged: dict[str, Tensor] = {}
        with (
            memory_errors(f"in a forward pass of {images} images", _smaller_batches(images)),
            outputs_of(self.models, needed=images and not all(shares.values())) as outputs,
        ):
            batch = to_device(batch, self.device)
            with torch.autocast(self.device.type, self.amp_dtype, enabled=bool(self.amp_dtype)):
                for network, given in losses_by_network(self.losses, self.models, batch, first):
                    made = outputs[network]
                    means = means_on(self.device, given)
                    self.only_logged |= {n for n, mean in means.items() if not mean.requires_grad}
                    total, values = weighed(means, shares, images, made, network == first)
                    total = spoilt_if_nonfinite(total)
                    # Here data-parallel processes wait for each other's gradients.
                    with (
                        torch.autocast(self.device.type, enabled=False),
                        waiting(f"gradients of {network}"),
                    ):
                        self.scalers[network].scale(total).backward()
                    for made in outputs.values():  # their graphs are gone
                        made.clear()
                    logged |= {name: value.detach() for name, value in values.items()}
        return logged

    def _update(self, skip: bool) -> None:
        """Step all optimizers, unless told to skip that, and what follows the steps."""
        images = max(len(batch[0]) for batch, _ in self._parts)
        for name, optimizer in self.optimizers.items():
            if not skip:  # the first step makes the optimizer's state
                with memory_errors("in an optimizer's step", _smaller_batches(images)):
                    self._clip(name)
                    self.scalers[name].step(optimizer)
                    self.scalers[name].update()
            optimizer.zero_grad(set_to_none=True)
            if name in self.schedulers:
                self.schedulers[name].step()
            if self.options.ema and not skip:
                self.options.ema[name].update(unwrap(self.models[name]))

    def _clip(self, name: str) -> None:
        model, options = self.models[name], self.options
        if options.clip_value or options.clip_norm:
            self.scalers[name].unscale_(self.optimizers[name])
        if options.clip_value:
            nn.utils.clip_grad_value_(model.parameters(), options.clip_value)
        if options.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)

    def _refuse_unused_parameters(self) -> None:
        """Data-parallel networks need all gradients; torch's own error names no parameter."""
        self._checked = True
        unused = [
            f"{network}.{name}"
            for network, model in self.models.items()
            if isinstance(model, DistributedDataParallel)
            for name, parameter in unwrap(model).named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if unused:
            raise UserError(
                f"{shortened(unused)}: no loss depends on these parameters, which "
                "several processes cannot train. Use them in a loss, or freeze them by "
                "requires_grad_(False)."
            )

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)


def _smaller_batches(images: int) -> str:
    half = f"-b {max(1, images // 2)} and twice train.accumulate"
    return f"use a smaller --batch-size (the same global batch: {half}), or smaller images"


def _by_name(value: Any) -> dict[str, Any]:
    """A dict as it is; a single network (optimizer, …) under the name `model`."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"model": value}


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors in nested tuples, lists and dicts, without waiting for the copies."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(item, device) for item in batch]
    return batch


# -- evaluation -----------------------------------------------------------------------------------


_MAX_WAITING = 2 * GPU_CHUNK  # images kept back in the hope of others of their size

# Images of one size with their places in the loader's order and their targets.
_Chunk = list[tuple[int, Tensor, Tensor]]


class StoppedMidway(Exception):
    """Training or an evaluation ends early, on all processes, as one of them was asked to stop."""


class Sample(NamedTuple):
    """One evaluated sample, kept for pictures (tensors on the CPU)."""

    image: Tensor
    target: Tensor
    prediction: Tensor


_Scored = tuple[int, list[Tensor], Sample | None]


def default_predict(models: Models, images: Tensor) -> Tensor:
    """What the one network makes of uint8 or normalised images [B, 3, H, W], in fp32."""
    (network,) = models.values()
    return network(normalize_images(images)).float()


def evaluate(
    model: nn.Module | Models,
    data_loader: DataLoader,
    device: torch.device | str,
    *,
    metrics: Sequence[ExactMetric] | None = None,
    predict: Callable[[Models, Tensor], Tensor] = default_predict,
    keep: int = 0,
    samples: list[Sample] | None = None,
    stop_requested: Callable[[], bool] | None = None,
    amp_dtype: torch.dtype | None = None,
) -> tuple[ExactMetric, ...]:
    """Score a network on a loader's samples; returns the metrics, (MAE, maxF1) unless given others.

    What runs is a copy of the network made for inference, in `amp_dtype`; its own modes stay. Every
    rank passes the loader of its own share; each sample must be in one share only. The metrics come
    back reduced over all ranks, with the same bits for any number of ranks, threads and images per
    batch on CPUs. The first `keep` samples of this rank are appended to `samples`.
    `stop_requested` is asked after every few images; raises StoppedMidway on all ranks once it has
    been true on any.
    """
    device = torch.device(device)
    metrics = (MeanAbsoluteError(), F1Score()) if metrics is None else tuple(metrics)
    models = {name: unwrap(network) for name, network in _by_name(model).items()}
    for network in models.values():
        # Batch norm's running statistics differ between ranks; rank 0's are those that are saved.
        broadcast_tensors(list(network.buffers()))
    with memory_errors("for a copy of the network", SPARE_MEMORY):
        models = prepare(models, device, amp_dtype)
    scoring = _Scoring(models, predict, metrics, device, keep)
    set_activity("evaluating")
    kept: dict[int, Sample] = {}
    done = 0
    for scored in scoring.results(data_loader):
        for number, states, sample in scored:
            for metric, state in zip(metrics, states, strict=True):
                metric.merge(state)
            if sample:
                kept[number] = sample
        done += len(scored)
        set_activity(f"evaluating, {done} images done")
        if stop_requested and stop_requested():
            break
    if reduce_metrics(metrics, stop=bool(stop_requested and stop_requested())):
        raise StoppedMidway
    if samples is not None:
        samples.extend(kept[number] for number in sorted(kept))
    return metrics


class _Scoring:
    """What an evaluation computes of chunks of images, and on which device and threads."""

    def __init__(
        self,
        models: Models,
        predict: Callable[[Models, Tensor], Tensor],
        metrics: Sequence[ExactMetric],
        device: torch.device,
        keep: int,
    ) -> None:
        self.predict, self.metrics, self.keep = partial(predict, models), metrics, keep
        self.device = device
        self.on_host = any(metric.on_host for metric in metrics)
        self.scored_on = torch.device("cpu") if self.on_host else fp64_device(device)
        for metric in metrics:
            metric.state = metric.state.to(self.scored_on)  # or each image's would come to the host

    def results(self, loader: Iterable) -> Iterator[list[_Scored]]:
        """Chunk by chunk, each image's number, metric states, and itself among the first `keep`."""
        chunks = _chunks(loader, self.device)
        if self.on_host:
            return in_order(self._forward, chunks, self.device, finish=self._score)
        return in_order(lambda chunk: self._score(self._forward(chunk)), chunks, self.device)

    def _forward(self, chunk: _Chunk) -> tuple[_Chunk, Tensor]:
        with self._memory_errors(chunk):
            # Stacked on the device: one by one, images in page-locked memory come without waiting.
            images = [image.to(self.device, non_blocking=True) for _, image, _ in chunk]
            outputs = forward_chunk(self.predict, torch.stack(images), self.device)
            return chunk, outputs.to(self.scored_on)

    def _score(self, predicted: tuple[_Chunk, Tensor]) -> list[_Scored]:
        scored: list[_Scored] = []
        with self._memory_errors(predicted[0]):
            for (number, image, target), output in zip(*predicted, strict=True):
                truth = target.to(self.scored_on, non_blocking=True)
                states = [metric.sample_state(output, truth) for metric in self.metrics]
                sample = Sample(image, target, output.cpu()) if number < self.keep else None
                scored.append((number, states, sample))
        return scored

    def _memory_errors(self, chunk: _Chunk) -> AbstractContextManager:
        size = "×".join(map(str, chunk[0][1].shape[-2:]))
        return memory_errors(f"evaluating {len(chunk)} images of {size}", SPARE_MEMORY)


def predict_samples(
    models: Models,
    items: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    predict: Callable[[Models, Tensor], Tensor],
    amp_dtype: torch.dtype | None = None,
) -> list[Sample]:
    """Predictions of a few (input, target) items, on this process alone: for pictures."""
    forward = partial(predict, prepare(models, device, amp_dtype))

    def one(item: tuple[Tensor, Tensor]) -> Sample:
        image, target = (tensor.as_subclass(Tensor) for tensor in item)
        output = forward_chunk(forward, image[None].to(device), device)
        return Sample(image, target, output[0].cpu())

    return list(in_order(one, items, device))


def _chunks(loader: Iterable, device: torch.device) -> Iterator[_Chunk]:
    """Regroup a loader's batches of any size into chunks of equally sized images.

    A chunk comes as soon as it is full, so chunks of several sizes overtake each other; when more
    than `_MAX_WAITING` images wait for others of their size, those go that wait the longest.
    """
    waiting: dict[torch.Size, _Chunk] = {}
    images = ((image, target) for batch in loader for image, target in zip(*batch, strict=True))
    for number, (image, target) in enumerate(images):
        waiting.setdefault(image.shape, []).append((number, image, target))
        if len(waiting[image.shape]) == chunk_size(device, image):
            yield waiting.pop(image.shape)
        elif sum(map(len, waiting.values())) > _MAX_WAITING:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()
