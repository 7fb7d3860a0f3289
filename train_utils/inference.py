"""Run a network over many samples: fast on every device, the same bits however it is shared out.

On CPUs each image goes through the network alone, on one thread, and as many images are under way
as there are cores: a convolution's result then depends neither on the number of threads nor on the
other images of a batch, and no core waits for another. On GPUs images of one size go in chunks
whose length depends on that size only, the last one padded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

GPU_CHUNK = 8
_GPU_PIXELS = 2**20  # what a chunk of large images may hold: eight of 362 × 362, one of 1024 × 1024

Item = TypeVar("Item")
Result = TypeVar("Result")


def chunk_size(device: torch.device, image: Tensor) -> int:
    """Images per forward pass, for images of the size of `image`, [C, H, W]; at least 1."""
    if device.type == "cpu":
        return 1
    return min(GPU_CHUNK, max(1, _GPU_PIXELS // (image.shape[-2] * image.shape[-1])))


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
    size, n = chunk_size(device, images[0]), len(images)
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
