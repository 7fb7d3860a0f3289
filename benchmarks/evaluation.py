"""How fast networks are scored: the usual way and ours, in one run.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --models u2net_full --images 32 --json evaluation.json
    python -m benchmarks.evaluation --models unet_vgg16 --device cuda

plain takes one image at a time through the network as it was trained, NCHW in fp32 ("plain amp"
under autocast, where ours is in 16 bits), all cores on that image, and adds up its metrics on the
host. ours is `evaluate` with the task's own metrics. On CPUs its process keeps freed memory, as
validation.py does, and so does that of "same env". All see the same samples: embedded scenes in
memory, with masks of 400×300 pixels; plain's are normalised beforehand. Each way has a process of
its own. The share is that of the FLOPs (counted by torch) per second in the fastest 3×3
convolution of the same dtype; the limit is the ratio at which the share would be 1.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tasks
from benchmarks import common, plain
from benchmarks.processes import Work, processes_of
from train_utils import evaluate
from train_utils.amp import choose_amp_dtype
from train_utils.setup import clean_errors

MASK_SIZE = (300, 400)
SYSTEMS: dict[str, dict[str, Any]] = {
    "u2net_lite": {"task": "saliency", "model": {"name": "u2net_lite"}},
    "u2net_full": {"task": "saliency", "model": {"name": "u2net_full"}},
    "unet": {"task": "segmentation", "model": {"name": "unet"}},
    "unet_vgg16": {"task": "segmentation", "model": {"name": "unet_vgg16", "weights": None}},
    "fcn": {"task": "segmentation", "model": {"name": "fcn", "weights": None}},
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, rounds=3)
    defaults = ["u2net_lite", "u2net_full", "unet_vgg16"]
    parser.add_argument("--models", nargs="+", default=defaults, choices=SYSTEMS)
    parser.add_argument(
        "--size", type=common.positive, default=320, help="side of the networks' input"
    )
    parser.add_argument("--images", type=common.positive, default=16)
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "fp16", "off"])
    return parser.parse_args(argv)


def plain_saliency(model: nn.Module, samples: list, device: torch.device) -> list[float]:
    """MAE and maxF1 of pairs of a normalised image [1, 3, S, S] and a mask [1, 1, H, W]."""
    error, precision, recall = 0.0, torch.zeros(255), torch.zeros(255)
    for image, mask in samples:
        image, mask = image.to(device), mask.to(device)
        saliency = F.interpolate(model(image).float(), mask.shape[-2:], mode="bilinear")
        error += (saliency - mask).abs().mean().item()
        salient = mask > 0.5
        found = [
            torch.histc(saliency[part].cpu(), 255, 0, 1).flip(0).cumsum(0)
            for part in (salient, ~salient)
        ]
        precision += found[0] / (found[0] + found[1] + 1e-4)
        recall += found[0] / (salient.sum().item() + 1e-4)
    precision, recall = precision / len(samples), recall / len(samples)
    f_scores = 1.3 * precision * recall / (0.3 * precision + recall + 1e-8)
    return [error / len(samples), f_scores.max().item()]


def plain_segmentation(model: nn.Module, samples: list, device: torch.device) -> list[float]:
    """mIoU of pairs of a normalised image [1, 3, S, S] and labels [1, H, W] (255: ignored)."""
    matrix: Any = 0
    for image, labels in samples:
        image, labels = image.to(device), labels.to(device)
        logits = F.interpolate(model(image).float(), labels.shape[-2:], mode="bilinear")
        classes = logits.shape[1]
        pairs = (labels * classes + logits.argmax(1))[labels != 255]
        matrix = matrix + torch.bincount(pairs, minlength=classes**2).cpu().view(classes, classes)
    right, true, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    return [(right / (true + found - right))[true > 0].mean().item()]


PLAIN = {"saliency": plain_saliency, "segmentation": plain_segmentation}


def make_work(device: torch.device, args: argparse.Namespace, system: str, way: str) -> Work:
    """What the process of a way does: score all images, or count its FLOPs."""
    score = make_way(args, system, way)
    return {"score": score, "flops": lambda: common.convolution_flops(score)}


def make_way(args: argparse.Namespace, system: str, way: str) -> Callable[[], Any]:
    """A function that scores all images."""
    device = torch.device(args.device)
    data = {"name": "shapes", "image_size": args.size, "val_size": args.images}
    data |= {"fit": "stretch"} if SYSTEMS[system]["task"] == "segmentation" else {}
    task = tasks.read_config({**SYSTEMS[system], "data": data}, "benchmark", {})
    cfg = task.cfg
    torch.manual_seed(0)
    models = {name: model.to(device).eval() for name, model in task.build_models().items()}
    scenes = task.build_val_dataset()
    samples: Any = [_sample(*scenes[index]) for index in range(args.images)]
    if way == "ours":
        return lambda: evaluate(
            models,
            samples,
            device,
            metrics=task.make_metrics(),
            predict=task.predict,
            amp_dtype=choose_amp_dtype(args.amp, device),
        )
    hosted = [plain.host_batch(cfg.task, sample) for sample in samples]
    dtype = choose_amp_dtype(args.amp, device) if way.startswith("plain amp") else None

    def score_plainly() -> list[float]:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=bool(dtype)):
            return PLAIN[cfg.task](models["model"], hosted, device)

    return score_plainly


def _sample(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of one: the image, and its target at the size of a photograph."""
    target = F.interpolate(target.as_subclass(Tensor)[None], MASK_SIZE, mode="nearest")
    return image.as_subclass(Tensor)[None], target


def measure(args: argparse.Namespace, system: str, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """A row of the table."""
    device = torch.device(args.device)
    names = common.names_of_ways(device, choose_amp_dtype(args.amp, device))
    ways = {name: (args, system, name) for name in names}
    set_up = list(filter(common.has_settings, names))
    with processes_of(args.device, make_work, ways, set_up) as worlds:
        work = worlds["plain"]("flops")
        score = {name: partial(world, "score") for name, world in worlds.items()}
        times = common.take_turns(score, args.rounds)
    rates = {name: args.images / median(each) for name, each in times.items()}
    row: dict[str, Any] = {"model": system, "GFLOP/img": work / args.images / 1e9}
    row |= {f"{name} img/s": rate for name, rate in rates.items()}
    row |= {f"× {name}": rates["ours"] / rates[name] for name in names if name != "ours"}
    dtype = choose_amp_dtype(args.amp, device) or torch.float32
    row["ceiling"] = ceilings[f"conv {str(dtype)[6:]}"]
    row["share"] = row["GFLOP/img"] * rates["ours"] / row["ceiling"]
    row["limit"] = row["× plain"] / row["share"]
    return row


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    dtype = choose_amp_dtype(args.amp, torch.device(args.device))
    dtypes = {torch.float32, dtype or torch.float32}
    ceilings = common.ceilings(args.device, sorted(dtypes, key=str))
    rows = [measure(args, system, ceilings) for system in args.models]
    common.report(args, rows, ceilings)


if __name__ == "__main__":
    with clean_errors():
        main()
