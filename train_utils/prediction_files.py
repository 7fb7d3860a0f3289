"""Which file becomes which files, decided before anything is read or written."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from glob import glob, has_magic
from pathlib import Path

from train_utils.collectives import is_main_process
from train_utils.errors import UserError, tell, typed
from train_utils.image_io import count_frames, list_images
from train_utils.prediction import Job, check_replaceable
from train_utils.video import is_video, require_ffmpeg

Source = tuple[Path, Path]  # a file, and its path below the output folder

_MAX_NAME = 255  # bytes
_IGNORES_CASE = sys.platform in ("win32", "darwin")  # as most file systems there do
_HIDDEN = re.compile(r"/\.(?!\./)")
_FRAME = "%06d"  # what the outputs of frames are called


def plan(
    inputs: list[str], output: Path, kinds: list[str], extras: Mapping[str, str] | None = None
) -> list[Job]:
    """Every input file with its output paths, and with what lies beside it.

    kinds: "map", and others. extras: a file or folder of what lies beside the images, by name.
    Raises UserError when there is no input at all, when none has its extra, when an output would
    overwrite an input, another output or a file that predict.py has not written, and for a video
    if there is no ffmpeg, or where its frames would need extras.
    """
    first = next(folder for folder in (output, *output.parents) if os.path.lexists(folder))
    if not first.is_dir():
        raise UserError(f"{first}: not a folder. Choose another one with -o.")
    sources = list(_sources(inputs, output))
    found = {name: find_extra(name, Path(of), sources) for name, of in (extras or {}).items()}
    used = {path.resolve() for files in found.values() for path in files.values()}
    jobs: dict[Path, Job] = {}
    for source, relative in sources:
        if source.resolve() in used:
            continue  # it lies among the images
        has_frames = is_video(source) or count_frames(source) > 1
        stem, problem = output_stem(output, relative, kinds, has_frames)
        if problem:
            error = f"{source}: {problem}"
            jobs.setdefault(source.resolve(), Job(source, {}, error=error))
            continue
        if is_video(source):
            require_ffmpeg(source)
        if has_frames:
            if found:
                name = next(iter(found))
                raise UserError(
                    f"{source}: its frames need a {name} each. Extract them into a "
                    f"folder, and name that and a folder of {name}s."
                )
            stem /= _FRAME
        outputs = {kind: stem.with_name(stem.name + _ending(kind)) for kind in kinds}
        beside = {name: files[source] for name, files in found.items()}
        job = Job(source, outputs, beside, root=output.resolve(), has_frames=has_frames)
        jobs.setdefault(source.resolve(), job)
    if not any(_exists(job.source) for job in jobs.values()):
        raise UserError(f"{', '.join(inputs)}: no image there. Check the path.")
    _check_outputs(jobs)
    return list(jobs.values())


def _ending(kind: str) -> str:
    return ".png" if kind == "map" else f"_{kind}.png"


def output_stem(
    output: Path, relative: Path, kinds: Iterable[str], has_frames: bool = False
) -> tuple[Path, str]:
    """Where a file's outputs lie, without `_<kind>.png`, and why nothing can be written there.

    relative: the file's path below the output folder, which no output leaves, whatever its name and
    whichever links are there.
    """
    name = relative.stem
    if not name.strip("."):
        return output, "without its suffix no name is left. Rename it."
    stem = output / relative.with_name(name)
    longest = max(len(_ending(kind)) for kind in kinds)
    if len(os.fsencode(name)) + longest > _MAX_NAME:
        return stem, f"the name of its output would be longer than {_MAX_NAME} bytes. Rename it."
    if os.pardir in relative.parts:
        return stem, "its output would lie outside of the folder. Name it without '..'."
    root, folder = output.resolve(), (stem if has_frames else stem.parent)
    if root not in (folder.resolve() / name).parents:
        return stem, f"its output would lie outside of the folder, by the link {folder}."
    return stem, ""


def find_extra(name: str, given: Path, sources: list[Source]) -> dict[Path, Path]:
    """What is called `name` beside every source: the file given, or of a folder the same name.

    In a folder, `a/photo_<name>.*` goes before `a/photo.*`. A source without gets a file that is
    not there, and so fails by itself. Raises UserError if there is none for any source.
    """
    flag = f"--{name} {typed(given)}"
    if not given.is_dir():
        if len(sources) > 1:
            raise UserError(f"{flag}: is one file for several images. Give a folder.")
        if any(source.resolve() == given.resolve() for source, _ in sources):
            raise UserError(f"{flag}: is the image itself. Give its {name}.")
        return {source: given for source, _ in sources}
    files: dict[str, list[Path]] = {}
    for path in list_images(given, recursive=True):
        files.setdefault(path.relative_to(given).with_suffix("").as_posix(), []).append(path)
    found = {}
    for source, relative in sources:
        stem, folder = relative.with_suffix("").as_posix(), source.resolve().parent
        # Beside an image, a file of its own name is nothing to it but another image.
        elsewhere = [path for path in files.get(stem, []) if path.resolve().parent != folder]
        candidates = files.get(f"{stem}_{name}") or elsewhere
        if len(candidates) > 1:
            raise UserError(
                f"{candidates[0]}: only the suffix tells it from "
                f"{candidates[1].name}. Remove or rename one of the two."
            )
        if candidates:
            found[source] = candidates[0]
    if sources and not found:
        raise UserError(
            f"{flag}: holds no {name} for {sources[0][0]}. Name each like its image, or "
            f"<image>_{name}."
        )
    for source, relative in sources:  # one that is an extra itself is no input
        found.setdefault(source, given / relative.with_name(f"{relative.stem}_{name}.png"))
    return found


def _check_outputs(jobs: dict[Path, Job]) -> None:
    """Raise UserError if an output would overwrite what it must not; `jobs` by resolved source."""
    beside = {path.resolve() for job in jobs.values() for path in job.extras.values()}
    inputs = jobs.keys() | beside
    # How many frames a video has is not known yet, so all of their folder is theirs.
    framed = {
        job.outputs["map"].resolve().parent: job.source for job in jobs.values() if job.has_frames
    }
    shared = framed.keys() & {path.parent for path in inputs}
    taken: dict[str, Path] = {}
    for job in jobs.values():
        for path in job.outputs.values():
            target = path.resolve()
            if target in inputs or target.parent in shared:
                raise UserError(
                    f"{path}: the output of {job.source} would overwrite an "
                    "input. Choose another folder with -o."
                )
            place = str(target).casefold() if _IGNORES_CASE else str(target)
            other = taken.get(place, framed.get(target.parent, job.source))
            if other != job.source:
                raise UserError(
                    f"{path}: {other} and {job.source} "
                    "would both be written there. Rename one, or predict them into different "
                    "folders with -o."
                )
            for file in path.parent.glob("*.png") if target.parent in framed else [path]:
                check_replaceable(file)
            taken[place] = job.source


def _sources(inputs: Iterable[str], output: Path) -> Iterator[Source]:
    """Every input file, folder trees mirrored."""
    for text in inputs:
        if not text:
            raise UserError("an input is empty. Name an image, a folder or a pattern.")
        path = Path(text)
        if _exists(path) and path.is_dir():
            inside = output.resolve()
            if videos := sum(is_video(file) for file in path.rglob("*")):
                left_out = f"{videos} video(s) in {path} are left out"
                if is_main_process():
                    tell(f"note: {left_out}: name each to have it done.")
            for file in list_images(path, recursive=True):
                if inside == path.resolve() or inside not in file.resolve().parents:
                    yield file, file.relative_to(path)
        elif has_magic(text) and not _exists(path):
            root = Path(*_before_wildcard(path.parts))
            files = sorted(match for match in _matches(path, root) if match.is_file())
            if not files:
                raise UserError(f"{text}: no file matches the pattern. Check the path.")
            yield from ((file, file.relative_to(root)) for file in files)
        else:
            yield path, Path(path.name)  # if it is missing, it fails as its turn comes


def _matches(pattern: Path, root: Path) -> list[Path]:
    """The paths that a pattern matches, none of them hidden.

    `**` follows no links to folders: two of them that lead in circles have no end.
    """
    rest = pattern.relative_to(root).parts
    if "**" not in rest:
        return [Path(match) for match in glob(str(pattern))]  # noqa: PTH207
    found = root.glob("/".join([*rest, "*"] if rest[-1] == "**" else rest))
    return [path for path in found if not _HIDDEN.search(f"/{path.relative_to(root).as_posix()}")]


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib's raises an error for a name too long


def _before_wildcard(parts: tuple[str, ...]) -> list[str]:
    plain = []
    for part in parts[:-1]:
        if has_magic(part):
            break
        plain.append(part)
    return plain or ([os.curdir] if not parts or parts[0] != os.sep else [os.sep])
