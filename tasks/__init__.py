"""One module per task: what the shared scripts do not know.

A task module defines `Config` (its sections of the YAML, `DataConfig` among them), `METRICS`
(name → "max" or "min", the first one decides the best checkpoint by default), `PREDICT_FLAGS`
(which of predict.py's `cutout`, `overlay`, `threshold`, `trimap` it takes → whether it needs them),
and the functions

    build_datasets(cfg), build_val_dataset(cfg, all_pairs)   the data
    prepare_data(cfg, train_set, val_set, workers)           checks; settings that the data decide
    build_models(cfg)                                        networks by name
    initialise(cfg, models)                                  where a new training starts from
    build_optimizers(cfg, models, steps_per_epoch)           optimizers and schedules by network
    check_batches(cfg, smallest)                             refuses batches that cannot train
    loss_counts(cfg), train_step(cfg)                        what the loop calls in every step
    predict(cfg), make_metrics(cfg)                          what evaluation calls
    sheet_row(cfg, sample)                                   a row of pictures
    network_input(cfg, image), render(cfg, …)                what predict.py feeds and writes

and, where there is something to do, `curves(metrics)` for TensorBoard, `adopt_weights(state_dict)`
for weights of other projects, and `make_toolbox_metrics()` for the field's common protocol.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from train_utils.checkpoint import load_weights, split_states
from train_utils.config import build, load_yaml, merge, to_dict
from train_utils.errors import UserError

_NOT_TASKS = {"__init__", "settings"}


def task_names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _NOT_TASKS)


def load_task(name: str, source: str = "config") -> ModuleType:
    """Import tasks/<name>.py; UserError lists the tasks there are."""
    if name not in task_names():
        raise UserError(f"{source}: task: {name!r} is not one of {', '.join(task_names())}.")
    return import_module(f"tasks.{name}")


def read_config(
    values: dict[str, Any],
    source: str,
    overrides: dict[str, Any],
    base: dict[str, Any] | None = None,
) -> tuple[ModuleType, Any]:
    """Task and typed config that `values` describe, under the command line's `overrides`.

    `values` are checked on their own first, so that their faults are reported under the name of
    their `source`; then they are laid over those of a checkpoint, the `base`, if there is one.
    """
    task = load_task(str(merge(values, overrides).get("task", "saliency")), source)
    build(task.Config, values, source)
    data = meant_data(overrides.get("data", {}), task.DataConfig.sources)
    overrides = {**overrides, "data": data}
    return task, build(task.Config, merge(base or {}, values, overrides), "command line")


def with_values(cfg: Any, values: dict[str, Any]) -> Any:
    """A config with some of its values replaced, e.g. by what `prepare_data` found."""
    return build(type(cfg), merge(to_dict(cfg), values), "data") if values else cfg


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
) -> tuple[ModuleType, Any, dict[str, nn.Module]]:
    """Task, config and networks (in evaluation mode) of a weights file, from the file alone.

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
        adopted = _adopted(load_task(str(values.get("task", "saliency"))), state_dict)
        state_dict = adopted[1] if adopted else state_dict
    elif values is None:
        task, found, state_dict = _recognise(state_dict, weights)
        values = {"task": task.__name__.removeprefix("tasks."), **found}
    task, cfg = read_config(values, str(weights), overrides)
    models = task.build_models(cfg)
    split_states(models, state_dict, str(weights))
    for model in models.values():
        model.eval()
    return task, cfg, models


def read_weights(task: ModuleType, weights: str) -> dict[str, Tensor]:
    """Weights to start a training from, in the task's own names.

    Raises UserError for a checkpoint of another task.
    """
    state_dict, values = load_weights(weights)
    name = task.__name__.removeprefix("tasks.")
    if values is not None and values.get("task", name) != name:
        raise UserError(
            f"{weights}: holds weights of {values['task']}, and this recipe is for {name}. Choose "
            "other weights, or a recipe of their task with --config."
        )
    adopted = _adopted(task, state_dict)
    return adopted[1] if adopted else state_dict


def _adopted(task: ModuleType, state_dict: dict[str, Tensor]) -> tuple[dict, dict] | None:
    """(config values, weights in the task's names) of foreign weights that the task knows."""
    return task.adopt_weights(state_dict) if hasattr(task, "adopt_weights") else None


def _recognise(state_dict: dict, weights: str | Path) -> tuple[ModuleType, dict, dict]:
    for name in task_names():
        task = load_task(name)
        if found := _adopted(task, state_dict):
            return task, *found
    raise UserError(
        f"{weights}: says nothing of its network and is none that is recognised; it has "
        f"{len(state_dict)} tensors, such as {', '.join(list(state_dict)[:3])}. Name the recipe "
        "that it was trained with by --config, or use another file."
    )
