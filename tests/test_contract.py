"""What every system promises, from a killed training to the pixels that predict.py writes.

Each system trains on two processes, once undisturbed and once killed: both processes die before the
same step of the second epoch, when weights, optimizers, schedules, averages and scores have moved.
"""

import json
import os
import re
import signal

import pytest
import torch
from distributed import run_script
from PIL import Image
from test_scripts import REPO, records, weights

import tasks
from train_utils import evaluate, shapes
from train_utils.amp import choose_amp_dtype
from train_utils.data import eval_loader
from train_utils.metrics import all_scores

pytestmark = pytest.mark.slow

# Two epochs of four steps in two parts each; the last step has a single image, and so an empty part
# and an empty share. With all that moves from step to step, or from one evaluation to the next.
OPTIONS = [
    *("--set", "data.train_size=13", "--set", "data.val_size=3", "-b", 1, "--epochs", 2, "-j", 0),
    *("--print-freq", 1, "--eval-interval", 1, "--device", "cpu", "--amp", "off"),
    *("--set", "train.save_steps=1", "--set", "train.ema=0.9", "--set", "train.accumulate=2"),
    *("--set", "train.clip_norm=1", "--set", "train.plateau_factor=0.5"),
    *("--set", "train.plateau_patience=1", "--set", "train.sample_interval=3"),
    *("--set", "eval.amp=off", "--output-dir", "run"),
]
STEPS = 4
# Neither ImageNet's nor none: who forgets them sees other pixels.
OWN_NORM = ["--set", "data.mean=[0.2,0.4,0.3]", "--set", "data.std=[0.3,0.15,0.2]"]
# Each recipe at a size that takes seconds, the step before which it is killed, counted from the
# start, and the mode of the map that it predicts.
CASES = {
    "shapes": (["--set", "data.image_size=40", *OWN_NORM], 8, "L"),
    "fcn": (
        [
            *("--set", "data.image_size=40", "--set", "model.channels=8", *OWN_NORM),
            *("--set", "loss.class_weights=[0.03,1,1,1,1,1]"),  # or all would be background
        ],
        7,
        "P",
    ),
    "unet": (["--set", "data.image_size=40", "--set", "model.channels=8", *OWN_NORM], 8, "P"),
    "matting": (["--set", "data.image_size=40", "--set", "model.channels=4", *OWN_NORM], 7, "L"),
    "pix2pix": (
        ["--set", "data.image_size=40", "--set", "model.channels=4", "--set", "model.levels=4"],
        8,
        "RGB",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_system_survives_a_kill_and_scores_and_predicts(name, tmp_path):
    extra, kill, mode = CASES[name]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    train = ("train_multi_GPU.py", "--config", REPO / "configs" / f"{name}.yaml", *OPTIONS, *extra)
    run_script(tmp_path / "whole", *train, processes=2)
    fault = {"TEST_FAULT": f"step:kill@{kill}"}
    run_script(tmp_path / "killed", *train, processes=2, code=1, **fault)
    whole, run = tmp_path / "whole" / "run", tmp_path / "killed" / "run"

    # The last save of all, or the one before it, which was on the disk when that one began.
    state = weights(run)
    done = STEPS * state["next_epoch"] + state["next_step"]
    assert kill - 2 <= done <= kill - 1 and state["next_epoch"] == 1 and state["next_step"] >= 2
    assert records(run) == records(whole)[:1]
    resumed = run_script(tmp_path / "killed", *train, "--resume", "auto", processes=2)
    first = re.search(r"Epoch: \[(\d+)\]  \[(\d+)/4\]", resumed.stdout)
    assert [int(number) for number in first.groups()] == [1, state["next_step"] + 1]

    assert records(run) == records(whole)
    assert_equal(weights(whole), weights(run), "last.pth")
    for file in ("model_best.pth", "model_0001.pth"):
        assert_equal(weights(whole, file), weights(run, file), file)

    scores = validate(tmp_path, "--weights", run / "last.pth")
    last = records(run)[-1]
    expected = {k.removeprefix("val/"): v for k, v in last.items() if k.startswith("val/")}
    assert {k: scores[k] for k in expected} == expected
    assert scores["n"] == 3

    assert_predictions_are_what_validation_scored(tmp_path, name, run / "last.pth", mode)


def validate(folder, *options):
    """The scores that validation.py writes, at full precision."""
    run_script(folder, "validation.py", *options, "--json", "s.json", "-j", 0, "--device", "cpu")
    return json.loads((folder / "s.json").read_text())


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
        same_nan = first != first and second != second  # no rate, before the first step
        assert same_nan or first == second, where


# -- prediction of files --------------------------------------------------------------------------

SIZES = {"a": (61, 37), "b": (40, 40), "c": (48, 64)}  # width and height


def assert_predictions_are_what_validation_scored(folder, name, checkpoint, mode):
    """Both scripts on the same photographs, whose sizes are not the network's."""
    write_photographs(folder, name)
    data = ["--images", "photos", "--masks", "targets"]
    flags = []
    if name == "matting":
        data += ["--set", "data.trimaps=trimaps"]
        flags = ["--trimap", "trimaps", "--cutout"]
    scores = validate(folder, "--weights", checkpoint, *data)
    predict = ("predict.py", "photos", "--weights", checkpoint, "--device", "cpu", *flags, "-o")
    run_script(folder, *predict, "maps")
    written = {stem: Image.open(folder / "maps" / f"{stem}.png") for stem in SIZES}
    assert {stem: (picture.size, picture.mode) for stem, picture in written.items()} == {
        stem: (size, mode) for stem, size in SIZES.items()
    }

    # What validation scored: its scores again, and with them its predictions.
    overrides = {"data": {"images": "photos", "masks": "targets"}}
    overrides["data"] |= {"trimaps": "trimaps"} if name == "matting" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        task, models = tasks.load_models(checkpoint, overrides, None)
        cfg = task.cfg
        dataset = task.build_val_dataset(all_pairs=True)
        loader, samples = eval_loader(dataset, 8, 0, torch.device("cpu")), []
        metrics = evaluate(
            models,
            loader,
            "cpu",
            metrics=task.make_metrics(),
            predict=task.predict,
            keep=len(SIZES),
            samples=samples,
            amp_dtype=choose_amp_dtype(cfg.eval.amp, torch.device("cpu")),
        )
        assert_scores(all_scores(metrics), scores)
        for stem, sample in zip(SIZES, samples, strict=True):
            image = pixels_of(Image.open(folder / "photos" / f"{stem}.png"))
            given = {"trimap": sample.target[1:]} if name == "matting" else {}
            kinds = {"kinds": ["map"], "threshold": None}
            expected = task.render(image, prediction=sample.prediction, **kinds, **given)
            assert written[stem].tobytes() == expected["map"].tobytes(), stem

    # The files themselves have those scores, saliency's within the rounding to 8 bits.
    pairs = [
        (pixels_of(written[stem]), sample.target)
        for stem, sample in zip(SIZES, samples, strict=True)
    ]
    if name == "shapes":
        of_files = validate(folder, "--predictions", "maps", "--masks", "targets")
        assert of_files["n"] == len(SIZES)
        assert of_files["MAE"] == pytest.approx(scores["MAE"], abs=0.5 / 255)
        assert of_files["maxF1"] == pytest.approx(scores["maxF1"], abs=0.02)
    elif mode == "P":
        assert_scores(scores_of_labels(pairs), scores)
    else:
        (metric,) = task.make_metrics()
        for codes, target in pairs:
            metric.update([codes / 255 if name == "matting" else codes / 127.5 - 1], [target])
        assert_scores(metric.scores(), scores)

    if name != "pix2pix":  # whose images are always mapped to [-1, 1]
        without = ("--set", "data.mean=[0,0,0]", "--set", "data.std=[1,1,1]")
        run_script(folder, *predict, "other", *without)
        other = {stem: Image.open(folder / "other" / f"{stem}.png").tobytes() for stem in SIZES}
        assert any(other[stem] != written[stem].tobytes() for stem in SIZES)
    if name == "matting":
        cutout = Image.open(folder / "maps" / "a_cutout.png")
        assert (cutout.size, cutout.mode) == (SIZES["a"], "RGBA")
        assert written["a"].crop((0, 0, 10, 37)).getextrema() == (255, 255)  # known to be object


def assert_scores(some, expected):
    """Some of the scores that are expected, to the last bit."""
    assert some and some == {name: expected[name] for name in some}


def write_photographs(folder, name):
    """Scenes, cropped, with what the system is to make of them."""
    for number, (stem, (width, height)) in enumerate(SIZES.items()):
        scene = shapes.render_scene(1, number, 64)
        targets = {"shapes": scene.mask, "matting": scene.alpha, "pix2pix": scene.labels}
        pictures = {"photos": scene.image, "targets": targets.get(name, scene.classes)}
        if name == "matting":
            pictures["trimaps"] = torch.full_like(scene.alpha, 128)
            pictures["trimaps"][..., :10] = 255
        for kind, picture in pictures.items():
            (folder / kind).mkdir(exist_ok=True)
            pixels = picture[:, :height, :width].permute(1, 2, 0).squeeze(2)
            Image.fromarray(pixels.contiguous().numpy()).save(folder / kind / f"{stem}.png")


def pixels_of(picture):
    """A picture as uint8 [C, H, W]."""
    channels = len(picture.getbands())
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, channels).permute(2, 0, 1)


def scores_of_labels(pairs):
    """Accuracy and intersections over unions of label maps, of all pixels together."""
    found, truth = (
        torch.cat([each[0].flatten() for each in part]) for part in zip(*pairs, strict=True)
    )
    scores = {"accuracy": (found == truth).double().mean().item()}
    shares = {}
    for index in truth.unique().tolist():  # classes that are in no mask have no score
        union = ((found == index) | (truth == index)).sum().item()
        both = ((found == index) & (truth == index)).sum().item()
        shares[f"IoU/{shapes.CLASS_NAMES[index]}"] = both / union
    return {**scores, **shares, "mIoU": sum(shares.values()) / len(shares)}


# -- a run on own data ----------------------------------------------------------------------------


def test_the_same_command_resumes_a_run_on_own_data(tmp_path):
    """Also where the recipe alone, laid over the checkpoint, would not fit its classes.

    SIGKILL leaves the samples in memory to the start that continues.
    """
    for number in range(4):
        scene = shapes.render_scene(0, number, 40)
        for folder, picture in (("images", scene.image), ("masks", scene.mask // 255)):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels = picture.permute(1, 2, 0).squeeze(2).numpy()
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    own = ("--images", "images", "--masks", "masks", "--set", "data.class_names=[ground,shape]")
    size = ("--set", "data.image_size=32", "--set", "model.channels=4", "-j", 0, "-b", 2)
    options = ("--config", REPO / "configs" / "unet.yaml", *own, *size, "--device", "cpu")
    options += ("--set", "loss.class_weights=auto")
    options += ("--epochs", 2, "--cache", "ram")
    killed = {"TEST_FAULT": "step:kill@4"}  # in the second epoch, of two steps
    run_script(tmp_path, "train.py", *options, code=-signal.SIGKILL, **killed)
    (folder,) = (tmp_path / "runs" / "unet").iterdir()
    packs = re.findall(
        r"new cache of \d samples: (/dev/shm/.+), ", (folder / "log.txt").read_text()
    )
    assert len(packs) == 2 and all(map(os.path.exists, packs))
    done = run_script(tmp_path, "train.py", *options, "--resume", "auto")
    assert "Epoch: [1]" in done.stdout and "Epoch: [0]" not in done.stdout
    assert all(
        f"found cache of {n} samples: {pack}" in done.stdout
        for n, pack in ((3, packs[0]), (1, packs[1]))
    )
    assert not any(map(os.path.exists, packs))  # the run that ends gives the memory back
    assert len(records(folder)) == 2
    arguments = ("--weights", folder / "last.pth", "--images", "images", "--masks", "masks")
    scores = validate(tmp_path, *arguments)
    assert scores["n"] == 4 and {"mIoU", "IoU/ground", "IoU/shape"} <= scores.keys()
