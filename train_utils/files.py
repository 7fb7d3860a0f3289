"""Small text files that are there whole or not at all, and where the user's cache is."""

import contextlib
import os
import threading
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The folder `name` among what we keep for this user; None for users without a home.

    Below $XDG_CACHE_HOME or ~/.cache.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pixtrain", name)
    except RuntimeError:
        return None


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once: a kill at any moment leaves the old content or the new.

    Raises OSError, with nothing left behind, if the file system refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
