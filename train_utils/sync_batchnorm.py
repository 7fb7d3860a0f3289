"""Batch normalisation over the batch of all processes, on any device.

torch's own SyncBatchNorm refuses to train on CPUs; this one needs nothing but an all-reduce, so
that the promise "processes change only the time" can be kept and tested without a GPU.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train_utils.device import fuses_sync_batch_norm


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradients."""

    @staticmethod
    def forward(ctx: object, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Affine BatchNorm2d whose training statistics are those of all ranks' batches together.

    Ioffe & Szegedy 2015, eq. 1–2 of algorithm 1, with mean and variance from the global sums
    Σx, Σ(x−μ)² and the global count; ranks may hold batches of different sizes, also none.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
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
        self.num_batches_tracked += 1
        momentum = self.momentum or 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), momentum)


def convert_sync_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace every BatchNorm2d by one that is synchronised over processes; weights are kept.

    GPUs get torch's own SyncBatchNorm where it has fused kernels; other devices get ours.
    """
    if fuses_sync_batch_norm(device):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
            setattr(module, name, _converted(child))
        else:
            convert_sync_batchnorm(child, device)
    return module


def _converted(norm: nn.BatchNorm2d) -> SyncBatchNorm2d:
    synced = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    synced.load_state_dict(norm.state_dict())
    synced = synced.to(norm.weight).train(norm.training)
    synced.weight, synced.bias = norm.weight, norm.bias  # frozen ones stay so
    return synced
