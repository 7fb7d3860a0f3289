"""What every task promises: train → kill → resume → validate → predict, on one process and two."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from PIL import Image
from test_scripts import command, records, run, weights

import shapes

pytestmark = pytest.mark.slow

TINY = [
    *("--set", "data.train_size=7", "--set", "data.val_size=3", "--epochs", "2", "-j", "0"),
    *("--print-freq", "1", "--eval-interval", "1", "--device", "cpu"),
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
    batch = ["-b", "2" if processes else "4"]
    options = ["--config", _recipe(name), *TINY, *extra, *batch, "--set", "train.save_steps=1"]

    run(tmp_path, script, *options, "--output-dir", "whole", processes=processes)
    _kill_midway(tmp_path, command(script, *options, "--output-dir", "run", processes=processes))
    state = weights(tmp_path / "run")
    assert (state["next_epoch"], state["next_step"]) < (2, 0)  # it was not finished
    resume = ("--output-dir", "run", "--resume", "auto")
    run(tmp_path, script, *options, *resume, processes=processes)

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    for part in ("model", "optimizer", "lr_scheduler", "best_scores", "stale"):
        assert_equal(whole[part], resumed[part], part)

    json_file = tmp_path / "scores.json"
    arguments = ("--weights", "run/last.pth", "--json", json_file, "-j", 0, "--device", "cpu")
    run(tmp_path, "validation.py", *arguments, processes=0 if processes else 2)
    scores = json.loads(json_file.read_text())
    last = records(tmp_path / "run")[-1]
    expected = {k.removeprefix("val/"): v for k, v in last.items() if k.startswith("val/")}
    assert {k: scores[k] for k in expected} == expected
    assert scores["n"] == 3

    _predict(tmp_path, name, mode)


def _recipe(name):
    from test_scripts import REPO

    return REPO / "configs" / f"{name}.yaml"


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
