"""Checkpoints: atomic, verified, never executed, and refused before anything is copied."""

import copy
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter, defaultdict
from datetime import datetime
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from distributed import Script, fork_server
from torch import nn
from torch.optim.swa_utils import AveragedModel

from train_utils import checkpoint, outline, save_on_master
from train_utils.checkpoint import (
    CheckpointWriter,
    load_file,
    load_training_state,
    load_weights,
    named_alike,
    save_checkpoint,
    split_states,
    with_counters,
)
from train_utils.errors import UserError
from train_utils.files import remove_temporaries
from train_utils.log import get_logger
from train_utils.run_folder import RunFolder

REPO = Path(__file__).resolve().parents[1]


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


def training_state(epoch=1, **changes):
    """What a checkpoint of ours holds, for a network of one weight that says its epoch."""
    state = {
        "format": 1,
        "model": {"weight": torch.full((50,), float(epoch))},
        **{key: {} for key in ("optimizer", "lr_scheduler", "scaler", "ema_steps", "meters")},
        **{"epoch": epoch - 1, "next_epoch": epoch, "next_step": 0, "lr": 0.1, "best_scores": {}},
        **{"stale": 0, "num_samples": 9, "data": "abc", "global_batch": 4, "world_size": 1},
        "args": {"task": "saliency"},
    }
    return {**state, **changes}


@pytest.mark.parametrize("cut", [lambda n: 0, lambda n: 1, lambda n: n // 2, lambda n: n - 1])
def test_truncated_file_is_refused(tmp_path, cut):
    path = tmp_path / "a.pth"
    save_checkpoint(training_state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: cut(len(content))])
    with pytest.raises(UserError, match=r"a\.pth: .*(damaged|empty|not a )"):
        load_file(path)


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(training_state(), path)
    content = path.read_bytes()
    tensor = content.index(torch.ones(50).numpy().tobytes())
    draw, refused = random.Random(0), []
    places = [tensor + draw.randrange(200) for _ in range(20)]
    places += [draw.randrange(len(content)) for _ in range(400)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = load_file(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused.append(place)
        else:  # in the padding, or in a field of the archive that nothing reads
            same = torch.equal(loaded["model"].pop("weight"), torch.ones(50))
            assert same and loaded == training_state(model={})
    assert set(places[:20]) <= set(refused)


def test_refusing_a_checkpoint_names_the_newest_good_one(tmp_path):
    for epoch in (2, 9, 10, 11):  # by what they hold, not by their names or times
        save_checkpoint(training_state(epoch), tmp_path / f"model_{epoch}.pth")
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pth")
    torch.save(training_state(30, format=2), tmp_path / "newer.pth")
    last = tmp_path / "last.pth"
    last.write_bytes((tmp_path / "model_11.pth").read_bytes()[:-1])
    content = bytearray((tmp_path / "model_11.pth").read_bytes())
    content[content.index(torch.full((50,), 11.0).numpy().tobytes())] ^= 1
    (tmp_path / "model_11.pth").write_bytes(content)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(UserError) as caught:
        load_training_state(last)
    good = f"continues at epoch 10, step 0: --resume {tmp_path / 'model_10.pth'}"
    assert "last.pth: damaged" in str(caught.value) and str(caught.value).endswith(good)
    assert load_training_state(tmp_path / "model_10.pth")["next_epoch"] == 10

    for path in tmp_path.glob("model_*.pth"):
        path.unlink()
    with pytest.raises(UserError, match=r"damaged.* There is no other good checkpoint in "):
        load_training_state(last)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"model": [1]}, "1 of a wrong type: model"),
        ({"model": {}}, "1 of a wrong type: model"),
        ({"model": {"weight": 3}}, "1 of a wrong type: model"),
        ({"ema": {"weight": "x"}}, "1 of a wrong type: ema"),
        ({"optimizer": None, "next_step": "3"}, "2 of a wrong type: optimizer, next_step"),
        ({"stale": None}, "1 of a wrong type: stale"),
        ({"world_size": 10**9, "global_batch": 0}, "2 out of range: global_batch, world_size"),
        ({"next_step": -1, "next_epoch": 10**99}, "2 out of range: next_epoch, next_step"),
        ({"best_scores": {"a": "x"}}, "1 of a wrong type: best_scores"),
        ({"ema_steps": {"model": -10}}, "1 of a wrong type: ema_steps"),
        ({"meters": {"loss": [1.0, float("inf")]}}, "1 of a wrong type: meters"),
        ({"meters": {"loss": 1.0}}, "1 of a wrong type: meters"),
        ({"format": 2}, "newer version of this project (format 2"),
    ],
)
def test_a_file_that_is_no_training_state(tmp_path, changes, cause):
    torch.save(training_state(**changes), tmp_path / "last.pth")
    with pytest.raises(UserError) as caught:
        load_training_state(tmp_path / "last.pth")
    assert cause in str(caught.value)


def test_a_file_of_an_old_format(tmp_path):
    state = {key: {} for key in ("model", "optimizer", "lr_scheduler", "args")}
    torch.save({**state, "epoch": 3}, tmp_path / "model_3.pth")
    with pytest.raises(UserError, match=r"no training state .*missing: .*next_epoch.*--weights"):
        load_training_state(tmp_path / "model_3.pth")


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


WRAPPINGS = {
    "bare": lambda own: own,
    "model": lambda own: {"model": own, "epoch": 1},
    "state_dict": lambda own: {"state_dict": own},
    "module.": lambda own: {f"module.{k}": v for k, v in own.items()},
    "_orig_mod.": lambda own: {f"_orig_mod.{k}": v for k, v in own.items()},
    "both": lambda own: {"model": {f"module._orig_mod.{k}": v for k, v in own.items()}},
    "both, in the other order": lambda own: {f"_orig_mod.module.{k}": v for k, v in own.items()},
    "in a part": lambda own: {k.replace("0.", "0._orig_mod."): v for k, v in own.items()},
    "parallel in a part": lambda own: {k.replace("1.", "1.module."): v for k, v in own.items()},
    "nested": lambda own: {"checkpoint": {"net": {f"a.b.{k}": v for k, v in own.items()}}},
    "student": lambda own: {f"student.net.{k}": v for k, v in own.items()},
    "averaged": lambda own: (
        {f"ema.module.{k}": v for k, v in own.items()}
        | {f"model.{k}": v + 1 for k, v in own.items()}
    ),
    "halves": lambda own: {k: v.half() if v.is_floating_point() else v for k, v in own.items()},
    "bfloat16": lambda own: {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in own.items()
    },
    "parameters": lambda own: {
        k: nn.Parameter(v) if v.is_floating_point() else v for k, v in own.items()
    },
    "in a dict of other code": lambda own: defaultdict(list, state_dict=own),
}


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_weights_in_every_usual_wrapping(tmp_path, model, wrap, capsys):
    own = model.state_dict()
    torch.save(WRAPPINGS[wrap](own), tmp_path / "w.pth")
    loaded, config = load_weights(tmp_path / "w.pth")
    loaded = named_alike(own, loaded, f"{wrap}.pth")
    assert loaded.keys() == own.keys() and config is None
    split_states({"model": model}, loaded, "w.pth")
    assert torch.allclose(model[0].weight, own["0.weight"], atol=2e-2)
    said = capsys.readouterr().out
    assert ("model.0.weight" in said) == (wrap == "averaged")  # beside what is taken


@pytest.mark.parametrize("wrap", ["model", "ema", "generator", "params_ema"])
def test_the_only_state_dict_is_taken_and_what_is_no_tensor_left_out(tmp_path, model, wrap, capsys):
    average = AveragedModel(model)
    content = {
        wrap: {**average.state_dict(), "module._extra_state": {"a": 1}},
        "loss": torch.ones(1),
    }
    torch.save(content, tmp_path / "w.pth")
    loaded = named_alike(model.state_dict(), load_weights(tmp_path / "w.pth")[0], f"{wrap}.pth")
    assert loaded.keys() == model.state_dict().keys()
    said = capsys.readouterr().out
    assert "w.pth: left out, since they are no tensors: module._extra_state\n" in said
    assert "module. is removed from all names; left out beside them: 1 tensors, n_av" in said
    assert (f"the weights of {wrap} are taken\n" in said) == (wrap not in ("model", "ema"))


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        ("params params_ema", "params_ema"),
        ("model model_ema optimizer", "model_ema"),
        ("net state_dict", "state_dict"),
        ("state_dict ema_state_dict", "ema_state_dict"),
        ("generator critic swa_model", "swa_model"),
        ("model anything", "model"),
        ("generator critic", None),
        ("ema_generator ema_critic generator critic", None),
    ],
)
def test_of_several_state_dicts_averages_and_usual_keys_go_first(
    tmp_path, monkeypatch, keys, taken, capsys
):
    """Where nothing says which is meant, none is guessed, and the command makes a file of one."""
    path = tmp_path / "it's 1.pth"
    content = {key: {"w": torch.full((1,), float(n))} for n, key in enumerate(keys.split())}
    torch.save({**content, "epoch": 1}, path)
    if taken:
        assert torch.equal(load_weights(path)[0]["w"], content[taken]["w"])
        said = capsys.readouterr().out
        assert f"the weights of {taken} are taken, not those of " in said
        return
    with pytest.raises(UserError, match="holds several networks' weights, ") as caught:
        load_weights(path)
    command = str(caught.value).partition("e.g. the first: ")[2]
    words = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    assert words[:2] == ["python", "-c"]
    exec(words[2])
    first = next(iter(content))
    assert torch.equal(load_weights(tmp_path / f"{first}.pth")[0]["w"], content[first]["w"])


def test_a_state_dict_with_a_small_one_in_it_is_taken_itself(tmp_path, model):
    content = {**model.state_dict(), "normalisation": {"mean": torch.zeros(3)}, "names": ["a"]}
    torch.save(content, tmp_path / "w.pth")
    assert load_weights(tmp_path / "w.pth")[0].keys() == model.state_dict().keys()


def test_what_lies_beside_a_network_is_left_out_and_counted(model, capsys):
    own = model.state_dict()
    inner = {f"model.net.{key}": value for key, value in own.items()}
    beside = {f"criterion.{n}.weight": own["0.weight"] for n in range(20)}
    assert named_alike(own, {**beside, **inner}, "w.pth").keys() == own.keys()
    said = capsys.readouterr().out
    assert "w.pth: model.net. is removed from all names; left out beside them: 20 tensors, " in said
    wrapped = torch.nn.ModuleDict({"model": model}).state_dict()
    assert named_alike(wrapped, wrapped, "w.pth") == wrapped
    assert named_alike(wrapped, own, "w.pth") == own  # does not fit, and is not made to
    extra = {**own, "extra": own["0.bias"]}
    assert named_alike(own, extra, "w.pth") == extra  # nothing inside the network is left out
    short = dict(list(inner.items())[1:])
    assert "0.bias" in named_alike(own, short, "w.pth")  # so that the one that is missing is named
    twice = {
        f"{part}.{key}": value for part in ("student", "teacher") for key, value in own.items()
    }
    with pytest.raises(
        UserError, match=r"several times, under student\., teacher\.\. Save the one"
    ):
        named_alike(own, twice, "w.pth")


def test_weights_from_before_batch_norm_counted(model, capsys):
    own = model.state_dict()
    old = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    assert with_counters(own, old, "w.pth")["1.num_batches_tracked"] == 0
    assert "w.pth: has no num_batches_tracked, as before torch 0.4.1; 1 start at 0" in (
        capsys.readouterr().out
    )
    two = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1)).state_dict()
    del two["1.num_batches_tracked"]  # one of two is damage
    assert with_counters(two | own, two, "w.pth") is two


class Attributes(dict):
    """As EasyDict and others: a dict whose items are attributes, too."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self


class Names(list):
    """A list of other code."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["", "model"])
def test_a_whole_network_is_no_weights(tmp_path, model, key, zipped):
    content = {key: model} if key else model
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"w\.pth: holds a whole network, .*state_dict\(\)"):
        load_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_other_code_stay_unread_and_are_named(tmp_path, model, zipped, capsys):
    """argparse's, numpy's and any other: nothing of them runs, and the weights are read."""
    content = {
        "model": model.state_dict(),
        "args": Namespace(lr=0.1, path=Path("x")),
        "best": np.float64(0.5),
        "curve": np.ones(3),
        "config": Attributes(width=1, sizes=[2], lr=Attributes(a=1)),
        "history": defaultdict(list, loss=[1.0]),
        "time": datetime.now(),
        "names": Names(["a"]),
    }
    path, known = tmp_path / "w.pth", set(torch.serialization.get_safe_globals())
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded, config = load_weights(path)
    assert config is None and loaded.keys() == model.state_dict().keys()
    said = capsys.readouterr().out
    assert "w.pth: left unread, since they are objects of other code: argparse.Namespace, " in said
    assert set(torch.serialization.get_safe_globals()) == known
    with pytest.raises(UserError, match="could run code"):
        load_file(path)  # what a training continues from is ours alone


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_reads_of_plain_types_is_read(tmp_path, model, zipped):
    hyper = {
        "device": torch.device("cuda", 1),
        "types": [torch.float16, torch.Size([3, 4])],
        "plain": [b"abc", bytearray(b"\xff\0"), bytearray(), 1 + 2j, {1, "a", 2.5, None}],
        "count": Counter("aab"),
        10**14: torch.ones(2, dtype=torch.complex64),
    }
    content = {"model": model.state_dict(), "hyper_parameters": hyper}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    loaded = load_file(tmp_path / "w.pth")["hyper_parameters"]
    assert torch.equal(loaded.pop(10**14), hyper.pop(10**14))
    assert loaded == hyper


@pytest.mark.slow
def test_what_a_large_network_saves_is_read(tmp_path):
    """A long history too: what is not a tensor may have more bytes than what is."""
    net = nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(500)))
    adam = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 1)).sum().backward()
    adam.step()
    content = {"model": net.state_dict(), "optimizer": adam.state_dict(), "loss": [0.5] * 130_000}
    torch.save(content, tmp_path / "last.pth")
    assert load_file(tmp_path / "last.pth")["loss"] == content["loss"]


def test_what_a_network_of_any_size_saves_is_read(tmp_path, monkeypatch):
    """The limits of a checkpoint without its tensors grow with the file.

    Here they are those of files of a thousandth, and the network is as small as can be.
    """
    limits = ("_FILE", "_MAX_PICKLE", "_MAX_READS", "_MAX_CONTAINERS", "_MAX_TENSORS")
    for name in (*limits, "_MAX_WRITTEN"):
        monkeypatch.setattr(outline, name, getattr(outline, name) // 1000)
    layers = [layer for _ in range(40) for layer in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))]
    net = nn.Sequential(*layers)
    adam = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    average = copy.deepcopy(net)
    content = {"model": net.state_dict(), "optimizer": adam.state_dict()}
    save_checkpoint({**content, "ema": average.state_dict()}, tmp_path / "last.pth")
    assert load_file(tmp_path / "last.pth").keys() == {*content, "ema"}
    torch.save({"a": [[0]] * 1000 + [[1] for _ in range(1000)]}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=r"has more than [\d,]+ (parts|containers)"):
        load_file(tmp_path / "small.pth")


def test_another_pickle_protocol_is_named(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "w.pth", pickle_protocol=4)
    with pytest.raises(UserError, match=r"w\.pth: saved with another pickle protocol \(4\)"):
        load_weights(tmp_path / "w.pth")


def test_the_moving_average_is_what_is_used(tmp_path, model):
    average = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    content = {"model": model.state_dict(), "ema": average, "args": {"task": "saliency"}}
    content["next_epoch"] = 1
    save_checkpoint(content, tmp_path / "w.pth")
    loaded, config = load_weights(tmp_path / "w.pth")
    assert loaded["0.weight"].abs().sum() == 0
    assert config == {"task": "saliency"}


def test_settings_that_are_no_more_do_not_keep_a_checkpoint_from_loading(tmp_path, model):
    """Those of the first edition, which changed how gradients travelled and nothing else."""
    old = {"epochs": 3, "bucket_mb": 25, "compress_gradients": "none"}
    state = {"model": model.state_dict(), "args": {"task": "saliency", "train": old}}
    save_checkpoint({**state, "next_epoch": 1}, tmp_path / "last.pth")
    _, config = load_weights(tmp_path / "last.pth")
    assert config == {"task": "saliency", "train": {"epochs": 3}}


def test_misfit_lists_everything_and_copies_nothing(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = {k: v + 1 for k, v in before.items()}
    wrong["0.weight"] = torch.zeros(8, 1, 3, 3)
    wrong["extra"] = wrong.pop("1.bias")
    with pytest.raises(UserError) as caught:
        split_states({"model": model}, wrong, "w.pth")
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
    for load in (load_file, load_training_state):
        with pytest.raises(UserError, match="no such file"):
            load(tmp_path / "none.pth")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="--weights"):
        load_training_state(tmp_path / "w.pth")


# -- in the background ----------------------------------------------------------------------------


@pytest.fixture
def held_write(monkeypatch):
    """An event that the thread waits for before it writes."""
    event, save = threading.Event(), checkpoint.save_checkpoint

    def save_later(*args):
        assert event.wait(20)
        save(*args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_later)
    return event


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_what_is_written_is_the_state_at_the_call(tmp_path, held_write, device):
    net = nn.Conv2d(3, 8, 3).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    meters = {"loss": [1.0, 2.0]}

    def step():
        net(torch.ones(1, 3, 5, 5, device=device)).sum().backward()
        optimizer.step()

    step()
    writer = CheckpointWriter()
    for number in (1, 2):  # the second into the buffers of the first
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "meters": meters}
        expected = copy.deepcopy(state)
        held_write.clear()
        writer.submit(state, tmp_path / "last.pth")
        step()
        meters["loss"][0] += 1
        optimizer.param_groups[0]["lr"] = 7.0 * number
        held_write.set()
        writer.wait()
        written = load_file(tmp_path / "last.pth")
        assert written["meters"] == {"loss": [float(number), 2.0]}
        assert written["model"].keys() == expected["model"].keys()
        for name, weight in expected["model"].items():
            assert torch.equal(written["model"][name], weight.cpu())
            assert written["model"][name].stride() == weight.stride()
        assert written["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
        for index, parts in expected["optimizer"]["state"].items():
            for name, part in parts.items():
                assert torch.equal(written["optimizer"]["state"][index][name], part.cpu())


def test_done_follows_the_file_and_writes_follow_each_other(tmp_path, held_write):
    writer, path, found = CheckpointWriter(), tmp_path / "last.pth", []

    def note():
        found.append(load_file(path)["n"])

    writer.submit({"n": 1}, path, (tmp_path / "best.pth",), done=note)
    assert found == []
    held_write.set()
    for n in (2, 3):
        writer.submit({"n": n}, path, done=note)
    writer.wait()
    assert found == [1, 2, 3]
    assert load_file(tmp_path / "best.pth")["n"] == 1


def test_a_failed_write_is_told_once_at_the_next_call(tmp_path):
    (tmp_path / "file").touch()
    bad, good, done = tmp_path / "file" / "last.pth", tmp_path / "last.pth", []
    writer = CheckpointWriter()
    refused = r"file/last\.pth: the checkpoint could not be written \((Not a directory|File exists)"
    for call in (writer.wait, lambda: writer.submit({"n": 2}, good)):
        writer.submit({"n": 1}, bad, done=lambda: done.append(1))
        with pytest.raises(UserError, match=refused):
            call()
        writer.wait()
    assert not good.exists() and not done
    writer.submit({"n": 3}, good)
    writer.wait()
    assert load_file(good)["n"] == 3


@pytest.fixture
def run_folder(tmp_path):
    """Makes a RunFolder in a folder of its own; its log file is closed in the end."""
    handlers = list(get_logger().handlers)
    yield lambda: RunFolder(tmp_path, {})
    for handler in set(get_logger().handlers) - set(handlers):
        get_logger().removeHandler(handler)
        handler.close()


def test_old_numbered_files_go_once_the_new_one_is_there(tmp_path, run_folder, held_write):
    def numbered():
        return sorted(path.name for path in tmp_path.glob("model_[0-9]*.pth"))

    with run_folder() as run:
        held_write.set()
        for epoch in range(3):
            run.save({"n": epoch}, numbered=epoch, keep=1)
        run.wait_saved()
        assert numbered() == ["model_0002.pth"]
        held_write.clear()
        run.save({"n": 3}, numbered=3, keep=1)
        assert numbered() == ["model_0002.pth"]
        held_write.set()
    assert numbered() == ["model_0003.pth"]
    assert load_file(tmp_path / "last.pth")["n"] == 3


def test_a_run_that_continues_removes_what_a_killed_one_left(tmp_path, run_folder):
    for number in range(2):
        (tmp_path / f".pixtrain-{number:032x}.tmp").write_bytes(b"half")
    with run_folder():
        save_checkpoint({"n": 1}, tmp_path / "last.pth")
    with run_folder():
        assert not list(tmp_path.glob(".*.tmp"))
    assert load_file(tmp_path / "last.pth")["n"] == 1


@pytest.mark.parametrize("own_error", [None, ValueError("of the training")])
def test_a_failed_write_ends_the_run_and_masks_nothing(tmp_path, run_folder, own_error):
    with pytest.raises(UserError if own_error is None else ValueError), run_folder() as run:
        (tmp_path / "last.pth").mkdir()
        run.save({"n": 1})
        if own_error:
            raise own_error
    status, log = (tmp_path / "status.json").read_text(), (tmp_path / "log.txt").read_text()
    assert ("of the training" if own_error else "could not be written") in status
    assert "last.pth: the checkpoint could not be written (Is a directory)" in log
    assert not list(tmp_path.glob(".*.tmp"))


# -- kills and full disks -------------------------------------------------------------------------


def save_until_killed(folder, fault="", saved=None):
    """Save n, n + 1, … from where the folder's checkpoint stands, as a network full of that n.

    saved: a semaphore that is released after each.
    """
    done = saved.release if saved else lambda: None
    faults.install(fault)
    remove_temporaries(folder)
    last, writer = folder / "last.pth", CheckpointWriter()
    n = load_file(last)["n"] if last.exists() else 0
    weights = torch.full((200_000,), float(n))
    while True:
        n += 1
        weights.fill_(n)
        writer.submit({"n": n, "weights": weights}, last, (folder / "model_best.pth",), done)


def saved_number(folder):
    """The n of a folder's checkpoints, which must be whole."""
    numbers = []
    for name in ("last.pth", "model_best.pth"):
        content = load_file(folder / name)
        assert torch.equal(content["weights"], torch.full((200_000,), float(content["n"])))
        numbers.append(content["n"])
    assert numbers[1] - numbers[0] in (0, 1)  # the link comes first
    return numbers[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "number"), [("save.write", 2), ("save.replace", 2), ("saved", 3)]
)
def test_sigkill_in_a_save_leaves_the_old_file_or_the_new(tmp_path, place, number):
    fault = f"{place}:kill@3"
    process = fork_server().Process(target=save_until_killed, args=(tmp_path, fault))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert saved_number(tmp_path) == number
    stale = [path.stat().st_size for path in tmp_path.glob(".*.tmp")]
    whole = (tmp_path / "last.pth").stat().st_size
    expected = {"save.write": [whole // 2], "save.replace": [whole], "saved": []}[place]
    assert stale == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_sigkills_at_any_moment_of_saving(tmp_path):
    draw, number = random.Random(0), 0
    for _ in range(10):
        saves = fork_server().Semaphore(0)
        arguments = (tmp_path, "", saves)
        process = fork_server().Process(target=save_until_killed, args=arguments)
        process.start()
        for _ in range(3):
            assert saves.acquire(timeout=60)
        time.sleep(draw.uniform(0, 0.03))  # a save takes some hundredths of a second
        process.kill()
        process.join()
        assert saved_number(tmp_path) >= number + 3
        number = saved_number(tmp_path)


def save_and_leave(folder):
    writer = CheckpointWriter()
    writer.submit({"weights": torch.zeros(3_000_000)}, folder / "last.pth")
    sys.exit(3)


@pytest.mark.slow
def test_a_process_that_ends_finishes_its_write(tmp_path):
    process = fork_server().Process(target=save_and_leave, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 3
    assert load_file(tmp_path / "last.pth")["weights"].numel() == 3_000_000


SMALL_DISK = """
import subprocess, sys, torch
from pathlib import Path
from train_utils.checkpoint import CheckpointWriter, load_file
from train_utils.errors import UserError

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
writer, path = CheckpointWriter(), folder / "last.pth"
def save(n, size):
    try:
        writer.submit({"n": n, "a": torch.zeros(size // 4), "b": torch.ones(size // 4)}, path)
        writer.wait()
    except UserError as error:
        print(error)
    print(load_file(path)["n"], sorted(file.name for file in folder.iterdir()))
save(1, 200_000)
save(2, 900_000)
save(3, 200_000)
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
save(4, 200_000)
"""


@pytest.mark.slow
def test_a_full_and_a_read_only_disk_keep_the_old_checkpoint(tmp_path):
    inside = ["unshare", "--user", "--map-root-user", "--mount"]  # mounts that only it sees
    if not shutil.which("unshare") or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("needs a Linux where users may unshare mounts")
    done = subprocess.run(
        [*inside, sys.executable, "-c", SMALL_DISK, tmp_path],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, full, after_full, freed, read_only, last = done.stdout.splitlines()
    refused = f"{tmp_path / 'last.pth'}: the checkpoint could not be written"
    assert full.startswith(f"{refused} (No space left on device). The earlier files are kept")
    assert read_only.startswith(f"{refused} (Read-only file system). The earlier files are kept")
    assert [first, after_full] == ["1 ['last.pth']"] * 2
    assert [freed, last] == ["3 ['last.pth']"] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit")
def test_a_training_whose_disk_fills_up_ends_with_one_line(tmp_path):
    import resource

    small = [f"data.{key}" for key in ("image_size=48", "train_size=40", "val_size=2")]
    options = [f"--set={each}" for each in (*small, "train.save_steps=1", "train.keep=0")]
    training = Script(tmp_path, "train.py", *options, "-b2", "-j0", "--amp=off", "--output-dir=run")
    process, last = training.process, tmp_path / "run" / "last.pth"
    while process.is_alive() and not last.exists():
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    done = training.wait()
    assert done.returncode == 1
    refused = "error: run/last.pth: the checkpoint could not be written (File too large). The"
    assert done.stderr.startswith(refused) and done.stderr.count("\n") == 1
    assert load_training_state(last)["next_step"] < 20  # an old one, and whole
    assert "could not be written" in (tmp_path / "run" / "status.json").read_text()
    assert not list((tmp_path / "run").glob(".*.tmp"))
