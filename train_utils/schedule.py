"""Optimizers, their parameter groups and their learning-rate schedules.

Every schedule is a `LambdaLR` that is stepped after each optimizer step: a checkpoint restores them
all alike, and what shrinks the rate on a plateau scales their base rates.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from train_utils.errors import UserError, described


def create_lr_scheduler(
    optimizer: Optimizer,
    num_step: int,
    epochs: int,
    warmup: bool = True,
    warmup_epochs: float = 1,
    warmup_factor: float = 1e-3,
    end_factor: float = 1e-6,
) -> LambdaLR:
    """Linear warm-up, then cosine, stepped after every optimizer step; `num_step` steps an epoch.

    For step x, W warm-up steps and T steps in all: x ≤ W: α = x/W, factor = wf·(1−α) + α;
    afterwards ((1 + cos(π·(x−W)/(T−W)))/2)·(1−ef) + ef. Steps beyond T stay at ef.
    Raises ValueError for no steps, no epochs or negative warm-up.
    """
    if num_step <= 0 or epochs <= 0 or warmup_epochs < 0:
        raise ValueError(
            f"num_step ({num_step}) and epochs ({epochs}) must be positive and "
            f"warmup_epochs ({warmup_epochs}) not negative"
        )
    warmup_steps = round(warmup_epochs * num_step) if warmup else 0
    cosine_steps = max(1, epochs * num_step - warmup_steps)

    def factor(step: int) -> float:
        if step <= warmup_steps and warmup_steps > 0:
            alpha = step / warmup_steps
            return warmup_factor * (1 - alpha) + alpha
        progress = min(1.0, (step - warmup_steps) / cosine_steps)
        return (1 + math.cos(math.pi * progress)) / 2 * (1 - end_factor) + end_factor

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


def make_optimizer(model: nn.Module, optim: Any) -> Optimizer:
    """The optimizer that an `OptimConfig` names, without decay on batch norm and biases."""
    groups = get_params_groups(model, optim.weight_decay)
    if optim.name == "sgd":
        optimizer = SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
        if optim.momentum:
            _start_momentum(optimizer)
            # A file may be of a step before a parameter's first.
            optimizer.register_load_state_dict_post_hook(_start_momentum)
        return optimizer
    kind = {"adam": Adam, "adamw": AdamW}[optim.name]
    return kind(groups, lr=optim.lr, betas=tuple(optim.betas), fused=True)


def _start_momentum(optimizer: Optimizer) -> None:
    """Start momentum at zeros, which gives the first step that torch's start gives.

    Fused SGD takes whatever memory holds for a start, and fills it in its first step, unless a
    GradScaler skips that: then its momentum may be NaN.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def make_schedule(optimizer: Optimizer, optim: Any, steps_per_epoch: int, epochs: int) -> LambdaLR:
    """The schedule that an `OptimConfig` names: cosine after a warm-up, constant or halving."""
    if optim.schedule == "cosine":
        return create_lr_scheduler(
            optimizer,
            steps_per_epoch,
            epochs,
            warmup_epochs=optim.warmup_epochs,
            warmup_factor=optim.warmup_factor,
            end_factor=optim.end_factor,
        )
    if optim.schedule == "constant":
        return LambdaLR(optimizer, lr_lambda=lambda step: 1.0)
    period = optim.halve_epochs * steps_per_epoch
    return LambdaLR(optimizer, lr_lambda=lambda step: 0.5 ** (step // period))


def apply_schedule(optimizer: Optimizer, schedule: LambdaLR) -> None:
    """Give an optimizer the learning rates that its schedule holds for the present step."""
    factors = zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in factors:
        group["lr"] = base * factor(schedule.last_epoch)


def scale_learning_rate(optimizer: Optimizer, schedule: LambdaLR, factor: float) -> None:
    """Multiply the learning rate, now and for the rest of the schedule, by `factor`."""
    schedule.base_lrs = [base * factor for base in schedule.base_lrs]
    apply_schedule(optimizer, schedule)


def describe_schedules(schedules: Mapping[str, LambdaLR], steps: int) -> str:
    """Each network's highest learning rate and the last one of a run of so many steps.

    Too few halvings are a common mistake that shows only here. Raises UserError for a schedule that
    is no LambdaLR: a checkpoint could not restore it.
    """
    texts = []
    for name, schedule in schedules.items():
        if not isinstance(schedule, LambdaLR):
            raise UserError(
                f"schedulers: {name!r} is {described(schedule)}. Give a LambdaLR of "
                "torch.optim.lr_scheduler for each optimizer, stepped after every step."
            )
        base, factor = schedule.base_lrs[0], schedule.lr_lambdas[0]
        last = base * factor(max(0, steps - 1))
        texts.append(f"{name} {base:.3g} → {last:.3g} (×{last / base:.3g})")
    return f"learning rate over the run: {', '.join(texts)}"
