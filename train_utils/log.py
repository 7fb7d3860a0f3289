"""The project's logger: plain lines on rank 0's standard output, and a file once a run has one."""

import logging
import sys
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from train_utils.collectives import is_main_process
from train_utils.errors import printable
from train_utils.files import open_regular


def get_logger() -> logging.Logger:
    """The logger of this project; the first call gives it a console handler.

    Ranks other than 0 print warnings and errors only. No rank's `print` is patched.
    """
    logger = logging.getLogger("pixtrain")
    if not logger.handlers:
        handler = _Console()
        handler.setFormatter(_OneLine("%(message)s"))
        handler.addFilter(_main_process_or_warning)
        logger.addHandler(handler)
        logger.addHandler(_early)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


@cache
def say_once(text: str) -> None:
    """Log a line the first time that a process says it."""
    get_logger().info(text)


class _OneLine(logging.Formatter):
    """A record is a line: what it quotes can neither begin another one nor steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Early(logging.Handler):
    """Keeps what is said before a run has a file to write it to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=100)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


_early = _Early()


class _Console(logging.StreamHandler):
    """Writes to whatever `sys.stdout` is at the time, so that redirected output is honoured."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def _main_process_or_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or is_main_process()


class _LogFile(logging.FileHandler):
    def _open(self) -> Any:
        return open_regular(Path(self.baseFilename), self.mode)

    def handleError(self, record: logging.LogRecord) -> None:
        """Do without lines for which the disk has no room."""


def log_to_file(path: Path) -> None:
    """Also append every line, with its time, to a file: those of before too.

    Raises OSError as `open_regular` does.
    """
    handler = _LogFile(path)
    handler.setFormatter(_OneLine("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    for record in _early.records:
        handler.handle(record)
    _early.records.clear()
    get_logger().removeHandler(_early)
    get_logger().addHandler(handler)
