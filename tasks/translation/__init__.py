"""Paired image translation with pix2pix (Isola et al., CVPR 2017)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from my_dataset import ShapesDataset
from src.pix2pix import PatchDiscriminator, UNetGenerator, init_weights, smallest_side
from tasks.translation.data import check_translation_pairs, pair_aspect, translation_pairs
from tasks.translation.losses import l1_term, least_squares_gan
from tasks.translation.metrics import TranslationMetrics, codes_of, translated
from train_utils.distributed_utils import unwrap
from train_utils.errors import UserError, require_between
from train_utils.log import say_once
from train_utils.metrics import ExactMetric
from train_utils.normalize import normalize_images
from train_utils.settings import (
    FIRST_VAL_SCENE,
    MAX_CHANNELS,
    MAX_SIDE,
    BaseConfig,
    FolderData,
    OptimConfig,
)
from train_utils.task import BaseTask
from train_utils.train_and_eval import Batch, Models, Sample
from transforms import TranslationEval, TranslationTrain, predict_input

_FIELDS = "image", "labels"  # of an embedded scene


@dataclass
class DataConfig(FolderData):
    """Where pairs of images A and B come from (`images`: A, `masks`: B), and their preparation."""

    layout = "aligned"
    sources = (*FolderData.sources, "pair_aspect")

    # aligned: root holds A|B side by side, or folders A and B, in train and val (or test);
    # shapes: A is the scene, B its label map
    name: Literal["shapes", "aligned", "folders"] | None = None
    image_size: int = 256
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    # Width / height of files A|B, of which predict.py takes the input's half; 0: it takes all files
    # whole. null: what training has found, 2 for older weights of `aligned`
    pair_aspect: float | None = None
    load_size: int | None = None  # resized to it before the random crop; null: image_size × 286/256

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(self, 1, 2 * MAX_SIDE, "load_size")
        require_between(self, 0, 2 * MAX_SIDE, "pair_aspect")
        if self.loaded < self.image_size:
            raise ValueError("load_size: must not be smaller than image_size")

    def is_pair(self, height: int, width: int) -> bool:
        """Whether a file of this size is taken for A|B."""
        aspect = self.pair_aspect
        if aspect is None:
            aspect = 2.0 if self.name == "aligned" else 0.0
        return width % 2 == 0 and width == round(aspect * height)

    @property
    def loaded(self) -> int:
        """Side to which training images are resized before the crop."""
        return self.load_size or round(self.image_size * 286 / 256)


@dataclass
class ModelConfig:
    """The generator, a U-Net, and the discriminator, a PatchGAN (d_…)."""

    name: Literal["pix2pix"] = "pix2pix"
    channels: int = 64  # of the first level; the deepest have 8 times as many
    levels: int = 8  # halvings; 2^levels is the side that the innermost pixel sees whole
    d_channels: int = 64
    d_layers: int = 3  # 3: patches of 70×70 pixels
    norm: Literal["instance", "batch"] = "instance"
    dropout: float = 0.5  # in the three innermost decoder levels

    def __post_init__(self) -> None:
        require_between(self, 1, MAX_CHANNELS, "channels", "d_channels")
        require_between(self, 1, 14, "levels", "d_layers")  # each halves a side, of 2^14 at most
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout: must be at least 0 and below 1")


@dataclass
class LossConfig:
    """What the generator minimises: the GAN term + l1_weight × L1."""

    l1_weight: float = 100.0

    def __post_init__(self) -> None:
        if self.l1_weight < 0:
            raise ValueError("l1_weight: must not be negative")


@dataclass
class GeneratorOptim(OptimConfig):
    """The generator's optimizer; its learning rate halves every `halve_epochs`."""

    name: Literal["adamw", "adam", "sgd"] = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.5, 0.999)
    schedule: Literal["cosine", "constant", "halving"] = "halving"


@dataclass
class DiscriminatorOptim(GeneratorOptim):
    """The discriminator's optimizer."""

    schedule: Literal["cosine", "constant", "halving"] = "constant"


@dataclass
class Config(BaseConfig):
    """A translation recipe."""

    task: str = "translation"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: GeneratorOptim = field(default_factory=GeneratorOptim)
    optim_d: DiscriminatorOptim = field(default_factory=DiscriminatorOptim)

    def __post_init__(self) -> None:
        smallest = smallest_side(self.model.d_layers)
        if self.data.image_size < smallest:
            raise ValueError(
                f"data.image_size: must be at least {smallest} for {self.model.d_layers} "
                "discriminator layers. Use larger images or a smaller model.d_layers."
            )


def _pairs(data: DataConfig, train: bool, **options: Any) -> Dataset:
    if data.name == "aligned" and not data.root:
        raise UserError(
            "data.root: this recipe trains on pairs of images. Give their folder by "
            "--data-path DIR, or two folders by --images A --masks B."
        )
    at_least = 2 * (data.loaded if train else data.image_size) if data.draft else None
    return translation_pairs(data, train, at_least=at_least, **options)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Let gradients pass through a network without collecting any for its parameters."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class Task(BaseTask):
    """pix2pix on pairs of source and target."""

    METRICS: ClassVar = {"L1": "min", "PSNR": "max", "SSIM": "max"}
    TARGETS: ClassVar = "pictures"
    TRAIN_FLAGS: ClassVar = {"data.direction": "AtoB or BtoA: what is made of what"}

    cfg: Config

    def build_datasets(self) -> tuple[Dataset, Dataset]:
        """Training and validation pairs (source, target)."""
        data = self.cfg.data
        jitter = TranslationTrain(data.image_size, data.loaded, data.hflip, data.direction)
        if data.name == "shapes":
            train: Dataset = ShapesDataset(
                data.image_size, data.seed, data.train_size, 0, jitter, fields=_FIELDS
            )
        else:
            train = _pairs(data, train=True, transforms=jitter)
        return train, self.build_val_dataset()

    def build_val_dataset(self, all_pairs: bool = False) -> Dataset:
        """Validation pairs; `all_pairs`: where none are set apart take all of them."""
        data = self.cfg.data
        transforms = TranslationEval(data.image_size, data.direction)
        if data.name == "shapes":
            return ShapesDataset(
                data.image_size,
                data.seed,
                data.val_size,
                FIRST_VAL_SCENE,
                transforms,
                _FIELDS,
            )
        return _pairs(data, train=False, transforms=transforms, all_pairs=all_pairs)

    def check_data(self, dataset: Dataset) -> None:
        """Refuse pairs that cannot be read, cannot be halved or differ in size."""
        check_translation_pairs(dataset)

    def prepare_data(self, train_set: Dataset | None, val_set: Dataset) -> dict:
        """Check the data; a training remembers the shape of its files A|B, for predict.py."""
        super().prepare_data(train_set, val_set)
        if train_set is None or self.cfg.data.name != "aligned":
            return {}
        return {"data": {"pair_aspect": pair_aspect(train_set)}}

    def build_models(self) -> dict[str, nn.Module]:
        model = self.cfg.model
        return {
            "generator": UNetGenerator(
                3, 3, model.channels, model.levels, model.norm, dropout=model.dropout
            ),
            "discriminator": PatchDiscriminator(6, model.d_channels, model.d_layers, model.norm),
        }

    def initialise(self, models: dict[str, nn.Module]) -> None:
        for network in models.values():
            init_weights(network)

    def optim_sections(self) -> dict[str, OptimConfig]:
        return {"generator": self.cfg.optim, "discriminator": self.cfg.optim_d}

    # `check_batches` has nothing to refuse: the generator's innermost map, the only one of a single
    # pixel, is not normalised, and the discriminator's last norm sees maps of 2×2 at least.

    def losses(self, models: Models, batch: Batch) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """G minimises (D(G(x), x) − 1)² + λ·|y − G(x)|, D ½·(D(y, x) − 1)² + ½·D(G(x), x)².

        batch: (source x, target y), [B, 3, H, W] each. Both gradients are taken before either
        optimizer steps. That is the usual order, in which G steps first: D's loss sees neither G's
        weights nor a newer fake, only the fake that is already there, detached.
        """
        generator, discriminator = models["generator"], models["discriminator"]
        source, target = map(self.normalize, batch)

        fake = generator(source)
        # Without DistributedDataParallel's wrapper: its reducer must see D's own two passes only.
        with _frozen(unwrap(discriminator)) as critic:
            gan = least_squares_gan(critic(fake, source), 1.0)
        pixel = l1_term(fake, target)
        loss = gan + self.cfg.loss.l1_weight * pixel
        yield "generator", {"loss": loss, "GAN": gan.detach(), "pixel": pixel.detach()}

        on_real = least_squares_gan(discriminator(target, source), 1.0)
        on_fake = least_squares_gan(discriminator(fake.detach(), source), 0.0)
        yield "discriminator", {"D": (on_real + on_fake) / 2}

    def predict(self, models: Models, inputs: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of uint8 images [B, 3, H, W].

        Without dropout, which the paper keeps as noise at test time: one input gives one output.
        """
        return models["generator"](self.normalize(inputs)).float()

    def normalize(self, images: Tensor) -> Tensor:
        """8-bit codes to [-1, 1], the range of the generator's tanh."""
        return normalize_images(images, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def input_of(self, image: Tensor, sides: Sequence[int]) -> Tensor:
        """The half of A|B that is translated, where a file has the shape of those trained on."""
        height, width = sides
        if not self.cfg.data.is_pair(height, width):
            return image
        half, of_a = image.shape[-1] // 2, self.cfg.data.direction == "AtoB"
        say_once(
            f"files {width / height:g} times as wide as high are taken for A|B, as in training: "
            f"{'A' if of_a else 'B'} is translated (--set data.pair_aspect=0 takes them whole)"
        )
        return image[..., :half] if of_a else image[..., -half:]

    def network_input(self, image: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """What evaluation would feed of an image, uint8 [3, S, S], whatever the file's `sides`."""
        return predict_input(image, self.cfg.data.image_size).as_subclass(Tensor)

    def render(
        self, image: Tensor, prediction: Tensor, kinds: Sequence[str], threshold: float | None
    ) -> dict[str, Image.Image]:
        """map: the translated RGB image at the input's own size, as evaluation scores it."""
        codes = codes_of(translated(prediction, image.shape[-2:])).cpu()
        return {"map": Image.fromarray(codes.permute(1, 2, 0).contiguous().numpy())}

    def make_metrics(self) -> tuple[ExactMetric, ...]:
        return (TranslationMetrics(),)

    def sheet_row(self, sample: Sample) -> list[Tensor]:
        """source | generated | target."""
        generated = translated(sample.prediction, sample.prediction.shape[-2:])
        return [sample.image, generated, sample.target]
