"""Bytes and time per step on many GPUs, on paper: the formulas of docs/scaling.md.

    python -m benchmarks.scaling_model
    python -m benchmarks.scaling_model --gpus 8 64 512 --set inter_bandwidth=12.5e9 host_hop=50e-6

Every assumption is a field of `Cluster` or of a `System`, in seconds, bytes and bytes per second;
put in your own. `benchmarks.scaling` measures some of them, and checks the formulas.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import ceil, log2

import torch
from torch import nn

from benchmarks.common import positive, table
from src import PatchDiscriminator, UNetGenerator, u2net_full, u2net_lite
from train_utils.arguments import new_parser
from train_utils.collectives import RING_PAYS
from train_utils.errors import UserError
from train_utils.setup import clean_errors

MIB = 2**20
AGREE_BYTES = 8 * 4  # fp64: the loss's count, images, requests to stop, processes
SCORES_BYTES = 8 * (3 + 1022 + 1)  # int64: the states of MAE and maxF1, a request to stop


@dataclass(frozen=True)
class Cluster:
    """Nodes of several GPUs; all values are assumptions. Bandwidths are per GPU and direction."""

    node_gpus: int = 8
    intra_bandwidth: float = 300e9  # β₁, bytes/s between GPUs of a node (NVLink)
    inter_bandwidth: float = 40e9  # β₂, bytes/s between nodes (400 Gb/s per GPU, four fifths of it)
    intra_hop: float = 3e-6  # α₁, seconds a message takes to the next GPU of a node
    inter_hop: float = 10e-6  # α₂, … and to a GPU of another node
    host_hop: float = 30e-6  # α_h, … from one host process to another (gloo over TCP)
    host_message: float = 5e-6  # o_h, what one message costs the process that gathers all
    bucket_mb: float = 0  # MiB of gradients per all-reduce; 0: torch's, 1 and then 25
    gradient_bytes: int = 4  # per parameter
    print_freq: int = 10  # steps per log line
    disk: float = 1e9  # bytes/s that rank 0 writes
    samples_per_core: float = 700  # decoded and augmented per second
    photo_bytes: float = 60e3  # image and mask on disk


@dataclass(frozen=True)
class System:
    """One network's training. `device` seconds per step on one GPU is an assumption."""

    name: str
    parameters: int
    batch: int  # images per GPU
    gflop: float  # per image, forward and backward
    sustained: float  # FLOP/s of the whole step
    host: float = 12e-3  # seconds the host needs to queue a step

    @property
    def device(self) -> float:
        return self.batch * self.gflop * 1e9 / self.sustained


def ring(size: float, processes: int, hop: float, bandwidth: float) -> float:
    """Seconds of an all-reduce of `size` bytes: 2(N−1) hops, 2(N−1)/N of the bytes on each link."""
    steps = 2 * (processes - 1)
    return steps * hop + steps / processes * size / bandwidth


def hierarchical(size: float, gpus: int, c: Cluster) -> float:
    """Reduce-scatter in each node, all-reduce of the parts between nodes, all-gather in each node.

    Between nodes along double trees, as nccl does it: 2⌈log₂ n⌉ hops at full bandwidth.
    """
    node = min(gpus, c.node_gpus)
    nodes = ceil(gpus / c.node_gpus)
    within = ring(size, node, c.intra_hop, c.intra_bandwidth)
    between = 2 * (nodes - 1) / nodes * (size / node) / c.inter_bandwidth
    return within + between + 2 * ceil(log2(nodes)) * c.inter_hop


def buckets(size: float, bucket_mb: float | None = None) -> list[float]:
    """Bytes of every bucket in the order in which the backward pass fills them.

    None: DistributedDataParallel's own sizes, 1 MiB first and then 25.
    """
    first, cap = (MIB, 25 * MIB) if bucket_mb is None else (bucket_mb * MIB, bucket_mb * MIB)
    parts = [min(first, size)]
    while (left := size - sum(parts)) > 0:
        parts.append(min(cap, left))
    return parts


def exposed(parts: Sequence[float], seconds: Sequence[float], backward: float) -> float:
    """Seconds by which the last bucket's all-reduce ends after the backward pass.

    A bucket is full when its share of the bytes has passed; one all-reduce runs at a time.
    """
    end, total = 0.0, sum(parts)
    for filled, taken in zip(accumulate(parts), seconds, strict=True):
        end = max(end, backward * filled / total) + taken
    return end - backward


def agree_ring(processes: int, c: Cluster) -> float:
    """The numbers that processes agree on in every step, by gloo's all_reduce."""
    return 2 * (processes - 1) * c.host_hop


def agree(processes: int, c: Cluster) -> float:
    """The same as `sum_over_ranks` does it: gathered by one process, then broadcast in a tree."""
    if processes <= RING_PAYS:
        return agree_ring(processes, c)
    return c.host_hop + (processes - 1) * c.host_message + ceil(log2(processes)) * c.host_hop


def step_time(system: System, gpus: int, c: Cluster, host: Callable = agree) -> dict[str, float]:
    """Seconds: the gradients' all-reduce, what of it the backward pass does not hide, the step."""
    size = system.parameters * c.gradient_bytes
    parts = buckets(size, c.bucket_mb or None)
    taken = [hierarchical(part, gpus, c) for part in parts]
    late = exposed(parts, taken, system.device * 2 / 3) if gpus > 1 else 0.0
    device, queued = system.device + late, system.host + host(gpus, c)
    # After a log line, for which the host waits, the device waits for the host's next numbers.
    lines = (hierarchical(8 * c.print_freq, gpus, c) + host(gpus, c)) / c.print_freq
    return {"all-reduce": sum(taken), "exposed": late, "step": max(device, queued) + lines}


def systems() -> list[System]:
    """The systems of the tables; their GFLOP are what torch's counter finds, at 288² and 256²."""
    with torch.device("meta"):
        full, lite = u2net_full(), u2net_lite()
        generator, discriminator = UNetGenerator(), PatchDiscriminator()
    pix2pix = _parameters(generator) + _parameters(discriminator)
    return [
        System("u2net_full", _parameters(full), 16, 284.5, 150e12),
        System("u2net_lite", _parameters(lite), 16, 95.7, 30e12),
        # The discriminator's passes are not counted: they make the step longer, and hide more.
        System("pix2pix", pix2pix, 4, 36.2, 50e12),
    ]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def step_rows(gpus: Sequence[int], c: Cluster) -> list[dict]:
    """What a step costs, for every system and number of GPUs; times in milliseconds."""
    rows = []
    for system in systems():
        size = system.parameters * c.gradient_bytes
        alone = step_time(system, 1, c)["step"]
        for n in gpus:
            found = step_time(system, n, c)
            around_ring = step_time(system, n, c, agree_ring)["step"]
            rows.append(
                {
                    "system": system.name,
                    "GPUs": n,
                    "gradients MB": size / 1e6,
                    "device ms": system.device * 1e3,
                    "flat ring ms": ring(size, n, c.inter_hop, c.inter_bandwidth) * 1e3,
                    "all-reduce ms": found["all-reduce"] * 1e3,
                    "exposed ms": found["exposed"] * 1e3,
                    "step ms": found["step"] * 1e3,
                    "efficiency": alone / found["step"],
                    "with host ring": alone / around_ring,
                }
            )
    return rows


def small_rows(gpus: Sequence[int], c: Cluster, losses: int = 1) -> list[dict]:
    """Our own collectives: what they carry, and how long they take."""
    line = 8 * losses * c.print_freq
    return [
        {
            "GPUs": n,
            "agree B": AGREE_BYTES,
            "agree ms": agree(n, c) * 1e3,
            "as a ring ms": agree_ring(n, c) * 1e3,
            "log line B": line,
            "log line µs": hierarchical(line, n, c) * 1e6,
            "scores B": SCORES_BYTES,
            "scores ms": ring(SCORES_BYTES, n, c.host_hop, 1e9) * 1e3,
            "store requests/s": 2 * n,
        }
        for n in gpus
    ]


def data_rows(gpus: Sequence[int], c: Cluster) -> list[dict]:
    """What loading and saving must deliver."""
    rows = []
    for system in systems():
        rate = system.batch / step_time(system, 1, c)["step"]
        rows += [
            {
                "system": system.name,
                "GPUs": n,
                "img/s per GPU": rate,
                "cores per GPU": rate / c.samples_per_core,
                "GB/s read": n * rate * c.photo_bytes / 1e9,
                "checkpoint MB": (size := 12 * system.parameters / 1e6),
                "written in s": size * 1e6 / c.disk,
            }
            for n in gpus
        ]
    return rows


def with_values(cluster: Cluster, values: Sequence[str]) -> Cluster:
    """Other assumptions, as NAME=VALUE. Raises UserError for a name that is not there."""
    given: Mapping[str, str] = {name: text for name, _, text in (v.partition("=") for v in values)}
    types = {field.name: type(getattr(cluster, field.name)) for field in fields(cluster)}
    unknown = given.keys() - types.keys()
    if unknown:
        raise UserError(f"{', '.join(unknown)}: not an assumption. They are {', '.join(types)}.")
    try:
        return replace(cluster, **{name: types[name](float(text)) for name, text in given.items()})
    except ValueError as error:
        raise UserError(f"--set: {error}. Use NAME=NUMBER.") from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--gpus", type=positive, nargs="+", default=[8, 64, 512])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    args = parser.parse_args(argv)
    cluster = with_values(Cluster(), args.set)
    for rows in (step_rows, small_rows, data_rows):
        print(table(rows(args.gpus, cluster)), end="\n\n")


if __name__ == "__main__":
    with clean_errors():
        main()
