"""Synchronised batch norm on a GPU's kernels; on CPUs and of whole networks see test_parity.py."""

import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from torch import nn

from train_utils.sync_batchnorm import convert_sync_batchnorm

DIMS = (0, 2, 3)


def per_channel(values):
    return values.view(1, -1, 1, 1)


# What CUDA's kernels compute (aten/src/ATen/native/cuda/Normalization.cuh), in words of torch.


def batch_norm_stats(x, eps):
    return x.mean(DIMS), (x.var(DIMS, correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x, means, inverses, running_mean, running_var, momentum, eps, counts
):
    mean, squares, n = 0, 0, 0
    for m, inverse, count in zip(means, inverses, counts.tolist(), strict=True):
        own = (1 / inverse**2 - eps) * count
        squares = squares + own + (mean - m) ** 2 * n * count / (n + count)
        mean = (n * mean + count * m) / (n + count)  # 0/0 if the first one counts nothing
        n += count
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(squares / (n - 1), momentum)
    return mean, (squares / n + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, inverse, eps):
    scaled = (x - per_channel(mean)) * per_channel(inverse * weight)
    return scaled + per_channel(bias)


def batch_norm_backward_reduce(gradient, x, mean, inverse, weight, *_):
    products = (gradient * (x - per_channel(mean))).sum(DIMS)
    return gradient.sum(DIMS), products, products * inverse, gradient.sum(DIMS)


def batch_norm_backward_elemt(gradient, x, mean, inverse, weight, sum_dy, sum_dy_xmu, counts):
    n = counts.sum()
    centred = (x - per_channel(mean)) * per_channel(inverse**2 * sum_dy_xmu / n)
    return (gradient - per_channel(sum_dy / n) - centred) * per_channel(inverse * weight)


KERNELS = {
    function.__name__: function
    for function in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    )
}


class Group:
    """Collectives among threads, each of which is a rank."""

    def __init__(self, world):
        self.world, self.rank = world, threading.local()
        self.parts = [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def _all(self, own):
        self.parts[self.rank.number] = own.clone()
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def all_reduce(self, values):
        values.copy_(sum(self._all(values)))

    def all_gather(self, each, own):
        each.copy_(torch.stack(self._all(own)))

    def run(self, function):
        """function(rank) on every rank; the results by rank."""
        results = [None] * self.world

        def one(rank):
            self.rank.number = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def layer():
    norm = nn.BatchNorm2d(3).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1, 2]))
        norm.bias.copy_(torch.tensor([1.0, 2, 3]))
    return norm


def outcome(norm, x, of_output):
    """Output, gradients and running statistics of one training step of a layer."""
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(of_output)
    statistics = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, *statistics]


def assert_like_one_process(found, expected):
    """Outputs and gradients of inputs joined, those of weights added up, statistics alike."""
    found = [[value.cpu() for value in of_rank] for of_rank in zip(*found, strict=True)]
    for values, wanted in zip(found[:2], expected, strict=False):
        torch.testing.assert_close(torch.cat(values), wanted, rtol=1e-12, atol=1e-12)
    for values, wanted in zip(found[2:4], expected[2:4], strict=True):
        torch.testing.assert_close(sum(values), wanted, rtol=1e-12, atol=1e-12)
    for values, wanted in zip(found[4:], expected[4:], strict=True):
        for value in values:
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 3, 4, 6, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shares", [(2, 2, 1), (3, 0, 2), (5, 0, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_processes_of_any_share_give_what_one_gives(shares, layout):
    x, of_output = (values.contiguous(memory_format=layout) for values in data())
    expected = outcome(layer(), x, of_output)
    parts = list(zip(x.split(shares), of_output.split(shares), strict=True))
    layers = [convert_sync_batchnorm(nn.Sequential(layer()))[0] for _ in shares]
    group = Group(len(shares))
    with (
        mock.patch.multiple(torch, **KERNELS),
        mock.patch("train_utils.sync_batchnorm.fuses_sync_batch_norm", lambda device: True),
        mock.patch.multiple(
            dist,
            create=True,  # the older of two names for a gather, or the newer
            is_initialized=lambda: True,
            get_world_size=lambda: len(shares),
            get_backend=lambda: "nccl",
            all_reduce=group.all_reduce,
            all_gather_single=group.all_gather,
            all_gather_into_tensor=group.all_gather,
        ),
    ):
        found = group.run(lambda rank: outcome(layers[rank], *parts[rank]))
    assert_like_one_process(found, expected)


def _on_the_card(shares, layout):
    x, of_output = (part.split(shares)[dist.get_rank()].cuda() for part in data())
    norm = convert_sync_batchnorm(nn.Sequential(layer()))[0].cuda()
    values = outcome(norm, x.contiguous(memory_format=layout), of_output)
    return [value.tolist() for value in values]


@pytest.mark.gpu
@pytest.mark.slow  # processes
@pytest.mark.parametrize("shares", [(3, 2), (5, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_kernels_of_a_card_give_what_one_process_gives(shares, layout):
    found = []
    for values in on_ranks(2, _on_the_card, shares, layout):
        *maps, weight, bias, mean, var, count = (
            torch.tensor(v, dtype=torch.float64) for v in values
        )
        # An empty list has lost the shape of what one image gives.
        maps = [each.reshape(-1, 3, 4, 6) for each in maps]
        found.append([*maps, weight, bias, mean, var, count])
    expected = [value.double() for value in outcome(layer(), *data())]
    assert_like_one_process(found, expected)
