"""Files of weights that torch.save has not written: safetensors, and what is taken for weights."""

import json
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from train_utils.errors import brief, shortened, typed

_HEAD = 512  # bytes by which a file is known
_MAX_HEADER = 2**24  # bytes of JSON, which take some twenty times as much memory once parsed
_MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16},
    **{"I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F32": torch.float32, "F64": torch.float64},
}
_AGAIN = "The download has failed or needs an account: download the file itself."
_CONVERT = "Save a state_dict of the network there, by torch.save, and use that."
# How files begin that are taken for weights, what they are, and what to do.
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file that it stands for",
        "Run `git lfs pull` in its repository, or download the file itself.",
    ),
    (b"<!doctype html", "a web page", _AGAIN),
    (b"<html", "a web page", _AGAIN),
    (b"<?xml", "an XML document", _AGAIN),
    (b"{", "a JSON text", _AGAIN),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it", _CONVERT),
    (b"\x93NUMPY", "an array of numpy's", _CONVERT),
    (b"GGUF", "a GGUF file", _CONVERT),
    (b"\x1f\x8b", "a gzip archive", "Unpack it, and name the file of weights in it."),
    (b"BZh", "a bzip2 archive", "Unpack it, and name the file of weights in it."),
    (b"\xfd7zXZ\x00", "an xz archive", "Unpack it, and name the file of weights in it."),
    (b"7z\xbc\xaf", "a 7z archive", "Unpack it, and name the file of weights in it."),
    (b"Rar!", "a rar archive", "Unpack it, and name the file of weights in it."),
    (b"\xff\xd8\xff", "a JPEG image", "Give a file written by torch.save (.pth)."),
    (b"\x89PNG", "a PNG image", "Give a file written by torch.save (.pth)."),
)


def other_kind(file: IO[bytes], path: Path) -> str:
    """What an open file is that is no checkpoint, and what to do; empty if nothing is known of it.

    A zip archive may be a checkpoint: of one that torch.save has written nothing is said.
    """
    file.seek(0)
    head = file.read(_HEAD)
    for start, kind, fix in _KINDS:
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(start.lower()):
            return f"{kind}. {fix}"
    if head[257:262] == b"ustar":
        return "a tar archive. Unpack it, and name the file of weights in it."
    # An ONNX graph: its version (field 1), then its maker, its nodes or its operators' version.
    if head[:1] == b"\x08" and head[1:2] >= b"\x03" and head[2:3] in (b"\x12", b"\x3a", b"\x42"):
        return f"an ONNX graph. {_CONVERT}"
    return _kind_of_zip(file, path) if head[:4] == b"PK\3\4" else ""


def _kind_of_zip(file: IO[bytes], path: Path) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # damage is found, and said, by the reader
        return ""
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        load = f"torch.jit.load({str(path)!r}, map_location='cpu').state_dict()"
        code = f"import torch; torch.save({load}, 'weights.pth')"
        return (
            "a TorchScript program, whose code is not run. If you trust it, save its weights: "
            f"python -c {typed(code)}"
        )
    if "data.pkl" in inner:
        return ""
    fix = f"Unpack it (unzip {typed(path)}), and name the file of weights in it."
    return f"a zip archive of {len(names)} files, {shortened(names, 3)}. {fix}"


# -- safetensors ----------------------------------------------------------------------------------


def is_safetensors(file: IO[bytes], size: int) -> bool:
    """Whether an open file of so many bytes begins as safetensors does: a length, and JSON."""
    file.seek(0)
    head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_safetensors(file: IO[bytes], size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an open safetensors file of so many bytes by name, and its metadata.

    Source: the format's description in the README of github.com/huggingface/safetensors. It has no
    checksums. Raises ValueError, without a file's name, for what is not of that format, and before
    memory is taken for data that are not there.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length:,} bytes")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("a header that is nested too deep") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(x) is str for x in metadata.values()):
        raise ValueError("metadata that are no texts")
    if len(header) > _MAX_TENSORS:
        raise ValueError(f"more than {_MAX_TENSORS:,} tensors")
    entries = [(name, *_entry(name, about)) for name, about in header.items()]
    tensors, place = {}, 0
    for name, dtype, shape, start, end in sorted(entries, key=lambda entry: entry[3:]):
        if start != place or end > size - 8 - length:
            raise ValueError(f"data of {brief(name)} that overlap, leave a gap or are not there")
        data, place = bytearray(end - start), end
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ValueError("fewer bytes than it had a moment ago")
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape)
    if place != size - 8 - length:
        raise ValueError("data of no tensor")
    return {name: tensors[name] for name in header}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name that is there twice")
    return found


def _entry(name: str, about: Any) -> tuple[torch.dtype, list[int], int, int]:
    """A tensor's type, shape and place among the data; ValueError for what is none."""
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{brief(name)} is no tensor")
    shape, offsets = about["shape"], about["data_offsets"]
    if type(about["dtype"]) is not str or about["dtype"] not in _DTYPES:
        raise ValueError(f"{brief(name)} of the type {brief(about['dtype'])}, which is not read")
    for numbers, most in ((shape, _MAX_DIMENSIONS), (offsets, 2)):
        counts = isinstance(numbers, list) and all(
            type(number) is int and 0 <= number < 2**48 for number in numbers
        )
        if not counts or len(numbers) > most:
            raise ValueError(f"{brief(name)} has a shape or a place that is none")
    dtype = _DTYPES[about["dtype"]]
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{brief(name)} has not as many bytes as its shape says")
    return dtype, shape, *offsets
