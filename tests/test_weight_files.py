"""Files of weights that other programs write: safetensors, and what is no file of weights."""

import gzip
import io
import json
import random
import shlex
import struct
import tarfile
import zipfile

import pytest
import torch
from torch import nn
from torchvision import models

import tasks
from src.u2net import _official_names, u2net_lite
from train_utils.checkpoint import load_file, load_training_state, load_weights
from train_utils.errors import UserError
from train_utils.pretrained import backbone_state


def safetensors(header, data=b"", length=None) -> bytes:
    """A file of that format, by hand; header: an object, or what stands in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def about(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_safetensors_are_read_with_their_metadata(tmp_path, capsys):
    data = struct.pack("<2f", 1, 2) + struct.pack("<q", 7) + b"\x80\x3f" + b"\1"
    header = {
        "__metadata__": {"format": "pt", "note": "\x1b[31m"},
        "a.weight": about(),
        "a.count": about("I64", (), 8, 16),
        "half": about("BF16", (1, 1), 16, 18),
        "none": about("F16", (0, 3), 18, 18),
        "flag": about("BOOL", (1,), 18, 19),
    }
    path = tmp_path / "model.safetensors"
    # The first byte of a length may be that of a pickle.
    for spaces in range(256):
        text = json.dumps(header).encode() + b" " * spaces
        if len(text) % 256 == 0x80:
            path.write_bytes(safetensors(text, data))
    weights, config = load_weights(path)
    assert config is None and list(weights) == list(header)[1:]
    assert torch.equal(weights["a.weight"], torch.tensor([1.0, 2.0]))
    assert weights["a.count"] == 7 and weights["a.count"].shape == ()
    assert weights["half"].dtype is torch.bfloat16 and weights["half"].item() == 1
    assert weights["none"].shape == (0, 3) and weights["flag"].tolist() == [True]
    weights["a.weight"].add_(1)  # memory of its own, to be written to
    said = capsys.readouterr().out
    assert "model.safetensors: says of itself {'format': 'pt', 'note': '\\x1b[31m'}\n" in said
    with pytest.raises(UserError, match=r"holds weights only, as safetensors.*--weights"):
        load_training_state(path)


BAD = {
    "a header beyond the file": safetensors(b"{}", length=10**6),
    "a header without end": safetensors(b'{"a": '),
    "a header of gigabytes": safetensors(b"{", bytes(10), length=2**40),
    "no text": safetensors(b"{\xff\xfe}"),
    "deep": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "digits": safetensors(b'{"a": ' + b"9" * 100_000 + b"}"),
    "one name twice": safetensors(b'{"a": 1, "a": 2}'),
    "no tensor": safetensors({"a": [1]}),
    "more keys": safetensors({"a": about() | {"more": 1}}, bytes(8)),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}),
    "metadata of no kind": safetensors({"__metadata__": 3}),
    "an unknown type": safetensors({"a": about("F4")}, bytes(8)),
    "a type of no kind": safetensors({"a": about(["F32"])}, bytes(8)),
    "a negative length": safetensors({"a": about(shape=(-2,))}, bytes(8)),
    "a length of no number": safetensors({"a": about(shape=(2.0,))}, bytes(8)),
    "a length of truth": safetensors({"a": about(shape=(True, 2))}, bytes(8)),
    "a length that is huge": safetensors({"a": about(shape=(2**62, 4), end=2**66)}),
    "many dimensions": safetensors({"a": about(shape=(1,) * 17, end=4)}, bytes(4)),
    "data beyond the file": safetensors({"a": about(shape=(2**40,), end=2**42)}, bytes(8)),
    "fewer bytes than the shape": safetensors({"a": about(shape=(3,))}, bytes(8)),
    "backwards": safetensors({"a": about(start=8, end=0)}, bytes(8)),
    "one place": safetensors({"a": about(end=None)}, bytes(8)),
    "overlap": safetensors({"a": about(), "b": about(start=4, end=12)}, bytes(12)),
    "a gap": safetensors({"a": about(), "b": about(start=9, end=17)}, bytes(17)),
    "more data": safetensors({"a": about()}, bytes(9)),
    "many tensors": safetensors({f"{n}": about(shape=(0,), end=0) for n in range(100_001)}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_safetensors_file_is_refused_by_a_line(tmp_path, name):
    path = tmp_path / "w.safetensors"
    path.write_bytes(BAD[name])
    with pytest.raises(UserError, match=r"^\S*w\.safetensors: not (readable as|a checkpoint)"):
        load_weights(path)


def test_any_change_of_a_safetensors_file_is_read_or_refused(tmp_path):
    header = {"a": about(), "b": about("U8", (3, 1), 8, 11)}
    content, path = safetensors(header, bytes(range(11))), tmp_path / "w.safetensors"
    draw = random.Random(0)
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed[: draw.choice([len(changed), draw.randrange(len(changed))])])
        try:
            weights, _ = load_weights(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert sum(tensor.nbytes for tensor in weights.values()) == 11


def zipped(files) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("w.pth"), io.BytesIO())
    return content.getvalue()


OTHERS = {
    "a web page": b"\n <!DOCTYPE html><html><body>Sign in</body></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
    "a JSON text": b'{"architectures": ["UNet"]}',
    "an XML document": b'<?xml version="1.0"?><Error>AccessDenied</Error>',
    "an ONNX graph": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x9c\x01",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "an array of numpy's": b"\x93NUMPY\x01\x00",
    "a gzip archive": gzip.compress(b"weights"),
    "a tar archive": tarred(),
    "a zip archive of 2 files, w/model.pth, read me": zipped({"w/model.pth": "x", "read me": "y"}),
    "a PNG image": b"\x89PNG\r\n\x1a\n" + bytes(20),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_of_weights_is_named(tmp_path, kind):
    path = tmp_path / "model.pth"
    path.write_bytes(OTHERS[kind])
    for load in (load_weights, load_file):
        with pytest.raises(UserError) as caught:
            load(path)
        assert f"model.pth: not a checkpoint but {kind}" in str(caught.value)
        assert str(caught.value).endswith(".")


def test_weights_in_torchscript_are_had_by_what_the_error_proposes(tmp_path, monkeypatch):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    network, path = Network(), tmp_path / "it's.pt"
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 1, 2, 2)), path)
    with pytest.raises(UserError, match="not a checkpoint but a TorchScript program") as caught:
        load_weights(path)
    words = shlex.split(str(caught.value).partition("save its weights: ")[2])
    monkeypatch.chdir(tmp_path)
    assert words[:2] == ["python", "-c"]
    exec(words[2])
    saved, _ = load_weights(tmp_path / "weights.pth")
    assert torch.equal(saved["conv.weight"], network.conv.weight)


# -- networks that are recognised by their weights ------------------------------------------------


def official(own):
    """Weights by their authors' names, as before 2018."""
    names = _official_names().items()
    return {theirs: own[ours] for theirs, ours in names if not ours.endswith("num_batches_tracked")}


WAYS = {
    "Lightning's, with a loss": lambda own: {
        "state_dict": {
            **{f"criterion.{n}.weight": torch.ones(1) for n in range(50)},
            **{f"model.{key}": value for key, value in official(own).items()},
        },
        "pytorch-lightning_version": "2.4.0",
    },
    "an average beside": lambda own: {
        **{f"net.{key}": value + 1 for key, value in own.items()},
        **{f"net_ema.module.{key}": value for key, value in own.items()},
    },
    "nested prefixes": lambda own: {f"a.module.b.{key}": value for key, value in own.items()},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_network_is_recognised_under_any_prefix(tmp_path, way, capsys):
    own = u2net_lite().state_dict()
    torch.save(WAYS[way](own), tmp_path / "w.pth")
    task, networks = tasks.load_models(tmp_path / "w.pth", {})
    assert task.cfg.model.name == "u2net_lite"
    loaded = networks["model"].state_dict()
    assert all(torch.equal(loaded[key], own[key]) for key in own)
    said = capsys.readouterr().out
    assert "is removed from all names" in said
    beside = {"Lightning's, with a loss": 50, "an average beside": len(own)}.get(way)
    assert (f"left out beside them: {beside} tensors" in said) == (beside is not None)


def test_an_encoder_s_weights_may_have_a_prefix(tmp_path):
    with torch.device("meta"):
        whole = models.vgg16().state_dict()
    encoder = [key for key in whole if key.startswith("features.")]
    state = {f"backbone.{key}": torch.ones(whole[key].shape) for key in encoder}
    torch.save({**state, "head.weight": torch.ones(1)}, tmp_path / "w.pth")
    assert list(backbone_state(str(tmp_path / "w.pth"), "vgg16")) == encoder
