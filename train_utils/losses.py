"""Losses: pure functions of network outputs and targets, each the mean over the batch."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_values(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Masks and maps as numbers of `dtype`: uint8 codes mean code/255, bool 0/1, floats themselves.

    Raises TypeError for any other dtype, since nobody could tell which scale it has.
    """
    if values.dtype == torch.uint8:
        # A product, because a GPU replaces the quotient by one: so all devices agree to the bit.
        return values.to(dtype) * (1 / 255)
    if values.dtype == torch.bool or values.is_floating_point():
        return values.to(dtype)
    raise TypeError(f"{values.dtype} has no agreed scale: give uint8 (0..255), bool or float")


def criterion(inputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
    """Binary cross-entropy on logits, summed over the outputs of a deeply supervised network.

    Each output adds the mean over pixels of −t·log σ(x) − (1−t)·log(1 − σ(x)), with weight 1
    (Qin et al., "U²-Net", Pattern Recognition 2020, eq. 1 and 2).

    inputs: logits [B, 1, H, W], or a list of them. target: same shape; see `unit_values`.
    Returns a 0-dim tensor, at least fp32 whatever the autocast dtype. Raises ValueError when an
    output and the target differ in shape.
    """
    outputs, target = supervised(inputs, target)
    return sum_of(F.binary_cross_entropy_with_logits(logits, target) for logits in outputs)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def supervised(inputs: Tensor | Sequence[Tensor], target: Tensor) -> tuple[list[Tensor], Tensor]:
    """Logits and their common target, at least fp32; ValueError where their shapes differ."""
    outputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not outputs:
        raise ValueError("no outputs: give logits or a list of logits")
    for logits in outputs:
        if logits.shape != target.shape:
            raise ValueError(
                f"logits {list(logits.shape)} and target {list(target.shape)} differ in shape: "
                "resize one to the other before the loss"
            )
    dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    return [logits.to(dtype) for logits in outputs], unit_values(target, dtype)
