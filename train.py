"""Train a network on one CPU or one GPU.

    python train.py                                      embedded data: no download, 5 minutes
    python train.py --images photos --masks masks        your own pairs
    python train.py --config configs/u2net_lite.yaml --data-path DIR     DUTS, the published recipe
    python train.py --resume auto                        continue the newest run

Several processes take the same arguments: torchrun --nproc_per_node=N train_multi_GPU.py …
"""

import argparse
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any

from arguments import DEFAULT_CONFIG, configure, parse_args
from process_setup import keep_freed_memory, set_up_process

if __name__ == "__main__":  # before the imports that take seconds
    args = parse_args(description=__doc__)
    set_up_process(args.device)

import torch
from torch.utils.data import DataLoader, Dataset

import tasks
from my_dataset import fingerprint, readable
from tasks.settings import deciding_metric
from train_utils import evaluate, train_one_epoch
from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.checkpoint import split_states
from train_utils.config import to_dict
from train_utils.data import (
    GlobalBatchSampler,
    SampleKey,
    eval_loader,
    loader_errors,
    train_loader,
)
from train_utils.device import allow_tf32, describe_precision, tf32
from train_utils.distributed_utils import broadcast_tensors, call_on_main, refuse_launcher
from train_utils.ema import ExponentialMovingAverage
from train_utils.errors import UserError
from train_utils.log import get_logger
from train_utils.metric_logger import MetricLogger
from train_utils.metrics import all_remarks, all_scores
from train_utils.run_folder import (
    BEST,
    LAST,
    RunFolder,
    choose_run_folder,
    contact_sheet,
)
from train_utils.schedule import describe_schedules
from train_utils.setup import (
    clean_errors,
    launched,
    place_models,
    seed_everything,
    worker_count,
    wrap_models,
)
from train_utils.stop import Supervisor, agree_to_stop, exit_stopped
from train_utils.train_and_eval import (
    Progress,
    Sample,
    StepOptions,
    StoppedMidway,
    mean_losses,
    predict_samples,
)
from train_utils.training_state import (
    TrainingState,
    resumed_forward_batch,
    resumed_global_batch,
)
from train_utils.watch import SAVING, mark

SHEET_ROWS = 8


def main(args: argparse.Namespace) -> None:
    """Arguments → data → networks → resume → epochs, as rank `args.rank` of `args.world_size`."""
    device, log = torch.device(args.device), get_logger()
    task, cfg, resume, saved = configure(args)
    choose_amp_dtype(cfg.eval.amp, device, "eval.amp")  # refused now, not after an epoch
    keep_freed_memory(device.type)
    seed_everything(cfg.train.seed, cfg.train.deterministic)
    allow_tf32(cfg.train.tf32)
    if args.test_only:
        test(args, task, cfg, cfg.train.weights or str(resume))
        return
    if cfg.train.compile and cfg.train.sync_bn and args.world_size > 1:
        raise UserError(
            "--compile, --sync-bn: synchronised batch norm waits for other processes in each of "
            "its layers, and would cut what is compiled there. Leave one of them out."
        )

    # Data. What a step's samples are does not depend on the number of processes or workers.
    workers = worker_count(cfg.train.workers, device, args.local_world_size)
    train_set, val_set = readable(cfg.data, *task.build_datasets(cfg))
    found = call_on_main(lambda: task.prepare_data(cfg, train_set, val_set, workers))
    cfg = tasks.with_values(cfg, found)
    forward_batch = cfg.train.batch_size * args.world_size
    global_batch = forward_batch * cfg.train.accumulate
    if saved:
        global_batch = resumed_global_batch(saved, global_batch, args.world_size)
        forward_batch = resumed_forward_batch(saved, cfg.train, args.world_size)
    sampler = GlobalBatchSampler(
        len(train_set),
        global_batch,
        micro_batch=ceil(forward_batch / args.world_size),
        rank=args.rank,
        world_size=args.world_size,
        seed=cfg.train.seed,
    )
    task.check_batches(cfg, sampler.smallest_part)
    loader = train_loader(train_set, sampler, workers, device)
    val_loader = eval_loader(
        val_set, cfg.eval.batch_size, workers, device, args.rank, args.world_size
    )

    # Networks, and what trains them.
    networks = task.build_models(cfg)
    if cfg.train.weights and saved:
        log.info(f"--weights {cfg.train.weights}: not used, the run continues from {resume}")
    elif cfg.train.weights:
        split_states(networks, tasks.read_weights(task, cfg.train.weights), cfg.train.weights)
    elif not saved:
        call_on_main(lambda: task.initialise(cfg, networks))  # one download for all processes
        for network in networks.values():
            broadcast_tensors(list(network.state_dict().values()))
    networks = place_models(networks, device, cfg.train.sync_bn and args.world_size > 1)
    optimizers, schedulers = task.build_optimizers(cfg, networks, sampler.steps_per_epoch)
    amp_dtype, decay = choose_amp_dtype(cfg.train.amp, device), cfg.train.ema
    state = TrainingState(
        networks,
        optimizers,
        schedulers,
        scalers={name: make_scaler(amp_dtype, device) for name in optimizers},
        ema={n: ExponentialMovingAverage(m, decay) for n, m in networks.items() if decay},
        config=to_dict(cfg),
        num_samples=len(train_set),
        data=fingerprint(train_set),
        global_batch=global_batch,
        forward_batch=forward_batch,
        world_size=args.world_size,
    )
    if saved:
        state.restore(saved, str(resume))
        saved.clear()  # half a gigabyte, for a large network

    # The run.
    path = choose_run_folder(args.output_dir, resume, Path(args.config or DEFAULT_CONFIG).stem)
    done = state.epoch * sampler.steps_per_epoch + state.step
    with (
        RunFolder(path, state.config, state.epoch, done) as run,
        Supervisor(run, cfg.train.hang_timeout) as supervisor,
        loader_errors(),
    ):
        log.info(
            f"{args.world_size} process(es) on {device.type} in "
            f"{describe_precision(amp_dtype, device, cfg.train.tf32)}, "
            f"{workers} loader worker(s) each; {len(train_set)} training and {len(val_set)} "
            f"validation samples; {global_batch} images per step; run folder {path}"
        )
        log.info(describe_schedules(schedulers, sampler.steps_per_epoch * cfg.train.epochs))
        options = StepOptions(
            amp_dtype,
            accumulate=sampler.parts_per_step,
            clip_norm=cfg.train.clip_norm,
            clip_value=cfg.train.clip_value,
            seed=cfg.train.seed,
            ema=state.ema,
            on_nonfinite=cfg.train.on_nonfinite,
        )
        fit(task, cfg, state, run, loader, val_loader, options, device, supervisor)


def test(args: argparse.Namespace, task: ModuleType, cfg: Any, weights: str) -> None:
    """Evaluate weights on the recipe's validation data."""
    device = torch.device(args.device)
    networks = task.build_models(cfg)
    split_states(networks, tasks.read_weights(task, weights), weights)
    cfg.data.cache = "none"  # nothing is read twice
    (dataset,) = readable(cfg.data, task.build_val_dataset(cfg))
    workers = worker_count(cfg.train.workers, device, args.local_world_size)
    call_on_main(lambda: task.prepare_data(cfg, None, dataset, workers))
    loader = eval_loader(dataset, cfg.eval.batch_size, workers, device, args.rank, args.world_size)
    score(task, cfg, place_models(networks, device, sync_bn=False), loader, device)


def fit(
    task: ModuleType,
    cfg: Any,
    state: TrainingState,
    run: RunFolder,
    loader: DataLoader,
    val_loader: DataLoader,
    options: StepOptions,
    device: torch.device,
    stop: Supervisor,
) -> None:
    """Train, evaluate and save, from where `state` stands to the last epoch or a stop signal."""
    sampler, epochs = loader.batch_sampler, cfg.train.epochs
    steps = sampler.steps_per_epoch
    models = wrap_models(
        state.models, device, cfg.train.compile, cfg.train.bucket_mb, cfg.train.compress_gradients
    )
    midway, early_stop = False, cfg.train.early_stop

    def save(best: bool = False, numbered: int | None = None) -> None:
        mark(SAVING)
        run.save(state.capture(), best, numbered, cfg.train.keep, cfg.train.keep_every)
        run.status("running", epoch=state.epoch, step=state.step)

    def after_step(progress: Progress) -> None:
        nonlocal midway
        stop.agreed, midway = progress.stop, progress.step < steps
        due = cfg.train.save_steps and progress.step % cfg.train.save_steps == 0
        if midway and (due or progress.stop):
            state.epoch, state.step = progress.epoch, progress.step
            progress.settle()
            state.meters = progress.logger.state_dict()
            save()
        done = progress.epoch * steps + progress.step
        if run.writes and cfg.train.sample_interval and done % cfg.train.sample_interval == 0:
            save_samples(task, cfg, averaged(state), val_loader.dataset, device, run, done)

    if (state.epoch, state.step) == (0, 0):
        save()  # a start that does not come as far as the next one keeps its global batch
    for epoch in range(state.epoch, epochs):
        if early_stop and state.stale >= early_stop:
            get_logger().info(f"no better score for {state.stale} evaluations: ending the run")
            break
        start_step, start_time = state.step, time.monotonic()
        sampler.set_position(epoch, start_step)
        logger = MetricLogger(reduce=True, on_values=run.step_writer(epoch * steps + start_step))
        logger.load_state_dict(state.meters)
        _, lr = train_one_epoch(
            models,
            state.optimizers,
            loader,
            device,
            epoch,
            state.schedulers,
            cfg.train.print_freq,
            state.scalers,
            train_step=task.train_step(cfg),
            loss_counts=task.loss_counts(cfg),
            options=options,
            logger=logger,
            start_step=start_step,
            after_step=after_step,
            stop_requested=lambda: stop.requested is not None,
        )
        if stop.agreed and midway:
            break
        state.lr = state.lr if lr != lr else lr  # nan: all steps were done before a restart
        seconds = time.monotonic() - start_time
        record = {"epoch": epoch, "step": (epoch + 1) * steps, "lr": state.lr}
        record |= {f"train/{name}": value for name, value in mean_losses(logger).items()}
        record |= {"img_per_s": logger.images / seconds, "time_s": seconds}

        evaluated = (epoch + 1) % cfg.train.eval_interval == 0 or epoch + 1 == epochs
        if evaluated and start_step < steps:  # a stop or crash in it must not cost the epoch
            state.epoch, state.step, state.meters = epoch, steps, logger.state_dict()
            save()
        try:
            best = evaluated and judge(
                task, cfg, state, run, val_loader, device, record, stop.wanted
            )
        except StoppedMidway:  # the evaluation is repeated by the run that continues
            stop.agreed = True
            break
        kept = evaluated or (cfg.train.keep_every and (epoch + 1) % cfg.train.keep_every == 0)
        state.epoch, state.step, state.meters = epoch + 1, 0, {}
        run.log_epoch(record)
        save(best, numbered=epoch if kept else None)
        agree_to_stop(stop)
        if stop.agreed and epoch + 1 < epochs:
            break
    if stop.agreed and state.epoch < epochs:
        exit_stopped(stop, run, state)
    run.wait_saved()
    run.status("finished", epoch=state.epoch, best=state.best_scores)
    checkpoint = next(path for path in (run.path / BEST, run.path / LAST) if path.exists())
    needed = [flag for flag, required in task.PREDICT_FLAGS.items() if required]
    flags = "".join(f" --{flag} {flag.upper()}.png" for flag in needed)
    get_logger().info(
        f"best: {'  '.join(f'{k}: {v:.5f}' for k, v in state.best_scores.items())}\n"
        f"checkpoint: {checkpoint}\n"
        f"next: python predict.py YOUR_IMAGE.jpg{flags} --weights {checkpoint}"
    )


def judge(
    task: ModuleType,
    cfg: Any,
    state: TrainingState,
    run: RunFolder,
    loader: DataLoader,
    device: torch.device,
    record: dict[str, Any],
    stop_requested: Callable[[], bool],
) -> bool:
    """Evaluate and add the scores to the epoch's record; returns whether they are the best so far.

    If the deciding one has not improved for long enough, the learning rates shrink.
    """
    metric, goal = deciding_metric(cfg, task.METRICS)
    networks = averaged(state)
    scores = score(task, cfg, networks, loader, device, run, record["step"], stop_requested)
    if scores[metric] != scores[metric]:
        raise UserError(
            f"epoch {record['epoch']}: {metric} is nan: the validation data hold nothing to score, "
            "or the network's output is not finite. Check both."
        )
    record |= {f"val/{name}": value for name, value in scores.items()}
    best = state.note_scores(scores, metric, goal)
    if state.stale and state.stale % cfg.train.plateau_patience == 0:
        state.scale_learning_rates(cfg.train.plateau_factor)
    return best


def averaged(state: TrainingState) -> dict[str, torch.nn.Module]:
    """The networks to evaluate: the moving averages where they are kept."""
    return {name: ema.module for name, ema in state.ema.items()} or state.models


def save_samples(
    task: ModuleType,
    cfg: Any,
    networks: dict[str, torch.nn.Module],
    dataset: Dataset,
    device: torch.device,
    run: RunFolder,
    step: int,
) -> None:
    """A sheet of the first validation samples, drawn by this process alone."""
    mark("drawing a sheet of samples")
    items = [dataset[SampleKey(0, index)] for index in range(min(SHEET_ROWS, len(dataset)))]
    amp_dtype = choose_amp_dtype(cfg.eval.amp, device, "eval.amp")
    with tf32(cfg.eval.tf32):
        samples = predict_samples(networks, items, device, task.predict(cfg), amp_dtype)
    run.save_sheet(contact_sheet([task.sheet_row(cfg, sample) for sample in samples]), step)


def score(
    task: ModuleType,
    cfg: Any,
    networks: dict[str, torch.nn.Module],
    loader: DataLoader,
    device: torch.device,
    run: RunFolder | None = None,
    step: int = 0,
    stop_requested: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Evaluate networks; returns the scores, and gives a run its pictures."""
    samples: list[Sample] = []
    with tf32(cfg.eval.tf32):
        metrics = evaluate(
            networks,
            loader,
            device,
            metrics=task.make_metrics(cfg),
            predict=task.predict(cfg),
            keep=SHEET_ROWS if run and run.writes else 0,
            samples=samples,
            stop_requested=stop_requested,
            amp_dtype=choose_amp_dtype(cfg.eval.amp, device, "eval.amp"),
        )
    if samples:
        rows = [task.sheet_row(cfg, sample) for sample in samples]
        run.log_picture("val/sheet", contact_sheet(rows), step)
        curves = task.curves(metrics) if hasattr(task, "curves") else {}
        for tag, curve in curves.items():
            run.log_pr_curve(tag, curve, step)
    scores = all_scores(metrics)
    get_logger().info("val  " + "  ".join(f"{name}: {value:.5f}" for name, value in scores.items()))
    for remark in all_remarks(metrics):
        get_logger().info(f"     {remark}")
    return scores


if __name__ == "__main__":
    with clean_errors():
        refuse_launcher("train.py")
    with launched(args):
        main(args)
