"""Whether a recipe learns at all, and at which learning rate: one batch by heart, and a sweep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from train_utils.check.findings import Finding, Severity
from train_utils.check.trials import Steps, Trial, mean
from train_utils.task import BaseTask
from train_utils.train_and_eval import Batch, Models

MOST_STEPS = 200  # on one batch
FEWEST_STEPS = 20  # of which anything can be said
_DONE, _LEARNS = 0.1, 0.5  # shares of the first loss: enough for an end, and for a "learns"
_STUCK = 0.95  # a share of the first loss below which something has been learnt
_OTHER_RATES = 10.0, 0.1  # × the recipe's, where its own does not do

SWEEP_STEPS = 100
_LOWEST, _HIGHEST = 1e-3, 1e3  # × the recipe's learning rate
_FALL = 0.05  # share of the first loss by which the curve must fall at least
_DIVERGED = 4.0  # × the lowest loss
_FITS = 5.0  # a recipe's rate is fine within this factor of what is suggested


@dataclass
class Overfit:
    """Steps on one batch: how far its loss fell, and what that says."""

    steps: Steps
    images: int
    line: str
    finding: Finding | None = None


def overfit(
    task: BaseTask, networks: Models, batch: Batch, device: torch.device, seconds: float
) -> Overfit:
    """Learn one batch by heart, at the recipe's learning rate and at others if that fails."""

    def fit(times: float) -> Steps:
        trial, repeated = Trial(task, networks, device), [batch] * MOST_STEPS
        return trial.take(repeated, seconds, lambda _: times, lambda s: _share(s) <= _DONE)

    steps, images = fit(1.0), len(batch[0])
    if not steps.losses:
        told = "overfit of one batch: its first step failed"
        return Overfit(steps, images, told, Finding("overfit", "error", steps.problem.rstrip(".")))
    lr = steps.rates[0]
    share, count = _share(steps), len(steps.losses)
    told = (
        f"overfit of one batch of {images} image{'s' * (images != 1)}: the loss goes from "
        f"{steps.losses[0]:.4g} to {_end(steps):.4g} in {count} steps at lr {lr:g}"
    )
    if not steps.problem and share <= _LEARNS:
        return Overfit(steps, images, f"{told}: it learns")
    if not steps.problem and count < FEWEST_STEPS:
        return Overfit(steps, images, f"{told}: too few in {seconds:.0f} s to tell")
    if not steps.problem and _still_falls(steps):
        return Overfit(steps, images, f"{told}: it falls, slowly; more steps would tell")
    shares = [share]
    for times in _OTHER_RATES:
        other = fit(times)
        shares += [] if other.problem else [_share(other)]
        if not other.problem and _share(other) <= _LEARNS:
            cause = f"the learning rate: at {lr * times:g} the loss falls to {_end(other):.4g}"
            finding = Finding("overfit", "warning", f"{told}; {cause}", f"Try --lr {lr * times:g}.")
            return Overfit(steps, images, f"{told}: it does not learn at this rate", finding)
    fix = f"{_suspects(networks, batch)} --lr is not the cause: ten times and a tenth fail, too."
    severity: Severity = "error" if min(shares) > _STUCK else "warning"
    finding = Finding("overfit", severity, told, fix)
    return Overfit(steps, images, f"{told}: it does not learn", finding)


def _end(steps: Steps) -> float:
    return mean(steps.losses[-3:])


def _share(steps: Steps) -> float:
    """The last losses as a share of the first one; 1 before there are enough."""
    if len(steps.losses) < 4 or not steps.losses[0]:
        return 1.0
    return _end(steps) / abs(steps.losses[0])


def _still_falls(steps: Steps) -> bool:
    third = len(steps.losses) // 3
    middle, last = mean(steps.losses[third:-third]), mean(steps.losses[-third:])
    return last < 0.95 * middle and _share(steps) < 0.95


def _suspects(networks: Models, batch: Batch) -> str:
    """What is likely at fault where no learning rate helps, the surest first."""
    parameters = [p for network in networks.values() for p in network.parameters()]
    every = sum(p.numel() for p in parameters)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    if frozen > every / 2:
        return f"{frozen / every:.0%} of the parameters are frozen: train more of them."
    target = batch[1]
    if isinstance(target, Tensor) and target.numel() and target.min() == target.max():
        return f"All targets of this batch are {target.flatten()[0]:g}: look at them on the page."
    for one in range(len(batch[0])):
        for other in range(one):
            same = torch.equal(batch[0][one], batch[0][other])
            if same and not torch.equal(target[one], target[other]):
                return "Two images of this batch are the same, and their targets differ: mend one."
    return (
        "Look at the pairs on the page: do the targets show what is to be found, and lie on their "
        "images? Then at the network: does it end in an activation that the loss applies itself?"
    )


# --- the sweep -----------------------------------------------------------------------------------


@dataclass
class Sweep:
    """A learning-rate range test (Smith, WACV 2017), and what its curve says.

    suggestion, highest: where the smoothed loss falls fastest over the logarithm of the rate, and a
    tenth of the rate where it is lowest, the lower one first; None where it does not fall, or still
    falls at the end.
    diverged: where the smoothed loss is back at its start, four times its lowest, or NaN. That is
    late: the rate goes on rising while a loss grows back from what it had fallen to.
    """

    rates: list[float]
    losses: list[float]
    smooth: list[float]
    line: str
    suggestion: float | None = None
    highest: float | None = None
    diverged: float | None = None


def ramp(steps: int, step: int) -> float:
    """The factor of a recipe's learning rates in a step of a sweep: exponential, like its curve."""
    return _LOWEST * (_HIGHEST / _LOWEST) ** (step / max(1, steps - 1))


def sweep(trial: Trial, batch: Batch, steps: int, seconds: float) -> Sweep:
    """Raise all learning rates from a thousandth of the recipe's to a thousandfold, step by step.

    On one batch: in so few steps the differences between batches would hide what the rates do.
    Ends where the loss diverges. trial: fresh copies, trained by it.
    """
    found = trial.take(
        [batch] * steps,
        seconds,
        partial(ramp, steps),
        lambda taken: read_curve(taken).diverged is not None,
    )
    read = read_curve(found)
    if len(read.rates) < steps and read.diverged is None and read.suggestion is None:
        ended = f"up to {read.rates[-1]:.2g} " if read.rates else ""
        read.line = (
            f"learning-rate sweep: {len(read.rates)} of {steps} steps {ended}in {seconds:.0f} s, "
            f"which say nothing yet. Use --seconds {2 * seconds:.0f}"
        )
    return read


def read_curve(steps: Steps) -> Sweep:
    """What the losses of rising learning rates say."""
    rates, losses = steps.rates, steps.losses
    finite = [math.isfinite(loss) for loss in losses]
    count = finite.index(False) if False in finite else len(losses)
    smooth = _smoothed(losses[:count])
    found = Sweep(rates[:count], losses[:count], smooth, "")
    if count < FEWEST_STEPS:
        found.line = f"learning-rate sweep: {count} steps are too few for a suggestion"
        return found
    curve, start = np.array(smooth), mean(losses[: count // 10])
    lowest = int(curve.argmin())
    noise = float(np.std(losses[: count // 5]))
    falls = start - curve[lowest] >= max(_FALL * abs(start), noise)
    limit = curve[lowest] + (_DIVERGED - 1) * abs(curve[lowest])
    beyond = np.flatnonzero(curve[lowest:] > (min(limit, start) if falls else limit))
    if beyond.size:
        found.diverged = rates[lowest + int(beyond[0])]
    elif steps.problem or count < len(losses):
        found.diverged = rates[count - 1]
    if not falls:
        found.line = "learning-rate sweep: the loss falls at no rate, so it suggests none"
        return found
    if found.diverged is None and lowest >= count - 1 - _reach(count):
        found.line = (
            f"learning-rate sweep: the loss still falls at the highest rate tried, "
            f"{rates[count - 1]:.2g}, so it suggests none"
        )
        return found
    slope = np.gradient(curve, np.log(rates[:count]))[: lowest + 1]
    steepest = rates[int(slope.argmin())]
    found.suggestion, found.highest = sorted([steepest, rates[lowest] / 10])
    ends = f"diverges by {found.diverged:.2g}" if found.diverged else "diverges at none"
    found.line = (
        f"learning-rate sweep: the loss falls fastest at {steepest:.2g}, is lowest at "
        f"{rates[lowest]:.2g}, {ends}: about {found.suggestion:.1g}"
    )
    return found


def _reach(count: int) -> int:
    return max(1, count // 20)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """The means of each value and its neighbours, a tenth of all, which shift no slope."""
    half = _reach(len(losses))
    return [mean(losses[max(0, place - half) : place + half + 1]) for place in range(len(losses))]


def compared(found: Sweep, lr: float) -> Finding | None:
    """A finding if a recipe's learning rate is far from what a sweep suggests."""
    if found.diverged and lr >= found.diverged:
        message = f"the loss diverges by {found.diverged:.2g}, and the recipe's is {lr:g}"
        fix = f"Try --lr {found.suggestion or found.diverged / 10:.1g}, or a longer warm-up."
        return Finding("learning rate", "warning", message, fix)
    low, high = found.suggestion, found.highest
    if low and high and not low / _FITS <= lr <= high * _FITS:
        message = f"the sweep suggests {found.suggestion:.1g}, and the recipe's is {lr:g}"
        return Finding("learning rate", "note", message, f"Try --lr {found.suggestion:.1g}.")
    return None
