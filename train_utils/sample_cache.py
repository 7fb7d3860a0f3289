"""Decoded samples in one memory-mapped file that loader workers and ranks of a machine share.

A pack has a slot of fixed place and size for every item and is filled by whoever first needs one.
A slot counts as valid after its bytes are written; every process compares the bytes with their
checksum when it first reads a slot, and what does not agree is made again from the files. So no
kill, crash, full disk or damage before that can give another sample than the files give.

The name of a pack holds a hash of what its items depend on: paths, sizes and times of change of the
files, what the caller says, and the machine, since machines that share a file system do not see
each other's writes in order. A file that changes while a run goes on is noticed by the next start.

Packs are files of this user alone (`private_files.py`). A process of the same user that cuts one
short kills those that read it (SIGBUS), which nothing in a mapped file can prevent.
"""

import atexit
import errno
import hashlib
import mmap
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from train_utils.errors import UserError, typed
from train_utils.files import hash_of_files, user_cache
from train_utils.image_io import PathLike
from train_utils.log import get_logger
from train_utils.private_files import new_private_file, not_ours, open_private, private_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Shape = tuple[int, int, int]  # channels, height, width

_FORMAT = 3  # to be raised when the meaning of a pack's bytes changes
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.pack(\.[0-9a-f]{32}\.tmp)?")
_ALIGNMENT = 64
_VALID = 0x600DDA7A
# The file: a header; of all slots, what shapes their two parts have; of all slots, whether they are
# filled; the slots. The header's checksum is that of the file's name and the shapes.
_HEADER = np.dtype([("crc", "<u8"), ("bytes", "<u8")])
_SHAPES = np.dtype(("<u4", (2, 3)))
_STATE = np.dtype([("crc", "<u4"), ("valid", "<u4")])
_SHARED_MEMORY = Path("/dev/shm")
# Seconds of waiting for another process, which may have to read the headers of all files.
_SILENCE, _PATIENCE = 5.0, 1800.0


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
        """Map the pack, and keep others from removing it for as long as this process lives.

        Raises UserError for a file that is not ours, or no whole pack of so many items.
        """
        self._file = open_private(self.path, "r+b")
        _lock(self._file, shared=True)
        self._shapes = _read_shapes(self._file, self.path, self._items)
        self._starts, _ = _layout(self._shapes)
        self._map = mmap.mmap(self._file.fileno(), 0)
        after = _HEADER.itemsize + self._shapes.nbytes
        self._state = np.frombuffer(self._map, _STATE, self._items, after)
        self._checked = np.zeros(self._items, dtype=bool)

    def _read(self, slot: int) -> tuple[Tensor, ...] | None:
        """A copy of the parts, since whoever gets them may work in place; None if not valid."""
        state = self._state[slot]
        if state["valid"] != _VALID:
            return None
        start, shapes = int(self._starts[slot]), self._shapes[slot].tolist()
        content = np.frombuffer(self._map, np.uint8, _volume(shapes), start).copy()
        if not self._checked[slot]:
            if zlib.crc32(content.data) != state["crc"]:
                return None
            self._checked[slot] = True
        return tuple(part.permute(2, 0, 1) for part in _parts(torch.from_numpy(content), shapes))

    def _write(self, slot: int, parts: Sequence[Tensor]) -> None:
        """Fill a slot, unless the parts are not as foreseen: then they are made anew each time."""
        state, shapes = self._state[slot], self._shapes[slot].tolist()
        kept = all(part.dtype == torch.uint8 for part in parts)
        if not kept or [list(part.shape) for part in parts] != shapes:
            return
        content = np.frombuffer(self._map, np.uint8, _volume(shapes), int(self._starts[slot]))
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
            with suppress(OSError, UserError), _alone(self.path.parent, patience=1):
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

    Raises UserError where there is no room for the pack or no place to put it that is ours.
    """
    place = _memory_folder() if kind == "ram" else _disk_folder(folder)
    prefix = hashlib.blake2b(family.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    try:
        identity = hash_of_files(files, f"{_FORMAT} {platform.node()} {description}")
    except OSError as error:
        problem = f"cannot be read ({error.strerror}). Check the path."
        raise UserError(f"{error.filename}: {problem}") from error
    path = place / f"{prefix}-{identity}.pack"
    try:
        named = kind == "disk" and bool(folder)
        private_folder(place, _otherwise(place, kind, named), named)
        with _alone(place, _PATIENCE):  # one process makes the pack, the others find it
            cache = _found(path, numbers)
            made = cache is None
            if cache is None:
                _remove_unused(place, "" if kind == "ram" else prefix)
                _make(path, shapes(), kind)
                cache = SampleCache(path, numbers)
    except OSError as error:
        raise UserError(
            f"{place}: no cache can be kept there ({error.strerror}). Name another "
            "folder by data.cache_dir, or go without data.cache."
        ) from error
    if kind == "ram":
        cache.remove_after_use()
    get_logger().info(
        f"{'new' if made else 'found'} cache of {len(numbers)} samples: {path}, "
        f"{len(cache._map) / 1e6:,.0f} MB"
    )
    return cache


# --- where packs lie -----------------------------------------------------------------------------


def _memory_folder() -> Path:
    if not _SHARED_MEMORY.is_dir():
        raise UserError(
            f"data.cache=ram: needs {_SHARED_MEMORY}, which this system does not have. Use disk: "
            "what is read often stays in memory there, too."
        )
    return _SHARED_MEMORY / _own_name()


def _own_name() -> str:
    return f"pixtrain-{os.getuid()}" if hasattr(os, "getuid") else "pixtrain"


def _disk_folder(folder: PathLike | None) -> Path:
    place = Path(folder) if folder else user_cache("samples")
    if place is None:
        raise UserError(
            "data.cache_dir: there is no home folder to keep a cache in. Name a folder."
        )
    return place


def _otherwise(place: Path, kind: str, named: bool) -> str:
    """What to do where the folder of packs is not ours."""
    if kind == "ram":
        return "use --cache disk"
    known = named and place.is_dir()
    own = typed(place / _own_name()) if known else "DIR"
    return f"name a folder of your own: --set data.cache_dir={own}, or go without: --cache none"


def _remove_unused(place: Path, prefix: str) -> None:
    """Remove packs, and what was to become one, that no process has open."""
    for path in place.iterdir():
        if path.name.startswith(prefix) and _NAME.fullmatch(path.name) and _remove_if_unused(path):
            get_logger().info(f"removed an outdated cache: {path}")


def _remove_if_unused(path: Path) -> bool:
    with suppress(OSError, UserError), open_private(path) as file:
        if fcntl and _lock(file, shared=False):
            path.unlink()
            return True
    return False


@contextmanager
def _alone(place: Path, patience: float) -> Iterator[None]:
    """One process at a time; UserError if another one stays for more than `patience` seconds."""
    path, start, said = place / "lock", time.monotonic(), False
    with open_private(path, "ab") as file:
        while not _lock(file, shared=False):
            waited = time.monotonic() - start
            if waited > patience:
                raise UserError(
                    f"{path}: held for {waited:.0f} s by {_holder(file)}. End that run "
                    "if it hangs, or go without data.cache."
                )
            if waited > _SILENCE and not said:
                get_logger().info(f"waiting for {path}, held by {_holder(file)}")
                said = True
            time.sleep(0.02)
        yield


def _holder(file: IO[bytes]) -> str:
    """Which process has locked a file, where the system says so."""
    status = os.fstat(file.fileno())
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5] == f"{device}:{status.st_ino}":
                return f"process {words[4]}"
    return "another process"


def _lock(file: IO[bytes], shared: bool) -> bool:
    """Whether a file could be locked at once; where locks are unknown, it could."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


# --- making packs --------------------------------------------------------------------------------


def _make(path: Path, shapes: Sequence[Sequence[Shape]], kind: str) -> None:
    """An empty pack with a slot for parts of these shapes of each item."""
    table = np.array(shapes, _SHAPES.base)
    _, total = _layout(table)
    header = np.array([(_checksum(path, table), total)], _HEADER)
    with new_private_file(path) as file:
        _reserve(file, total, path.parent, kind)
        file.write(header.tobytes() + table.tobytes())


def _layout(shapes: np.ndarray) -> tuple[np.ndarray, int]:
    """Where the slots of items of these shapes [N, 2, 3] begin, and how long the file is."""
    sizes = _volumes(shapes).astype(np.int64)
    sizes += -sizes % _ALIGNMENT
    begin = _HEADER.itemsize + len(shapes) * (_SHAPES.itemsize + _STATE.itemsize)
    begin += -begin % _ALIGNMENT
    return begin + np.cumsum(sizes) - sizes, begin + int(sizes.sum())


def _volumes(shapes: np.ndarray) -> np.ndarray:
    """Bytes of each item, as floats: what is no pack may ask for more than an integer can hold."""
    channels, height, width = np.moveaxis(shapes.astype(np.float64), 2, 0)
    return (channels * height * width).sum(axis=1)


def _checksum(path: Path, shapes: np.ndarray) -> int:
    return zlib.crc32(shapes.tobytes(), zlib.crc32(path.name.encode()))


def _found(path: Path, numbers: Sequence[int]) -> SampleCache | None:
    """The pack if there is one; says so if what lies there is to be made again."""
    try:
        return SampleCache(path, numbers)
    except FileNotFoundError:
        return None
    except UserError as error:
        get_logger().warning(f"warning: a cache is made again. {error}")
        return None


def _read_shapes(file: IO[bytes], path: Path, items: int) -> np.ndarray:
    """The shapes [N, 2, 3] in a pack's head; UserError unless the whole file is as they ask."""
    head = file.read(_HEADER.itemsize + items * _SHAPES.itemsize)
    size = os.fstat(file.fileno()).st_size
    if len(head) == _HEADER.itemsize + items * _SHAPES.itemsize:
        header = np.frombuffer(head, _HEADER, 1)[0]
        shapes = np.frombuffer(head, _SHAPES.base, offset=_HEADER.itemsize).reshape(-1, 2, 3)
        whole = (header["crc"], header["bytes"]) == (_checksum(path, shapes), size)
        if whole and _volumes(shapes).sum() <= size == _layout(shapes)[1]:
            return shapes
    raise not_ours(path, "no whole cache of these samples")


def _reserve(file: IO[bytes], total: int, place: Path, kind: str) -> None:
    """Take all the room at once: a mapped file for which there is none kills its writer later."""
    free = shutil.disk_usage(place).free
    if kind == "ram":
        free = min(free, available_memory())
    try:
        if total > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, total)
        else:
            file.truncate(total)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
            raise
        limit, fix = f"{free:,} are free", "Make room, name another disk by data.cache_dir"
        if kind == "ram":
            fix = "Use --cache disk, in a container enlarge it (docker --shm-size)"
        if error.errno == errno.EFBIG:
            limit, fix = "no file may have so many", "Raise the limit (ulimit -f)"
        raise UserError(
            f"data.cache={kind}: the samples need {total:,} bytes in {place}, where "
            f"{limit}. {fix}, or go without."
        ) from error


def available_memory() -> int:
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


def _volume(shapes: Sequence[Sequence[int]]) -> int:
    return sum(channels * height * width for channels, height, width in shapes)


def _parts(content: Any, shapes: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Views [H, W, C] of the parts that lie one behind the other in flat bytes."""
    start = 0
    for channels, height, width in shapes:
        size = channels * height * width
        yield content[start : start + size].reshape(height, width, channels)
        start += size
