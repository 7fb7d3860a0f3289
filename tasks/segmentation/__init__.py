"""Semantic segmentation with FCN (Long et al., CVPR 2015) or U-Net (Ronneberger et al., 2015).

Masks are class indices, and 255 (`IGNORE`) marks pixels that count nowhere. What a network gives
are logits [B, classes, h, w]; the class of a pixel is their arg-max at the image's own size.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import src
from my_dataset import ShapesDataset, folder_pairs
from tasks.segmentation.confusion_matrix import ConfusionMatrix, most_likely
from tasks.segmentation.data import bag_pairs, camvid_pairs, segmentation_layout, voc_pairs
from tasks.segmentation.label_maps import LabelReader
from tasks.segmentation.losses import (
    dice_loss,
    focal_loss,
    label_counts,
    one_hot_cross_entropy,
    pixel_cross_entropy,
)
from tasks.segmentation.mask_scan import MaskScan, scan_masks, summary
from train_utils import shapes
from train_utils.data import unwrap_subset
from train_utils.datasets import PairDataset, check_pairs, pairs_of, split_pairs
from train_utils.errors import UserError, require, require_between
from train_utils.image_io import Channel, MaskReader
from train_utils.log import get_logger
from train_utils.losses import sum_of
from train_utils.mask_scan import scan_grey_masks
from train_utils.metrics import ExactMetric
from train_utils.pretrained import Arch, backbone_state
from train_utils.settings import FIRST_VAL_SCENE, MAX_CHANNELS, BaseConfig, PhotoData
from train_utils.task import BaseTask
from train_utils.tiles import by_rows
from train_utils.train_and_eval import Batch, Models, Sample
from transforms import (
    IGNORE,
    SegmentationEval,
    SegmentationTrain,
    restore_logits,
    segmentation_input,
)

_TINT = 0.6  # how much an overlay shows of a class's colour
_FIELDS = "image", "classes"  # of an embedded scene

Colour = tuple[int, int, int]


def voc_palette(count: int) -> list[Colour]:
    """The first of PASCAL VOC's 256 colours: bits 0, 3, 6 of an index are red's highest bits.

    From the highest down; bits 1, 4, 7 are green's, and bits 2, 5 blue's.
    """

    def level(index: int, first_bit: int) -> int:
        return sum((index >> (first_bit + 3 * place) & 1) << (7 - place) for place in range(3))

    return [(level(index, 0), level(index, 1), level(index, 2)) for index in range(count)]


@dataclass
class DataConfig(PhotoData):
    """Where pairs of image and mask come from, what the masks mean, and how both are prepared."""

    # voc: root holds VOCdevkit; camvid: train, trainannot …; bag: image, mask; null: what root is
    name: Literal["shapes", "folders", "voc", "camvid", "bag"] | None = None
    class_names: list[str] | None = None  # in the order of the indices; null: of the shapes
    palette: list[Colour] | None = None  # a colour per class; null: the shapes' or PASCAL VOC's
    # How mask files name classes. index: by their numbers; colour: by the colours of `palette`;
    # threshold: two classes, object and background, by grey level. null: threshold for bag
    mask_values: Literal["index", "colour", "threshold"] | None = None
    mask_threshold: int = 128  # grey levels below it are dark
    mask_object: Literal["dark", "bright"] | None = None  # null: dark for bag, else bright
    mask_channel: Channel | None = None  # threshold: of files with alpha; null: where that varies
    background: int | None = 0  # the class that overlays leave clear and cut-outs drop; null: none
    ignore_index: int = 255  # in the files; such pixels count neither in losses nor in scores
    ignore_beyond: bool = False  # ignore indices beyond the classes, too; else they are refused
    # letterbox: the whole image, its aspect ratio kept, on grey; stretch: to the square
    fit: Literal["letterbox", "stretch"] = "letterbox"
    scale: tuple[float, float] = (0.25, 2.0)  # training: random size relative to the square
    aspect: float = 0.3  # training: random change of the aspect ratio, by up to this share
    hsv: tuple[float, float, float] = (0.1, 0.7, 0.3)  # training: random hue, saturation, value

    def __post_init__(self) -> None:
        super().__post_init__()
        self.class_names = self.class_names or self._default_names()
        count = self.num_classes
        if self.background is not None:
            require(0 <= self.background < count, "background", "must be a class, or null")
        require(len(set(self.class_names)) == count, "class_names", "each must be another")
        self.palette = self.palette or self._default_palette()
        if len(self.palette) != count:
            raise ValueError(
                f"palette: {len(self.palette)} colours for {count} classes. Give one "
                "per class, or null for the standard ones."
            )
        self.mask_values = self.mask_values or ("threshold" if self.name == "bag" else "index")
        self.mask_object = self.mask_object or ("dark" if self.name == "bag" else "bright")
        levels = [level for colour in self.palette for level in colour]
        low, high = self.scale
        require(min(levels) >= 0 and max(levels) <= 255, "palette", "levels must be 0 to 255")
        order = "must be two positive numbers up to 100, the smaller one first"
        require(0 < low <= high <= 100, "scale", order)
        require(0 <= self.aspect < 1, "aspect", "must be at least 0 and below 1")
        require(min(self.hsv) >= 0 and max(self.hsv) <= 1, "hsv", "must lie between 0 and 1")
        label_reader(self)  # raises for a mask map that makes no sense

    def _layout_of_root(self) -> str:
        return segmentation_layout(self.root) if self.root else "shapes"

    def _default_names(self) -> list[str]:
        if self.name != "shapes":
            raise ValueError(
                "class_names: name the classes in the order of their indices, for example --set "
                "data.class_names=[background,road]. Recipes with the names of PASCAL VOC and "
                "CamVid are in configs/."
            )
        return list(shapes.CLASS_NAMES)

    def _default_palette(self) -> list[Colour]:
        if self.name == "shapes" and self.num_classes == len(shapes.CLASS_NAMES):
            return [(r, g, b) for r, g, b in shapes.class_palette().tolist()]
        return voc_palette(self.num_classes)

    @property
    def num_classes(self) -> int:
        return len(self.class_names or ())


@dataclass
class ModelConfig:
    """The network: what src/__init__.py exports under this name, called with the classes' number.

    It also gets `channels` and `batch_norm`, if it takes them.
    """

    name: str = "unet"
    channels: int = 64  # of the first stage; all others follow (not unet_resnet50)
    batch_norm: bool = False  # in a VGG encoder
    weights: str | None = None  # ImageNet weights of the encoder: DEFAULT (torchvision's), a file
    freeze_backbone: bool = False  # train the decoder only

    def __post_init__(self) -> None:
        src.require_network(self.name)
        require_between(self, 2, MAX_CHANNELS, "channels")
        require(self.channels % 2 == 0, "channels", "must be even")
        if self.name == "unet_resnet50" and self.channels != 64:
            raise ValueError("channels: unet_resnet50 has a fixed width. Leave it at 64.")
        if self.batch_norm and not self.backbone.startswith("vgg"):
            raise ValueError(f"batch_norm: is for VGG encoders; {self.name} has it anyway")
        if self.weights and not self.backbone:
            raise ValueError(f"weights: {self.name} has no pretrained encoder. Use unet_vgg16.")
        if self.weights and self.channels != 64:
            raise ValueError("weights: pretrained encoders have 64 channels. Set channels to 64.")

    @property
    def backbone(self) -> str:
        """torchvision's name of the encoder; empty where there is none."""
        if self.name == "unet_resnet50":
            return "resnet50"
        if self.name.startswith("fcn") or self.name == "unet_vgg16":
            return "vgg16_bn" if self.batch_norm else "vgg16"
        return ""


@dataclass
class LossConfig:
    """The sum of these terms is minimised."""

    # ce: softmax cross-entropy; bce: binary cross-entropy per class; focal; dice: of each image
    terms: list[Literal["ce", "bce", "focal", "dice"]] = field(default_factory=lambda: ["ce"])
    # of ce, bce and focal. auto: from the training masks, which the run then remembers
    class_weights: Literal["auto"] | list[float] | None = None
    focal_alpha: float = 0.5
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        if not self.terms or len(set(self.terms)) < len(self.terms):
            raise ValueError("terms: give one or several, each once")
        weights = self.class_weights
        if isinstance(weights, list) and (min(weights, default=0) < 0 or not any(weights)):
            raise ValueError("class_weights: must not be negative, nor all 0")
        for name in ("focal_alpha", "focal_gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative")


@dataclass
class Config(BaseConfig):
    """A segmentation recipe."""

    task: str = "segmentation"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        weights, classes = self.loss.class_weights, self.data.num_classes
        if isinstance(weights, list) and len(weights) != classes:
            raise ValueError(
                f"loss.class_weights: {len(weights)} for {classes} classes. Give one per class, or "
                "auto."
            )
        if self.model.freeze_backbone and not (self.model.weights or self.train.weights):
            raise ValueError(
                "model.freeze_backbone: would hold random weights. Set model.weights as well."
            )


def label_reader(data: DataConfig) -> LabelReader:
    """The mask map that `data` describes; ValueError if it makes no sense."""
    return LabelReader(
        data.num_classes,
        data.class_names or (),
        data.ignore_index,
        data.ignore_beyond,
        data.mask_values or "index",
        data.palette,
        data.mask_threshold,
        data.mask_object or "bright",
        data.mask_channel,
    )


def _training_scenes(data: DataConfig, transforms: Any = None) -> ShapesDataset:
    return ShapesDataset(data.image_size, data.seed, data.train_size, 0, transforms, fields=_FIELDS)


def _file_pairs(data: DataConfig, train: bool, transforms: Any, all_pairs: bool = False) -> Dataset:
    largest = data.image_size * (data.scale[1] if train else 1)
    reader, at_least = label_reader(data), 2 * ceil(largest) if data.draft else None
    if data.name == "folders":
        return folder_pairs(data, train, transforms, reader, all_pairs, at_least)
    if not data.root:
        raise UserError(
            f"data.root: this recipe trains on data laid out as {data.name}. Give its folder by "
            "--data-path DIR, or your own folders by --images DIR --masks DIR."
        )
    if data.name != "bag":
        found = voc_pairs if data.name == "voc" else camvid_pairs
        return PairDataset(*found(data.root, train, data.names), transforms, reader, at_least)
    pairs = PairDataset(*bag_pairs(data.root, data.names), transforms, reader, at_least)
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[0 if train else 1])


def _scan_scenes(data: DataConfig) -> MaskScan:
    """What the masks of the embedded training scenes hold."""
    scenes = _training_scenes(data)
    masks = (scenes[index][1] for index in range(len(scenes)))
    histograms = [torch.bincount(mask.flatten(), minlength=256) for mask in masks]
    reader = label_reader(data)
    return MaskScan(reader, summary(reader, torch.stack(histograms).numpy()))


_PIXEL_LOSSES = {"ce": pixel_cross_entropy, "bce": one_hot_cross_entropy}


class Task(BaseTask):
    """FCN and U-Net on pairs of image and label map."""

    METRICS: ClassVar = {
        "mIoU": "max",
        "accuracy": "max",
        "mPA": "max",
        "precision": "max",
        "loss": "min",
    }
    LABELS: ClassVar = True
    TARGETS: ClassVar = "classes"
    PREDICT_FLAGS: ClassVar = {"cutout": False, "overlay": False}

    cfg: Config

    def build_datasets(self) -> tuple[Dataset, Dataset]:
        """Training and validation pairs."""
        data = self.cfg.data
        if data.name == "shapes" and data.num_classes != len(shapes.CLASS_NAMES):
            raise UserError(
                f"data.class_names: the shapes have {len(shapes.CLASS_NAMES)} classes. Name the "
                "folders of your own data by --images DIR --masks DIR, or leave class_names out."
            )
        transforms = SegmentationTrain(
            data.image_size, data.fit, data.scale, data.aspect, data.hflip, data.hsv
        )
        if data.name == "shapes":
            train: Dataset = _training_scenes(data, transforms)
        else:
            train = _file_pairs(data, True, transforms)
        return train, self.build_val_dataset()

    def build_val_dataset(self, all_pairs: bool = False) -> Dataset:
        """Validation pairs; `all_pairs`: where none are set apart take all of them."""
        data = self.cfg.data
        transforms = SegmentationEval(data.image_size, data.fit)
        if data.name == "shapes":
            return ShapesDataset(
                data.image_size, data.seed, data.val_size, FIRST_VAL_SCENE, transforms, _FIELDS
            )
        return _file_pairs(data, False, transforms, all_pairs)

    def prepare_data(self, train_set: Dataset | None, val_set: Dataset) -> dict:
        """Check every pair and scan every mask; returns the class weights if they are "auto".

        Prints what the masks hold. Raises UserError for files that do not fit, and for masks from
        which nothing can be learned. Embedded scenes need no check.
        """
        scan = None
        for dataset, part in ((train_set, "training"), (val_set, "validation")):
            if dataset is not None and pairs_of(dataset):
                check_pairs(dataset)
                learn, masks = dataset is train_set, [mask for _, mask in pairs_of(dataset)]
                self._check_channels(masks)
                found = scan_masks(
                    masks,
                    label_reader(self.cfg.data),
                    refuse_single_class=learn,
                )
                first, *others = found.lines()
                for line in (f"{part} {first}", *others):
                    get_logger().info(line)
                if not sum(found.class_counts):
                    raise UserError(
                        f"{part} masks: every pixel is ignored, so there is nothing to score. "
                        "Check data.ignore_index and the masks."
                    )
                scan = found if learn else scan
        if scan and scan.absent:
            get_logger().warning(
                f"warning: {', '.join(scan.absent)}: in no training mask, and so not to be learned"
            )
        if train_set is None or self.cfg.loss.class_weights != "auto":
            return {}
        if not scan and not isinstance(unwrap_subset(train_set)[0], ShapesDataset):
            raise UserError(
                "loss.class_weights: auto counts the classes of mask files, and there are none. "
                "Give numbers, or null."
            )
        weights = (scan or _scan_scenes(self.cfg.data)).class_weights()
        return {"loss": {"class_weights": weights}}

    def _check_channels(self, masks: Sequence[Path]) -> None:
        """UserError where masks to be cut at a threshold lie in alpha here and elsewhere there."""
        if self.cfg.data.mask_values == "threshold":
            mixture = scan_grey_masks(masks, MaskReader(self.cfg.data.mask_channel)).mixture()
            if mixture:
                raise UserError(f"{masks[0].parent}: {mixture}")

    def check_item(self, image: Tensor, target: Tensor, training: bool) -> None:
        """Refuse labels that are no class, too."""
        super().check_item(image, target, training)
        label_counts(target, self.cfg.data.num_classes)

    def build_models(self) -> dict[str, nn.Module]:
        model = self.cfg.model
        make = getattr(src, model.name)
        options = {"channels": model.channels, "batch_norm": model.batch_norm}
        taken = inspect.signature(make).parameters
        options = {name: value for name, value in options.items() if name in taken}
        network: Any = self.make_network(model.name, make, self.cfg.data.num_classes, **options)
        if model.freeze_backbone:
            if not hasattr(network, "freeze_backbone"):
                raise UserError(
                    f"model.freeze_backbone: {model.name} has no freeze_backbone(). Define it in "
                    "src, or leave the setting at false."
                )
            network.freeze_backbone()
        return {"model": network}

    def initialise(self, models: dict[str, nn.Module]) -> None:
        """Give the encoder its ImageNet weights, if the recipe asks for them."""
        if not self.cfg.model.weights:
            return
        arch: Arch = self.cfg.model.backbone  # type: ignore[assignment]
        state = backbone_state(self.cfg.model.weights, arch)
        network: Any = models["model"]  # an FCN or a U-Net
        try:
            network.load_backbone(state)
        except ValueError as error:
            raise UserError(
                f"{self.cfg.model.weights}: {error}. Use weights of torchvision's {arch}, or "
                "DEFAULT."
            ) from error

    @property
    def legend(self) -> dict[str, Colour]:
        """The classes and their colours."""
        data = self.cfg.data
        return dict(zip(data.class_names or (), data.palette or (), strict=True))

    @property
    def outputs(self) -> str:
        classes = self.cfg.data.num_classes
        return f"logits [B, {classes}, h, w], a channel per class, in training and in evaluation"

    def check_models(self, models: Models, batch: Batch) -> None:
        """Refuse a network that ends in a softmax, which the losses take themselves."""
        logits = models["model"](self.normalize(batch[0]))
        if (
            isinstance(logits, Tensor)
            and logits.min() >= 0
            and (logits.sum(1) - 1).abs().max() < 1e-3
        ):
            raise UserError(
                f"model.name: {self.cfg.model.name} returns probabilities that add up to 1 over "
                f"the classes. Return {self.outputs}. If losses of your own take probabilities, "
                "remove check_models from tasks/segmentation."
            )

    def check_batches(self, smallest: int) -> None:
        """Refuse a smallest batch (of a step, on a process) on which batch norm could not train."""
        if smallest > 1:
            return
        with torch.device("meta"):
            needed = getattr(self.build_models()["model"], "min_train_side", 1)
        side, network = self.cfg.data.image_size, self.cfg.model.name
        if side < needed:
            raise UserError(
                f"data.image_size: {side} pixels end as a 1×1 map in {network}, and some step has "
                "a single image on some process, on which batch norm cannot train. "
                f"Use {needed} pixels or more, or another --batch-size."
            )

    def losses(self, models: Models, batch: Batch) -> dict[str, Tensor]:
        """The recipe's terms, of the logits of the network."""
        images, target = batch
        return self.loss_terms(models["model"](self.normalize(images)), target)

    def loss_terms(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The recipe's terms by name; all but Dice's are means over pixels, weighted by class."""
        loss, weights = self.cfg.loss, self._class_weights()
        terms: dict[str, Tensor] = {}
        for name in loss.terms:
            if name == "dice":
                terms[name] = dice_loss(logits, target)
            elif name == "focal":
                alpha, gamma = loss.focal_alpha, loss.focal_gamma
                terms[name] = focal_loss(logits, target, weights, alpha, gamma)
            else:
                terms[name] = _PIXEL_LOSSES[name](logits, target, weights)
        return terms

    def weight(self, batch: Batch) -> dict[str, float]:
        """Pixels that count, weighted by class; of Dice the images that have any."""
        target, classes = batch[1], self.cfg.data.num_classes
        weights = torch.tensor(self._class_weights() or [1.0] * classes).double()
        pixels = (label_counts(target, classes).double() @ weights).item()
        images = float((target != IGNORE).flatten(1).any(1).sum())
        return {name: images if name == "dice" else pixels for name in self.cfg.loss.terms}

    def _class_weights(self) -> list[float] | None:
        weights = self.cfg.loss.class_weights
        if isinstance(weights, str):
            raise UserError(
                "loss.class_weights: auto is known to a training only. Give numbers, or null."
            )
        return weights

    def predict(self, models: Models, inputs: Tensor) -> Tensor:
        """Logits [B, classes, H, W] of uint8 images [B, 3, H, W]."""
        return models["model"](self.normalize(inputs)).float()

    def network_input(self, image: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """What evaluation would feed of this image, uint8 [3, S, S].

        sides: (H, W) of the file, if `data.draft` had the image read at a reduced size.
        """
        size, fit = self.cfg.data.image_size, self.cfg.data.fit
        return segmentation_input(image, size, fit, sides).as_subclass(Tensor)

    def render(
        self,
        image: Tensor,
        prediction: Tensor,
        kinds: Sequence[str],
        threshold: float | None = None,
    ) -> dict[str, Image.Image]:
        """Pictures to write, at the image's own size.

        map: class indices, as evaluation scores them, under the classes' palette. cutout: the
        image, opaque off the background. overlay: the image tinted there by the classes' colours.
        Raises UserError for a cut-out of classes without background.
        """
        classes = self._class_map(prediction, image.shape[-2:])
        label_map = Image.fromarray(classes.numpy())
        label_map.putpalette(self._colours().flatten().tolist())  # makes its mode P
        pictures = {"map": label_map}
        rgb, background = image.permute(1, 2, 0), self.cfg.data.background
        shown = (classes != (IGNORE if background is None else background))[..., None]
        if "cutout" in kinds:
            if background is None:
                raise UserError("--cutout: no class is background. Name one by data.background.")
            alpha = shown.to(torch.uint8) * 255
            pictures["cutout"] = Image.fromarray(torch.cat([rgb, alpha], dim=2).numpy())
        if "overlay" in kinds:
            colours = self._colours().float()

            def tinted(rows: slice) -> Tensor:
                mixed = torch.lerp(rgb[rows].float(), colours[classes[rows].int()], _TINT)
                return torch.where(shown[rows], mixed.round().to(torch.uint8), rgb[rows])

            pictures["overlay"] = Image.fromarray(by_rows(tinted, *classes.shape).numpy())
        return pictures

    def _class_map(self, prediction: Tensor, size: Sequence[int]) -> Tensor:
        """Logits [C, h, w] as classes at `size`, uint8 [H, W] on the CPU.

        Class by class, as all logits at the size of a large photograph take gigabytes.
        """
        return most_likely(self._finish(logits[None], size)[0] for logits in prediction).cpu()

    def _finish(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Logits [C, h, w] at the image's own size (H, W), for any part of the classes."""
        return restore_logits(logits, size, fit=self.cfg.data.fit)

    def _colours(self) -> Tensor:
        """The colour of each uint8 label, ignored ones in VOC's; uint8 [256, 3]."""
        palette = self.cfg.data.palette or []
        return torch.tensor([*palette, *voc_palette(256)[len(palette) :]], dtype=torch.uint8)

    def make_metrics(self) -> tuple[ExactMetric, ...]:
        """All scores; no loss where class weights are "auto" and no training has found them."""
        known = self.cfg.loss.class_weights != "auto"
        loss = self._image_loss if known else None
        return (ConfusionMatrix(self.cfg.data.class_names or (), self._finish, loss),)

    def _image_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return sum_of(self.loss_terms(logits[None], target[None]).values())

    def sheet_row(self, sample: Sample) -> list[Tensor]:
        """input | truth | prediction, classes in their colours."""
        truth = sample.target[0]
        predicted = self._class_map(sample.prediction, truth.shape)
        maps = [self._colours()[classes.long()].permute(2, 0, 1) for classes in (truth, predicted)]
        return [sample.image, *maps]
