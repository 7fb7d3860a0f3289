"""Every score has the same bits for any number of processes, threads and images read at a time.

All tasks, on seven samples, which no number of processes divides, and on two, fewer than processes.
Targets have three sizes, as have the networks' inputs in matting; segmentation masks are ignored in
part, one of them whole. What is compared are the states, which are integers, and the scores made of
them, both exactly.

Promised on CPUs, for one build of torch on one kind of processor: another device, build or
instruction set rounds a convolution otherwise, and then a score may differ in its last digits.
"""

from functools import cache
from math import ceil

import pytest
import torch
from distributed import on_ranks
from test_parity import Ignoring, narrow_u2net
from torch.utils.data import ConcatDataset, Subset

import tasks
from train_utils.collectives import get_rank, get_world_size
from train_utils.data import eval_loader
from train_utils.train_and_eval import evaluate

pytestmark = pytest.mark.xdist_group("exactness")  # what the tests share is made once

CPU = torch.device("cpu")
BATCH_SIZES = (1, 2, 3, 4, 7, 100)
COUNTS = (7, 2)
SIZES = {32: 3, 40: 2, 48: 2}  # pixels a side → scenes of that size

_NARROW = {"channels": 4}
TASKS = {
    "saliency": {},
    "segmentation, unet": {"model": {"name": "unet", **_NARROW}, "loss": {"terms": ["ce", "dice"]}},
    "segmentation, fcn": {"model": {"name": "fcn", **_NARROW}, "loss": {"terms": ["bce", "focal"]}},
    "matting": {"model": _NARROW},
    "translation": {"model": {**_NARROW, "levels": 4, "d_channels": 4, "d_layers": 1}},
}


def read_task(name, size, count=1):
    data = {"image_size": size, "val_size": count, "seed": size}
    task = name.partition(",")[0]
    data |= {"crop_sizes": [size], "eval_radius": 3} if task == "matting" else {}
    task = tasks.read_config({"task": task, "data": data, **TASKS[name]}, name, {})
    return task, task.cfg


@cache  # drawing the scenes takes longer than scoring them
def samples(name):
    """Seven validation samples of three sizes; all go through the network's size but matting's."""
    parts = []
    for size, count in SIZES.items():
        task, cfg = read_task(name, size, count)
        parts.append(task.build_val_dataset())
        parts[-1].transforms = parts[0].transforms
    dataset = ConcatDataset(parts)
    return Ignoring(dataset, all_of=4) if cfg.task == "segmentation" else dataset


@cache
def networks(name):
    """A task's networks; on each process with other statistics of batch norm."""
    task, _ = read_task(name, min(SIZES))
    torch.manual_seed(0)
    models = {"model": narrow_u2net()} if name == "saliency" else task.build_models()
    task.initialise(models)
    with torch.no_grad():
        for network in models.values():
            for weight in network.parameters():
                weight *= 2  # first weights give flat maps, of which all scores are alike
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    buffer += 0.1 * get_rank()  # rank 0's are evaluated everywhere
    return models


def make_metrics(task):
    """All that a task has: also of stretched maps, and by the toolbox's protocol."""
    flags = task.SCORE_FLAGS
    return [*task.make_metrics(), *(task.metrics_with(flags) if flags else ())]


def score(name, dataset, batch_size):
    """The states and the scores of all metrics, over the present processes."""
    task, _ = read_task(name, min(SIZES))
    metrics = make_metrics(task)
    loader = eval_loader(dataset, batch_size, 0, CPU, get_rank(), get_world_size())
    evaluate(networks(name), loader, CPU, metrics=metrics, predict=task.predict)
    return [metric.state.tolist() for metric in metrics], [metric.scores() for metric in metrics]


def batch_sizes(count, world=1):
    """Those that cut the largest share of `count` samples in different ways, and a larger one."""
    share = ceil(count / world)
    return [size for size in BATCH_SIZES if size <= share or size == max(BATCH_SIZES)]


def jobs(world):
    """All (task, samples, batch size) that are scored by so many processes."""
    return [
        (name, count, batch_size)
        for name in TASKS
        for count in COUNTS
        for batch_size in batch_sizes(count, world)
    ]


def score_everything():
    return {
        (name, count, batch_size): score(name, Subset(samples(name), range(count)), batch_size)
        for name, count, batch_size in jobs(get_world_size())
    }


@cache
def alone(name, count):
    return score(name, Subset(samples(name), range(count)), batch_size=1)


@cache
def on_processes(world):
    return on_ranks(world, score_everything)


@pytest.fixture
def threads():
    """Set the number of threads for a test and put it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_equal(found, expected):
    (states, scores), (expected_states, expected_scores) = found, expected
    assert states == expected_states
    assert scores == expected_scores
    # nan would not even equal itself; without it every score has been compared.
    assert all(value == value for of_metric in scores for value in of_metric.values())


@pytest.mark.parametrize("name", TASKS)
def test_batch_sizes_and_threads_change_no_bit(name, threads):
    threads(1)
    for count in COUNTS:
        for batch_size in batch_sizes(count):
            dataset = Subset(samples(name), range(count))
            assert_equal(score(name, dataset, batch_size), alone(name, count))
    for number, batch_size in ((2, 3), (3, 1)):
        threads(number)
        assert_equal(score(name, samples(name), batch_size), alone(name, max(COUNTS)))
        assert torch.get_num_threads() == number  # put back after the pool


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_number_of_processes_changes_no_bit(world):
    for scored in on_processes(world):
        assert list(scored) == jobs(world)
        for (name, count, _), found in scored.items():
            assert_equal(found, alone(name, count))


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_less_or_twice_would_be_noticed(name):
    states, scores = alone(name, max(COUNTS))
    for indices in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 6]):
        other_states, other_scores = score(name, Subset(samples(name), indices), batch_size=1)
        assert all(a != b for a, b in zip(states, other_states, strict=True))
        assert all(a != b for a, b in zip(scores, other_scores, strict=True))
