"""Values as JSON, with the bytes of their tensors behind it: what processes send each other.

A pickle would run whatever a stranger puts into it. JSON has no tuples, tensors and keys other than
text, so these stand as {"tuple": […]}, {"tensor": [dtype, shape]} and {"dict": [[key, value], …]}.
"""

import io
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from train_utils.errors import UserError

MOST_BYTES = 2**28
_MOST_TEXT = 2**24  # bytes of JSON, which take some twenty times as much memory once parsed
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    )
}
_PLAIN = (bool, int, float, str, type(None))


def outcome(function: Callable[[], Any]) -> bytes:
    """The message that tells what a function returns, or its UserError."""
    try:
        return encode(function())
    except UserError as error:
        return _message({"error": str(error)}, [])


def encode(value: Any) -> bytes:
    """The message that holds a value: None, numbers, text, lists, tuples, dicts and tensors.

    Subclasses arrive as what they are made of, tensors on the CPU. Raises UserError that names what
    cannot be sent.
    """
    tensors: list[bytes] = []
    try:
        return _message({"value": _to_json(value, tensors)}, tensors)
    except RecursionError:
        problem = "it is nested too deep"
    except (ValueError, RuntimeError) as error:
        problem = str(error)
    raise UserError(
        f"a {type(value).__name__} cannot be sent to other processes: {problem}. Send None, bool, "
        "int, float, str, lists, tuples, dicts and tensors; what is large by torch.distributed."
    )


def decode(message: bytes) -> Any:
    """The value of a message; raises the UserError that it tells, or ValueError if malformed."""
    text, _, rest = message.partition(b"\n")
    tensors = io.BytesIO(rest)
    try:
        if len(text) > _MOST_TEXT:
            raise ValueError("too long")
        ((kind, content),) = json.loads(text).items()
        value = _from_json(content, tensors)
        if kind not in ("value", "error") or tensors.read(1):
            raise ValueError("no message")
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise ValueError(f"malformed: {error}") from error
    if kind == "error":
        raise UserError(str(value))
    return value


def _message(content: dict[str, Any], tensors: list[bytes]) -> bytes:
    text = json.dumps(content).encode()  # in ASCII, and on one line
    size = len(text) + 1 + sum(map(len, tensors))
    if len(text) > _MOST_TEXT or size > MOST_BYTES:
        raise ValueError(
            f"it takes {size:,} bytes, {len(text):,} of them as text; at most {MOST_BYTES:,} and "
            f"{_MOST_TEXT:,} are sent"
        )
    return b"".join([text, b"\n", *tensors])


def _to_json(value: Any, tensors: list[bytes]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return [_to_json(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item, tensors) for item in value]}
    if isinstance(value, dict):
        pairs = [[_to_json(k, tensors), _to_json(v, tensors)] for k, v in value.items()]
        return {"dict": pairs}
    if not isinstance(value, Tensor):
        raise ValueError(f"it is or holds a {type(value).__name__}")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _DTYPES or value.layout != torch.strided or value.is_meta:
        raise ValueError(f"it is or holds a {dtype} tensor, {value.layout}, on {value.device}")
    flat = value.detach().cpu().contiguous().reshape(-1)
    tensors.append(flat.view(torch.uint8).numpy().tobytes())
    return {"tensor": [dtype, list(value.shape)]}


def _from_json(content: Any, tensors: io.BytesIO) -> Any:
    if isinstance(content, _PLAIN):
        return content
    if isinstance(content, list):
        return [_from_json(item, tensors) for item in content]
    ((kind, parts),) = content.items()
    if not isinstance(parts, list):
        raise ValueError("no list")
    if kind == "tuple":
        return tuple(_from_json(item, tensors) for item in parts)
    if kind == "dict":
        return {_from_json(k, tensors): _from_json(v, tensors) for k, v in parts}
    if kind != "tensor":
        raise ValueError("an unknown kind of value")
    name, shape = parts
    dtype = _DTYPES[name]
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("no shape")
    count = math.prod(shape) * dtype.itemsize
    data = bytearray(tensors.read(count))
    if len(data) != count:
        raise ValueError("too few bytes")
    tensor = torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return tensor.reshape(shape)
