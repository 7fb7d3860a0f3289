"""Fixtures that every test module shares."""

import os
from pathlib import Path

import pytest

# Before torch is imported, here and in every process that the tests start: several processes whose
# OpenMP threads wait for each other on the same cores are many times slower than single threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and weights; tests that need it are skipped without it."""
    folder = Path(os.environ.get("SHARED_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set SHARED_DATA")
    return folder
