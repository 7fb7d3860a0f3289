"""The scripts, started as a user starts them: real processes, real files, real signals."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from distributed import Script, children, run_script
from PIL import Image

from train_utils import shapes
from train_utils.data import GlobalBatchSampler

REPO = Path(__file__).resolve().parents[1]
TINY = [
    *("--set", "data.image_size=48", "--set", "data.train_size=11", "--set", "data.val_size=5"),
    *("--epochs", "2", "-j", "0", "--print-freq", "1", "--eval-interval", "1", "--device", "cpu"),
]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("scripts")]  # one fixture for all


def command(script, *args, processes=0):
    launcher = []
    if processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher, str(REPO / script), *map(str, args)]


def run(folder, script, *args, processes=0, code=0, **env):
    """What a user's own command line does; `run_script` does the same in a third of the time."""
    done = subprocess.run(
        command(script, *args, processes=processes),
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def held_port():
    """A port that no other socket is given meanwhile, and on which a process may listen."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def records(run_folder):
    """metrics.jsonl without what depends on the clock."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    timed = {"img_per_s", "time_s"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def weights(run_folder, name="last.pth"):
    return torch.load(run_folder / name, weights_only=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which `python train.py` ran once, with what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(folder, "train.py", "-b", "4", *TINY)
    (path,) = (folder / "runs" / "shapes").iterdir()
    return folder, path, done.stdout


def test_train_prints_and_writes_what_it_promises(trained):
    _, path, output = trained
    best = path / "model_best.pth"
    relative = best.relative_to(path.parents[2])
    assert f"checkpoint: {relative}" in output
    assert f"python predict.py YOUR_IMAGE.jpg --weights {relative}" in output
    assert "best: " in output and "maxF1: " in output
    names = {p.name for p in path.iterdir()}
    expected = {"config.yaml", "log.txt", "results.txt", "metrics.jsonl", "status.json"}
    expected |= {"last.pth", "model_best.pth", "model_0000.pth", "model_0001.pth"}
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [name for name in names if name.endswith(".tmp")] == []
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
    assert "Epoch: [1]" in (path / "log.txt").read_text()
    assert len((path / "results.txt").read_text().splitlines()) == 2
    for epoch, record in enumerate(records(path)):
        assert record["epoch"] == epoch
        assert record["step"] == 3 * (epoch + 1)
        assert {"lr", "train/loss", "val/MAE", "val/maxF1"} <= record.keys()


def test_checkpoint_speaks_the_usual_dialect(trained):
    _, path, _ = trained
    state = weights(path)
    assert {"model", "optimizer", "lr_scheduler", "scaler", "epoch", "args"} <= state.keys()
    assert state["epoch"] == 1
    assert state["args"]["data"]["image_size"] == 48
    best = max(record["val/maxF1"] for record in records(path))
    assert weights(path, "model_best.pth")["best_scores"]["maxF1"] == best
    assert state["best_scores"]["maxF1"] == best


def tensorboard(run_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_folder), size_guidance={"scalars": 0}).Reload()


def test_tensorboard_has_scalars_sheet_and_curve(trained):
    _, path, _ = trained
    events = tensorboard(path)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("val/maxF1")] == [3, 6]
    assert [event.value for event in events.Scalars("val/MAE")] == pytest.approx(
        [record["val/MAE"] for record in records(path)], rel=1e-6
    )
    assert [event.value for event in events.Scalars("epoch/loss")] == pytest.approx(
        [record["train/loss"] for record in records(path)], rel=1e-6
    )
    sheet = events.Images("val/sheet")[-1]
    assert (sheet.width, sheet.height) == (3 * 164 + 4, 5 * 164 + 4)
    assert "val/precision_recall" in events.Tags()["tensors"]


def test_validation_repeats_training_to_the_last_bit_for_any_world_size(trained):
    folder, path, _ = trained
    scores = []
    for start, processes, batch in ((run_script, 0, 1), (run, 2, 3), (run_script, 3, 8)):
        target = folder / f"scores{processes}.json"
        arguments = ("--weights", path / "last.pth", "--json", target, "-b", batch, "-j", 0)
        start(folder, "validation.py", *arguments, "--device", "cpu", processes=processes)
        scores.append(json.loads(target.read_text()))
    last = records(path)[-1]
    assert scores[0] == {"MAE": last["val/MAE"], "maxF1": last["val/maxF1"], "n": 5}
    assert scores[1] == scores[0]
    assert scores[2] == scores[0]


def test_test_only_reports_the_same_scores_and_writes_nothing(trained):
    folder, path, _ = trained
    before = sorted(folder.rglob("*"))
    done = run_script(folder, "train.py", *TINY, "-b", 4, "--resume", path, "--test-only")
    assert f"MAE: {records(path)[-1]['val/MAE']:.5f}" in done.stdout
    assert sorted(folder.rglob("*")) == before


def test_predict_mirrors_folders_and_counts_failures(trained):
    folder, _, _ = trained
    photos = folder / "photos"
    (photos / "sub").mkdir(parents=True)
    Image.effect_noise((70, 40), 60).convert("RGB").save(photos / "a.jpg")
    Image.effect_noise((33, 90), 60).save(photos / "sub" / "b.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
    flags = ("--cutout", "--overlay", "--device", "cpu")
    done = run(folder, "predict.py", "photos", "-o", "out", *flags, code=1)
    assert "model_best.pth" in done.stdout  # the newest best checkpoint is the default
    assert "2 done, 1 failed" in done.stdout
    assert "broken.jpg" in done.stderr and "Traceback" not in done.stderr
    out = sorted(p.relative_to(folder / "out").as_posix() for p in (folder / "out").rglob("*.png"))
    kinds = ("", "_cutout", "_overlay")
    assert out == sorted(f"{stem}{kind}.png" for stem in ("a", "sub/b") for kind in kinds)
    assert Image.open(folder / "out" / "a.png").size == (70, 40)
    assert Image.open(folder / "out" / "a.png").mode == "L"
    assert Image.open(folder / "out" / "sub" / "b_cutout.png").mode == "RGBA"

    # Stretched to [0, 1], and cut at a threshold, on the way to the same files.
    stretch = ("--set", "eval.post_norm=true", "--device", "cpu", "--threshold")
    for name, more in (("stretched", stretch[:-1]), ("cut", (*stretch, 0.25))):
        run_script(folder, "predict.py", "photos/a.jpg", "-o", name, *more)
    plain, stretched, cut = (
        torch.frombuffer(
            bytearray(Image.open(folder / name / "a.png").tobytes()), dtype=torch.uint8
        )
        for name in ("out", "stretched", "cut")
    )
    low, high = plain.min().double(), plain.max().double()
    assert high < 255 and (stretched.min(), stretched.max()) == (0, 255)
    # Both ends are rounded to whole codes, as is the map before it is stretched here.
    apart = (plain - low) / (high - low) * 255 - stretched
    assert apart.abs().max() <= 0.5 + 1.5 * 255 / (high - low)
    assert set(cut.unique().tolist()) == {0, 255}
    surely = (stretched - 63.75).abs() > 0.5  # what rounds to the code beside 0.25 may be either
    assert torch.equal(cut[surely] == 255, stretched[surely] > 63.75)


def test_killed_run_continues_as_if_nothing_had_happened(tmp_path):
    """One process in bf16; TensorBoard and the files have no step twice either."""
    options = [*TINY, "--set", "train.ema=0.9", "--amp", "bf16", "--deterministic", "-b", "2"]
    # Without units for it a step in bf16 takes many times longer than in fp32: four an epoch do.
    options += ["--set", "data.image_size=40", "--set", "data.train_size=7"]
    options += ["--set", "train.save_steps=1", "--output-dir"]
    run_script(tmp_path, "train.py", *options, "whole")
    fault = {"TEST_FAULT": "step:kill@8"}  # the last step of the second epoch
    run_script(tmp_path, "train.py", *options, "run", code=-signal.SIGKILL, **fault)
    state = weights(tmp_path / "run")
    assert state["next_epoch"] == 1 and state["next_step"] in (2, 3)
    # Steps that will be done again have left their traces already.
    assert [e.step for e in tensorboard(tmp_path / "run").Scalars("train/loss")][-1:] >= [6]
    done = run_script(tmp_path, "train.py", *options, "run", "--resume", "auto")
    assert f"Epoch: [1]  [{state['next_step'] + 1}/4]" in done.stdout
    assert "Epoch: [0]" not in done.stdout
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    results = [(tmp_path / name / "results.txt").read_text() for name in ("whole", "run")]
    assert results[0] == results[1]
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "run")
    for part in ("model", "ema"):
        for key, value in expected[part].items():
            assert torch.equal(value, resumed[part][key]), key
    for index, moments in expected["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, resumed["optimizer"]["state"][index][name])
    assert resumed["best_scores"] == expected["best_scores"]
    for tag in ("train/loss", "train/lr", "val/maxF1"):
        before, after = (tensorboard(tmp_path / name).Scalars(tag) for name in ("whole", "run"))
        assert [(e.step, e.value) for e in after] == [(e.step, e.value) for e in before]


def test_a_run_without_better_scores_ends_and_keeps_what_was_asked_for(tmp_path):
    options = ("--set", "train.early_stop=2", "--set", "train.plateau_factor=0.5")
    options += ("--set", "optim.schedule=constant", "--set", "train.plateau_patience=1")
    options += ("--set", "train.keep=1", "--set", "train.keep_every=2", "--lr", "1e-9")
    options += ("--set", "train.sample_interval=4", "-b", "4", "--output-dir", "run")
    done = run_script(tmp_path, "train.py", *TINY, *options, "--epochs", "30")
    scores = [record["val/maxF1"] for record in records(tmp_path / "run")]
    best = scores.index(max(scores))
    assert len(scores) == best + 3 < 30  # two evaluations after the best one
    assert "no better score for 2 evaluations" in done.stdout
    stale = sum(score <= max(scores[:i]) for i, score in enumerate(scores) if i)
    state = weights(tmp_path / "run")
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-9 * 0.5**stale)
    numbered = sorted(int(p.stem[6:]) for p in (tmp_path / "run").glob("model_[0-9]*.pth"))
    last = len(scores) - 1
    passing = max(epoch for epoch in range(last + 1) if epoch % 2 == 0)
    assert numbered == sorted([epoch for epoch in range(last + 1) if epoch % 2] + [passing])
    sheets = sorted((tmp_path / "run" / "samples").iterdir())
    assert [s.name for s in sheets] == [
        f"step_{step:07d}.png" for step in range(4, 3 * len(scores) + 1, 4)
    ]
    assert Image.open(sheets[0]).size == (3 * 164 + 4, 5 * 164 + 4)
    best_scores = json.loads((tmp_path / "run" / "status.json").read_text())["best"]
    assert best_scores["maxF1"] == max(scores)
    again = run_script(tmp_path, "train.py", *TINY, *options, "--epochs", "30", "--resume", "auto")
    assert "ending the run" in again.stdout and "Epoch:" not in again.stdout
    assert json.loads((tmp_path / "run" / "status.json").read_text())["best"] == best_scores


def wait_until(condition, what, running=lambda: True):
    """Until a condition holds, while `running()` does; what is under way may take its time."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and running():
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def logged(run_folder, text, times=1):
    """Whether a run's log says something so often by now."""
    log = run_folder / "log.txt"
    return log.exists() and log.read_text().count(text) >= times


def test_sigterm_saves_after_a_step_and_says_so(tmp_path):
    """Also when, as torchrun and Slurm do it, the loader's workers get the signal too."""
    options = ["-b", "1", *TINY, "--epochs", "50", "-j", "2", "--output-dir", "run"]
    training = Script(tmp_path, "train.py", *options)
    wait_until(lambda: logged(tmp_path / "run", "[ 3/11]"), "a step")
    os.killpg(json.loads((tmp_path / "run" / "status.json").read_text())["pid"], signal.SIGTERM)
    done = training.wait(timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "Continue with --resume run" in done.stdout
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    state = weights(tmp_path / "run")
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert (status["epoch"], status["step"]) == (state["next_epoch"], state["next_step"])


def test_two_processes_on_an_odd_number_of_samples_equal_one(trained, tmp_path):
    _, path, _ = trained
    options = ("-b", "2", *TINY, "--sync-bn", "--output-dir", "run")
    done = run_script(tmp_path, "train_multi_GPU.py", *options, processes=2)
    assert done.stdout.count("2 process(es) on cpu") == 1  # one rank speaks
    one, two = records(path), records(tmp_path / "run")
    assert [r["step"] for r in one] == [r["step"] for r in two]
    # The same samples, and so the same loss; then fp32's rounding grows from step to step.
    first = [tensorboard(run).Scalars("train/loss")[0].value for run in (path, tmp_path / "run")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert one[0]["train/loss"] == pytest.approx(two[0]["train/loss"], rel=1e-2)
    assert weights(tmp_path / "run")["global_batch"] == 4
    # Continued by one process, the run keeps its global batch.
    more = ("-b", "2", *TINY, "--epochs", "3", "--output-dir", "run", "--resume", "auto")
    done = run_script(tmp_path, "train.py", *more)
    assert "4 images per step" in done.stdout
    assert [r["step"] for r in records(tmp_path / "run")] == [3, 6, 9]


def _runs(process):
    """Whether a process is there and has not ended (ended ones may wait for their new parent)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_processes_end_when_torchrun_is_killed(tmp_path):
    options = ("-b", 1, *TINY, "--epochs", 500, "--device", "cpu", "--output-dir", "run")
    launcher = subprocess.Popen(
        command("train_multi_GPU.py", *options, processes=2),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in launcher.stdout:
        if "[3/6]" in line:
            break
    else:
        pytest.fail("no step was taken")
    processes = children(launcher.pid)
    assert len(processes) == 2
    launcher.kill()
    rest = launcher.stdout.read()  # ends when both have ended
    launcher.wait()
    assert "Continue with --resume run" in rest
    deadline = time.monotonic() + 30
    while any(map(_runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [process for process in processes if _runs(process)] == []
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    state = weights(tmp_path / "run")
    assert (status["epoch"], status["step"]) == (state["next_epoch"], state["next_step"])


def test_a_file_that_fails_on_another_rank_is_named_in_the_status(tmp_path):
    for folder, mode in (("images", "RGB"), ("masks", "L"), ("val", "RGB")):
        (tmp_path / folder).mkdir()
        for number in range(4):
            noise = Image.effect_noise((40, 40), 50).convert(mode)
            noise.save(tmp_path / folder / f"{number}.png")
    # The second sample of the first step is rank 1's. Its header is right, its data are cut off.
    second = GlobalBatchSampler(4, 2, seed=0).order(0)[1]
    broken = tmp_path / "images" / f"{second}.png"
    broken.write_bytes(broken.read_bytes()[:-900])
    own = ("--images", "images", "--masks", "masks", "--val-images", "val", "--val-masks")
    options = (*own, "masks", "--set", "data.image_size=40", "-b", 1, "-j", 0)
    where = ("--output-dir", "run", "--device", "cpu")
    done = run_script(tmp_path, "train_multi_GPU.py", *options, *where, processes=2, code=1)
    assert f"error (rank 1): images/{second}.png: damaged" in done.stderr
    assert "error: lost the other processes" in done.stderr  # rank 0, in one line
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"].startswith(f"rank1: UserError: images/{second}.png: damaged")
    assert f"images/{second}.png" in (tmp_path / "run" / "log.txt").read_text()
    assert not list((tmp_path / "run").glob("failed_rank*"))


CLOCK = f"""
import itertools, runpy, sys, time
hours, clock = itertools.cycle((0, 7200, -7200)), time.time
time.time = lambda: clock() + next(hours)
sys.path.insert(0, {str(REPO)!r})
runpy.run_path({str(REPO / "train_multi_GPU.py")!r}, run_name="__main__")
"""


def test_multi_script_runs_as_one_process_while_the_clock_jumps(tmp_path):
    (tmp_path / "script.py").write_text(CLOCK)
    options = ("-b", "4", *TINY, "--epochs", "1", "--set", "train.hang_timeout=30")
    done = run_script(tmp_path, tmp_path / "script.py", *options, "--output-dir", "run")
    assert "1 process(es)" in done.stdout
    assert "hang" not in done.stdout + done.stderr
    etas = re.findall(r"eta: (\S+) ", done.stdout)
    assert len(etas) == 3 and all(eta.startswith("0:0") for eta in etas)  # no hours
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < record["time_s"] < 3600 and record["img_per_s"] > 0


def test_srun_variables_launch_without_torchrun(tmp_path):
    args = ("-b", "4", *TINY, "--epochs", "1", "--output-dir", "run")
    with held_port() as port:
        tasks = []
        for rank in ("0", "1"):
            env = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2"}
            env["MASTER_PORT"] = str(port)
            tasks.append(Script(tmp_path, "train_multi_GPU.py", *args, **env))
        first, second = (task.wait() for task in tasks)
    assert [first.returncode, second.returncode] == [0, 0], first.stderr + second.stderr
    assert "2 process(es)" in first.stdout
    assert "Epoch" not in second.stdout


def test_train_refuses_to_be_launched_several_times_over(tmp_path):
    done = run_script(tmp_path, "train.py", *TINY, processes=2, code=1)
    assert "train_multi_GPU.py" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_script_written_for_the_recipe_runs_unchanged(tmp_path):
    for kind in ("Image", "Mask"):
        (tmp_path / "DUTS-TE" / f"DUTS-TE-{kind}").mkdir(parents=True)
    for number in range(5):
        scene = shapes.render_scene(0, number, 48)
        for kind, pixels, ending in (("Image", scene.image, "jpg"), ("Mask", scene.mask, "png")):
            picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy())
            picture.save(tmp_path / "DUTS-TE" / f"DUTS-TE-{kind}" / f"{number}.{ending}")
    script = tmp_path / "user_script.py"
    script.write_text(
        f"""
import sys; sys.path.insert(0, {str(REPO)!r})
import torch
from src import u2net_lite
from my_dataset import DUTSDataset
from train_utils import (train_one_epoch, evaluate, create_lr_scheduler, get_params_groups,
                         criterion, save_on_master, mkdir)
from train_utils.distributed_utils import (MetricLogger, SmoothedValue, MeanAbsoluteError, F1Score,
    is_main_process, get_rank, get_world_size, all_gather)
from torchvision.transforms import v2

def preset(image, target):
    both = v2.Resize((40, 40))(image, target)
    return v2.Compose([v2.ToDtype(torch.float32, scale=True)])(*both)

device = torch.device("cpu")
data = DUTSDataset({str(tmp_path)!r}, train=False, transforms=preset)
train_loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True,
                                           collate_fn=data.collate_fn)
val_loader = torch.utils.data.DataLoader(data, batch_size=1, collate_fn=data.collate_fn)
model = u2net_lite()
optimizer = torch.optim.AdamW(get_params_groups(model, weight_decay=1e-4), lr=1e-3)
scheduler = create_lr_scheduler(optimizer, len(train_loader), 2, warmup=True, warmup_epochs=1)
loss, lr = train_one_epoch(model, optimizer, train_loader, device, 0, scheduler, 1, None)
mae, f1 = evaluate(model, val_loader, device)
mkdir("weights")
save_on_master({{"model": model.state_dict(), "epoch": 0}}, "weights/model_0.pth")
assert loss > 0 and 0 < lr <= 1e-3
print("MAE", mae.compute(), "maxF1", f1.compute(), mae.count)
"""
    )
    done = run_script(tmp_path, script)
    assert done.stdout.rstrip().endswith(" 5")
    assert (tmp_path / "weights" / "model_0.pth").exists()


def test_official_weights_on_photographs(tmp_path, shared_data):
    """The reference figures, from two processes (`test_exactness`: one has them to the bit)."""
    options = [
        *("--weights", shared_data / "weights" / "u2netp_official_keys.pth"),
        *("--data-path", shared_data / "saliency", "--json", "scores.json"),
        *("--set", "data.mean=[0,0,0]", "--set", "data.std=[1,1,1]", "--device", "cpu"),
    ]
    run_script(tmp_path, "validation.py", *options, processes=2)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["n"] == 80
    assert scores["MAE"] == pytest.approx(0.1324, abs=0.002)
    assert scores["maxF1"] == pytest.approx(0.8048, abs=0.002)
