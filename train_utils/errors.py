"""The one exception for what a user can put right, and what may be shown of foreign text.

Names of files, keys and values may come from strangers: whatever is printed or logged goes through
`printable`, whatever is proposed to be typed through `typed`.
"""

import errno
import os
import re
import reprlib
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_LONGEST = 8000  # characters of a line; what a stranger's file says may be megabytes
_SHOWN = 80  # characters of a value

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, _SHOWN, _SHOWN

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FREE_DISK = (
    "Files are as last saved: free disk space, and start again; a training continues with "
    "--resume auto."
)


class UserError(Exception):
    """Bad input or a bad setting; the message names the file or key, the cause and the fix.

    The scripts print it as a single ``error: ...`` line, without a traceback, and exit non-zero.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str | os.PathLike[str]) -> str:
    """A text, or a path, as one line that any terminal or log can take.

    Line breaks, control characters, those that turn the direction of writing, and bytes that are
    not UTF-8 (surrogate escapes in a str) become backslash escapes. Of a text that fills screens
    the middle is left out.
    """
    text = os.fspath(text)
    if (more := len(text) - _LONGEST) > 0:
        half = _LONGEST // 2
        text = f"{text[:half]} … {more:,} characters more … {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def brief(value: Any) -> str:
    """The start of a value's repr, of which no more is made than is shown."""
    text = _short.repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def typed(word: str | os.PathLike[str]) -> str:
    """A path, or a value, as a shell takes it: quoted where it must be, and never for a flag.

    One with control characters is quoted in $'…', which bash and zsh know, and a POSIX sh need not.
    """
    text = os.fspath(word)
    text = f"./{text}" if text.startswith("-") else text
    if text.isprintable():
        return shlex.quote(text)
    plain = re.compile(rb"[\w./:+ -]", re.ASCII)
    shown = (chr(b) if plain.match(bytes([b])) else f"\\{b:03o}" for b in os.fsencode(text))
    return f"$'{''.join(shown)}'"


def tell(text: str) -> None:
    """Print a line to standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def print_trace(_kind: Any, error: BaseException | None, _trace: Any = None) -> None:
    """Python's own report of an error that nobody caught, whose message may quote a file."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        tell(line)


def require(condition: bool, key: str, problem: str) -> None:
    """Raise a ValueError about a setting unless a condition holds; see `config.build`."""
    if not condition:
        raise ValueError(f"{key}: {problem}")


def require_between(settings: Any, low: float, high: float, *keys: str) -> None:
    """Raise a ValueError about the first of some settings that is neither in a range nor null."""
    for key in keys:
        value = getattr(settings, key)
        require(value is None or low <= value <= high, key, f"must be {low} to {high}")


def plain_message(error: BaseException) -> str:
    """An error's own text; from a loader worker it arrives behind the worker's traceback."""
    text = str(error.args[0]) if isinstance(error, UserError) else str(error)
    return printable(text.strip().rpartition("train_utils.errors.UserError: ")[2])


def shortened(items: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    """The first items of a list, none of them for long, and how many more there are."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*(item[:1000] for item in items[:limit]), *more])


def described(value: Any) -> str:
    """A value in words: its type, or the dtype and shape of a tensor or array."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        kind = "" if str(value.dtype).startswith("torch.") else "a numpy array, "
        return f"{kind}{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None:
        return "None"
    name = type(value).__name__
    text = f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
    if not isinstance(value, (Mapping, list, tuple)):
        return text
    if not value:
        return f"an empty {name}"
    parts = value.items() if isinstance(value, Mapping) else [("", part) for part in value]
    first = [f"{key}: {described(part)}" if key else described(part) for key, part in parts][:1]
    return f"{text} of {len(value)} ({', '.join(first + ['…'] * (len(value) > 1))})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the host's memory did not suffice."""
    texts = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "cannot allocate memory",
        # cuBLAS, cuDNN, and cuDNN where no algorithm's workspace found room
        "alloc_failed",
        "allocation_failed",
        "unable to find an engine to execute this computation",
        "unable to find a valid cudnn algorithm",
        # NCCL
        "failed to cuda calloc",
    )
    said = isinstance(error, RuntimeError) and any(t in str(error).lower() for t in texts)
    return said or isinstance(error, MemoryError)


@contextmanager
def memory_errors(what: str, remedy: str) -> Iterator[None]:
    """UserError that says what to do where memory does not suffice for `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {what}: {remedy}.") from error
