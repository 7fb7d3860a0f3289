"""Predict on images: files, folders and patterns in, maps of the input's own size out.

    python predict.py photo.jpg                             → predictions/photo.png
    python predict.py photos -o maps --cutout --overlay     a folder tree, mirrored below maps/
    python predict.py "photos/*.jpg" --weights runs/…/model_best.pth
    python predict.py photo.jpg --weights u2netp.pth --set data.mean=[0,0,0] --set data.std=[1,1,1]
    python predict.py photo.jpg --trimap photo_trimap.png --cutout       matting
    python predict.py photos --trimap trimaps                            trimaps of the same names

The weights file says which network and preprocessing to use; both are exactly those that its scores
were measured with. Without --weights the newest best checkpoint under runs/ is taken. What the map
is depends on the network: a saliency map, an alpha matte, a label map (palette PNG of class
indices) or the translated image.
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
    add("--config", metavar="YAML", help="recipe of weights that bring none with them")
    add("--cutout", action="store_true", help="also <name>_cutout.png: RGBA, the map as alpha")
    add(
        "--overlay",
        action="store_true",
        help="also <name>_overlay.png: the map tinted on the image",
    )
    add("--threshold", type=float, metavar="T", help="write 255 where the map is > T, else 0")
    add(
        "--trimap", metavar="FILE|DIR", help="what matting needs: 0 ground, 128 unknown, 255 object"
    )
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
    trimap: Path | None = None


def main(args: argparse.Namespace) -> int:
    """Predict on every input; returns the number of files that failed."""
    import tasks
    from train_utils.config import parse_assignments
    from train_utils.distributed_utils import resolve_device
    from train_utils.image_io import printable
    from train_utils.inference import GPU_CHUNK, in_order
    from train_utils.run_folder import newest_best_checkpoint
    from train_utils.setup import place_models

    jobs = plan(args.inputs, Path(args.output), kinds_of(args), args.trimap)
    device = resolve_device(args.device)
    weights = args.weights or newest_best_checkpoint()
    task, cfg, models = tasks.load_models(weights, parse_assignments(args.set), args.config)
    check_flags(args, task.PREDICT_FLAGS, str(weights))
    models = place_models(models, device, sync_bn=False)
    print(f"{weights} → {len(jobs)} image(s)", flush=True)

    forward = task.predict(cfg)

    def process(chunk: list[Job]) -> list[str | None]:
        return predict_chunk(chunk, task, cfg, lambda x: forward(models, x), device, args.threshold)

    failed = 0
    chunks = list(_chunks(jobs, 1 if device.type == "cpu" else GPU_CHUNK))
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
    from train_utils.errors import UserError
    from train_utils.image_io import printable, save_image

    errors: list[str | None] = [None] * len(chunk)
    images, inputs = {}, {}
    for i, job in enumerate(chunk):
        try:
            images[i] = read_inputs(job)
            inputs[i] = task.network_input(cfg, **images[i])
        except UserError as error:
            errors[i] = str(error)
    try:
        predictions = forward_alike(forward, inputs, device)
    except (RuntimeError, MemoryError) as error:  # too little memory, above all
        return [f"{printable(job.source)}: {error}" for job in chunk]
    for i, prediction in predictions.items():
        outputs = chunk[i].outputs
        try:
            pictures = task.render(
                cfg,
                prediction=prediction,
                kinds=list(outputs),
                threshold=threshold,
                **images[i],
            )
            for kind, path in outputs.items():
                save_image(pictures[kind], path)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            errors[i] = f"{printable(chunk[i].source)}: {error}"
    return errors


def read_inputs(job: Job) -> dict[str, "torch.Tensor"]:
    """A job's image, and its trimap if there is one, by name."""
    from train_utils.errors import UserError
    from train_utils.image_io import printable, read_image, read_trimap

    image = read_image(job.source)
    if not job.trimap:
        return {"image": image}
    trimap = read_trimap(job.trimap)
    if trimap.shape[-2:] != image.shape[-2:]:
        raise UserError(
            f"{printable(job.trimap)}: {trimap.shape[-1]}×{trimap.shape[-2]} pixels, but "
            f"{printable(job.source)} has {image.shape[-1]}×{image.shape[-2]}. Make them alike."
        )
    return {"image": image, "trimap": trimap}


def forward_alike(forward: Any, inputs: dict[int, Any], device: "torch.device") -> dict[int, Any]:
    """Predictions by key, inputs of one size together as far as evaluation would do it."""
    import torch

    from train_utils.inference import chunk_size, forward_chunk

    predictions = {}
    for shape in dict.fromkeys(x.shape for x in inputs.values()):
        alike = [key for key, x in inputs.items() if x.shape == shape]
        size = chunk_size(device, inputs[alike[0]])
        for keys in (alike[i : i + size] for i in range(0, len(alike), size)):
            batch = torch.stack([inputs[key] for key in keys]).to(device)
            predictions |= dict(zip(keys, forward_chunk(forward, batch, device), strict=True))
    return predictions


def check_flags(args: argparse.Namespace, flags: dict[str, bool], weights: str) -> None:
    """UserError for a flag that the network has no use for, or lacks (name → required?)."""
    from train_utils.errors import UserError

    for name in ("cutout", "overlay", "threshold", "trimap"):
        given = getattr(args, name) not in (None, False)
        if given and name not in flags:
            offered = ", ".join(f"--{flag}" for flag in flags) or "none of these"
            raise UserError(
                f"--{name}: {weights} has no use for it; its network takes {offered}. Leave it out."
            )
        if flags.get(name) and not given:
            raise UserError(
                f"--{name}: {weights} needs one beside every image. Add --{name} FILE, or a folder "
                "with files of the images' names."
            )


def kinds_of(args: argparse.Namespace) -> list[str]:
    return ["map", *(kind for kind in ("cutout", "overlay") if getattr(args, kind))]


def plan(inputs: list[str], output: Path, kinds: list[str], trimap: str | None = None) -> list[Job]:
    """Every input file with its trimap and output paths, decided before anything is written.

    Raises UserError when there is no input at all, when none has a trimap, and when an output would
    overwrite an input, another output or a file that predict.py has not written.
    """
    from train_utils.errors import UserError
    from train_utils.image_io import printable

    first = next(folder for folder in (output, *output.parents) if folder.exists())
    if not first.is_dir():
        raise UserError(f"{printable(first)}: not a folder. Choose another one with -o.")
    sources = list(_sources(inputs, output))
    trimaps = find_trimaps(sources, Path(trimap)) if trimap else {}
    used = {path.resolve() for path in trimaps.values()}
    jobs: dict[Path, Job] = {}
    for source, relative in sources:
        if source.resolve() in used:
            continue  # it lies among the images
        stem = output / relative.with_suffix("")
        names = {
            kind: stem.with_name(stem.name + ("" if kind == "map" else f"_{kind}") + ".png")
            for kind in kinds
        }
        jobs.setdefault(source.resolve(), Job(source, names, trimaps.get(source)))
    if not any(job.source.exists() for job in jobs.values()):
        raise UserError(f"{', '.join(inputs)}: no image there. Check the path.")
    _check_outputs(jobs)
    return list(jobs.values())


def find_trimaps(sources: list[tuple[Path, Path]], trimap: Path) -> dict[Path, Path]:
    """The trimap of every source that has one: the file given, or of a folder the same name.

    In a folder, `a/photo_trimap.*` goes before `a/photo.*`. A source without gets a file that is
    not there, and so fails by itself. Raises UserError if there is none for any source.
    """
    from train_utils.errors import UserError
    from train_utils.image_io import list_images, printable

    if not trimap.is_dir():
        if len(sources) > 1:
            raise UserError(
                f"--trimap {printable(trimap)}: is one file for several images. Give a folder."
            )
        if any(source.resolve() == trimap.resolve() for source, _ in sources):
            raise UserError(f"--trimap {printable(trimap)}: is the image itself. Give its trimap.")
        return {source: trimap for source, _ in sources}
    files: dict[str, list[Path]] = {}
    for path in list_images(trimap, recursive=True):
        files.setdefault(path.relative_to(trimap).with_suffix("").as_posix(), []).append(path)
    found = {}
    for source, relative in sources:
        stem, folder = relative.with_suffix("").as_posix(), source.resolve().parent
        # Beside an image, a file of its own name is no trimap but another image.
        elsewhere = [path for path in files.get(stem, []) if path.resolve().parent != folder]
        candidates = files.get(f"{stem}_trimap") or elsewhere
        if len(candidates) > 1:
            raise UserError(
                f"{printable(candidates[0])}: only the suffix tells it from "
                f"{printable(candidates[1].name)}. Remove or rename one of the two."
            )
        if candidates:
            found[source] = candidates[0]
    if not found:
        raise UserError(
            f"--trimap {printable(trimap)}: holds no trimap for {printable(sources[0][0])}. Name "
            "each like its image, or <image>_trimap."
        )
    used = {path.resolve() for path in found.values()}  # trimaps may lie among the images
    for source, relative in sources:
        if source not in found and source.resolve() not in used:  # fails as its turn comes
            found[source] = trimap / relative.with_name(f"{relative.stem}_trimap.png")
    return found


def _check_outputs(jobs: dict[Path, Job]) -> None:
    """Raise UserError if an output would overwrite what it must not; `jobs` by resolved source."""
    from train_utils.errors import UserError
    from train_utils.image_io import printable, saved_here

    inputs = jobs.keys() | {job.trimap.resolve() for job in jobs.values() if job.trimap}
    taken: dict[Path, Path] = {}
    for job in jobs.values():
        for path in job.outputs.values():
            target = path.resolve()
            if target in inputs:
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
