"""What the scripts ask of a system that they train, with a default for what most have in common."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from train_utils.check.findings import Targets
from train_utils.config import build, merge, to_dict
from train_utils.errors import UserError, described
from train_utils.metrics import ExactMetric
from train_utils.normalize import normalize_images
from train_utils.schedule import make_optimizer, make_schedule
from train_utils.settings import BaseConfig, OptimConfig, PhotoData
from train_utils.train_and_eval import Batch, Losses, Models, Sample

Self = TypeVar("Self", bound="BaseTask")


class SizedDataset(Protocol):
    """A torch Dataset that knows its length, as all do but torch's own type."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class BaseTask:
    """One system: its data, networks, losses, metrics and pictures.

    Each is the class `Task` of a folder `tasks/<name>`, and states what is its own. METRICS: score
    → "max" or "min"; the first one decides the best checkpoint unless `train.best` names another.
    LABELS: whether targets are class indices, not values. TARGETS: what check.py takes them for.
    EXTRA_INPUTS: what lies beside every image in a file of its own → the reader of such a file,
    [C, H, W]; predict.py has a flag of that name, and `network_input` and `render` an argument.
    PREDICT_FLAGS: which of these and of predict.py's `cutout`, `overlay` and `threshold` it takes
    → whether it needs them.
    SCORE_FLAGS: switches that validation.py has for it → what its --help says.
    TRAIN_FLAGS: keys of the config for which train.py has a flag of the same name, likewise.
    """

    METRICS: ClassVar[Mapping[str, str]] = {}
    LABELS: ClassVar[bool] = False
    TARGETS: ClassVar[Targets] = "masks"
    EXTRA_INPUTS: ClassVar[Mapping[str, Callable[[Path], Tensor]]] = {}
    PREDICT_FLAGS: ClassVar[Mapping[str, bool]] = {}
    SCORE_FLAGS: ClassVar[Mapping[str, str]] = {}
    TRAIN_FLAGS: ClassVar[Mapping[str, str]] = {}

    cfg: BaseConfig  # a task's own Config

    def __init__(self, cfg: BaseConfig) -> None:
        self.cfg = cfg

    @property
    def name(self) -> str:
        """The folder's name, as `task:` of a recipe gives it."""
        return type(self).__module__.split(".")[1]

    @property
    def legend(self) -> Mapping[str, Sequence[int]]:
        """Where targets are classes, their names in order and a colour of each."""
        return {}

    @property
    def outputs(self) -> str:
        """What networks must return, for messages."""
        return ""

    def _undefined(self, method: str) -> UserError:
        return UserError(
            f'tasks/{self.name}: Task defines no {method}(). Add it as the table under "How to add '
            'a task" in docs/architecture.md says.'
        )

    def with_values(self: Self, values: dict[str, Any]) -> Self:
        """The task with some settings replaced, e.g. by what `prepare_data` found."""
        if not values:
            return self
        return type(self)(build(type(self.cfg), merge(to_dict(self.cfg), values), "data"))

    # -- data ---------------------------------------------------------------------------------

    def build_datasets(self) -> tuple[Dataset, Dataset]:
        """Training and validation data; an item is (image, target), maybe with more behind."""
        raise self._undefined("build_datasets")

    def build_val_dataset(self, all_pairs: bool = False) -> Dataset:
        """Validation data; `all_pairs`: of folders that would be split take all pairs."""
        raise self._undefined("build_val_dataset")

    def prepare_data(self, train_set: Dataset | None, val_set: Dataset) -> dict:
        """Check the data; returns settings that they decide, by section."""
        for dataset in (train_set, val_set):
            if dataset is not None:
                self.check_data(dataset)
        return {}

    def check_data(self, dataset: Dataset) -> None:
        """Refuse a dataset whose files cannot be used, before the first step."""

    def check_item(self, image: Tensor, target: Tensor, training: bool) -> None:
        """Raise ValueError for an item, of a dataset of one's own, that the task cannot take.

        By default targets have their image's size in training, and floats lie in [0, 1].
        """
        size, own = ("×".join(map(str, x.shape[-2:])) for x in (image, target))
        if training and size != own:
            raise ValueError(
                f"its target has {own} pixels, and its image {size}. Resize the target in the "
                "dataset, class indices by nearest neighbour."
            )
        low, high = target.aminmax()
        if target.is_floating_point() and not 0 <= low <= high <= 1:
            raise ValueError(
                f"its target has values from {low:g} to {high:g}. Give floats in [0, 1], uint8 "
                "codes or bool."
            )

    def check_batches(self, smallest: int) -> None:
        """Refuse a smallest batch (of a step, on a process) on which the networks cannot train."""

    # -- networks -----------------------------------------------------------------------------

    def build_models(self) -> dict[str, nn.Module]:
        """The networks by name; `model` where there is one."""
        raise self._undefined("build_models")

    def initialise(self, models: dict[str, nn.Module]) -> None:
        """Give networks the weights that a new training starts from, if not torch's own."""

    def optim_sections(self) -> dict[str, OptimConfig]:
        """The section of the config that says how a network is trained, by network."""
        return {"model": self.cfg.optim}

    def build_optimizers(self, models: Models) -> dict[str, Optimizer]:
        """Optimizers by network."""
        return {n: make_optimizer(models[n], optim) for n, optim in self.optim_sections().items()}

    def build_schedulers(
        self, optimizers: Mapping[str, Optimizer], steps_per_epoch: int
    ) -> dict[str, LambdaLR]:
        """Learning-rate schedules by network, for whatever optimizers."""
        epochs = self.cfg.train.epochs
        return {
            name: make_schedule(optimizers[name], optim, steps_per_epoch, epochs)
            for name, optim in self.optim_sections().items()
        }

    def check_models(self, models: Models, batch: Batch) -> None:
        """Refuse networks that would train without an error, but on outputs of the wrong kind.

        models: copies in training mode, but for their normalisation and dropout. batch: one sample.
        """

    @classmethod
    def adopt_weights(cls, state_dict: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]] | None:
        """(settings, weights in our names) of another project's weights that fit; else None."""
        return None

    def with_classes(self: Self, count: int) -> Self | None:
        """The task for another number of classes, of whose networks only the head differs.

        A training may then start from weights for another number. None: the number is fixed.
        """
        return None

    # -- training -----------------------------------------------------------------------------

    def losses(self, models: Models, batch: Batch) -> Losses | Iterable[tuple[str, Losses]]:
        """The batch's losses by name, each the mean over this batch.

        Those with a gradient are added up and minimised; detached ones, and numbers, are only
        logged. With several networks: a generator of (network, losses), which goes on after that
        network's backward pass. A mean is over images unless `weight` says otherwise: how a step is
        cut into batches, and shared out over processes, then changes nothing.
        """
        raise self._undefined("losses")

    def weight(self, batch: Batch) -> float | Mapping[str, float]:
        """What the means of `losses` are over, of a batch on the host: its number of images.

        One number for all of them, or a dict of those that differ, by the names of the losses.
        """
        return float(len(batch[0]))

    # -- evaluation ---------------------------------------------------------------------------

    def predict(self, models: Models, inputs: Tensor) -> Tensor:
        """What is scored and written, [B, C, h, w] in fp32, for inputs as the data give them."""
        raise self._undefined("predict")

    def make_metrics(self) -> tuple[ExactMetric, ...]:
        """Metrics at zero."""
        raise self._undefined("make_metrics")

    def metrics_with(self, flags: Collection[str]) -> tuple[ExactMetric, ...]:
        """Metrics at zero, as validation.py has them under these of SCORE_FLAGS."""
        return self.make_metrics()

    def pairs_of_files(self, predictions: str, targets: str) -> SizedDataset:
        """Predictions of any program with their targets, from a folder each, as metrics take them.

        Raises UserError for a task that cannot be scored from files.
        """
        raise UserError(
            f"--predictions: {self.name} is scored with its network only. Give --weights instead."
        )

    def curves(self, metrics: Sequence[ExactMetric]) -> dict[str, dict[str, Tensor]]:
        """TensorBoard's precision–recall curves by tag."""
        return {}

    def sheet_row(self, sample: Sample) -> list[Tensor]:
        """A row of pictures: input | truth | prediction."""
        return [sample.image, sample.target, sample.prediction]

    # -- prediction of files ------------------------------------------------------------------

    def input_of(self, image: Tensor, sides: Sequence[int]) -> Tensor:
        """The part of a file's image, uint8 [3, h, w], that is the input: all, or as in training.

        sides: (H, W) of the file, which may have been read at a reduced size.
        """
        return image

    def network_input(self, image: Tensor, sides: Sequence[int] | None = None) -> Tensor:
        """What evaluation would feed of an image, uint8 [3, H, W].

        sides: (H, W) of the file, if `data.draft` had the image read at a reduced size.
        """
        raise self._undefined("network_input")

    def render(
        self, image: Tensor, prediction: Tensor, kinds: Sequence[str], threshold: float | None
    ) -> dict[str, Image.Image]:
        """Pictures to write, at the image's own size: `map`, and other `kinds`."""
        raise self._undefined("render")

    # -- for tasks to use ---------------------------------------------------------------------

    def make_network(self, name: str, make: Any, *args: Any, **options: Any) -> nn.Module:
        """make(…), what `src` exports by that name; UserError for what cannot be called so."""
        given = ", ".join([*map(repr, args), *(f"{key}={x!r}" for key, x in options.items())])
        try:
            inspect.signature(make).bind(*args, **options)
        except TypeError as error:
            raise UserError(
                f"src.{name}() cannot be called with ({given}), as {self.name} does: {error}. Have "
                "it take these arguments."
            ) from error
        network = make(*args, **options)
        if not isinstance(network, nn.Module):
            raise UserError(f"src.{name}() returns {described(network)}. Return an nn.Module.")
        return network

    def normalize(self, images: Tensor) -> Tensor:
        """Network input made of uint8 images; floats are taken as they are."""
        data = self.cfg.data
        assert isinstance(data, PhotoData), "data without mean and std: normalise them yourself"
        return normalize_images(images, data.mean, data.std)
