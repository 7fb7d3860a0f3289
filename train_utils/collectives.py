"""Ranks, and the few collectives in use."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train_utils.activity import waiting
from train_utils.errors import UserError
from train_utils.messages import MOST_BYTES, decode, outcome

RING_PAYS = 3  # processes up to which gloo's all_reduce is the fastest sum of a few numbers
T = TypeVar("T")
_ONE_LAUNCH = "Launch all processes with the same code, and on a network of your own."
_PATIENCE = timedelta(days=1)  # with what one rank does for all: downloads, scans of slow disks


def is_dist_avail_and_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Rank of this process, 0 without distributed training."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def get_world_size() -> int:
    """Number of processes, 1 without distributed training."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def all_gather(data: Any, patient: bool = False) -> list[Any]:
    """Gather plain values, or tensors of any sizes, from all ranks into a list ordered by rank.

    What may be sent, also in lists, tuples and dicts: `messages.encode`. No rank's code is run, and
    tensors arrive on the CPU. patient: wait for the others however long it takes. Raises UserError,
    on all ranks, where one sends anything else.
    """
    world = get_world_size()
    if world == 1:
        return [data]
    group = _patient_group() if patient else None
    device = torch.device("cpu") if patient else collective_device()
    mine = _as_tensor(outcome(lambda: data)).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    with waiting("gathering"):
        dist.all_gather(sizes, torch.tensor([len(mine)], device=device), group=group)
        counts = [_verified(rank, size) for rank, size in enumerate(sizes)]
        padded = nn.functional.pad(mine, (0, max(counts) - len(mine)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
    return [_read(rank, part[: counts[rank]]) for rank, part in enumerate(parts)]


def all_gather_alike(data: T) -> list[T]:
    """As `all_gather`, of the same types on all ranks; UserError names a rank that differs."""
    gathered = all_gather(data)
    for rank, value in enumerate(gathered):
        if _types(value) != _types(data):
            raise UserError(f"rank {rank} sent a {type(value).__name__} amiss. {_ONE_LAUNCH}")
    return gathered


def _types(value: Any) -> Any:
    return [_types(item) for item in value] if type(value) is tuple else type(value)


def _as_tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def _verified(rank: int, size: Tensor) -> int:
    count = int(size)
    if not 0 < count <= MOST_BYTES:
        raise UserError(
            f"rank {rank} announces {count:,} bytes, and at most {MOST_BYTES:,} are taken. "
            f"{_ONE_LAUNCH}"
        )
    return count


def _read(rank: int, message: Tensor) -> Any:
    try:
        return decode(message.cpu().numpy().tobytes())
    except ValueError as error:
        raise UserError(f"rank {rank} sent what is no message ({error}). {_ONE_LAUNCH}") from error


patient_groups: dict[Any, Any] = {}


def _patient_group() -> Any:
    """A gloo group of all ranks beside the default one, made at its first use."""
    world = dist.group.WORLD
    if world not in patient_groups:
        patient_groups.clear()  # of a process group that is gone
        sum_over_ranks([0])  # ends where a process is gone, for which new_group would wait
        patient_groups[world] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return patient_groups[world]


def collective_device() -> torch.device:
    """Where numbers must lie for a collective: on the CPU if the process group has it do them."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "cpu" in str(dist.get_backend_config()):
        return torch.device("cpu")
    return accelerator


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise fp64 sum over ranks of host numbers, the same bits on all.

    It runs over gloo where there is one (`init_distributed_mode` sets one up beside the GPUs' own
    backend), so that the host waits for the other hosts only and never for the device.
    """
    if get_world_size() == 1:
        return list(values)
    vector = torch.tensor(values, dtype=torch.float64, device=collective_device())
    with waiting("adding up numbers"):
        if get_world_size() <= RING_PAYS or vector.device.type != "cpu":
            dist.all_reduce(vector)
        else:  # gloo's all_reduce passes numbers on around a ring, twice: 1022 hops for 512
            parts = [torch.empty_like(vector) for _ in range(get_world_size())]
            dist.gather(vector, parts if is_main_process() else None, dst=0)
            if is_main_process():
                vector = torch.stack(parts).sum(dim=0)
            dist.broadcast(vector, src=0)
        return vector.tolist()


def shared_store() -> Any:
    """A connection of its own to the store that all processes share; None for a single process."""
    if get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store().clone()


def lost_peers(error: BaseException | None) -> bool:
    """Whether an error says no more than that another process is gone, and why is its to tell."""
    if not isinstance(error, RuntimeError):
        return False
    # gloo raises plain RuntimeErrors, which begin with the place in its sources.
    place = str(error).partition("]")[0]
    return isinstance(error, dist.DistError) or (place.startswith("[") and "gloo" in place)


def call_on_main(function: Callable[[], Any]) -> Any:
    """Run a check on rank 0 only; its result, or its UserError, reaches every rank.

    The others wait however long it takes. What it may return: `messages.encode`.
    """
    if get_world_size() == 1:
        return function()
    group = _patient_group()
    message = _as_tensor(outcome(function)) if is_main_process() else torch.empty(0)
    size = torch.tensor([len(message)])
    dist.broadcast(size, src=0, group=group)
    if not is_main_process():
        message = torch.empty(_verified(0, size), dtype=torch.uint8)
    dist.broadcast(message, src=0, group=group)
    return _read(0, message)


@torch.no_grad()
def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors by rank 0's, in one broadcast per dtype."""
    if get_world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
        with waiting("taking over rank 0's tensors"):
            dist.broadcast(flat, src=0)
            flat[:1].tolist()  # on a GPU the host waits here for what is only queued above
        for tensor, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))
