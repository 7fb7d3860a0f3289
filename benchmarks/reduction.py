"""What the numbers that processes exchange cost a training step.

    python -m benchmarks.reduction                             2 processes; 1, 7 and 30 meters
    python -m benchmarks.reduction --size 288 --meters 7 --json reduction.json

plain: `.item()` of every meter in every step, and at every log line a barrier and an all-reduce for
each meter. ours: the agreement on counts in every step, values that stay where they are, and one
all-reduce for all meters at every log line. Both run without the training around them, and take
turns with real data-parallel steps of u2net_lite, of which the shares are. "agreeing" is the part
of ours that plain does without: there losses are averaged by each process for itself, and a stop
signal to one process strands the others. What `.item()` costs a GPU that runs dry meanwhile is not
in plain: see benchmarks/training_step.py.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import MODELS, make_parser, positive, ratio, report, take_turns
from benchmarks.processes import Work, World
from benchmarks.scaling import training_loop
from train_utils.metric_logger import MetricLogger, SmoothedValue
from train_utils.setup import clean_errors
from train_utils.train_and_eval import Batch, shares_of_step


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__ or "")
    add = parser.add_argument
    add("--processes", type=positive, default=2)
    add("--meters", type=positive, nargs="+", default=[1, 7, 30])
    add("--model", default="u2net_lite", choices=MODELS)
    add("-b", "--batch-size", type=positive, default=4, help="images per process")
    add("--size", type=positive, default=64, help="side of the images")
    add("--print-freq", type=positive, default=10, help="steps per log line")
    add("--lines", type=positive, default=5, help="log lines per block of either way")
    add("--steps", type=positive, default=2, help="training steps per block")
    add("--threads", type=positive, default=1, help="per process")
    return parser.parse_args(argv)


def plain(values: dict[str, Tensor], print_freq: int, lines: int) -> None:
    """Meters that read every value at once and are summed over processes one by one."""
    totals = {name: [0.0, 0] for name in values}
    for step in range(print_freq * lines):
        for name, value in values.items():
            totals[name][0] += value.item()
            totals[name][1] += 1
        if (step + 1) % print_freq == 0:
            for name, value in values.items():
                both = torch.tensor(totals[name], dtype=torch.float64, device=value.device)
                dist.barrier()
                dist.all_reduce(both)
                both.tolist()


def ours(values: dict[str, Tensor], batch: Batch, print_freq: int, lines: int) -> None:
    """What `train_one_epoch` does for its numbers."""
    logger = MetricLogger(reduce=True)
    logger.add_meter("lr", SmoothedValue(window_size=1))
    for step in range(print_freq * lines):
        _, images, _ = shares_of_step([batch], None, stop=False)
        logger.update(images, **values, lr=1e-3)
        if (step + 1) % print_freq == 0:
            logger.flush()


def agree(batch: Batch, steps: int) -> None:
    """The part of `ours` that every step has, whatever the number of meters."""
    for _ in range(steps):
        shares_of_step([batch], None, stop=False)


def make_work(
    device: torch.device,
    model: str,
    batch_size: int,
    size: int,
    steps: int,
    meters: Sequence[int],
    print_freq: int,
    lines: int,
) -> Work:
    """Blocks of training steps, and of both ways of reduction for so many meters."""
    train, _ = training_loop(device, model, batch_size, size)
    work: dict[str, Callable[[], None]] = {"step": partial(train, steps)}
    batch = (torch.zeros(batch_size, 3, size, size), torch.zeros(batch_size, 1, size, size))
    work["agree"] = partial(agree, batch, print_freq * lines)
    for count in meters:
        values = {f"loss_{i}": torch.tensor(0.5, device=device) for i in range(count)}
        work[f"plain {count}"] = partial(plain, values, print_freq, lines)
        work[f"ours {count}"] = partial(ours, values, batch, print_freq, lines)
    return work


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    training = (args.model, args.batch_size, args.size, args.steps)
    ways = (args.meters, args.print_freq, args.lines)
    world = World(args.processes, args.device, args.threads, make_work, *training, *ways)
    names = [
        "step",
        "agree",
        *(f"{way} {count}" for count in args.meters for way in ("plain", "ours")),
    ]
    times = take_turns({name: partial(world, name) for name in names}, args.rounds)
    world.close()
    step, per_block = median(times["step"]) / args.steps, args.print_freq * args.lines
    rows = []
    for count in args.meters:
        usual, own = (median(times[f"{way} {count}"]) / per_block for way in ("plain", "ours"))
        rows.append(
            {
                "meters": count,
                "step ms": step * 1e3,
                "plain µs": usual * 1e6,
                "ours µs": own * 1e6,
                "agreeing µs": median(times["agree"]) / per_block * 1e6,
                "ratio": ratio(times, f"ours {count}", f"plain {count}"),
                "plain share": usual / step,
                "ours share": own / step,
            }
        )
    print(f"{args.processes} processes, {args.batch_size} images of {args.size} px each per step")
    report(args, rows)


if __name__ == "__main__":
    with clean_errors():
        main()
