"""Learning-rate schedule and parameter groups of the recipe."""

import math

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def lr_factor(
    step: int, warmup_steps: int, total_steps: int, warmup_factor: float, end_factor: float
) -> float:
    """Factor on the base learning rate at optimizer step `step`: linear warm-up, then cosine.

    For step x, W warm-up steps and T steps in all: x ≤ W: α = x/W, factor = wf·(1−α) + α;
    afterwards ((1 + cos(π·(x−W)/(T−W)))/2)·(1−ef) + ef. Steps beyond T stay at ef.
    """
    if step <= warmup_steps and warmup_steps > 0:
        alpha = step / warmup_steps
        return warmup_factor * (1 - alpha) + alpha
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return (1 + math.cos(math.pi * progress)) / 2 * (1 - end_factor) + end_factor


def create_lr_scheduler(
    optimizer: Optimizer,
    num_step: int,
    epochs: int,
    warmup: bool = True,
    warmup_epochs: float = 1,
    warmup_factor: float = 1e-3,
    end_factor: float = 1e-6,
) -> LambdaLR:
    """Schedule to be stepped after every optimizer step; `num_step` is the steps per epoch.

    Raises ValueError for no steps, no epochs or negative warm-up.
    """
    if num_step <= 0 or epochs <= 0 or warmup_epochs < 0:
        raise ValueError(
            f"num_step ({num_step}) and epochs ({epochs}) must be positive and "
            f"warmup_epochs ({warmup_epochs}) not negative"
        )
    warmup_steps = round(warmup_epochs * num_step) if warmup else 0

    def factor(step: int) -> float:
        return lr_factor(step, warmup_steps, epochs * num_step, warmup_factor, end_factor)

    return LambdaLR(optimizer, lr_lambda=factor)


def get_params_groups(model: nn.Module, weight_decay: float = 1e-4) -> list[dict]:
    """Two parameter groups, [without decay, with decay]; frozen parameters are left out.

    One-dimensional parameters (batch-norm) and names ending in `.bias` are not decayed.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim == 1 or name.endswith(".bias")
            (plain if is_plain else decayed).append(parameter)
    return [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
