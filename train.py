"""Train a network on one CPU or one GPU.

    python train.py                                      embedded data: no download, 6 minutes
    python train.py --images photos --masks masks        your own pairs
    python train.py --config configs/u2net_lite.yaml --data-path DIR     DUTS, the published recipe
    python train.py --resume auto                        continue the newest run

Several processes take the same arguments: torchrun --nproc_per_node=N train_multi_GPU.py …
"""

from launch.heap import keep_freed_memory

keep_freed_memory()  # before the imports that take seconds

import argparse

import torch

import tasks
from train_utils import train_one_epoch
from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.arguments import parse_args
from train_utils.config import to_dict
from train_utils.datasets import fingerprint
from train_utils.distributed_utils import refuse_launcher
from train_utils.dry_run import dry_run
from train_utils.ema import ExponentialMovingAverage
from train_utils.prepare_data import prepare_datasets
from train_utils.run import Run, evaluate_task
from train_utils.setup import (
    build_loaders,
    build_val_loader,
    clean_errors,
    launched,
    place_models,
    start_process,
    step_options,
    wrap_models,
)
from train_utils.task import BaseTask
from train_utils.training_state import TrainingState


def main(args: argparse.Namespace) -> None:
    """Arguments → data → networks → resume → epochs, as rank `args.rank` of `args.world_size`."""
    task, resume, saved = tasks.configure(args)
    device = torch.device(args.device)
    start_process(args, task.cfg)
    if args.test_only:
        evaluate_only(args, task, task.cfg.train.weights or str(resume))
        return

    # Data. What a step's samples are does not depend on the number of processes or workers.
    train_set, val_set = task.build_datasets()  # or any two torch Datasets
    task, train_set, val_set = prepare_datasets(task, train_set, val_set)
    loader, val_loader, sampler = build_loaders(args, task, train_set, val_set, saved)
    cfg = task.cfg

    # Networks, and what trains them.
    sync_bn = cfg.train.sync_bn and args.world_size > 1
    networks = place_models(tasks.start_models(task, resume, saved), device, sync_bn)
    optimizers = task.build_optimizers(networks)  # or any of torch.optim, or a library's
    dry_run(task, networks, optimizers, loader, val_loader, device)
    schedulers = task.build_schedulers(optimizers, sampler.steps_per_epoch)
    amp_dtype, decay = choose_amp_dtype(cfg.train.amp, device), cfg.train.ema
    state = TrainingState(
        networks,
        optimizers,
        schedulers,
        scalers={name: make_scaler(amp_dtype, device) for name in optimizers},
        ema={n: ExponentialMovingAverage(m, decay) for n, m in networks.items() if decay},
        config=to_dict(cfg),
        data=fingerprint(train_set),
        sampler=sampler,
        folders=cfg.data.folders(),
    )
    if saved:
        state.restore(saved, str(resume))
        saved.clear()  # half a gigabyte, for a large network

    with Run(args, task, state, resume, loader, val_loader) as run:
        models = wrap_models(networks, device, cfg.train.compile)
        options = step_options(cfg.train, amp_dtype, sampler.parts_per_step, state.ema)
        for epoch in run.epochs():
            train_one_epoch(
                models,
                optimizers,
                loader,
                device,
                epoch,
                schedulers,
                cfg.train.print_freq,
                state.scalers,
                losses=task.losses,
                weight=task.weight,
                options=options,
                run=run,
            )
            due = run.evaluates(epoch)
            scores = evaluate_task(task, run.networks, val_loader, device, run) if due else {}
            run.end_epoch(epoch, scores)


def evaluate_only(args: argparse.Namespace, task: BaseTask, weights: str) -> None:
    """Evaluate weights on the recipe's validation data."""
    device = torch.device(args.device)
    networks = tasks.networks_with(task, tasks.read_weights(task, weights), weights)
    task.cfg.data.cache = "none"  # nothing is read twice
    task, _, val_set = prepare_datasets(task, None, task.build_val_dataset())
    networks = place_models(networks, device, sync_bn=False)
    evaluate_task(task, networks, build_val_loader(args, task.cfg, val_set), device)


if __name__ == "__main__":
    with clean_errors():
        refuse_launcher("train.py")
    args = parse_args(description=__doc__, flags=tasks.train_flags())
    with launched(args):
        main(args)
