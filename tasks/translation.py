"""Paired image translation with pix2pix (Isola et al., CVPR 2017)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from my_dataset import ShapesDataset, image_reader
from src.pix2pix import PatchDiscriminator, UNetGenerator, init_weights, smallest_side
from tasks.settings import FIRST_VAL_SCENE, BaseConfig, FolderData, OptimConfig
from train_utils.distributed_utils import unwrap
from train_utils.errors import UserError
from train_utils.image_io import read_image
from train_utils.losses import l1_term, least_squares_gan
from train_utils.metrics import ExactMetric
from train_utils.normalize import normalize_images
from train_utils.schedule import make_optimizers
from train_utils.train_and_eval import Backward, Batch, Models, Sample
from train_utils.translation_metrics import TranslationMetrics, codes_of, translated
from transforms import TranslationEval, TranslationTrain, predict_input
from translation_data import check_translation_pairs, translation_pairs

METRICS = {"L1": "min", "PSNR": "max", "SSIM": "max"}
PREDICT_FLAGS: dict[str, bool] = {}

# 8-bit codes to [-1, 1], the range of the generator's tanh
_normalize = partial(normalize_images, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass
class DataConfig(FolderData):
    """Where pairs of images A and B come from (`images`: A, `masks`: B), and their preparation."""

    layout = "aligned"

    # aligned: root holds A|B side by side, or folders A and B, in train and val (or test);
    # shapes: A is the scene, B its label map
    name: Literal["shapes", "aligned", "folders"] | None = None
    image_size: int = 256
    direction: Literal["AtoB", "BtoA"] = "AtoB"
    load_size: int | None = None  # resized to it before the random crop; null: image_size × 286/256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loaded < self.image_size:
            raise ValueError("load_size: must not be smaller than image_size")

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
        for name in ("channels", "levels", "d_channels", "d_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
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


# -- data -----------------------------------------------------------------------------------------


def build_datasets(cfg: Config) -> tuple[Dataset, Dataset]:
    """Training and validation pairs (source, target)."""
    data = cfg.data
    jitter = TranslationTrain(data.image_size, data.loaded, data.hflip, data.direction)
    if data.name == "shapes":
        train: Dataset = ShapesDataset(
            data.image_size, data.seed, data.train_size, transforms=jitter, target="labels"
        )
    else:
        train = _pairs(data, train=True, transforms=jitter)
    return train, build_val_dataset(cfg)


def build_val_dataset(cfg: Config, all_pairs: bool = False) -> Dataset:
    """Validation pairs; `all_pairs`: where none are set apart take all, not the held-out share."""
    data = cfg.data
    transforms = TranslationEval(data.image_size, data.direction)
    if data.name == "shapes":
        return ShapesDataset(
            data.image_size, data.seed, data.val_size, FIRST_VAL_SCENE, transforms, target="labels"
        )
    return _pairs(data, train=False, transforms=transforms, all_pairs=all_pairs)


def _pairs(data: DataConfig, train: bool, **options: Any) -> Dataset:
    if data.name == "aligned" and not data.root:
        raise UserError(
            "data.root: this recipe trains on pairs of images. Give their folder by "
            "--data-path DIR, or two folders by --images A --masks B."
        )
    source = image_reader(data, data.loaded if train else data.image_size)
    readers = (source, read_image) if data.direction == "AtoB" else (read_image, source)
    return translation_pairs(data, train, readers=readers, **options)


def prepare_data(cfg: Config, train_set: Dataset | None, val_set: Dataset, workers: int) -> dict:
    """Refuse pairs that cannot be read, cannot be halved or differ in size; nothing is derived."""
    for dataset in (train_set, val_set):
        if dataset is not None:
            check_translation_pairs(dataset)
    return {}


# -- networks -------------------------------------------------------------------------------------


def build_models(cfg: Config) -> dict[str, nn.Module]:
    model = cfg.model
    return {
        "generator": UNetGenerator(
            3, 3, model.channels, model.levels, model.norm, dropout=model.dropout
        ),
        "discriminator": PatchDiscriminator(6, model.d_channels, model.d_layers, model.norm),
    }


def initialise(cfg: Config, models: dict[str, nn.Module]) -> None:
    for network in models.values():
        init_weights(network)


def build_optimizers(cfg: Config, models: dict[str, nn.Module], steps_per_epoch: int) -> tuple:
    """Optimizers and schedules by network, of `optim` and of `optim_d`."""
    sections = {"generator": cfg.optim, "discriminator": cfg.optim_d}
    return make_optimizers(models, sections, steps_per_epoch, cfg.train.epochs)


def check_batches(cfg: Config, smallest: int) -> None:
    """Every batch will do: norms see maps of 2×2 or more, even for a single image.

    The generator's innermost map, the only one of a single pixel, is not normalised, and the
    smallest image that the discriminator takes has 2×2 at its last norm.
    """


# -- steps ----------------------------------------------------------------------------------------


def loss_counts(cfg: Config) -> Callable[[Batch], dict[str, float]]:
    return _image_count


def _image_count(batch: Batch) -> dict[str, float]:
    return {"images": float(len(batch[0]))}


def train_step(cfg: Config) -> Callable:
    return partial(pix2pix_step, l1_weight=cfg.loss.l1_weight)


def pix2pix_step(
    models: Models,
    batch: Batch,
    counts: dict[str, float],
    backward: Backward,
    l1_weight: float = 100.0,
) -> dict[str, Tensor]:
    """Gradients of one pix2pix step, on a batch (source, target) of [B, 3, H, W].

    G minimises (D(G(x), x) − 1)² + λ·|y − G(x)|; D minimises ½·(D(y, x) − 1)² + ½·D(G(x), x)²,
    averaged over patches or pixels, then over images.

    Both gradients are taken before either optimizer steps. That is the usual order, in which G
    steps first: D's loss sees neither G's weights nor a newer fake, only the fake that is already
    there, detached, and G's loss is done with D by then.
    """
    generator, discriminator = models["generator"], models["discriminator"]
    source, target = map(_normalize, batch)
    images = counts["images"]

    fake = generator(source)
    # Without DistributedDataParallel's wrapper: its reducer must see D's own two passes only.
    with _frozen(unwrap(discriminator)) as judge:
        gan = least_squares_gan(judge(fake, source), 1.0, images)
        pixel = l1_term(fake, target, images)
        loss = gan + l1_weight * pixel
        backward("generator", loss)

    on_real = least_squares_gan(discriminator(target, source), 1.0, images)
    on_fake = least_squares_gan(discriminator(fake.detach(), source), 0.0, images)
    d_loss = (on_real + on_fake) / 2
    backward("discriminator", d_loss)
    named = {"loss": loss, "GAN": gan, "pixel": pixel, "D": d_loss}
    return {name: value.detach() for name, value in named.items()}


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


def predict(cfg: Config) -> Callable:
    """(networks, uint8 images [B, 3, H, W]) → images [B, 3, H, W] in [-1, 1].

    Without dropout, which the paper keeps as noise at test time: one input gives one output.
    """
    return _generate


def _generate(models: Models, images: Tensor) -> Tensor:
    return models["generator"](_normalize(images)).float()


# -- prediction of files --------------------------------------------------------------------------


def network_input(cfg: Config, image: Tensor, sides: Sequence[int] | None = None) -> Tensor:
    """What evaluation would feed of this image, uint8 [3, S, S], whatever the file's `sides`."""
    return predict_input(image, cfg.data.image_size).as_subclass(Tensor)


def render(
    cfg: Config, image: Tensor, prediction: Tensor, kinds: Sequence[str], threshold: float | None
) -> dict[str, Image.Image]:
    """map: the translated RGB image at the input's own size, as evaluation scores it."""
    codes = codes_of(translated(prediction, image.shape[-2:])).cpu()
    return {"map": Image.fromarray(codes.permute(1, 2, 0).contiguous().numpy())}


# -- results --------------------------------------------------------------------------------------


def make_metrics(cfg: Config) -> tuple[ExactMetric, ...]:
    return (TranslationMetrics(),)


def sheet_row(cfg: Config, sample: Sample) -> list[Tensor]:
    """source | generated | target."""
    generated = translated(sample.prediction, sample.prediction.shape[-2:])
    return [sample.image, generated, sample.target]
