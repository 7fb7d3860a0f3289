"""Batch normalisation over the batch of all processes, on any device.

torch's own SyncBatchNorm refuses to train on CPUs, and on GPUs it makes the host wait three times
per layer and sends other dtypes where a process has no image. Ours needs nothing but an all-reduce,
and on GPUs runs on the same kernels as torch's.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train_utils.activity import waiting
from train_utils.collectives import get_world_size
from train_utils.device import fuses_sync_batch_norm

# The function's name until torch 2.13, and since.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone()
        _add_up(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        _add_up(total)
        return total


def _add_up(values: Tensor) -> None:
    with waiting("batch norm's statistics"):
        dist.all_reduce(values)


class _OnGpu(torch.autograd.Function):
    """The layer on CUDA's kernels, without a wait for the device.

    An all-gather of each process's mean, 1/σ and count forward, an all-reduce of two sums
    backward, both in the dtype that a GPU sums in, whatever the input's. A process without images
    takes part with a count of 0 and a σ of 1, which the kernel weighs by 0; it starts from rank 0,
    which has images whenever any process has (`data.GlobalBatchSampler`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = x.contiguous(memory_format=_layout(x))
        channels = x.size(1)
        if x.numel():
            mean, inverse = torch.batch_norm_stats(x, eps)
        else:
            dtype = torch.promote_types(x.dtype, torch.float32)
            mean, inverse = x.new_zeros(channels, dtype=dtype), x.new_ones(channels, dtype=dtype)
        count = mean.new_full((1,), x.numel() // channels)
        own = torch.cat([mean, inverse, count])
        each = own.new_empty(get_world_size(), len(own))
        with waiting("batch norm's statistics"):
            if dist.get_backend() == "gloo":  # gathers tensors on a GPU one by one only
                dist.all_gather(list(each), own)
            else:
                getattr(dist, _GATHER)(each, own)
        means, inverses, counts = each.split([channels, channels, 1], dim=1)
        counts = counts.flatten()
        mean, inverse = torch.batch_norm_gather_stats_with_counts(
            x, means, inverses, running_mean, running_var, momentum, eps, counts.to(running_mean)
        )
        ctx.save_for_backward(x, weight, mean, inverse, counts.int())
        if not x.numel():
            return torch.empty_like(x)
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=_layout(x))
        if x.numel():
            *sums, of_weight, of_bias = torch.batch_norm_backward_reduce(
                gradient, x, mean, inverse, weight, True, True, True
            )
        else:
            sums = [torch.zeros_like(mean)] * 2
            of_weight = of_bias = torch.zeros_like(weight)
        both = torch.cat(sums)
        _add_up(both)
        sum_dy, sum_dy_xmu = both.chunk(2)
        if not x.numel():
            return torch.zeros_like(x), of_weight, of_bias, *[None] * 4
        of_x = torch.batch_norm_backward_elemt(
            gradient, x, mean, inverse, weight.to(mean), sum_dy, sum_dy_xmu, counts
        )
        return of_x, of_weight, of_bias, *[None] * 4


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Affine BatchNorm2d whose training statistics are those of all ranks' batches together.

    Ioffe & Szegedy 2015, eq. 1–2 of algorithm 1, with mean and variance from the global sums
    Σx, Σ(x−μ)² and the global count; ranks may hold batches of different sizes, also none.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or get_world_size() == 1:
            return super().forward(input)
        fused = fuses_sync_batch_norm(input.device)
        return self._on_gpu(input) if fused else self._anywhere(input)

    def _on_gpu(self, input: Tensor) -> Tensor:
        weights = self.weight, self.bias, self.running_mean, self.running_var
        return _OnGpu.apply(input, *weights, self._next_momentum(), self.eps)

    def _anywhere(self, input: Tensor) -> Tensor:
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        count = x.new_tensor([x.numel() // x.size(1)])
        # Two passes (mean, then centred squares): one pass over Σx² would lose digits.
        sums = _SumOverRanks.apply(torch.cat([x.sum(dim=(0, 2, 3)), count]))
        total = sums[-1].detach()
        if total <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
        mean = sums[:-1] / total
        centred = x - mean.view(1, -1, 1, 1)
        variance = _SumOverRanks.apply(centred.square().sum(dim=(0, 2, 3))) / total
        self._track(mean.detach(), variance.detach() * total / (total - 1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        output = torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1))
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        momentum = self._next_momentum()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), momentum)

    @torch.no_grad()
    def _next_momentum(self) -> float:
        self.num_batches_tracked += 1
        if self.momentum is not None:
            return self.momentum
        return 1 / self.num_batches_tracked.item()  # a cumulative average


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d by one that is synchronised over processes; weights are kept."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
            setattr(module, name, _converted(child))
        else:
            convert_sync_batchnorm(child)
    return module


def _converted(norm: nn.BatchNorm2d) -> SyncBatchNorm2d:
    synced = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    synced.load_state_dict(norm.state_dict())
    synced = synced.to(norm.weight).train(norm.training)
    synced.weight, synced.bias = norm.weight, norm.bias  # frozen ones stay so
    return synced
