"""A checkpoint's content without its tensors, checked before torch reads the file.

`torch.load(weights_only=True)` runs no code of a file's, but the few functions that it does run can
still be asked for terabytes by a file of some hundred bytes. So the pickle is read first with
stand-ins for those functions: what it would allocate is counted, and what `torch.save` does not
write of tensors and plain types is refused.
"""

import math
import pickle
from collections.abc import Callable
from io import BytesIO
from typing import IO, Any, ClassVar

import torch

from train_utils.config import check_size

_MAX_PICKLE = 2**21  # bytes, each of which may take 70; 3,000 weights trained by AdamW have as many
_MAX_TENSORS = 100_000
_MAX_WRITTEN = 2**22  # characters of text, and other values
_MAX_COPIED = 100_000  # values of lists that a pickle has copied
_MAX_DIMENSIONS = 16
# Bytes per element of the storages that a network's weights can be in.
_STORAGES = {
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage"), 8),
}
# The opcodes that torch's own reader of weights_only=True takes.
_OPCODES = (
    *(pickle.PROTO, pickle.GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.STOP),
    *(pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.MARK),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.NONE),
    *(pickle.NEWTRUE, pickle.NEWFALSE, pickle.EMPTY_TUPLE, pickle.EMPTY_LIST, pickle.EMPTY_DICT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.BINPERSID, pickle.BINGET),
    *(pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
)


class TensorOutline:
    """Stands for a tensor."""


class _OrderedDict(dict):
    """Stands for an OrderedDict, as state_dicts are."""


class _Reader(pickle._Unpickler):  # in Python: C's takes as much memory as a pickle names
    dispatch: ClassVar[dict[int, Callable]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES
    }
    stack: list[Any]

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.storages: dict[Any, int] = {}  # bytes by name
        self.tensors = self.copied = 0

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global: bytes per element for a storage's type, else a function."""
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        stand_ins: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch.nn.parameter.Parameter": lambda data, *_: data,
            "collections.OrderedDict": self.ordered,
            "collections.Counter": self.copy,
            "builtins.set": self.copy,
            "__builtin__.set": self.copy,
            "torch.Size": self.copy,
        }
        if f"{module}.{name}" not in stand_ins:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return stand_ins[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> int:
        """A storage: how many elements it has."""
        kind, itemsize, name, _location, count = pid[:5]
        if kind != "storage" or not 0 <= count < 2**48:
            raise ValueError("holds a storage of no size")
        self.storages[name] = max(itemsize * count, self.storages.get(name, 0))
        return count

    def tensor(
        self, stored: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> TensorOutline:
        self.tensors += 1
        if self.tensors > _MAX_TENSORS:
            raise ValueError(f"holds more than {_MAX_TENSORS:,} tensors")
        if len(size) > _MAX_DIMENSIONS or math.prod(size) > stored:
            raise ValueError("holds a tensor that is larger than what is stored of it")
        if min(offset, *size, *stride, 0) < 0:  # torch would read before its storage
            raise ValueError("holds a tensor that begins before its storage")
        return TensorOutline()

    def ordered(self, *items: Any) -> _OrderedDict:
        self.copy(*items)
        return _OrderedDict(*items)

    def copy(self, *items: Any) -> tuple:
        self.copied += sum(map(len, items))
        if self.copied > _MAX_COPIED:
            raise ValueError(f"has more than {_MAX_COPIED:,} values copied")
        return ()

    def build(self) -> None:
        """An object's attributes, of which only a state_dict's are known."""
        state, thing = self.stack.pop(), self.stack[-1]
        if isinstance(thing, _OrderedDict) and state.keys() == {"_metadata"}:
            return
        if not isinstance(thing, TensorOutline):  # a Parameter of torch's first years
            raise pickle.UnpicklingError("attributes")

    dispatch[pickle.BUILD[0]] = build
    dispatch[pickle.NEWOBJ[0]] = pickle._Unpickler.dispatch[pickle.REDUCE[0]]


def read_outline(file: IO[bytes], size: int) -> Any:
    """What is pickled in a checkpoint of so many bytes, with `TensorOutline`s for its tensors.

    Raises pickle.UnpicklingError for other objects, ValueError for what is too large, deep or
    numerous, or takes more memory than the file has bytes, and anything for damage.
    """
    file.seek(0)
    if file.read(2) == b"PK":
        file.seek(0)
        archive = torch._C.PyTorchFileReader(file)  # finds in it what torch.load will find
        if archive.get_record_size("data.pkl") > _MAX_PICKLE:
            raise ValueError(f"its pickle is larger than {_MAX_PICKLE:,} bytes")
        pickles, number = BytesIO(archive.get_record("data.pkl")), 1
    else:  # torch's old format: magic number, version, sizes of types, the content, storages
        file.seek(0)
        pickles, number = BytesIO(file.read(_MAX_PICKLE)), 4
    for _ in range(number):
        reader = _Reader(pickles)
        content = reader.load()
    if sum(reader.storages.values()) > size:
        raise ValueError("claims more data than the file has bytes")
    check_size(content, _MAX_WRITTEN, _MAX_WRITTEN)
    return content
