"""What a training costs: the memory of a batch, the time of a step and of its data."""

import gc
import math
import time
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Subset

from train_utils.amp import choose_amp_dtype
from train_utils.check.trials import Epochs, Trial, cut, mean
from train_utils.data import GlobalBatchSampler, eval_loader
from train_utils.device import tf32
from train_utils.errors import UserError, is_out_of_memory
from train_utils.metric_logger import peak_memory_mb
from train_utils.sample_cache import available_memory
from train_utils.settings import MAX_BATCH
from train_utils.task import BaseTask
from train_utils.train_and_eval import Batch, Models, evaluate

_SMALLEST = 2  # images, on which every batch norm can train
_GROWTH = 2**26  # bytes between two batches, from which on their difference says something
_SPARE = 0.9  # of the free memory, to plan with
_UNKNOWN = 2**62  # bytes; more than any machine has: the system does not tell
_STEPS = 60  # that a training's pace is taken from, and batches that its loader's is
_VALIDATED = 8  # images that a validation's time is estimated from

# -- memory ---------------------------------------------------------------------------------------


@dataclass
class Memory:
    """The largest batch that fits: tried, or estimated; None where that could not be found out."""

    images: int | None
    line: str


def largest_batch(
    task: BaseTask, networks: Models, batch: Batch, device: torch.device, seconds: float
) -> Memory:
    """How many images a forward pass, its gradients and the optimizers have memory for.

    On accelerators that say what is free, batches are tried until one does not fit. On CPUs the
    peak memory of this process is measured for two sizes, and a line drawn through them: to be
    called before this process has needed more memory for something else.
    """
    if device.type == "cpu":
        return _estimated(task, networks, batch, seconds)
    if not hasattr(torch.get_device_module(device), "mem_get_info"):
        return Memory(None, f"largest batch: {device.type} does not say how much memory is free")
    return _tried(task, networks, batch, device, seconds)


def _estimated(task: BaseTask, networks: Models, batch: Batch, seconds: float) -> Memory:
    free, held, end = available_memory(), _peak(), time.monotonic() + seconds
    if free > _UNKNOWN:
        return Memory(None, "largest batch: this system does not say how much memory is free")
    trial = Trial(task, networks, torch.device("cpu"))
    trial.take([cut(batch, _SMALLEST)], math.inf)  # makes the optimizers' state
    low, images = _peak(), _SMALLEST
    while True:
        start = time.monotonic()
        trial.take([cut(batch, 2 * images)], math.inf)
        high, now = _peak(), time.monotonic()
        if high - low >= _GROWTH:
            break
        low, images = high, 2 * images
        if now + 2 * (now - start) > end or 2 * images > MAX_BATCH:
            return Memory(
                None,
                f"largest batch: not estimated: up to {images} images, in {seconds:.0f} s, took no "
                "more memory than this process had",
            )
    each = (high - low) / images
    most = images + int((held + _SPARE * free - low) / each)
    most = min(max(1, most), MAX_BATCH)
    return Memory(
        most,
        f"largest batch: about {most} images, by an estimate from {images} and {2 * images} "
        f"({each / 2**20:.0f} MB each; {free / 2**30:.1f} GiB are free)",
    )


def _peak() -> float:
    """Bytes that this process has held at most."""
    return peak_memory_mb() * 2**20


def _tried(
    task: BaseTask, networks: Models, batch: Batch, device: torch.device, seconds: float
) -> Memory:
    benchmark, end = torch.backends.cudnn.benchmark, time.monotonic() + seconds
    torch.backends.cudnn.benchmark = False  # it would try out kernels for every size
    fits, fails, images = 0, 0, len(batch[0])
    try:
        while True:
            if _fits(task, networks, cut(batch, images), device):
                fits = images
            else:
                fails = images
            images = (fits + fails) // 2 if fails else 2 * images
            near = fails and fails - fits <= max(1, fits // 8)
            if near or time.monotonic() > end or images > MAX_BATCH:
                break
    finally:
        torch.backends.cudnn.benchmark = benchmark
    if not fits:
        return Memory(0, f"largest batch: not even {fails} images fit")
    known = f"{fails} do not fit" if fails else f"more were not tried in {seconds:.0f} s"
    return Memory(fits, f"largest batch: {fits} images fit, {known}")


def _fits(task: BaseTask, networks: Models, batch: Batch, device: torch.device) -> bool:
    try:
        Trial(task, networks, device).take([batch] * 2, math.inf)
        return True
    except UserError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
        return False
    finally:
        gc.collect()
        torch.accelerator.empty_cache()


# -- time -----------------------------------------------------------------------------------------


@dataclass
class Speed:
    """Seconds of a step, the wait for its batches included; of that wait; of all evaluations.

    images: of a step on this process. loaded: images per second of the loader alone.
    measured: whether steps of the recipe's size were taken, or it is reckoned from smaller ones.
    """

    images: int
    seconds: float
    waited: float
    loaded: float
    evaluation: float
    measured: bool

    @property
    def share_waited(self) -> float:
        return self.waited / self.seconds


def speed(
    trial: Trial,
    loader: DataLoader,
    val_loader: DataLoader,
    per_image: float,
    seconds: float,
) -> Speed:
    """The pace of a training: of its steps with their data, of its loader, of its evaluations.

    per_image: seconds of an image in a small step, measured before. trial: fresh copies. Raises
    UserError where the first step's loss is not finite.
    """
    sampler = loader.batch_sampler
    assert isinstance(sampler, GlobalBatchSampler)
    parts = sampler.parts_per_step
    images = min(sampler.micro_batch * parts, len(sampler.share(0)))
    loaded = _loaded(loader, seconds / 3)
    evaluation = _evaluation(trial, val_loader, seconds / 3)
    reckoned = per_image * images
    if 2 * reckoned > seconds:
        waited = max(0.0, images / loaded - reckoned)
        return Speed(images, reckoned + waited, waited, loaded, evaluation, False)
    steps = trial.take(Epochs(loader, parts * _STEPS), seconds)
    if not steps.seconds:
        raise UserError(steps.problem)
    # The first step chooses kernels, and the next ones find batches that were loaded meanwhile.
    skipped = min(len(steps.seconds) - 1, 1 + 2 * loader.num_workers)
    waited = mean(steps.waited[skipped:])
    return Speed(images, mean(steps.seconds[skipped:]) + waited, waited, loaded, evaluation, True)


def _loaded(loader: DataLoader, seconds: float) -> float:
    """Images per second of the loader alone, without the start of its processes."""
    images, start = 0, 0.0
    for batch in Epochs(loader, _STEPS):
        now = time.monotonic()
        if start:
            images += len(batch[0])
        start = start or now
        if images and now - start > seconds:
            break
    return images / max(now - start, 1e-9)


def _evaluation(trial: Trial, val_loader: DataLoader, seconds: float) -> float:
    """Seconds of all evaluations of a run, from a few validation images."""
    cfg, task = trial.task.cfg, trial.task
    dataset = val_loader.dataset.dataset  # type: ignore[attr-defined]
    count = len(dataset)
    if not count:
        return 0.0
    amp_dtype = choose_amp_dtype(cfg.eval.amp, trial.device, "eval.amp")
    times: list[float] = []  # of one image each
    end = time.monotonic() + seconds
    with tf32(cfg.eval.tf32):
        for number in range(min(_VALIDATED, count)):
            one = Subset(dataset, [number * count // min(_VALIDATED, count)])
            start = time.monotonic()
            evaluate(
                trial.networks,
                eval_loader(one, 1, 0, trial.device),
                trial.device,
                metrics=task.make_metrics(),
                predict=task.predict,
                amp_dtype=amp_dtype,
            )
            times.append(time.monotonic() - start)
            if time.monotonic() > end:
                break
    evaluations = math.ceil(cfg.train.epochs / cfg.train.eval_interval)
    return mean(times[1:] or times) * count * evaluations
