"""What every task promises: train → kill → resume → validate → predict, on one process and two."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from PIL import Image
from test_scripts import REPO, command, records, run, weights

import shapes

pytestmark = pytest.mark.slow

TINY = [
    *("--set", "data.train_size=7", "--set", "data.val_size=3", "--epochs", "2", "-j", "0"),
    *("--print-freq", "1", "--eval-interval", "1", "--device", "cpu"),
]
MOVING = [
    *("--set", "train.ema=0.9", "--set", "train.accumulate=2", "--set", "train.clip_norm=1"),
    *("--set", "train.plateau_factor=0.5", "--set", "train.plateau_patience=1"),
    *("--set", "train.sample_interval=1"),
]
# Each recipe at a size that takes seconds, and the mode of the map that it predicts.
CASES = {
    "shapes": (["--set", "data.image_size=40"], "L"),
    "fcn": (["--set", "data.image_size=40", "--set", "model.channels=8"], "P"),
    "unet": (["--set", "data.image_size=40", "--set", "model.channels=8"], "P"),
    "matting": (["--set", "data.image_size=40", "--set", "model.channels=4"], "L"),
    "pix2pix": (
        ["--set", "data.image_size=40", "--set", "model.channels=4", "--set", "model.levels=4"],
        "RGB",
    ),
}


@pytest.mark.parametrize("processes", [0, 2], ids=["one-process", "two-processes"])
@pytest.mark.parametrize("name", CASES)
def test_every_task_survives_a_kill_and_scores_and_predicts(name, processes, tmp_path):
    extra, mode = CASES[name]
    script = "train_multi_GPU.py" if processes else "train.py"
    # On two processes also with what else moves from step to step.
    batch = [*MOVING, "-b", "1"] if processes else ["-b", "4"]
    options = ["--config", REPO / "configs" / f"{name}.yaml", *TINY, *extra, *batch]
    options += ["--set", "train.save_steps=1"]

    run(tmp_path, script, *options, "--output-dir", "whole", processes=processes)
    _kill_midway(tmp_path, command(script, *options, "--output-dir", "run", processes=processes))
    state = weights(tmp_path / "run")
    assert (state["next_epoch"], state["next_step"]) < (2, 0)  # it was not finished
    resume = ("--output-dir", "run", "--resume", "auto")
    run(tmp_path, script, *options, *resume, processes=processes)

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert "ema" in whole or not processes
    for part in ("model", "ema", "optimizer", "lr_scheduler", "best_scores", "stale"):
        assert_equal(whole.get(part), resumed.get(part), part)

    json_file = tmp_path / "scores.json"
    arguments = ("--weights", "run/last.pth", "--json", json_file, "-j", 0, "--device", "cpu")
    run(tmp_path, "validation.py", *arguments, processes=0 if processes else 2)
    scores = json.loads(json_file.read_text())
    last = records(tmp_path / "run")[-1]
    expected = {k.removeprefix("val/"): v for k, v in last.items() if k.startswith("val/")}
    assert {k: scores[k] for k in expected} == expected
    assert scores["n"] == 3

    _predict(tmp_path, name, mode)


def _kill_midway(folder, arguments):
    """SIGKILL to the process that saves, as soon as it has saved once."""
    log = (folder / "killed.txt").open("w")
    process = subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not (folder / "run" / "last.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(json.loads((folder / "run" / "status.json").read_text())["pid"], signal.SIGKILL)
    assert process.wait(timeout=120) != 0


def _predict(folder, name, mode):
    scene = shapes.render_scene(1, 0, 64)
    (folder / "photos").mkdir()
    picture = Image.fromarray(scene.image.permute(1, 2, 0).numpy()).crop((0, 0, 61, 37))
    picture.save(folder / "photos" / "a.png")
    flags = []
    if name == "matting":
        trimap = Image.new("L", picture.size, 128)
        trimap.paste(255, (10, 10, 20, 20))
        trimap.save(folder / "trimap.png")
        flags = ["--trimap", "trimap.png", "--cutout"]
    run(folder, "predict.py", "photos", "-o", "out", "--weights", "run/model_best.pth", *flags)
    written = Image.open(folder / "out" / "a.png")
    assert (written.size, written.mode) == ((61, 37), mode)
    if name == "matting":
        cutout = Image.open(folder / "out" / "a_cutout.png")
        assert (cutout.size, cutout.mode) == ((61, 37), "RGBA")
        assert written.crop((10, 10, 20, 20)).getextrema() == (255, 255)  # known to be object


def assert_equal(first, second, where):
    """Nested dicts, lists and tensors that agree to the bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key, value in first.items():
            assert_equal(value, second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def test_the_same_command_resumes_a_run_on_own_data(tmp_path):
    """Also where the recipe alone, laid over the checkpoint, would not fit its classes."""
    for number in range(4):
        scene = shapes.render_scene(0, number, 40)
        for folder, picture in (("images", scene.image), ("masks", scene.mask // 255)):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels = picture.permute(1, 2, 0).squeeze(2).numpy()
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    own = ("--images", "images", "--masks", "masks", "--set", "data.class_names=[ground,shape]")
    size = ("--set", "data.image_size=32", "--set", "model.channels=4", "-j", 0, "-b", 2)
    options = ("--config", REPO / "configs" / "unet.yaml", *own, *size)
    options += ("--set", "loss.class_weights=auto")
    run(tmp_path, "train.py", *options, "--epochs", 1)
    done = run(tmp_path, "train.py", *options, "--epochs", 2, "--resume", "auto")
    assert "Epoch: [1]" in done.stdout and "Epoch: [0]" not in done.stdout
    (folder,) = (tmp_path / "runs" / "unet").iterdir()
    assert len(records(folder)) == 2
    arguments = ("--weights", folder / "last.pth", "--images", "images", "--masks", "masks")
    run(tmp_path, "validation.py", *arguments, "--json", "s.json", "-j", 0)
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["n"] == 4 and {"mIoU", "IoU/ground", "IoU/shape"} <= scores.keys()
