"""The training loop and the evaluation loop that every task and both launchers share."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from train_utils import faults
from train_utils.data import sample_names, stable_seed
from train_utils.device import fp64_device
from train_utils.distributed_utils import (
    broadcast_buffers,
    get_rank,
    no_sync,
    reduce_metrics,
    sum_over_ranks,
    unwrap,
)
from train_utils.ema import ExponentialMovingAverage
from train_utils.errors import UserError, memory_errors, shortened
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
from train_utils.metrics import ExactMetric, F1Score, MeanAbsoluteError
from train_utils.nonfinite import (
    HOW_TO_TAME,
    NonfiniteGuard,
    OnNonfinite,
    nonfinite_gradients,
    spoilt_if_nonfinite,
)
from train_utils.normalize import normalize_images
from train_utils.watch import LOADING, mark, waiting

Models = Mapping[str, nn.Module]
Batch = tuple[Any, ...]
Backward = Callable[[str, Tensor], None]
# (models, batch, counts, backward) → named losses. The step calls backward(network's name, loss).
TrainStep = Callable[[Models, Batch, dict[str, float], Backward], dict[str, Tensor]]


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

    `settle()` reads all values from the device, and raises UserError if any is not finite: to be
    called, on all ranks, before the state is saved.
    """

    epoch: int
    step: int
    logger: MetricLogger
    stop: bool
    settle: Callable[[], None]


def pixel_counts(batch: Batch) -> dict[str, float]:
    """What the losses of a batch average over; the loop sums it over parts and ranks."""
    return {"pixels": float(batch[1].numel())}


def saliency_step(
    models: Models,
    batch: Batch,
    counts: dict[str, float],
    backward: Backward,
    normalize: Callable[[Tensor], Tensor] = normalize_images,
) -> dict[str, Tensor]:
    """Deeply supervised binary cross-entropy of the one network `model`."""
    images, target = batch
    loss = criterion(models["model"](normalize(images)), target, counts["pixels"])
    backward("model", loss)
    return {"loss": loss.detach()}


def minimise_sum(terms: Mapping[str, Tensor], backward: Backward) -> dict[str, Tensor]:
    """Gradients of the sum of named loss terms of the network `model`; what is logged of them."""
    total = torch.stack(list(terms.values())).sum()
    backward("model", total)
    named = {"loss": total, **(terms if len(terms) > 1 else {})}
    return {name: loss.detach() for name, loss in named.items()}


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
    train_step: TrainStep = saliency_step,
    loss_counts: Callable[[Batch], dict[str, float]] = pixel_counts,
    options: StepOptions = StepOptions(),
    logger: MetricLogger | None = None,
    start_step: int = 0,
    after_step: Callable[[Progress], None] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[float, float]:
    """Train for one epoch; returns (mean loss, last learning rate).

    Tasks with several networks pass dicts with the same keys as `model`, `optimizer`,
    `lr_scheduler` and `scaler`; the mean loss is then that of the first loss that `train_step`
    names. `start_step` is the number of optimizer steps of this epoch done before a restart.
    `after_step` is called after every optimizer step. When `stop_requested` is true on any rank,
    all ranks end the epoch after the same step.
    Raises UserError when a loss or a gradient is not finite, on all ranks alike, unless
    `options.on_nonfinite` is "skip", and when the memory does not suffice.
    """
    device = torch.device(device)  # a script may pass a name
    models, optimizers = _named(model), _named(optimizer)
    schedulers, scalers = _named(lr_scheduler), _named(scaler)
    logger = logger or MetricLogger(reduce=True)
    for name in _learning_rates(optimizers):
        logger.add_meter(name, SmoothedValue(window_size=1, fmt="{value:.6f}"))
    for network in models.values():
        network.train()
    take_step = _Step(models, optimizers, schedulers, scalers, device, train_step, options)
    guard = NonfiniteGuard(options.on_nonfinite, device, take_step.scaled, models)
    windows = _Windows(data_loader, options.accumulate, epoch, start_step)
    total = start_step + len(windows)

    def where(step: int) -> str:
        return f"epoch {epoch}, step {step + 1} of {total}"

    def names(step: int) -> list[str]:
        return sample_names(data_loader, step)

    def settle() -> None:
        logger.flush()
        guard.review(where, names)
        check_finite(logger.read, epoch)

    for step, parts in enumerate(
        logger.log_every(windows, print_freq, f"Epoch: [{epoch}]", start_step), start_step
    ):
        faults.reach("step")
        mark(where(step))  # first: where settling waits, the loader is not to blame
        if logger.is_read:
            settle()
        seed = None
        if options.seed is not None:
            seed = stable_seed(options.seed, epoch * total + step, get_rank())
        counts, images, stop = _agree(parts, loss_counts, stop_requested())
        rates = _learning_rates(optimizers)
        guard.keep_buffers()
        losses = take_step.backward(parts, counts, seed)
        skipped = guard.found(step, losses)
        if skipped:
            guard.act(where(step), losses, names(step), take_step.own_bad_gradients())
        take_step.update(skipped)
        logger.images += images
        rates |= {"skipped": float(skipped)} if options.on_nonfinite == "skip" else {}
        logger.update(images, **({} if skipped else losses), **rates)
        if after_step:
            after_step(Progress(epoch, step + 1, logger, stop, settle))
        if stop:
            break
    settle()
    losses_by_name = mean_losses(logger)
    losses_by_name.pop("skipped", None)
    return next(iter(losses_by_name.values()), float("nan")), logger.read["lr"].value


def mean_losses(logger: MetricLogger) -> dict[str, float]:
    """An epoch's mean of every loss, by name."""
    meters = logger.meters.items()
    return {name: m.global_avg for name, m in meters if name.partition("_")[0] != "lr"}


def _learning_rates(optimizers: Mapping[str, Optimizer]) -> dict[str, float]:
    """The first network's as `lr`, any other's as lr_<network>."""
    rates = {f"lr_{name}": each.param_groups[0]["lr"] for name, each in optimizers.items()}
    first = next(iter(rates))
    return {"lr": rates.pop(first), **rates}


def check_finite(meters: Mapping[str, SmoothedValue], epoch: int) -> None:
    """Raise UserError naming the terms whose totals over the epoch are not finite."""
    bad = [name for name, meter in meters.items() if not math.isfinite(meter.total)]
    if bad:
        raise UserError(f"epoch {epoch}: {', '.join(bad)} became NaN or infinite. {HOW_TO_TAME}")


class _Windows:
    """A loader's batches, grouped by `size`; the last group may be smaller."""

    def __init__(self, loader: Iterable, size: int, epoch: int, start_step: int) -> None:
        self.loader, self.size = loader, size
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return -(-len(self.loader) // self.size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Batch]]:
        window, step, batches = [], self.start_step, len(self.loader)  # type: ignore[arg-type]
        self._mark(step)
        for number, batch in enumerate(self.loader, 1):
            window.append(batch)
            if len(window) == self.size:
                yield window
                window, step = [], step + 1
            if number < batches:
                self._mark(step)
        if window:
            yield window

    def _mark(self, step: int) -> None:
        what = LOADING if getattr(self.loader, "num_workers", 0) else "loading"
        place = f"{what}: images of epoch {self.epoch}, step {step + 1}"
        mark(place, lambda: ", ".join(sample_names(self.loader, step)))


def _agree(
    parts: Sequence[Batch], loss_counts: Callable[[Batch], dict[str, float]], stop: bool
) -> tuple[dict[str, float], int, bool]:
    """Each loss's count, the number of images, and whether to stop, over all parts and ranks.

    One sum of host numbers. The counts are then divided by the number of ranks, because
    DistributedDataParallel averages gradients: Σ loss / count on each rank gives
    Σ loss / Σ count over all of them.
    """
    each = [loss_counts(batch) for batch in parts]
    local = {name: sum(counts[name] for counts in each) for name in each[0]}
    shown = sum(len(batch[0]) for batch in parts)
    *sums, images, stops, world = sum_over_ranks([*local.values(), shown, stop, 1])
    # A count of 0 (everything ignored) comes with a sum of 0: 0/1, not 0/0.
    counts = dict(zip(local, (total / world or 1.0 for total in sums), strict=True))
    return counts, int(images), stops > 0


class _Step:
    """One optimizer step: the parts of its batch forward and backward, then the updates."""

    def __init__(
        self,
        models: Models,
        optimizers: Mapping[str, Optimizer],
        schedulers: Mapping[str, Any],
        scalers: Mapping[str, Any],
        device: torch.device,
        train_step: TrainStep,
        options: StepOptions,
    ) -> None:
        self.models, self.optimizers, self.schedulers = models, optimizers, schedulers
        # A disabled scaler passes everything through: one loop serves all precisions.
        off = torch.amp.GradScaler(device.type, enabled=False)
        self.scalers = {name: scalers.get(name) or off for name in optimizers}
        self.device, self.train_step, self.options = device, train_step, options
        self.scaled = any(scaler.is_enabled() for scaler in self.scalers.values())
        self.amp_dtype = options.amp_dtype or (torch.float16 if self.scaled else None)
        self._spoil, self._checked = 1.0, False
        self._last: tuple[Sequence[Batch], dict[str, float], int | None]

    def backward(
        self, parts: Sequence[Batch], counts: dict[str, float], seed: int | None
    ) -> dict[str, Tensor]:
        """Gradients of the whole step, and its losses by name."""
        self._last = parts, counts, seed
        spoilt_loss = faults.reach("loss")
        self._spoil = faults.reach("gradient") * spoilt_loss
        losses = self._all_parts(synchronise=True)
        if spoilt_loss != 1:
            losses = {name: loss * spoilt_loss for name, loss in losses.items()}
        if not self._checked:
            self._refuse_unused_parameters()
        return losses

    def own_bad_gradients(self) -> int:
        """How many gradients are not finite in this process's own part of the last step."""
        self._forget_gradients()
        self._all_parts(synchronise=False)
        with waiting("gradients of this process alone"):  # batch norm may be over all of them
            bad = int(nonfinite_gradients(self.models.values()))
        self._forget_gradients()
        return bad

    def update(self, skip: bool) -> None:
        """Step all optimizers, unless told to skip that, and what follows the steps."""
        images = max(len(batch[0]) for batch in self._last[0])
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

    def _all_parts(self, synchronise: bool) -> dict[str, Tensor]:
        parts, counts, seed = self._last
        if seed is not None:
            torch.manual_seed(seed)
        total: dict[str, Tensor] = {}
        for number, batch in enumerate(parts, 1):
            with ExitStack() as stack:
                if number < len(parts) or not synchronise:
                    for model in self.models.values():
                        stack.enter_context(no_sync(model))
                losses = self._forward_backward(batch, counts)
            for name, loss in losses.items():
                total[name] = total[name] + loss if name in total else loss
        return total

    def _forward_backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        images = len(batch[0])
        with memory_errors(f"in a forward pass of {images} images", _smaller_batches(images)):
            batch = to_device(batch, self.device)
            with torch.autocast(self.device.type, self.amp_dtype, enabled=bool(self.amp_dtype)):
                return self.train_step(self.models, batch, counts, self._backward)

    def _backward(self, name: str, loss: Tensor) -> None:
        loss = spoilt_if_nonfinite(loss)
        if self._spoil != 1:
            loss = loss * self._spoil
        # Here data-parallel processes wait for each other's gradients.
        with torch.autocast(self.device.type, enabled=False), waiting(f"gradients of {name}"):
            self.scalers[name].scale(loss).backward()

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


def _named(value: Any) -> dict[str, Any]:
    """A task's dict as it is; a single network (optimizer, …) under the name `model`."""
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
    """An evaluation ended early, on all processes, because one of them was asked to stop."""


class Sample(NamedTuple):
    """One evaluated sample, kept for pictures (tensors on the CPU)."""

    image: Tensor
    target: Tensor
    prediction: Tensor


def saliency_predict(
    models: Models, images: Tensor, normalize: Callable[[Tensor], Tensor] = normalize_images
) -> Tensor:
    """Saliency in [0, 1], [B, 1, H, W], for uint8 images [B, 3, H, W]."""
    return models["model"](normalize(images)).float()


def evaluate(
    model: nn.Module | Models,
    data_loader: DataLoader,
    device: torch.device | str,
    *,
    metrics: Sequence[ExactMetric] | None = None,
    predict: Callable[[Models, Tensor], Tensor] = saliency_predict,
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
    models = {name: unwrap(network) for name, network in _named(model).items()}
    metrics = (MeanAbsoluteError(), F1Score()) if metrics is None else tuple(metrics)
    for network in models.values():
        broadcast_buffers(network)
    with memory_errors("for a copy of the network", SPARE_MEMORY):
        models = prepare(models, device, amp_dtype)
    on_host = any(metric.on_host for metric in metrics)
    scored_on = torch.device("cpu") if on_host else fp64_device(device)

    def memory_for(chunk: _Chunk) -> AbstractContextManager:
        size = "×".join(map(str, chunk[0][1].shape[-2:]))
        return memory_errors(f"evaluating {len(chunk)} images of {size}", SPARE_MEMORY)

    def forward(chunk: _Chunk) -> tuple[_Chunk, Tensor]:
        faults.reach("evaluate")
        with memory_for(chunk):
            # Stacked on the device: one by one, images in page-locked memory come without waiting.
            images = torch.stack([image.to(device, non_blocking=True) for _, image, _ in chunk])
            outputs = forward_chunk(lambda x: predict(models, x), images, device)
            return chunk, outputs.to(scored_on)

    def score(predicted: tuple[_Chunk, Tensor]) -> tuple[list[list[Tensor]], dict[int, Sample]]:
        states, pictures = [], {}
        with memory_for(predicted[0]):
            for (number, image, target), output in zip(*predicted, strict=True):
                beside = target.to(scored_on, non_blocking=True)
                states.append([metric.sample_state(output, beside) for metric in metrics])
                if number < keep:
                    pictures[number] = Sample(image, target, output.cpu())
        return states, pictures

    if on_host:
        scores = in_order(forward, _chunks(data_loader, device), device, finish=score)
    else:
        scores = in_order(lambda chunk: score(forward(chunk)), _chunks(data_loader, device), device)
    for metric in metrics:
        metric.state = metric.state.to(scored_on)  # or each image's would wait to come to the host
    mark("evaluating")
    kept: dict[int, Sample] = {}
    done = 0
    for scored, pictures in scores:
        for states in scored:
            for metric, state in zip(metrics, states, strict=True):
                metric.merge(state)
        kept |= pictures
        done += len(scored)
        mark(f"evaluating, {done} images done")
        if stop_requested and stop_requested():
            break
    if reduce_metrics(metrics, stop=bool(stop_requested and stop_requested())):
        raise StoppedMidway
    if samples is not None:
        samples.extend(kept[number] for number in sorted(kept))
    return metrics


def predict_samples(
    models: Models,
    items: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    predict: Callable[[Models, Tensor], Tensor],
    amp_dtype: torch.dtype | None = None,
) -> list[Sample]:
    """Predictions of a few (input, target) items, on this process alone: for pictures."""
    models = prepare(models, device, amp_dtype)

    def one(item: tuple[Tensor, Tensor]) -> Sample:
        image, target = (tensor.as_subclass(Tensor) for tensor in item)
        output = forward_chunk(lambda x: predict(models, x), image[None].to(device), device)
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
