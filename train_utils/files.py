"""Files that are there whole or not at all, and where the user's cache is."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO


def user_cache(name: str) -> Path | None:
    """The folder `name` among what we keep for this user; None for users without a home.

    Below $XDG_CACHE_HOME or ~/.cache.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pixtrain", name)
    except RuntimeError:
        return None


@contextmanager
def written_whole(
    path: Path, links: Sequence[Path] = (), durable: bool = True
) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` at the end of the block.

    A kill at any moment leaves the old file or the new one; an error leaves the old one, and
    nothing beside it. durable: the same holds for a power failure, at the price of waiting for the
    disk. links: other places of the same file, without a second copy where the file system can;
    they are replaced before `path` is. Raises OSError if the file system refuses.
    """
    temporary = _temporary(path.parent)
    try:
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        for link in links:
            _link(temporary, link)
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def hash_of_files(paths: Iterable[Path], start: str) -> str:
    """A hash of a text and of the places, sizes and times of change of files.

    Raises OSError for a file that is not there.
    """
    digest = hashlib.blake2b(start.encode(errors="surrogateescape"), digest_size=16)
    for path in paths:
        stat, name = path.stat(), os.fsencode(path.absolute())
        times = stat.st_mtime_ns, stat.st_ctime_ns  # the second, too, after cp -p or rsync -t
        digest.update(b"\0%b\0%d %d %d" % (name, stat.st_size, *times))
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file as `written_whole` does."""
    with written_whole(path) as file:
        file.write(text.encode())


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that nobody writes to now."""
    for path in folder.glob(".pixtrain-*.tmp"):
        with suppress(OSError):
            path.unlink()


def _temporary(folder: Path) -> Path:
    # Not named after the file, whose name may be as long as the file system takes.
    return folder / f".pixtrain-{uuid.uuid4().hex}.tmp"


def _link(source: Path, target: Path) -> None:
    temporary = _temporary(target.parent)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without links
        with source.open("rb") as content, written_whole(target) as file:
            shutil.copyfileobj(content, file)
        return
    try:
        temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # makes the rename itself survive a power failure
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; a pipe or a device is refused at once, where `open` might wait for ever.

    Raises OSError.
    """

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=without_waiting)  # noqa: SIM115
    if not S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file
