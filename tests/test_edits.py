"""What a stranger changes in the scripts, done to a copy of the repository and trained with.

Each edit is trained on one process with accumulation, then continued on two processes whose shares
of a step are uneven or empty, and scored. What an edit may touch is asserted: files, and lines.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import REPO

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("edits")]

SALIENCY, TRAIN = "tasks/saliency/__init__.py", "train.py"
TERMS = "        return {name: _LOSSES[name](outputs, target) for name in self.cfg.loss.terms}\n"
DATASETS = "    train_set, val_set = task.build_datasets()  # or any two torch Datasets\n"
CROPPED = (
    "        image, mask = _crop_and_flip((image, mask), self.image_size, self.crop_size, "
    "self.hflip)\n"
)
METRICS = (
    "        return MeanAbsoluteError(self.cfg.eval.post_norm), F1Score(self.cfg.eval.post_norm)\n"
)
OPTIMIZERS = (
    "    optimizers = task.build_optimizers(networks)  # or any of torch.optim, or a library's\n"
)


class Edit(NamedTuple):
    """Text to replace by file, files to add, and the most that it may come to."""

    replace: dict[str, list[tuple[str, str]]]
    add: dict[str, str]
    files: int
    lines: int
    config: str = "configs/shapes.yaml"
    options: tuple[str, ...] = ()


SSIM = '''

def ssim_loss(outputs: list[Tensor], target: Tensor) -> Tensor:
    """1 − SSIM in windows of 11 × 11, mean over pixels and images, summed over the outputs."""
    truth = target.float() / 255

    def mean(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 11, stride=1)

    total = 0
    for logits in outputs:
        p = logits.sigmoid()
        a, b = mean(p), mean(truth)
        va, vb, ab = mean(p * p) - a * a, mean(truth * truth) - b * b, mean(p * truth) - a * b
        ssim = (2 * a * b + 1e-4) * (2 * ab + 9e-4) / ((a * a + b * b + 1e-4) * (va + vb + 9e-4))
        total = total + (1 - ssim).mean()
    return total
'''

NETWORK = """import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    def __init__(self, out_ch: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.body(x))
        return logits if self.training else torch.sigmoid(logits)


def tiny(out_ch: int = 1) -> Tiny:
    return Tiny(out_ch)
"""

DEPTH = '''"""Depth of the scenes' surfaces, as a made-up stand-in: brighter is nearer."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from my_dataset import ShapesDataset
from src import u2net_lite
from train_utils.metrics import ImageMean, prediction_at
from train_utils.settings import FIRST_VAL_SCENE, BaseConfig, PhotoData
from train_utils.task import BaseTask
from transforms import SaliencyEval, SaliencyTrain, predict_input


@dataclass
class DataConfig(PhotoData):
    """Where pairs of image and depth come from."""


@dataclass
class Config(BaseConfig):
    """A depth recipe."""

    task: str = "depth"
    data: DataConfig = field(default_factory=DataConfig)


class Task(BaseTask):
    """Depth in [0, 1] by mean absolute difference."""

    METRICS: ClassVar = {"AbsDiff": "min"}
    cfg: Config

    def build_datasets(self):
        d = self.cfg.data
        crop = SaliencyTrain(d.image_size, d.image_size - 4, d.hflip)
        train = ShapesDataset(d.image_size, d.seed, d.train_size, 0, crop, ("image", "alpha"))
        return train, self.build_val_dataset()

    def build_val_dataset(self, all_pairs=False):
        d, fit, pair = self.cfg.data, SaliencyEval(self.cfg.data.image_size), ("image", "alpha")
        return ShapesDataset(d.image_size, d.seed, d.val_size, FIRST_VAL_SCENE, fit, pair)

    def build_models(self):
        return {"model": u2net_lite()}

    def losses(self, models, batch):
        images, depth = batch
        fused, *_ = models["model"](self.normalize(images))
        unused = sum(x.sum() for x in _) * 0
        return {"l1": (fused.sigmoid() - depth / 255).abs().mean() + unused}

    def predict(self, models, inputs):
        return models["model"](self.normalize(inputs)).float()

    def make_metrics(self):
        return (ImageMean("AbsDiff", lambda p, t: (p - t).abs().mean()),)

    def network_input(self, image, sides=None):
        return predict_input(image, self.cfg.data.image_size).as_subclass(Tensor)

    def render(self, image, prediction, kinds, threshold=None):
        depth = prediction_at(prediction[0], image.shape[-2:]).cpu()
        return {"map": Image.fromarray((depth * 255).round().to(torch.uint8).numpy())}
'''

OWN_DATASET = """import numpy as np
from PIL import Image


class Tiles:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        labels = np.zeros((48, 48), dtype=np.int64)
        labels[:, 24:] = 1 + index % 2
        picture = labels[..., None] * 80 + rng.integers(0, 60, (48, 48, 3))
        return Image.fromarray(picture.astype(np.uint8)), labels
"""

EDITS = {
    "a. loss": Edit(
        {
            SALIENCY: [
                (
                    TERMS,
                    "        terms = [f(outputs, target) for f in "
                    "(criterion, soft_iou_loss, ssim_loss)]\n"
                    '        return dict(zip(("bce", "iou", "ssim"), terms, strict=True))\n',
                ),
                ("\n\nclass Task(BaseTask):", f"{SSIM}\n\nclass Task(BaseTask):"),
            ]
        },
        {},
        files=1,
        lines=22,
    ),
    "b. network": Edit(
        {
            "src/__init__.py": [
                ("from .u2net", "from .tiny import tiny\nfrom .u2net"),
                ('    "u2net_full",\n', '    "tiny",\n    "u2net_full",\n'),
            ]
        },
        {"src/tiny.py": NETWORK},
        files=2,
        lines=22,
        options=("--set", "model.name=tiny"),
    ),
    "c. augmentation": Edit(
        {
            "transforms.py": [
                (
                    CROPPED,
                    CROPPED + "        image = F.adjust_brightness(image, 0.8 + 0.4 * "
                    "torch.rand(()).item())\n",
                )
            ]
        },
        {},
        files=1,
        lines=1,
    ),
    "d. metric": Edit(
        {
            SALIENCY: [
                (
                    METRICS,
                    METRICS.rstrip().replace("return ", "found = ")
                    + '\n        return *found, ImageMean("MSE", '
                    "lambda p, t: (p - t).square().mean())\n",
                ),
                ("    F1Score,\n", "    F1Score,\n    ImageMean,\n"),
            ]
        },
        {},
        files=1,
        lines=3,
    ),
    "e. task": Edit(
        {},
        {"tasks/depth/__init__.py": DEPTH, "configs/depth.yaml": "task: depth\n"},
        files=2,
        lines=80,
        config="configs/depth.yaml",
    ),
    "f. dataset": Edit(
        {
            TRAIN: [
                (DATASETS, "    train_set, val_set = Tiles(11), Tiles(3)\n"),
                ("import tasks\n", "import tasks\nfrom tiles_dataset import Tiles\n"),
            ]
        },
        {"tiles_dataset.py": OWN_DATASET},
        files=1,
        lines=3,
        config="configs/unet.yaml",
        options=("--set", "data.class_names=[ground,a,b]", "--set", "model.channels=8"),
    ),
    "g. optimizer": Edit(
        {
            TRAIN: [
                (
                    OPTIMIZERS,
                    "    optimizers = {n: torch.optim.Adafactor(m.parameters()) for n, m in "
                    "networks.items()}\n",
                )
            ]
        },
        {},
        files=1,
        lines=1,
    ),
    "h. scalar": Edit(
        {
            SALIENCY: [
                (
                    TERMS,
                    TERMS.replace("return {", "terms = {")
                    + '        return {**terms, "mean_logit": outputs[0].mean().detach()}\n',
                )
            ]
        },
        {},
        files=1,
        lines=2,
    ),
}
# Eleven samples in steps of four: the last step has three, so that of two processes, which take two
# each in parts of one, the second has an empty part.
OPTIONS = [
    *("--set", "data.image_size=48", "--set", "data.train_size=11", "--set", "data.val_size=3"),
    *("-j", "0", "--device", "cpu", "--print-freq", "1", "--output-dir", "run", "--amp", "off"),
]


def touched(edit: Edit) -> tuple[int, int]:
    """Files and lines that an edit touches; a dataset of one's own is the user's file already."""
    own = {name: text for name, text in edit.add.items() if not name.endswith("_dataset.py")}
    changed = sum(
        len(set(new.splitlines()) - set(old.splitlines()))
        for pairs in edit.replace.values()
        for old, new in pairs
    )
    return len(edit.replace) + len(own), changed + sum(len(t.splitlines()) for t in own.values())


@pytest.fixture
def copy(tmp_path):
    """A copy of what the scripts need."""
    folder = tmp_path / "repo"
    folder.mkdir()
    for name in ("configs", "src", "tasks", "train_utils"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in REPO.glob("*.py"):
        shutil.copy(file, folder)
    return folder


def apply(edit: Edit, folder: Path) -> None:
    for name, pairs in edit.replace.items():
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in pairs:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    for name, text in edit.add.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def run(folder, *command, processes=0, code=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes else []), *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_trains_resumes_and_is_scored(name, copy):
    edit = EDITS[name]
    files, lines = touched(edit)
    assert files <= edit.files and lines <= edit.lines
    apply(edit, copy)
    options = ["--config", edit.config, *edit.options, *OPTIONS]
    parts = ["-b", "2", "--set", "train.accumulate=2"]
    run(copy, "train.py", *options, *parts, "--epochs", "1")
    more = [*options, "-b", "1", "--set", "train.accumulate=2", "--epochs", "2"]
    done = run(copy, "train_multi_GPU.py", *more, "--resume", "auto", processes=2)
    assert re.search(r"Epoch: \[1\]  \[3/3\]", done.stdout) and "Epoch: [0]" not in done.stdout
    first, second = records(copy / "run")
    scores = {key: value for key, value in second.items() if key.startswith("val/")}
    assert scores and all(value == value for value in scores.values())
    assert all(value == value for value in first.values())
    if name in ("a. loss", "h. scalar"):
        assert_the_same_in_one_part(copy, options, first)
    if name == "d. metric":
        assert 0 < second["val/MSE"] <= second["val/MAE"]
    if name == "g. optimizer":
        state = torch.load(copy / "run" / "last.pth", weights_only=True)["optimizer"]
        assert "row_var" in state["state"][0]


def assert_the_same_in_one_part(folder, options, record):
    """Losses and scalars of a first step of four images, in one part or in two."""
    whole = [*options, "-b", "4", "--epochs", "1", "--output-dir", "whole"]
    run(folder, "train.py", *whole)
    (alone,) = records(folder / "whole")
    names = [key for key in alone if key.startswith("train/")]
    assert len(names) >= 2
    for key in names:  # batch norm sees two or four images: alike, not the same
        assert record[key] == pytest.approx(alone[key], rel=0.1, abs=0.05), key
