"""Exponential moving average of a network's weights."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Keeps `module`, a copy of a network whose parameters are the running average.

    After every optimizer step: average ← decay·average + (1 − decay)·parameter. The decay is
    lowered to (1 + t)/(10 + t) in the first steps t, so that the random start is soon forgotten.
    Buffers (batch-norm statistics, averages already) are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.module = deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Fold in the network's present weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        averages: list[Tensor] = list(self.module.parameters())
        parameters: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        copy_all(list(self.module.buffers()), list(model.buffers()))


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target; on a GPU in a few launches, not one for each.

    Batch norm has floats and counters, and torch fuses copies of one dtype only.
    """
    for dtype in {target.dtype for target in targets}:
        chosen = [i for i, target in enumerate(targets) if target.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])
