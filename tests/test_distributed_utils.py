"""What one rank does for all, on real processes."""

import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from datetime import timedelta

import pytest
import torch.distributed as dist
from conftest import REPO
from distributed import on_ranks

import train
from train_utils import distributed_utils
from train_utils.collectives import broadcast_tensors, call_on_main, get_rank
from train_utils.distributed_utils import init_distributed_mode
from train_utils.errors import UserError
from train_utils.run_folder import choose_run_folder

pytestmark = pytest.mark.slow  # processes


def _wait_for_a_slow_rank():
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)

    def slowly():
        time.sleep(5)
        return "done"

    return call_on_main(slowly)


def test_ranks_wait_for_the_main_one_beyond_the_collective_timeout():
    assert on_ranks(2, _wait_for_a_slow_rank) == ["done", "done"]


def _refused_everywhere():
    def check():
        raise UserError("file: broken. Mend it.")

    try:
        call_on_main(check)
    except UserError as error:
        return str(error)
    return "not raised"


def test_a_refusal_on_the_main_rank_reaches_all():
    assert on_ranks(2, _refused_everywhere) == ["file: broken. Mend it."] * 2


def _folder_by_another_clock():
    hour = f"2000{get_rank()}"
    time.strftime = lambda _format: hour
    return str(choose_run_folder(None, None, "name"))


def test_ranks_whose_clocks_differ_share_one_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert on_ranks(2, _folder_by_another_clock) == ["runs/name/20000"] * 2


def _broadcast():
    import torch

    mine = [torch.full((2, 2), float(get_rank() + 1)), torch.tensor([get_rank() + 7])]
    mine.append(mine[0].t()[:1])  # not contiguous
    broadcast_tensors(mine)
    return [tensor.tolist() for tensor in mine]


def test_tensors_of_all_kinds_become_those_of_rank_0():
    expected = [[[1.0, 1.0], [1.0, 1.0]], [7], [[1.0, 1.0]]]
    assert on_ranks(2, _broadcast) == [expected] * 2


def _collectives_of_a_training(folder):
    """What this rank calls, in order, with the shapes and types of its tensors."""
    called = []

    def recorded(name):
        function = getattr(dist, name)

        def call(data, *args, **options):
            shape = (list(data.shape), str(data.dtype)) if hasattr(data, "shape") else None
            called.append([name, shape])
            return function(data, *args, **options)

        return call

    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, recorded(name))
    size = ("--set", "data.image_size=40", "--set", "model.channels=4", "--set", "train.ema=0.9")
    uneven = ("--set", "data.train_size=7", "--set", "data.val_size=2", "-b", "1", "-j", "0")
    often = (
        "--epochs",
        "2",
        "--set",
        "train.save_steps=1",
        "--print-freq",
        "1",
        "--sync-bn",
        "--amp",
        "off",
    )
    args = train.parse_args(["--config", "configs/unet.yaml", *size, *uneven, *often])
    args.output_dir, args.device, args.gpu, args.distributed = folder, "cpu", 0, True
    args.rank, args.world_size, args.local_world_size = get_rank(), dist.get_world_size(), 3
    train.main(args)
    return called


def test_all_ranks_call_the_same_collectives_in_the_same_order(tmp_path, monkeypatch):
    """Uneven and empty shares, fewer validation samples than ranks, saving, a moving average.

    torch's own check (TORCH_DISTRIBUTED_DEBUG=DETAIL) cannot be used: with gloo, torch 2.15 crashes
    in the constructor of DistributedDataParallel.
    """
    monkeypatch.chdir(REPO)
    first, *others = on_ranks(3, _collectives_of_a_training, str(tmp_path / "run"))
    assert {name for name, _ in first} == {"all_reduce", "broadcast"}
    assert len(first) > 50
    assert others == [first, first]


def test_a_port_in_use_is_refused_at_once(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in launch.items():
            monkeypatch.setitem(os.environ, name, value)
        with pytest.raises(UserError, match=rf"127.0.0.1:{port}: rank 0 of 2 could not join.*port"):
            init_distributed_mode(Namespace(device="cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_whose_torchrun_is_gone_already_does_not_wait_for_it(monkeypatch):
    mine = os.getpid()  # python, which may be a launcher
    monkeypatch.setattr(os, "getppid", lambda: mine)
    distributed_utils._refuse_to_be_an_orphan()
    with subprocess.Popen(["sleep", "60"]) as init:
        monkeypatch.setattr(os, "getppid", lambda: init.pid)
        with pytest.raises(UserError, match="torchrun: ended while this process was starting"):
            distributed_utils._refuse_to_be_an_orphan()
        init.kill()
