"""Predict on images and videos: files, folders, patterns in, maps of the input's own size out.

    python predict.py photo.jpg                             → predictions/photo.png
    python predict.py photos -o maps --cutout --overlay     a folder tree, mirrored below maps/
    python predict.py "photos/*.jpg" --weights runs/…/model_best.pth
    python predict.py clip.mp4                              → predictions/clip/000001.png … (ffmpeg)
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
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from glob import glob, has_magic
from itertools import count, islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from arguments import new_parser
from process_setup import keep_freed_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IMG|VIDEO|DIR|GLOB")
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


_FRAME = "%06d"  # what the outputs of a video's frames are called
_THREADS = 8  # that read, and that write, beside a device; each holds a few images in memory


class Job(NamedTuple):
    """An input file and its outputs by kind: "map", and "cutout" and "overlay" where asked for.

    The outputs of a video are patterns (000001.png is %06d.png); each of its frames becomes a job
    of its own, and so does an error in the middle of it.
    """

    source: Path
    outputs: dict[str, Path]
    trimap: Path | None = None
    frame: "Tensor | None" = None
    error: str = ""


@dataclass
class Picture:
    """An image on its way from file to files; once it has an error, all steps pass it over."""

    job: Job
    images: "dict[str, Tensor]" = field(default_factory=dict)  # itself, and its trimap, by name
    network_input: "Tensor | None" = None
    prediction: "Tensor | None" = None
    warning: str = ""
    error: str = ""


def main(args: argparse.Namespace) -> int:
    """Predict on every input; returns the number of files (of a video: frames) that failed."""

    import tasks
    from train_utils.amp import choose_amp_dtype
    from train_utils.config import parse_assignments
    from train_utils.device import allow_tf32, resolve_device, take_device
    from train_utils.image_io import printable
    from train_utils.inference import prepare
    from train_utils.run_folder import newest_best_checkpoint

    jobs = plan(args.inputs, Path(args.output), kinds_of(args), args.trimap)
    device = resolve_device(args.device)
    take_device(device)
    keep_freed_memory(device.type)
    weights = args.weights or newest_best_checkpoint()
    task, models = tasks.load_models(weights, parse_assignments(args.set), args.config)
    cfg = task.cfg
    check_flags(args, task.PREDICT_FLAGS, str(weights))
    allow_tf32(cfg.eval.tf32)
    models = prepare(models, device, choose_amp_dtype(cfg.eval.amp, device, "eval.amp"))
    print(f"{weights} → {len(jobs)} file(s)", flush=True)

    done = failed = 0
    predictor = Predictor(task, models, device, args.threshold)
    with closing(predictor.run(jobs)) as pictures:
        for picture in pictures:
            source = printable(picture.job.source)
            if picture.warning:
                print(f"warning: {source}: {picture.warning}", file=sys.stderr, flush=True)
            if picture.error:
                print(f"error: {picture.error}", file=sys.stderr, flush=True)
                failed += 1
            else:
                outputs = ", ".join(printable(path) for path in picture.job.outputs.values())
                print(f"{source} → {outputs}", flush=True)
                done += 1
    print(f"{done} done, {failed} failed", flush=True)
    return failed


@dataclass
class Predictor:
    """A network with its task and settings, and the steps that take a job from file to files."""

    task: Any
    models: "dict[str, torch.nn.Module]"
    device: "torch.device"
    threshold: float | None = None
    _rendering: Lock = field(default_factory=Lock, init=False)

    def run(self, jobs: Iterable[Job]) -> Generator[Picture, None, None]:
        """Read, predict and write; yields every job's outcome, in order, as it is done.

        On CPUs each image goes through all steps on one thread, and as many are under way as there
        are cores. Elsewhere the device computes, while threads read ahead and others write. However
        many jobs there are, the images of a few only are in memory.
        """
        import torch

        from train_utils.distributed_utils import cpu_cores
        from train_utils.inference import GPU_CHUNK, in_order
        from train_utils.threads import in_threads

        with closing(frame_by_frame(jobs)) as singly:
            if self.device.type == "cpu":
                yield from in_order(self._all_steps, singly, self.device)
                return
            write, threads = torch.inference_mode()(self.write), min(_THREADS, cpu_cores())
            with (
                closing(in_threads(self.read, singly, threads)) as pictures,
                closing(self._predicted(pictures, GPU_CHUNK)) as predicted,
                closing(in_threads(write, predicted, threads)) as written,
            ):
                yield from written

    def _all_steps(self, job: Job) -> Picture:
        picture = self.read(job)
        self.predict([picture])
        return self.write(picture)

    def _predicted(self, pictures: Iterator[Picture], size: int) -> Generator[Picture, None, None]:
        import torch

        while chunk := list(islice(pictures, size)):
            with torch.inference_mode():
                self.predict(chunk)
            yield from chunk

    def read(self, job: Job) -> Picture:
        """Decode a job's files, and prepare what the network sees of them."""
        from train_utils.errors import UserError

        picture = Picture(job, error=job.error)
        if not picture.error:
            try:
                at_least, sides = self.task.cfg.data.at_least, {}
                images = picture.images = read_inputs(job, at_least)
                if at_least:
                    picture.images = at_own_size(job, images)
                    sides["sides"] = picture.images["image"].shape[-2:]
                picture.network_input = self.task.network_input(**images, **sides)
            except UserError as error:
                picture.error = str(error)
        return picture

    def predict(self, pictures: list[Picture]) -> None:
        """Fill in predictions, inputs of one size together as far as evaluation would do it."""
        import torch

        from train_utils.errors import is_out_of_memory
        from train_utils.image_io import printable
        from train_utils.inference import SPARE_MEMORY, chunk_size

        sound = [picture for picture in pictures if not picture.error]
        for shape in dict.fromkeys(picture.network_input.shape for picture in sound):
            alike = [picture for picture in sound if picture.network_input.shape == shape]
            size = chunk_size(self.device, alike[0].network_input)
            for chunk in (alike[i : i + size] for i in range(0, len(alike), size)):
                batch = torch.stack([picture.network_input for picture in chunk])
                try:
                    outputs, warning = self.forward(batch)
                except (RuntimeError, MemoryError) as error:  # too little memory, above all
                    short = is_out_of_memory(error)
                    reason = f"out of memory: {SPARE_MEMORY}." if short else error
                    for picture in chunk:
                        picture.error = f"{printable(picture.job.source)}: {reason}"
                    continue
                for picture, output in zip(chunk, outputs, strict=True):
                    picture.prediction, picture.warning = output, warning

    def forward(self, batch: "Tensor") -> "tuple[Tensor, str]":
        """Predictions of a batch, and a warning if it took tiles for want of memory.

        Tasks whose inputs can be cut have `eval.max_pixels`: it is halved until a tile fits.
        """
        from train_utils.errors import is_out_of_memory
        from train_utils.inference import forward_chunk
        from train_utils.tiles import MIN_PIXELS

        task, warning = self.task, ""
        while True:
            forward = partial(task.predict, self.models)
            try:
                return forward_chunk(forward, batch.to(self.device), self.device), warning
            except RuntimeError as error:
                limit = getattr(task.cfg.eval, "max_pixels", 0)
                pixels = min(limit, batch.shape[-2] * batch.shape[-1])
                if not is_out_of_memory(error) or pixels // 2 < MIN_PIXELS:
                    raise
            # Behind the except block, which keeps alive what the failed attempt has allocated.
            task = task.with_values({"eval": {"max_pixels": pixels // 2}})
            warning = (
                f"too little memory for {pixels:,} pixels at a time; predicted, with the same "
                f"result, in tiles of {pixels // 2:,} (to begin with them: --set "
                f"eval.max_pixels={pixels // 2})"
            )

    def write(self, picture: Picture) -> Picture:
        """Render and save the outputs; returns what is left to be said, without any image."""
        from train_utils.errors import UserError
        from train_utils.image_io import printable, save_image

        job, error = picture.job, picture.error
        if not error:
            try:
                # A device has room for one map at the size of a large photograph, not for many.
                with nullcontext() if self.device.type == "cpu" else self._rendering:
                    rendered = self.task.render(
                        prediction=picture.prediction,
                        kinds=list(job.outputs),
                        threshold=self.threshold,
                        **picture.images,
                    )
                for kind, path in job.outputs.items():
                    save_image(rendered[kind], path)
            except (UserError, OSError, MemoryError, RuntimeError) as problem:
                error = f"{printable(job.source)}: {problem}"
        return Picture(job._replace(frame=None), warning=picture.warning, error=error)


def frame_by_frame(jobs: Iterable[Job]) -> Generator[Job, None, None]:
    """All jobs in order, each video's replaced by those of its frames, and of its error if any."""
    from train_utils.errors import UserError
    from train_utils.video import is_video, read_frames

    for job in jobs:
        if not is_video(job.source):
            yield job
            continue
        try:
            number = 0
            with closing(read_frames(job.source)) as frames:
                for number, frame in enumerate(frames, 1):
                    outputs = {
                        kind: path.with_name(path.name % number)
                        for kind, path in job.outputs.items()
                    }
                    yield job._replace(outputs=outputs, frame=frame)
            remove_frames_after(number, job)
        except UserError as error:
            yield job._replace(error=str(error))


def remove_frames_after(number: int, job: Job) -> None:
    """Remove what an earlier call wrote of a longer video of that name."""
    from train_utils.image_io import saved_here

    for pattern in job.outputs.values():
        for later in count(number + 1):
            path = pattern.with_name(pattern.name % later)
            if not (path.exists() and saved_here(path)):
                break
            path.unlink()


def read_inputs(job: Job, at_least: int | None = None) -> "dict[str, Tensor]":
    """A job's image (see `read_image`), and its trimap if there is one, by name."""
    from train_utils.errors import UserError
    from train_utils.image_io import printable, read_image, read_trimap

    image = read_image(job.source, at_least) if job.frame is None else job.frame
    if not job.trimap:
        return {"image": image}
    trimap = read_trimap(job.trimap)
    if trimap.shape[-2:] != image.shape[-2:]:
        raise UserError(
            f"{printable(job.trimap)}: {trimap.shape[-1]}×{trimap.shape[-2]} pixels, but "
            f"{printable(job.source)} has {image.shape[-1]}×{image.shape[-2]}. Make them alike."
        )
    return {"image": image, "trimap": trimap}


def at_own_size(job: Job, images: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """What the outputs are made of, where `images` may have been scaled down by their decoder.

    Of a map alone that is no pixel, only the size.
    """
    from train_utils.image_io import image_size

    if job.frame is not None:
        return images
    width, height = image_size(job.source)
    if (height, width) == images["image"].shape[-2:]:
        return images
    if list(job.outputs) != ["map"]:
        return read_inputs(job)
    return {"image": images["image"].new_zeros(1).expand(3, height, width)}


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

    Raises UserError when there is no input at all, when none has a trimap, when an output would
    overwrite an input, another output or a file that predict.py has not written, and for a video
    if there is no ffmpeg, or where it would need trimaps.
    """
    from train_utils.errors import UserError
    from train_utils.image_io import printable
    from train_utils.video import is_video, require_ffmpeg

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
        if is_video(source):
            require_ffmpeg(source)
            if trimap:
                raise UserError(
                    f"{printable(source)}: its frames need a trimap each. Extract them into a "
                    "folder, and name that and a folder of trimaps."
                )
            stem /= _FRAME
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
    from train_utils.image_io import printable
    from train_utils.video import is_video

    inputs = jobs.keys() | {job.trimap.resolve() for job in jobs.values() if job.trimap}
    # How many frames a video has is not known yet, so all of their folder is theirs.
    videos = {
        job.outputs["map"].resolve().parent: job.source
        for job in jobs.values()
        if is_video(job.source)
    }
    shared = videos.keys() & {path.parent for path in inputs}
    taken: dict[Path, Path] = {}
    for job in jobs.values():
        for path in job.outputs.values():
            target = path.resolve()
            if target in inputs or target.parent in shared:
                raise UserError(
                    f"{printable(path)}: the output of {printable(job.source)} would overwrite an "
                    "input. Choose another folder with -o."
                )
            other = taken.get(target, videos.get(target.parent, job.source))
            if other != job.source:
                raise UserError(
                    f"{printable(path)}: {printable(other)} and {printable(job.source)} "
                    "would both be written there. Rename one, or predict them into different "
                    "folders with -o."
                )
            for file in path.parent.glob("*.png") if target.parent in videos else [path]:
                _check_replaceable(file)
            taken[target] = job.source


def _check_replaceable(path: Path) -> None:
    """Raise UserError for an existing file with content that predict.py has not written."""
    from train_utils.errors import UserError
    from train_utils.image_io import printable, saved_here

    if path.exists() and path.stat().st_size and not saved_here(path):
        raise UserError(
            f"{printable(path)}: exists and was not written by predict.py. Choose another folder "
            "with -o, or move the file."
        )


def _sources(inputs: Iterable[str], output: Path) -> Iterator[tuple[Path, Path]]:
    """(file, its path below the output folder) of every input, folder trees mirrored."""
    from train_utils.errors import UserError
    from train_utils.image_io import list_images, printable
    from train_utils.video import is_video

    for text in inputs:
        if not text:
            raise UserError("an input is empty. Name an image, a folder or a pattern.")
        path = Path(text)
        if path.is_dir():
            inside = output.resolve()
            if videos := sum(is_video(file) for file in path.rglob("*")):
                left_out = f"{videos} video(s) in {printable(path)} are left out"
                print(f"note: {left_out}: name each to have it done.", file=sys.stderr, flush=True)
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


if __name__ == "__main__":
    arguments = parse_args()  # before torch is imported: --help and mistakes are answered at once
    from train_utils.setup import clean_errors

    with clean_errors():
        sys.exit(1 if main(arguments) else 0)
