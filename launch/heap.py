"""Memory and waiting threads of a process that computes on CPUs; docs/performance.md has figures.

By default glibc returns large tensors to the system as they are freed, and the system fills them
with zeros, page by page, when they are needed again a moment later: up to a third of a training
step. Threads of GNU's OpenMP spin for milliseconds until the last one is done, which can stop a
training almost entirely where that one waits for a core that other programs use.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

# Tensors of any size come from one heap for all threads and go back to it. Caches of small chunks
# would keep the slivers beside aligned tensors, so that gaps grow, and peak memory by a quarter.
_HEAP = {"mmap_max": 0, "trim_threshold": 2**62, "arena_max": 1, "tcache_count": 0, "mxfast": 0}
TUNABLES = ":".join(f"glibc.malloc.{name}={value}" for name, value in _HEAP.items())
SPINS = "10000"  # some tenths of a millisecond; libgomp's default is 300,000
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def keep_freed_memory() -> None:
    """Start the calling script anew as the same process, once, if it is to compute on a CPU.

    glibc reads its settings only then. Within another program (a notebook, a debugger, `python -m`)
    a script goes on as it is. Settings of the environment stay.
    """
    caller = sys._getframe(1)
    is_main = caller.f_back is None and caller.f_globals["__name__"] == "__main__"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    no_gpu = hidden or not any(Path(driver).exists() for driver in GPU_DRIVERS)
    on_cpu = no_gpu or "--device cpu" in " ".join(sys.argv).replace("=", " ")
    if sys.platform == "linux" and is_main and Path(sys.argv[0]).is_file() and on_cpu:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        tuned = os.environ.get("GLIBC_TUNABLES", "")
        if not any("glibc.malloc." in x or x.startswith("MALLOC_") for x in (tuned, *os.environ)):
            os.environ["GLIBC_TUNABLES"] = f"{tuned}:{TUNABLES}" if tuned else TUNABLES
            with suppress(OSError, ValueError):  # not worth failing for
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
