"""The sections of a config that every task has; each key's meaning stands beside it."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: float = 2  # linear warm-up, then cosine
    warmup_factor: float = 1e-3  # first learning rate / lr
    end_factor: float = 1e-6  # last learning rate / lr

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", "must be positive, e.g. 0.001")
        _require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        _require(self.warmup_epochs >= 0, "warmup_epochs", "must not be negative")


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
    sync_bn: bool = False  # batch-norm statistics over all processes
    compile: bool = False  # torch.compile: pays on GPUs only
    deterministic: bool = False  # refuse nondeterministic kernels where torch can
    seed: int = 0
    print_freq: int = 10  # steps per line
    eval_interval: int = 1  # epochs per evaluation; the last epoch is always evaluated
    best: str | None = None  # metric that decides the best checkpoint; null: the task's first
    keep: int = 2  # numbered checkpoints kept (of evaluated epochs, the newest)
    save_steps: int = 0  # also save every so many optimizer steps (0: at the ends of epochs)
    weights: str | None = None  # start from these weights

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "print_freq", "eval_interval"):
            _require(getattr(self, name) >= 1, name, "must be at least 1")
        _require(0 <= self.seed < 2**63, "seed", "must lie between 0 and 2^63 − 1")
        for name in ("keep", "save_steps"):
            _require(getattr(self, name) >= 0, name, "must not be negative")
        _require(self.workers is None or self.workers >= 0, "workers", "must not be negative")
        _require(self.ema is None or 0 < self.ema < 1, "ema", "must lie between 0 and 1")
        for name in ("clip_norm", "clip_value"):
            clip = getattr(self, name)
            _require(clip is None or clip > 0, name, "must be positive; null turns it off")


@dataclass
class EvalConfig:
    """Evaluation, in training, in validation.py and (post_norm) in predict.py."""

    batch_size: int = 8  # images read at a time; changes no result
    post_norm: bool = False  # stretch each prediction to [0, 1] before it is scored and written

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "batch_size", "must be at least 1")


@dataclass
class BaseConfig:
    """What train.py itself reads; a task adds its own sections and narrows `task`."""

    task: str = ""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def _require(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{key}: {problem}")
