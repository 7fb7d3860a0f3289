"""The folder that a check writes to: its own files are replaced, those of others never are."""

import hashlib
import os
import re
from pathlib import Path

from train_utils.errors import UserError, typed
from train_utils.files import read_regular, write_text

_LARGEST = 2**29  # bytes of a file of ours
# The last line of a file of ours, with a hash of all lines before it, by suffix.
_MARKS = {
    ".json": ',"written by": "pixtrain check {}"}}',
    ".html": "<!-- pixtrain check {} -->",
    ".txt": "# pixtrain check {}",
}


class CheckFolder:
    """Where a check's files go. Raises UserError for what is no folder.

    A file is ours as long as nobody has edited it: its last line has a hash of the others.
    """

    def __init__(self, path: Path, flag: str = "-o") -> None:
        self.path, self.flag = path, flag
        first = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        if not first.is_dir():
            raise UserError(f"{first}: not a folder. Choose another one with {flag}.")

    def require(self, *names: str) -> None:
        """UserError for a file of one of these names that was not written here, or was edited."""
        for path in (self.path / name for name in names):
            if os.path.lexists(path) and not _is_ours(path):
                raise UserError(
                    f"{path}: was not written by check.py, or has been edited since. Choose "
                    f"another place with {self.flag}, or move it: mv {typed(path)} "
                    f"{typed(f'{path}.kept')}"
                )

    def write(self, name: str, text: str) -> Path:
        """Write a text file, whole or not at all; UserError as `require` raises it."""
        self.require(name)
        path = self.path / name
        body = text.rstrip("\n") + "\n"
        if path.suffix == ".json":
            body = text.rstrip().removesuffix("}").rstrip() + "\n"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(path, body + _MARKS[path.suffix].format(_hash(body)) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}). Make room, or choose another "
                f"place with {self.flag}."
            ) from error
        return path


def _hash(text: str) -> str:
    content = text.encode(errors="backslashreplace")  # as `write_text` does
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _is_ours(path: Path) -> bool:
    try:
        if not (text := read_regular(path, _LARGEST).decode()):
            return True  # a power failure can leave one
    except (OSError, UnicodeDecodeError):
        return False
    body, _, last = text.removesuffix("\n").rpartition("\n")
    found = re.search(r"pixtrain check ([0-9a-f]{32})", last)
    return found is not None and found[1] == _hash(f"{body}\n")
