"""How training speeds up from one process to several, and what communication takes of it.

    python -m benchmarks.scaling                              u2net_lite on 1 and 2 processes
    python -m benchmarks.scaling --processes 1 2 4 --size 288

Real processes (gloo on CPUs, nccl on GPUs) run the product's training loop on a batch in memory,
each with --threads threads. All stay alive and take turns, in blocks of --steps steps, so that
whatever else the machine does meets all of them. "alone" is a step without exchange of gradients;
"predicted" is one process's step and the formulas of benchmarks/scaling_model.py on the latency and
bandwidth measured in the same run, without any overlap, as on CPUs, whose cores are all busy.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import MODELS, make_parser, positive, report, table, take_turns
from benchmarks.processes import Work, World
from benchmarks.scaling_model import buckets, ring
from train_utils import create_lr_scheduler, train_one_epoch
from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.collectives import sum_over_ranks
from train_utils.distributed_utils import no_sync
from train_utils.schedule import get_params_groups
from train_utils.setup import clean_errors, place_models, wrap_models
from train_utils.train_and_eval import StepOptions

MESSAGES = (64, 2**12, 2**16, 2**20, 2**23)  # bytes
REPEATS = 20  # of a message in a block


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__ or "")
    add = parser.add_argument
    add("--processes", type=positive, nargs="+", default=[1, 2], help="1 must be among them")
    add("--model", default="u2net_lite", choices=MODELS)
    add("-b", "--batch-size", type=positive, default=4, help="images per process")
    add("--size", type=positive, default=64, help="side of the images")
    add("--steps", type=positive, default=4, help="steps per block")
    add("--threads", type=positive, default=1, help="per process")
    args = parser.parse_args(argv)
    if 1 not in args.processes:
        parser.error("--processes: 1 must be among them, to compare with")
    return args


def training_loop(
    device: torch.device, model: str, batch_size: int, size: int
) -> tuple[Callable[[int], None], nn.Module]:
    """The product's loop over so many steps of one batch in memory, and the network it trains."""
    torch.manual_seed(0)
    networks = place_models({"model": MODELS[model]()}, device, sync_bn=False)
    wrapped = wrap_models(networks, device, compile=False)
    optimizer = torch.optim.AdamW(get_params_groups(networks["model"]), lr=1e-3, fused=True)
    schedule = create_lr_scheduler(optimizer, 1000, epochs=1000)
    amp_dtype = choose_amp_dtype("auto", device)
    scaler = make_scaler(amp_dtype, device)
    options = StepOptions(None if scaler else amp_dtype)
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    masks = (torch.rand(batch_size, 1, size, size) > 0.5).float()

    def train(steps: int) -> None:
        batches = [(images, masks)] * steps
        train_one_epoch(
            wrapped["model"],
            optimizer,
            batches,  # type: ignore[arg-type]
            device,
            0,
            schedule,
            print_freq=steps,
            scaler=scaler,
            options=options,
        )

    return train, wrapped["model"]


def make_work(device: torch.device, model: str, batch_size: int, size: int, steps: int) -> Work:
    """Blocks of training steps, with and without exchange of gradients, and of messages."""
    train, network = training_loop(device, model, batch_size, size)

    def alone() -> None:
        with no_sync(network):
            train(steps)

    work: dict[str, Callable[[], None]] = {"step": partial(train, steps), "alone": alone}

    def send(message: torch.Tensor) -> None:
        for _ in range(REPEATS):
            dist.all_reduce(message)

    def agree() -> None:
        for _ in range(REPEATS):
            sum_over_ranks([0.0] * 4)

    if dist.is_initialized():
        for count in MESSAGES:
            message = torch.zeros(count // 4, device=device)
            work[f"message {count}"] = partial(send, message)
        work["agree"] = agree
    return work


def fit_link(seconds: Mapping[int, float], processes: int) -> tuple[float, float]:
    """Latency of a hop and bandwidth of a link from all-reduce times by bytes: see `ring`."""
    # The fastest message is a small one; a larger one may win by chance.
    large, steps, fastest = max(seconds), 2 * (processes - 1), min(seconds.values())
    return fastest / steps, steps / processes * large / max(seconds[large] - fastest, 1e-9)


def measure(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Median seconds of a step, of a message and of an agreement, by processes and name."""
    messages = [f"message {count}" for count in MESSAGES]
    settings = (args.model, args.batch_size, args.size, args.steps)
    worlds, ways = [], {}
    for n in args.processes:
        world = World(n, args.device, args.threads, make_work, *settings)
        worlds.append(world)
        for name in ["step", "alone", *messages, "agree"] if n > 1 else ["step"]:
            ways[f"{n} {name}"] = partial(world, name)
    times = take_turns(ways, args.rounds)
    for world in worlds:
        world.close()
    found: dict[int, dict[str, float]] = {n: {} for n in args.processes}
    for way, each in times.items():
        n, _, name = way.partition(" ")
        repeats = args.steps if name in ("step", "alone") else REPEATS
        found[int(n)][name] = median(each) / repeats
    return found


def summarise(args: argparse.Namespace, found: Mapping[int, Mapping[str, float]]) -> list[dict]:
    """A row per number of processes; `predicted` for gloo's sums."""
    single = found[1]["step"]
    rows = [{"processes": 1, "step ms": single * 1e3, "img/s": args.batch_size / single}]
    gradients = 4 * sum(p.numel() for p in MODELS[args.model]().parameters())
    for n, times in found.items():
        if n == 1:
            continue
        step, alone = times["step"], times["alone"]
        hop, bandwidth = fit_link({count: times[f"message {count}"] for count in MESSAGES}, n)
        sums = sum(ring(part, n, hop, bandwidth) for part in buckets(gradients))
        rows.append(
            {
                "processes": n,
                "step ms": step * 1e3,
                "alone ms": alone * 1e3,
                "exchange": 1 - alone / step,
                "img/s": n * args.batch_size / step,
                "efficiency": single / step,
                "hop µs": hop * 1e6,
                "GB/s": bandwidth / 1e9,
                "agree µs": times["agree"] * 1e6,
                "predicted ms": (single + sums + times["agree"]) * 1e3,
                "from alone ms": (alone + sums) * 1e3,
            }
        )
    return rows


def message_rows(found: Mapping[int, Mapping[str, float]]) -> list[dict]:
    """The all-reduce times that latency and bandwidth are fitted to, beside the fit."""
    rows = []
    for n, times in found.items():
        seconds = {count: times[f"message {count}"] for count in MESSAGES if n > 1}
        for count, taken in seconds.items():
            fitted = ring(count, n, *fit_link(seconds, n))
            rows.append({"processes": n, "bytes": count, "µs": taken * 1e6, "fit µs": fitted * 1e6})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    found = measure(args)
    print(table(message_rows(found)), end="\n\n")
    report(args, summarise(args, found))


if __name__ == "__main__":
    with clean_errors():
        main()
