"""The one exception for what a user can put right."""

from collections.abc import Sequence


class UserError(Exception):
    """Bad input or a bad setting; the message names the file or key, the cause and the fix.

    The scripts print it as a single ``error: ...`` line, without a traceback, and exit non-zero.
    """


def plain_message(error: BaseException) -> str:
    """An error's own text; from a loader worker it arrives behind the worker's traceback."""
    return str(error).strip().rpartition("train_utils.errors.UserError: ")[2]


def shortened(items: Sequence[str], limit: int = 8, separator: str = ", ") -> str:
    """The first items of a list, and how many more there are."""
    more = f" … and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's or the host's memory did not suffice."""
    texts = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "cannot allocate memory",
    )
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in texts)
