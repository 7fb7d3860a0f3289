"""Checkpoints: atomic, verified, never executed, and refused before anything is copied."""

import os
import pickle
import random

import pytest
import torch
from torch import nn

from train_utils import save_on_master
from train_utils.checkpoint import (
    load_file,
    load_into,
    load_training_state,
    load_weights,
    save_checkpoint,
    strip_prefixes,
)
from train_utils.errors import UserError


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


def test_round_trip_and_links(tmp_path, model):
    path, link = tmp_path / "last.pth", tmp_path / "best.pth"
    save_checkpoint({"model": model.state_dict(), "epoch": 3}, path, (link,))
    for file in (path, link):
        content = load_file(file)
        assert content["epoch"] == 3
        assert torch.equal(content["model"]["0.weight"], model[0].weight)
    assert {p.name for p in tmp_path.iterdir()} == {"last.pth", "best.pth"}
    save_checkpoint({"model": {}, "epoch": 4}, path)
    assert (load_file(path)["epoch"], load_file(link)["epoch"]) == (4, 3)


def test_failed_write_keeps_the_old_file(tmp_path, model):
    path = tmp_path / "last.pth"
    save_checkpoint({"epoch": 1}, path)

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left.*--resume auto"):
        save_checkpoint({"epoch": 2, "bad": Unwritable()}, path)
    assert load_file(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path, model, share):
    path = tmp_path / "a.pth"
    save_checkpoint({"model": model.state_dict()}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"a\.pth: .*(damaged|empty|not a readable)"):
        load_file(path)


def test_every_bit_flip_in_the_weights_is_refused(tmp_path, model):
    path = tmp_path / "a.pth"
    save_checkpoint({"model": model.state_dict()}, path)
    content = path.read_bytes()
    stored = model[0].weight.detach().numpy().tobytes()
    start = content.index(stored)
    draw = random.Random(0)
    for _ in range(20):
        flipped = bytearray(content)
        flipped[start + draw.randrange(len(stored))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"damaged|not a readable"):
            load_file(path)


def test_code_in_a_pickle_is_refused_unexecuted(tmp_path):
    sentinel = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(sentinel),)

    path = tmp_path / "evil.pth"
    torch.save({"model": Attack()}, path)
    with pytest.raises(UserError, match="could run code"):
        load_weights(path)
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match=r"evil\.pth"):
        load_weights(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict", "module.", "_orig_mod.", "both"])
def test_weights_in_every_usual_wrapping(tmp_path, model, wrap):
    state = model.state_dict()
    content = {
        "bare": state,
        "model": {"model": state, "epoch": 1},
        "state_dict": {"state_dict": state},
        "module.": {f"module.{k}": v for k, v in state.items()},
        "_orig_mod.": {f"_orig_mod.{k}": v for k, v in state.items()},
        "both": {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    }[wrap]
    torch.save(content, tmp_path / "w.pth")
    loaded, config = load_weights(tmp_path / "w.pth")
    assert loaded.keys() == state.keys()
    assert config is None


def test_the_moving_average_is_what_is_used(tmp_path, model):
    average = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    content = {"model": model.state_dict(), "ema": average, "args": {"task": "saliency"}}
    content["next_epoch"] = 1
    save_checkpoint(content, tmp_path / "w.pth")
    loaded, config = load_weights(tmp_path / "w.pth")
    assert loaded["0.weight"].abs().sum() == 0
    assert config == {"task": "saliency"}


def test_prefix_that_only_some_names_have_is_kept():
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert strip_prefixes(state) == state


def test_misfit_lists_everything_and_copies_nothing(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = {k: v + 1 for k, v in before.items()}
    wrong["0.weight"] = torch.zeros(8, 1, 3, 3)
    wrong["extra"] = wrong.pop("1.bias")
    with pytest.raises(UserError) as caught:
        load_into(model, wrong, "w.pth")
    message = str(caught.value)
    for part in ("w.pth", "1 missing: 1.bias", "1 unexpected: extra", "0.weight (8, 1, 3, 3) ≠"):
        assert part in message
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({"epoch": 1}, "holds no network weights"),
        ([1, 2], "holds no network weights"),
        ({}, "holds no network weights"),
    ],
)
def test_file_without_weights(tmp_path, content, cause):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=cause):
        load_weights(tmp_path / "w.pth")


def test_what_is_given_is_what_is_saved(tmp_path, model):
    save_on_master(model.state_dict(), tmp_path / "w.pth")
    model.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True))


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 a photo", b"some text"])
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg: not a checkpoint"):
        load_file(tmp_path / "a.jpg")


def test_missing_file_and_bare_weights_for_resume(tmp_path, model):
    with pytest.raises(UserError, match="no such file"):
        load_file(tmp_path / "none.pth")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="--weights"):
        load_training_state(tmp_path / "w.pth")
