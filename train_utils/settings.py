"""The sections of a config that every task has; each key's meaning stands beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from train_utils.errors import UserError, require, require_between
from train_utils.normalize import IMAGENET_MEAN, IMAGENET_STD
from train_utils.pairing import Names

MAX_CHANNELS = 4096  # of a first stage; no network of this kind is as wide
MAX_SIDE = 2**14  # pixels of what a network is given
MAX_BATCH = 2**20  # images of a batch, forward passes of a step
_MAX_EPOCHS = 1_000_000
_MAX_WORKERS = 1024

# Validation scenes of the embedded data are drawn from here on, training scenes from 0.
FIRST_VAL_SCENE = 1_000_000


@dataclass
class FolderData:
    """Where pairs of image and target come from; a task adds its layouts and preparation."""

    layout: ClassVar[str] = ""  # what `root` means where no `name` is given
    # the keys that say where the data is
    sources: ClassVar[tuple[str, ...]] = (
        *("name", "root", "images", "masks", "val_images", "val_masks", "list", "val_list"),
    )
    skips_unequal: ClassVar[tuple[str, ...]] = ()  # layouts that are known to hold such pairs

    # null: folders where `images` is given, the task's layout where `root` is, else shapes
    name: str | None = None
    root: str | None = None  # the data set's folder
    images: str | None = None  # any folder of images …
    masks: str | None = None  # … and the folder of their targets, of the same names
    val_images: str | None = None  # null: a share of `images` is held out by the seed
    val_masks: str | None = None
    # A text file instead of folders: in each line an image and its mask, with a tab between them,
    # as paths from the list's folder.
    list: str | None = None
    val_list: str | None = None  # null: a share of `list` is held out
    # What names have around the part that an image and its mask share: _mask of x_mask.png. A
    # suffix may end as files do (_mask.png). Files without are left out.
    image_prefix: str | None = None
    image_suffix: str | None = None
    mask_prefix: str | None = None
    mask_suffix: str | None = None
    # Pairs whose mask has another size than its image. refuse: none is trained on; skip: they are
    # left out; resize: the mask is resized. null: skip in `skips_unequal`, else refuse
    unequal: Literal["refuse", "skip", "resize"] | None = None
    val_fraction: float = 0.1
    verify: bool = False  # decode every file before the first step, not only its header …
    skip_unreadable: bool = False  # … and train without the pairs that have a damaged file
    # Keep decoded samples for the epochs and runs to come, in memory that all processes of a
    # machine share or in a file; no sample changes. Files that change during a run are not noticed.
    cache: Literal["none", "ram", "disk"] = "none"
    cache_dir: str | None = None  # of disk; null: pixtrain/samples in the user's cache folder
    # Have the decoder scale large JPEGs down, by 2, 4 or 8: to no less than twice the side that
    # they are resized to. Faster, nearly the same pixels; prediction does it, too. Targets stay.
    draft: bool = False
    train_size: int = 400  # embedded scenes
    val_size: int = 80
    seed: int = 0  # of the embedded scenes and of the split
    image_size: int = 320  # side of the square that the network is trained on
    hflip: float = 0.5  # training: how often an image is mirrored

    def __post_init__(self) -> None:
        require_between(self, 1, MAX_SIDE, "image_size")
        require_between(self, 1, FIRST_VAL_SCENE, "train_size", "val_size")
        require(0 <= self.seed < 2**63, "seed", "must lie between 0 and 2^63 − 1")
        require(0 < self.val_fraction < 1, "val_fraction", "must lie between 0 and 1")
        require(0 <= self.hflip <= 1, "hflip", "must lie between 0 and 1")
        given = self.images or self.list
        self.name = self.name or ("folders" if given else self._layout_of_root())
        folders = self.name == "folders"
        if self.list and (self.root or self.images or self.masks or not folders):
            raise ValueError("list: says by itself what belongs together. Give no folders with it.")
        if (folders or self.masks) and not (self.list or (self.images and self.masks)):
            raise ValueError("images, masks: need each other. Give --images DIR --masks DIR.")
        if (self.val_images or self.val_masks) and not (folders and self.images):
            raise ValueError("val_images: go with --images DIR --masks DIR. Add them.")
        if bool(self.val_images) != bool(self.val_masks):
            raise ValueError("val_images, val_masks: need each other. Give both.")
        require(not self.val_list or bool(self.list), "val_list", "goes with list. Add it.")

    def _layout_of_root(self) -> str:
        return self.layout if self.root else "shapes"

    @property
    def names(self) -> tuple[Names, Names]:
        """What the names of images and of masks have around the part that they share."""
        of_images = Names(self.image_prefix or "", self.image_suffix or "")
        return of_images, Names(self.mask_prefix or "", self.mask_suffix or "")

    @property
    def on_unequal(self) -> str:
        """`unequal`, or what it is by default for this layout."""
        return self.unequal or ("skip" if self.name in self.skips_unequal else "refuse")

    def folders(self) -> tuple[str, ...]:
        """The settings that say where the data lie."""
        return tuple(f"data.{key}" for key in self.sources if key != "name")

    @property
    def at_least(self) -> int | None:
        """For `read_image`, in validation and prediction."""
        return 2 * self.image_size if self.draft else None


@dataclass
class PhotoData(FolderData):
    """Photographs, which networks see normalised by mean and standard deviation of [0, 1]."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        super().__post_init__()
        require(min(self.std) > 0, "std", "every value must be positive")


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4  # not of batch norm and biases
    momentum: float = 0.9  # of sgd
    betas: tuple[float, float] = (0.9, 0.999)  # of adam and adamw
    schedule: Literal["cosine", "constant", "halving"] = "cosine"
    warmup_epochs: float = 2  # cosine: linear warm-up first
    warmup_factor: float = 1e-3  # cosine: first learning rate / lr
    end_factor: float = 1e-6  # cosine: last learning rate / lr
    halve_epochs: int = 90  # halving: epochs between two halvings

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", "must be positive, e.g. 0.001")
        require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        require_between(self, 0, _MAX_EPOCHS, "warmup_epochs")
        require_between(self, 0, 1, "warmup_factor", "end_factor")
        require(0 <= self.momentum < 1, "momentum", "must lie between 0 and 1")
        for beta in self.betas:
            require(0 <= beta < 1, "betas", "must lie between 0 and 1")
        require_between(self, 1, _MAX_EPOCHS, "halve_epochs")


@dataclass
class TrainConfig:
    """The run: how long, how it is shared out, in which precision, what is kept."""

    epochs: int = 1
    batch_size: int = 8  # images per process and forward pass
    workers: int | None = None  # loader processes per training process; null: by the cores
    accumulate: int = 1  # forward passes per optimizer step
    clip_norm: float | None = None  # gradient clipping by the global norm
    clip_value: float | None = None  # gradient clipping by value
    ema: float | None = None  # decay of a moving average of the weights, e.g. 0.999
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 where it is fast
    tf32: bool = True  # GPUs may multiply fp32 in TF32, with 10 binary places; false: real fp32
    sync_bn: bool = False  # batch-norm statistics over all processes
    compile: bool = False  # torch.compile: pays on GPUs only
    deterministic: bool = False  # reproducible kernels where there are; torch warns of others
    seed: int = 0
    print_freq: int = 10  # steps per line
    eval_interval: int = 1  # epochs per evaluation; the last epoch is always evaluated
    best: str | None = None  # metric that decides the best checkpoint; null: the task's first
    keep: int = 2  # numbered checkpoints kept (of evaluated epochs, the newest)
    keep_every: int = 0  # epochs between numbered checkpoints that are kept for good (0: none)
    save_steps: int = 0  # also save every so many optimizer steps (0: at the ends of epochs)
    sample_interval: int = 0  # steps between sheets of predictions written as PNG (0: none)
    plateau_factor: float = 1.0  # × learning rates whenever the deciding metric did not improve …
    plateau_patience: int = 2  # … for so many evaluations
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is NaN or Inf
    hang_timeout: float = 300  # seconds without a move before a hanging process ends all (0: never)
    early_stop: int = 0  # end after so many evaluations without a better one (0: never)
    weights: str | None = None  # start from these weights

    def __post_init__(self) -> None:
        require_between(self, 1, _MAX_EPOCHS, "epochs")
        require_between(self, 1, MAX_BATCH, "batch_size", "accumulate")
        require_between(self, 0, _MAX_WORKERS, "workers")
        for name in ("print_freq", "eval_interval", "plateau_patience"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        # Beyond that the processes that wait are ended by the timeout of their collective.
        require(0 <= self.hang_timeout <= 1800, "hang_timeout", "must lie between 0 and 1800")
        require(0 < self.plateau_factor <= 1, "plateau_factor", "must lie between 0 and 1")
        require(0 <= self.seed < 2**63, "seed", "must lie between 0 and 2^63 − 1")
        for name in ("keep", "keep_every", "save_steps", "sample_interval", "early_stop"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        require(self.ema is None or 0 < self.ema < 1, "ema", "must lie between 0 and 1")
        for name in ("clip_norm", "clip_value"):
            clip = getattr(self, name)
            require(clip is None or clip > 0, name, "must be positive; null turns it off")


@dataclass
class EvalConfig:
    """Evaluation, in training and in validation.py."""

    batch_size: int = 8  # images read at a time; changes no result
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision, also of predict.py
    tf32: bool = True  # as train.tf32

    def __post_init__(self) -> None:
        require_between(self, 1, MAX_BATCH, "batch_size")


@dataclass
class BaseConfig:
    """What train.py itself reads; a task adds its own sections and narrows `task`."""

    task: str = ""
    data: FolderData = field(default_factory=FolderData)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def deciding_metric(cfg: BaseConfig, metrics: Mapping[str, str]) -> tuple[str, str]:
    """The metric that decides the best checkpoint, and whether its "max" or "min" is best.

    metrics: a task's METRICS, the first of which decides by default.
    """
    if not metrics:
        raise UserError(f"tasks/{cfg.task}: Task defines no METRICS, score → 'max' or 'min'.")
    name = cfg.train.best or next(iter(metrics))
    if name not in metrics:
        raise UserError(
            f"train.best: {name!r} is not tracked. Use one of {', '.join(metrics)}, or add it to "
            "METRICS of the task."
        )
    return name, metrics[name]
