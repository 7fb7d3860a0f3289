"""One module per task: what the shared scripts do not know.

A task module defines `Config` (its sections of the YAML), `METRICS` (name → "max" or "min", the
first one decides the best checkpoint by default), and the functions

    build_datasets(cfg), build_val_dataset(cfg, all_pairs)   the data
    build_models(cfg)                                        networks by name
    build_optimizers(cfg, models, steps_per_epoch)           optimizers and schedules by network
    check_batches(cfg, smallest)                             refuses batches that cannot train
    loss_counts(batch), train_step(cfg)                      what the loop calls in every step
    predict(cfg), make_metrics(cfg), results(metrics), deciding_metric(cfg)
    sheet_row(sample), curves(metrics)                       pictures for TensorBoard
    network_input(cfg, image), render(cfg, …)                what predict.py feeds and writes
    adopt_weights(state_dict)                                weights of other projects
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from train_utils.checkpoint import load_weights, split_states
from train_utils.config import build, merge, to_dict
from train_utils.errors import UserError

_NOT_TASKS = {"__init__", "settings"}


def task_names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _NOT_TASKS)


def load_task(name: str) -> ModuleType:
    """Import tasks/<name>.py; UserError lists the tasks there are."""
    if name not in task_names():
        raise UserError(f"task: {name!r} is not one of {', '.join(task_names())}.")
    return import_module(f"tasks.{name}")


def read_config(
    values: dict[str, Any], source: str, overrides: dict[str, Any]
) -> tuple[ModuleType, Any]:
    """Task and typed config that `values` describe, under the command line's `overrides`.

    The file is checked on its own first, so that its faults are reported under its name.
    """
    task = load_task(str(merge(values, overrides).get("task", "saliency")))
    build(task.Config, values, source)
    return task, build(task.Config, merge(values, overrides), "command line")


def complete(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A checkpoint's config with the defaults of keys that are newer than the checkpoint."""
    return to_dict(build(load_task(str(values.get("task"))).Config, values, source))


def meant_data(flags: dict[str, Any]) -> dict[str, Any]:
    """Data settings of a command line that names folders, without those that it replaces.

    `root` and `images` each say by themselves which data is meant: folders of a recipe or of a
    checkpoint no longer count. Raises UserError if both are given.
    """
    replaced = []
    if "root" in flags and ("images" in flags or "masks" in flags):
        raise UserError("--data-path and --images: name one or the other.")
    if "root" in flags:
        replaced = ["name", "images", "masks", "val_images", "val_masks"]
    elif "images" in flags or "masks" in flags:
        replaced = ["name", "root", "val_images", "val_masks"]
    return {**dict.fromkeys(replaced), **flags}


def load_models(
    weights: str | Path, overrides: dict[str, Any]
) -> tuple[ModuleType, Any, dict[str, nn.Module]]:
    """Task, config and networks (in evaluation mode) of a weights file, from the file alone.

    A checkpoint of ours brings its config; a foreign file is recognised by its keys and gets the
    task's defaults. `overrides` come on top, e.g. to state a foreign file's preprocessing.
    """
    state_dict, values = load_weights(weights)
    if values is None:
        task, found, state_dict = _recognise(state_dict, weights)
        values = {"task": task.__name__.removeprefix("tasks."), **found}
    task, cfg = read_config(values, str(weights), overrides)
    models = task.build_models(cfg)
    split_states(models, state_dict, str(weights))
    for model in models.values():
        model.eval()
    return task, cfg, models


def read_weights(task: ModuleType, weights: str) -> dict[str, Tensor]:
    """Weights to start a training from, in the task's own names."""
    state_dict, _ = load_weights(weights)
    adopted = task.adopt_weights(state_dict)
    return adopted[1] if adopted else state_dict


def _recognise(state_dict: dict, weights: str | Path) -> tuple[ModuleType, dict, dict]:
    for name in task_names():
        task = load_task(name)
        if found := task.adopt_weights(state_dict):
            return task, *found
    raise UserError(
        f"{weights}: these weights fit none of the networks here; the file has {len(state_dict)} "
        f"tensors, such as {', '.join(list(state_dict)[:3])}. Use another file."
    )
