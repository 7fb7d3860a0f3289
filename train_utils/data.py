"""From a dataset to batches whose content depends on nothing but (seed, epoch, step).

Order = f(seed, epoch); augmentation = f(seed, epoch, index). No random state is carried from sample
to sample, so the number of workers, of processes and of restarts changes no sample.
"""

import hashlib
import os
import random
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, get_worker_info

from train_utils.device import pins_memory
from train_utils.distributed_utils import end_with_parent
from train_utils.errors import UserError, described

_WORD = 2**64


def stable_seed(*key: int) -> int:
    """Hash integers to a 64-bit seed that is the same in every process and on every machine."""
    packed = b"".join((part % _WORD).to_bytes(8, "little") for part in key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def seed_generators(seed: int) -> None:
    """Seed torch's CPU generator, `random`, and numpy's global generator where numpy is loaded.

    So augmentations that a user adds with any of them are keyed as well.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the generators that `seed_generators` seeds back, after a block, as they were before."""
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])


@dataclass(frozen=True)
class SampleKey:
    """What the sampler hands to the dataset; `real` is False for an empty share's stand-in."""

    epoch: int
    index: int
    real: bool = True


class _StandIn(NamedTuple):
    """A sample that only lends its shape to an empty batch."""

    item: Any


class KeyedDataset(Dataset):
    """Any map-style dataset, with its randomness keyed by (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list:
        """A batch's samples; loaders prefer it, and numpy's state takes long to get and to set."""
        with generators_kept():
            return [self._keyed(key) for key in keys]

    def _keyed(self, key: SampleKey) -> Any:
        seed_generators(stable_seed(self.seed, key.epoch, key.index))
        item = self.item(key.index)
        return item if key.real else _StandIn(item)

    def item(self, index: int) -> Any:
        """The dataset's item; UserError for one that cannot be batched or fed to a network."""
        item = self.dataset[index]
        for number, part in enumerate(item):
            if not isinstance(part, Tensor) or not (number or _is_image(part)):
                raise UserError(
                    f"{item_name(self.dataset, index)}: part {number + 1} of the item is "
                    f"{described(part)}. Have the transforms return tensors, images as uint8 or "
                    "normalised floats."
                )
        return item


def _is_image(part: Tensor) -> bool:
    return part.dtype == torch.uint8 or part.is_floating_point()


def collate(items: Sequence[Any]) -> tuple:
    """Turn a list of samples (tuples of tensors) into a tuple of batches.

    Each position is stacked to [B, …] where all shapes agree and stays a list of tensors where they
    do not (evaluation masks keep their own sizes). A stand-in gives a batch of length 0.
    """
    if isinstance(items[0], _StandIn):
        shaped = collate([stand_in.item for stand_in in items])
        return tuple(batch[:0] for batch in shaped)
    return tuple(_stack(column) for column in zip(*items, strict=True))


def _stack(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    # as_subclass: a batch needs no tv_tensor wrapper, which would slow every later operation
    plain = [tensor.as_subclass(torch.Tensor) for tensor in tensors]
    kinds = sorted({str(tensor.dtype) for tensor in plain})
    if len(kinds) > 1:  # torch would make floats of all
        raise UserError(
            f"items of one batch are {' and '.join(kinds)}. Have the transforms return one type in "
            "every case: only uint8 images are normalised on the device."
        )
    if any(tensor.shape != plain[0].shape for tensor in plain):
        return plain
    if plain[0].dim() == 3 and plain[0].stride(0) == 1 < plain[0].shape[0]:
        # Pixel by pixel in memory, as networks want their images: a batch of the same kind, which
        # takes no more than copying rows.
        return _stack_to_send([tensor.permute(1, 2, 0) for tensor in plain]).permute(0, 3, 1, 2)
    return _stack_to_send(plain)


def _stack_to_send(tensors: list[Tensor]) -> Tensor:
    """`torch.stack`; in a loader's worker in memory that it shares with the script."""
    first = tensors[0]
    if get_worker_info() is None:
        return torch.stack(tensors)
    # Where torch's own collating puts it, too. A batch in the worker's own memory would be copied
    # on its way, and the heap would grow by dozens of batches: glibc cuts slivers off such aligned
    # blocks and holds them in its cache of small chunks, where freed neighbours cannot merge.
    storage = torch.UntypedStorage._new_shared(len(tensors) * first.nbytes)
    batch = torch.empty(0, dtype=first.dtype).set_(storage)  # type: ignore[call-overload]
    return torch.stack(tensors, out=batch.view(len(tensors), *first.shape))


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """Batches of one process, as its share of global batches that do not depend on the processes.

    Optimizer step k of an epoch takes the slice [k·G, (k+1)·G) of the epoch's permutation, G being
    `global_batch`; rank r takes every `world_size`-th sample of that slice from the r-th on, and
    takes it in `micro_batch`-sized parts. The last slice may be short: nothing is dropped and
    nothing is repeated. Every rank gets the same number of parts, so that collectives match; a part
    without samples is yielded as one stand-in key, from which `collate` makes an empty batch.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch: int,
        micro_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.micro_batch = micro_batch or ceil(global_batch / world_size)
        self.forward_batch = self.micro_batch * world_size  # images of one pass on all processes
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.start_step = 0, 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch."""
        return ceil(self.num_samples / self.global_batch)

    @property
    def parts_per_step(self) -> int:
        """Micro-batches that make up a full optimizer step (the last step may have fewer)."""
        return self._parts(self.global_batch)

    @property
    def smallest_part(self) -> int:
        """Images in the smallest batch that is not empty, of any step on any rank."""
        full, rest = divmod(self.num_samples, self.global_batch)
        smallest = self.micro_batch
        for samples in ([self.global_batch] if full else []) + ([rest] if rest else []):
            for rank in range(min(samples, self.world_size)):
                share = len(range(rank, samples, self.world_size))
                smallest = min(smallest, share % self.micro_batch or self.micro_batch)
        return smallest

    def _parts(self, samples: int) -> int:
        return ceil(ceil(samples / self.world_size) / self.micro_batch)

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Start the next iteration at optimizer step `step` of `epoch`."""
        self.epoch, self.start_step = epoch, step

    def order(self, epoch: int) -> list[int]:
        """The epoch's permutation, the same on all ranks."""
        if not self.shuffle:
            return list(range(self.num_samples))
        generator = torch.Generator().manual_seed(stable_seed(self.seed, epoch))
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def __len__(self) -> int:
        full, rest = divmod(self.num_samples, self.global_batch)
        parts = full * self.parts_per_step + (self._parts(rest) if rest else 0)
        return max(0, parts - self.start_step * self.parts_per_step)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, order = self.epoch, self.order(self.epoch)
        for step in range(self.start_step, self.steps_per_epoch):
            batch = self._batch(order, step)
            share = [SampleKey(epoch, index) for index in batch[self.rank :: self.world_size]]
            for part in range(self._parts(len(batch))):
                start = part * self.micro_batch
                stand_in = [SampleKey(epoch, batch[0], real=False)]
                yield share[start : start + self.micro_batch] or stand_in

    def _batch(self, order: list[int], step: int) -> list[int]:
        return order[step * self.global_batch : (step + 1) * self.global_batch]

    def share(self, step: int) -> list[int]:
        """The samples of this rank in optimizer step `step` of the present epoch."""
        return self._batch(self.order(self.epoch), step)[self.rank :: self.world_size]


def sample_names(loader: Any, step: int) -> list[str]:
    """What the samples of this rank in a step of the present epoch are called, for messages.

    Empty for a loader that `train_loader` has not made.
    """
    sampler, keyed = getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)
    if not isinstance(sampler, GlobalBatchSampler) or not isinstance(keyed, KeyedDataset):
        return []
    return [item_name(keyed.dataset, index) for index in sampler.share(step)]


def item_name(dataset: Dataset, index: int) -> str:
    """What a dataset calls an item, for messages."""
    full, indices = unwrap_subset(dataset)
    name = getattr(full, "name", None)
    return name(indices[index]) if callable(name) else f"sample {indices[index]}"


def unwrap_subset(dataset: Dataset) -> tuple[Any, Sequence[int]]:
    """The dataset of which `Subset`s may hold a part, and the indices of that part in it."""
    if not isinstance(dataset, Subset):
        return dataset, range(len(dataset))  # type: ignore[arg-type]
    full, indices = unwrap_subset(dataset.dataset)
    return full, [indices[index] for index in dataset.indices]


class ShardSampler(Sampler[SampleKey]):
    """Every sample exactly once over all ranks: rank r takes r, r + world_size, … unpadded."""

    def __init__(self, num_samples: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_samples, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(0, index) for index in self.indices)


def follow_the_script(_worker: int) -> None:
    """Have a loader's worker leave signals to the script, and end with it."""
    end_with_parent(signal.SIGKILL)  # one that hangs would not notice
    # A signal to the process group (Ctrl-C, torchrun, timeout) is for the script, which saves and
    # then ends its workers; workers that died first would end it in the middle of the save.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the script ends its workers
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def train_loader(
    dataset: Dataset, sampler: GlobalBatchSampler, workers: int, device: torch.device
) -> DataLoader:
    """Micro-batches of this rank in keyed order; set the epoch by `sampler.set_position`."""
    keyed = KeyedDataset(dataset, sampler.seed)
    return _loader(keyed, workers, device, batch_sampler=sampler)


def eval_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """This rank's share of the samples, each sample once over all ranks, in order."""
    keyed = KeyedDataset(dataset, seed=0)
    sampler = ShardSampler(len(keyed), rank, world_size)
    return _loader(keyed, workers, device, sampler=sampler, batch_size=batch_size)


@contextmanager
def loader_errors() -> Iterator[None]:
    """UserError where a worker process of a loader was killed: torch interrupts what runs then."""
    try:
        yield
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid.*(killed|exited)", str(error)):
            raise
        raise UserError(
            f"{str(error).partition('.')[0]}: a loader process was ended from outside, most often "
            "for want of memory (RAM, or /dev/shm in a container: docker --shm-size). Use fewer "
            "by --workers, or none by -j 0."
        ) from error


def _loader(dataset: Dataset, workers: int, device: torch.device, **sampling: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pins_memory(device),
        persistent_workers=workers > 0,
        worker_init_fn=follow_the_script,
        # An own generator: by default every new iterator draws from the global one.
        generator=torch.Generator(),
        **sampling,
    )
