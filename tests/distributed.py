"""Processes forked from one that has imported torch and the project: ranks, and whole scripts.

Such a process is there in a tenth of a second; one that imports torch takes three of a core. Where
the launch itself is tested (a launcher's signals and restarts, glibc's settings) start a real one.
"""

import atexit
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

REPO = Path(__file__).resolve().parents[1]
_HOST = "127.0.0.1"
_IMPORTED = ("torch._dynamo", "train_multi_GPU", "validation", "predict", "pytest", "tensorboard")


def children(process: int) -> list[int]:
    """The child processes of a process, in the order of their numbers; none of one that is gone."""
    with suppress(OSError):
        tasks = Path(f"/proc/{process}/task").iterdir()
        found = [pid for task in tasks for pid in (task / "children").read_text().split()]
        return sorted(map(int, found))
    return []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return probe.getsockname()[1]


@cache
def fork_server() -> Any:
    """A multiprocessing context whose processes have imported what takes long."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    with pytest.MonkeyPatch.context() as patch:  # it imports before it is told where to look
        patch.setenv("PYTHONPATH", str(REPO), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def open_store() -> dist.TCPStore:
    """A store on a port of the system's choice, which is taken as long as the store is kept."""
    return dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)


# -- ranks ----------------------------------------------------------------------------------------


def on_ranks(world: int, function: Callable, *args: Any) -> list[Any]:
    """function(*args) on `world` gloo processes; the results by rank (plain types, no tensors)."""
    context, store = fork_server(), open_store()
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, world, store.port, function, args, results))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        gathered = [results.get(timeout=300) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    errors = [f"rank {rank}: {error}" for rank, _, error in gathered if error]
    assert not errors, "\n".join(errors)
    return [value for _, value, _ in sorted(gathered, key=lambda item: item[0])]


def _rank(rank: int, world: int, port: int, function: Callable, args: tuple, results: Any) -> None:
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore(_HOST, port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        results.put((rank, function(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


# -- scripts --------------------------------------------------------------------------------------


class Script:
    """A script of this repository that runs, on one process or on several as under torchrun.

    Its output goes to files, so that no process waits for a reader. env: what is added to this
    process's environment.
    """

    def __init__(self, folder: Path, name: str, *args: Any, processes: int = 0, **env: str) -> None:
        self.args = [str(REPO / name), *map(str, args)]
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name, stream) for stream in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        self._store = open_store() if processes else None
        self.processes = []
        for rank in range(processes or 1):
            environment = {**os.environ, **self._launch(rank, processes), **env}
            how = (self.args, folder, environment, self._files)
            self.processes.append(fork_server().Process(target=_as_main, args=how))
            self.processes[-1].start()

    def _launch(self, rank: int, processes: int) -> dict[str, str]:
        """What torchrun tells its processes, but for its own name: it would be their parent."""
        if self._store is None:
            return {}
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        launch |= {"LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_USE_AGENT_STORE": True}
        launch |= {"MASTER_ADDR": _HOST, "MASTER_PORT": self._store.port}
        launch |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}
        return {name: str(value) for name, value in launch.items()}

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Its outcome; as under torchrun, the first process that fails ends the others."""
        running, code = list(self.processes), 0
        try:
            while running and not code:
                ended = wait([process.sentinel for process in running], timeout)
                if not ended:
                    raise subprocess.TimeoutExpired(self.args, timeout, *self._texts())
                running = [process for process in running if process.sentinel not in ended]
                for process in self.processes:
                    process.join(0)
                    code = code or process.exitcode or 0
            for process in running:
                process.terminate()
                process.join(30)
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        code = code if self._store is None or not code else 1
        done = subprocess.CompletedProcess(self.args, code, *self._texts())
        self._output.cleanup()
        return done

    def _texts(self) -> list[str]:
        return [file.read_text(encoding="utf-8", errors="replace") for file in self._files]


def run_script(
    folder: Path, name: str, *args: Any, processes: int = 0, code: int = 0, **env: str
) -> subprocess.CompletedProcess:
    """Run a script of this repository in `folder` to its end, which must have exit code `code`.

    The code is 1 whatever a process failed with if there are several, as under torchrun; and −N of
    one process that signal N has killed, as in subprocess.
    """
    done = Script(folder, name, *args, processes=processes, **env).wait()
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _as_main(argv: list[str], folder: Path, env: dict[str, str], files: list[Path]) -> None:
    """Be a process of its own as far as a script can tell: its streams, folder and environment."""
    os.setsid()
    for stream, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
