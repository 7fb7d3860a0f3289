"""Semantic segmentation with FCN (Long et al., CVPR 2015) or U-Net (Ronneberger et al., 2015).

Masks are class indices, and 255 (`IGNORE`) marks pixels that count nowhere. What a network gives
are logits [B, classes, h, w]; the class of a pixel is their arg-max at the image's own size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import shapes
import src
from my_dataset import (
    PairDataset,
    ShapesDataset,
    check_pairs,
    folder_pairs,
    image_reader,
    pairs_of,
    split_pairs,
)
from segmentation_data import bag_pairs, camvid_pairs, segmentation_layout, voc_pairs
from tasks.settings import FIRST_VAL_SCENE, BaseConfig, PhotoData
from train_utils.confusion_matrix import ConfusionMatrix, most_likely
from train_utils.errors import UserError
from train_utils.label_maps import LabelReader, MaskScan, scan_masks
from train_utils.log import get_logger
from train_utils.losses import (
    IGNORE,
    dice_loss,
    focal_loss,
    label_counts,
    one_hot_cross_entropy,
    pixel_cross_entropy,
)
from train_utils.metrics import ExactMetric
from train_utils.normalize import normalize_images
from train_utils.pretrained import Arch, backbone_state
from train_utils.schedule import make_optimizers
from train_utils.tiles import by_rows
from train_utils.train_and_eval import Backward, Batch, Models, Sample, minimise_sum
from transforms import SegmentationEval, SegmentationTrain, restore_logits, segmentation_input

METRICS = {"mIoU": "max", "accuracy": "max", "mPA": "max", "precision": "max", "loss": "min"}
PREDICT_FLAGS = {"cutout": False, "overlay": False}

_TINT = 0.6  # how much an overlay shows of a class's colour

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
        if not 2 <= self.num_classes <= IGNORE:
            raise ValueError(f"class_names: must be 2 to {IGNORE}")
        if self.background is not None and not 0 <= self.background < self.num_classes:
            raise ValueError("background: must be the index of a class, or null")
        if len(set(self.class_names)) < self.num_classes:
            raise ValueError("class_names: each must be another")
        if self.name == "shapes" and self.num_classes != len(shapes.CLASS_NAMES):
            raise ValueError(f"class_names: the shapes have {len(shapes.CLASS_NAMES)} classes")
        self.palette = self.palette or self._default_palette()
        if len(self.palette) != self.num_classes:
            raise ValueError(
                f"palette: {len(self.palette)} colours for {self.num_classes} classes. Give one "
                "per class, or null for the standard ones."
            )
        self.mask_values = self.mask_values or ("threshold" if self.name == "bag" else "index")
        self.mask_object = self.mask_object or ("dark" if self.name == "bag" else "bright")
        self._check_ranges()
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
        if self.name == "shapes":
            return [(r, g, b) for r, g, b in shapes.class_palette().tolist()]
        return voc_palette(self.num_classes)

    def _check_ranges(self) -> None:
        for colour in self.palette or []:
            if not all(0 <= level <= 255 for level in colour):
                raise ValueError("palette: levels must lie between 0 and 255")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError("scale: must be two positive numbers, the smaller one first")
        if not 0 <= self.aspect < 1:
            raise ValueError("aspect: must be at least 0 and below 1")
        if not all(0 <= limit <= 1 for limit in self.hsv):
            raise ValueError("hsv: every value must lie between 0 and 1")

    @property
    def num_classes(self) -> int:
        return len(self.class_names or ())


@dataclass
class ModelConfig:
    """The network."""

    name: Literal["fcn32s", "fcn16s", "fcn8s", "fcn", "unet", "unet_vgg16", "unet_resnet50"] = (
        "unet"
    )
    channels: int = 64  # of the first stage; all others follow (not unet_resnet50)
    batch_norm: bool = False  # in a VGG encoder
    weights: str | None = None  # ImageNet weights of the encoder: DEFAULT (torchvision's), a file
    freeze_backbone: bool = False  # train the decoder only

    def __post_init__(self) -> None:
        if self.channels < 2 or self.channels % 2:
            raise ValueError("channels: must be even and at least 2")
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
        if self.name in ("unet", "unet_resnet50"):
            return self.name.removeprefix("unet").removeprefix("_")
        return "vgg16_bn" if self.batch_norm else "vgg16"


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


# -- data -----------------------------------------------------------------------------------------


def build_datasets(cfg: Config) -> tuple[Dataset, Dataset]:
    """Training and validation pairs."""
    data = cfg.data
    transforms = SegmentationTrain(
        data.image_size, data.fit, data.scale, data.aspect, data.hflip, data.hsv
    )
    if data.name == "shapes":
        train: Dataset = _training_scenes(data, transforms)
    else:
        train = _file_pairs(data, True, transforms)
    return train, build_val_dataset(cfg)


def build_val_dataset(cfg: Config, all_pairs: bool = False) -> Dataset:
    """Validation pairs; `all_pairs`: where none are set apart take all, not the held-out share."""
    data = cfg.data
    transforms = SegmentationEval(data.image_size, data.fit)
    if data.name == "shapes":
        return ShapesDataset(
            data.image_size, data.seed, data.val_size, FIRST_VAL_SCENE, transforms, "classes"
        )
    return _file_pairs(data, False, transforms, all_pairs)


def label_reader(data: DataConfig) -> LabelReader:
    """The mask map that `data` describes; ValueError if it makes no sense."""
    return LabelReader(
        data.num_classes,
        data.class_names,
        data.ignore_index,
        data.ignore_beyond,
        data.mask_values or "index",
        data.palette,
        data.mask_threshold,
        data.mask_object or "bright",
    )


def _training_scenes(data: DataConfig, transforms: Any = None) -> ShapesDataset:
    return ShapesDataset(
        data.image_size, data.seed, data.train_size, transforms=transforms, target="classes"
    )


def _file_pairs(data: DataConfig, train: bool, transforms: Any, all_pairs: bool = False) -> Dataset:
    largest = data.image_size * (data.scale[1] if train else 1)
    readers = label_reader(data), image_reader(data, ceil(largest))
    if data.name == "folders":
        return folder_pairs(data, train, transforms, readers[0], all_pairs, readers[1])
    if not data.root:
        raise UserError(
            f"data.root: this recipe trains on data laid out as {data.name}. Give its folder by "
            "--data-path DIR, or your own folders by --images DIR --masks DIR."
        )
    if data.name != "bag":
        found = voc_pairs if data.name == "voc" else camvid_pairs
        return PairDataset(*found(data.root, train), transforms, *readers)
    pairs = PairDataset(*bag_pairs(data.root), transforms, *readers)
    return Subset(pairs, split_pairs(pairs, data.val_fraction, data.seed)[0 if train else 1])


def prepare_data(cfg: Config, train_set: Dataset | None, val_set: Dataset, workers: int) -> dict:
    """Check every pair and scan every mask; returns the class weights if they are "auto".

    Prints what the masks hold. Raises UserError for files that do not fit, and for masks from which
    nothing can be learned. Embedded scenes need no check.
    """
    scan = None
    for dataset, part in ((train_set, "training"), (val_set, "validation")):
        if dataset is not None and cfg.data.name != "shapes":
            check_pairs(dataset)
            learn = dataset is train_set
            found = scan_masks(
                [mask for _, mask in pairs_of(dataset)],
                label_reader(cfg.data),
                workers,
                refuse_single_class=learn,
            )
            get_logger().info(f"{part} {found.text()}")
            if not sum(found.class_counts):
                raise UserError(
                    f"{part} masks: every pixel is ignored, so there is nothing to score. Check "
                    "data.ignore_index and the masks."
                )
            scan = found if learn else scan
    if scan and scan.absent:
        get_logger().warning(
            f"warning: {', '.join(scan.absent)}: in no training mask, and so not to be learned"
        )
    if train_set is None or cfg.loss.class_weights != "auto":
        return {}
    weights = (scan or _scan_scenes(cfg.data)).class_weights()
    return {"loss": {"class_weights": weights}}


def _scan_scenes(data: DataConfig) -> MaskScan:
    """What the masks of the embedded training scenes hold."""
    scenes = _training_scenes(data)
    counts = torch.stack([label_counts(mask, data.num_classes) for _, mask in scenes])
    there, total = counts > 0, counts.sum(0).tolist()
    return MaskScan(
        label_reader(data),
        files=len(counts),
        raw_histogram=total + [0] * (256 - len(total)),
        class_counts=total,
        class_files=there.sum(0).tolist(),
        class_extent=(there * counts.sum(1, keepdim=True)).sum(0).tolist(),
        ignored=0,
        ignored_files=0,
        blank_files=0,
    )


# -- networks -------------------------------------------------------------------------------------


def build_models(cfg: Config) -> dict[str, nn.Module]:
    model, options = cfg.model, {}
    if model.name != "unet_resnet50":
        options["channels"] = model.channels
    if model.batch_norm:
        options["batch_norm"] = True
    network = getattr(src, model.name)(cfg.data.num_classes, **options)
    if model.freeze_backbone:
        network.freeze_backbone()
    return {"model": network}


def initialise(cfg: Config, models: dict[str, nn.Module]) -> None:
    """Give the encoder its ImageNet weights, if the recipe asks for them."""
    if not cfg.model.weights:
        return
    arch: Arch = cfg.model.backbone  # type: ignore[assignment]
    state = backbone_state(cfg.model.weights, arch)
    try:
        models["model"].load_backbone(state)
    except ValueError as error:
        raise UserError(
            f"{cfg.model.weights}: {error}. Use weights of torchvision's {arch}, or DEFAULT."
        ) from error


def build_optimizers(cfg: Config, models: dict[str, nn.Module], steps_per_epoch: int) -> tuple:
    """Optimizer and schedule of the recipe, by network."""
    return make_optimizers(models, {"model": cfg.optim}, steps_per_epoch, cfg.train.epochs)


def check_batches(cfg: Config, smallest: int) -> None:
    """Refuse a smallest batch (of a step, on a process) on which batch norm could not train."""
    if smallest > 1:
        return
    with torch.device("meta"):
        needed = build_models(cfg)["model"].min_train_side
    if cfg.data.image_size < needed:
        raise UserError(
            f"data.image_size: {cfg.data.image_size} pixels end as a 1×1 map in {cfg.model.name}, "
            "and some step has a single image on some process, on which batch norm cannot train. "
            f"Use {needed} pixels or more, or another --batch-size."
        )


# -- steps ----------------------------------------------------------------------------------------


def loss_counts(cfg: Config) -> Callable[[Batch], dict[str, float]]:
    weights = torch.tensor(_class_weights(cfg) or [1.0] * cfg.data.num_classes).double()
    return partial(_count_batch, class_weights=weights)


def _count_batch(batch: Batch, class_weights: Tensor) -> dict[str, float]:
    """Pixels that count, weighted by class, and images that have any; on the host."""
    target = batch[1]
    pixels = label_counts(target, len(class_weights)).double() @ class_weights
    images = (target != IGNORE).flatten(1).any(1).sum()
    return {"pixels": pixels.item(), "images": float(images)}


def train_step(cfg: Config) -> Callable:
    return partial(segmentation_step, terms=_loss_terms(cfg), normalize=_normalize(cfg))


def segmentation_step(
    models: Models,
    batch: Batch,
    counts: dict[str, float],
    backward: Backward,
    terms: dict[str, Callable],
    normalize: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The sum of the loss terms (name → term(logits, target, counts)) of the network `model`."""
    images, target = batch
    logits = models["model"](normalize(images))
    losses = {name: term(logits, target, counts) for name, term in terms.items()}
    return minimise_sum(losses, backward)


def _loss_terms(cfg: Config) -> dict[str, Callable]:
    """The recipe's terms by name, each (logits, target, counts or None for the batch's own)."""
    loss, weights = cfg.loss, _class_weights(cfg)
    focal = partial(focal_loss, alpha=loss.focal_alpha, gamma=loss.focal_gamma)
    of_pixels = {"ce": pixel_cross_entropy, "bce": one_hot_cross_entropy, "focal": focal}
    terms: dict[str, Callable] = {
        name: partial(_term, partial(function, class_weights=weights), "pixels")
        for name, function in of_pixels.items()
    }
    terms["dice"] = partial(_term, dice_loss, "images")
    return {name: terms[name] for name in loss.terms}


def _term(
    loss: Callable, unit: str, logits: Tensor, target: Tensor, counts: dict[str, float] | None
) -> Tensor:
    return loss(logits, target, counts[unit] if counts else None)


def _class_weights(cfg: Config) -> list[float] | None:
    weights = cfg.loss.class_weights
    if isinstance(weights, str):
        raise UserError(
            "loss.class_weights: auto is known to a training only. Give numbers, or null."
        )
    return weights


def predict(cfg: Config) -> Callable:
    """(networks, uint8 images [B, 3, H, W]) → logits [B, classes, H, W]."""
    return partial(_predict, normalize=_normalize(cfg))


def _predict(models: Models, images: Tensor, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    return models["model"](normalize(images)).float()


def _normalize(cfg: Config) -> Callable[[Tensor], Tensor]:
    return partial(normalize_images, mean=cfg.data.mean, std=cfg.data.std)


# -- prediction of files --------------------------------------------------------------------------


def network_input(cfg: Config, image: Tensor, sides: Sequence[int] | None = None) -> Tensor:
    """What evaluation would feed of this image, uint8 [3, S, S].

    sides: (H, W) of the file, if `data.draft` had the image read at a reduced size.
    """
    size, fit = cfg.data.image_size, cfg.data.fit
    return segmentation_input(image, size, fit, sides).as_subclass(Tensor)


def render(
    cfg: Config,
    image: Tensor,
    prediction: Tensor,
    kinds: Sequence[str],
    threshold: float | None = None,
) -> dict[str, Image.Image]:
    """Pictures to write, at the image's own size.

    map: class indices, as evaluation scores them, under the classes' palette. cutout: the image,
    opaque off the background. overlay: the image tinted there by the colours of the classes.
    Raises UserError for a cut-out of classes without background.
    """
    classes = _class_map(cfg, prediction, image.shape[-2:])
    label_map = Image.fromarray(classes.numpy())
    label_map.putpalette(_colours(cfg).flatten().tolist())  # makes its mode P
    pictures = {"map": label_map}
    rgb, background = image.permute(1, 2, 0), cfg.data.background
    shown = (classes != (IGNORE if background is None else background))[..., None]
    if "cutout" in kinds:
        if background is None:
            raise UserError("--cutout: no class is background. Name one by data.background.")
        alpha = shown.to(torch.uint8) * 255
        pictures["cutout"] = Image.fromarray(torch.cat([rgb, alpha], dim=2).numpy())
    if "overlay" in kinds:
        colours = _colours(cfg).float()

        def tinted(rows: slice) -> Tensor:
            mixed = torch.lerp(rgb[rows].float(), colours[classes[rows].int()], _TINT)
            return torch.where(shown[rows], mixed.round().to(torch.uint8), rgb[rows])

        pictures["overlay"] = Image.fromarray(by_rows(tinted, *classes.shape).numpy())
    return pictures


def _class_map(cfg: Config, prediction: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [C, h, w] as classes at `size`, uint8 [H, W] on the CPU.

    Class by class, as all logits at the size of a large photograph take gigabytes.
    """
    finish = _finish(cfg)
    planes = (finish(logits[None], size)[0] for logits in prediction)
    return most_likely(planes).cpu()


def _finish(cfg: Config) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """(logits [C, h, w], (H, W)) → logits at the image's own size, for any part of the classes."""
    return partial(restore_logits, fit=cfg.data.fit)


def _colours(cfg: Config) -> Tensor:
    """The colour of each uint8 label, ignored ones in VOC's; uint8 [256, 3]."""
    palette = cfg.data.palette or []
    return torch.tensor([*palette, *voc_palette(256)[len(palette) :]], dtype=torch.uint8)


# -- results --------------------------------------------------------------------------------------


def make_metrics(cfg: Config) -> tuple[ExactMetric, ...]:
    """All scores; no loss where class weights are "auto" and no training has found them."""
    known = cfg.loss.class_weights != "auto"
    loss = partial(_image_loss, terms=_loss_terms(cfg)) if known else None
    return (ConfusionMatrix(cfg.data.class_names or (), _finish(cfg), loss),)


def _image_loss(logits: Tensor, target: Tensor, terms: dict[str, Callable]) -> Tensor:
    losses = [term(logits[None], target[None], None) for term in terms.values()]
    return torch.stack(losses).sum()


def sheet_row(cfg: Config, sample: Sample) -> list[Tensor]:
    """input | truth | prediction, classes in their colours."""
    truth = sample.target[0]
    predicted = _class_map(cfg, sample.prediction, truth.shape)
    maps = [_colours(cfg)[classes.long()].permute(2, 0, 1) for classes in (truth, predicted)]
    return [sample.image, *maps]
