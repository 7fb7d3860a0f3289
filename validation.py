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

import argparse
import json
import math
from pathlib import Path
from typing import Any

from arguments import parse_validation_args as parse_args

if __name__ == "__main__":  # before the imports that take seconds
    args = parse_args(description=__doc__)

import torch
from torch import Tensor

import tasks
from my_dataset import PairFolderDataset, check_pairs, readable
from process_setup import keep_freed_memory
from train_utils import evaluate
from train_utils.amp import choose_amp_dtype
from train_utils.config import merge, parse_assignments
from train_utils.data import eval_loader
from train_utils.device import allow_tf32
from train_utils.distributed_utils import call_on_main, is_main_process
from train_utils.errors import UserError
from train_utils.files import write_text
from train_utils.log import get_logger
from train_utils.metrics import (
    ExactMetric,
    F1Score,
    MeanAbsoluteError,
    ToolboxMetrics,
    all_remarks,
    all_scores,
)
from train_utils.run_folder import newest_best_checkpoint
from train_utils.setup import launched, place_models, worker_count


def main(args: argparse.Namespace) -> None:
    """Score and report, as rank `args.rank` of `args.world_size` processes."""
    if args.json and (Path(args.json).is_dir() or not Path(args.json).resolve().parent.is_dir()):
        raise UserError(f"--json {args.json}: not a file in a folder that exists. Make it first.")
    scores = score_files(args) if args.predictions else score_weights(args)
    if not is_main_process():
        return
    if scores["n"] == 0:
        raise UserError("no image was scored: the data set is empty. Check its folder.")
    remarks = scores.get("remarks", [])
    if all(math.isnan(score) for name, score in scores.items() if name not in ("n", "remarks")):
        raise UserError(
            f"nothing could be scored ({'; '.join(remarks) or 'every score is nan'}). Check the "
            "targets, and the weights for values that are not finite."
        )
    numbers = {name: value for name, value in scores.items() if name != "remarks"}
    get_logger().info("  ".join(f"{name}: {value:.6g}" for name, value in numbers.items()))
    for remark in remarks:
        get_logger().info(remark)
    if args.json:
        write_json(Path(args.json), scores)


def write_json(path: Path, scores: dict[str, Any]) -> None:
    """Write the scores, whole or not at all."""
    finite = {name: None if score != score else score for name, score in scores.items()}
    text = json.dumps(finite, indent=2) + "\n"
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_text(text, encoding="utf-8")
        else:
            write_text(path, text)
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot be written ({error.strerror}). Choose another file."
        ) from error


def score_weights(args: argparse.Namespace) -> dict[str, Any]:
    """Scores of a network on its task's validation data."""
    device = torch.device(args.device)
    keep_freed_memory(device.type)
    weights = args.weights or newest_best_checkpoint()
    task, models = tasks.load_models(weights, overrides_of(args), args.config)
    cfg = task.cfg
    amp_dtype = choose_amp_dtype(cfg.eval.amp, device, "eval.amp")
    allow_tf32(cfg.eval.tf32)
    if args.post_norm and not hasattr(cfg.eval, "post_norm"):
        raise UserError(f"--post-norm: is for saliency maps, and {weights} is of another task.")
    if args.post_norm:
        cfg.eval.post_norm = True
    if args.toolbox and not task.make_toolbox_metrics():
        raise UserError(f"--toolbox: scores saliency maps, and {weights} is of another task.")
    models = place_models(models, device, sync_bn=False)
    cfg.data.cache = "none"  # nothing is read twice
    (dataset,) = readable(cfg.data, task.build_val_dataset(all_pairs=bool(args.images)))
    workers = worker_count(args.workers, device, args.local_world_size)
    call_on_main(lambda: task.prepare_data(None, dataset, workers))
    loader = eval_loader(dataset, args.batch_size, workers, device, args.rank, args.world_size)
    get_logger().info(f"{weights}: {len(dataset)} images on {args.world_size} process(es)")
    metrics = task.make_metrics()
    if args.toolbox:
        metrics += task.make_toolbox_metrics()
    evaluate(models, loader, device, metrics=metrics, predict=task.predict, amp_dtype=amp_dtype)
    return report(metrics)


def score_files(args: argparse.Namespace) -> dict[str, Any]:
    """Scores of prediction maps, 8-bit images with the names of their masks."""
    if not args.masks:
        raise UserError("--predictions: needs the masks to compare with. Add --masks DIR.")
    pairs = PairFolderDataset(args.predictions, args.masks, transforms=_as_maps)
    if pairs.unmatched_masks:
        raise UserError(
            f"{args.predictions}: {pairs.unmatched_masks} of the masks in {args.masks} have no "
            "prediction, and leaving images out flatters the scores. Predict them all, or score "
            "against the masks that are meant."
        )
    check_pairs(pairs)
    metrics = (MeanAbsoluteError(args.post_norm), F1Score(args.post_norm))
    metrics += (ToolboxMetrics(),) if args.toolbox else ()
    for index in range(args.rank, len(pairs), args.world_size):
        prediction, mask = pairs[index]
        for metric in metrics:
            metric.update([prediction], [mask])
    for metric in metrics:
        metric.reduce_from_all_processes()
    return report(metrics)


def _as_maps(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return image[:1], mask  # a map is grey: its three channels are equal


def report(metrics: tuple[ExactMetric, ...]) -> dict[str, Any]:
    """All scores by name at full precision, `n`, the number of images, and remarks if any."""
    remarks = all_remarks(metrics)
    return {
        **all_scores(metrics),
        "n": metrics[0].count,
        **({"remarks": remarks} if remarks else {}),
    }


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """The command line's part of the config."""
    data = {"root": args.data_path, "images": args.images, "masks": args.masks}
    data = {key: value for key, value in data.items() if value is not None}
    return merge({"data": data}, parse_assignments(args.set))


if __name__ == "__main__":
    with launched(args):
        main(args)
