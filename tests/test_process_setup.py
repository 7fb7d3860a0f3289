"""Memory that stays with a process, as set at its start or while it runs; how threads wait."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import REPO

import process_setup

pytestmark = pytest.mark.skipif(not process_setup._is_glibc(), reason="concerns glibc")

PATH = f"import sys\nsys.path.insert(0, {str(REPO)!r})\n"
RESTART = """
import os
from process_setup import set_up_process
print("start", os.getpid(), sys.orig_argv[1:], flush=True)
set_up_process("cpu")
"""
# As torch does it in a training: aligned memory of a few sizes comes and goes among small objects.
PAGE_FAULTS = """
import ctypes, resource
libc, small = ctypes.CDLL(None), []
libc.free.argtypes = [ctypes.c_void_p]
def tensor(megabytes):
    pointer = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(pointer), 64, megabytes << 20)
    ctypes.memset(pointer, 1, megabytes << 20)
    return pointer
def step():
    tensors = []
    for megabytes in (40, 80, 40, 120, 80, 40, 120):
        tensors.append(tensor(megabytes))
        small.extend(bytes(600) for _ in range(20))
        if len(tensors) == 4:
            libc.free(tensors.pop(0)), libc.free(tensors.pop(1))
    for pointer in tensors:
        libc.free(pointer)
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) >> 10)
"""
OWN_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.fixture(autouse=True)
def _no_settings_of_one_s_own(monkeypatch):
    for name in [name for name in os.environ if name.startswith(OWN_SETTINGS)]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path):
    """A function that runs Python with options, SCRIPT for a script of this code; its lines."""

    def start(code: str, *options: str) -> list[str]:
        path = tmp_path / "script.py"
        path.write_text(PATH + code)
        command = [option.replace("SCRIPT", str(path)) for option in options]
        done = subprocess.run([sys.executable, *command], capture_output=True, check=True)
        return done.stdout.decode().splitlines()

    return start


def test_a_script_starts_again_once_as_the_same_process(run):
    first, second = run(RESTART, "-u", "-W", "error", "SCRIPT", "a b", "--c")
    assert first == second and first.endswith("'a b', '--c']") and "'-u', '-W', 'error'" in first
    assert len(run(f"import os; os.environ.pop('GLIBC_TUNABLES', 0)\n{RESTART}", "SCRIPT")) == 2


def test_a_script_inside_another_program_does_not_start_again(run, tmp_path):
    host = "import runpy, sys; sys.argv = ['SCRIPT']; runpy.run_path('SCRIPT', run_name='__main__')"
    assert len(run(RESTART, "-c", host)) == 1
    (tmp_path / "host.py").write_text(host.replace("SCRIPT", str(tmp_path / "script.py")))
    assert len(run(RESTART, str(tmp_path / "host.py"), "SCRIPT")) == 1
    assert len(run(RESTART, "-c", "exec(open('SCRIPT').read())", "SCRIPT")) == 1
    traced = RESTART.replace('print("', 'sys.settrace(lambda *event: None)\nprint("')
    assert len(run(traced, "SCRIPT")) == 1
    with (tmp_path / "script.py").open() as script:
        piped = subprocess.run(
            ["sh", "-c", f"cat | {sys.executable} -"], stdin=script, capture_output=True, check=True
        )
    assert piped.stdout.count(b"start") == 1


def test_settings_of_one_s_own_are_left_alone(run, monkeypatch):
    for name, value in (("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")):
        monkeypatch.setenv(name, value)
        assert len(run(RESTART, "SCRIPT")) == 1
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.nns=4")  # has nothing to do with memory
    assert len(run(RESTART, "SCRIPT")) == 2
    assert process_setup.environment()["GLIBC_TUNABLES"].startswith(
        "glibc.rtld.nns=4:glibc.malloc."
    )


def test_large_tensors_find_their_place_again(run):
    usual_faults, _ = map(int, run(PAGE_FAULTS, "SCRIPT"))
    *_, faults, peak = run(RESTART + PAGE_FAULTS, "SCRIPT")
    assert int(faults) < usual_faults / 20
    assert int(peak) < 700  # MB, of which a step's tensors are 520; in gaps of a few bytes, 1170


@pytest.mark.parametrize(
    ("device", "driver", "visible", "expected"),
    [
        ("cpu", "/dev/null", None, True),
        ("cuda", "/dev/no-driver", None, False),
        ("auto", "/dev/no-driver", None, True),
        ("auto", "/dev/null", None, False),
        ("auto", "/dev/null", "", True),
        ("auto", "/dev/null", "0", False),
    ],
)
def test_where_a_training_will_be(monkeypatch, device, driver, visible, expected):
    monkeypatch.setattr(process_setup, "_GPU_DRIVERS", [driver])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert process_setup._on_cpu(device) is expected


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_threads_wait_as_the_environment_says(run, monkeypatch, name):
    show = "\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(RESTART + show, "SCRIPT")[-1] == "10000"
    as_a_notebook_does = "import runpy; runpy.run_path('SCRIPT', run_name='__main__')"
    assert run(RESTART + show, "-c", as_a_notebook_does)[-1] == "10000"
    monkeypatch.setenv(name, "active")
    assert run(RESTART + show, "SCRIPT")[-1] == str(os.environ.get("GOMP_SPINCOUNT"))


def test_settings_while_the_process_runs(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *setting: calls.append(setting))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    process_setup.keep_freed_memory("cuda")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    process_setup.keep_freed_memory("cpu")
    assert calls == []
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    process_setup.keep_freed_memory("cpu")
    assert calls == [(-3, 2**25), (-1, -1), (-8, 1)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    process_setup.keep_freed_memory("cpu")  # a C library without mallopt
