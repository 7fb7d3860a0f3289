"""The recipes under configs/ fit their tasks and say what their papers say."""

import inspect
from pathlib import Path

import pytest
import torch

import tasks
from train_utils.config import load_yaml
from train_utils.settings import deciding_metric
from train_utils.task import BaseTask

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_builds(path):
    task = tasks.read_config(load_yaml(path), str(path), {})
    cfg = task.cfg
    with torch.device("meta"):  # shapes only: nothing is allocated
        models = task.build_models()
        optimizers = task.build_optimizers(models)
        schedules = task.build_schedulers(optimizers, 2)
    assert set(models) == set(optimizers) == set(schedules)
    metric, goal = deciding_metric(cfg, task.METRICS)
    assert task.METRICS[metric] == goal
    known = {"cutout", "overlay", "threshold", *task.EXTRA_INPUTS}
    assert known >= task.PREDICT_FLAGS.keys() >= task.EXTRA_INPUTS.keys()


@pytest.mark.parametrize("name", tasks.task_names())
def test_every_task_states_what_has_no_default(name):
    needed = {
        key
        for key, method in vars(BaseTask).items()
        if inspect.isfunction(method) and "self._undefined(" in inspect.getsource(method)
    }
    assert {"build_models", "losses", "predict", "render"} < needed
    task = tasks.load_task(name).Task
    assert {key for key in needed if getattr(task, key) is getattr(BaseTask, key)} == set()
    assert task.METRICS and issubclass(task, BaseTask)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("shapes", "saliency"),
        ("fcn", "segmentation"),
        ("unet", "segmentation"),
        ("matting", "matting"),
        ("pix2pix", "translation"),
    ],
)
def test_the_embedded_recipe_of_every_system_needs_no_data(name, task):
    path = CONFIGS / f"{name}.yaml"
    cfg = tasks.read_config(load_yaml(path), str(path), {}).cfg
    assert (cfg.task, cfg.data.name) == (task, "shapes")


@pytest.mark.parametrize(("name", "lr"), [("u2net_full", 4e-3), ("u2net_lite", 1e-3)])
def test_published_recipe(name, lr):
    path = CONFIGS / f"{name}.yaml"
    cfg = tasks.read_config(load_yaml(path), str(path), {}).cfg
    assert (cfg.model.name, cfg.data.name) == (name, "duts")
    assert (cfg.data.image_size, cfg.data.crop, cfg.data.hflip) == (320, 288, 0.5)
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.warmup_epochs) == (lr, 1e-4, 2)
    assert (cfg.optim.warmup_factor, cfg.optim.end_factor) == (1e-3, 1e-6)
    assert (cfg.train.epochs, cfg.train.batch_size, cfg.train.eval_interval) == (360, 16, 10)


def test_crop_follows_the_image_size():
    cfg = tasks.read_config({}, "", {"data": {"image_size": 64}}).cfg
    assert cfg.data.crop == 58
    assert cfg.data.name == "shapes"
