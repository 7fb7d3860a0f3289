"""The command lines of training and validation, and the config that a training's comes to.

A training reads its command line before it imports what takes seconds, torch above all: --help and
mistakes are answered at once, and its process is set up first. Hence the imports inside functions.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train_utils.task import BaseTask

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "shapes.yaml"


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows its description as it is written, on any console.

    One that cannot show "→" prints an escape from here on instead of ending the run.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw)


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The command line of a training; a flag whose dest has a dot sets that key of the config."""
    parser = new_parser(description)

    def add(*names: str, **options: Any) -> None:
        defaults = {"default": argparse.SUPPRESS} | ({"metavar": "N"} if "type" in options else {})
        parser.add_argument(*names, **{**defaults, **options})

    add("--config", default=None, metavar="YAML", help="recipe (default configs/shapes.yaml)")
    add("--data-path", dest="data.root", metavar="DIR", help="the data set's folder")
    add("--images", dest="data.images", metavar="DIR", help="any folder of images …")
    add("--masks", dest="data.masks", metavar="DIR", help="… and the folder of their masks")
    add("--val-images", dest="data.val_images", metavar="DIR", help="default: a held-out share")
    add("--val-masks", dest="data.val_masks", metavar="DIR")
    add("--direction", dest="data.direction", choices=["AtoB", "BtoA"], help="of pix2pix")
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
    add("--lr", dest="optim.lr", type=float, help="of pix2pix's generator; D has optim_d.lr")
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
    add("--resume", default=None, metavar="auto|PATH", help="continue a run")
    add("--output-dir", default=None, metavar="DIR", help="default runs/<config>/<time>")
    add("--test-only", default=False, action="store_true", help="evaluate and exit")
    add("--set", default=[], action="append", metavar="KEY=VALUE", help="any other config key")
    return parser.parse_args(argv)


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


def configure(args: argparse.Namespace) -> "tuple[BaseTask, Path | None, dict | None]":
    """The task, with its config, and the checkpoint to continue from with its content, if any.

    Precedence: defaults, the checkpoint's settings, --config, flags and --set.
    """
    import tasks
    from train_utils.checkpoint import load_training_state
    from train_utils.config import load_yaml, merge, parse_assignments
    from train_utils.errors import UserError
    from train_utils.run_folder import LAST, find_resume, restarted_run
    from train_utils.settings import deciding_metric

    flags = [(*key.split("."), value) for key, value in vars(args).items() if "." in key]
    overrides = merge(
        {}, *({section: {key: value}} for section, key, value in flags), parse_assignments(args.set)
    )
    name = args.run_name = Path(args.config or DEFAULT_CONFIG).stem
    if not args.test_only and (run := restarted_run(args.resume, args.output_dir, name)):
        args.output_dir = str(run)
        args.resume = str(run) if (run / LAST).exists() else args.resume
    resume = find_resume(args.resume, args.output_dir, name)
    saved = load_training_state(resume) if resume else None
    if saved:
        saved["args"] = tasks.complete(saved["args"], str(resume))
    source = str(args.config or (resume if saved else DEFAULT_CONFIG))
    recipe = load_yaml(source) if args.config or not saved else {}
    base = saved["args"] if saved else {}
    if recipe and saved and recipe.get("task", "saliency") != base["task"]:
        raise UserError(
            f"{resume}: is a run of {base['task']}, and {source} is for "
            f"{recipe.get('task', 'saliency')}. Resume it without --config, or name its own."
        )
    task = tasks.read_config(recipe or base, source, overrides, base)
    deciding_metric(task.cfg, task.METRICS)  # refuses a metric that is not tracked
    if args.test_only and not (saved or task.cfg.train.weights):
        raise UserError("--test-only: nothing to test. Add --weights FILE or --resume auto.")
    return task, resume, saved
