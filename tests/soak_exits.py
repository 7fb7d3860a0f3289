"""Start the scripts on 2 and 3 processes, again and again, and look at how they end.

    python tests/soak_exits.py --launches 100              forked processes, seconds each
    python tests/soak_exits.py --launches 15 --torchrun    real launches

Every way out has its turn: done, refused, stopped, failed. Each must end by its exit code, and no
process may abort. Forked processes start with the imports done and then run a script as Python
does, to the interpreter's own end. Exit code 1 if a launch ended otherwise; its output is kept.
"""

import argparse
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import faults  # noqa: E402
from test_exits import TINY  # noqa: E402
from torch.distributed import TCPStore  # noqa: E402

import train  # noqa: E402, F401
import validation  # noqa: E402, F401

_TIMEOUT = 300  # seconds after which a launch hangs
ABORT = "terminate called"


class Case(NamedTuple):
    """A launch, and the exit code of each of its processes."""

    script: str
    arguments: tuple[str, ...]
    code: int
    fault: str = ""


def cases(folder: Path) -> dict[str, Case]:
    """All ways out; `folder` holds a run, and launches make theirs in RUN."""
    done, weights = str(folder / "done"), str(folder / "done" / "last.pth")
    new, cpu = (*TINY, "--output-dir", "RUN"), ("--device", "cpu", "-j", "0")
    multi = "train_multi_GPU.py"
    return {
        "training": Case(multi, new, 0),
        "validation": Case("validation.py", ("--weights", weights, *cpu), 0),
        "training, refused": Case(multi, (*TINY, "--output-dir", done), 1),
        "validation, refused": Case("validation.py", ("--weights", f"{weights}.gone", *cpu), 1),
        "training, stopped": Case(multi, new, 128 + signal.SIGTERM, "step:term@2:rank=1"),
        "training, failed": Case(multi, new, 1, "load:raise@3:rank=1"),
        "train.py, refused": Case("train.py", new, 1),
    }


def fork_store() -> tuple[int, int]:
    """A process with a launcher's store: its number, and the store's port."""
    receive, send = os.pipe()
    process = os.fork()
    if process == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(send, str(store.port).encode())
        signal.pause()
    port = int(os.read(receive, 16))
    os.close(receive)
    os.close(send)
    return process, port


def enter_rank(rank: int, world: int, port: int, case: Case, output: Path) -> None:
    """Make this process the one that torchrun would start."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(REPO / case.script), *case.arguments]
    faults.install(case.fault)


def exit_codes(processes: list[int]) -> list[int | None]:
    """How processes have ended; None for one that had to be killed."""
    end, codes = time.monotonic() + _TIMEOUT, {}
    while len(codes) < len(processes) and time.monotonic() < end:
        time.sleep(0.02)
        for process in set(processes) - set(codes):
            number, status = os.waitpid(process, os.WNOHANG)
            if number:
                codes[process] = os.waitstatus_to_exitcode(status)
    for process in set(processes) - set(codes):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return [codes.get(process) for process in processes]


def launch_forked(case: Case, world: int, output: Path) -> list[int | None] | str:
    """The exit codes; in the processes of the launch, the script that they are to run."""
    store, port = fork_store()
    processes = []
    for rank in range(world):
        processes.append(os.fork())
        if processes[-1] == 0:
            enter_rank(rank, world, port, case, output)
            return sys.argv[0]
    codes = exit_codes(processes)
    os.kill(store, signal.SIGKILL)
    os.waitpid(store, 0)
    return codes


def launch_torchrun(case: Case, world: int, output: Path) -> list[int | None]:
    """The exit code of torchrun, which is 1 for any failure of its processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    script, environment = [str(REPO / case.script)], dict(os.environ)
    if case.fault:
        script, environment["TEST_FAULT"] = [str(REPO / "tests" / "struck.py"), *script], case.fault
    command = [sys.executable, *launcher, *script, *case.arguments]
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        return exit_codes([process.pid])


def soak(args: argparse.Namespace, folder: Path) -> str | int:
    """All launches; the exit code, or in a forked process the script to run."""
    environment = Case("train_multi_GPU.py", (*TINY, "--output-dir", str(folder / "done")), 0)
    launch_torchrun(environment, 1, folder / "done.txt")
    todo, seen, wrong = cases(folder), Counter[str](), 0
    chosen = [name for name in todo if name.startswith(tuple(args.only))]
    for number in range(args.launches):
        name, world = chosen[number % len(chosen)], 2 + number // len(chosen) % 2
        run, output = str(folder / f"run{number}"), folder / f"output{number}.txt"
        where = tuple(run if argument == "RUN" else argument for argument in todo[name].arguments)
        case = todo[name]._replace(arguments=where)
        if args.torchrun:
            codes, expected = launch_torchrun(case, world, output), [min(case.code, 1)]
        else:
            launched = launch_forked(case, world, output)
            if isinstance(launched, str):
                return launched
            codes, expected = launched, [case.code] * world
        aborted = ABORT in output.read_text(errors="replace")
        seen[name] += 1
        shutil.rmtree(run, ignore_errors=True)
        if codes != expected or aborted:
            wrong += 1
            what = "an abort" if aborted else "no abort"
            print(f"{name} on {world}: exit codes {codes}, {what}; see {output}", flush=True)
        else:
            output.unlink()
        if (number + 1) % len(chosen) == 0:
            print(f"{number + 1} launches, {wrong} wrong: {dict(seen)}", flush=True)
    print(f"done: {args.launches} launches, {wrong} wrong: {dict(seen)}")
    return int(wrong > 0)


def end_as(outcome: str | int, module: dict[str, Any]) -> None:
    """End a soak by its exit code, or a process forked from it as the script that it is to run.

    module: the globals of the soak, in which the script runs: both end with the interpreter.
    """
    if isinstance(outcome, int):
        sys.exit(outcome)
    module["__file__"] = outcome
    exec(compile(Path(outcome).read_text(encoding="utf-8"), outcome, "exec"), module)


def main() -> str | int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launches", type=int, default=100)
    parser.add_argument("--torchrun", action="store_true", help="real launches")
    parser.add_argument("--only", nargs="+", default=[""], help="what the ways' names begin with")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(REPO)
    folder = Path(tempfile.mkdtemp(prefix="soak-exits-"))
    print(f"in {folder}", flush=True)
    gc.freeze()  # or each process would copy what it shares, only to free it
    return soak(args, folder)


if __name__ == "__main__":
    end_as(main(), globals())
