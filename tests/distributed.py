"""Processes forked from one that has imported torch and the project: ranks, and whole scripts.

Such a process is there in a tenth of a second; one that imports torch takes three of a core. Where
the launch itself is tested (a launcher's signals and restarts, glibc's settings) start a real one.
"""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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
    """A script of this repository that runs, on one process or on several by torchrun's own agent.

    Its output goes to files, so that no process waits for a reader. restarts: as --max-restarts.
    repo: an edited copy of this repository, whose script and modules are run instead. env: what is
    added to this process's environment; TEST_FAULT has faults strike (faults.py). `process` is the
    script's, or the agent's.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *args: Any,
        processes: int = 0,
        restarts: int = 0,
        repo: Path = REPO,
        **env: str,
    ) -> None:
        self.args = [str(repo / name), *map(str, args)]
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name, stream) for stream in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        how = (self.args, folder, {**os.environ, **env}, self._files)
        main, more = (_as_agent, (processes, restarts)) if processes else (_as_main, ())
        self.process = fork_server().Process(target=main, args=(*how, *more))
        self.process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Its outcome; the exit code is −N if signal N has killed it, as in subprocess."""
        self.process.join(timeout)
        ended = not self.process.is_alive()
        self.process.kill()
        self.process.join()
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in self._files]
        self._output.cleanup()
        if not ended:
            raise subprocess.TimeoutExpired(self.args, timeout, *texts)
        return subprocess.CompletedProcess(self.args, self.process.exitcode, *texts)


def run_script(
    folder: Path,
    name: str,
    *args: Any,
    code: int = 0,
    **options: Any,
) -> subprocess.CompletedProcess:
    """Run a `Script` in `folder` to its end, which must have exit code `code`."""
    done = Script(folder, name, *args, **options).wait()
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _as_main(argv: list[str], folder: Path, env: dict[str, str], files: list[Path]) -> None:
    """Be a process of its own that runs a script, as far as the script can tell."""
    _settle(folder, env, files)
    sys.argv = argv
    _import_from(Path(argv[0]).parent)
    faults.install(os.environ.get(faults.VARIABLE, ""))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()


def _import_from(repo: Path) -> None:
    """Have the project's modules come from `repo`, if it has any: REPO's are forgotten."""
    if repo == REPO or not (repo / "train_utils").is_dir():
        return
    for name, module in list(sys.modules.items()):
        folders = Path(getattr(module, "__file__", None) or "/").parents
        if REPO in folders and REPO / "tests" not in folders:
            del sys.modules[name]
    sys.path[:] = [str(repo), *(path for path in sys.path if Path(path) != REPO)]


def _as_agent(
    argv: list[str],
    folder: Path,
    env: dict[str, str],
    files: list[Path],
    processes: int,
    restarts: int,
) -> None:
    """Be a torchrun --standalone, whose processes come from the fork server as well."""
    _settle(folder, env, files)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        start_method="fork",  # a fork server of the agent's own would import everything anew
    )
    try:
        elastic_launch(config, _as_rank)(argv, folder, env, files)
    except (ChildFailedError, SignalException) as error:
        sys.exit(f"torchrun: {error}")


def _as_rank(argv: list[str], folder: Path, env: dict[str, str], files: list[Path]) -> None:
    names = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_", "MASTER_", "TORCHELASTIC_")
    launch = {name: value for name, value in os.environ.items() if name.startswith(names)}
    _as_main(argv, folder, {**env, **launch}, files)


def _settle(folder: Path, env: dict[str, str], files: list[Path]) -> None:
    """Take streams, environment, folder and session of one's own."""
    os.setsid()
    mp.set_start_method(None, force=True)  # a script's loaders start their workers as by default
    for stream, file in enumerate(files, 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
