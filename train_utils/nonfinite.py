"""Losses and gradients that are NaN or infinite: found before the weights change, and named.

Gradients are summed over processes, so that one bad value reaches them all: every process sees the
same gradients, and all decide alike without a collective of their own.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from train_utils.activity import waiting
from train_utils.collectives import all_gather_alike, sum_over_ranks
from train_utils.ema import copy_all
from train_utils.errors import UserError, shortened
from train_utils.log import get_logger

HOW_TO_TAME = (
    "Lower --lr, try --amp off or gradient clipping (--set train.clip_norm=1), and check the "
    "images. The last checkpoint is from before."
)
HOW_TO_LOG = (
    "Nothing was trained on it: it is only logged. Have the task's losses return a finite value, "
    "e.g. by torch.nan_to_num, or leave it out."
)
_MAX_IN_A_ROW = 10  # skipped steps, after which the weights themselves must be the cause

OnNonfinite = Literal["stop", "skip"]


class NonfiniteError(UserError):
    """A loss or a gradient became NaN or infinite, so that the training ends."""


def spoilt_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss, to the bit; multiplied by NaN if it is not finite, so that its gradients tell."""
    return loss * (1 + (loss - loss).detach())


def nonfinite_gradients(models: Iterable[nn.Module]) -> Tensor:
    """How many parameters' gradients hold NaN or infinity, on their device."""
    gradients = [p.grad for model in models for p in model.parameters() if p.grad is not None]
    if not gradients:
        return torch.tensor(0)
    largest = torch._foreach_norm(gradients, math.inf)
    return torch.stack([value.float() for value in largest]).isfinite().logical_not().sum()


@dataclass
class NonfiniteGuard:
    """Stops, or skips a step, when a loss or gradient of any process is not finite.

    The host looks before every update where that costs nothing (CPUs) and where it must (skip). For
    `stop` on a GPU it looks when the losses are read anyway, at the next line or checkpoint: what
    the weights in memory have become by then ends with the run, and is not saved.
    scaled: fp16's GradScaler deals with infinite gradients by itself; only the losses count then.
    where, names: a step for messages, and its samples on this process.
    """

    mode: OnNonfinite
    device: torch.device
    scaled: bool
    models: Mapping[str, nn.Module]
    where: Callable[[int], str]
    names: Callable[[int], list[str]]

    def __post_init__(self) -> None:
        self.looks_at_once = self.mode == "skip" or self.device.type == "cpu"
        self.in_a_row = 0
        self._noted: list[tuple[int, Tensor, dict[str, Tensor]]] = []
        self._kept_buffers: list[Tensor] = []

    def keep_buffers(self) -> None:
        """Remember batch norm's statistics, which a bad forward pass spoils before it is known."""
        if self.mode == "skip":
            buffers = self._live_buffers()
            if not self._kept_buffers:
                self._kept_buffers = [torch.empty_like(buffer) for buffer in buffers]
            copy_all(self._kept_buffers, buffers)

    def _live_buffers(self) -> list[Tensor]:
        return [buffer for model in self.models.values() for buffer in model.buffers()]

    def found(
        self, step: int, losses: dict[str, Tensor], only_logged: Collection[str] = ()
    ) -> bool:
        """Whether the update must not happen, on all processes alike."""
        if self.scaled:
            trained = [loss for name, loss in losses.items() if name not in only_logged]
            flag = torch.stack([loss.isfinite() for loss in trained]).logical_not().any()
        else:
            flag = nonfinite_gradients(self.models.values())
        if not self.looks_at_once:
            self._noted.append((step, flag, losses))
            return False
        with waiting("whether all gradients are finite"):  # on a GPU: for those of all processes
            bad_here = bool(flag)
        bad = any(self._on_all_processes([bad_here]))
        self.in_a_row = self.in_a_row + 1 if bad else 0
        return bad

    def _on_all_processes(self, flags: list[float]) -> list[float]:
        """Flags as all processes see them: gradients are alike already, losses are their own."""
        return sum_over_ranks(flags) if self.scaled else flags

    def stop_or_skip(self, step: int, losses: dict[str, Tensor], bad_here: int) -> None:
        """Say what happened; raise UserError unless the step is to be skipped. On all processes.

        bad_here: how many gradients this process's own images spoil, 0 where that is not known.
        """
        terms = ", ".join(name for name, loss in losses.items() if not math.isfinite(loss))
        reports = all_gather_alike((terms, bad_here, shortened(self.names(step))))
        # Where batch norm is synchronised, what is bad on one rank spoils gradients on all, but
        # neither the losses nor the gradients behind the last batch norm.
        most = max(bad for _, bad, _ in reports)
        culprits = [(rank, term, names) for rank, (term, _, names) in enumerate(reports) if term]
        culprits = culprits or [
            (rank, "the gradient", names)
            for rank, (_, bad, names) in enumerate(reports)
            if bad and bad == most
        ]
        accounts = [
            f"{term} on rank {rank}" + (f" ({names})" if names else "")
            for rank, term, names in culprits
        ]
        text = f"{self.where(step)}: {'; '.join(accounts) or 'the gradient'} became NaN or infinite"
        if self.mode == "stop":
            raise NonfiniteError(f"{text}. {HOW_TO_TAME}")
        if self.in_a_row >= _MAX_IN_A_ROW:
            raise NonfiniteError(f"{text}, {self.in_a_row} steps in a row. {HOW_TO_TAME}")
        copy_all(self._live_buffers(), self._kept_buffers)
        get_logger().info(f"{text}: the step is skipped")

    def review(self) -> None:
        """Look at the steps noted since the last review; UserError naming the first bad one."""
        noted, self._noted = self._noted, []
        if not noted:
            return
        with waiting("whether all steps were finite"):  # on a GPU: for gradients of all processes
            here = torch.stack([flag.float() for _, flag, _ in noted]).tolist()
        flags = self._on_all_processes(here)
        for bad, (step, _, losses) in zip(flags, noted, strict=True):
            if bad:
                self.stop_or_skip(step, losses, bad_here=0)
