"""What a training on CPUs has set from its start: its memory, and how its threads wait.

By default glibc hands large tensors back to the system as they are freed. The system fills them
with zeros, page by page as they are written to, when they are wanted again a moment later: up to a
third of a training step. And threads of GNU's OpenMP spin for milliseconds until the last of them
is done, which can stop a training almost entirely where that one waits for a core that other
programs use. docs/performance.md has the figures.
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

# Settings that glibc takes from its environment as a process starts (its manual: "Tunables").
TUNABLES = {
    "mmap_max": 0,  # tensors of any size come from the heap, not from mappings of their own …
    "trim_threshold": 2**62,  # … and go back to it, not to the system
    "arena_max": 1,  # threads would otherwise have heaps of their own
    # An aligned tensor leaves slivers of some dozen bytes beside it. Put aside for small requests,
    # they would not grow together with the tensor when it is freed, the next one of its size would
    # not fit there, and peak memory would grow by a quarter.
    "tcache_count": 0,
    "mxfast": 0,
}
_TUNABLES, _SPIN = "GLIBC_TUNABLES", "GOMP_SPINCOUNT"
SPINS = 10_000  # some tenths of a millisecond; libgomp's own are 300,000
_STARTED = "PIXTRAIN_STARTED_AGAIN"  # holds the number of a process that was

# Parameters of mallopt(3), and the largest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 2**25

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def set_up_process(device: str) -> None:
    """Set what libraries read as they are loaded; a script calls it before it imports torch.

    A process that is to train on CPUs is replaced by itself, once, since glibc has read its
    settings by the time that a program can change them: number, streams and command line stay, and
    the start of the interpreter is all that is repeated. `device` is what --device says; "auto"
    means a CPU where no GPU's driver is. Only a script that was launched as a file is replaced, not
    one that runs within another program (python -m, a notebook, a debugger), and only where glibc
    is. Settings that the environment holds are left alone.
    """
    added, caller = environment(), sys._getframe(1)
    if _SPIN in added:
        os.environ[_SPIN] = added[_SPIN]
    if _TUNABLES in added and _is_glibc() and _on_cpu(device) and _is_launched(caller):
        added[_STARTED] = str(os.getpid())
        command = [sys.executable, *sys.orig_argv[1:]]
        with suppress(OSError, ValueError):  # not worth failing for
            os.execve(sys.executable, command, {**os.environ, **added})


def environment() -> dict[str, str]:
    """What to add to the environment of a process that trains on CPUs, where nothing is set."""
    added = {}
    if not _has_own_heap():
        others = os.environ.get(_TUNABLES)
        settings = [f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items()]
        added[_TUNABLES] = ":".join([others, *settings] if others else settings)
    if not {_SPIN, "OMP_WAIT_POLICY"} & set(os.environ):
        added[_SPIN] = str(SPINS)
    return added


def keep_freed_memory(device: str) -> None:
    """Have freed memory stay with this process as it is, if `device` is a CPU and glibc is there.

    Tensors of 32 MB and more are still mapped one by one where nothing free has room for them:
    kept, too, they would leave gaps, and the peak grow by a quarter. Settings of one's own in the
    environment are left alone. To be called before the threads that compute start.
    """
    if device != "cpu" or sys.platform != "linux" or _has_own_heap():
        return
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_ARENA_MAX, 1)


def _is_glibc() -> bool:
    try:
        return sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (OSError, ValueError):  # a C library that does not know the name
        return False


def _has_own_heap() -> bool:
    """Whether the environment says how memory is to be kept."""
    tuned = "glibc.malloc." in os.environ.get(_TUNABLES, "")
    return tuned or any(name.startswith("MALLOC_") for name in os.environ)


def _on_cpu(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return hidden or not any(Path(driver).exists() for driver in _GPU_DRIVERS)


def _is_launched(caller: FrameType) -> bool:
    """Whether the caller is a script that the interpreter runs from a file, for the first time."""
    outermost = caller.f_back is None and sys.gettrace() is None
    again = os.environ.get(_STARTED) == str(os.getpid())
    script = Path(caller.f_globals.get("__file__", ""))
    return outermost and not again and bool(sys.executable) and script.is_file()
