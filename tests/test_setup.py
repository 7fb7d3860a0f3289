"""What a run sets up: memory that stays with the process."""

import os
import sys
from functools import partial

import pytest
import torch
from distributed import on_ranks

from benchmarks.common import resident_mb, usual_memory
from train_utils.setup import keep_freed_memory


def _page_faults():
    """Pages that the system had to provide for tensors of 6 × 28 MB after others were freed."""
    import resource

    def allocate():
        return [torch.ones(7 * 2**20) for _ in range(6)]

    allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _in_a_new_process(device, **settings):
    os.environ.update(settings)
    usual_memory()
    usual = _page_faults()
    keep_freed_memory(torch.device(device))
    return usual, _page_faults(), resident_mb(), resident_mb("VmHWM")


@pytest.mark.slow  # processes
@pytest.mark.skipif(sys.platform != "linux", reason="concerns glibc")
def test_freed_memory_stays_for_the_next_tensor():
    ((usual, kept, held, peak),) = on_ranks(1, partial(_in_a_new_process, "cpu"))
    assert kept < 1000 < 5000 < usual
    assert peak > held - 1 and held > 160
    # Not for a GPU's sake, nor where somebody has chosen otherwise.
    ((_, elsewhere, *_),) = on_ranks(1, partial(_in_a_new_process, "cuda"))
    chosen = partial(_in_a_new_process, "cpu", MALLOC_TOP_PAD_="131072")
    ((_, left_alone, *_),) = on_ranks(1, chosen)
    assert elsewhere > 5000 and left_alone > 5000
