"""Processes that a benchmark has work done by, on this machine."""

import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common import synchronize
from launch import heap
from train_utils.device import process_group_backend, take_device
from train_utils.errors import UserError
from train_utils.log import get_logger

Work = Mapping[str, Callable[[], Any]]
_HOST = "127.0.0.1"


class World:
    """`size` processes in one process group that do work by name, all at the same time.

    make(device, *args) is called in every process and returns its work; like everything that is
    passed to a process, it must be importable. Between two calls the processes sleep, so that
    several worlds can take turns. One process has no group, as in a run of `train.py`. On CPUs
    they are set up as `train.py` is, unless told otherwise. A UserError in one is raised here.
    """

    def __init__(
        self,
        size: int,
        device: str,
        threads: int,
        make: Callable,
        *args: Any,
        set_up: bool = True,
    ) -> None:
        set_up = torch.device(device).type == "cpu" and set_up
        # One process starts anew, in the environment it is to have. Several are forked from one
        # that is set up and has imported what takes seconds; DDP needs dynamo.
        context: Any = mp.get_context("forkserver" if set_up and size > 1 else "spawn")
        if set_up and size > 1:
            context.set_forkserver_preload(["torch._dynamo", "benchmarks.processes", "src"])
        self._store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        launch = (size, self._store.port, device, threads)
        self._pipes, self._processes = [], []
        for rank in range(size):
            mine, other = context.Pipe()
            work = (rank, *launch, other, make, args)
            process = context.Process(target=_serve, args=work, daemon=True)
            with _environment(set_up):
                process.start()
            other.close()  # or the end of the process would not be noticed
            self._pipes.append(mine)
            self._processes.append(process)
        self._answers()

    def __call__(self, name: str) -> Any:
        """Have all processes do their work of that name; rank 0's result once all are done."""
        for pipe in self._pipes:
            pipe.send(name)
        return self._answers()[0]

    def _answers(self) -> list[Any]:
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, UserError):
                raise answer
        return answers

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(timeout=30)


@contextmanager
def processes_of(
    device: str, make: Callable[..., Work], ways: Mapping[str, tuple], set_up: Container[str] = ()
) -> Iterator[dict[str, World]]:
    """A process for each way, by name, whose work `make` makes of the way's arguments.

    Those named in `set_up` are set up as `train.py` is. Each has all threads, for its turn.
    """
    threads = torch.get_num_threads()
    worlds = {
        name: World(1, device, threads, make, *args, set_up=name in set_up)
        for name, args in ways.items()
    }
    try:
        yield worlds
    finally:
        for world in worlds.values():
            world.close()


@contextmanager
def _environment(set_up: bool) -> Iterator[None]:
    """The environment of processes that start meanwhile."""
    before = dict(os.environ)
    settings = {"GLIBC_TUNABLES": heap.TUNABLES, "GOMP_SPINCOUNT": heap.SPINS}
    os.environ |= settings if set_up else {}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    rank: int,
    size: int,
    port: int,
    device_type: str,
    threads: int,
    pipe: Connection,
    make: Callable[..., Work],
    args: tuple,
) -> None:
    torch.set_num_threads(threads)
    get_logger().setLevel(logging.WARNING)
    device = torch.device(device_type)
    if device.type != "cpu":
        device = torch.device(device.type, rank)
        take_device(device)
    if size > 1:
        backend, store = process_group_backend(device), dist.TCPStore(_HOST, port, is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    work = _answer(make, device, *args)
    answer = work if isinstance(work, UserError) else None
    while True:
        synchronize(device)
        pipe.send(answer)
        name = pipe.recv()
        if name is None:
            break
        answer = _answer(work[name])
    if size > 1:
        dist.destroy_process_group()


def _answer(work: Callable, *args: Any) -> Any:
    """What some work returns, or the UserError that it raises."""
    try:
        return work(*args)
    except UserError as error:
        return error
