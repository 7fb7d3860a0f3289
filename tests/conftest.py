"""Fixtures that every test module shares."""

import logging
import os
from pathlib import Path

import pytest

# Before torch is imported, here and in every process that the tests start: several processes whose
# OpenMP threads wait for each other on the same cores are many times slower than single threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, also from processes that tests start, unless tests of GPUs are asked for.

    Without --device the scripts take a GPU where there is one: tests would then depend on the
    machine, and those of several processes be refused for want of a GPU each.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a pytest with which xdist's groups have no effect: what they share is made twice."""
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if hasattr(config, "workerinput") and config.getoption("loadgroup", False):
        for item in grouped:
            assert "@" in item.nodeid, "xdist_group has no effect: use pytest < 9.2"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU; or it is hidden: run pytest -m gpu")


REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photographs and weights; tests that need it are skipped without it."""
    folder = Path(os.environ.get("SHARED_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set SHARED_DATA")
    return folder


@pytest.fixture
def accelerator(monkeypatch):
    """Have torch see `count` accelerators of a kind: as names only, no tensor can be made there.

    Returns the list of the devices that are made the current one.
    """
    import torch

    from train_utils.log import say_once

    def pretend(kind: str | None, count: int = 1) -> list[int]:
        found, chosen = kind and torch.device(kind), []
        there = {
            "current_accelerator": lambda check_available=False: found,
            "device_count": lambda: count if found else 0,
            "set_device_index": chosen.append,
        }
        for name, function in there.items():
            monkeypatch.setattr(torch.accelerator, name, function)
        say_once.cache_clear()
        return chosen

    return pretend


@pytest.fixture
def logged():
    """The lines that are logged meanwhile."""
    from train_utils.log import get_logger

    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    get_logger().addHandler(handler)
    yield lines
    get_logger().removeHandler(handler)
