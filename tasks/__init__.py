"""The systems that are trained here: a folder each, with all that only it knows.

A folder's module defines `Config`, the typed sections of its YAML, and `Task`, a
`train_utils.task.BaseTask`.
"""

import os
from argparse import Namespace
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from train_utils.checkpoint import (
    as_one_module,
    check_fits,
    inner_parts,
    load_training_state,
    load_weights,
    named_alike,
    say_prefix,
    split_states,
    with_counters,
)
from train_utils.collectives import broadcast_tensors, call_on_main
from train_utils.config import build, load_yaml, merge, parse_assignments, to_dict
from train_utils.data import generators_kept
from train_utils.errors import UserError, brief, shortened, typed
from train_utils.log import get_logger
from train_utils.run_folder import LAST, find_resume, restarted_run
from train_utils.settings import deciding_metric
from train_utils.task import BaseTask

DEFAULT_TASK = "saliency"  # of a recipe that names none
DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "shapes.yaml"
_MOST_CLASSES = 2**16  # that a file of weights is tried for

# -- the tasks that there are ---------------------------------------------------------------------


def task_names() -> list[str]:
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/__init__.py"))


def load_task(name: str, source: str = "config") -> ModuleType:
    """Import tasks/<name>; UserError lists the tasks there are."""
    if name not in task_names():
        raise UserError(f"{source}: task: {brief(name)} is not one of {', '.join(task_names())}.")
    return import_module(f"tasks.{name}")


def all_tasks() -> dict[str, type[BaseTask]]:
    """The class `Task` of every system, by name."""
    return {name: load_task(name).Task for name in task_names()}


def train_flags() -> dict[str, str]:
    """The flags of train.py that tasks declare, for `parse_args`."""
    return {key: about for task in all_tasks().values() for key, about in task.TRAIN_FLAGS.items()}


# -- recipe and command line → task ---------------------------------------------------------------


def configure(args: Namespace) -> tuple[BaseTask, Path | None, dict[str, Any] | None]:
    """A training's task, with its config, and the checkpoint to continue from with its content.

    Precedence: defaults, the checkpoint's settings, --config, flags, --set.
    """
    name = args.run_name = Path(args.config or DEFAULT_CONFIG).stem
    if not args.test_only and (run := restarted_run(args.resume, args.output_dir, name)):
        args.output_dir = str(run)
        args.resume = str(run) if (run / LAST).exists() else args.resume
    resume = find_resume(args.resume, args.output_dir, name)
    saved = load_training_state(resume) if resume else None

    if saved is None:
        task = new_task(args)
    else:
        task = _continued_task(saved, str(resume), args.config, _overrides(args))
    deciding_metric(task.cfg, task.METRICS)  # refuses a metric that is not tracked
    if args.test_only and not (saved or task.cfg.train.weights):
        raise UserError("--test-only: nothing to test. Add --weights FILE or --resume auto.")
    return task, resume, saved


def new_task(args: Namespace) -> BaseTask:
    """The task of a training that begins, with its config."""
    source = str(args.config or DEFAULT_CONFIG)
    return read_config(load_yaml(source), source, _overrides(args))


def _overrides(args: Namespace) -> dict[str, Any]:
    """The settings of a command line, those by --set before those of other flags."""
    overrides = parse_assignments(args.set)
    for name, value in vars(args).items():
        section, dot, key = name.partition(".")
        if dot:
            overrides = merge({section: {key: value}}, overrides)
    return overrides


def _continued_task(
    saved: dict[str, Any], resume: str, config: str | None, overrides: dict[str, Any]
) -> BaseTask:
    """The task of a checkpoint under a recipe and a command line that may change settings.

    Keys that are newer than the checkpoint get their defaults in `saved`.
    """
    of = str(saved["args"].get("task"))
    base = saved["args"] = to_dict(build(load_task(of).Config, saved["args"], resume))
    if config is None:
        return read_config(base, resume, overrides)
    recipe = load_yaml(config)
    if (wanted := recipe.get("task", DEFAULT_TASK)) != of:
        raise UserError(
            f"{resume}: is a run of {of}, and {config} is for {wanted}. Resume it without "
            "--config, or name its own."
        )
    return read_config(recipe, config, overrides, base)


def read_config(
    values: dict[str, Any],
    source: str,
    overrides: dict[str, Any],
    base: dict[str, Any] | None = None,
) -> BaseTask:
    """The task, with its typed config, that `values` describe under the command line's `overrides`.

    `values` are laid over those of a checkpoint, the `base`, if there is one. Faults that they have
    by themselves are reported under the name of their `source`.
    """
    module = load_task(str(merge(values, overrides).get("task", DEFAULT_TASK)), source)
    sources, where = module.Config().data.sources, "command line"
    overrides = {**overrides, "data": without_replaced(overrides.get("data", {}), sources)}
    try:
        return module.Task(build(module.Config, merge(base or {}, values, overrides), where))
    except UserError as error:
        try:
            build(module.Config, values, source)
        except UserError as own:
            if str(own).removeprefix(source) == str(error).removeprefix(where):
                raise own from None
        raise


def without_replaced(data: Any, sources: Iterable[str]) -> Any:
    """Data settings of a command line, and null for the recipe's that they replace.

    `root`, `images` with `masks`, and `list` each say by themselves where the data is: no other of
    the `sources`, the keys that do so, counts any longer. Raises UserError if two are given.
    """
    ways = {"root"}, {"images", "masks"}, {"list"}
    given = [way for way in ways if isinstance(data, dict) and data.keys() & way]
    if not given:
        return data
    if len(given) > 1:
        raise UserError("--data-path, --images and data.list: name one or the other.")
    return {**{key: None for key in sources if key not in given[0]}, **data}


# -- weights → networks ---------------------------------------------------------------------------


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
            f"--config {typed(recipe)}: {weights} brings its own settings. Leave --config out, or "
            "change single settings with --set."
        )
    if recipe:
        task = read_config(load_yaml(recipe), recipe, overrides)
        state_dict = _in_own_names(task, state_dict, str(weights))
    else:
        if values is None:
            values, state_dict = _recognise(state_dict, weights)
        task = read_config(values, str(weights), overrides)
    models = networks_with(task, state_dict, str(weights))
    for model in models.values():
        model.eval()
    return task, models


def networks_with(
    task: BaseTask, state_dict: dict[str, Tensor], source: str, new_head: bool = False
) -> dict[str, nn.Module]:
    """A task's networks with the weights of a file.

    new_head: of a file that differs in the number of classes only, and as the network itself would
    with that number, the tensors that depend on it are left out and start anew; a line names them.
    Raises UserError for other weights that do not fit, before networks are made that are larger.
    """
    plan = _plan(task)
    networks = task.build_models() if plan is None else {}
    plan = plan or as_one_module(networks)
    own = plan.state_dict()
    state_dict = with_counters(own, named_alike(own, state_dict, source), source)
    head = _head_of_other_classes(task, own, state_dict)
    if head:
        shapes = [f"{k} {tuple(state_dict[k].shape)} → {tuple(own[k].shape)}" for k in head]
        about = f"{source}: is for another number of classes: {len(head)} tensors"
        if not new_head:
            raise UserError(
                f"{about} do not fit, {shortened(shapes)}. Name the classes that it was trained "
                "on, in their order, by data.class_names."
            )
        get_logger().info(f"{about} start anew, {shortened(shapes)}")
    check_fits(plan, {**state_dict, **{key: own[key] for key in head}}, source)
    networks = networks or task.build_models()
    own = as_one_module(networks).state_dict()
    split_states(networks, {**state_dict, **{key: own[key] for key in head}}, source)
    return networks


def _head_of_other_classes(
    task: BaseTask, own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]
) -> list[str]:
    """The names of weights that fit another number of classes; none where more than that differs.

    own: the network's. The number is read off the smallest tensor that differs, such as a bias.
    """
    theirs = {key: value.shape for key, value in state_dict.items()}
    odd = [key for key in own if theirs.get(key, own[key].shape) != own[key].shape]
    smallest = min(odd, key=lambda key: state_dict[key].numel(), default="")
    for classes in theirs.get(smallest, ()):
        other = task.with_classes(classes) if 0 < classes <= _MOST_CLASSES else None
        plan = _plan(other) if other else None
        if plan and theirs == {key: value.shape for key, value in plan.state_dict().items()}:
            return odd
    return []


def _plan(task: BaseTask) -> nn.Module | None:
    """A task's networks as shapes that take no memory.

    None for one of your own that computes with its weights while it is built. Raises UserError for
    networks that this machine has not enough memory for.
    """
    try:
        with generators_kept(), torch.device("meta"):
            plan = as_one_module(task.build_models())
    except (NotImplementedError, RuntimeError):
        return None
    needed = sum(tensor.nbytes for tensor in plan.state_dict().values())
    if hasattr(os, "sysconf") and needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise UserError(
            f"model: its weights take {needed / 2**30:,.0f} GiB, and this machine has less memory. "
            "Use a smaller network, e.g. by --set model.channels=64."
        )
    return plan


def read_weights(task: BaseTask, weights: str) -> dict[str, Tensor]:
    """Weights to start a training from, in the task's own names.

    Raises UserError for a checkpoint of another task.
    """
    state_dict, values = load_weights(weights)
    if values is not None and values.get("task", task.name) != task.name:
        raise UserError(
            f"{weights}: holds weights of {str(values['task'])[:80]}, and this recipe is for "
            f"{task.name}. Choose other weights, or a recipe of their task with --config."
        )
    return _in_own_names(task, state_dict, weights)


def _in_own_names(task: BaseTask, state_dict: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    adopted = _adopted(type(task), state_dict, source)
    return adopted[1] if adopted else state_dict


def _adopted(
    task: type[BaseTask], state_dict: dict[str, Tensor], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What a task recognises of weights, without a prefix before all names: see `adopt_weights`."""
    for prefix, inner in inner_parts(state_dict):
        if adopted := task.adopt_weights(inner):
            if prefix:
                say_prefix(source, prefix, state_dict)
            return adopted
    return None


def _recognise(
    state_dict: dict[str, Tensor], weights: str | Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, and the weights in the task's names, of a file that says nothing of itself."""
    for name, task in all_tasks().items():
        if adopted := _adopted(task, state_dict, str(weights)):
            return {"task": name, **adopted[0]}, adopted[1]
    raise UserError(
        f"{weights}: says nothing of its network and is none that is recognised; it has "
        f"{len(state_dict)} tensors, {shortened(list(state_dict), 3)}. Name the recipe "
        "that it was trained with by --config, or use another file."
    )


def start_models(
    task: BaseTask, resume: Path | None, saved: dict[str, Any] | None = None
) -> dict[str, nn.Module]:
    """A task's networks: at the start of a training, with the weights that it is to begin with.

    saved: the content of the checkpoint that it continues from, whose weights must fit.
    """
    weights = task.cfg.train.weights
    if weights and not resume:
        networks = networks_with(task, read_weights(task, weights), weights, new_head=True)
    else:
        plan = _plan(task)
        if plan and saved:
            check_fits(plan, saved["model"], str(resume))
        networks = task.build_models()
    if resume:
        if weights:
            get_logger().info(
                f"--weights {typed(weights)}: not used, the run continues from {resume}"
            )
        return networks
    if not weights:
        call_on_main(lambda: task.initialise(networks))  # one download for all processes
    for network in networks.values():
        broadcast_tensors(list(network.state_dict().values()))
    return networks
