"""Image matting with a trimap: Deep Image Matting (Xu et al., CVPR 2017), first stage."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from my_dataset import ShapesDataset
from src.deep_matting import STRIDE, DeepMatting
from tasks.matting.data import check_matting_files, composition_pairs, matting_pairs
from tasks.matting.foreground import estimate_foreground
from tasks.matting.losses import alpha_prediction_loss, compositional_loss
from tasks.matting.metrics import MattingMetrics, finish_alpha
from tasks.matting.trimaps import read_trimap
from train_utils import settings
from train_utils.data import unwrap_subset
from train_utils.errors import UserError, require, require_between
from train_utils.image_io import Channel, MaskReader
from train_utils.mask_scan import check_grey_masks
from train_utils.metrics import ExactMetric
from train_utils.normalize import normalize_images
from train_utils.pretrained import backbone_state
from train_utils.settings import (
    FIRST_VAL_SCENE,
    MAX_CHANNELS,
    MAX_SIDE,
    BaseConfig,
    FolderData,
    OptimConfig,
    PhotoData,
)
from train_utils.task import BaseTask
from train_utils.tiles import MIN_PIXELS, limited
from train_utils.train_and_eval import Batch, Models, Sample
from transforms import (
    BACKGROUND,
    FOREGROUND,
    UNKNOWN,
    MattingEval,
    MattingTrain,
    matting_input,
)

# A cut changes alpha up to five strides away. Counted in pixels of each level: a 3×3 convolution
# adds 1, a 5×5 one 2, pooling halves and rounds up, unpooling doubles: 2 → 3 → 5 → 6 → 6 before the
# five poolings, 8 → 18 → 38 → 78 → 158 behind the decoder's convolutions, 160 in alpha.
_TILE_MARGIN = 5 * STRIDE
_PARTS = "foreground", "alpha", "background"  # of an embedded scene


@dataclass
class DataConfig(PhotoData):
    """Where images and alphas come from, and how they are prepared."""

    sources = (
        *FolderData.sources,
        *("foregrounds", "alphas", "backgrounds", "trimaps", "val_trimaps"),
    )

    # folders: ready images (`images`) with their alphas (`masks`); composed: foregrounds with their
    # alphas, on other backgrounds; shapes: composed too, of scenes as large as the largest crop
    name: Literal["shapes", "composed", "folders"] | None = None
    # null: root holds fg, alpha and bg; or, for ready images, image, alpha and maybe trimap
    foregrounds: str | None = None
    alphas: str | None = None
    backgrounds: str | None = None
    mask_channel: Channel | None = None  # of alphas in files with alpha; null: where that varies
    per_foreground: int = 20  # composites of each foreground in an epoch …
    val_per_foreground: int = 5  # … and in validation
    trimaps: str | None = None  # of the images that are held out; null: made from alpha
    val_trimaps: str | None = None  # of val_images
    crop_sizes: tuple[int, ...] = (320, 480, 640)  # resized to image_size
    max_radius: int = 25  # pixels; training trimaps erode and dilate by 1 to max_radius
    eval_radius: int = 10  # validation trimaps that are made do so by this
    eval_size: int | None = None  # longer side in validation and prediction; null: whole
    jitter: tuple[float, float, float, float] = (0.2, 0.2, 0.2, 0.05)  # …, saturation, hue

    def __post_init__(self) -> None:
        self._find_ready_images()
        super().__post_init__()
        require(not self.draft, "draft", "is not for mattes, which are as large as their image.")
        self._check_sources()
        require_between(self, 1, MAX_SIDE, "per_foreground", "val_per_foreground", "max_radius")
        sizes = self.crop_sizes
        within = min(sizes, default=0) >= 1 and max(sizes, default=0) <= MAX_SIDE
        require(within, "crop_sizes", f"one size or more, each 1 to {MAX_SIDE}")
        require_between(self, 0, MAX_SIDE, "eval_radius")
        require_between(self, 1, MAX_SIDE, "eval_size")
        *shares, hue = self.jitter
        within = min(self.jitter) >= 0 and max(shares) <= 1 and hue <= 0.5
        require(within, "jitter", "three values from 0 to 1, and a hue from 0 to 0.5")

    def _find_ready_images(self) -> None:
        """Take a root with image and alpha (and trimap) in it as the folders of ready images."""
        root = Path(self.root or "")
        if self.name or not self.root or not all((root / x).is_dir() for x in ("image", "alpha")):
            return
        self.root, self.images, self.masks = None, str(root / "image"), str(root / "alpha")
        if (root / "trimap").is_dir() and not self.trimaps:
            self.trimaps = str(root / "trimap")

    def _layout_of_root(self) -> str:
        return "composed" if self.root or any(self._parts()) else "shapes"

    def _parts(self) -> tuple[str | None, str | None, str | None]:
        return self.foregrounds, self.alphas, self.backgrounds

    def _check_sources(self) -> None:
        if any(self._parts()) and not all(self._parts()):
            raise ValueError("foregrounds, alphas, backgrounds: need each other. Give all three.")
        if self.root and any(self._parts()):
            raise ValueError("foregrounds: go without root (--data-path). Give one or the other.")
        if self.trimaps and (self.list or self.name != "folders" or self.val_images):
            raise ValueError(
                "trimaps: are those of images held out of `images`. Leave them out, or give "
                "val_trimaps with val_images."
            )
        if self.val_trimaps and not self.val_images:
            raise ValueError("val_trimaps: go with val_images. Add them.")

    def composed_folders(self) -> tuple[str, str, str]:
        """The folders of foregrounds, alphas and backgrounds; UserError if none are named."""
        if self.root:
            return f"{self.root}/fg", f"{self.root}/alpha", f"{self.root}/bg"
        if self.foregrounds and self.alphas and self.backgrounds:
            return self.foregrounds, self.alphas, self.backgrounds
        raise UserError(
            "data.root: this recipe composes its images. Give the folder that holds fg, alpha and "
            "bg by --data-path DIR, or three folders by --set data.foregrounds=DIR, data.alphas "
            "and data.backgrounds, or ready images by --images DIR --masks DIR."
        )


@dataclass
class ModelConfig:
    """The network."""

    name: Literal["deep_matting"] = "deep_matting"
    channels: int = 64  # of the first stage; the deepest has 8 times as many
    weights: str | None = None  # the encoder's start: DEFAULT (ImageNet), a file of it, or null

    def __post_init__(self) -> None:
        require_between(self, 1, MAX_CHANNELS, "channels")


@dataclass
class LossConfig:
    """alpha_weight · alpha-prediction loss + (1 − alpha_weight) · compositional loss."""

    alpha_weight: float | None = None  # null: ½, or 1 for ready images, whose parts are unknown

    def __post_init__(self) -> None:
        weight = self.alpha_weight
        within = weight is None or 0 <= weight <= 1
        require(within, "alpha_weight", "must lie between 0 and 1")


@dataclass
class EvalConfig(settings.EvalConfig):
    """Evaluation, and (max_pixels) predict.py; 1 kB of memory per pixel and image under way."""

    max_pixels: int = 2**22  # of a whole input; larger ones go by tiles, with the same result

    def __post_init__(self) -> None:
        super().__post_init__()
        least = f"must be at least {MIN_PIXELS}"
        require(self.max_pixels >= MIN_PIXELS, "max_pixels", least)


@dataclass
class Config(BaseConfig):
    """A matting recipe."""

    task: str = "matting"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(name="sgd", lr=1e-2, schedule="constant")
    )
    eval: EvalConfig = field(default_factory=EvalConfig)


class Task(BaseTask):
    """Deep Image Matting; an input is an image with its trimap behind it, four channels."""

    METRICS: ClassVar = {"loss": "min", "SAD": "min", "MSE": "min", "Grad": "min", "Conn": "min"}
    EXTRA_INPUTS: ClassVar = {"trimap": read_trimap}
    TARGETS: ClassVar = "mattes"
    PREDICT_FLAGS: ClassVar = {"trimap": True, "cutout": False}

    cfg: Config

    def build_datasets(self) -> tuple[Dataset, Dataset]:
        """Training and validation data. Raises UserError where the loss asks for parts unknown."""
        data, weight = self.cfg.data, self.cfg.loss.alpha_weight
        if data.name == "folders" and weight not in (None, 1):
            raise UserError(
                f"loss.alpha_weight {weight}: the compositional loss needs foregrounds and "
                "backgrounds, which ready images do not give. Set it to null."
            )
        transforms = MattingTrain(
            data.image_size, data.crop_sizes, data.max_radius, data.hflip, data.jitter
        )
        if data.name == "shapes":
            size = max(data.crop_sizes)
            train: Dataset = ShapesDataset(size, data.seed, data.train_size, 0, transforms, _PARTS)
        elif data.name == "composed":
            train = composition_pairs(data, train=True, transforms=transforms)
        else:
            train = matting_pairs(data, train=True, transforms=transforms)
        return train, self.build_val_dataset()

    def build_val_dataset(self, all_pairs: bool = False) -> Dataset:
        """Validation data; `all_pairs`: of given folders take all, not the held-out share."""
        data = self.cfg.data
        transforms = MattingEval(data.eval_size, data.eval_radius)
        if data.name == "shapes":
            size = max(data.crop_sizes)
            first = FIRST_VAL_SCENE
            return ShapesDataset(size, data.seed, data.val_size, first, transforms, _PARTS)
        pairs = composition_pairs if data.name == "composed" else matting_pairs
        return pairs(data, train=False, transforms=transforms, all_pairs=all_pairs)

    def check_data(self, dataset: Dataset) -> None:
        """Check the files."""
        check_matting_files(dataset)

    def prepare_data(self, train_set: Dataset | None, val_set: Dataset) -> dict:
        """Check the files, then what the alphas hold."""
        super().prepare_data(train_set, val_set)
        reader = getattr(unwrap_subset(val_set)[0], "read_target", None)
        if not isinstance(reader, MaskReader):  # one that reads trimaps, too
            reader = MaskReader(self.cfg.data.mask_channel)
        check_grey_masks(train_set, val_set, reader, "Save alphas with levels from 0 to 255.")
        return {}

    def build_models(self) -> dict[str, nn.Module]:
        return {"model": DeepMatting(self.cfg.model.channels)}

    def initialise(self, models: dict[str, nn.Module]) -> None:
        """Load the encoder's weights, if the recipe names any."""
        weights = self.cfg.model.weights
        if not weights:
            return
        network = models["model"]
        assert isinstance(network, DeepMatting)
        try:
            network.load_backbone(backbone_state(weights, "vgg16_bn"))
        except ValueError as error:
            raise UserError(
                f"model.weights {weights}: {error}. Use torchvision's vgg16_bn with "
                "model.channels=64, or null."
            ) from error

    def check_batches(self, smallest: int) -> None:
        """Refuse a smallest batch (of a step, on a process) on which batch norm could not train."""
        needed, side = DeepMatting.min_train_side, self.cfg.data.image_size
        if smallest == 1 and side < needed:
            raise UserError(
                f"data.image_size: images of {side} pixels end as a 1×1 map, and some step has "
                "a single image on some process, on which batch norm cannot train. Use "
                f"{needed} pixels or more, or another --batch-size."
            )

    def losses(self, models: Models, batch: Batch) -> dict[str, Tensor]:
        """The losses of the unknown pixels; without foreground and background that of alpha alone.

        batch: input [B, 4, S, S], target [B, 2, S, S] (see `transforms.MattingTrain`), and maybe
        foreground and background [B, 3, S, S], all uint8.
        """
        inputs, target, *parts = batch
        predicted = torch.sigmoid(models["model"](self.normalize(inputs)))
        alpha, unknown = target[:, :1], target[:, 1:] == UNKNOWN
        of_alpha = alpha_prediction_loss(predicted, alpha, unknown)
        if not parts:
            return {"loss": of_alpha, "alpha": of_alpha.detach()}
        of_colours = compositional_loss(predicted, parts[0], parts[1], inputs[:, :3], unknown)
        w = 0.5 if self.cfg.loss.alpha_weight is None else self.cfg.loss.alpha_weight
        loss = w * of_alpha + (1 - w) * of_colours
        shown = {"alpha": of_alpha.detach(), "compositional": of_colours.detach()}
        return {"loss": loss, **shown}

    def weight(self, batch: Batch) -> float:
        """Unknown pixels."""
        return float((batch[1][:, 1] == UNKNOWN).sum())

    def predict(self, models: Models, inputs: Tensor) -> Tensor:
        """Alpha [B, 1, h, w], true to the trimap, of uint8 inputs [B, 4, h, w]."""

        def alpha_of(models: Models, inputs: Tensor) -> Tensor:
            alpha, trimap = models["model"](self.normalize(inputs)), inputs[:, 3:]
            return alpha.masked_fill(trimap == BACKGROUND, 0).masked_fill(trimap == FOREGROUND, 1)

        by_tiles = limited(alpha_of, self.cfg.eval.max_pixels, STRIDE, _TILE_MARGIN)
        return by_tiles(models, inputs)

    def normalize(self, images: Tensor) -> Tensor:
        """Colours as of any photograph; the trimap becomes 0, 0.502 and 1."""
        return normalize_images(images, (*self.cfg.data.mean, 0.0), (*self.cfg.data.std, 1.0))

    def network_input(
        self, image: Tensor, sides: Sequence[int] | None = None, trimap: Tensor | None = None
    ) -> Tensor:
        """What evaluation would feed of an image, uint8 [4, h, w]; all of it unknown by default."""
        trimap = torch.full_like(image[:1], UNKNOWN) if trimap is None else trimap
        return matting_input(image, trimap, self.cfg.data.eval_size)

    def render(
        self,
        image: Tensor,
        prediction: Tensor,
        kinds: Sequence[str],
        threshold: float | None = None,
        trimap: Tensor | None = None,
    ) -> dict[str, Image.Image]:
        """Pictures to write, at the image's own size.

        map: 8-bit alpha, as evaluation scores it. cutout: RGBA with that alpha and the foreground's
        estimated colours, so that nothing of the old background shows on a new one. `trimap`, uint8
        [1, H, W], holds where it knows better; `threshold` has no meaning here.
        """
        trimap = torch.full_like(image[:1], UNKNOWN) if trimap is None else trimap
        alpha = finish_alpha(prediction, trimap).cpu()
        codes = (alpha * 255).round().to(torch.uint8)
        pictures = {"map": Image.fromarray(codes.numpy())}
        if "cutout" in kinds:
            colours = estimate_foreground(image, alpha)
            rgba = torch.cat([colours, codes[None]]).permute(1, 2, 0)
            pictures["cutout"] = Image.fromarray(rgba.contiguous().numpy())
        return pictures

    def make_metrics(self) -> tuple[ExactMetric, ...]:
        return (MattingMetrics(self.trimap_policy()),)

    def trimap_policy(self) -> str:
        """Where validation trimaps come from: scores compare under one policy only."""
        data = self.cfg.data
        if data.val_trimaps or data.trimaps:
            return "given with the images"
        return f"made from alpha, radius {data.eval_radius}"

    def sheet_row(self, sample: Sample) -> list[Tensor]:
        """image | trimap | truth | prediction."""
        truth, trimap = sample.target[:1], sample.target[1:]
        finished = finish_alpha(sample.prediction, trimap)
        return [sample.image[:3], trimap, truth, finished[None].float()]
