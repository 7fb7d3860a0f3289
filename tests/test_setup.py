"""What a run sets up: memory that stays with the process."""

import os
import sys
from functools import partial

import pytest
import torch
from distributed import on_ranks

from benchmarks.common import resident_mb, usual_memory
from train_utils.setup import keep_freed_memory

CPU = torch.device("cpu")


def _page_faults():
    """Pages that the system had to provide for tensors of 6 × 28 MB after others were freed."""
    import resource

    def allocate():
        return [torch.ones(7 * 2**20) for _ in range(6)]

    allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _in_a_new_process(**settings):
    os.environ.update(settings)
    start = resident_mb()
    usual = _page_faults()
    keep_freed_memory(torch.device("cuda"))
    untouched = _page_faults()
    keep_freed_memory(CPU)
    kept, held = _page_faults(), resident_mb() - start
    usual_memory()
    return usual, untouched, kept, held, _page_faults(), resident_mb("VmHWM") - start


@pytest.mark.slow  # a process
@pytest.mark.skipif(sys.platform != "linux", reason="concerns glibc")
def test_freed_memory_stays_for_the_next_tensor():
    ((usual, untouched, kept, held, again, peak),) = on_ranks(1, _in_a_new_process)
    assert min(usual, untouched, again) > 5_000 and kept < 1000
    assert 150 < held <= peak < 500
    chosen = partial(_in_a_new_process, MALLOC_TOP_PAD_="131072")
    ((usual, untouched, kept, *_),) = on_ranks(1, chosen)
    assert min(usual, untouched, kept) > 5_000  # somebody has chosen otherwise
