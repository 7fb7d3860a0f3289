"""The launch of a process among others, and names that users of this recipe know.

Ranks and collectives are in `collectives.py`.
"""

import ctypes
import errno
import gc
import hashlib
import ipaddress
import os
import re
import signal
import socket
import sys
import threading
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from train_utils.checkpoint import save_checkpoint
from train_utils.collectives import (
    all_gather,
    all_gather_alike,
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
    patient_groups,
)
from train_utils.device import (
    process_group_backend,
    refuse_several,
    refuse_shared_device,
    resolve_device,
    take_device,
)
from train_utils.errors import UserError, brief
from train_utils.metric_logger import MetricLogger, SmoothedValue
from train_utils.metrics import F1Score, MeanAbsoluteError

__all__ = [
    "F1Score",
    "MeanAbsoluteError",
    "MetricLogger",
    "SmoothedValue",
    "all_gather",
    "get_rank",
    "get_world_size",
    "init_distributed_mode",
    "is_main_process",
    "mkdir",
    "save_on_master",
]

COLLECTIVE_TIMEOUT = timedelta(minutes=31)  # more than the longest train.hang_timeout
_JOIN_TIMEOUT = timedelta(minutes=10)
_USED = "pixtrain/used"  # a key that processes leave in the store once all of them have met
_TIME_TO_LEAVE = 5.0  # seconds; without work under way it takes milliseconds


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile wrappers."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def no_sync(model: nn.Module) -> AbstractContextManager:
    """Accumulate gradients without reducing them, for modules where that means something."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def mkdir(path: str | os.PathLike) -> None:
    """Make a folder and its parents; one that is there already is fine."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        place, problem = Path(error.filename), f"cannot be made a folder ({error.strerror})"
        if place.is_symlink():
            problem = f"is a link to {place.readlink()}, which is not there"
        raise UserError(f"{place}: {problem}. Choose another --output-dir.") from error


def save_on_master(state: Any, path: str | os.PathLike) -> None:
    """Write a checkpoint atomically, on rank 0 only."""
    if is_main_process():
        save_checkpoint(state, Path(path))


# -- launch ---------------------------------------------------------------------------------------


class Launch(NamedTuple):
    """What the launcher's environment says about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch_environment() -> Launch | None:
    """Read torchrun's variables, or Slurm's under `srun`; None for a plain `python` start.

    Raises UserError when the variables are there in part only, or malformed.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = _number("WORLD_SIZE", 1)
        # Launchers that start one process a pod set no LOCAL_ variables.
        local_rank, local_world = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        return Launch(_number("RANK", 0, world - 1), world, local_rank, local_world)
    if _is_srun_task():
        return _read_slurm()
    if "RANK" in env or "WORLD_SIZE" in env:
        raise UserError(
            "environment: only one of RANK and WORLD_SIZE is set. Start with torchrun, "
            "or unset it to run a single process."
        )
    return None


def _number(name: str, lowest: int, highest: int = 999_999, otherwise: str | None = None) -> int:
    """A launcher's number, `lowest` where it is not there; otherwise: a variable to ask then.

    Raises UserError for anything else than a number in the range.
    """
    if name not in os.environ and otherwise:
        return _number(otherwise, lowest, highest)
    text = os.environ.get(name, str(lowest))
    if not re.fullmatch("[0-9]{1,10}", text) or not lowest <= int(text) <= highest:
        raise UserError(
            f"{name}={brief(text)}: must be a whole number from {lowest} to {highest}. Start with "
            "torchrun or srun, which set it, or unset it."
        )
    return int(text)


def _is_srun_task() -> bool:
    """Whether this is one of several processes that srun has started.

    The step's own number says so. A batch script, and a shell of salloc's, have the job's number of
    tasks and the rank 0 as well, but their step has no number, or 1.
    """
    return "SLURM_PROCID" in os.environ and _slurm_tasks() > 1 and not _in_shell_of_a_step()


def _slurm_tasks() -> int:
    return _number("SLURM_STEP_NUM_TASKS", 1)


def _in_shell_of_a_step() -> bool:
    """Whether this was typed into a shell that is the task, by `srun -n4 --pty bash`.

    Only task 0 of such a step is left. A shell gives what is typed a process group of its own, on
    its terminal. What srun itself starts is in the task's group or has no terminal, though it
    inherits the variables of the shell that it is called from.
    """
    if "SLURM_PTY_PORT" not in os.environ or sys.platform == "win32":
        return False
    if "SLURM_TASK_PID" not in os.environ:
        return True
    with suppress(OSError):  # a container may not see the task
        if os.getpgid(_number("SLURM_TASK_PID", 1, 2**31)) == os.getpgrp():
            return False
    return _has_terminal()


def _has_terminal() -> bool:
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return True
    return False


def _read_slurm() -> Launch:
    env, world = os.environ, _slurm_tasks()
    nodes = _number("SLURM_STEP_NUM_NODES", 1, otherwise="SLURM_NNODES")
    # "4(x2),3": tasks per node; the plain quotient serves where the variable is missing
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", str(-(-world // nodes)))
    counts = [
        int(count)
        for count, _, times in re.findall(r"(\d{1,6})(\(x(\d{1,6})\))?", tasks)
        for _ in range(int(times or 1))
    ]
    if not counts or min(counts) < 1:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={brief(tasks)}: must be numbers of tasks, as 4(x2),3. "
            "Unset it, or start with srun, which sets it."
        )
    local_world = counts[min(_number("SLURM_NODEID", 0), len(counts) - 1)]
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_slurm_host() if nodes > 1 else "127.0.0.1"
    env.setdefault("MASTER_PORT", str(_slurm_port()))
    return Launch(
        _number("SLURM_PROCID", 0, world - 1), world, _number("SLURM_LOCALID", 0), local_world
    )


def _slurm_port() -> int:
    """A port that all tasks of a step agree on, and that others can neither guess nor share often.

    The kernel chose the port on which srun itself listens, and only the step's tasks are told. The
    result lies below those that the kernel gives to others.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_LAUNCHER_PORT")
    known = "/".join(os.environ.get(name, "") for name in names)
    return 12000 + int.from_bytes(hashlib.sha256(known.encode()).digest(), "big") % 20000


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", ""))
    # "gpu[07-09,11],cpu1" → gpu07
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes)
    if not match:
        raise UserError(
            "SLURM_NODELIST: empty, so the first node is unknown. Export MASTER_ADDR before srun."
        )
    return "".join(part or "" for part in match.groups())


def cpu_cores(local_world_size: int = 1) -> int:
    """This process's share of the node's cores, at least 1."""
    per_task = os.environ.get("SLURM_CPUS_PER_TASK")
    if per_task and "LOCAL_RANK" not in os.environ:  # a task may be a torchrun of several processes
        return _number("SLURM_CPUS_PER_TASK", 1)  # srun has bound the task to its own cores already
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // local_world_size)


def own_cores() -> int:
    """This process's share of the node's cores, by what its launcher says."""
    launch = read_launch_environment()
    return cpu_cores(launch.local_world_size if launch else 1)


def init_distributed_mode(args: Namespace) -> None:
    """Join the process group that torchrun or srun asks for; a plain start is world size 1.

    Reads `args.device` (default "auto"); sets `args.rank, world_size, local_world_size, gpu` (the
    local rank), `distributed, dist_backend` and `args.device`, resolved for this process. GPUs use
    their own backend (nccl), with gloo beside it for host numbers; CPUs use gloo and share the
    node's cores.
    """
    launch = read_launch_environment()
    rank, world, local_rank, local_world = launch or Launch(0, 1, 0, 1)
    device = resolve_device(getattr(args, "device", None) or "auto", local_rank, local_world)
    args.rank, args.world_size, args.local_world_size = rank, world, local_world
    args.gpu, args.distributed, args.device = local_rank, launch is not None, str(device)
    args.dist_backend = process_group_backend(device)
    if launch and not args.dist_backend:
        refuse_several(device)
    take_device(device)
    # torchrun sets OMP_NUM_THREADS=1 for several processes, which leaves most cores idle; a larger
    # number can only come from the user and is kept. A single process has torch's own default.
    if device.type == "cpu" and local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(cpu_cores(local_world))
    if launch is None:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Its processes live in sessions of their own: a torchrun that is killed would leave them
        # training on, unseen, and in the way of the next start.
        end_with_parent(signal.SIGTERM)
        _refuse_to_be_an_orphan()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    _number("MASTER_PORT", 1, 65535)
    if sys.platform == "linux" and _on_one_machine(launch):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = _launch_store(launch)
        fresh = _unused(store)
        refuse_shared_device(device, fresh, rank, world, local_world)
        dist.init_process_group(
            args.dist_backend,
            store=fresh,
            rank=rank,
            world_size=world,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type != "cpu" else None,
        )
        store.set(_USED, "1")
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"{address}: rank {rank} of {world} could not join the process group ({error}). "
            "Check that the port is free (MASTER_PORT, torchrun --master-port), that all nodes use "
            "the same address, and that the host's name resolves (else, on one machine: torchrun "
            "--local-addr=127.0.0.1; on several: export GLOO_SOCKET_IFNAME)."
        ) from error


def _on_one_machine(launch: Launch) -> bool:
    if launch.local_world_size == launch.world_size:
        return True
    try:
        return ipaddress.ip_address(os.environ["MASTER_ADDR"]).is_loopback
    except ValueError:  # a name, such as the localhost that Kubernetes may give rank 0 of many pods
        return False


def _launch_store(launch: Launch) -> Any:
    """The launcher's store, or rank 0's own, which listens on MASTER_ADDR only where that is sure.

    A host's name may mean another address to other hosts, and an address that of a gateway: then
    it listens on all, as torch has it.
    """
    rank, world, *_ = launch
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        numeric = 0 if _on_one_machine(launch) else socket.AI_NUMERICHOST
        try:
            (family, *_, place), *_ = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=numeric
            )
            listener = socket.create_server(place[:2], family=family, backlog=2048)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
        else:
            return dist.TCPStore(
                host, port, world, True, _JOIN_TIMEOUT, master_listen_fd=listener.detach()
            )
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=_JOIN_TIMEOUT))
    return store


def launcher_ids() -> list[str]:
    """What tells the torchrun agents of this launch from all others; empty without torchrun.

    An agent outlives the processes that it starts, so those of a restart find their predecessors'
    run by it, whichever nodes joined or left meanwhile.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    agent = os.getppid()
    try:  # a process number alone may come again, in containers above all
        started = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    run = os.environ["TORCHELASTIC_RUN_ID"]
    return sorted(set(all_gather_alike(f"{run} {socket.gethostname()} {agent} {started}")))


def _unused(store: Any) -> Any:
    """A part of the launcher's store that holds nothing of processes before a restart.

    torchrun's static rendezvous keeps one store for all restarts. New processes would find the
    addresses of those that are gone, and fail to connect to them.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # Agents of other nodes may count their restarts differently; they meet in a new store then.
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" or store.check([_USED]):
        return dist.PrefixStore(f"restart{restart}", store)
    return store


def end_with_parent(number: int) -> None:
    """Have the kernel send a signal to this process when its parent dies, where the system can."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, number, 0, 0, 0)
    if os.getppid() != parent:  # it died just before
        os.kill(os.getpid(), number)


def _refuse_to_be_an_orphan() -> None:
    """UserError if torchrun was killed before the kernel could be told to watch it.

    The connection to its store would be tried again and again, for longer than its timeout says.
    """
    with suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if b"torch" not in parent and b"python" not in parent:
            raise UserError("torchrun: ended while this process was starting. Start it again.")


def refuse_launcher(script: str) -> None:
    """UserError when a script for one process was started as one of several."""
    launch = read_launch_environment()
    if launch and launch.world_size > 1:
        raise UserError(
            f"{script}: is for one process, but the launcher started {launch.world_size}. Launch "
            "train_multi_GPU.py with the same arguments."
        )


def shutdown_distributed() -> bool:
    """Leave all process groups; False if that takes longer than a few seconds.

    gloo's groups have threads of their own, which end with the last reference to their group, not
    by destroy_process_group. A process whose interpreter ends before them aborts now and then
    ("terminate called without an active exception"), so no caller may hold a group, or a
    data-parallel network, any more. A group with work that waits for another process, which an
    error may leave behind, cannot be ended: hence False.
    """
    if not is_dist_avail_and_initialized():
        return True
    groups = [dist.group.WORLD, *patient_groups.values()]
    patient_groups.clear()
    gc.collect()  # data-parallel networks are parts of reference cycles

    index = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def end() -> None:
        if index is not None:  # each thread has a device of its own: the first one, if not told
            torch.accelerator.set_device_index(index)
        dist.destroy_process_group()
        groups.clear()

    thread = threading.Thread(target=end, name="leaving", daemon=True)
    thread.start()
    thread.join(_TIME_TO_LEAVE)
    return not thread.is_alive()
