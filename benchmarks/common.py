"""What all benchmarks share: taking turns, ceilings of the machine, the table and the JSON file.

Every benchmark runs *plain*, the usual way, and *ours* alternately in one run, so that whatever
else the machine does meets both; it reports medians, and ratios of medians.
"""

import argparse
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from src import u2net_full, u2net_lite
from train_utils.arguments import new_parser
from train_utils.device import resolve_device
from train_utils.distributed_utils import cpu_cores
from train_utils.log import get_logger

Rows = Sequence[Mapping[str, Any]]

MODELS = {"u2net_lite": u2net_lite, "u2net_full": u2net_full}  # for what no task is needed for

SAME_ENV = " same env"  # ends the name of a plain way whose process has the settings of ours

# Channels and side of 3×3 convolutions with equal FLOPs, as U-shaped networks have them.
_CONVS = ((64, 144), (128, 72), (256, 36), (512, 18))
_COPY_BYTES = 2**28
_TIMED = 0.1  # seconds from one wait for the device to the next, beside which the wait is nothing


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def make_parser(description: str, rounds: int = 7) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks take."""
    parser = new_parser(description)
    parser.add_argument("--device", default=resolve_device("auto").type)
    parser.add_argument("--rounds", type=positive, default=rounds, help="turns of each way")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress lines of trainings and evaluations."""
    level = get_logger().level
    get_logger().setLevel(logging.WARNING)
    try:
        yield
    finally:
        get_logger().setLevel(level)


def synchronize(device: torch.device | str) -> None:
    """Wait for what is queued on a GPU."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Wall time of `work()`, until the device is done with it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every way in every round, by name; the ways take turns, in alternating order.

    `warmup` rounds go before and are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-warmup, rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            taken = seconds(ways[name], device)
            if number >= 0:
                times[name].append(taken)
    return times


def names_of_ways(device: torch.device, amp_dtype: torch.dtype | None) -> list[str]:
    """The usual way, the same under autocast where ours is, and ours, with its settings as well.

    Only processes on CPUs have such settings: see launch/heap.py.
    """
    plain = ["plain", "plain amp"] if amp_dtype else ["plain"]
    same = [name + SAME_ENV for name in plain] if device.type == "cpu" else []
    return [*plain, *same, "ours"]


def has_settings(way: str) -> bool:
    """Whether a way's process is set up as the script is that ours stands for."""
    return way == "ours" or way.endswith(SAME_ENV)


def convolution_flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of convolutions; a multiply–add counts as two."""
    with FlopCounterMode(display=False) as counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "convolution" in str(operation))


def shortest(work: Callable[[], Any], device: torch.device | str, rounds: int = 5) -> float:
    """Least seconds of `work()` when it is repeated without a wait for the device in between."""
    repeats = 1
    work()  # chooses kernels and allocates

    def repeated() -> None:
        for _ in range(repeats):
            work()

    while (taken := seconds(repeated, device)) < _TIMED:
        repeats *= 2
    times = [taken, *(seconds(repeated, device) for _ in range(rounds - 1))]
    return min(times) / repeats


def conv_ceiling(device: torch.device | str, dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of some 3×3 convolutions, forward, channels-last: what is in reach."""
    # A GPU must compute for longer than its host needs to queue the next one.
    batch, best = 4 if torch.device(device).type == "cpu" else 64, 0.0
    for channels, side in _CONVS:
        images = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
        weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
        images, weight = (x.to(memory_format=torch.channels_last) for x in (images, weight))
        work = 2 * batch * side**2 * channels**2 * 9
        with torch.inference_mode():
            taken = shortest(partial(conv2d, images, weight, padding=1), device)
        best = max(best, work / taken / 1e9)
    return best


def copy_ceiling(device: torch.device | str) -> float:
    """GB/s, read and written, of copying a large tensor on the device."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / shortest(lambda: target.copy_(source), device) / 1e9


def ceilings(device: torch.device | str, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """The machine's conv ceilings by dtype in GFLOP/s, and its copy bandwidth in GB/s."""
    torch.backends.cudnn.benchmark = True  # as in a training
    found = {f"conv {str(dtype)[6:]}": conv_ceiling(device, dtype) for dtype in dtypes}
    return {**found, "copy": copy_ceiling(device)}


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What figures depend on, for whoever reads them."""
    gpu = torch.device(device).type != "cpu"
    return {
        "device": _gpu_name(torch.device(device)) if gpu else _cpu_name(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def _gpu_name(device: torch.device) -> str:
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return name(device) if name else device.type


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def resident_mb(kind: str = "VmRSS") -> float:
    """This process's memory in MB: VmRSS, or VmHWM for its peak; nan where Linux does not tell.

    getrusage's peak would not do: a process that was just started inherits that of its parent.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{kind}:")]
    return int(found[0]) / 2**10 if found else math.nan


def ratio(times: Mapping[str, Sequence[float]], name: str, base: str = "plain") -> float:
    """How many times as fast as the base a way is, by medians."""
    return median(times[base]) / median(times[name])


def table(rows: Rows) -> str:
    """Rows as text, a column per key; numbers with four significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([shown(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A table's cell: four significant digits of a number, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def report(
    args: argparse.Namespace, rows: Rows, found_ceilings: Mapping[str, float] | None = None
) -> None:
    """Print machine, ceilings and table; write all of it to `--json`, if given."""
    about = {**machine(getattr(args, "device", "cpu")), "load": round(os.getloadavg()[0], 2)}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if found_ceilings:
        units = {key: "GB/s" if key == "copy" else "GFLOP/s" for key in found_ceilings}
        shown = (f"{key} {value:.0f} {units[key]}" for key, value in found_ceilings.items())
        print("ceilings: " + ", ".join(shown))
    print(table(rows), flush=True)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        result = {"machine": about, "settings": settings, "ceilings": dict(found_ceilings or {})}
        args.json.write_text(json.dumps({**result, "rows": list(rows)}, indent=1) + "\n")
