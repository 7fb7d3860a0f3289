"""What a folder holds: its image files, and what is left out of them, by kind.

Links to files and to folders are followed, wherever they lead. A folder is entered once, whichever
ways lead to it, and none that holds the one that is listed: links in circles have an end.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from train_utils.errors import UserError, shortened
from train_utils.image_io import IMAGE_SUFFIXES, UNREAD_SUFFIXES, PathLike
from train_utils.video import is_video

_NAMED = 3  # of a kind, in a line


class Kind(NamedTuple):
    """Why files are left out, in words for one and for several, and what helps."""

    one: str
    several: str
    fix: str = ""
    by_name: bool = False  # say which, not only how many of each suffix


UNREAD = Kind("image that is not read", "images that are not read", "convert to PNG or JPEG")
BROKEN = Kind("broken link", "broken links", by_name=True)
AGAIN = Kind("folder reached by a second way", "folders reached by a second way", by_name=True)
INNER = Kind("sub-folder", "sub-folders", by_name=True)
VIDEO = Kind("video", "videos")
HIDDEN = Kind("hidden image", "hidden images")
OTHER = Kind("other file", "other files")

LeftOut = Mapping[Kind, Sequence[Path]]


class Listing(NamedTuple):
    """The image files of a folder, sorted by their path in it, and what is no such file."""

    images: list[Path]
    left_out: dict[Kind, list[Path]]


def list_folder(folder: PathLike, recursive: bool = True, apart: Path | None = None) -> Listing:
    """The image files of a folder: the same, in the same order, on every platform.

    A file counts by its suffix (`IMAGE_SUFFIXES`, in any case), also a link that leads nowhere.
    Hidden files and folders, among them the `._*` files of macOS archives, do not count; of hidden
    images it is said. apart: a folder below this one that does not count, whichever way leads to
    it. Raises UserError if the folder is missing or cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {kind}. Check the path.")
    files, left_out = walk(folder, recursive, apart)
    images = []
    for path in files:
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif not os.path.exists(path):  # noqa: PTH110 - pathlib's raises an error for closed folders
            left_out.setdefault(BROKEN, []).append(path)
        elif suffix in UNREAD_SUFFIXES:
            left_out.setdefault(UNREAD, []).append(path)
        else:
            left_out.setdefault(VIDEO if is_video(path) else OTHER, []).append(path)
    return Listing(images, left_out)


def list_images(folder: PathLike, recursive: bool = False) -> list[Path]:
    """As `list_folder`, the images alone. Raises UserError also if there is none."""
    images, left_out = list_folder(folder, recursive)
    if not images:
        raise no_images(folder, left_out)
    return images


def no_images(folder: PathLike, left_out: LeftOut, apart: Path | None = None) -> UserError:
    """The error for a folder without images, which says what else it holds."""
    kinds = f"but those in {apart}" if apart else f"({' '.join(IMAGE_SUFFIXES)})"
    holds = f", but {described(left_out)}" if left_out else ""
    return UserError(f"{folder}: holds no images {kinds}{holds}. Check the path.")


def described(left_out: LeftOut) -> str:
    """How many files of each kind, e.g. "3 images that are not read (.heic 2, .avif), 1 video"."""
    parts = []
    for kind, paths in sorted(left_out.items()):
        if kind.by_name:
            which = shortened([path.name for path in paths], _NAMED)
        else:
            suffixes = Counter(path.suffix.lower() or "no suffix" for path in paths)
            counts = [f"{name} {n:,}" if n > 1 else name for name, n in suffixes.most_common()]
            which = shortened(counts) if len(counts) > 1 else next(iter(suffixes))
        fix = f": {kind.fix}" if kind.fix else ""
        parts.append(f"{len(paths):,} {kind[len(paths) > 1]} ({which}{fix})")
    return ", ".join(parts)


def remark(folder: PathLike, count: int, what: str, left_out: LeftOut) -> str:
    """A line that says how many files of a folder are taken and what is left out; "" if nothing."""
    return f"{folder}: {count:,} {what}; left out: {described(left_out)}" if left_out else ""


def walk(
    root: Path, recursive: bool = True, apart: Path | None = None
) -> tuple[list[Path], dict[Kind, list[Path]]]:
    """All that is no folder in a folder and below, hidden names left out; and what was not entered.

    What lies in a folder itself goes before what links lead to, and links go in the order of their
    paths, so that the same way to a folder is taken every time.
    """
    files: list[Path] = []
    left_out: dict[Kind, list[Path]] = {}
    try:
        known = {_identity(folder) for folder in root.resolve().parents}
        elsewhere = _identity(apart) if apart and apart.is_dir() else None
        inner: list[Path] = [root]
        links: list[Path] = []
        while inner or links:
            folder = inner.pop() if inner else heappop(links)
            identity = _identity(folder)
            if identity == elsewhere and folder != root:
                continue
            if identity in known:
                left_out.setdefault(AGAIN, []).append(folder)
                continue
            known.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = folder / entry.name
                    if entry.name.startswith("."):
                        if path.suffix in IMAGE_SUFFIXES and not entry.name.startswith("._"):
                            left_out.setdefault(HIDDEN, []).append(path)
                    elif not _is_folder(entry):
                        files.append(path)
                    elif not recursive:
                        left_out.setdefault(INNER, []).append(path)
                    elif entry.is_symlink():
                        heappush(links, path)
                    else:
                        inner.append(path)
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be listed ({error.strerror}). Check its permissions."
        ) from error
    return sorted(files, key=lambda path: path.relative_to(root).as_posix()), left_out


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in circles, or through a closed folder
        return False


def _identity(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path fits a pattern, both in parts; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:]
        return any(matches(parts[start:], rest) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])
