"""The systems that are trained here: a folder each, with all that only it knows.

A folder's module defines `Config`, the typed sections of its YAML, and `Task`, a
`train_utils.task.BaseTask`.
"""

import difflib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

import src
from train_utils.checkpoint import load_weights, split_states
from train_utils.collectives import broadcast_tensors, call_on_main
from train_utils.config import build, load_yaml, merge, to_dict
from train_utils.errors import UserError
from train_utils.log import get_logger
from train_utils.task import BaseTask


def task_names() -> list[str]:
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/__init__.py"))


def load_task(name: str, source: str = "config") -> ModuleType:
    """Import tasks/<name>; UserError lists the tasks there are."""
    if name not in task_names():
        raise UserError(f"{source}: task: {name!r} is not one of {', '.join(task_names())}.")
    return import_module(f"tasks.{name}")


def all_tasks() -> dict[str, type[BaseTask]]:
    """The class `Task` of every system, by name."""
    return {name: load_task(name).Task for name in task_names()}


def read_config(
    values: dict[str, Any],
    source: str,
    overrides: dict[str, Any],
    base: dict[str, Any] | None = None,
) -> BaseTask:
    """The task, with its typed config, that `values` describe under the command line's `overrides`.

    `values` are checked on their own first, so that their faults are reported under the name of
    their `source`; then they are laid over those of a checkpoint, the `base`, if there is one.
    """
    module = load_task(str(merge(values, overrides).get("task", "saliency")), source)
    build(module.Config, values, source)
    data = meant_data(overrides.get("data", {}), module.DataConfig.sources)
    overrides = {**overrides, "data": data}
    return module.Task(build(module.Config, merge(base or {}, values, overrides), "command line"))


def complete(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A checkpoint's config with the defaults of keys that are newer than the checkpoint."""
    return to_dict(build(load_task(str(values.get("task"))).Config, values, source))


def meant_data(flags: Any, sources: Sequence[str]) -> Any:
    """Data settings of a command line that names folders, without those that they replace.

    `root` and `images` each say by themselves which data is meant: all other `sources`, of a recipe
    or of a checkpoint, no longer count. Raises UserError if both are given.
    """
    folders = {"images", "masks"}
    if not isinstance(flags, dict) or not flags.keys() & {"root", *folders}:
        return flags
    if "root" in flags and flags.keys() & folders:
        raise UserError("--data-path and --images: name one or the other.")
    kept = {"root"} if "root" in flags else folders
    return {**{key: None for key in sources if key not in kept}, **flags}


def load_models(
    weights: str | Path, overrides: dict[str, Any], recipe: str | None = None
) -> tuple[BaseTask, dict[str, nn.Module]]:
    """Task, with its config, and networks (for evaluation) of a weights file, from the file alone.

    A checkpoint of ours brings its config; a bare state_dict needs the `recipe`, unless it is
    recognised by its keys and gets the task's defaults. `overrides` come on top, e.g. to state a
    foreign file's preprocessing. Raises UserError for a recipe beside a checkpoint that has one.
    """
    state_dict, values = load_weights(weights)
    if values is not None and recipe:
        raise UserError(
            f"--config {recipe}: {weights} brings its own settings. Leave --config out, or change "
            "single settings with --set."
        )
    if recipe:
        values = load_yaml(recipe)
        module = load_task(str(values.get("task", "saliency")))
        adopted = module.Task.adopt_weights(state_dict)
        state_dict = adopted[1] if adopted else state_dict
    elif values is None:
        name, found, state_dict = _recognise(state_dict, weights)
        values = {"task": name, **found}
    task = read_config(values, str(weights), overrides)
    models = task.build_models()
    split_states(models, state_dict, str(weights))
    for model in models.values():
        model.eval()
    return task, models


def read_weights(task: BaseTask, weights: str) -> dict[str, Tensor]:
    """Weights to start a training from, in the task's own names.

    Raises UserError for a checkpoint of another task.
    """
    state_dict, values = load_weights(weights)
    if values is not None and values.get("task", task.name) != task.name:
        raise UserError(
            f"{weights}: holds weights of {values['task']}, and this recipe is for {task.name}. "
            "Choose other weights, or a recipe of their task with --config."
        )
    adopted = task.adopt_weights(state_dict)
    return adopted[1] if adopted else state_dict


def _recognise(state_dict: dict, weights: str | Path) -> tuple[str, dict, dict]:
    for name in task_names():
        if found := load_task(name).Task.adopt_weights(state_dict):
            return name, *found
    raise UserError(
        f"{weights}: says nothing of its network and is none that is recognised; it has "
        f"{len(state_dict)} tensors, such as {', '.join(list(state_dict)[:3])}. Name the recipe "
        "that it was trained with by --config, or use another file."
    )


def start_models(task: BaseTask, resume: Path | None) -> dict[str, nn.Module]:
    """A task's networks: at the start of a training, with the weights that it is to begin with."""
    networks, weights = task.build_models(), task.cfg.train.weights
    if resume:
        if weights:
            get_logger().info(f"--weights {weights}: not used, the run continues from {resume}")
    elif weights:
        split_states(networks, read_weights(task, weights), weights)
    else:
        call_on_main(lambda: task.initialise(networks))  # one download for all processes
        for network in networks.values():
            broadcast_tensors(list(network.state_dict().values()))
    return networks


def require_network(name: str) -> None:
    """Raise ValueError for a name that src/__init__.py does not export."""
    if name in src.__all__:
        return
    nearest = difflib.get_close_matches(name, src.__all__, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(
        f"name: {name!r} is not exported by src/__init__.py, which has {', '.join(src.__all__)}."
        f"{hint}"
    )
