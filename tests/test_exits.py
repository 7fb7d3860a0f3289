"""What is left of a process group when a script has ended, on real processes.

A group of gloo that outlives the interpreter has the process abort in one launch out of six, which
no test can wait for (tests/soak_exits.py does). Its threads tell in every launch whether it lives.
"""

import os
import runpy
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import faults
import pytest
import torch
import torch.distributed as dist
from conftest import REPO
from distributed import fork_server, open_store

from train_utils.setup import launched

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
    pytest.mark.xdist_group("exits"),  # one training for all
]

TINY = [
    *("--config", "configs/unet.yaml", "--device", "cpu", "--amp", "off", "-j", "0", "-b", "1"),
    *("--set", "data.image_size=40", "--set", "model.channels=4", "--epochs", "1"),
    *("--set", "data.train_size=7", "--set", "data.val_size=3"),
]


def gloo_threads():
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # another thread may end just now
            names.append((task / "comm").read_text())
    return [name for name in names if "gloo" in name]


def run_script(script, arguments):
    """Run a script as Python does, in this process, and exit as it does."""
    faults.install(os.environ.get(faults.VARIABLE, ""))
    sys.argv = [script, *arguments]
    runpy.run_path(str(REPO / script), run_name="__main__")


def _rank(rank, environment, folder, function, args):
    """Exit as `function` does, after noting which threads of gloo there are then."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(REPO)
    output = os.open(folder / f"output{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    try:
        function(*args)
    finally:
        (folder / f"threads{rank}.txt").write_text("".join(gloo_threads()))


def launch(folder, function, *args, **environment):
    """function(*args) on two processes under a launcher's store: their exit codes, their output."""
    folder.mkdir(exist_ok=True)
    store = open_store()
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        fork_server().Process(target=_rank, args=(rank, environment, folder, function, args))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for rank in (1, 0):
        ranks[rank].join(timeout=100)
        ranks[rank].kill()
        ranks[rank].join()
        (folder / f"gone{rank}").touch()
    outputs = [(folder / f"output{rank}.txt").read_text() for rank in (0, 1)]
    return [process.exitcode for process in ranks], "\n".join(outputs)


def threads_left(folder):
    return [(folder / f"threads{rank}.txt").read_text() for rank in (0, 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training to its end, and how it ended."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = [*TINY, "--output-dir", str(folder / "run")]
    return folder, *launch(folder, run_script, "train_multi_GPU.py", arguments)


def test_a_group_has_threads_by_which_it_is_seen():
    before = gloo_threads()
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
    deadline = time.monotonic() + 60  # threads take their names once they run
    while len(gloo_threads()) <= len(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(gloo_threads()) > len(before)
    del group
    assert gloo_threads() == before


def test_a_training_that_is_done_has_no_group_left(trained):
    folder, codes, output = trained
    assert codes == [0, 0], output
    assert threads_left(folder) == ["", ""]


def test_a_validation_that_is_done_has_no_group_left(trained, tmp_path):
    weights = ["--weights", str(trained[0] / "run" / "last.pth"), "--device", "cpu", "-j", "0"]
    codes, output = launch(tmp_path, run_script, "validation.py", weights)
    assert codes == [0, 0], output
    assert "n: 3" in output
    assert threads_left(tmp_path) == ["", ""]


def test_a_refused_start_has_no_group_left(trained, tmp_path):
    arguments = [*TINY, "--output-dir", str(trained[0] / "run")]
    codes, output = launch(tmp_path, run_script, "train_multi_GPU.py", arguments)
    assert codes == [1, 1], output
    assert output.count("holds a run already") == 2
    assert threads_left(tmp_path) == ["", ""]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("step:term@2:rank=1", 143, "stopped by SIGTERM"),
        ("load:raise@3:rank=1", 1, "error (rank 1): TEST_FAULT: load, as ordered"),
    ],
)
def test_a_training_cut_short_has_no_group_left(fault, code, message, tmp_path):
    arguments = [*TINY, "--output-dir", str(tmp_path / "run")]
    codes, output = launch(tmp_path, run_script, "train_multi_GPU.py", arguments, TEST_FAULT=fault)
    assert codes == [code, code], output
    assert message in output
    assert threads_left(tmp_path) == ["", ""]


def _fail_while_the_other_one_is_busy(folder):
    """Rank 1 fails with a sum under way, for which rank 0 never comes."""
    with launched(Namespace(device="cpu")):
        if dist.get_rank() == 1:
            dist.all_reduce(torch.ones(1000), async_op=True)
            raise ZeroDivisionError("an unexpected error")
        while not (folder / "gone1").exists():
            time.sleep(0.05)


def test_a_failing_process_does_not_wait_for_a_busy_one(tmp_path):
    """It ends by the code of its error, although its group cannot be ended."""
    codes, output = launch(tmp_path, _fail_while_the_other_one_is_busy, tmp_path)
    assert codes == [0, 1], output
    assert "ZeroDivisionError: an unexpected error" in output
