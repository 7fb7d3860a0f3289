"""A checkpoint's content without its tensors, checked before torch reads the file.

`torch.load(weights_only=True)` runs no code of a file's, but the few functions that it does run can
still be asked for terabytes by a file of some hundred bytes. So the pickle is read first with
stand-ins for those functions: what it would allocate is counted, and what `torch.save` does not
write of tensors and plain types is refused, or stays unread where it is an object of other code.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from io import BytesIO
from typing import IO, Any, ClassVar, NamedTuple

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING  # names of Python 2, as pickles have them
from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals

from train_utils.config import check_size
from train_utils.errors import UserError

# What a file of up to _FILE bytes may hold, and a larger one in proportion: whatever a network's
# size, what is saved of it can be read, in memory that is a small multiple of the file's bytes.
# 2,000 convolutions of one channel, each with BatchNorm, AdamW and an average, make a file of 19
# million bytes. 4.8 million of them are a pickle, read in 2.6 million pieces, with 304,059
# containers.
_FILE = 10_000_000
_MAX_PICKLE = 2**25  # bytes
_MAX_READS = 3_000_000  # pieces, which take about a microsecond each
_MAX_CONTAINERS = 400_000
_MAX_TENSORS = 100_000
_MAX_WRITTEN = 2**22  # characters of text, and other values
_MAX_COPIED = 100_000  # values of lists, and characters of bytes, that a pickle has copied
_MAX_ODD_KEYS = 10_000  # whose hashes a file can choose, so that each is compared with all others
_MAX_DIMENSIONS = 16
# Bytes per element of the storages that a network's weights can be in.
_STORAGES = {
    **dict.fromkeys(("BoolStorage", "ByteStorage", "CharStorage"), 1),
    **dict.fromkeys(("ShortStorage", "HalfStorage", "BFloat16Storage"), 2),
    **dict.fromkeys(("IntStorage", "FloatStorage"), 4),
    **dict.fromkeys(("LongStorage", "DoubleStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
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
# What makes a container of its own.
_CONTAINERS = (
    *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.MARK, pickle.TUPLE1, pickle.TUPLE2),
    *(pickle.TUPLE3, pickle.REDUCE, pickle.NEWOBJ),
)
_MAX_UNREAD = 1000  # names of other code's objects
_SAVE_WEIGHTS = "Save its state_dict alone: torch.save(model.state_dict(), …)."
WHOLE = f"holds a whole network, whose code is not run, and not its weights alone. {_SAVE_WEIGHTS}"


class TensorOutline:
    """Stands for a tensor."""


class Unread:
    """Stands for an object of other code: its content is dropped, and nothing of it runs."""

    def __new__(cls, *_: Any, **__: Any) -> "Unread":
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        """Drop it."""


def _unread_dict(*_: Any) -> OrderedDict:
    """Stands for the class of a dict of other code, of which the items are read."""
    return OrderedDict()


def _unread_list(*_: Any) -> list:
    """Likewise for a list."""
    return []


for _made in (_unread_dict, _unread_list):
    _made.__new__ = _made  # type: ignore  # how torch makes an instance of a class


class _UnreadName:
    """A name of other code's while an outline is read; calling it makes an instance."""

    def __init__(self) -> None:
        self.stand_in: Any = Unread

    def __call__(self, *_: Any) -> "_UnreadItems":
        return _UnreadItems(self)


class _UnreadItems(dict):
    """Stands for what other code makes; it notes whether that is filled as a dict or list is."""

    def __init__(self, name: _UnreadName) -> None:
        self.name = name

    def __setitem__(self, key: Any, value: Any) -> None:
        self.name.stand_in = _unread_dict
        super().__setitem__(key, value)

    def append(self, item: Any) -> None:
        """As a list, whose items are kept by their places."""
        super().__setitem__(len(self), item)
        self.name.stand_in = _unread_list


class _OrderedDict(dict):
    """Stands for an OrderedDict, as state_dicts are."""


class _Size(int):
    """Bytes per element, or elements of a storage: numbers that no pickle can give itself."""


class _Pickle(BytesIO):
    """A pickle's bytes, read in so many pieces at most: what it costs is how many, not what."""

    def __init__(self, content: bytes, most: int) -> None:
        super().__init__(content)
        self.reads, self.most = 0, most

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > self.most:
            raise UserError(f"its pickle has more than {self.most:,} parts. {_SAVE_WEIGHTS}")
        return super().read(size)


def _counted(handler: Callable[["_Reader"], None]) -> Callable[["_Reader"], None]:
    def handle(reader: "_Reader") -> None:
        reader.containers += 1
        if reader.containers > (most := reader.most(_MAX_CONTAINERS)):
            raise UserError(f"it has more than {most:,} containers. {_SAVE_WEIGHTS}")
        handler(reader)

    return handle


class _Reader(pickle._Unpickler):  # in Python: C's takes as much memory as a pickle names
    dispatch: ClassVar[dict[int, Callable]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES
    }
    for code in _CONTAINERS:
        dispatch[code[0]] = _counted(dispatch[code[0]])
    stack: list[Any]
    read: Callable[[int], bytes]

    def __init__(self, file: BytesIO, most: Callable[[int], int]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.most = most
        self.storages: dict[str, int] = {}  # bytes by name
        self.unread: dict[str, _UnreadName] = {}
        self.tensors = self.copied = self.containers = self.odd_keys = 0

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global: bytes per element for a storage's type, else a function."""
        if module == "torch" and name in _STORAGES:
            return _Size(_STORAGES[name])
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return None
        stand_ins: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch.nn.parameter.Parameter": lambda data, *_: data,
            "collections.OrderedDict": self.ordered,
            "collections.Counter": self.keyed,
            "builtins.set": self.keyed,
            "builtins.bytearray": self.byte_array,
            "builtins.complex": self.complex_number,
            "_codecs.encode": self.encoded,
            "torch.Size": self.size,
            "torch.device": self.device,
        }
        own = IMPORT_MAPPING.get(module, module), name
        known = ".".join(NAME_MAPPING.get((module, name), own))
        if known in stand_ins:
            return stand_ins[known]
        if known in _get_allowed_globals() or known in _get_user_allowed_globals():
            raise pickle.UnpicklingError(known)  # it would run there
        if len(self.unread) >= _MAX_UNREAD:
            raise ValueError(f"holds objects of more than {_MAX_UNREAD:,} names")
        return self.unread.setdefault(known, _UnreadName())

    def persistent_load(self, pid: Any) -> _Size:
        """A storage: how many elements it has."""
        types = [type(each) for each in pid]
        if pid[:1] == ("module",):
            raise UserError(WHOLE)
        if types[:5] != [str, _Size, str, str, int] or any(each is not None for each in pid[5:]):
            raise ValueError("holds a storage that torch does not write")
        kind, itemsize, name, _location, count = pid[:5]
        if kind != "storage" or not 0 <= count < 2**48:
            raise ValueError("holds a storage of no size")
        self.storages[name] = max(itemsize * count, self.storages.get(name, 0))
        return _Size(count)

    def tensor(
        self, stored: _Size, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> TensorOutline:
        self.tensors += 1
        if self.tensors > (most := self.most(_MAX_TENSORS)):
            raise ValueError(f"holds more than {most:,} tensors")
        if type(stored) is not _Size or not type(size) is type(stride) is tuple:
            raise ValueError("holds a tensor that torch does not write")
        if not len(size) == len(stride) <= _MAX_DIMENSIONS or not _are_ints(offset, *size, *stride):
            raise ValueError("holds a tensor of no size")
        if min(offset, *size, *stride, 0) < 0:  # torch would read before its storage
            raise ValueError("holds a tensor that begins before its storage")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) > stored or (0 not in size and last >= stored):
            raise ValueError("holds a tensor that is larger than what is stored of it")
        return TensorOutline()

    def ordered(self, *items: Any) -> _OrderedDict:
        for pairs in items:
            self.copy(pairs)
            if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
                raise ValueError("holds an OrderedDict of no pairs")
            self.check_keys([key for key, _ in pairs])
        return _OrderedDict(*items)

    def keyed(self, *items: Any) -> None:
        """A set or Counter."""
        for keys in items:
            self.copy(keys)
            self.check_keys(keys)

    def size(self, lengths: Any) -> tuple[int, ...]:
        self.copy(lengths)
        if not _are_ints(*lengths):
            raise ValueError("holds a size that is none")
        return tuple(lengths)

    def encoded(self, text: str, encoding: str) -> bytes:
        """Bytes, which are kept as text; another encoding might have all of it decompressed."""
        if not type(text) is type(encoding) is str or encoding != "latin1":
            raise ValueError("holds bytes that Python does not write")
        self.copy(text)
        return text.encode("latin1")

    def byte_array(self, content: bytes = b"") -> bytes:
        if type(content) is not bytes:  # of a number, torch would make as many zeros
            raise ValueError("holds a bytearray that Python does not write")
        self.copy(content)
        return content

    def complex_number(self, real: float, imaginary: float) -> complex:
        if not type(real) is type(imaginary) is float:
            raise ValueError("holds a complex number that Python does not write")
        return complex(real, imaginary)

    def device(self, kind: str, index: int = 0) -> None:
        if type(kind) is not str or len(kind) > 20 or not _are_ints(index):
            raise ValueError("holds a device that torch does not write")

    def copy(self, items: Any) -> None:
        """Count what is copied. Raises ValueError for more than _MAX_COPIED values in all."""
        if type(items) not in (str, bytes, list, tuple, dict):
            raise ValueError("has copied what holds no values")
        self.copied += len(items)
        if self.copied > _MAX_COPIED:
            raise ValueError(f"has more than {_MAX_COPIED:,} values copied")

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Raise ValueError for what must not be hashed, before it is, by us or by torch."""
        for key in keys:
            if type(key) is str or key is None or (type(key) is int and -(2**31) < key < 2**31):
                continue
            self.odd_keys += 1
            if type(key) not in (int, float, bool) or not -(2**60) < key < 2**60:
                raise ValueError("has a key that is neither text nor a number")
            if self.odd_keys > _MAX_ODD_KEYS:
                raise ValueError(f"has more than {_MAX_ODD_KEYS:,} large numbers for keys")

    def load_proto(self) -> None:
        protocol = self.read(1)[0]
        if protocol not in (2, 3):
            raise UserError(
                f"saved with another pickle protocol ({protocol}) than torch.save's own, 2. Save "
                "it anew without pickle_protocol=…."
            )

    def build(self) -> None:
        """An object's attributes, of which only a state_dict's are known."""
        state, thing = self.stack.pop(), self.stack[-1]
        if isinstance(thing, _UnreadItems):
            return
        if isinstance(thing, _OrderedDict) and state.keys() == {"_metadata"}:
            return
        if not isinstance(thing, TensorOutline):  # a Parameter of torch's first years
            raise pickle.UnpicklingError("attributes")

    def set_item(self) -> None:
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def set_items(self) -> None:
        self.check_keys(self.stack[::2])  # all that is behind the mark
        super().load_setitems()  # type: ignore[misc]

    dispatch[pickle.PROTO[0]] = load_proto
    dispatch[pickle.BUILD[0]] = build
    dispatch[pickle.SETITEM[0]] = set_item
    dispatch[pickle.SETITEMS[0]] = set_items
    dispatch[pickle.NEWOBJ[0]] = pickle._Unpickler.dispatch[pickle.REDUCE[0]]


def _are_ints(*values: Any) -> bool:
    return all(type(value) is int and -(2**63) <= value < 2**63 for value in values)


class Outline(NamedTuple):
    """A checkpoint's content with `TensorOutline`s for its tensors, and names of other code."""

    content: Any
    unread: dict[str, Any]  # name → what stands for it, for torch

    def stand_ins(self) -> AbstractContextManager[None]:
        """A block in which torch takes what stands for other code by the names of that."""
        return torch.serialization.safe_globals([(new, name) for name, new in self.unread.items()])


def _record_size(archive: Any, file: IO[bytes], name: str) -> int:
    """The bytes of a record of torch's archive in a file, before it is read."""
    if hasattr(archive, "get_record_size"):  # torch 2.11 has none
        return archive.get_record_size(name)
    with zipfile.ZipFile(file) as members:
        return max(m.file_size for m in members.infolist() if m.filename.endswith(f"/{name}"))


def read_outline(file: IO[bytes], size: int) -> Outline:
    """What is pickled in a checkpoint of so many bytes.

    Raises pickle.UnpicklingError for attributes of other objects, UserError, which does not name
    the file, for another protocol and too much besides tensors, ValueError for what is too large,
    deep or numerous, or takes more memory than the file has bytes, and anything for damage.
    """

    def most(of_small_files: int) -> int:
        return max(of_small_files, of_small_files * size // _FILE)

    file.seek(0)
    if file.read(2) == b"PK":
        file.seek(0)
        archive = torch._C.PyTorchFileReader(file)  # finds in it what torch.load will find
        if (found := _record_size(archive, file, "data.pkl")) > most(_MAX_PICKLE):
            raise UserError(f"{found:,} of its bytes are no tensors. {_SAVE_WEIGHTS}")
        pickles, number = _Pickle(archive.get_record("data.pkl"), most(_MAX_READS)), 1
    else:  # torch's old format: magic number, version, sizes of types, the content, storages
        file.seek(0)
        pickles, number = _Pickle(file.read(most(_MAX_PICKLE)), most(_MAX_READS)), 4
    for _ in range(number):
        reader = _Reader(pickles, most)
        content = reader.load()
    if sum(reader.storages.values()) > size:
        raise ValueError("claims more data than the file has bytes")
    check_size(content, most(_MAX_WRITTEN), most(_MAX_WRITTEN))
    return Outline(content, {name: found.stand_in for name, found in reader.unread.items()})
