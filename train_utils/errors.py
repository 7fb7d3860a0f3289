"""The one exception for what a user can put right."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad input or a bad setting; the message names the file or key, the cause and the fix.

    The scripts print it as a single ``error: ...`` line, without a traceback, and exit non-zero.
    """


def require(condition: bool, key: str, problem: str) -> None:
    """Raise a ValueError about a setting, unless a condition holds; UserErrors are made of them."""
    if not condition:
        raise ValueError(f"{key}: {problem}")


def plain_message(error: BaseException) -> str:
    """An error's own text; from a loader worker it arrives behind the worker's traceback."""
    return str(error).strip().rpartition("train_utils.errors.UserError: ")[2]


def shortened(items: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    """The first items of a list, and how many more there are."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


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
