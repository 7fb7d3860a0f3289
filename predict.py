"""Predict on images: files, folders and patterns in, maps of the input's own size out.

    python predict.py photo.jpg                             → predictions/photo.png
    python predict.py photos -o maps --cutout --overlay     a folder tree, mirrored below maps/
    python predict.py "photos/*.jpg" --weights runs/…/model_best.pth
    python predict.py photo.jpg --weights u2netp.pth --set data.mean=[0,0,0] --set data.std=[1,1,1]

The weights file says which network and preprocessing to use; both are exactly those that its scores
were measured with. Without --weights the newest best checkpoint under runs/ is taken.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IMG|DIR|GLOB")
    add("-o", "--output", default="predictions", metavar="DIR", help="default: predictions")
    add("--weights", metavar="FILE", help="default: the newest best checkpoint under runs/")
    add("--cutout", action="store_true", help="also <name>_cutout.png: RGBA, the map as alpha")
    add(
        "--overlay",
        action="store_true",
        help="also <name>_overlay.png: the map tinted on the image",
    )
    add("--threshold", type=float, metavar="T", help="write 255 where the map is > T, else 0")
    add("--device", default="auto")
    add("--set", default=[], action="append", metavar="KEY=VALUE", help="override a config key")
    args = parser.parse_args(argv)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error("--threshold: must lie between 0 and 1")
    return args


class Job(NamedTuple):
    """An input file and its outputs by kind: "map", and "cutout" and "overlay" where asked for."""

    source: Path
    outputs: dict[str, Path]


def main(args: argparse.Namespace) -> int:
    """Predict on every input; returns the number of files that failed."""
    import tasks
    from train_utils.config import parse_assignments
    from train_utils.distributed_utils import resolve_device
    from train_utils.image_io import printable
    from train_utils.inference import chunk_size, in_order
    from train_utils.run_folder import newest_best_checkpoint
    from train_utils.setup import place_models

    jobs = plan(args.inputs, Path(args.output), kinds_of(args))
    device = resolve_device(args.device)
    weights = args.weights or newest_best_checkpoint()
    task, cfg, models = tasks.load_models(weights, parse_assignments(args.set))
    models = place_models(models, device, sync_bn=False)
    print(f"{weights} → {len(jobs)} image(s)", flush=True)

    forward = task.predict(cfg)

    def process(chunk: list[Job]) -> list[str | None]:
        return predict_chunk(chunk, task, cfg, lambda x: forward(models, x), device, args.threshold)

    failed = 0
    chunks = list(_chunks(jobs, chunk_size(device)))
    for chunk, errors in zip(chunks, in_order(process, chunks, device), strict=True):
        for job, error in zip(chunk, errors, strict=True):
            if error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                failed += 1
            else:
                outputs = ", ".join(printable(path) for path in job.outputs.values())
                print(f"{printable(job.source)} → {outputs}", flush=True)
    print(f"{len(jobs) - failed} done, {failed} failed", flush=True)
    return failed


def predict_chunk(
    chunk: list[Job],
    task: Any,
    cfg: Any,
    forward: Any,
    device: "torch.device",
    threshold: float | None,
) -> list[str | None]:
    """Read, predict and write some images; returns each one's error, or None."""
    import torch

    from train_utils.errors import UserError
    from train_utils.image_io import printable, read_image, save_image
    from train_utils.inference import forward_chunk

    errors: list[str | None] = [None] * len(chunk)
    images = {}
    for i, job in enumerate(chunk):
        try:
            images[i] = read_image(job.source)
        except UserError as error:
            errors[i] = str(error)
    if not images:
        return errors
    inputs = torch.stack([task.network_input(cfg, image) for image in images.values()])
    try:
        predictions = forward_chunk(forward, inputs.to(device), device)
    except (RuntimeError, MemoryError) as error:  # too little memory, above all
        return [f"{printable(job.source)}: {error}" for job in chunk]
    for (i, image), prediction in zip(images.items(), predictions, strict=True):
        try:
            pictures = task.render(cfg, image, prediction, list(chunk[i].outputs), threshold)
            for kind, path in chunk[i].outputs.items():
                save_image(pictures[kind], path)
        except (UserError, OSError, MemoryError) as error:
            errors[i] = f"{printable(chunk[i].source)}: {error}"
    return errors


def kinds_of(args: argparse.Namespace) -> list[str]:
    return ["map", *(kind for kind in ("cutout", "overlay") if getattr(args, kind))]


def plan(inputs: list[str], output: Path, kinds: list[str]) -> list[Job]:
    """Every input file with its output paths, decided before anything is written.

    Raises UserError when there is no input at all, and when an output would overwrite an input,
    another output or a file that predict.py has not written.
    """
    from train_utils.errors import UserError
    from train_utils.image_io import printable, saved_here

    first = next(folder for folder in (output, *output.parents) if folder.exists())
    if not first.is_dir():
        raise UserError(f"{printable(first)}: not a folder. Choose another one with -o.")
    jobs: dict[Path, Job] = {}
    for source, relative in _sources(inputs, output):
        stem = output / relative.with_suffix("")
        names = {
            kind: stem.with_name(stem.name + ("" if kind == "map" else f"_{kind}") + ".png")
            for kind in kinds
        }
        jobs.setdefault(source.resolve(), Job(source, names))
    if not any(job.source.exists() for job in jobs.values()):
        raise UserError(f"{', '.join(inputs)}: no image there. Check the path.")
    taken: dict[Path, Path] = {}
    for job in jobs.values():
        for path in job.outputs.values():
            target = path.resolve()
            if target in jobs:
                raise UserError(
                    f"{printable(path)}: the output of {printable(job.source)} would overwrite an "
                    "input. Choose another folder with -o."
                )
            if target in taken:
                raise UserError(
                    f"{printable(path)}: {printable(taken[target])} and {printable(job.source)} "
                    "would both be written there. Rename one, or predict them into different "
                    "folders with -o."
                )
            if path.exists() and not saved_here(path):
                raise UserError(
                    f"{printable(path)}: exists and was not written by predict.py. Choose another "
                    "folder with -o, or move the file."
                )
            taken[target] = job.source
    return list(jobs.values())


def _sources(inputs: Iterable[str], output: Path) -> Iterator[tuple[Path, Path]]:
    """(file, its path below the output folder) of every input, folder trees mirrored."""
    from train_utils.errors import UserError
    from train_utils.image_io import list_images

    for text in inputs:
        if not text:
            raise UserError("an input is empty. Name an image, a folder or a pattern.")
        path = Path(text)
        if path.is_dir():
            inside = output.resolve()
            for file in list_images(path, recursive=True):
                if inside == path.resolve() or inside not in file.resolve().parents:
                    yield file, file.relative_to(path)
        elif has_magic(text) and not path.exists():
            root = Path(*_before_wildcard(path.parts))
            matches = [Path(match) for match in glob(text, recursive=True)]  # noqa: PTH207
            files = sorted(match for match in matches if match.is_file())
            if not files:
                raise UserError(f"{text}: no file matches the pattern. Check the path.")
            yield from ((file, file.relative_to(root)) for file in files)
        else:
            yield path, Path(path.name)  # if it is missing, it fails as its turn comes


def _before_wildcard(parts: tuple[str, ...]) -> list[str]:
    plain = []
    for part in parts[:-1]:
        if has_magic(part):
            break
        plain.append(part)
    return plain or ([os.curdir] if not parts or parts[0] != os.sep else [os.sep])


def _chunks(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


if __name__ == "__main__":
    # Parsed before torch is imported, so that --help and usage errors answer at once.
    arguments = parse_args()
    from train_utils.setup import clean_errors

    with clean_errors():
        sys.exit(1 if main(arguments) else 0)
