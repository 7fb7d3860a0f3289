"""Look at data and set-up before a training: what is wrong, how it is mended, how to train.

    python check.py --images photos --masks masks          all headers, the pixels of 200 pairs
    python check.py --images photos --masks masks --full   all pixels: near duplicates, damage
    python check.py --config configs/unet_voc.yaml --data-path DIR --full
    python check.py --images photos --masks masks --setup  the network, memory and speed, too

It takes what train.py takes: write check.py in its place. Data are read only. Findings are printed,
the worst first, and written to check/<name>/ with a page of pictures (index.html) and list files of
a split without leaks. Exit 1: something must be mended before a training.
"""

from launch.heap import keep_freed_memory

keep_freed_memory()  # before the imports that take seconds

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import tasks
from train_utils.arguments import training_parser
from train_utils.check.data import check_as_proposed
from train_utils.check.findings import Report
from train_utils.check.output import CheckFolder
from train_utils.check.page import PAGE, write_page
from train_utils.check.setup import SECONDS, SetUp, check_setup, setup_errors
from train_utils.check.split import LISTS, require_other_lists, training_command, write_lists
from train_utils.distributed_utils import init_distributed_mode, refuse_launcher
from train_utils.errors import UserError, printable, typed
from train_utils.prepare_data import prepare_datasets
from train_utils.setup import build_loaders, clean_errors, place_models, start_process
from train_utils.task import BaseTask


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: a training's, and what to look at."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add = own.add_argument
    add("--full", action="store_true", help="decode every file, on all cores")
    add("--setup", action="store_true", help="look at network, learning, memory and speed, too")
    add("--seconds", type=float, default=SECONDS, metavar="N", help="of each part of --setup")
    add("--processes", type=int, default=1, metavar="N", help="of the training, for --setup")
    add("-o", "--output-dir", metavar="DIR", help="default check/<name of the recipe>")
    add("--json", metavar="FILE", help="write the report there, too")
    parser = training_parser(__doc__, tasks.train_flags(), own)
    _, words = own.parse_known_args(argv)
    args = parser.parse_args(argv, argparse.Namespace(words=words))
    if not 0 < args.seconds < 1e6 or not 0 < args.processes < 1e6:
        parser.error("--seconds and --processes must be positive")
    return args


def main(args: argparse.Namespace) -> int:
    """Arguments → task → data → findings → page → verdict; returns the number of errors."""
    task = tasks.new_task(args)
    recipe = Path(args.config or tasks.DEFAULT_CONFIG)
    folder = CheckFolder(Path(args.output_dir or Path("check", recipe.stem)))
    folder.require("report.json", PAGE, *LISTS)
    require_other_lists(folder, task.cfg.data)
    copy = json_file(args.json)

    def configure(words: Sequence[str]) -> BaseTask:
        return tasks.new_task(parse_args([*words]))

    task, report = check_as_proposed(task, args.words, configure, args.full)
    lists = write_lists(report, folder)
    moved = any(group.across for group in report.alike) or report.unusable
    kept = lists if moved else []
    report.command = training_command(args.words, report, task, kept, configure)
    if args.setup:
        look_at_setup(args, task, report)
    write_page(report, folder)
    folder.write("report.json", report.to_json())
    if copy:
        copy[0].write(copy[1], report.to_json())
    return tell_verdict(report)


def look_at_setup(args: argparse.Namespace, task: BaseTask, report: Report) -> None:
    """Set up what train.py would, on one process, and look at it."""
    with setup_errors(report):
        init_distributed_mode(args)
        args.world_size = args.processes
        task.cfg.data.cache = "none"  # a check leaves no samples behind
        device = torch.device(args.device)
        start_process(args, task.cfg)
        task, train_set, val_set = prepare_datasets(task, *task.build_datasets())
        loader, val_loader, _ = build_loaders(args, task, train_set, val_set)
        networks = place_models(tasks.start_models(task, None), device, sync_bn=False)
        optimizers = task.build_optimizers(networks)
        setup = SetUp(task, networks, optimizers, loader, val_loader, device)
        check_setup(setup, report, args.seconds)


def json_file(name: str | None) -> tuple[CheckFolder, str] | None:
    """Where --json writes to, and its name there; UserError for a place that is not ours."""
    if name is None:
        return None
    path = Path(name)
    if path.suffix != ".json":
        raise UserError(f"--json {typed(name)}: is no name of a JSON file. End it with .json.")
    folder = CheckFolder(path.parent, "--json")
    folder.require(path.name)
    return folder, path.name


def tell_verdict(report: Report) -> int:
    """Print the findings and the command to train with; returns the number of errors."""
    findings = report.ranked()
    if report.pairs:
        print(printable(report.scope()))
    for finding in findings:
        print(printable(finding.line()))
    errors = sum(finding.severity == "error" for finding in findings)
    print(printable(f"{errors} to be mended, {len(findings) - errors} more to know of"))
    if report.command:
        print(printable("Then train with:" if errors else "Train with:"))
        print(printable(report.command))
    return errors


if __name__ == "__main__":
    with clean_errors():
        refuse_launcher("check.py")
        sys.exit(1 if main(parse_args()) else 0)
