"""Which file becomes which files, decided before anything is read or written."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from glob import glob, has_magic
from pathlib import Path

from train_utils.errors import UserError, typed
from train_utils.image_io import count_frames
from train_utils.listing import (
    BROKEN,
    INNER,
    UNREAD,
    VIDEO,
    Kind,
    LeftOut,
    described,
    list_folder,
    list_images,
    matches,
    no_images,
    walk,
)
from train_utils.pairing import Names
from train_utils.prediction import Job, check_replaceable
from train_utils.video import is_video, require_ffmpeg

Source = tuple[Path, Path]  # a file, and its path below the output folder

_MAX_NAME = 255  # bytes
_IGNORES_CASE = sys.platform in ("win32", "darwin")  # as most file systems there do
_PROBLEMS = {
    UNREAD: "pictures of this format are not read. Convert it to PNG or JPEG.",
    BROKEN: "a link that leads nowhere. Restore what it led to, or remove it.",
}
FILMED = VIDEO._replace(fix="name each to have it done")
BESIDE = Kind("raw file beside an image of its name", "raw files beside images of their names")
TWICE = Kind("file named a second time", "files named a second time", by_name=True)
_FRAME = "%06d"  # what the outputs of frames are called


def plan(
    inputs: list[str],
    output: Path,
    kinds: list[str],
    extras: Mapping[str, str] | None = None,
    left_out: dict[Kind, list[Path]] | None = None,
) -> list[Job]:
    """Every input file with its output paths, and with what lies beside it.

    A picture of a format that is not read, and a broken link, is a job with an error.
    kinds: "map", and others. extras: a file or folder of what lies beside the images, by name.
    left_out: filled with what the inputs hold and is no job, by kind.
    Raises UserError when there is no input at all, when none has its extra, when an output would
    overwrite an input, another output or a file that predict.py has not written, and for a video
    if there is no ffmpeg, or where its frames would need extras.
    """
    first = next(folder for folder in (output, *output.parents) if os.path.lexists(folder))
    if not first.is_dir():
        raise UserError(f"{first}: not a folder. Choose another one with -o.")
    left_out = {} if left_out is None else left_out
    sources = list(_sources(inputs, output, left_out))
    found = {name: find_extra(name, Path(of), sources) for name, of in (extras or {}).items()}
    used = {_real(path) for files in found.values() for path in files.values()}
    jobs: dict[Path, Job] = {}
    for source, relative in sources:
        if _real(source) in used:
            continue  # it lies among the images
        if _real(source) in jobs:
            left_out.setdefault(TWICE, []).append(source)
            continue
        has_frames = is_video(source) or count_frames(source) > 1
        stem, problem = output_stem(output, relative, kinds, has_frames)
        if problem:
            jobs[_real(source)] = Job(source, {}, error=f"{source}: {problem}")
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
        job = Job(source, outputs, beside, root=_real(output), has_frames=has_frames)
        jobs[_real(source)] = job
    for kind, problem in _PROBLEMS.items():
        for source in left_out.get(kind, []):
            jobs.setdefault(source.absolute(), Job(source, {}, error=f"{source}: {problem}"))
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
    root, folder = _real(output), (stem if has_frames else stem.parent)
    if root not in (_real(folder) / name).parents:
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
        if any(_real(source) == _real(given) for source, _ in sources):
            raise UserError(f"{flag}: is the image itself. Give its {name}.")
        return {source: given for source, _ in sources}
    files: dict[str, list[Path]] = {}
    for path in list_images(given, recursive=True):
        files.setdefault(_stem(path.relative_to(given)), []).append(path)
    found = {}
    for source, relative in sources:
        stem, folder = _stem(relative), _real(source).parent
        # Beside an image, a file of its own name is nothing to it but another image.
        elsewhere = [path for path in files.get(stem, []) if _real(path).parent != folder]
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


def _stem(path: Path) -> str:
    """What an image and its extras are compared by, whatever Unicode form their names have."""
    return str(Names().stem(path))


def _check_outputs(jobs: dict[Path, Job]) -> None:
    """Raise UserError if an output would overwrite what it must not; `jobs` by resolved source."""
    beside = {_real(path) for job in jobs.values() for path in job.extras.values()}
    inputs = jobs.keys() | beside
    # How many frames a video has is not known yet, so all of their folder is theirs.
    framed = {
        _real(job.outputs["map"]).parent: job.source for job in jobs.values() if job.has_frames
    }
    shared = framed.keys() & {path.parent for path in inputs}
    taken: dict[str, Path] = {}
    for job in jobs.values():
        for path in job.outputs.values():
            target = _real(path)
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


def _sources(
    inputs: Iterable[str], output: Path, left_out: dict[Kind, list[Path]]
) -> Iterator[Source]:
    """Every input file, folder trees mirrored; and, into `left_out`, what else is in folders."""
    for text in inputs:
        if not text:
            raise UserError("an input is empty. Name an image, a folder or a pattern.")
        path = Path(text)
        if _exists(path) and path.is_dir():
            images, others = list_folder(path, apart=output)
            if not images and UNREAD not in others:
                raise no_images(path, others)
            others[FILMED] = others.pop(VIDEO, [])
            done = {image.with_suffix("") for image in images}
            others[BESIDE] = [p for p in others.get(UNREAD, []) if p.with_suffix("") in done]
            others[UNREAD] = [p for p in others.get(UNREAD, []) if p.with_suffix("") not in done]
            _add(left_out, others)
            yield from ((file, file.relative_to(path)) for file in images)
        elif has_magic(text) and not _exists(path):
            root = Path(*_before_wildcard(path.parts))
            files = _matches(path, root, left_out)
            if not files:
                raise UserError(f"{text}: no file matches the pattern. Check the path.")
            yield from ((file, file.relative_to(root)) for file in files)
        else:
            yield path, Path(path.name)  # if it is missing, it fails as its turn comes


def _matches(pattern: Path, root: Path, left_out: dict[Kind, list[Path]]) -> list[Path]:
    """The files that a pattern matches, none of them hidden, in order; and what is left out."""
    rest = pattern.relative_to(root).parts
    if "**" in rest:
        files, others = walk(root)
        found = [path for path in files if matches(path.relative_to(root).parts, rest)]
        _add(left_out, others)
        return found
    found = sorted(Path(match) for match in glob(str(pattern)))  # noqa: PTH207
    _add(left_out, {INNER: [path for path in found if path.is_dir()]})
    return [path for path in found if not path.is_dir()]


def _add(left_out: dict[Kind, list[Path]], more: LeftOut) -> None:
    for kind, paths in more.items():
        if paths:
            left_out.setdefault(kind, []).extend(paths)


def remarks(left_out: LeftOut) -> str:
    """What the line that counts what was done and what failed says of the rest."""
    failed = {kind: paths for kind, paths in left_out.items() if kind in _PROBLEMS}
    rest = {kind: paths for kind, paths in left_out.items() if kind not in _PROBLEMS}
    among = f" ({described(failed)})" if failed else ""
    return among + (f"; left out: {described(rest)}" if rest else "")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # pathlib's raises an error for a link in circles


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - pathlib's raises an error for a name too long


def _before_wildcard(parts: tuple[str, ...]) -> list[str]:
    plain = []
    for part in parts[:-1]:
        if has_magic(part):
            break
        plain.append(part)
    return plain or ([os.curdir] if not parts or parts[0] != os.sep else [os.sep])
