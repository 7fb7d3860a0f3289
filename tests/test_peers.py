"""What a stranger on the network can do to processes that work together, and where these listen."""

import json
import os
import pickle
import random
import signal
import socket
import struct
import sys
import threading
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import REPO
from distributed import fork_server, on_ranks, open_store
from test_scripts import held_port

import train
from train_utils import distributed_utils
from train_utils.collectives import (
    _patient_group,
    all_gather,
    all_gather_alike,
    call_on_main,
    get_rank,
    shared_store,
    sum_over_ranks,
)
from train_utils.distributed_utils import Launch, init_distributed_mode, shutdown_distributed
from train_utils.errors import UserError

pytestmark = pytest.mark.slow  # processes

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


# -- members of the group that do not play fair ---------------------------------------------------


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _refused(function):
    try:
        return f"taken: {function()!r}"
    except UserError as error:
        return str(error)


def _gather_beside_a_pickle(path):
    if get_rank() == 0:
        return _refused(lambda: all_gather("hello"))
    with pytest.raises(pickle.UnpicklingError):  # of rank 0's message
        dist.all_gather_object([None, None], Evil(path))
    return None


def test_a_pickle_among_gathered_values_is_refused_unexecuted(tmp_path):
    said, _ = on_ranks(2, _gather_beside_a_pickle, str(tmp_path / "executed"))
    assert said.startswith("rank 1 sent what is no message")
    assert not (tmp_path / "executed").exists()


def _hear_a_pickle(path):
    group = _patient_group()
    if get_rank() == 1:
        return _refused(lambda: call_on_main(lambda: None))
    dist.broadcast_object_list([Evil(path)], src=0, group=group)
    return None


def test_a_pickle_from_the_main_rank_is_refused_unexecuted(tmp_path):
    _, said = on_ranks(2, _hear_a_pickle, str(tmp_path / "executed"))
    assert said.startswith("rank 0 sent what is no message")
    assert not (tmp_path / "executed").exists()


def _gather_other_types():
    first = _refused(lambda: all_gather_alike("text" if get_rank() == 0 else {"a": 1}))
    second = _refused(lambda: all_gather_alike((1, "a") if get_rank() == 0 else (1, ["a"])))
    return [first, second, all_gather_alike((get_rank(), "a"))]


def test_a_value_of_another_type_than_ones_own_is_refused_with_its_rank():
    first, second = on_ranks(2, _gather_other_types)
    assert all(text.startswith("rank 1 sent a ") for text in first[:2])
    assert all(text.startswith("rank 0 sent a ") for text in second[:2])
    assert first[2] == second[2] == [(0, "a"), (1, "a")]


def _announce(size):
    if get_rank() == 0:
        return _refused(lambda: all_gather("hello"))
    dist.all_gather([torch.zeros(1, dtype=torch.int64) for _ in range(2)], torch.tensor([size]))
    return None


@pytest.mark.parametrize("size", [2**60, 2**28 + 1, 0, -1])
def test_an_endless_message_is_refused_before_memory_is_taken(size):
    assert f"rank 1 announces {size:,} bytes" in on_ranks(2, _announce, size)[0]


def _send_what_cannot_be_sent():
    first = _refused(lambda: all_gather({1} if get_rank() else 1))
    second = _refused(lambda: call_on_main(lambda: {1}))
    return [first, second, all_gather((get_rank(), {2: "b"}))]


def test_all_ranks_hear_that_one_has_sent_what_cannot_be_sent():
    first, second = on_ranks(2, _send_what_cannot_be_sent)
    assert first == second
    assert "a set cannot be sent" in first[0] and "a set cannot be sent" in first[1]
    assert first[2] == [(0, {2: "b"}), (1, {2: "b"})]  # and go on together


# -- strangers at the store -----------------------------------------------------------------------


def _train_beside_a_stranger(folder):
    options = ["--epochs", "1000", "-b", "2", "-j", "0", "--print-freq", "1000", "--amp", "off"]
    for setting in ("data.image_size=40", "data.train_size=8", "data.val_size=2"):
        options += ["--set", setting]
    args = train.parse_args(
        ["--config", "configs/unet.yaml", "--set", "model.channels=4", *options]
    )
    args.output_dir, args.device, args.gpu, args.distributed = folder, "cpu", 0, True
    args.rank, args.world_size, args.local_world_size = get_rank(), dist.get_world_size(), 2
    stranger = shared_store()

    def forge():
        while not Path(folder, "metrics.jsonl").exists():
            time.sleep(0.1)
        stranger.set("watch/0", "[" * 100_000)
        stranger.set("watch/stop", "\x1b[2J")

    threading.Thread(target=forge, daemon=True).start()
    try:
        train.main(args)
    except SystemExit as exit:
        return exit.code


def test_a_forged_request_to_stop_saves_and_ends_all(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    folder = tmp_path / "run"
    codes = on_ranks(2, _train_beside_a_stranger, str(folder))
    assert codes == [128 + signal.SIGTERM] * 2
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped" and "no process of this run" in status["reason"]
    assert (folder / "last.pth").exists()


# -- where processes listen -----------------------------------------------------------------------


def listening():
    """The addresses, as (host, port), on which this process listens."""
    sockets = {
        str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()
    }
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                host, _, port = fields[1].partition(":")
                words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
                packed = struct.pack(f"={len(words)}I", *words)
                family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                found.append((socket.inet_ntop(family, packed), int(port, 16)))
    return found


def _join(environment, results, visited):
    """Join as a launched process does; say where it listens; work on after strangers' visits."""
    os.environ.update(environment)
    init_distributed_mode(Namespace(device="cpu"))
    call_on_main(lambda: None)  # makes the patient group
    results.put((get_rank(), listening()))
    visited.wait(60)
    results.put((get_rank(), [sum_over_ranks([1.0, get_rank()]), all_gather(get_rank())]))
    all_gather(None)
    shutdown_distributed()


def launched(world, environment, visit=lambda hosts: None):
    """Where each of several launched processes listens, and what they compute after `visit`."""
    context = fork_server()
    results, visited = context.Queue(), context.Event()
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "WORLD_SIZE": str(world), **environment}
        processes.append(context.Process(target=_join, args=(own, results, visited)))
        processes[-1].start()
    try:
        hosts = dict(results.get(timeout=100) for _ in processes)
        visit([address for addresses in hosts.values() for address in addresses])
        visited.set()
        values = dict(results.get(timeout=100) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * world
    return [hosts[rank] for rank in range(world)], [values[rank] for rank in range(world)]


def knock(addresses):
    """Connect and say nothing, or nonsense, or much of it; then stay, or go."""
    generator = random.Random(0)
    left_open = []
    for address in addresses:
        for size in (0, 1, 7, 8, 64, 100_000):
            visitor = socket.create_connection(address, timeout=5)
            visitor.settimeout(1)
            with suppress(OSError):  # thrown out already
                visitor.sendall(generator.randbytes(size))
            left_open.append(visitor)
    for visitor in left_open[::2]:
        visitor.close()
    time.sleep(0.5)
    return left_open


@LINUX
@pytest.mark.parametrize("local", [{"LOCAL_WORLD_SIZE": "2"}, {}], ids=["told", "by the address"])
def test_processes_of_one_machine_listen_on_the_loopback_only(local):
    with held_port() as port:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **local}
        hosts, values = launched(2, environment, knock)
    assert ("127.0.0.1", port) in hosts[0]
    assert len(hosts[0]) > 1 and hosts[1]
    assert {host for host, _ in [*hosts[0], *hosts[1]]} == {"127.0.0.1"}
    assert values == [[[2.0, 1.0], [0, 1]]] * 2  # whoever has knocked


@LINUX
def test_under_torchrun_the_processes_listen_on_the_loopback_only():
    """The store is torchrun's, which listens on all addresses."""
    store = open_store()
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    environment |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    hosts, _ = launched(2, environment)
    assert {host for host, _ in [*hosts[0], *hosts[1]]} == {"127.0.0.1"}


@pytest.mark.parametrize("host", ["203.0.113.77", "localhost"])
def test_of_several_machines_a_name_or_a_gateway_is_left_to_torch(monkeypatch, host):
    """Binding to it would fail, or shut the others out: localhost is rank 0's name for itself."""
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([("torch's", 0, 2)]))
    assert distributed_utils._launch_store(Launch(0, 2, 0, 1)) == "torch's"
