"""Memory that stays with a process from its start, and how its threads wait."""

import os
import subprocess
import sys

import pytest
from conftest import REPO

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="concerns glibc")

RESTART = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
from launch import heap
print("start", os.getpid(), sys.orig_argv[1:], flush=True)
heap.keep_freed_memory()
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
        path.write_text(code)
        command = [option.replace("SCRIPT", str(path)) for option in options]
        done = subprocess.run([sys.executable, *command], capture_output=True, check=True)
        return done.stdout.decode().splitlines()

    return start


def test_a_script_starts_again_once_as_the_same_process(run):
    first, second = run(RESTART, "-u", "-W", "error", "SCRIPT", "a b", "--c")
    assert first == second and first.endswith("'a b', '--c']") and "'-u', '-W', 'error'" in first


def test_its_child_processes_have_the_settings_and_do_not_start_again(run):
    child = "\nif 'child' not in sys.argv: os.system(f'{sys.executable} {sys.argv[0]} child')"
    first, second, in_child = run(RESTART + child, "SCRIPT")
    assert first == second and in_child.endswith("'child']")


def test_a_script_inside_another_program_does_not_start_again(run, tmp_path):
    host = "import runpy, sys; sys.argv = ['SCRIPT']; runpy.run_path('SCRIPT', run_name='__main__')"
    assert len(run(RESTART, "-c", host)) == 1
    (tmp_path / "host.py").write_text(host.replace("SCRIPT", str(tmp_path / "script.py")))
    assert len(run(RESTART, str(tmp_path / "host.py"), "SCRIPT")) == 1
    assert len(run(RESTART, "-c", "exec(open('SCRIPT').read())", "SCRIPT")) == 1
    assert len(run(RESTART, "-m", "cProfile", "-o", "/dev/null", "SCRIPT")) == 1
    with (tmp_path / "script.py").open() as script:
        piped = subprocess.run(
            ["sh", "-c", f"cat | {sys.executable} -"], stdin=script, capture_output=True, check=True
        )
    assert piped.stdout.count(b"start") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")],
)
def test_settings_of_one_s_own_are_left_alone(run, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    show = "\nprint(os.environ['GOMP_SPINCOUNT'])"
    start, spins = run(RESTART + show, "SCRIPT")
    assert start.startswith("start") and spins == "10000"


def test_large_tensors_find_their_place_again(run):
    usual_faults, _ = map(int, run(PAGE_FAULTS, "SCRIPT"))
    *_, faults, peak = run(RESTART + PAGE_FAULTS, "SCRIPT")
    assert int(faults) < usual_faults / 20
    assert int(peak) < 700  # MB, of which a step's tensors are 520; in gaps of a few bytes, 1170


@pytest.mark.parametrize(
    ("options", "driver", "visible", "starts"),
    [
        ("", "/dev/no-driver", None, 2),
        ("--device auto", "/dev/null", None, 1),
        ("", "/dev/null", "", 2),
        ("", "/dev/null", "0", 1),
        ("--device=cpu -b 2", "/dev/null", None, 2),
        ("-b 2 --device cpu", "/dev/null", "0", 2),
        ("--device cuda", "/dev/null", None, 1),
    ],
)
def test_where_the_computing_will_be(run, monkeypatch, options, driver, visible, starts):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code = RESTART.replace("print", f"heap.GPU_DRIVERS = [{driver!r}]\nprint")
    assert len(run(code, "SCRIPT", *options.split())) == starts


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_threads_wait_as_the_environment_says(run, monkeypatch, name):
    show = "\nprint(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(RESTART + show, "SCRIPT")[-1] == "10000"
    monkeypatch.setenv(name, "active")
    assert run(RESTART + show, "SCRIPT")[-1] == str(os.environ.get("GOMP_SPINCOUNT"))


@pytest.mark.parametrize(
    "script", ["train.py", "train_multi_GPU.py", "validation.py", "predict.py"]
)
def test_scripts_start_again_before_what_takes_long(script):
    lines = (REPO / script).read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from ", "keep_"))]
    assert imports[0] == "from launch.heap import keep_freed_memory"
    assert imports[1].startswith("keep_freed_memory()")
