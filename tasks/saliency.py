"""Salient object detection with U²-Net (Qin et al., Pattern Recognition 2020)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset, Subset

import src
from my_dataset import DUTSDataset, PairFolderDataset, ShapesDataset, split_pairs
from src.u2net import from_official, is_official
from tasks.settings import BaseConfig
from train_utils.errors import UserError
from train_utils.metrics import ExactMetric, F1Score, MeanAbsoluteError, prediction_at
from train_utils.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from train_utils.schedule import create_lr_scheduler, get_params_groups
from train_utils.train_and_eval import Sample, pixel_counts, saliency_predict, saliency_step
from transforms import SaliencyEval, SaliencyTrain, predict_input

METRICS = {"maxF1": "max", "MAE": "min"}
# Validation scenes of the embedded data are drawn from here on, training scenes from 0.
FIRST_VAL_SCENE = 1_000_000

loss_counts = pixel_counts


@dataclass
class DataConfig:
    """Where pairs of image and mask come from, and how they are prepared."""

    # null: folders where `images` is given, duts where `root` is, else the embedded shapes
    name: Literal["shapes", "duts", "folders"] | None = None
    root: str | None = None  # the folder that holds DUTS-TR and DUTS-TE
    images: str | None = None  # any folder of images …
    masks: str | None = None  # … and the folder of their masks, of the same names
    val_images: str | None = None  # null: a share of `images` is held out by the seed
    val_masks: str | None = None
    val_fraction: float = 0.1
    train_size: int = 400  # embedded scenes
    val_size: int = 80
    seed: int = 0  # of the embedded scenes and of the split
    image_size: int = 320  # side of the square that images are resized to
    crop_size: int | None = None  # random crop in training; null: 0.9 × image_size
    hflip: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("train_size", "val_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        if not 1 <= self.crop <= self.image_size:
            raise ValueError("crop_size: must lie between 1 and image_size")
        if not 0 <= self.seed < 2**63:
            raise ValueError("seed: must lie between 0 and 2^63 − 1")
        if not 0 < self.val_fraction < 1:
            raise ValueError("val_fraction: must lie between 0 and 1")
        if min(self.std) <= 0:
            raise ValueError("std: every value must be positive")
        if not 0 <= self.hflip <= 1:
            raise ValueError("hflip: must lie between 0 and 1")
        self.name = self.name or ("folders" if self.images else "duts" if self.root else "shapes")
        folders = self.name == "folders"
        if (folders or self.masks) and not (self.images and self.masks):
            raise ValueError("images, masks: need each other. Give --images DIR --masks DIR.")
        if (self.val_images or self.val_masks) and not folders:
            raise ValueError("val_images: go with --images DIR --masks DIR. Add them.")
        if bool(self.val_images) != bool(self.val_masks):
            raise ValueError("val_images, val_masks: need each other. Give both.")

    @property
    def crop(self) -> int:
        """Side of the training crop."""
        return self.crop_size or max(1, round(0.9 * self.image_size))


@dataclass
class ModelConfig:
    """The network."""

    name: Literal["u2net_full", "u2net_lite"] = "u2net_lite"


@dataclass
class Config(BaseConfig):
    """A saliency recipe."""

    task: str = "saliency"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


# -- data -----------------------------------------------------------------------------------------


def build_datasets(cfg: Config) -> tuple[Dataset, Dataset]:
    """Training and validation pairs."""
    data = cfg.data
    train = SaliencyTrain(data.image_size, data.crop, data.hflip)
    if data.name == "shapes":
        shapes = ShapesDataset(data.image_size, data.seed, data.train_size, transforms=train)
        return shapes, build_val_dataset(cfg)
    if data.name == "duts":
        return DUTSDataset(_root(data), train=True, transforms=train), build_val_dataset(cfg)
    pairs = PairFolderDataset(data.images, data.masks, transforms=train)
    if data.val_images:
        return pairs, build_val_dataset(cfg)
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[0]), build_val_dataset(
        cfg
    )


def build_val_dataset(cfg: Config, all_pairs: bool = False) -> Dataset:
    """Validation pairs; `all_pairs`: of a pair of folders take all, not the held-out share."""
    data = cfg.data
    transforms = SaliencyEval(data.image_size)
    if data.name == "shapes":
        return ShapesDataset(
            data.image_size, data.seed, data.val_size, FIRST_VAL_SCENE, transforms=transforms
        )
    if data.name == "duts":
        return DUTSDataset(_root(data), train=False, transforms=transforms)
    if data.val_images:
        return PairFolderDataset(data.val_images, data.val_masks, transforms=transforms)
    pairs = PairFolderDataset(data.images, data.masks, transforms=transforms)
    if all_pairs:
        return pairs
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[1])


def _root(data: DataConfig) -> str:
    if not data.root:
        raise UserError(
            "data.root: this recipe trains on DUTS. Give the folder that holds DUTS-TR and DUTS-TE "
            "by --data-path DIR, or your own folders by --images DIR --masks DIR."
        )
    return data.root


# -- networks -------------------------------------------------------------------------------------


def build_models(cfg: Config) -> dict[str, nn.Module]:
    return {"model": getattr(src, cfg.model.name)(out_ch=1)}


def build_optimizers(cfg: Config, models: dict[str, nn.Module], steps_per_epoch: int) -> tuple:
    """AdamW and the warm-up–cosine schedule, by network."""
    optim = cfg.optim
    groups = get_params_groups(models["model"], optim.weight_decay)
    optimizer = AdamW(groups, lr=optim.lr, fused=True)
    schedule = create_lr_scheduler(
        optimizer,
        steps_per_epoch,
        cfg.train.epochs,
        warmup_epochs=optim.warmup_epochs,
        warmup_factor=optim.warmup_factor,
        end_factor=optim.end_factor,
    )
    return {"model": optimizer}, {"model": schedule}


def adopt_weights(state_dict: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]] | None:
    """(config values, weights in our names) of U²-Net weights, also the authors'; else None.

    Weights that fit a network in part only are given its name too: loading them then lists what
    differs.
    """
    converted = from_official(state_dict) if is_official(state_dict) else state_dict
    fitting = {}
    for name in ("u2net_lite", "u2net_full"):
        with torch.device("meta"):
            own = getattr(src, name)().state_dict()
        fitting[name] = sum(
            key in converted and converted[key].shape == value.shape for key, value in own.items()
        )
    nearest = max(fitting, key=fitting.__getitem__)
    return ({"model": {"name": nearest}}, converted) if fitting[nearest] else None


def check_batches(cfg: Config, smallest: int) -> None:
    """Refuse a smallest batch (of a step, on a process) on which batch norm could not train."""
    if smallest == 1 and cfg.data.crop <= 32:
        raise UserError(
            f"data.image_size: crops of {cfg.data.crop} pixels end as a 1×1 map, and some step "
            "has a single image on some process, on which batch norm cannot train. Use crops of "
            "33 pixels or more, or another --batch-size."
        )


# -- steps ----------------------------------------------------------------------------------------


def train_step(cfg: Config) -> Callable:
    return partial(saliency_step, normalize=_normalize(cfg))


def predict(cfg: Config) -> Callable:
    """(networks, uint8 images [B, 3, H, W]) → saliency [B, 1, H, W] in [0, 1]."""
    return partial(saliency_predict, normalize=_normalize(cfg))


def _normalize(cfg: Config) -> Callable[[Tensor], Tensor]:
    return partial(normalize_images, mean=cfg.data.mean, std=cfg.data.std)


# -- prediction of files --------------------------------------------------------------------------


def network_input(cfg: Config, image: Tensor) -> Tensor:
    """What evaluation would feed of this image, uint8 [3, S, S]."""
    return predict_input(image, cfg.data.image_size).as_subclass(Tensor)


def render(
    cfg: Config, image: Tensor, prediction: Tensor, kinds: Sequence[str], threshold: float | None
) -> dict[str, Image.Image]:
    """Pictures to write, at the image's own size.

    map: the 8-bit saliency map, as evaluation scores it (stretched to [0, 1] under
    `eval.post_norm`); with `threshold`, 255 where it is greater, else 0. cutout: the image with the
    map as alpha. overlay: the image tinted red by the map.
    """
    saliency = prediction_at(prediction[0], image.shape[-2:], cfg.eval.post_norm).cpu()
    if threshold is not None:
        saliency = (saliency > threshold).to(saliency.dtype)
    codes = (saliency * 255).round().to(torch.uint8)
    pictures = {"map": Image.fromarray(codes.numpy())}
    rgb = image.permute(1, 2, 0)
    if "cutout" in kinds:
        pictures["cutout"] = Image.fromarray(torch.cat([rgb, codes[..., None]], dim=2).numpy())
    if "overlay" in kinds:
        red = torch.tensor([255.0, 32.0, 32.0], dtype=saliency.dtype)
        tinted = torch.lerp(rgb.to(saliency.dtype), red, 0.6 * saliency[..., None])
        pictures["overlay"] = Image.fromarray(tinted.round().to(torch.uint8).numpy())
    return pictures


# -- results --------------------------------------------------------------------------------------


def make_metrics(cfg: Config) -> tuple[ExactMetric, ...]:
    return MeanAbsoluteError(cfg.eval.post_norm), F1Score(cfg.eval.post_norm)


def results(metrics: Sequence[ExactMetric]) -> dict[str, float]:
    """Scores by name."""
    return {metric.name: metric.compute() for metric in metrics}


def deciding_metric(cfg: Config) -> tuple[str, str]:
    """The metric that decides the best checkpoint, and whether its "max" or "min" is best."""
    name = cfg.train.best or next(iter(METRICS))
    if name not in METRICS:
        raise UserError(f"train.best: {name!r} is not tracked. Use one of {', '.join(METRICS)}.")
    return name, METRICS[name]


def sheet_row(sample: Sample) -> list[Tensor]:
    """input | truth | prediction."""
    return [sample.image, sample.target, sample.prediction]


def curves(metrics: Sequence[ExactMetric]) -> dict[str, dict[str, Tensor]]:
    """TensorBoard's precision–recall curves by tag."""
    f1 = next(metric for metric in metrics if isinstance(metric, F1Score))
    averaged, pixels = f1.curves(), f1.pixel_counts()
    return {
        "val/precision_recall": {
            "true_positive_counts": pixels.true_positives.flip(0),
            "false_positive_counts": pixels.false_positives.flip(0),
            "true_negative_counts": pixels.true_negatives.flip(0),
            "false_negative_counts": pixels.false_negatives.flip(0),
            "precision": averaged.precision.flip(0),
            "recall": averaged.recall.flip(0),
        }
    }
