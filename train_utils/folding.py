"""Batch norm folded into the convolution before it, for networks that no longer train.

With running statistics batch norm is an affine map per channel, and so is part of a convolution:
γ (w∗x + b − μ) / √(σ² + ε) + β  =  (s w)∗x + s (b − μ) + β  with  s = γ / √(σ² + ε).
"""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from train_utils.device import fp64_device
from train_utils.sync_batchnorm import SyncBatchNorm2d

CONVS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d)  # alike but in training
# Blocks whose own forward() is known to run conv1, bn1, conv2, bn2 …; others of these names may
# normalise first. Known by name, for whatever version of torchvision.
_RESNET_BLOCKS = ("torchvision.models.resnet.BasicBlock", "torchvision.models.resnet.Bottleneck")


def folded(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, each batch norm after a convolution folded into its weights.

    Found are pairs that follow each other directly in an nn.Sequential or in a block of
    torchvision's ResNets; an nn.Identity takes the batch norm's place. All else stays as it is:
    batch norm without running statistics, layers that are subclassed, parametrised, hooked or used
    in several places. Outputs differ by rounding only, since the weights are computed in fp64.
    In an nn.Sequential whose convolutions are read from outside, they are then seen normalised.
    """
    model = copy.deepcopy(model).eval()
    places = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    for parent, conv_name, norm_name in list(_neighbours(model)):
        conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
        alone = places.count(id(conv)) == places.count(id(norm)) == 1
        if alone and is_plain(conv, CONVS) and is_plain(norm, _NORMS) and _is_fixed(norm):
            _fold(conv, norm)
            setattr(parent, norm_name, nn.Identity().eval())
    return model


def _neighbours(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, name, name) of children of which the second takes what the first returns."""
    for module in model.modules():
        kind = type(module)
        if isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward:
            for pair in pairwise(module._modules):
                yield module, *pair
        elif f"{kind.__module__}.{kind.__qualname__}" in _RESNET_BLOCKS:
            for number in range(1, 4 if hasattr(module, "conv3") else 3):
                yield module, f"conv{number}", f"bn{number}"


def is_plain(layer: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether a layer is of one of these kinds itself and nobody listens in."""
    return type(layer) in kinds and not (layer._forward_hooks or layer._forward_pre_hooks)


def _is_fixed(norm: nn.Module) -> bool:
    """Whether batch norm uses running statistics."""
    return not norm.training and norm.running_mean is not None


@torch.no_grad()
def _fold(conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> None:
    home = fp64_device(conv.weight.device)

    def wide(values: Any) -> Tensor:
        return values.to(home).double()

    scale = (wide(norm.running_var) + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * wide(norm.weight)
    shift = (0 if conv.bias is None else wide(conv.bias)) - wide(norm.running_mean)
    bias = scale * shift + (wide(norm.bias) if norm.affine else 0)
    weight = wide(conv.weight) * _per_weight(scale, conv)
    grad = conv.weight.requires_grad
    conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=grad)
    conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=grad)


def _per_weight(scale: Tensor, conv: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    """A value per output channel, in the shape in which it multiplies a convolution's weights."""
    if isinstance(conv, nn.Conv2d):
        return scale.view(-1, 1, 1, 1)
    # [in, out / groups, …]: the rows of each group have that group's output channels.
    rows = scale.view(conv.groups, -1).repeat_interleave(conv.in_channels // conv.groups, dim=0)
    return rows[..., None, None]
