"""Files that appear whole, files that others may have replaced, and the user's cache folder."""

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO


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
            sync_folder(path.parent)
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
    """Write a text file as `written_whole` does, in UTF-8; what that cannot hold is escaped."""
    with written_whole(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def open_regular(
    path: Path,
    mode: str = "rb",
    limit: int = sys.maxsize,
    links: bool = False,
    hard_links: bool = False,
    permissions: int = 0o666,
) -> IO[Any]:
    """Open a file that others may have put where it is; text is UTF-8, other characters escaped.

    links: follow them, as for a file that the user has named. Raises OSError for a link otherwise,
    for whatever else is no regular file (a pipe would be waited for), for more than `limit` bytes
    and, where it is to be written to, for a file that has a name elsewhere, too (a hard link),
    unless `hard_links` are fine.
    """
    encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
    opener = partial(
        _open_regular, limit=limit, links=links, hard_links=hard_links, permissions=permissions
    )
    return open(path, mode, encoding=encoding, errors=errors, opener=opener)


def _open_regular(
    path: str, flags: int, limit: int, links: bool, hard_links: bool, permissions: int
) -> int:
    flags |= getattr(os, "O_NONBLOCK", 0)  # neither is there on Windows
    flags |= 0 if links else getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, permissions)
    except OSError as error:
        if not links and os.path.islink(path):  # noqa: PTH114 - a str, as `open` gives it
            raise OSError(error.errno, "is a link", path) from None
        raise
    about, problem = os.fstat(descriptor), ""
    if not stat.S_ISREG(about.st_mode):
        problem = "not a regular file"
    elif about.st_nlink > 1 and flags & (os.O_WRONLY | os.O_RDWR) and not hard_links:
        problem = "is a hard link: the same file has another name"
    elif about.st_size > limit:
        problem = f"has more than {limit:,} bytes"
    if problem:
        os.close(descriptor)
        raise OSError(errno.EINVAL, problem, path)
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """A file's content, `limit` bytes at most, as `open_regular` opens it."""
    with open_regular(path, limit=limit) as file:
        return file.read(limit)


def files_named(folder: Path, pattern: str) -> list[Path]:
    """The regular files in a folder, links not among them, whose whole names match."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if re.fullmatch(pattern, entry.name) and entry.is_file(follow_symlinks=False)
        ]
    return []


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that nobody writes to now."""
    for path in files_named(folder, r"\.pixtrain-[0-9a-f]{32}\.tmp"):
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
        with open_regular(source) as content, written_whole(target) as file:
            shutil.copyfileobj(content, file)
        return
    try:
        temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Have what was renamed and removed in a folder survive a power failure."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
