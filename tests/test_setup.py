"""What a run sets up: memory that stays with the process."""

import ctypes
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from train_utils.setup import keep_freed_memory

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="concerns glibc")


def test_only_cpus_and_nobody_s_own_settings(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *setting: calls.append(setting))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    keep_freed_memory(torch.device("cuda"))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    keep_freed_memory(CPU)
    assert calls == []
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    keep_freed_memory(CPU)
    assert calls == [(-3, 2**25), (-1, -1), (-8, 1)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    keep_freed_memory(CPU)  # a C library without mallopt
