"""From files to files: read, predict and write images, with threads beside the device."""

import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train_utils.collectives import all_gather, get_rank, get_world_size
from train_utils.distributed_utils import own_cores
from train_utils.errors import UserError, is_out_of_memory
from train_utils.image_io import frames_of, image_size, read_image, save_image, saved_here
from train_utils.inference import GPU_CHUNK, SPARE_MEMORY, chunk_size, forward_chunk, in_order
from train_utils.threads import in_threads
from train_utils.tiles import MIN_PIXELS
from train_utils.train_and_eval import Models
from train_utils.video import is_video, read_frames

_THREADS = 8  # that read, and that write, beside a device; each holds a few images in memory


class Job(NamedTuple):
    """An input file and its outputs by kind: "map", and others where asked for.

    The outputs of what has frames are patterns (000001.png is %06d.png); each of its frames becomes
    a job of its own, and so does an error in the middle of it. error: why it is not done at all.
    root: the resolved folder that no output may leave.
    """

    source: Path
    outputs: dict[str, Path]
    extras: Mapping[str, Path] = {}  # what lies beside the image, by the task's names for it
    frame: Tensor | None = None
    error: str = ""
    root: Path | None = None
    has_frames: bool = False


def share_of(jobs: list[Job]) -> list[Job]:
    """This process's share of the jobs, which all processes must have planned alike.

    No output has been written yet, and none is written twice. Raises UserError, on all of them,
    where they see different files.
    """
    files = ascii([(job.source, job.outputs) for job in jobs])
    plans = all_gather((len(jobs), hashlib.sha256(files.encode()).hexdigest()), patient=True)
    for rank, other in enumerate(plans):
        if other != plans[0]:
            raise UserError(
                f"rank {rank} finds {other[0]} file(s), and rank 0 {plans[0][0]}, or others. Start "
                "all processes in one folder, on a disk that their machines share."
            )
    return jobs[get_rank() :: get_world_size()]


@dataclass
class Picture:
    """An image on its way from file to files; once it has an error, all steps pass it over."""

    job: Job
    images: dict[str, Tensor] = field(default_factory=dict)  # itself, and its extras, by name
    network_input: Tensor | None = None
    prediction: Tensor | None = None
    warning: str = ""
    error: str = ""


@dataclass
class Predictor:
    """A network with its task and settings, and the steps that take a job from file to files."""

    task: Any  # a BaseTask, some of whose methods take extra inputs by their names
    models: Models
    device: torch.device
    threshold: float | None = None
    _rendering: Lock = field(default_factory=Lock, init=False)

    def run(self, jobs: Iterable[Job]) -> Generator[Picture, None, None]:
        """Read, predict and write; yields every job's outcome, in order, as it is done.

        On CPUs each image goes through all steps on one thread, and as many are under way as there
        are cores. Elsewhere the device computes, while threads read ahead and others write. However
        many jobs there are, the images of a few only are in memory.
        """
        with closing(frame_by_frame(jobs)) as singly:
            if self.device.type == "cpu":
                yield from in_order(self._all_steps, singly, self.device)
                return
            write, threads = torch.inference_mode()(self.write), min(_THREADS, own_cores())
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
        while chunk := list(islice(pictures, size)):
            with torch.inference_mode():
                self.predict(chunk)
            yield from chunk

    def read(self, job: Job) -> Picture:
        """Decode a job's files, and prepare what the network sees of them."""
        picture, readers = Picture(job, error=job.error), self.task.EXTRA_INPUTS
        if not picture.error:
            try:
                at_least, sides = self.task.cfg.data.at_least, {}
                input_of = self.task.input_of
                images = picture.images = read_inputs(job, readers, at_least, input_of)
                if at_least:
                    picture.images = at_own_size(job, images, readers, input_of)
                    sides["sides"] = picture.images["image"].shape[-2:]
                picture.network_input = self.task.network_input(**images, **sides)
            except UserError as error:
                picture.error = str(error)
        return picture

    def predict(self, pictures: list[Picture]) -> None:
        """Fill in predictions, inputs of one size together as far as evaluation would do it."""
        by_shape: dict[torch.Size, list[tuple[Picture, Tensor]]] = {}
        for picture in pictures:
            if picture.network_input is not None:
                inputs = picture.network_input
                by_shape.setdefault(inputs.shape, []).append((picture, inputs))
        for alike in by_shape.values():
            size = chunk_size(self.device, alike[0][1])
            for i in range(0, len(alike), size):
                self._predict_chunk(*zip(*alike[i : i + size], strict=True))

    def _predict_chunk(self, pictures: tuple[Picture, ...], inputs: tuple[Tensor, ...]) -> None:
        try:
            outputs, warning = self.forward(torch.stack(inputs))
        except (RuntimeError, MemoryError) as error:  # too little memory, above all
            reason = f"out of memory: {SPARE_MEMORY}." if is_out_of_memory(error) else error
            for picture in pictures:
                picture.error = f"{picture.job.source}: {reason}"
            return
        for picture, output in zip(pictures, outputs, strict=True):
            picture.prediction, picture.warning = output, warning

    def forward(self, batch: Tensor) -> tuple[Tensor, str]:
        """Predictions of a batch, and a warning if it took tiles for want of memory.

        Tasks whose inputs can be cut have `eval.max_pixels`: it is halved until a tile fits.
        """
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
                    check_inside(path, job.root)  # hours may have passed since `plan` looked
                    check_replaceable(path)
                    save_image(rendered[kind], path)
            except (UserError, OSError, MemoryError, RuntimeError) as problem:
                error = f"{job.source}: {problem}"
        return Picture(job._replace(frame=None), warning=picture.warning, error=error)


def frame_by_frame(jobs: Iterable[Job]) -> Generator[Job, None, None]:
    """All jobs in order; what has frames gives a job for each, and one for its error if any."""
    for job in jobs:
        if job.error or not job.has_frames:
            yield job
            continue
        read = read_frames if is_video(job.source) else frames_of
        try:
            number = 0
            with closing(read(job.source)) as frames:
                for number, frame in enumerate(frames, 1):
                    outputs = {
                        kind: path.with_name(path.name % number)
                        for kind, path in job.outputs.items()
                    }
                    yield job._replace(outputs=outputs, frame=frame, has_frames=False)
            remove_frames_after(number, job)
        except UserError as error:
            yield job._replace(error=str(error))


def remove_frames_after(number: int, job: Job) -> None:
    """Remove what an earlier call wrote of a longer video or animation of that name."""
    for pattern in job.outputs.values():
        check_inside(pattern, job.root)
        for later in count(number + 1):
            path = pattern.with_name(pattern.name % later)
            if not saved_here(path):
                break
            path.unlink()


def check_inside(path: Path, root: Path | None) -> None:
    """Raise UserError where a link leads out of the folder that no output may leave, if given."""
    folder = Path(os.path.realpath(path.parent))
    if root and not folder.is_relative_to(root):
        raise UserError(
            f"{path}: would lie outside of the folder, by a link that leads to {folder}. Remove "
            "the link, or choose another folder with -o."
        )


def check_replaceable(path: Path) -> None:
    """Raise UserError for what is at an output's place and was not written by predict.py.

    A file without content may be replaced: a power failure can leave one.
    """
    try:
        about = path.lstat()
    except OSError:  # there is none, or writing will refuse the name
        return
    if not (stat.S_ISREG(about.st_mode) and about.st_size == 0) and not saved_here(path):
        raise UserError(
            f"{path}: exists and was not written by predict.py. Choose another folder "
            "with -o, or move the file."
        )


Readers = Mapping[str, Callable[[Any], Tensor]]
Part = Callable[[Tensor, Sequence[int]], Tensor]  # `BaseTask.input_of`


def read_inputs(
    job: Job, readers: Readers, at_least: int | None = None, input_of: Part | None = None
) -> dict[str, Tensor]:
    """A job's image (see `read_image`), or the part that is the input, and what lies beside it.

    Raises UserError where they differ in size.
    """
    image = read_image(job.source, at_least) if job.frame is None else job.frame
    sides = image_size(job.source)[::-1] if job.frame is None and at_least else image.shape[-2:]
    image = input_of(image, sides) if input_of else image
    images = {"image": image}
    for name, path in job.extras.items():
        images[name] = extra = readers[name](path)
        if extra.shape[-2:] != image.shape[-2:]:
            raise UserError(
                f"{path}: {extra.shape[-1]}×{extra.shape[-2]} pixels, but "
                f"{job.source} has {image.shape[-1]}×{image.shape[-2]}. Make them alike."
            )
    return images


def at_own_size(
    job: Job, images: dict[str, Tensor], readers: Readers, input_of: Part
) -> dict[str, Tensor]:
    """What the outputs are made of, where the decoder may have scaled `images` down.

    A map alone needs no pixels of the image, only its size, and so nothing is read again for it.
    """
    if job.frame is not None:
        return images
    width, height = image_size(job.source)
    empty = input_of(images["image"].new_zeros(1).expand(3, height, width), (height, width))
    if empty.shape == images["image"].shape:
        return images
    return (
        {"image": empty}
        if list(job.outputs) == ["map"]
        else read_inputs(job, readers, None, input_of)
    )
