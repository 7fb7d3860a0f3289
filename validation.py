"""Score weights on labelled images, or score prediction files.

    python validation.py --weights runs/…/model_best.pth                 the run's own data
    python validation.py --weights FILE --data-path DIR                  DIR/DUTS-TE
    python validation.py --weights FILE --images DIR --masks DIR --json scores.json
    python validation.py --weights u2netp.pth --data-path DIR \\
        --set data.mean=[0,0,0] --set data.std=[1,1,1]                a foreign preprocessing
    python validation.py --predictions DIR --masks DIR --toolbox         maps written by any program
    torchrun --nproc_per_node=4 validation.py …                          the same numbers, sooner

The network is found from the file. Every sample is scored once, by one process; on CPUs the scores
are the same to the last bit for any number of processes, threads and images per batch.
"""

from launch.heap import keep_freed_memory

keep_freed_memory()  # before the imports that take seconds

import argparse
from pathlib import Path
from typing import Any

import torch

import tasks
from train_utils import evaluate
from train_utils.amp import choose_amp_dtype
from train_utils.arguments import parse_validation_args
from train_utils.collectives import is_main_process
from train_utils.config import load_yaml, merge, parse_assignments
from train_utils.device import allow_tf32
from train_utils.errors import UserError, typed
from train_utils.log import get_logger
from train_utils.prepare_data import prepare_datasets
from train_utils.run_folder import newest_best_checkpoint
from train_utils.scores import check_json, report, scores_of, write_json
from train_utils.setup import build_val_loader, launched, place_models
from train_utils.task import BaseTask


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the switches that tasks declare."""
    declared = [task.SCORE_FLAGS for task in tasks.all_tasks().values()]
    switches = {name: about for flags in declared for name, about in flags.items()}
    args = parse_validation_args(argv, __doc__, switches)
    args.switches = [name for name in switches if vars(args)[name.replace("-", "_")]]
    return args


def main(args: argparse.Namespace) -> None:
    """Score and report, as rank `args.rank` of `args.world_size` processes."""
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        raise UserError(
            f"--json {typed(args.json)}: not a file in a folder that exists. Make it first."
        )
    if args.json:
        check_json(Path(args.json))
    scores = score_files(args) if args.predictions else score_weights(args)
    if is_main_process():
        report(scores)
        if args.json:
            write_json(Path(args.json), scores)


def score_weights(args: argparse.Namespace) -> dict[str, Any]:
    """Scores of a network on its task's validation data."""
    device = torch.device(args.device)
    weights = args.weights or newest_best_checkpoint()
    data = {"root": args.data_path, "images": args.images, "masks": args.masks}
    data = {key: value for key, value in data.items() if value is not None}
    settings = merge({"data": data}, parse_assignments(args.set))
    task, models = tasks.load_models(weights, settings, args.config)
    cfg = task.cfg
    check_switches(args.switches, task, str(weights))
    amp_dtype = choose_amp_dtype(cfg.eval.amp, device, "eval.amp")
    allow_tf32(cfg.eval.tf32)
    models = place_models(models, device, sync_bn=False)

    cfg.data.cache = "none"  # nothing is read twice
    cfg.train.workers, cfg.eval.batch_size = args.workers, args.batch_size
    given = settings.get("data", {}).keys() & {"images", "list"}
    dataset: Any = task.build_val_dataset(all_pairs=bool(given))
    count = len(dataset)
    task, _, dataset = prepare_datasets(task, None, dataset)
    loader = build_val_loader(args, cfg, dataset)
    rest = f" ({count - len(dataset)} left out)" if len(dataset) < count else ""
    get_logger().info(f"{weights}: {len(dataset)} images{rest} on {args.world_size} process(es)")
    metrics = task.metrics_with(args.switches)
    evaluate(models, loader, device, metrics=metrics, predict=task.predict, amp_dtype=amp_dtype)
    return scores_of(metrics)


def score_files(args: argparse.Namespace) -> dict[str, Any]:
    """Scores of files that any program wrote; --config or --set task=… says of which task."""
    if not args.masks:
        raise UserError("--predictions: needs the masks to compare with. Add --masks DIR.")
    recipe = load_yaml(args.config) if args.config else {}
    task = tasks.read_config(recipe, args.config or "recipe", parse_assignments(args.set))
    check_switches(args.switches, task, args.predictions)
    pairs = task.pairs_of_files(args.predictions, args.masks)
    metrics = task.metrics_with(args.switches)
    for index in range(args.rank, len(pairs), args.world_size):
        prediction, target = pairs[index]
        for metric in metrics:
            metric.update([prediction], [target])
    for metric in metrics:
        metric.reduce_from_all_processes()
    return scores_of(metrics)


def check_switches(switches: list[str], task: BaseTask, source: str) -> None:
    """UserError for a switch that is another task's."""
    for name in switches:
        if name not in task.SCORE_FLAGS:
            owners = [of for of, each in tasks.all_tasks().items() if name in each.SCORE_FLAGS]
            raise UserError(
                f"--{name}: is for {' and '.join(owners)}, and {source} is of another task."
            )


if __name__ == "__main__":
    args = parse_args()
    with launched(args):
        main(args)
