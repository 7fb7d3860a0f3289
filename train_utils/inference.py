"""Run a network over many samples: fast on every device, the same bits however it is shared out.

On CPUs each image goes through the network alone, on one thread, and as many images are under way
as there are cores: a convolution's result then depends neither on the number of threads nor on the
other images of a batch, and no core waits for another. On GPUs images of one size go in chunks
whose length depends on that size only, the last one padded.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from train_utils.distributed_utils import own_cores
from train_utils.folding import CONVS, folded, is_plain
from train_utils.threads import Item, Result, in_threads

GPU_CHUNK = 16
SPARE_MEMORY = (
    "use smaller images, a smaller eval.max_pixels where the recipe has it, or a device that no "
    "other program uses"
)
_FINISHING = 4  # threads on the host beside a GPU: each has two chunks under way
_GPU_PIXELS = 2**21  # what a chunk of large images may hold: 16 of 362 × 362, two of 1024 × 1024


def prepare(
    models: Mapping[str, nn.Module], device: torch.device, amp_dtype: torch.dtype | None
) -> dict[str, nn.Module]:
    """Copies of networks, made for inference on `device` in `amp_dtype` (None: in fp32).

    They are in evaluation mode, with batch norm folded, and channels-last. Each enters autocast by
    itself whenever it is called, so that it may be called from any thread as it is.
    """
    prepared = {}
    for name, model in models.items():
        network = folded(model).to(device).to(memory_format=torch.channels_last)
        prepared[name] = InAutocast(network, device.type, amp_dtype) if amp_dtype else network
    return prepared


class InAutocast(nn.Module):
    """A network for inference that enters autocast, with each convolution's weights cast once."""

    def __init__(self, network: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.device_type, self.dtype = network, device_type, dtype
        convs = [layer for layer in network.modules() if is_plain(layer, CONVS)]
        replacements = {conv: _cast_once(conv, device_type, dtype) for conv in convs}
        for parent in list(self.modules()):
            for name, child in list(parent._modules.items()):
                if child in replacements:
                    setattr(parent, name, replacements[child])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device_type, self.dtype):
            return self.network(*args, **kwargs)


class _CastOnce(nn.Module):
    """A convolution that keeps its weights in `dtype` too: autocast would cast them every time."""

    device_type: str
    dtype: torch.dtype
    low: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # Some layers leave autocast, where its results would have too few digits.
        cast = torch.is_autocast_enabled(self.device_type)
        cast = cast and torch.get_autocast_dtype(self.device_type) == self.dtype
        return self.low(*args, **kwargs) if cast else super().forward(*args, **kwargs)


class _CastOnceConv2d(_CastOnce, nn.Conv2d):
    pass


class _CastOnceConvTranspose2d(_CastOnce, nn.ConvTranspose2d):
    pass


def _cast_once(conv: nn.Module, device_type: str, dtype: torch.dtype) -> nn.Module:
    """What replaces `conv`: of its type and with its attributes, which a network may ask for."""
    kind: Any = _CastOnceConv2d if isinstance(conv, nn.Conv2d) else _CastOnceConvTranspose2d
    low, cast = copy.deepcopy(conv).to(dtype), kind.__new__(kind)
    cast.__dict__.update(conv.__dict__)
    cast.device_type, cast.dtype, cast.low = device_type, dtype, low
    return cast


def chunk_size(device: torch.device, image: Tensor) -> int:
    """Images per forward pass, for images of the size of `image`, [C, H, W]; at least 1."""
    if device.type == "cpu":
        return 1
    return min(GPU_CHUNK, max(1, _GPU_PIXELS // (image.shape[-2] * image.shape[-1])))


def in_order(
    job: Callable[[Item], Result],
    items: Iterable[Item],
    device: torch.device,
    finish: Callable[[Result], Any] | None = None,
) -> Iterator[Any]:
    """Yield job(item), or finish(job(item)), for every item, in order, without gradients.

    On CPUs the jobs run on one thread per core, each computing single-threaded, with a few items
    read ahead; elsewhere they run one after the other, and `finish`, which works on the host, runs
    on threads beside them. A job's exception is raised here.
    cuDNN chooses its algorithms by rule and not by trying them out: that takes long for each new
    size, and the results would depend on which one happened to be the fastest.
    """
    inference = torch.inference_mode()

    def both(item: Item) -> Any:
        return job(item) if finish is None else finish(job(item))

    if device.type == "cpu":
        yield from in_threads(inference(both), items, torch.get_num_threads())
        return
    results = map(_by_rule()(inference(job)), items)
    if finish is None:
        yield from results
    else:
        yield from in_threads(inference(finish), results, min(own_cores(), _FINISHING))


@contextmanager
def _by_rule() -> Iterator[None]:
    """A block in which cuDNN does not try out algorithms."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def forward_chunk(
    forward: Callable[[Tensor], Tensor], images: Tensor, device: torch.device
) -> Tensor:
    """forward(images) of 1 to `chunk_size` images [n, C, H, W], padded to that size on the way."""
    size, n = chunk_size(device, images[0]), len(images)
    if n < size:
        images = torch.cat([images, images[-1:].expand(size - n, -1, -1, -1)])
    return forward(images)[:n]
