"""Everything that exact continuation needs, gathered into a checkpoint and put back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from train_utils.checkpoint import join_states, split_states
from train_utils.config import diff
from train_utils.ema import ExponentialMovingAverage
from train_utils.errors import UserError
from train_utils.log import get_logger

# Settings that may change at a restart, because they change neither the samples nor the steps.
_FREE = (
    "data.root",
    "data.images",
    "data.masks",
    "data.val_images",
    "data.val_masks",
    "eval.",
    "train.epochs",
    "train.batch_size",
    "train.accumulate",
    "train.workers",
    "train.amp",
    "train.compile",
    "train.deterministic",
    "train.print_freq",
    "train.eval_interval",
    "train.keep",
    "train.save_steps",
    "train.best",
    "train.weights",
)


@dataclass
class TrainingState:
    """The moving parts of a run; `epoch` and `step` are where training continues.

    `step` counts the optimizer steps done of `epoch`; `best` maps the deciding metric to its best
    value so far and `scores` are all metrics of that moment; `meters` are the running means of an
    epoch that a restart splits.
    """

    models: dict[str, nn.Module]  # unwrapped
    optimizers: dict[str, Any]
    schedulers: dict[str, Any]
    scalers: dict[str, Any]
    ema: dict[str, ExponentialMovingAverage]
    config: dict[str, Any]
    num_samples: int
    global_batch: int
    world_size: int
    epoch: int = 0
    step: int = 0
    best: float | None = None
    best_scores: dict[str, float] = field(default_factory=dict)
    meters: dict[str, list[float]] = field(default_factory=dict)

    def capture(self) -> dict[str, Any]:
        """A checkpoint of plain types and tensors, under the keys that users of the recipe know."""
        averages = {name: ema.module for name, ema in self.ema.items()}
        return {
            "model": join_states(self.models),
            **({"ema": join_states(averages)} if averages else {}),
            "ema_steps": {name: ema.steps for name, ema in self.ema.items()},
            "optimizer": _states(self.optimizers),
            "lr_scheduler": _states(self.schedulers),
            "scaler": _states(self.scalers),
            "epoch": self.epoch if self.step else self.epoch - 1,  # the epoch trained last
            "next_epoch": self.epoch,
            "next_step": self.step,
            "best": self.best,
            "best_scores": self.best_scores,
            "meters": self.meters,
            "num_samples": self.num_samples,
            "global_batch": self.global_batch,
            "world_size": self.world_size,
            "args": self.config,
        }

    def note_scores(self, scores: dict[str, float], metric: str, goal: str) -> bool:
        """Keep `scores` if their `metric` is the best so far (`goal`: max or min); nan never is."""
        value = scores[metric]
        if value != value:
            return False
        better = self.best is None or (value > self.best if goal == "max" else value < self.best)
        if better:
            self.best, self.best_scores = value, dict(scores)
        return better

    def restore(self, state: Mapping[str, Any], source: str) -> None:
        """Continue where `state` was captured; UserError if its settings were others."""
        self._check_same_run(state, source)
        split_states(self.models, state["model"], source)
        if self.ema and "ema" in state:
            split_states({name: ema.module for name, ema in self.ema.items()}, state["ema"], source)
        for name, ema in self.ema.items():
            ema.steps = state["ema_steps"].get(name, 0)
        for key, objects in (
            ("optimizer", self.optimizers),
            ("lr_scheduler", self.schedulers),
            ("scaler", self.scalers),
        ):
            for name, saved in _named_states(objects, state.get(key, {})).items():
                if saved:
                    objects[name].load_state_dict(saved)
        self.epoch, self.step = state["next_epoch"], state["next_step"]
        self.best, self.best_scores = state["best"], state["best_scores"]
        self.meters = state["meters"]
        if state["world_size"] != self.world_size:
            get_logger().info(
                f"continuing with {self.world_size} process(es) instead of {state['world_size']}: "
                f"the global batch stays {self.global_batch}"
            )

    def _check_same_run(self, state: Mapping[str, Any], source: str) -> None:
        changes = diff(state["args"], self.config)
        fixed = [change for change in changes if not change[0].startswith(_FREE)]
        text = ", ".join(f"{key}: {old} → {new}" for key, old, new in fixed or changes)
        if fixed:
            raise UserError(
                f"{source}: was trained with other settings ({text}). Continue with its own, or "
                "start a new run from its weights with --weights."
            )
        if changes:
            get_logger().info(f"settings changed since the checkpoint: {text}")
        if state["num_samples"] != self.num_samples:
            raise UserError(
                f"{source}: was trained on {state['num_samples']} samples, now there are "
                f"{self.num_samples}. Restore the data, or start a new run with --weights."
            )


def resumed_global_batch(state: Mapping[str, Any], requested: int, world_size: int) -> int:
    """The checkpoint's global batch; UserError if the same processes ask for another one."""
    saved = state["global_batch"]
    if requested != saved and state["world_size"] == world_size:
        raise UserError(
            f"--batch-size: the run has a global batch of {saved} images per step, these settings "
            f"ask for {requested}. Continue with -b {saved // world_size or 1} and the same "
            "train.accumulate, or start a new run with --weights."
        )
    return saved


def _states(objects: dict[str, Any]) -> dict[str, Any]:
    states = {name: item.state_dict() for name, item in objects.items() if item is not None}
    return states["model"] if list(states) == ["model"] else states


def _named_states(objects: dict[str, Any], states: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": states} if list(objects) == ["model"] else dict(states)
