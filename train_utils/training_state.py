"""Everything that exact continuation needs, gathered into a checkpoint and put back."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from train_utils.checkpoint import FORMAT, as_one_module, check_fits
from train_utils.config import diff
from train_utils.data import GlobalBatchSampler
from train_utils.ema import ExponentialMovingAverage
from train_utils.errors import UserError, brief, shortened
from train_utils.log import get_logger
from train_utils.nonfinite import HOW_TO_TAME
from train_utils.schedule import apply_schedule, scale_learning_rate

# Settings that may change at a restart, because they change neither the samples nor the steps.
_FREE = (
    "data.cache",  # and data.cache_dir
    "model.weights",
    "eval.",
    "train.epochs",
    "train.batch_size",
    "train.accumulate",
    "train.workers",
    "train.amp",
    "train.tf32",
    "train.compile",
    "train.deterministic",
    "train.print_freq",
    "train.hang_timeout",
    "train.on_nonfinite",
    "train.eval_interval",
    "train.keep",
    "train.keep_every",
    "train.save_steps",
    "train.sample_interval",
    "train.early_stop",
    "train.best",
    "train.weights",
)


@dataclass
class TrainingState:
    """The moving parts of a run; `epoch` and `step` are where training continues.

    `step` counts the optimizer steps done of `epoch` (all of them: only its evaluation is left) and
    `lr` is the last one's rate; `best_scores` are all metrics of the best evaluation and `stale`
    the number of evaluations since; `meters` are the running means of an epoch that is split.
    """

    models: dict[str, nn.Module]  # unwrapped
    optimizers: dict[str, Any]
    schedulers: dict[str, Any]
    scalers: dict[str, Any]
    ema: dict[str, ExponentialMovingAverage]
    config: dict[str, Any]
    data: str  # fingerprint of the training set
    sampler: GlobalBatchSampler
    folders: tuple[str, ...] = ()  # settings that name them, which may have moved
    epoch: int = 0
    step: int = 0
    lr: float = float("nan")
    best_scores: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    meters: dict[str, list[float]] = field(default_factory=dict)

    def capture(self) -> dict[str, Any]:
        """A checkpoint of plain types and tensors, under the keys that users of the recipe know.

        Raises UserError, on all ranks alike, if a weight is not finite: such a checkpoint would
        replace one that training can continue from.
        """
        self._check_finite()
        return {
            "format": FORMAT,
            **{key: module.state_dict() for key, module in self._modules().items()},
            "ema_steps": {name: ema.steps for name, ema in self.ema.items()},
            "optimizer": _states(self.optimizers),
            "lr_scheduler": _states(self.schedulers),
            "scaler": _states(self.scalers),
            "epoch": self.epoch if self.step else self.epoch - 1,  # the epoch trained last
            "next_epoch": self.epoch,
            "next_step": self.step,
            "lr": self.lr,
            "best_scores": self.best_scores,
            "stale": self.stale,
            "meters": self.meters,
            "num_samples": self.sampler.num_samples,
            "data": self.data,
            "global_batch": self.sampler.global_batch,
            "forward_batch": self.sampler.forward_batch,
            "world_size": self.sampler.world_size,
            "args": self.config,
        }

    def _modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds the weights of, by its key."""
        averages = {name: ema.module for name, ema in self.ema.items()}
        modules = {"model": as_one_module(self.models)}
        return {**modules, "ema": as_one_module(averages)} if averages else modules

    def _check_finite(self) -> None:
        for name, model in self.models.items():
            norms = torch.stack(torch._foreach_norm([p.detach() for p in model.parameters()]))
            if not norms.isfinite().all():
                raise UserError(
                    f"epoch {self.epoch}: weights of {name} became NaN or infinite. {HOW_TO_TAME}"
                )

    def note_scores(self, scores: dict[str, float], metric: str, goal: str) -> bool:
        """Keep `scores` if their `metric` is the best so far (`goal`: max or min); nan never is."""
        value, best = scores[metric], self.best_scores.get(metric)
        better = best is None or (value > best if goal == "max" else value < best)
        if value != value or not better:
            self.stale += 1
            return False
        self.best_scores, self.stale = dict(scores), 0
        return True

    def scale_learning_rates(self, factor: float) -> None:
        """Multiply all learning rates, for the rest of the run, by `factor`."""
        if factor == 1:
            return
        for name, schedule in self.schedulers.items():
            scale_learning_rate(self.optimizers[name], schedule, factor)
            rate = self.optimizers[name].param_groups[0]["lr"]
            get_logger().info(
                f"no better score for {self.stale} evaluations: lr of {name} is now {rate:.3g}"
            )

    def restore(self, state: Mapping[str, Any], source: str) -> None:
        """Continue where `state` was captured.

        Raises UserError, with nothing changed, if its settings were others or a part does not fit.
        """
        self._check_same_run(state, source)
        if state["next_step"] > self.sampler.steps_per_epoch:
            raise UserError(
                f"{source}: continues at step {state['next_step']} of an epoch that has "
                f"{self.sampler.steps_per_epoch}. Resume from another checkpoint, or start a new "
                "run from its weights with --weights."
            )
        modules = {key: module for key, module in self._modules().items() if key in state}
        for key, module in modules.items():
            check_fits(module, state[key], source + (", moving average" if key == "ema" else ""))
        saved = self._check_trainers(state, source)

        for key, module in modules.items():
            module.load_state_dict(dict(state[key]))  # no attributes of an OrderedDict's
        for name, ema in self.ema.items():
            ema.steps = state["ema_steps"].get(name, 0)
        rates = {name: self._rate(name) for name in self.optimizers}
        for trainer, content in saved:
            if isinstance(trainer, Optimizer):
                content = _under_own_options(trainer, content, source)
            trainer.load_state_dict(content)
        for name, schedule in self.schedulers.items():
            # The checkpoint's rate is that of its own schedule; more epochs make it another one.
            apply_schedule(self.optimizers[name], schedule)
        for name, rate in rates.items():
            if (saved_rate := self._rate(name)) != rate:
                get_logger().info(
                    f"{source}: lr of {name} goes on from {saved_rate:.3g}, not {rate:.3g}"
                )
        self.epoch, self.step = state["next_epoch"], state["next_step"]
        self.best_scores, self.meters, self.lr = state["best_scores"], state["meters"], state["lr"]
        self.stale = state.get("stale", 0)  # absent in files from before plateaus were counted
        before, now = state["world_size"], self.sampler.world_size
        if before != now:
            get_logger().info(
                f"continuing with {now} process(es) instead of {before}: the global batch stays "
                f"{self.sampler.global_batch}"
            )

    def _rate(self, name: str) -> float:
        """The learning rate that a network's schedule starts from; without one, the present one."""
        schedule = self.schedulers.get(name)
        return schedule.base_lrs[0] if schedule else self.optimizers[name].param_groups[0]["lr"]

    def _check_trainers(self, state: Mapping[str, Any], source: str) -> list[tuple[Any, dict]]:
        """Optimizers, schedulers and scalers with their saved states, once all of them fit."""
        pairs: list[tuple[Any, dict]] = []
        misfits: list[str] = []
        for key, objects in (
            ("optimizer", self.optimizers),
            ("lr_scheduler", self.schedulers),
            ("scaler", self.scalers),
        ):
            saved = _named_states(objects, state.get(key, {}))
            for name, trainer in objects.items():
                content: Any = saved.get(name)
                if key == "scaler" and not (trainer and content):
                    continue  # fp16's has no use in bf16
                if not isinstance(content, dict):
                    found = ["is missing"]
                elif key == "optimizer":
                    found = _optimizer_misfits(trainer, self.models[name], content)
                elif key == "lr_scheduler":
                    found = _schedule_misfits(trainer, content)
                else:
                    found = _scaler_misfits(trainer, content)
                pairs.append((trainer, content))
                misfits += [f"{key} of {name}: {text}" for text in found]
        if misfits:
            raise UserError(
                f"{source}: its training state does not fit (file ≠ run): "
                f"{shortened(misfits, 4, '; ')}. Resume from another checkpoint, or start a new "
                "run from its weights with --weights."
            )
        return pairs

    def _check_same_run(self, state: Mapping[str, Any], source: str) -> None:
        changes = diff(state["args"], self.config)
        free = *_FREE, *self.folders
        fixed = [change for change in changes if not change[0].startswith(free)]
        text = ", ".join(
            f"{key}: {str(old)[:80]} → {str(new)[:80]}" for key, old, new in fixed or changes
        )
        if fixed:
            raise UserError(
                f"{source}: was trained with other settings ({text}). Continue with its own, or "
                "start a new run from its weights with --weights."
            )
        if changes:
            get_logger().info(f"settings changed since the checkpoint: {text}")
        if state["num_samples"] != self.sampler.num_samples:
            raise UserError(
                f"{source}: was trained on {state['num_samples']} samples, now there are "
                f"{self.sampler.num_samples}. Restore the data, or start a new run with --weights."
            )
        if state.get("data", self.data) != self.data:  # absent in older files
            raise UserError(
                f"{source}: was trained on {self.sampler.num_samples} samples of other names, or "
                "made of other files. Restore the data, or start a new run with --weights."
            )


def resumed_global_batch(state: Mapping[str, Any], requested: int, world_size: int) -> int:
    """The checkpoint's global batch; UserError if the same processes ask for another one."""
    saved, train = state["global_batch"], state["args"]["train"]
    # A run that changed its world size keeps a global batch that its own settings no longer give.
    as_before = requested == train["batch_size"] * train["accumulate"] * world_size
    if requested != saved and not as_before and state["world_size"] == world_size:
        raise UserError(
            f"--batch-size: the run has a global batch of {saved} images per step, these settings "
            f"ask for {requested}. Continue with -b {train['batch_size']} --set "
            f"train.accumulate={train['accumulate']}, or start a new run with --weights."
        )
    return saved


def resumed_forward_batch(state: Mapping[str, Any], train: Any, world_size: int) -> int:
    """Images of one forward pass on all processes, of a run that continues with `train`'s settings.

    Synchronised batch norm averages over them, so they stay, in parts of another size where the
    number of processes has changed. Without it, `batch_size` is each process's own affair.
    """
    saved_batch = state["args"]["train"]["batch_size"]
    if not train.sync_bn or train.batch_size != saved_batch:
        return train.batch_size * world_size
    return state.get("forward_batch", saved_batch * state["world_size"])


def _states(objects: dict[str, Any]) -> dict[str, Any]:
    states = {name: item.state_dict() for name, item in objects.items() if item is not None}
    return states["model"] if list(states) == ["model"] else states


def _named_states(objects: dict[str, Any], states: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": states} if list(objects) == ["model"] else dict(states)


def _optimizer_misfits(optimizer: Optimizer, model: nn.Module, saved: dict) -> list[str]:
    """What would fail only at a later step, or spoil it: other groups, another kind or shapes.

    The saved state is compared with the one that the same optimizer makes in a step.
    """
    groups, states = saved.get("param_groups"), saved.get("state")
    own_groups = optimizer.param_groups
    if not _are_groups(groups) or not isinstance(states, dict):
        return ["lacks param_groups or state"]
    sizes, own_sizes = ([len(group["params"]) for group in each] for each in (groups, own_groups))
    if sizes != own_sizes:
        return [f"groups of {sizes} parameters ≠ {own_sizes}"]
    settings, own_settings = groups[0].keys(), own_groups[0].keys()
    if settings - own_settings and own_settings - settings:  # one alone: another version of torch
        return [f"is of another kind: {sorted(settings)} ≠ {sorted(own_settings)}"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    numbers = [number for group in groups for number in group["params"]]
    if not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        return ["numbers its parameters in another way"]
    if unknown := states.keys() - set(numbers):
        return [f"has {len(unknown)} states of no parameter"]
    for group, own_group in zip(groups, own_groups, strict=True):
        for key, value in group.items():
            if key != "params" and not _alike(value, own_group.get(key, value)):
                return [f"{key}: {brief(value)} ≠ {brief(own_group.get(key))}"]
    parameters = [parameter for group in own_groups for parameter in group["params"]]
    made = _state_after_a_step(optimizer)
    return [
        f"{names[parameter]}: {misfit}"
        for number, parameter, expected in zip(numbers, parameters, made, strict=True)
        if number in states  # none: it has had no gradient yet
        for misfit in _part_misfits(states[number], expected)
    ]


def _state_after_a_step(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Each parameter's state in a copy of an optimizer, once that has taken a step."""
    trial = copy.deepcopy(optimizer)
    parameters = [parameter for group in trial.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trial.step()
    return [trial.state.get(parameter, {}) for parameter in parameters]


def _under_own_options(optimizer: Optimizer, saved: dict, source: str) -> dict:
    """A saved state, with the options that this run's optimizer was made with; says which differ.

    What an optimizer keeps in its groups besides the arguments that it is made with is state.
    """
    kinds = [kind for kind in type(optimizer).__mro__ if issubclass(kind, Optimizer)]
    makers = [inspect.signature(kind).parameters for kind in kinds]
    options = set().union(*makers) - {"lr", "params"}
    groups, own_groups = saved["param_groups"], optimizer.param_groups
    differ = {}
    for group, own in zip(groups, own_groups, strict=True):
        for key in options & group.keys() & own.keys():
            if brief(group[key]) != brief(own[key]) and group[key] != own[key]:
                differ[key] = f"{key} {brief(own[key])}, not {brief(group[key])}"
    if differ:
        get_logger().info(
            f"{source}: the optimizer goes on as these settings and this code make it, with "
            f"{'; '.join(differ[key] for key in sorted(differ))}"
        )
    groups = [
        {**group, **{key: own[key] for key in options & own.keys()}}
        for group, own in zip(groups, own_groups, strict=True)
    ]
    return {"state": saved["state"], "param_groups": groups}


def _alike(value: Any, own: Any) -> bool:
    """Whether a saved value is of the kind and size of a run's own; numbers up to 2^53."""
    if isinstance(own, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(value) == len(own) and all(map(_alike, value, own))
    if type(own) in (int, float) and type(value) in (int, float):
        return abs(value) <= 2**53  # also not nan
    if isinstance(own, Tensor) and isinstance(value, Tensor):
        return value.shape == own.shape
    # An option that is off may be null or false.
    return all(type(each) in (bool, type(None)) for each in (value, own)) or (
        type(value) is type(own) and isinstance(own, str)
    )


def _part_misfits(state: Any, expected: dict[str, Any]) -> list[str]:
    if not isinstance(state, dict) or state.keys() != expected.keys():
        return [f"lacks some of {', '.join(sorted(expected))}"]
    shapes, own = (
        {part: tuple(v.shape) for part, v in each.items() if isinstance(v, Tensor)}
        for each in (state, expected)
    )
    found = [f"{p} {shapes.get(p)} ≠ {own.get(p)}" for p in expected if shapes.get(p) != own.get(p)]
    if found:
        return found
    found = [p for p in expected if p not in own and not _alike(state[p], expected[p])]
    found += [p for p in own if state[p].dtype != expected[p].dtype]
    if "step" in state and not 0 <= float(state["step"]) <= 2**53:
        found.append("step")
    return [f"{p} {brief(state[p])} is of another kind than {brief(expected[p])}" for p in found]


def _are_groups(value: Any) -> TypeGuard[list[dict]]:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(each, dict) and isinstance(each.get("params"), list) for each in value)
    )


def _schedule_misfits(schedule: LambdaLR, saved: dict) -> list[str]:
    groups, own = len(schedule.base_lrs), schedule.state_dict()
    if not isinstance(saved.get("last_epoch"), int):
        return ["lacks last_epoch"]
    lists = (saved.get(key) for key in ("base_lrs", "lr_lambdas"))
    if not all(isinstance(each, list) and len(each) == groups for each in lists):
        return [f"lacks base_lrs and lr_lambdas of {groups} parameter groups"]
    # What LambdaLR takes over as it is.
    odd = [key for key in saved if key not in own or not _alike(saved[key], own[key])]
    if saved["last_epoch"] < 0:
        odd.append("last_epoch")
    found = [f"{key} {brief(saved[key])} ≠ {brief(own.get(key))}" for key in odd]
    if found:
        return found
    # A plateau lowers the rates of the settings; nothing raises them.
    within = (
        0 < rate <= base for rate, base in zip(saved["base_lrs"], own["base_lrs"], strict=True)
    )
    if not all(within):
        return [f"base_lrs {brief(saved['base_lrs'])}, more than {brief(own['base_lrs'])}"]
    return []


def _scaler_misfits(scaler: Any, saved: dict) -> list[str]:
    own = scaler.state_dict()
    if lacking := [f"lacks {key}" for key in own if key not in saved]:
        return lacking
    moving = ("scale", "_growth_tracker")
    odd = [
        key
        for key in own
        if not _alike(saved[key], own[key])
        or (saved[key] != own[key] if key not in moving else saved[key] < 0)
    ]
    return [f"{key} {brief(saved[key])} ≠ {brief(own[key])}" for key in odd]
