"""What saving costs a training: no saving, synchronous and asynchronous, in one run.

    python -m benchmarks.checkpoint_cost
    python -m benchmarks.checkpoint_cost --model u2net_full --size 160 --every 4 --json cost.json

"sync" is ours on the training's own thread: a bare torch.save does without its flush to the disk.
Blocks of --every steps, each begun with a save, take turns between the three ways, so that what
else the machine does meets all of them. Lost is the call, and by how much the steps taken while the
file is written are longer than those of a training that does not save. All are medians. TMPDIR
chooses the disk.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.common import MODELS, make_parser, positive, synchronize
from train_utils import create_lr_scheduler
from train_utils.checkpoint import CheckpointWriter, save_checkpoint
from train_utils.losses import criterion
from train_utils.schedule import get_params_groups
from train_utils.setup import clean_errors

WAYS = ("none", "sync", "async")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=10)
    add = parser.add_argument
    add("--model", default="u2net_lite", choices=MODELS)
    add("-b", "--batch-size", type=positive, default=4)
    add("--size", type=positive, default=64, help="side of the images")
    add("--every", type=positive, default=10, metavar="STEPS", help="steps from save to save")
    add("--epoch-steps", type=positive, default=100, help="steps per save for the share")
    return parser.parse_args(argv)


def make_training(args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Any]]:
    """A training step on synthetic tensors, and what a checkpoint of it holds."""
    device = torch.device(args.device)
    model = MODELS[args.model]().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(get_params_groups(model), lr=1e-3, fused=True)
    schedule = create_lr_scheduler(optimizer, args.epoch_steps, epochs=100)
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    masks = (torch.rand(args.batch_size, 1, args.size, args.size, device=device) > 0.5).float()

    def step() -> None:
        criterion(model(images), masks).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        synchronize(device)

    step()  # the optimizer has its state from the first step on
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
    return step, parts


class Block(NamedTuple):
    """Seconds: of the save's call, until its file was written, and of every step."""

    call: float
    written: float
    steps: list[float]

    def lost(self, step: float) -> float:
        """What the save took from the training thread, if a step takes `step` without one."""
        ends = accumulate(self.steps, initial=self.call)
        during = [t for t, begin in zip(self.steps, ends, strict=False) if begin < self.written]
        return self.call + sum(during) - len(during) * step


def measure(args: argparse.Namespace, path: Path) -> dict[str, list[Block]]:
    """Train with saves to `path`; the blocks of each way of saving, without the first."""
    step, parts = make_training(args)
    writer = CheckpointWriter()

    def block(way: str) -> Block:
        start, written = time.perf_counter(), [0.0]
        state = {name: part.state_dict() for name, part in parts.items()}
        if way == "sync":
            save_checkpoint(state, path)
            written = [time.perf_counter() - start]
        elif way == "async":
            writer.submit(state, path, done=lambda: written.append(time.perf_counter() - start))
        marks = [time.perf_counter()]
        for _ in range(args.every):
            step()
            marks.append(time.perf_counter())
        writer.wait()
        steps = [end - begin for begin, end in pairwise(marks)]
        return Block(marks[0] - start, written[-1], steps)

    rounds = [{way: block(way) for way in WAYS} for _ in range(args.rounds + 1)]
    return {way: [blocks[way] for blocks in rounds[1:]] for way in WAYS}


def summarise(blocks: dict[str, list[Block]], size: int, epoch_steps: int) -> dict[str, dict]:
    """Medians by way of saving, in seconds, and the share of an epoch's time that a save takes."""
    plain = median(t for block in blocks["none"] for t in block.steps)
    return {
        way: {
            "step_s": median(t for block in each for t in block.steps),
            "call_s": median(block.call for block in each),
            "lost_s": (lost := median(block.lost(plain) for block in each)),
            "written_s": median(block.written for block in each),
            "file_mb": size / 1e6,
            "share": lost / (epoch_steps * plain),
        }
        for way, each in blocks.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.pth")
        blocks = measure(args, path)
        rows = summarise(blocks, path.stat().st_size, args.epoch_steps)
    print(
        f"{args.model} on {args.device}, {args.batch_size} images of {args.size} px per step, "
        f"{args.rounds} blocks of {args.every} steps each.\n"
        f"share: of the training time, at a save per {args.epoch_steps} steps\n"
        f"{'saving':8}{'step s':>8}{'call s':>8}{'lost s':>8}{'written s':>11}{'file MB':>9}"
        f"{'share':>8}"
    )
    for way in WAYS:
        step, call, lost, written, size, share = rows[way].values()
        print(f"{way:8}{step:8.3f}{call:8.3f}{lost:8.3f}{written:11.3f}{size:9.1f}{share:8.2%}")
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"settings": settings, "saving": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with clean_errors():
        main()
