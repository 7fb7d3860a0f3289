"""Run a function on several real gloo processes."""

import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def children(process: int) -> list[int]:
    """The child processes of a process, in the order of their numbers; none of one that is gone."""
    with suppress(OSError):
        tasks = Path(f"/proc/{process}/task").iterdir()
        found = [pid for task in tasks for pid in (task / "children").read_text().split()]
        return sorted(map(int, found))
    return []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _entry(rank: int, world: int, port: int, function: Callable, args: tuple, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        results.put((rank, function(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def on_ranks(world: int, function: Callable, *args: Any) -> list[Any]:
    """function(*args) on `world` processes; the results by rank (plain types, not tensors)."""
    # Processes are forked from one that has imported what takes long, 10 seconds of it.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "train"])
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_entry, args=(rank, world, port, function, args, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        gathered = [results.get(timeout=300) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    errors = [f"rank {rank}: {error}" for rank, _, error in gathered if error]
    assert not errors, "\n".join(errors)
    return [value for _, value, _ in sorted(gathered, key=lambda item: item[0])]
