"""What processes send each other: plain values and tensors, and no code."""

import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from train_utils import messages
from train_utils.errors import UserError
from train_utils.messages import decode, encode

TENSORS = [
    torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    torch.tensor(3, dtype=torch.int64),
    torch.empty(0, 4),
    torch.tensor([True, False]),
    torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    torch.tensor([1 + 2j]),
    torch.nn.Parameter(torch.ones(2)),
]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -(2**80), 0.1, math.inf, 5e-324, "a", "\x1b[2J\n\udcff", [], {}, ()),
        [1, [2.5, "x"], None],
        ("adversarial", 3, ("",)),
        {1: "int key", "b": {None: True}, (1, 2): [3]},
        {"tensor": ["float32", [2]], "error": "no error", "dict": 1},  # as words of the format
    ],
)
def test_a_plain_value_arrives_as_it_was(value):
    assert decode(encode(value)) == value
    assert type(decode(encode(value))) is type(value)


def test_nan_and_numbers_of_numpy_arrive_as_floats():
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode(np.float64(0.1))) == 0.1


def test_tensors_arrive_within_whatever_holds_them():
    arrived = decode(encode({"all": TENSORS, 7: (TENSORS[0],)}))
    for one, other in zip([*arrived["all"], arrived[7][0]], [*TENSORS, TENSORS[0]], strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other) and not one.requires_grad


class Evil:
    def __reduce__(self):
        raise AssertionError("pickled")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Evil(), "Evil"),
        ({"a": [Path("x")]}, "PosixPath|WindowsPath"),
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (np.zeros(2), "ndarray"),
        (torch.ones(2).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2, device="meta"), "meta"),
        (10**5000, "digits"),
    ],
    ids=type,
)
def test_what_cannot_be_sent_is_refused_by_name(value, named):
    with pytest.raises(UserError, match=named):
        encode(value)


def test_endless_and_too_large_values_are_refused(monkeypatch):
    endless = []
    endless.append(endless)
    with pytest.raises(UserError, match="nested"):
        encode(endless)
    monkeypatch.setattr(messages, "MOST_BYTES", 1000)
    assert len(decode(encode(torch.zeros(200)))) == 200
    with pytest.raises(UserError, match=r"at most 1,000 .*torch\.distributed"):
        encode(torch.zeros(300))
    monkeypatch.setattr(messages, "_MOST_TEXT", 100)
    with pytest.raises(UserError, match="and 100 are sent"):
        encode("x" * 101)


def test_an_error_travels_as_its_text():
    def fails():
        raise UserError("file: broken. Mend it.")

    with pytest.raises(UserError, match=re.escape("file: broken. Mend it.")):
        decode(messages.outcome(fails))
    assert decode(messages.outcome(lambda: 3)) == 3
    with pytest.raises(UserError, match="a set cannot be sent"):
        decode(messages.outcome(lambda: {1}))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\n",
        pickle.dumps(3),
        b"\xff\xfe\n",
        b"3\n",
        b"[1]\n",
        b'{"value": 1, "more": 2}\n',
        b'{"value": {}}\n',
        b'{"value": {"set": [1]}}\n',
        b'{"value": {"tuple": 3}}\n',
        b'{"value": {"tuple": "ab"}}\n',
        b'{"value": {"dict": [[1]]}}\n',
        b'{"value": {"dict": [[[], 1]]}}\n',  # a list is no key
        b'{"value": {"dict": {"ab": 1}}}\n',
        b'{"value": {"tensor": ["float32"]}}\n',
        b'{"value": {"tensor": ["load", [1]]}}\nabcd',
        b'{"value": {"tensor": ["float32", [2]]}}\nabcd',
        b'{"value": {"tensor": ["float32", [-1, -1]]}}\nabcd',
        b'{"value": {"tensor": ["float32", [1.0]]}}\nabcd',
        b'{"value": {"tensor": ["float32", [0, 99999999999999999999]]}}\n',
        b'{"value": {"tensor": ["uint8", [1000000000000]]}}\nabcd',
        b'{"value": {"tensor": ["uint8", [99999999999999999999]]}}\nabcd',
        b'{"value": 1}\nleft over',
        b'{"value": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        b'{"value": ' + b"9" * 5000 + b"}\n",
        b'{"value": 1' + b" " * 2**24 + b"}\n",
    ],
    ids=lambda payload: repr(payload[:40]),
)
def test_a_malformed_message_is_a_value_error(payload):
    with pytest.raises(ValueError):
        decode(payload)
