"""What networks are made of: stages with their outputs, parameters and operations."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from train_utils.amp import choose_amp_dtype
from train_utils.check.sections import Table
from train_utils.dry_run import copies_to_try
from train_utils.task import BaseTask
from train_utils.train_and_eval import Batch, Models, losses_by_network, to_device


@dataclass
class Stage:
    """A child of a network: what it returned last, its parameters, the operations of all calls.

    A multiplication with its addition counts as two operations, as torch counts them.
    """

    name: str
    kind: str
    parameters: int
    trained: int
    outputs: list[list[int]] = field(default_factory=list)
    calls: int = 0
    flops: int = 0


def stages_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a network; of lists and of an only child their own children."""
    todo = list(network.named_children())
    while len(todo) == 1 and list(todo[0][1].children()):
        ((name, child),) = todo
        todo = [(f"{name}.{inner}", module) for inner, module in child.named_children()]
    while todo:
        name, module = todo.pop(0)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # these are never called themselves
            todo[:0] = [(f"{name}.{inner}", each) for inner, each in module.named_children()]
        else:
            yield name, module


def summarize(
    task: BaseTask, networks: Models, batch: Batch, device: torch.device
) -> dict[str, list[Stage]]:
    """The stages of every network, as a training's forward passes of this batch find them.

    The last stage of each network is its whole, "total". Networks stay as they are.
    """
    copies = copies_to_try(networks)
    counter = FlopCounterMode(display=False)
    amp_dtype = choose_amp_dtype(task.cfg.train.amp, device)
    found = {name: _stages(network) for name, network in copies.items()}
    with ExitStack() as stack:
        for name, network in copies.items():
            for stage, module in zip(found[name], _modules(network), strict=True):
                stack.enter_context(_noted(stage, module, counter))
        stack.enter_context(counter)
        stack.enter_context(torch.autocast(device.type, amp_dtype, enabled=bool(amp_dtype)))
        for _ in losses_by_network(
            task.losses, copies, to_device(batch, device), next(iter(copies))
        ):
            pass
    return found


def _modules(network: nn.Module) -> list[nn.Module]:
    return [*(module for _, module in stages_of(network)), network]


def _stages(network: nn.Module) -> list[Stage]:
    named = [*stages_of(network), ("total", network)]
    return [
        Stage(
            name,
            type(module).__name__,
            sum(p.numel() for p in module.parameters()),
            sum(p.numel() for p in module.parameters() if p.requires_grad),
        )
        for name, module in named
    ]


@contextmanager
def _noted(stage: Stage, module: nn.Module, counter: FlopCounterMode) -> Iterator[None]:
    """Note a stage's calls in a block."""
    before: list[int] = []

    def enter(*_: Any) -> None:
        before.append(counter.get_total_flops())

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        stage.calls += 1
        stage.flops += counter.get_total_flops() - before.pop()
        parts = list(output.values()) if isinstance(output, Mapping) else output
        parts = parts if isinstance(parts, (list, tuple)) else [parts]
        stage.outputs = [list(part.shape) for part in parts if isinstance(part, Tensor)]

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def summary_table(network: str, stages: list[Stage]) -> Table:
    """The stages of a network as they are shown, for one image."""
    rows = [
        [
            stage.name,
            stage.kind,
            _shapes(stage),
            f"{stage.parameters:,}",
            amount(stage.flops) if stage.calls else "–",
        ]
        for stage in stages
    ]
    head = ["stage", "type", "output [B, C, H, W]", "parameters", "FLOP per image"]
    return Table(f"{network}: forward passes of one image in a training step", head, rows)


def _shapes(stage: Stage) -> str:
    shown = [" × ".join(map(str, ["B", *shape[1:]])) for shape in stage.outputs[:2]]
    shown += [f"and {len(stage.outputs) - 2} more"] * (len(stage.outputs) > 2)
    times = f", called {stage.calls} times" if stage.calls > 1 else ""
    return (", ".join(shown) or ("–" if stage.calls else "not called")) + times


def amount(number: float) -> str:
    """A large number in thousands, millions or billions."""
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.4g}{letter}"
    return f"{number:g} "
