"""Killed, stopped, hung or spoilt at any place, a run ends as if nothing had happened.

Faults on order (tests/faults.py) strike real processes under torchrun, start after start; the
run that torchrun restarts each time must reach the weights, the optimizer, the schedule, the moving
average and the records of a run that was left alone, bit for bit.
"""

import json
import math
import os
import pkgutil
import re
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import faults
import pytest
import torch
from distributed import Script, on_ranks, run_script
from test_contract import assert_equal
from test_loop import draws
from test_scripts import REPO, command, logged, records, wait_until, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from train_utils import train_one_epoch
from train_utils.collectives import get_rank, get_world_size
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.errors import UserError
from train_utils.sync_batchnorm import convert_sync_batchnorm
from train_utils.train_and_eval import StepOptions

pytestmark = pytest.mark.xdist_group("survival")  # what the tests share is made once

CPU = torch.device("cpu")
# Nine steps in all, in two parts each, with everything that a checkpoint must carry over.
OPTIONS = [
    *("--config", REPO / "configs" / "unet.yaml", "--device", "cpu", "--print-freq", "1"),
    *("--set", "data.image_size=40", "--set", "model.channels=8", "--set", "train.ema=0.9"),
    *("--set", "data.train_size=11", "--set", "data.val_size=3", "--epochs", "3", "-b", "1"),
    *("--set", "train.accumulate=2", "--set", "train.clip_norm=1", "--set", "train.save_steps=1"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = (*OPTIONS, "-j", 0, "--output-dir", "run")
    run_script(folder, "train_multi_GPU.py", *arguments, processes=2)
    return folder / "run"


def assert_same_run(one, other):
    assert records(one) == records(other)
    first, second = weights(one), weights(other)
    for part in ("model", "ema", "optimizer", "lr_scheduler", "best_scores", "stale", "epoch"):
        assert_equal(first[part], second[part], part)


def starts_of(log):
    """(epoch, step) of the first step that each start of a run took, of those that took any."""
    found = []
    for start in log.split("process(es) on cpu")[1:]:
        first = re.search(r"Epoch: \[(\d+)\]  \[(\d+)/3\]", start)
        found += [tuple(map(int, first.groups()))] if first else []
    return found


def suffer(folder, ordered, *extra):
    """torchrun's agent, which starts its two processes again after every fault; run folder and log.

    The faults strike one after the other, each in the next start.
    """
    faults_on_order = ",".join(f"{fault}:start={start}" for start, fault in enumerate(ordered))
    launch = {"processes": 2, "restarts": len(ordered), "TEST_FAULT": faults_on_order}
    run_script(folder, "train_multi_GPU.py", *OPTIONS, *extra, **launch)
    (path,) = (folder / "runs" / "unet").iterdir()  # every start continues in the same folder
    log = (path / "log.txt").read_text()
    assert log.count("process(es) on cpu") == len(ordered) + 1, log  # every fault struck
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
    assert not list(path.glob(".*.tmp"))
    deadline = time.monotonic() + 60  # workers end a moment after their ranks
    while _running_in(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _running_in(folder) == []  # no hung worker outlives its rank either
    return path, log


def _running_in(folder):
    """The processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").resolve(strict=True) == folder.resolve():
                found.append((process.name, (process / "cmdline").read_bytes()))
    return found


@pytest.mark.slow
def test_killed_anywhere(undisturbed, tmp_path):
    """SIGKILL in a step, in a loader's worker, in evaluation and in all phases of a save."""
    ordered = [
        "step:kill@5:rank=1",  # in the second epoch
        "load:kill@2:rank=0",  # in its worker
        "evaluate:kill:rank=0",
        "save.write:kill:rank=0",
        "save.replace:kill:rank=0",
        "saved:kill@2:rank=0",
        "load:hang@2:rank=1",  # in its worker
    ]
    # The undisturbed run had no workers.
    path, log = suffer(tmp_path, ordered, "-j", 1, "--set", "train.hang_timeout=6")
    assert_same_run(undisturbed, path)
    assert "a loader process was ended from outside" in log
    assert "hang: rank 1" in log and "at 'waiting for the loader's workers: images of epoch" in log
    first, *others = starts_of(log)
    assert first == (0, 1) and others == sorted(others)
    assert others[0] in ((1, 1), (1, 2)) and others[-1] >= (2, 1)


@pytest.mark.slow
def test_stopped_spoilt_and_hung_anywhere(undisturbed, tmp_path):
    """SIGTERM to one rank in a step, in evaluation and in a save; errors, NaN and hangs of one."""
    ordered = [
        "step:term@2:rank=1",
        "load:raise@3:rank=1",
        "loss:nan:rank=1",
        "evaluate:term:rank=1",
        "save.write:term:rank=0",
        "evaluate:hang:rank=1",
    ]
    path, log = suffer(tmp_path, ordered, "-j", 0, "--set", "train.hang_timeout=6")
    assert_same_run(undisturbed, path)
    assert "stopped by SIGTERM at epoch 0, step 2" in log  # in a step: after it, on both ranks
    assert "failed: rank1: UserError: TEST_FAULT: load" in log
    assert "step 1 of 3: loss, ce, dice on rank 1 (scene" in log
    assert "stopped by SIGTERM at epoch 1, step 3" in log  # only the evaluation was left
    assert "hang: rank 1" in log and "has been at 'evaluating" in log


def read_status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.mark.slow
def test_preempted_in_a_long_evaluation(tmp_path):
    """A signal to one rank, or to torchrun, ends an evaluation on all of them, well in time."""
    run = tmp_path / "run"
    options = (*OPTIONS, "--set", "data.val_size=20000", "-j", 0, "--output-dir", run)
    options += ("--resume", "auto")
    fault = {"TEST_FAULT": "evaluate:term@3:rank=1"}
    run_script(tmp_path, "train_multi_GPU.py", *options, processes=2, code=1, **fault)
    assert_stopped_in_evaluation(run, "SIGTERM")

    launcher = start_torchrun(tmp_path, *options)
    try:  # only the evaluation is left
        again = partial(logged, run, "learning rate", 2)
        wait_until(again, "the second start", lambda: launcher.poll() is None)
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=60)  # torchrun kills after 30 s
    finally:
        launcher.kill()
    assert launcher.returncode != 0, output
    assert_stopped_in_evaluation(run, "SIGINT")


def assert_stopped_in_evaluation(run, reason):
    status = read_status(run)
    assert (status["state"], status["reason"]) == ("stopped", reason)
    assert (status["epoch"], status["step"]) == (0, 3)
    assert weights(run)["next_step"] == 3
    assert not (run / "metrics.jsonl").exists()


def start_torchrun(folder, *options, script="train_multi_GPU.py", **env):
    return subprocess.Popen(
        command(script, *options, processes=2),
        cwd=folder,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_sigterm_to_torchrun_while_a_checkpoint_is_written(tmp_path):
    """Rank 0 sends it when its third file is whole, but not yet in the old one's place."""
    options = ("save", "SIGTERM", "train_multi_GPU.py", *OPTIONS, "-j", 0, "--output-dir", "run")
    launcher = start_torchrun(tmp_path, *options, script="tests/struck.py")
    output, _ = launcher.communicate(timeout=280)
    assert launcher.returncode != 0, output
    status, state = read_status(tmp_path / "run"), weights(tmp_path / "run")
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM"), output
    stands_at = state["next_epoch"], state["next_step"]
    assert (status["epoch"], status["step"]) == stands_at
    assert (0, 2) <= stands_at < (3, 0)  # the third save is that after the second step
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.slow
def test_two_interrupts_to_torchrun_in_one_step(tmp_path):
    """It passes the first one on and sends SIGTERM for the second: all save, and end, once."""
    options = ("hold", "SIGINT", "train_multi_GPU.py", *OPTIONS, "-j", 0, "--output-dir", "run")
    launcher = start_torchrun(tmp_path, *options, script="tests/struck.py")
    run = tmp_path / "run"
    try:
        for noted in ("SIGINT", "SIGTERM"):
            text = f"{noted}: stopping after this step"
            wait_until(partial(logged, run, text), noted, lambda: launcher.poll() is None)
            if noted == "SIGINT":
                launcher.send_signal(signal.SIGINT)
        (tmp_path / "go").touch()
        output, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode != 0, output
    status, state = read_status(run), weights(run)
    stands_at = state["next_epoch"], state["next_step"]
    assert (status["state"], status["epoch"], status["step"]) == ("stopped", *stands_at), output
    assert stands_at in ((0, 2), (0, 3))  # the second step, or the next, if that had begun


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path):
    options = ("--set", "data.train_size=16", "-b", 8, "-j", 0, "--print-freq", 1)
    options += ("--output-dir", "run", "--device", "cpu")
    training = Script(tmp_path, "train.py", *options, TEST_FAULT="step:hang")
    run = tmp_path / "run"
    wait_until((run / "last.pth").exists, "the first save")
    process = read_status(run)["pid"]
    os.kill(process, signal.SIGINT)
    wait_until(partial(logged, run, "SIGINT: stopping after this step"), "the signal")
    os.kill(process, signal.SIGINT)
    done = training.wait(timeout=60)
    output = done.stdout + done.stderr
    assert done.returncode == 130, output
    assert "interrupted: stopped at once" in output and "Traceback" not in output
    status, state = read_status(run), weights(run)
    assert (status["state"], status["reason"]) == ("stopped", "SIGINT, at once")
    assert (state["next_epoch"], state["next_step"]) == (0, 0)  # as saved at the start


BUSY = """
import torch
from pathlib import Path
from train_utils.run_folder import RunFolder
from train_utils.stop import StopSignals
with RunFolder(Path("run"), {}) as run, StopSignals(run, 0):
    large = torch.rand(6000, 6000)
    run.status("running")
    Path("busy").touch()
    torch.linalg.svd(large)  # minutes, in one call
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_a_process_that_is_busy_inside_torch(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "script.py").write_text(BUSY)
    script = Script(tmp_path, tmp_path / "script.py")
    wait_until((tmp_path / "busy").exists, "the long call")
    for _ in range(2):
        time.sleep(0.5)
        os.kill(read_status(tmp_path / "run")["pid"], signal.SIGINT)
    done = script.wait(timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted twice: stopped at once\n")
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"]) == ("stopped", "SIGINT, at once")


# -- losses and gradients that are not finite -----------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 1, 1, bias=False), nn.BatchNorm2d(1)

    def forward(self, x):
        return self.norm(self.conv(x))


def train(mode, fault="", spoilt=(), infinite=False, **options):
    """(weights and statistics, message) of one epoch of six steps of 2 images.

    infinite: the gradient of this process's images in the third step.
    """
    torch.manual_seed(0)
    net = convert_sync_batchnorm(Net())
    images, masks = torch.randn(12, 3, 4, 4), torch.rand(12, 1, 4, 4)
    for index in spoilt:
        images[index] = float("inf")
    sampler = GlobalBatchSampler(12, 2, None, get_rank(), get_world_size(), shuffle=False)
    loader = train_loader(TensorDataset(images, masks), sampler, 0, CPU)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    passes = count(1)  # the fourth one looks for the culprit of the third
    net.conv.weight.register_hook(
        lambda gradient: gradient * (math.inf if next(passes) in (3, 4) and infinite else 1)
    )
    model = DistributedDataParallel(net) if get_world_size() > 1 else net
    message = ""
    with pytest.MonkeyPatch.context() as patch:
        faults.install(fault, patch.setattr)
        try:
            options = StepOptions(on_nonfinite=mode, **options)
            train_one_epoch(model, optimizer, loader, CPU, 0, None, 2, options=options)
        except UserError as error:
            message = str(error)
    return [value.flatten().tolist() for value in net.state_dict().values()], message


def test_a_bad_step_stops_before_it_changes_anything_and_is_named():
    before, message = train("stop", "loss:nan")
    torch.manual_seed(0)
    assert before[0] == Net().conv.weight.flatten().tolist()
    assert message.startswith(
        "epoch 0, step 1 of 6: loss on rank 0 (sample 0, sample 1) became NaN"
    )
    _, message = train("stop", "gradient:nan@3")
    assert message.startswith("epoch 0, step 3 of 6: the gradient on rank 0 (sample 4, sample 5)")


def test_a_skipped_step_leaves_weights_and_statistics_as_they_were():
    """Images of infinities spoil batch norm's statistics in the forward pass already."""
    after, message = train("skip", "", spoilt=(10, 11))
    assert message == ""
    assert all(torch.tensor(values).isfinite().all() for values in after)
    steps = after[-1]
    assert steps == [5]  # num_batches_tracked: the sixth step never was
    stopped, message = train("stop", "", spoilt=(10, 11))
    assert "step 6 of 6: loss on rank 0 (sample 10, sample 11)" in message
    assert stopped[0] == after[0]


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 1.0}, {"clip_value": 0.1}])
def test_an_infinite_gradient_is_found_before_it_is_clipped(clip):
    """Clipping would divide by an infinite norm, or make of infinity a gradient like others."""
    after, message = train("stop", infinite=True, **clip)
    assert message.startswith("epoch 0, step 3 of 6: the gradient on rank 0 (sample 4, sample 5)")
    before, _ = train("stop", "loss:nan@3", **clip)
    assert after == before
    after, message = train("skip", infinite=True, **clip)
    assert message == "" and after[-1] == [5]
    assert all(torch.tensor(values).isfinite().all() for values in after)


def test_skipping_all_the_time_is_refused():
    _, message = train("skip", "", spoilt=range(12))
    assert message == ""  # six in a row
    images, masks = torch.full((24, 3, 4, 4), float("nan")), torch.rand(24, 1, 4, 4)
    loader = train_loader(TensorDataset(images, masks), GlobalBatchSampler(24, 2), 0, CPU)
    net = Net()
    optimizer, options = torch.optim.SGD(net.parameters(), lr=0.1), StepOptions(on_nonfinite="skip")
    with pytest.raises(UserError, match=r"step 10 of 12: .* 10 steps in a row"):
        train_one_epoch(net, optimizer, loader, CPU, 0, None, 2, options=options)


def _spoilt_on_ranks():
    runs = [("stop", "loss:nan@2:rank=1"), ("stop", "gradient:nan@4:rank=0")]
    found = [*(train(*each) for each in runs), train("skip", "", spoilt=(3,))]
    infinite = {"infinite": get_rank() == 1, "clip_norm": 1.0}
    return [*found, train("stop", **infinite), train("skip", **infinite)], draws(7, epoch=0)


@pytest.mark.slow
def test_all_ranks_stop_or_skip_together_and_name_the_one():
    (one, drawn), (other, drawn_by_other) = on_ranks(2, _spoilt_on_ranks)
    assert not set(drawn) & set(drawn_by_other)  # each drops units of its own
    assert [message for _, message in one] == [message for _, message in other]
    (_, loss), (_, gradient), (after, skipped), (_, infinite), (clipped, nothing) = one
    assert loss.startswith("epoch 0, step 2 of 6: loss on rank 1 (sample 3) became NaN")
    assert gradient.startswith("epoch 0, step 4 of 6: the gradient on rank 0 (sample 6) became")
    assert skipped == "" and after[-1] == [5]
    assert infinite.startswith("epoch 0, step 3 of 6: the gradient on rank 1 (sample 5) became")
    assert nothing == "" and clipped[-1] == [5]
    assert all(torch.tensor(values).isfinite().all() for values in clipped)
    # Both ranks kept the same weights and synchronised statistics, all of them finite.
    assert [values for values, _ in one] == [values for values, _ in other]
    assert all(torch.tensor(values).isfinite().all() for values in after)


def test_a_gpu_reads_the_verdict_with_its_losses(monkeypatch):
    """Where the host must not wait for the device, a bad step is named at the next line."""
    from train_utils import nonfinite

    init = nonfinite.NonfiniteGuard.__init__

    def like_a_gpu(guard, *args):
        init(guard, *args)
        guard.looks_at_once = False

    monkeypatch.setattr(nonfinite.NonfiniteGuard, "__init__", like_a_gpu)
    _, message = train("stop", "gradient:nan@3")
    assert message.startswith("epoch 0, step 3 of 6: the gradient became NaN or infinite")


# -- errors of one process ------------------------------------------------------------------------


class HalfUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)

    def forward(self, x):
        return self.used(x)


def _train_half_used():
    net = HalfUsed()
    data = TensorDataset(torch.rand(4, 3, 4, 4), torch.rand(4, 1, 4, 4))
    loader = train_loader(data, GlobalBatchSampler(4, 2, None, get_rank(), 2), 0, CPU)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    try:
        train_one_epoch(DistributedDataParallel(net), optimizer, loader, CPU, 0, None)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_unused_parameters_are_named():
    for message in on_ranks(2, _train_half_used):
        assert message.startswith("model.unused.weight, model.unused.bias: no loss depends on")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_lack_of_memory_says_what_to_do(device):
    def losses(models, batch):
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        torch.empty(2**58)

    net = Net()
    data = TensorDataset(torch.rand(8, 3, 4, 4), torch.rand(8, 1, 4, 4))
    loader = train_loader(data, GlobalBatchSampler(8, 8), 0, CPU)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"out of memory .* 8 images: .*-b 4 and twice"):
        train_one_epoch(net, optimizer, loader, CPU, 0, None, losses=losses)


@pytest.mark.parametrize("text", ["step", "step:explode", "nowhere:kill", "step:kill@x", "a:b:c"])
def test_faults_that_make_no_sense_are_refused(text):
    with pytest.raises(UserError, match=rf"TEST_FAULT={text}: not PLACE"):
        faults.parse(text)


def test_faults_by_place_number_rank_and_start():
    ordered = faults.parse("step:kill,save.write:hang@2:rank=3:start=1")
    assert ordered == (("step", "kill", 1, None, 0), ("save.write", "hang", 2, 3, 1))


@pytest.mark.parametrize("place", faults.PLACES)
def test_a_fault_whose_place_is_gone_is_refused(place, monkeypatch):
    """It would never strike, and the test that orders it would show nothing."""
    for owner, name, _ in faults.PLACES[place]:
        with monkeypatch.context() as patch:
            patch.delattr(pkgutil.resolve_name(owner), name)
            with pytest.raises(AttributeError, match=name):
                faults.install(f"{place}:kill", patch.setattr)
