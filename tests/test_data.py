"""Order, shares and randomness of the data: functions of (seed, epoch, index) and nothing else."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from train_utils import data
from train_utils.data import (
    GlobalBatchSampler,
    KeyedDataset,
    SampleKey,
    ShardSampler,
    collate,
    eval_loader,
    generators_kept,
    seed_generators,
    stable_seed,
    train_loader,
)

CPU = torch.device("cpu")


class Noise(Dataset):
    """Items that reveal their index and every generator an augmentation could use."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple:
        draws = [torch.rand(()).item(), random.random(), float(np.random.rand())]
        return torch.tensor([index, *draws], dtype=torch.float64), torch.tensor(index)


def epoch_of(count, global_batch, *, world=1, micro=None, epoch=0, step=0, workers=0, seed=3):
    """Per rank, the list of its batches' first tensors."""
    ranks = []
    for rank in range(world):
        sampler = GlobalBatchSampler(count, global_batch, micro, rank, world, seed)
        sampler.set_position(epoch, step)
        loader = train_loader(Noise(count), sampler, workers, CPU)
        ranks.append([batch[0] for batch in loader])
    return ranks


def test_stable_seed_is_stable_and_sensitive_to_every_part():
    assert stable_seed(0, 0) == 1041621211125469266
    seeds = {stable_seed(a, b) for a in range(-5, 50) for b in range(50)}
    assert len(seeds) == 55 * 50


def test_all_generators_are_seeded_and_restored():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    draws = []
    with generators_kept():
        for _ in range(2):
            seed_generators(5)
            draws.append((torch.rand(()).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_step_takes_the_same_samples_for_any_world_size(world):
    whole = epoch_of(13, 6)[0]
    shares = epoch_of(13, 6, world=world)
    for step, expected in enumerate(whole):
        rows = torch.cat([rank[step] for rank in shares])
        # Sorted by index: ranks interleave. The rows hold the augmentation's draws too.
        assert torch.equal(rows[rows[:, 0].argsort()], expected[expected[:, 0].argsort()])
    assert sorted(torch.cat(whole)[:, 0].tolist()) == list(range(13))


def test_short_last_step_gives_empty_shares_to_ranks_without_samples():
    shares = epoch_of(13, 6, world=3)
    assert [len(batch) for batch in shares[0]] == [2, 2, 1]
    assert [len(batch) for batch in shares[2]] == [2, 2, 0]
    assert shares[2][-1].shape == (0, 4)  # shape and type of a sample survive


def test_micro_batches_part_a_share_and_match_in_number_on_all_ranks():
    shares = epoch_of(11, 8, world=2, micro=3)
    assert [len(b) for b in shares[0]] == [3, 1, 2]
    assert [len(b) for b in shares[1]] == [3, 1, 1]
    sampler = GlobalBatchSampler(11, 8, 3, 0, 2)
    assert (sampler.parts_per_step, sampler.steps_per_epoch, len(sampler)) == (2, 2, 3)


def test_smallest_part_of_any_step_and_rank():
    assert GlobalBatchSampler(13, 6).smallest_part == 1
    assert GlobalBatchSampler(12, 6).smallest_part == 6
    assert GlobalBatchSampler(16, 8, 3, 0, 2).smallest_part == 1  # shares of 4 as 3 + 1
    assert GlobalBatchSampler(3, 8, 4, 0, 2).smallest_part == 1
    assert GlobalBatchSampler(4, 8, 4, 0, 2).smallest_part == 2


def test_batch_larger_than_the_data_is_one_short_batch():
    (batches,) = epoch_of(3, 8)
    assert [len(batch) for batch in batches] == [3]


def test_epochs_and_seeds_differ_and_repeat():
    first = torch.cat(epoch_of(20, 4)[0])
    assert torch.equal(first, torch.cat(epoch_of(20, 4)[0]))
    assert not torch.equal(first, torch.cat(epoch_of(20, 4, epoch=1)[0]))
    assert not torch.equal(first, torch.cat(epoch_of(20, 4, seed=4)[0]))


def test_the_order_differs_between_epochs_and_seeds():
    orders = [GlobalBatchSampler(9, 2, seed=s).order(e) for s, e in ((3, 0), (3, 1), (4, 0))]
    assert len(set(map(tuple, orders))) == 3
    assert all(sorted(order) == list(range(9)) for order in orders)


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_the_length_is_that_of_what_is_left_of_an_epoch(step):
    """Three steps of two parts, and one of a single part."""
    sampler = GlobalBatchSampler(13, 4, micro_batch=1, rank=1, world_size=2)
    sampler.set_position(1, step)
    assert len(sampler) == len(list(sampler)) == [7, 5, 3, 1, 0][step]


def test_the_draws_of_a_sample_differ_between_epochs_and_seeds():
    def draws(seed, epoch, index):
        return tuple(KeyedDataset(Noise(9), seed)[SampleKey(epoch, index)][0][1:].tolist())

    keys = [(3, 0, 5), (3, 1, 5), (3, 0, 6), (4, 0, 5)]
    assert len({draws(*key) for key in keys}) == len(keys)
    assert draws(3, 1, 5) == draws(3, 1, 5)


def test_start_in_the_middle_of_an_epoch_continues_its_order():
    whole, rest = epoch_of(20, 6, epoch=2)[0], epoch_of(20, 6, epoch=2, step=2)[0]
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_workers_change_no_sample_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(torch.cat(epoch_of(9, 4)[0]), torch.cat(epoch_of(9, 4, workers=2)[0]))
    assert torch.equal(torch.get_rng_state(), before)


def test_persistent_workers_follow_the_epoch():
    sampler = GlobalBatchSampler(8, 4, seed=1)
    loader = train_loader(Noise(8), sampler, 1, CPU)
    epochs = []
    for epoch in (0, 1):
        sampler.set_position(epoch)
        epochs.append(torch.cat([batch[0] for batch in loader]))
    fresh = torch.cat(epoch_of(8, 4, epoch=1, seed=1)[0])
    assert torch.equal(epochs[1], fresh)
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize(("count", "world"), [(7, 1), (7, 2), (7, 3), (2, 4), (0, 2)])
def test_evaluation_shards_cover_every_sample_once(count, world):
    seen = [list(ShardSampler(count, rank, world)) for rank in range(world)]
    indices = sorted(key.index for shard in seen for key in shard)
    assert indices == list(range(count))


def test_evaluation_loader_takes_any_batch_size_and_an_empty_shard():
    loader = eval_loader(Noise(5), 2, 0, CPU, rank=1, world_size=2)
    assert [batch[1].tolist() for batch in loader] == [[1, 3]]
    assert list(eval_loader(Noise(1), 2, 0, CPU, rank=3, world_size=4)) == []


def test_collate_stacks_equal_shapes_and_lists_others():
    image, small, large = torch.zeros(3, 4, 4), torch.zeros(1, 2, 2), torch.zeros(1, 5, 7)
    images, masks = collate([(image, small), (image, large)])
    assert images.shape == (2, 3, 4, 4)
    assert [tuple(mask.shape) for mask in masks] == [(1, 2, 2), (1, 5, 7)]


def test_keyed_dataset_marks_stand_ins():
    dataset = KeyedDataset(Noise(2), seed=0)
    batch = collate([dataset[SampleKey(0, 1, real=False)]])
    assert [len(part) for part in batch] == [0, 0]


def test_a_batch_of_images_lies_pixel_by_pixel_as_they_do():
    images = [torch.arange(24).view(2, 4, 3).permute(2, 0, 1) + number for number in range(2)]
    (batch,) = collate([(image,) for image in images])
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack(images))
    (masks,) = collate([(image[:1],) for image in images])
    assert masks.is_contiguous()
    assert torch.equal(masks, torch.stack(images)[:, :1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 2), (3, 2, 5)])
def test_a_worker_collates_in_shared_memory(monkeypatch, dtype, shape):
    tensors = [torch.full(shape, number).to(dtype) for number in range(3)]
    (alone,) = collate([(tensor,) for tensor in tensors])
    assert not alone.is_shared()
    monkeypatch.setattr(data, "get_worker_info", object)
    (batch,) = collate([(tensor,) for tensor in tensors])
    assert batch.is_shared()
    assert (batch.dtype, batch.shape, batch.stride()) == (dtype, (3, *shape), alone.stride())
    assert torch.equal(batch, alone)


def test_a_batch_draws_as_its_samples_do_alone():
    dataset, keys = KeyedDataset(Noise(3), seed=1), [SampleKey(2, index) for index in (2, 0)]
    before = np.random.get_state()[1]
    batch = dataset.__getitems__(keys)
    assert np.array_equal(before, np.random.get_state()[1])
    for key, (draws, _) in zip(keys, batch, strict=True):
        assert torch.equal(draws, dataset[key][0])
