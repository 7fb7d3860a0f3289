"""A run from its first step to its last words: saving, stopping, records, best scores."""

import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import isnan
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader

from train_utils.activity import SAVING, set_activity
from train_utils.amp import choose_amp_dtype
from train_utils.collectives import all_gather_alike, sum_over_ranks
from train_utils.data import SampleKey, loader_errors
from train_utils.device import describe_precision, tf32
from train_utils.errors import UserError, typed
from train_utils.log import get_logger
from train_utils.metric_logger import MetricLogger
from train_utils.metrics import ExactMetric, all_remarks, all_scores
from train_utils.run_folder import BEST, LAST, RunFolder, choose_run_folder, contact_sheet
from train_utils.schedule import describe_schedules
from train_utils.settings import deciding_metric
from train_utils.stop import SIGNALS, StopSignals
from train_utils.task import BaseTask
from train_utils.train_and_eval import (
    EpochRun,
    Models,
    Progress,
    Sample,
    StoppedMidway,
    evaluate,
    mean_losses,
    predict_samples,
)
from train_utils.training_state import TrainingState

SHEET_ROWS = 8


class Run(EpochRun):
    """What surrounds the epochs of a training, in a `with` block.

    It saves, and stops all processes together when one of them is asked to; writes the records; and
    keeps the best scores. `state` tells where it stands. Any other end of the block but the last
    epoch's is noted in the run's folder.
    """

    def __init__(
        self,
        args: Namespace,
        task: BaseTask,
        state: TrainingState,
        resume: Path | None,
        loader: DataLoader,
        val_loader: DataLoader,
    ) -> None:
        super().__init__()
        self.task, self.cfg, self.state = task, task.cfg, state
        self.loader, self.val_set = loader, val_loader.dataset
        self.device, self.steps = torch.device(args.device), state.sampler.steps_per_epoch
        self.metric, self.goal = deciding_metric(self.cfg, task.METRICS)
        given = all_scores(task.make_metrics())
        if self.metric not in given:
            raise UserError(
                f"{self.metric!r} decides the best checkpoint, but make_metrics gives "
                f"{', '.join(given)}. Change METRICS of the task, or train.best."
            )
        path = choose_run_folder(args.output_dir, resume, args.run_name)
        done = state.epoch * self.steps + state.step
        self.folder = RunFolder(path, state.config, state.epoch, done)
        self.stop = StopSignals(self.folder, self.cfg.train.hang_timeout)
        self._open = ExitStack()

    def __enter__(self) -> "Run":
        for context in (self.folder, self.stop, loader_errors()):
            self._open.enter_context(context)
        self._announce()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._open:
            if isinstance(error, StoppedMidway):
                self._exit_stopped()
            if error:
                raise error
            self._finish()

    # -- what train.py calls --------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """The epochs that are left to train, until the last one or an early end."""
        state, train = self.state, self.cfg.train
        if (state.epoch, state.step) == (0, 0):
            self._save()  # a start that does not come as far as the next one keeps its global batch
        for epoch in range(state.epoch, train.epochs):
            if train.early_stop and state.stale >= train.early_stop:
                get_logger().info(f"no better score for {state.stale} evaluations: ending the run")
                break
            self.start_step = state.step
            state.sampler.set_position(epoch, self.start_step)
            self._steps_before = epoch * self.steps + self.start_step
            self.logger = MetricLogger(reduce=True, on_values=self._log_step)
            self.logger.load_state_dict(state.meters)
            yield epoch

    def evaluates(self, epoch: int) -> bool:
        """Whether an epoch is followed by an evaluation."""
        train = self.cfg.train
        return (epoch + 1) % train.eval_interval == 0 or epoch + 1 == train.epochs

    def end_epoch(self, epoch: int, scores: dict[str, float]) -> None:
        """Note an epoch's losses and scores, and save; stop if any process is to.

        The scores decide whether this is the best epoch so far. If none has been better for long
        enough, the learning rates shrink. Raises UserError if the deciding score is nan.
        """
        state, train = self.state, self.cfg.train
        seconds, lr = self.logger.seconds, self.logger.read["lr"].value
        state.lr = state.lr if isnan(lr) else lr  # nan: all steps were done before a restart
        record = {"epoch": epoch, "step": (epoch + 1) * self.steps, "lr": state.lr}
        record |= {f"train/{name}": value for name, value in mean_losses(self.logger).items()}
        record |= {"img_per_s": self.logger.images / seconds, "time_s": seconds}
        record |= {f"val/{name}": value for name, value in scores.items()}
        best = bool(scores) and self._note_scores(epoch, scores)
        kept = bool(scores) or (train.keep_every and (epoch + 1) % train.keep_every == 0)
        state.epoch, state.step, state.meters = epoch + 1, 0, {}
        self.folder.log_epoch(record)
        self._save(best, numbered=epoch if kept else None)
        (requests,) = sum_over_ranks([self.stop_requested()])
        if requests and state.epoch < train.epochs:
            raise StoppedMidway

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks to evaluate: the moving averages where they are kept."""
        return {name: ema.module for name, ema in self.state.ema.items()} or self.state.models

    def log_evaluation(self, metrics: Sequence[ExactMetric], samples: Sequence[Sample]) -> None:
        """Give TensorBoard an evaluation's pictures and curves."""
        step = (self.state.epoch + 1) * self.steps
        sheet = contact_sheet([self.task.sheet_row(sample) for sample in samples])
        self.folder.log_evaluation(sheet, self.task.curves(metrics), step)

    # -- what the loop calls --------------------------------------------------------------------

    def stop_requested(self) -> bool:
        return self.stop.requested is not None

    def after_step(self, progress: Progress) -> None:
        """Save where that is due, or ordered by a stop, which then ends the epoch."""
        train, midway = self.cfg.train, progress.step < self.steps
        due = train.save_steps and progress.step % train.save_steps == 0
        # At its end only if it is evaluated: a stop or crash in that must not cost the epoch.
        if due or progress.stop if midway else self.evaluates(progress.epoch):
            self.state.epoch, self.state.step = progress.epoch, progress.step
            progress.read_values()
            self.state.lr = progress.logger.read["lr"].value
            self.state.meters = progress.logger.state_dict()
            self._save()
        done = progress.epoch * self.steps + progress.step
        if self.folder.writes and train.sample_interval and done % train.sample_interval == 0:
            self._save_samples(done)
        if midway and progress.stop:
            raise StoppedMidway

    def _announce(self) -> None:
        train, state, log = self.cfg.train, self.state, get_logger()
        amp_dtype, sampler = choose_amp_dtype(train.amp, self.device), state.sampler
        validation = len(self.val_set)  # type: ignore[arg-type]
        log.info(
            f"{sampler.world_size} process(es) on {self.device.type} in "
            f"{describe_precision(amp_dtype, self.device, train.tf32)}, "
            f"{self.loader.num_workers} loader worker(s) each; {sampler.num_samples} training and "
            f"{validation} validation samples; {sampler.global_batch} images per step; run folder "
            f"{self.folder.path}"
        )
        log.info(describe_schedules(state.schedulers, self.steps * train.epochs))

    # -- inside ---------------------------------------------------------------------------------

    def _log_step(self, number: int, values: dict[str, float]) -> None:
        self.folder.log_step(self._steps_before + number + 1, values)

    def _save(self, best: bool = False, numbered: int | None = None) -> None:
        set_activity(SAVING)
        train, state = self.cfg.train, self.state
        self.folder.save(state.capture(), best, numbered, train.keep, train.keep_every)
        self.folder.status("running", epoch=state.epoch, step=state.step)

    def _note_scores(self, epoch: int, scores: dict[str, float]) -> bool:
        if isnan(scores[self.metric]):
            raise UserError(
                f"epoch {epoch}: {self.metric} is nan: the validation data hold nothing to score, "
                "or outputs or targets are not finite or leave the metric's range. Check all three."
            )
        best = self.state.note_scores(scores, self.metric, self.goal)
        if self.state.stale and self.state.stale % self.cfg.train.plateau_patience == 0:
            self.state.scale_learning_rates(self.cfg.train.plateau_factor)
        return best

    def _save_samples(self, step: int) -> None:
        """A sheet of the first validation samples, drawn by this process alone."""
        set_activity("drawing a sheet of samples")
        count = min(SHEET_ROWS, len(self.val_set))  # type: ignore[arg-type]
        items = [self.val_set[SampleKey(0, index)] for index in range(count)]
        amp_dtype = choose_amp_dtype(self.cfg.eval.amp, self.device, "eval.amp")
        with tf32(self.cfg.eval.tf32):
            samples = predict_samples(
                self.networks, items, self.device, self.task.predict, amp_dtype
            )
        sheet = contact_sheet([self.task.sheet_row(sample) for sample in samples])
        self.folder.save_sheet(sheet, step)

    def _exit_stopped(self) -> NoReturn:
        """Say where the run stands and how to continue, and exit as the signal would."""
        state, path = self.state, self.folder.path
        names = [name for name in all_gather_alike(self.stop.requested or "") if name in SIGNALS]
        # Whoever reaches the store can ask for a stop, and it may be no process of this run.
        reason = names[0] if names else "a request in the store, by no process of this run"
        self.folder.wait_saved()
        self.folder.status("stopped", reason=reason, epoch=state.epoch, step=state.step)
        sum_over_ranks([0])  # rank 0 has saved: one that left earlier would have it terminated
        get_logger().info(
            f"stopped by {reason} at epoch {state.epoch}, step {state.step}; saved in {path}. "
            f"Continue with --resume {typed(path)}"
        )
        sys.exit(128 + getattr(signal, reason, signal.SIGTERM))

    def _finish(self) -> None:
        state, path = self.state, self.folder.path
        self.folder.wait_saved()
        self.folder.status("finished", epoch=state.epoch, best=state.best_scores)
        checkpoint = next(file for file in (path / BEST, path / LAST) if file.exists())
        needed = [flag for flag, required in self.task.PREDICT_FLAGS.items() if required]
        flags = "".join(f" --{flag} {flag.upper()}.png" for flag in needed)
        best = "  ".join(f"{name}: {score:.5f}" for name, score in state.best_scores.items())
        get_logger().info(f"best: {best}")
        get_logger().info(f"checkpoint: {checkpoint}")
        get_logger().info(
            f"next: python predict.py YOUR_IMAGE.jpg{flags} --weights {typed(checkpoint)}"
        )


def evaluate_task(
    task: BaseTask,
    networks: Models,
    loader: DataLoader,
    device: torch.device,
    run: Run | None = None,
) -> dict[str, float]:
    """Evaluate networks by a task's metrics; returns the scores, and gives a run its pictures."""
    samples: list[Sample] = []
    with tf32(task.cfg.eval.tf32):
        metrics = evaluate(
            networks,
            loader,
            device,
            metrics=task.make_metrics(),
            predict=task.predict,
            keep=SHEET_ROWS if run and run.folder.writes else 0,
            samples=samples,
            stop_requested=run.stop.requested_anywhere if run else None,
            amp_dtype=choose_amp_dtype(task.cfg.eval.amp, device, "eval.amp"),
        )
    if run and samples:
        run.log_evaluation(metrics, samples)
    scores = all_scores(metrics)
    get_logger().info("val  " + "  ".join(f"{name}: {value:.5f}" for name, value in scores.items()))
    for remark in all_remarks(metrics):
        get_logger().info(f"     {remark}")
    return scores
