"""Salient object detection with U²-Net (Qin et al., Pattern Recognition 2020)."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import src
from my_dataset import DUTSDataset, PairFolderDataset, ShapesDataset, folder_pairs
from src.u2net import from_official, is_official
from tasks.saliency.losses import soft_iou_loss
from tasks.saliency.metrics import ToolboxMetrics, stretched
from train_utils import settings
from train_utils.collectives import call_on_main
from train_utils.datasets import check_pairs, of_one_size
from train_utils.errors import UserError, require_between
from train_utils.image_io import Channel, MaskReader, read_map
from train_utils.losses import criterion, supervised
from train_utils.mask_scan import check_grey_masks
from train_utils.metrics import ExactMetric, F1Score, MeanAbsoluteError, prediction_at
from train_utils.settings import FIRST_VAL_SCENE, BaseConfig, PhotoData
from train_utils.task import BaseTask
from train_utils.tiles import by_rows
from train_utils.train_and_eval import Batch, Models
from transforms import SaliencyEval, SaliencyTrain, predict_input


@dataclass
class DataConfig(PhotoData):
    """Where pairs of image and mask come from, and how they are prepared."""

    layout = "duts"
    skips_unequal = ("duts",)  # as distributed, five of its pairs

    name: Literal["shapes", "duts", "folders"] | None = None  # duts: root holds DUTS-TR, DUTS-TE
    crop_size: int | None = None  # random crop in training; null: 0.9 × image_size
    mask_channel: Channel | None = None  # of mask files with alpha; null: where that varies
    mask_threshold: int | None = None  # grey levels from it on are the object; null: as they are

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(self, 1, 255, "mask_threshold")
        if not 1 <= self.crop <= self.image_size:
            raise ValueError("crop_size: must lie between 1 and image_size")

    @property
    def mask_reader(self) -> MaskReader:
        """What reads the masks."""
        return MaskReader(self.mask_channel, self.mask_threshold)

    @property
    def crop(self) -> int:
        """Side of the training crop."""
        return self.crop_size or max(1, round(0.9 * self.image_size))


@dataclass
class ModelConfig:
    """The network: what src/__init__.py exports under this name, called with out_ch=1."""

    name: str = "u2net_lite"

    def __post_init__(self) -> None:
        src.require_network(self.name)


@dataclass
class LossConfig:
    """The sum of these terms, each over all outputs of the network, is minimised."""

    # bce: binary cross-entropy of pixels; iou: 1 − soft intersection over union of each image
    terms: list[Literal["bce", "iou"]] = field(default_factory=lambda: ["bce"])

    def __post_init__(self) -> None:
        if not self.terms or len(set(self.terms)) < len(self.terms):
            raise ValueError("terms: give one or several, each once")


@dataclass
class EvalConfig(settings.EvalConfig):
    """Evaluation, and (post_norm) what predict.py writes."""

    post_norm: bool = False  # stretch each prediction to [0, 1] before it is scored and written


@dataclass
class Config(BaseConfig):
    """A saliency recipe."""

    task: str = "saliency"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def _root(data: DataConfig) -> str:
    if not data.root:
        raise UserError(
            "data.root: this recipe trains on DUTS. Give the folder that holds DUTS-TR and DUTS-TE "
            "by --data-path DIR, or your own folders by --images DIR --masks DIR."
        )
    return data.root


class _Maps(PairFolderDataset):
    """Maps that any program wrote, in the place of images, and their masks."""

    def read_image(self, path: Path) -> Tensor:
        return read_map(path, getattr(self.read_target, "channel", None))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[index]
        return of_one_size(pair, self.read_image(pair[0]), self.read_target(pair[1]))


_TOO_DARK = (
    "If these are the masks, take all levels from {level} on as object: --set "
    "data.mask_threshold={level}."
)
_LOSSES = {"bce": criterion, "iou": soft_iou_loss}


class Task(BaseTask):
    """U²-Net on pairs of image and mask."""

    METRICS: ClassVar = {"maxF1": "max", "MAE": "min"}
    PREDICT_FLAGS: ClassVar = {"cutout": False, "overlay": False, "threshold": False}
    SCORE_FLAGS: ClassVar = {
        "post-norm": "stretch each prediction to [0, 1] first",
        "toolbox": "also by the common toolbox's protocol",
    }

    cfg: Config

    def build_datasets(self) -> tuple[Dataset, Dataset]:
        """Training and validation pairs."""
        data = self.cfg.data
        transforms = SaliencyTrain(data.image_size, data.crop, data.hflip)
        if data.name == "shapes":
            train: Dataset = ShapesDataset(
                data.image_size, data.seed, data.train_size, transforms=transforms
            )
        elif data.name == "duts":
            train = DUTSDataset(
                _root(data), True, transforms, data.at_least, data.mask_reader, data.names
            )
        else:
            train = folder_pairs(data, True, transforms, data.mask_reader, at_least=data.at_least)
        return train, self.build_val_dataset()

    def build_val_dataset(self, all_pairs: bool = False) -> Dataset:
        """Validation pairs; `all_pairs`: of a pair of folders take all, not the held-out share."""
        data = self.cfg.data
        transforms = SaliencyEval(data.image_size)
        if data.name == "shapes":
            return ShapesDataset(
                data.image_size, data.seed, data.val_size, FIRST_VAL_SCENE, transforms=transforms
            )
        if data.name == "duts":
            return DUTSDataset(
                _root(data), False, transforms, data.at_least, data.mask_reader, data.names
            )
        return folder_pairs(data, False, transforms, data.mask_reader, all_pairs, data.at_least)

    def check_data(self, dataset: Dataset) -> None:
        """Check every file's header."""
        check_pairs(dataset)

    def prepare_data(self, train_set: Dataset | None, val_set: Dataset) -> dict:
        """Check every file's header, then what the masks hold."""
        super().prepare_data(train_set, val_set)
        check_grey_masks(train_set, val_set, self.cfg.data.mask_reader, _TOO_DARK)
        return {}

    def build_models(self) -> dict[str, nn.Module]:
        name = self.cfg.model.name
        return {"model": self.make_network(name, getattr(src, name), out_ch=1)}

    @classmethod
    def adopt_weights(cls, state_dict: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]] | None:
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
                key in converted and converted[key].shape == value.shape
                for key, value in own.items()
            )
        nearest = max(fitting, key=fitting.__getitem__)
        return ({"model": {"name": nearest}}, converted) if fitting[nearest] else None

    @property
    def outputs(self) -> str:
        return (
            "logits [B, 1, H, W], or a list of them, in training, and probabilities [B, 1, h, w], "
            "such as torch.sigmoid(logits), in evaluation"
        )

    def check_models(self, models: Models, batch: Batch) -> None:
        """Refuse a network with the same outputs in both modes: logits equal no probabilities."""
        network, images = models["model"], self.normalize(batch[0])
        trained, evaluated = network(images), network.eval()(images)
        for each in [trained] if isinstance(trained, Tensor) else trained:
            both = isinstance(each, Tensor) and isinstance(evaluated, Tensor)
            if both and each.shape == evaluated.shape and torch.allclose(each, evaluated):
                raise UserError(
                    f"model.name: {self.cfg.model.name} returns the same in training as in "
                    f"evaluation. Return {self.outputs}. If losses of your own take what it "
                    "returns, remove check_models from tasks/saliency."
                )

    def check_batches(self, smallest: int) -> None:
        """Refuse a smallest batch (of a step, on a process) on which batch norm could not train."""
        crop = self.cfg.data.crop
        if smallest == 1 and crop <= 32:
            raise UserError(
                f"data.image_size: crops of {crop} pixels end as a 1×1 map, and some step has a "
                "single image on some process, on which batch norm cannot train. Use crops of 33 "
                "pixels or more, or another --batch-size."
            )

    def losses(self, models: Models, batch: Batch) -> dict[str, Tensor]:
        """The recipe's terms, each summed over all outputs of the network."""
        images, target = batch
        outputs, target = supervised(models["model"](self.normalize(images)), target)
        losses: dict[str, Tensor] = {}
        for name in self.cfg.loss.terms:
            losses[name] = _LOSSES[name](outputs, target)
        return losses

    def predict(self, models: Models, inputs: Tensor) -> Tensor:
        """Saliency in [0, 1], [B, 1, H, W], of uint8 images [B, 3, H, W]."""
        return models["model"](self.normalize(inputs)).float()

    def network_input(self, image: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """What evaluation would feed of an image, uint8 [3, S, S], whatever the file's `sides`."""
        return predict_input(image, self.cfg.data.image_size).as_subclass(Tensor)

    def render(
        self, image: Tensor, prediction: Tensor, kinds: Sequence[str], threshold: float | None
    ) -> dict[str, Image.Image]:
        """Pictures to write, at the image's own size.

        map: the 8-bit saliency map, as evaluation scores it (stretched to [0, 1] under
        `eval.post_norm`); with `threshold`, 255 where it is greater, else 0. cutout: the image with
        the map as alpha. overlay: the image tinted red by the map.
        """
        saliency = prediction_at(prediction[0], image.shape[-2:], self._finish).cpu()
        if threshold is not None:
            saliency = (saliency > threshold).to(saliency.dtype)
        codes = (saliency * 255).round().to(torch.uint8)
        pictures = {"map": Image.fromarray(codes.numpy())}
        rgb = image.permute(1, 2, 0)
        if "cutout" in kinds:
            pictures["cutout"] = Image.fromarray(torch.cat([rgb, codes[..., None]], dim=2).numpy())
        if "overlay" in kinds:
            red = torch.tensor([255.0, 32.0, 32.0], dtype=saliency.dtype)

            def tinted(rows: slice) -> Tensor:
                share = 0.6 * saliency[rows, :, None]
                return torch.lerp(rgb[rows].to(share.dtype), red, share).round().to(torch.uint8)

            pictures["overlay"] = Image.fromarray(by_rows(tinted, *saliency.shape).numpy())
        return pictures

    @property
    def _finish(self) -> Callable[[Tensor], Tensor] | None:
        """What becomes of maps before they are scored and written."""
        return stretched if self.cfg.eval.post_norm else None

    def make_metrics(self) -> tuple[ExactMetric, ...]:
        return (
            MeanAbsoluteError(self._finish),
            F1Score(self._finish),
        )

    def metrics_with(self, flags: Collection[str]) -> tuple[ExactMetric, ...]:
        """Metrics at zero; post-norm: of stretched maps; toolbox: also by its protocol."""
        values = {"eval": {"post_norm": True}} if "post-norm" in flags else {}
        metrics = self.with_values(values).make_metrics()
        return (*metrics, ToolboxMetrics()) if "toolbox" in flags else metrics

    def pairs_of_files(self, predictions: str, targets: str) -> PairFolderDataset:
        """Maps, 8-bit images with the names of their masks, and the masks."""
        reader = self.cfg.data.mask_reader
        pairs = _Maps(predictions, targets, read_target=reader, names=self.cfg.data.names)
        if pairs.unmatched_masks:
            raise UserError(
                f"{predictions}: {pairs.unmatched_masks} of the masks in {targets} have no "
                "prediction, and leaving images out flatters the scores. Predict them all, or "
                "score against the masks that are meant."
            )
        check_pairs(pairs)
        call_on_main(lambda: check_grey_masks(None, pairs, reader, _TOO_DARK))
        return pairs

    def curves(self, metrics: Sequence[ExactMetric]) -> dict[str, dict[str, Tensor]]:
        """TensorBoard's precision–recall curves by tag."""
        f1 = next((metric for metric in metrics if isinstance(metric, F1Score)), None)
        if f1 is None:
            return {}
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
