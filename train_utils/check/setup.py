"""The set-up of a training, looked at before its first step: what it is, learns, needs and takes.

Everything runs on copies, by the training loop itself, and each part has so many seconds.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from train_utils.check.costs import Speed, largest_batch, speed
from train_utils.check.findings import Finding, Report
from train_utils.check.learning import FEWEST_STEPS, SWEEP_STEPS, compared, overfit, sweep
from train_utils.check.sections import Curve, Section
from train_utils.check.summary import amount, summarize, summary_table
from train_utils.check.trials import Epochs, Trial, cut, untouched
from train_utils.data import GlobalBatchSampler
from train_utils.dry_run import dry_run
from train_utils.errors import UserError, memory_errors, plain_message
from train_utils.log import get_logger
from train_utils.schedule import describe_schedules
from train_utils.task import BaseTask
from train_utils.train_and_eval import Batch, Models

SECONDS = 60.0  # of each measured part
_WAITS = 0.2  # share of the time spent waiting for data, from which on it is a finding
_ENOUGH_STEPS = 2 * FEWEST_STEPS  # for which batches are cut where time is short
_LATE = 1.5  # steps may take so much longer than was measured


@dataclass
class SetUp:
    """What a training would start with, as train.py makes it."""

    task: BaseTask
    networks: Models
    optimizers: Mapping[str, Optimizer]
    loader: DataLoader
    val_loader: DataLoader
    device: torch.device


def check_setup(setup: SetUp, report: Report, seconds: float = SECONDS) -> None:
    """Look at networks, learning, memory and time, and add to a report what was found.

    Logs a line for each part as soon as it is known. Random generators, networks, optimizers and
    data are as before. Raises UserError for what a training would refuse before its first step.
    """
    section = Section("Set-up")
    report.sections.append(section)
    look = _Look(setup, report, section, seconds)
    place = look.sampler.epoch, look.sampler.start_step
    try:
        with untouched(setup.device):
            look.take()
    finally:
        look.sampler.set_position(*place)


@contextmanager
def setup_errors(report: Report) -> Iterator[None]:
    """Make a finding of what keeps a training from its first step, so that the rest is told."""
    try:
        with memory_errors("in the set-up", "use a smaller network, batch or image"):
            yield
    except UserError as error:
        finding = _failed(plain_message(error))
        if report.failed:  # most often by the same
            finding.severity, finding.message = "note", f"not looked at: {finding.message}"
        report.findings.append(finding)


class _Look:
    """The parts of a look, in their order: memory early, as long as little of it is in use."""

    def __init__(self, setup: SetUp, report: Report, section: Section, seconds: float) -> None:
        self.setup, self.report, self.section, self.seconds = setup, report, section, seconds
        sampler = setup.loader.batch_sampler
        assert isinstance(sampler, GlobalBatchSampler)
        self.sampler, self.parts = sampler, sampler.parts_per_step

    def take(self) -> None:
        setup = self.setup
        given = setup.task, setup.networks, setup.optimizers, setup.loader, setup.val_loader
        for text in dry_run(*given, setup.device):
            self.report.findings.append(Finding("parameters", "warning", text))
        (batch,) = Epochs(setup.loader, 1)
        self._summary(cut(batch, 1))
        self._batch_and_rates()
        first = self._trial().take([cut(batch, 2)] * 6, self.seconds / 4)
        if first.problem:
            self._tell(f"the first steps failed: {first.problem}", _failed(first.problem))
            return
        self._memory(batch)
        each = min(first.seconds) / 2  # the first step chooses kernels; others may be disturbed
        needed = 2 * FEWEST_STEPS * each
        if needed <= self.seconds:
            self._overfit(batch, each)
            self._sweep(batch, each)
        else:
            self._tell(
                f"overfit, learning-rate sweep: not tried, as {FEWEST_STEPS} steps of 2 images "
                f"take {needed:.0f} s here. Use --seconds {1.5 * needed:.0f}, or a GPU"
            )
        self._speed(each)

    def _trial(self, accumulate: int = 1) -> Trial:
        return Trial(self.setup.task, self.setup.networks, self.setup.device, accumulate)

    def _tell(self, line: str, finding: Finding | None = None, **values: Any) -> None:
        get_logger().info(line)
        self.section.lines.append(line)
        self.section.values |= values
        self.report.findings += [finding] if finding else []

    # -- what it is -----------------------------------------------------------------------------

    def _summary(self, batch: Batch) -> None:
        setup = self.setup
        for name, stages in summarize(setup.task, setup.networks, batch, setup.device).items():
            self.section.tables.append(summary_table(name, stages))
            total = stages[-1]
            frozen = total.parameters - total.trained
            self._tell(
                f"{name}: {total.kind}, {len(stages) - 1} stages, {total.parameters:,} parameters"
                + (f" ({frozen:,} frozen)" if frozen else "")
                + f", {amount(total.flops)}FLOP forward per image",
            )
            self.section.values[name] = [asdict(stage) for stage in stages]

    def _batch_and_rates(self) -> None:
        sampler, task = self.sampler, self.setup.task
        steps, epochs = sampler.steps_per_epoch, task.cfg.train.epochs
        schedules = task.build_schedulers(self._trial().optimizers, steps)
        self._tell(
            f"{sampler.global_batch} images per step: {sampler.micro_batch} × {self.parts} "
            f"(train.accumulate) × {sampler.world_size} process(es); {steps} steps an epoch, "
            f"{steps * epochs} in all; {describe_schedules(schedules, steps * epochs)}",
            global_batch=sampler.global_batch,
        )

    # -- what it needs --------------------------------------------------------------------------

    def _memory(self, batch: Batch) -> None:
        setup = self.setup
        found = largest_batch(setup.task, setup.networks, batch, setup.device, self.seconds / 2)
        finding = None
        if found.images is not None and found.images < len(batch[0]):
            fix = f"Use -b {max(1, found.images)}, and more of train.accumulate."
            finding = Finding("memory", "warning", found.line, fix)
        self._tell(found.line, finding, largest_batch=found.images)

    # -- what it learns -------------------------------------------------------------------------

    def _fitting(self, images: int, each: float) -> int:
        """So many of a batch's images that there is time for enough steps; two at least."""
        return min(images, max(2, int(self.seconds / (_ENOUGH_STEPS * _LATE * each))))

    def _cut(self, images: int, of: int) -> str:
        if images == of:
            return ""
        return f" (with {images} of {of} images a step, for the {self.seconds:g} s that it has)"

    def _overfit(self, batch: Batch, each: float) -> None:
        setup, images = self.setup, self._fitting(len(batch[0]), each)
        batch, whole = cut(batch, images), len(batch[0])
        found = overfit(setup.task, setup.networks, batch, setup.device, self.seconds)
        losses = [loss for loss in found.steps.losses if math.isfinite(loss)]
        self._tell(found.line + self._cut(images, whole), found.finding, overfit=losses)
        steps = range(1, len(losses) + 1)
        self.section.curves.append(Curve("overfit of one batch", "step", "loss", steps, losses))

    def _sweep(self, batch: Batch, each: float) -> None:
        whole = len(batch[0])
        images = self._fitting(whole, each)
        steps = int(self.seconds / (images * _LATE * each))
        steps = min(SWEEP_STEPS, max(FEWEST_STEPS, steps))
        trial = self._trial()
        found = sweep(trial, cut(batch, images), steps, self.seconds)
        line = found.line + self._cut(images, whole)
        swept = {"rates": found.rates, "losses": found.losses, "suggestion": found.suggestion}
        self._tell(line, compared(found, trial.rate), sweep=swept)
        if found.rates:
            marks = {"recipe": trial.rate}
            marks |= {"suggested": found.suggestion} if found.suggestion else {}
            names = "learning-rate sweep", "learning rate", "loss"
            values = found.rates, found.losses, found.smooth
            self.section.curves.append(Curve(*names, *values, marks, log_x=True))

    # -- what it takes --------------------------------------------------------------------------

    def _speed(self, each: float) -> None:
        setup = self.setup
        found = speed(self._trial(self.parts), setup.loader, setup.val_loader, each, self.seconds)
        steps = self.sampler.steps_per_epoch * setup.task.cfg.train.epochs
        world = self.sampler.world_size
        left = timedelta(seconds=round(found.seconds * steps + found.evaluation / world))
        known = "" if found.measured else ", reckoned from steps of 2 images"
        line = (
            f"{found.images * world / found.seconds:.3g} images/s in steps of {found.seconds:.3g} "
            f"s{known}; the loader alone {found.loaded:.3g} images/s; {found.share_waited:.0%} of "
            f"the time waiting for data; about {left} to the end of the recipe, "
            f"{timedelta(seconds=round(found.evaluation / world))} of it in evaluations"
        )
        self._tell(line, _waiting(found), **asdict(found))


def _failed(problem: str) -> Finding:
    return Finding("set-up", "error", problem.rstrip("."))


def _waiting(found: Speed) -> Finding | None:
    if found.share_waited < _WAITS:
        return None
    message = f"{found.share_waited:.0%} of the time goes by waiting for data"
    fix = "Try --cache ram, more loader processes (-j), or data.draft=true for large JPEGs."
    return Finding("speed", "warning", message, fix)
