"""Folders and files of a cache that no other user of the machine can read, replace or cut short.

Where others may write beside us, they may have made a file of that name first. So only folders and
regular files of ours are used; on Windows, where users' folders are closed to others, owners and
modes are not looked at. What we make is open to nobody else, whatever the umask.
"""

import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from train_utils.errors import UserError, typed
from train_utils.files import open_regular


def private_folder(path: Path, otherwise: str, named: bool = False) -> None:
    """Make a folder that is ours alone, or see that it is, and close it to others.

    named: the user has named it, so it may be a link of his and stays as open as it is: a group
    that may write to it can remove files, not read or replace them.
    Raises UserError, with what to do `otherwise`, for a folder that is not ours, and OSError where
    none can be made.
    """
    if os.name != "posix":
        path.mkdir(parents=True, exist_ok=True)
        return
    for part in (path, *path.absolute().parents):
        if part.is_symlink() and (owner := part.lstat().st_uid) not in (0, os.geteuid()):
            raise not_ours(part, f"a link of user {owner}", f", or {otherwise}")
    _make_folders(path)
    status = path.stat() if named else path.lstat()
    if problem := _problem(status, stat.S_ISDIR, "no folder"):
        if not named:
            raise not_ours(path, problem, f", or {otherwise}")
        raise UserError(f"{path}: {problem}; {otherwise}.")
    if not named and status.st_mode & 0o077:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)


def open_private(path: Path, mode: str = "rb") -> IO[Any]:
    """Open a regular file of ours; a new one is closed to others.

    Raises UserError for anything else, without waiting for it, following or changing it; OSError
    where there is none.
    """
    with suppress(FileNotFoundError):
        _check_file(path, path.lstat())
    file = open_regular(path, mode, permissions=0o600)
    try:
        # What was looked at may be another one by now: so again, by the file itself.
        _check_file(path, os.fstat(file.fileno()))
    except UserError:
        file.close()
        raise
    return file


def not_ours(path: Path, problem: str, otherwise: str = "") -> UserError:
    """The error for something in a cache that cannot be used."""
    return UserError(f"{path}: {problem}. Have it removed (rm -r {typed(path)}){otherwise}.")


@contextmanager
def new_private_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, closed to others, which replaces whatever `path` is at the end of the block.

    What a kill leaves is named as the file is, followed by a dot, 32 hexadecimal digits and .tmp.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open_private(temporary, "xb") as file:
            yield file
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _make_folders(path: Path) -> None:
    if not path.parent.exists():
        _make_folders(path.parent)
    with suppress(FileExistsError):
        path.mkdir(0o700)


def _check_file(path: Path, status: os.stat_result) -> None:
    if problem := _problem(status, stat.S_ISREG, "not a regular file"):
        raise not_ours(path, problem)


def _problem(status: os.stat_result, is_right_kind: Callable[[int], bool], otherwise: str) -> str:
    """Why something is no file or folder that only we could have changed; "" if it is one."""
    if stat.S_ISLNK(status.st_mode):
        return "a link"
    if not is_right_kind(status.st_mode):
        return otherwise
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        return "a hard link"
    if os.name == "posix" and status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}"
    if os.name == "posix" and status.st_mode & stat.S_IWOTH:
        return "everyone may write to it"
    return ""
