"""Decoded samples in one memory-mapped file that loader workers and ranks of a machine share.

A pack has a slot of fixed place and size for every item and is filled by whoever first needs one.
A slot counts as valid after its bytes are written; every process compares the bytes with their
checksum when it first reads a slot, and what does not agree is made again from the files. So no
kill, crash, full disk or damage before that can give another sample than the files give.

The name of a pack holds a hash of what its items depend on: paths, sizes and times of change of the
files, what the caller says, and the machine, since machines that share a file system do not see
each other's writes in order. A file that changes while a run goes on is noticed by the next start.
"""

import atexit
import errno
import hashlib
import mmap
import os
import platform
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from train_utils.errors import UserError
from train_utils.files import hash_of_files, remove_temporaries, user_cache, written_whole
from train_utils.image_io import PathLike, printable
from train_utils.log import get_logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Shape = tuple[int, int, int]  # channels, height, width

_FORMAT = 2  # to be raised when the meaning of a pack's bytes changes
_SUFFIX = ".pack"
_ALIGNMENT = 64
_VALID = 0x600DDA7A
# The file: a header; of all slots, where they begin and what shapes their two parts have; of all
# slots, whether they are filled; the parts.
_HEADER = np.dtype([("layout_crc", "<u8"), ("bytes", "<u8")])
_LAYOUT = np.dtype([("offset", "<u8"), ("shapes", "<u4", (2, 3))])
_STATE = np.dtype([("crc", "<u4"), ("valid", "<u4")])
_SHARED_MEMORY = Path("/dev/shm")


class SampleCache:
    """Items of two uint8 parts [C, H, W], by number, in a pack that has a slot for each.

    numbers: the item in slot 0, 1, …; others are not kept.
    """

    def __init__(self, path: Path, numbers: Sequence[int]) -> None:
        self.path, self._items = path, len(numbers)
        self._slots = np.full(max(numbers) + 1, -1)
        self._slots[numbers] = np.arange(len(numbers))
        self._open()

    def get(self, number: int, make: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The parts of an item, from the pack or by `make(number)`, which then are kept."""
        slot = int(self._slots[number]) if number < len(self._slots) else -1
        if slot < 0:
            return make(number)
        parts = self._read(slot)
        if parts is None:
            parts = make(number)
            self._write(slot, parts)
        return parts

    def _open(self) -> None:
        """Map the pack, and keep others from removing it for as long as this process lives."""
        self._file = self.path.open("r+b")
        _lock(self._file, shared=True)
        self._map = mmap.mmap(self._file.fileno(), 0)
        start = _HEADER.itemsize
        self._layout = np.frombuffer(self._map, _LAYOUT, self._items, start)
        self._state = np.frombuffer(self._map, _STATE, self._items, start + self._layout.nbytes)
        self._checked = np.zeros(self._items, dtype=bool)

    def _read(self, slot: int) -> tuple[Tensor, ...] | None:
        """A copy of the parts, since whoever gets them may work in place; None if not valid."""
        state, layout = self._state[slot], self._layout[slot]
        if state["valid"] != _VALID:
            return None
        start, shapes = int(layout["offset"]), layout["shapes"].tolist()
        content = np.frombuffer(self._map, np.uint8, _volume(shapes), start).copy()
        if not self._checked[slot]:
            if zlib.crc32(content.data) != state["crc"]:
                return None
            self._checked[slot] = True
        return tuple(part.permute(2, 0, 1) for part in _parts(torch.from_numpy(content), shapes))

    def _write(self, slot: int, parts: Sequence[Tensor]) -> None:
        """Fill a slot, unless the parts are not as foreseen: then they are made anew each time."""
        state, layout = self._state[slot], self._layout[slot]
        shapes = layout["shapes"].tolist()
        kept = all(part.dtype == torch.uint8 for part in parts)
        if not kept or [list(part.shape) for part in parts] != shapes:
            return
        start = int(layout["offset"])
        content = np.frombuffer(self._map, np.uint8, _volume(shapes), start)
        state["valid"] = 0
        for place, part in zip(_parts(content, shapes), parts, strict=True):
            for channel, plane in enumerate(part.as_subclass(Tensor).numpy()):
                place[..., channel] = plane  # far quicker than a few bytes at a time
        state["crc"] = zlib.crc32(content.data)
        state["valid"] = _VALID
        self._checked[slot] = True

    def remove_after_use(self) -> None:
        """At the end of this process remove the pack, unless others still use it."""

        def remove() -> None:
            with suppress(OSError), _alone(self.path.parent):
                if fcntl:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
                _remove_if_unused(self.path)

        atexit.register(remove)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_items": self._items, "_slots": self._slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def open_cache(
    kind: str,
    folder: PathLike | None,
    numbers: Sequence[int],
    files: Iterable[Path],
    description: str,
    family: str,
    shapes: Callable[[], Sequence[Sequence[Shape]]],
) -> SampleCache:
    """The pack of the items that `numbers` name, made if there is none.

    kind: "ram" or "disk"; folder: of packs on disk, None for the user's cache folder.
    files: those behind the items, in the order of `numbers`. description: what else the items
    depend on. family: names the data; another pack of the same family, if no process uses it, is
    outdated and removed when a new one is made. shapes: those of each item's parts, asked for only
    to make a pack.

    Raises UserError where there is no room for the pack or no place to put it.
    """
    place = _memory_folder() if kind == "ram" else _disk_folder(folder)
    prefix = hashlib.blake2b(family.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    try:
        identity = hash_of_files(files, f"{_FORMAT} {platform.node()} {description}")
    except OSError as error:
        problem = f"cannot be read ({error.strerror}). Check the path."
        raise UserError(f"{printable(error.filename)}: {problem}") from error
    path = place / f"{prefix}-{identity}{_SUFFIX}"
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(place):  # one process makes the pack, the others find it
            made = not _fits(path, len(numbers))
            if made:
                _remove_unused(place, "" if kind == "ram" else prefix)
                _make(path, shapes(), kind)
            cache = SampleCache(path, numbers)
    except OSError as error:
        raise UserError(
            f"{printable(place)}: no cache can be kept there ({error.strerror}). Name another "
            "folder by data.cache_dir, or go without data.cache."
        ) from error
    if kind == "ram":
        cache.remove_after_use()
    size = path.stat().st_size
    get_logger().info(
        f"{'new' if made else 'found'} cache of {len(numbers)} samples: {printable(path)}, "
        f"{size / 1e6:,.0f} MB"
    )
    return cache


# --- where packs lie -----------------------------------------------------------------------------


def _memory_folder() -> Path:
    if not _SHARED_MEMORY.is_dir():
        raise UserError(
            f"data.cache=ram: needs {_SHARED_MEMORY}, which this system does not have. Use disk: "
            "what is read often stays in memory there, too."
        )
    return _SHARED_MEMORY / f"pixtrain-{os.getuid()}"


def _disk_folder(folder: PathLike | None) -> Path:
    place = Path(folder) if folder else user_cache("samples")
    if place is None:
        raise UserError(
            "data.cache_dir: there is no home folder to keep a cache in. Name a folder."
        )
    return place


def _remove_unused(place: Path, prefix: str) -> None:
    for path in place.glob(f"{prefix}*{_SUFFIX}"):
        if _remove_if_unused(path):
            get_logger().info(f"removed an outdated cache: {printable(path)}")
    remove_temporaries(place, "pack-")


def _remove_if_unused(path: Path) -> bool:
    """Remove a pack, if no process has it open."""
    with suppress(OSError), path.open("rb") as file:
        if fcntl and _lock(file, shared=False):
            path.unlink()
            return True
    return False


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process at a time."""
    with (place / "lock").open("ab") as file:
        _lock(file, shared=False, wait=True)
        yield


def _lock(file: BinaryIO, shared: bool, wait: bool = False) -> bool:
    """Whether a file could be locked; where locks are unknown, it could."""
    if fcntl is None:
        return True
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


# --- making packs --------------------------------------------------------------------------------


def _make(path: Path, shapes: Sequence[Sequence[Shape]], kind: str) -> None:
    """An empty pack with a slot for parts of these shapes of each item."""
    layout = np.zeros(len(shapes), _LAYOUT)
    layout["shapes"] = shapes
    sizes = layout["shapes"].astype(np.int64).prod(axis=2).sum(axis=1)
    sizes += -sizes % _ALIGNMENT
    begin = _HEADER.itemsize + len(shapes) * (_LAYOUT.itemsize + _STATE.itemsize)
    begin += -begin % _ALIGNMENT
    layout["offset"] = begin + np.cumsum(sizes) - sizes
    total = begin + int(sizes.sum())
    header = np.array([(zlib.crc32(layout.tobytes()), total)], _HEADER)

    with written_whole(path, durable=False, purpose="pack-") as file:
        _reserve(file, total, path.parent, kind)
        file.write(header.tobytes() + layout.tobytes())


def _reserve(file: BinaryIO, total: int, place: Path, kind: str) -> None:
    """Take all the room at once: a mapped file for which there is none kills its writer later."""
    free = shutil.disk_usage(place).free
    if kind == "ram":
        free = min(free, _available_memory())
    try:
        if total > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, total)
        else:
            file.truncate(total)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise UserError(
                f"data.cache={kind}: the samples need {total:,} bytes, more than a file in "
                f"{printable(place)} may have. Raise the limit (ulimit -f), or go without."
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
            raise
        other = (
            "Use --cache disk, or, in a container, enlarge it (docker --shm-size)."
            if kind == "ram"
            else "Make room, name a folder on another disk by data.cache_dir, or go without."
        )
        raise UserError(
            f"data.cache={kind}: the samples need {total:,} bytes in {printable(place)}, where "
            f"{free:,} are free. {other}"
        ) from error


def _available_memory() -> int:
    """Bytes that the system, or the container or job that this process is in, has left."""
    available = 2**63
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError, IndexError):  # no version 2 of cgroups, or no limit
        place = Path("/proc/self/cgroup").read_text().split("::")[1].strip()
        group = Path("/sys/fs/cgroup" + place)
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        available = min(available, limit - used)
    return available


def _fits(path: Path, items: int) -> bool:
    """Whether a whole pack of so many items lies there."""
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(_HEADER.itemsize), _HEADER)[0]
            layout = file.read(items * _LAYOUT.itemsize)
        return (header["layout_crc"], header["bytes"]) == (zlib.crc32(layout), path.stat().st_size)
    except (OSError, ValueError, IndexError):
        return False


def _volume(shapes: Sequence[Sequence[int]]) -> int:
    return sum(channels * height * width for channels, height, width in shapes)


def _parts(content: Any, shapes: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Views [H, W, C] of the parts that lie one behind the other in flat bytes."""
    start = 0
    for channels, height, width in shapes:
        size = channels * height * width
        yield content[start : start + size].reshape(height, width, channels)
        start += size
