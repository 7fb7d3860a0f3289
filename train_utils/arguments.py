"""The command lines of training and validation."""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from train_utils.config import parse_value
from train_utils.errors import UserError, print_trace, printable


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def new_parser(
    description: str | None, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.ArgumentParser:
    """A parser that shows its description as it is written, on any console.

    From here on a console that cannot show "→" prints an escape instead of ending the run, and
    warnings and traces of Python's, like all that we print, cannot steer it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _one_line
    sys.excepthook = print_trace
    how = argparse.RawDescriptionHelpFormatter
    return _Parser(description=description, formatter_class=how, parents=list(parents))


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return printable(f"{filename}:{lineno}: {category.__name__}: {message}") + "\n"


def _value(text: str) -> Any:
    try:
        return parse_value(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_args(
    argv: list[str] | None = None, description: str | None = None, flags: Mapping[str, str] = {}
) -> argparse.Namespace:
    """The command line of a training; flags: see `training_parser`."""
    parser = training_parser(description, flags)
    add = parser.add_argument
    add("--resume", metavar="auto|PATH", help="continue a run")
    add("--output-dir", metavar="DIR", help="default runs/<config>/<time>")
    add("--test-only", action="store_true", help="evaluate and exit")
    return parser.parse_args(argv)


def training_parser(
    description: str | None, flags: Mapping[str, str], *more: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """What a new training takes; a flag whose dest has a dot sets that key of the config.

    flags: keys for which tasks want a flag (`BaseTask.TRAIN_FLAGS`) → what --help says. more: what
    the script itself takes.
    """
    parser = new_parser(description, more)

    def add(*names: str, **options: Any) -> None:
        defaults = {"default": argparse.SUPPRESS} | ({"metavar": "N"} if "type" in options else {})
        parser.add_argument(*names, **{**defaults, **options})

    add("--config", default=None, metavar="YAML", help="recipe (default configs/shapes.yaml)")
    add("--data-path", dest="data.root", metavar="DIR", help="the data set's folder")
    add("--images", dest="data.images", metavar="DIR", help="any folder of images …")
    add("--masks", dest="data.masks", metavar="DIR", help="… and the folder of their masks")
    add("--val-images", dest="data.val_images", metavar="DIR", help="default: a held-out share")
    add("--val-masks", dest="data.val_masks", metavar="DIR")
    for key, about in flags.items():
        name = key.rpartition(".")[2].replace("_", "-")
        add(f"--{name}", dest=key, type=_value, metavar="VALUE", help=about)
    add(
        "--cache",
        dest="data.cache",
        choices=["none", "ram", "disk"],
        help="keep decoded samples for later epochs (default none)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu, mps (default auto)")
    add("-b", "--batch-size", dest="train.batch_size", type=int, help="images per process")
    add("-j", "--workers", dest="train.workers", type=int, help="loader workers per process")
    add("--epochs", dest="train.epochs", type=int)
    add("--lr", dest="optim.lr", type=float, help="learning rate")
    add("--wd", "--weight-decay", dest="optim.weight_decay", type=float)
    add(
        "--amp",
        dest="train.amp",
        nargs="?",
        const="auto",
        choices=["auto", "bf16", "fp16", "off"],
        help="mixed precision; auto: bf16 where it is fast (default)",
    )
    add("--sync-bn", dest="train.sync_bn", action="store_true", help="batch norm over all ranks")
    add("--compile", dest="train.compile", action="store_true", help="torch.compile (GPUs)")
    add("--deterministic", dest="train.deterministic", action="store_true")
    add(
        "--on-nonfinite",
        dest="train.on_nonfinite",
        choices=["stop", "skip"],
        help="at a step whose loss or gradient is NaN or infinite (default stop)",
    )
    add("--seed", dest="train.seed", type=int)
    add("--print-freq", dest="train.print_freq", type=int, metavar="STEPS")
    add("--eval-interval", dest="train.eval_interval", type=int, metavar="EPOCHS")
    add("--weights", dest="train.weights", metavar="FILE", help="start from these weights")
    add("--set", default=[], action="append", metavar="KEY=VALUE", help="any other config key")
    return parser


def parse_validation_args(
    argv: list[str] | None, description: str | None, switches: Mapping[str, str]
) -> argparse.Namespace:
    """The command line of validation.py; `switches` of tasks → what --help says of them."""
    parser = new_parser(description)
    add = parser.add_argument
    add("--weights", metavar="FILE", help="default: the newest best checkpoint under runs/")
    add("--config", metavar="YAML", help="recipe of weights that bring none with them")
    add("--data-path", metavar="DIR", help="the data set's folder; default: the training's data")
    add("--images", metavar="DIR", help="any folder of images, all of which are scored")
    add("--masks", metavar="DIR", help="the masks of --images or --predictions")
    add("--predictions", metavar="DIR", help="score these maps instead of a network")
    for name, about in switches.items():
        add(f"--{name}", action="store_true", help=about)
    add("--json", metavar="FILE", help="write the scores at full precision")
    add("--device", default="auto")
    add("-b", "--batch-size", type=int, default=8, help="images read at a time; changes no score")
    add("-j", "--workers", type=int, help="loader workers per process")
    add("--set", default=[], action="append", metavar="KEY=VALUE", help="override a config key")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or (args.workers is not None and args.workers < 0):
        parser.error("--batch-size must be at least 1 and --workers not negative")
    return args
