"""What a stranger changes in the scripts, done to a copy of the repository and trained with.

Each edit is trained on one process with accumulation, then continued on two processes whose shares
of a step are uneven or empty, and scored. Without batch norm what is logged must be that of one
process with whole batches. What an edit may touch is asserted: files, and lines.
"""

import difflib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import REPO
from distributed import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

SALIENCY, TRAIN = "tasks/saliency/__init__.py", "train.py"
LOSSES = "            losses[name] = _LOSSES[name](outputs, target)\n"
DATASETS = "    train_set, val_set = task.build_datasets()  # or any two torch Datasets\n"
CROPPED = (
    "        image, mask = _crop_and_flip((image, mask), self.image_size, self.crop_size, "
    "self.hflip)\n"
)
METRIC = "            F1Score(self._finish),\n"
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
    options: tuple[str, ...] = ("--set", "model.name=tiny")  # of edit b, which comes first


SSIM = '''

def ssim_loss(outputs: list[Tensor], target: Tensor) -> Tensor:
    """1 − SSIM in windows of 11 × 11, mean over pixels and images, summed over the outputs."""

    def mean(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 11, stride=1)

    total = 0
    for logits in outputs:
        p = logits.sigmoid()
        a, b = mean(p), mean(target)
        va, vb, ab = mean(p * p) - a * a, mean(target * target) - b * b, mean(p * target) - a * b
        ssim = (2 * a * b + 1e-4) * (2 * ab + 9e-4) / ((a * a + b * b + 1e-4) * (va + vb + 9e-4))
        total = total + (1 - ssim).mean()
    return total
'''

NETWORK = """import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    def __init__(self, out_ch: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
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
                (LOSSES, LOSSES + '        losses["ssim"] = ssim_loss(outputs, target)\n'),
                ("\n\nclass Task(BaseTask):", f"{SSIM}\n\nclass Task(BaseTask):"),
            ]
        },
        {},
        files=1,
        lines=19,
        options=("--set", "model.name=tiny", "--set", "loss.terms=[bce,iou]"),
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
                    METRIC,
                    METRIC
                    + '            ImageMean("MSE", lambda p, t: (p - t).square().mean()),\n',
                ),
                ("import ExactMetric, F1Score, ", "import ExactMetric, F1Score, ImageMean, "),
            ]
        },
        {},
        files=1,
        lines=2,
    ),
    "e. task": Edit(
        {},
        {"tasks/depth/__init__.py": DEPTH, "configs/depth.yaml": "task: depth\n"},
        files=2,
        lines=80,
        config="configs/depth.yaml",
        options=(),
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
                (LOSSES, LOSSES + '        losses["mean_logit"] = outputs[0].mean().detach()\n')
            ]
        },
        {},
        files=1,
        lines=1,
    ),
}
# Eleven samples in steps of four: the last step has three, so that of two processes, which take two
# each in parts of one, the second has an empty part.
OPTIONS = [
    *("--set", "data.image_size=48", "--set", "data.train_size=11", "--set", "data.val_size=3"),
    *("-j", "0", "--device", "cpu", "--print-freq", "1", "--amp", "off"),
    *("--set", "optim.schedule=constant"),  # the same for one epoch as for two
]
WHOLE = ("-b", "4")
PARTS = ("-b", "2", "--set", "train.accumulate=2")
PARTS_OF_TWO = ("-b", "1", "--set", "train.accumulate=2")


def touched(edit: Edit) -> tuple[int, int]:
    """Files and lines that an edit adds or changes; a dataset of one's own is there already."""
    own = {name: text for name, text in edit.add.items() if not name.endswith("_dataset.py")}
    texts = [("", text) for text in own.values()] + [
        p for each in edit.replace.values() for p in each
    ]
    lines = sum(
        line.startswith("+")
        for old, new in texts
        for line in difflib.ndiff(old.splitlines(), new.splitlines())
    )
    return len(edit.replace) + len(own), lines


@pytest.fixture
def copy(tmp_path):
    """A copy of the product."""
    kept_out = shutil.ignore_patterns(".*", "__pycache__", "benchmarks", "docs", "runs", "tests")
    return shutil.copytree(REPO, tmp_path / "repo", ignore=kept_out)


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


def train(edit, copy, run, *options, processes=0):
    """Train an edited copy; the records of its folder `run`."""
    script = "train_multi_GPU.py" if processes else "train.py"
    arguments = ["--config", edit.config, *edit.options, *OPTIONS, "--output-dir", run, *options]
    run_script(copy, script, *arguments, processes=processes, repo=copy)
    return [json.loads(line) for line in (copy / run / "metrics.jsonl").read_text().splitlines()]


def logged(record, *kinds):
    """The values of an epoch's record whose names begin so."""
    return {name: value for name, value in record.items() if name.startswith(kinds)}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_trains_resumes_and_is_scored(name, copy):
    edit, network = EDITS[name], EDITS["b. network"]
    files, lines = touched(edit)
    assert files <= edit.files and lines <= edit.lines
    is_tiny = "model.name=tiny" in edit.options
    if is_tiny and edit is not network:
        apply(network, copy)
    apply(edit, copy)

    (first,) = train(edit, copy, "run", *PARTS, "--epochs", "1")
    more = ("--epochs", "2", "--resume", "auto")
    again, second = train(edit, copy, "run", *PARTS_OF_TWO, *more, processes=2)
    assert again == first and second["step"] == 6
    if is_tiny:  # the other networks have batch norm, which sees parts
        whole = train(edit, copy, "whole", *WHOLE, "--epochs", "2")
        for record, expected in zip((first, second), whole, strict=True):
            expected = logged(expected, "train/", "val/")
            assert logged(record, "train/", "val/") == pytest.approx(expected, rel=1e-6)

    if edit.config != "configs/unet.yaml":  # f: validation.py does not know its data
        weights = ("--weights", "run/last.pth", "--device", "cpu", "-j", "0")
        run_script(copy, "validation.py", *weights, "--json", "scores.json", repo=copy)
        scores = json.loads((copy / "scores.json").read_text())
        assert {f"val/{name}": value for name, value in scores.items()} == {
            **logged(second, "val/"),
            "val/n": 3,
        }
    if name in CHECKS:
        CHECKS[name](edit, copy, second)


def all_terms_are_minimised(_, copy, record):
    terms = [record[f"train/{name}"] for name in ("bce", "iou", "ssim")]
    assert record["train/loss"] == pytest.approx(sum(terms), rel=1e-6)


def the_network_is_the_new_one(_, copy, record):
    assert "head.weight" in torch.load(copy / "run" / "last.pth", weights_only=True)["model"]


def other_images_are_trained_on(edit, copy, record):
    ((old, new),) = edit.replace["transforms.py"]
    apply(edit._replace(replace={"transforms.py": [(new, old)]}), copy)
    *_, plain = train(edit, copy, "plain", *WHOLE, "--epochs", "2")
    assert record["train/loss"] != pytest.approx(plain["train/loss"], rel=1e-5)


def the_score_is_of_squares(_, copy, record):
    assert record["val/MAE"] ** 2 < record["val/MSE"] < record["val/MAE"]


def the_optimizer_is_the_new_one(_, copy, record):
    state = torch.load(copy / "run" / "last.pth", weights_only=True)["optimizer"]
    assert "row_var" in state["state"][0]


def the_scalar_is_everywhere(_, copy, record):
    """Of every step and every epoch: in the log, results.txt and TensorBoard."""
    run, value = copy / "run", record["train/mean_logit"]
    assert f"train/mean_logit: {value:.5f}" in (run / "results.txt").read_text()
    assert (run / "log.txt").read_text().count("mean_logit: ") == 6
    events = EventAccumulator(str(run)).Reload()
    steps = [event.value for event in events.Scalars("train/mean_logit")]
    of_images = sum(n * v for n, v in zip((4, 4, 3), steps[3:], strict=True)) / 11
    assert of_images == pytest.approx(value, rel=1e-6)
    epochs = [(event.step, event.value) for event in events.Scalars("epoch/mean_logit")]
    assert epochs[1] == (6, pytest.approx(value, rel=1e-6)) and epochs[0][0] == 3


CHECKS = {
    "a. loss": all_terms_are_minimised,
    "b. network": the_network_is_the_new_one,
    "c. augmentation": other_images_are_trained_on,
    "d. metric": the_score_is_of_squares,
    "g. optimizer": the_optimizer_is_the_new_one,
    "h. scalar": the_scalar_is_everywhere,
}
