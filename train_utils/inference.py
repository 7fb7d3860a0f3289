"""Run a network over many samples: fast on every device, the same bits however it is shared out.

On CPUs each image goes through the network alone, on one thread, and as many images are under way
as there are cores: a convolution's result then depends neither on the number of threads nor on the
other images of a batch, and no core waits for another. On GPUs images go in chunks of one fixed
size, the last one padded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

GPU_CHUNK = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def chunk_size(device: torch.device) -> int:
    """Images per forward pass."""
    return 1 if device.type == "cpu" else GPU_CHUNK


def in_order(
    job: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Iterator[Result]:
    """Yield job(item) for every item, in order, without gradients.

    On CPUs the jobs run on one thread per core, each computing single-threaded, with a few items
    read ahead; elsewhere they run one after the other. A job's exception is raised here.
    """
    inference = torch.inference_mode()(job)
    if device.type != "cpu":
        yield from map(inference, items)
        return
    threads = torch.get_num_threads()
    # set_num_threads(1) in a worker thread may reach this one too, hence the restoring.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(inference, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def forward_chunk(
    forward: Callable[[Tensor], Tensor], images: Tensor, device: torch.device
) -> Tensor:
    """forward(images) of 1 to `chunk_size` images [n, C, H, W], padded to that size on the way."""
    size, n = chunk_size(device), len(images)
    if n < size:
        images = torch.cat([images, images[-1:].expand(size - n, -1, -1, -1)])
    return forward(images)[:n]


@contextmanager
def evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Switch networks to evaluation; every sub-module's own mode is put back afterwards."""
    models = list(models)
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
