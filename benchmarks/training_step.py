"""What a training step costs: the usual way and ours, for every system, in one run.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --systems u2net_full --batches 1 4 8 --json step.json
    python -m benchmarks.training_step --systems u2net_lite --size 64

plain is `benchmarks/plain.py`; "plain amp" the same under autocast, where ours is in 16 bits (fp16
without a scaler); ours is `train_one_epoch` with the recipe's own settings. On CPUs the process of
ours is set up as train.py is, and "same env" is plain in such a process: what is left is the code.
All see the same batches, which wait in the host's memory, plain's as floats already, and take turns
of --steps steps, each way in a process of its own. Figures are medians per step. The share is that
of the FLOPs (counted by torch) per second in the ceiling, GFLOP/s of the fastest 3×3 convolution of
the same dtype, measured in the same run; the limit is the ratio to plain at which the share would
be 1. Memory is each way's peak in MB: of the GPU's allocator, or of the process beyond what the
imports take.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

import tasks
from benchmarks import common, plain
from benchmarks.processes import Work, processes_of
from train_utils import train_one_epoch
from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.config import load_yaml, merge
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.device import allow_tf32
from train_utils.metric_logger import peak_memory_mb
from train_utils.setup import (
    clean_errors,
    place_models,
    seed_everything,
    wrap_models,
)
from train_utils.train_and_eval import EpochRun, StepOptions, mean_losses

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class System(NamedTuple):
    """A published recipe and the batch sizes to try, the side of its images from the recipe."""

    recipe: str
    batches: tuple[int, ...]
    values: Mapping[str, Any] = {}


_CE = {"loss": {"terms": ["ce"]}}
_UNET = {"data": {"class_names": None}, "model": {"weights": None}, **_CE}
SYSTEMS = {
    "u2net_full": System("u2net_full", (1, 4)),
    "u2net_lite": System("u2net_lite", (1, 4, 16)),
    "fcn": System(
        "fcn_bag", (4,), {**_UNET, "data": {"class_names": None, "mask_values": "index"}}
    ),
    "unet_vgg16": System("unet_voc", (1, 2), _UNET),
    "matting": System("matting_composed", (1, 4), {"model": {"weights": None}}),
    "pix2pix": System("pix2pix_facades", (1, 4)),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument(
        "--batches", nargs="+", type=common.positive, help="default: each system's own"
    )
    parser.add_argument(
        "--size", type=common.positive, help="side of the images (default: the recipe's)"
    )
    parser.add_argument("--steps", type=common.positive, default=1, help="steps per turn")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"])
    parser.add_argument("--compile", action="store_true", help="ours under torch.compile")
    return parser.parse_args(argv)


def make_work(
    device: torch.device, args: argparse.Namespace, system: str, batch_size: int, way: str
) -> Work:
    """What the process of a way does: train, count FLOPs, and tell its peak of memory in MB."""
    gpu = device.type != "cpu"
    before = 0.0 if gpu else common.resident_mb("VmRSS")
    train = make_way(args, system, batch_size, way)
    return {
        "train": train,
        "flops": lambda: common.convolution_flops(train),
        "memory": lambda: peak_memory_mb() if gpu else common.resident_mb("VmHWM") - before,
    }


def make_way(
    args: argparse.Namespace, system: str, batch_size: int, way: str
) -> Callable[[], plain.Losses]:
    """A function that trains for `--steps` steps and returns the last (ours: the mean) losses.

    All ways start from the same weights and see the same batches.
    """
    device = torch.device(args.device)
    task, cfg = _configured(args, system, batch_size)
    seed_everything(cfg.train.seed, deterministic=False)
    sampler = GlobalBatchSampler(args.steps * batch_size, batch_size)
    train_set, _ = task.build_datasets()
    batches = list(train_loader(train_set, sampler, workers=0, device=device))
    if way == "ours":
        return _ours(task, cfg, batches, device)
    dtype = choose_amp_dtype(args.amp, device) if way.startswith("plain amp") else None
    precision = partial(torch.autocast, device.type, dtype) if dtype else nullcontext
    return _plain(task, cfg, batches, device, precision)


def _configured(args: argparse.Namespace, system: str, batch_size: int) -> tuple[Any, Any]:
    recipe, _, values = SYSTEMS[system]
    data: dict[str, Any] = {"name": "shapes", "train_size": args.steps * batch_size}
    if args.size:
        data["image_size"] = args.size
        data |= {"load_size": args.size} if system == "pix2pix" else {}
        data |= {"crop_sizes": [args.size]} if system == "matting" else {}
    train = {"amp": args.amp, "compile": args.compile, "batch_size": batch_size}
    merged = merge(
        load_yaml(CONFIGS / f"{recipe}.yaml"), dict(values), {"data": data, "train": train}
    )
    task = tasks.read_config(merged, "benchmark", {})
    return task, task.cfg


def _plain(
    task: Any, cfg: Any, batches: list, device: torch.device, precision: Callable
) -> Callable[[], plain.Losses]:
    torch.manual_seed(cfg.train.seed)
    models = {name: model.to(device) for name, model in task.build_models().items()}
    optimizers = plain.optimizers(models, cfg)
    hosted = [plain.host_batch(cfg.task, batch) for batch in batches]
    if device.type == "cuda":  # as ours, and as a stock DataLoader with pin_memory
        hosted = [[tensor.pin_memory() for tensor in batch] for batch in hosted]

    def train() -> plain.Losses:
        for batch in hosted:
            losses = plain.STEPS[cfg.task](models, optimizers, batch, device, precision)
        return losses

    return train


def _ours(task: Any, cfg: Any, batches: Any, device: torch.device) -> Callable[[], plain.Losses]:
    torch.manual_seed(cfg.train.seed)
    networks = place_models(task.build_models(), device, sync_bn=False)
    optimizers = task.build_optimizers(networks)
    schedulers = task.build_schedulers(optimizers, 1000)
    models = wrap_models(networks, device, cfg.train.compile)
    dtype = choose_amp_dtype(cfg.train.amp, device)
    scalers = {name: make_scaler(dtype, device) for name in optimizers}
    allow_tf32(cfg.train.tf32)
    options = StepOptions(dtype, clip_value=cfg.train.clip_value, seed=cfg.train.seed)

    def train() -> plain.Losses:
        run = EpochRun()
        train_one_epoch(
            models,
            optimizers,
            batches,
            device,
            0,
            schedulers,
            scaler=scalers,
            losses=task.losses,
            weight=task.weight,
            options=options,
            run=run,
        )
        return mean_losses(run.logger)

    return train


def measure(args: argparse.Namespace, system: str, batch_size: int, ceilings: dict) -> dict:
    """A row of the table: milliseconds per step, ratios, share of the ceiling, memory."""
    device = torch.device(args.device)
    names = common.names_of_ways(device, choose_amp_dtype(args.amp, device))
    ways = {name: (args, system, batch_size, name) for name in names}
    set_up = list(filter(common.has_settings, names))
    with processes_of(args.device, make_work, ways, set_up) as worlds:
        work = worlds["plain"]("flops") / args.steps
        train = {name: partial(world, "train") for name, world in worlds.items()}
        times = common.take_turns(train, args.rounds)
        peaks = {f"{name} MB": world("memory") for name, world in worlds.items()}
    row: dict[str, Any] = {"system": system, "batch": batch_size}
    row["GFLOP/img"] = work / batch_size / 1e9
    row |= {f"{name} ms": median(each) / args.steps * 1e3 for name, each in times.items()}
    row |= {"ours img/s": batch_size * 1e3 / row["ours ms"]}
    row |= {f"× {name}": common.ratio(times, "ours", name) for name in names if name != "ours"}
    dtype = choose_amp_dtype(args.amp, device) or torch.float32
    row["ceiling"] = ceilings[f"conv {str(dtype)[6:]}"]
    row["share"] = work / row["ours ms"] / 1e6 / row["ceiling"]
    row["limit"] = row["× plain"] / row["share"]
    return row | peaks


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    dtypes = dict.fromkeys([torch.float32, choose_amp_dtype(args.amp, device) or torch.float32])
    ceilings = common.ceilings(device, list(dtypes))
    rows = [
        measure(args, system, batch_size, ceilings)
        for system in args.systems
        for batch_size in args.batches or SYSTEMS[system].batches
    ]
    common.report(args, rows, ceilings)


if __name__ == "__main__":
    with clean_errors():
        main()
