"""A CUDA device that is not there: fake tensors on `cuda`, and a spy that sees every wait for it.

Fake tensors have shapes, dtypes, strides and devices, but no values, so that code for GPUs runs on
a machine without one; an operation on tensors of two devices raises, as on a GPU. What this cannot
show: values, NCCL, DistributedDataParallel's reducer, and memory formats of bf16's convolutions
(torch asks the driver for them: look at those of fp16).
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src import layers
from train_utils import losses, normalize
from train_utils.activity import current_activity

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parents[1]

# Operations whose result's shape or value the host must know.
_WAITING = {
    *("bincount", "equal", "histc", "is_nonzero", "masked_select", "nonzero"),
    *("_linalg_check_errors", "_unique", "_unique2", "unique_consecutive", "unique_dim"),
}
# They work in place and return nothing, and have no kernel for fake tensors.
_IN_PLACE = {
    *("_fused_sgd_", "_fused_adam_", "_fused_adamw_"),
    *("_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"),
}


def _per_channel(x: Tensor, count: int) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, torch.float32)  # what a GPU accumulates in
    return tuple(torch.empty(x.shape[1], dtype=dtype, device=x.device) for _ in range(count))


# Nor have these: CUDA's parts of a batch norm that is synchronised.
_BATCH_NORM: dict[str, Callable] = {
    "batch_norm_stats": lambda x, *_: _per_channel(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, *_: _per_channel(x, 2),
    "batch_norm_elemt": lambda x, *_: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda gradient, x, *_: _per_channel(x, 4),
    "batch_norm_backward_elemt": lambda gradient, x, *_: torch.empty_like(x),
}


class Wait(NamedTuple):
    """A wait of the host for the device: for what, where, and whether the hang watch knows."""

    what: str
    where: str
    watched: bool

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


class Op(NamedTuple):
    """An operation that may start kernels; its tensors as far as they matter."""

    name: str
    inputs: tuple["Seen", ...]
    outputs: tuple["Seen", ...]


class Seen(NamedTuple):
    device: str
    dtype: torch.dtype
    shape: torch.Size
    layout: str  # NHWC, NCHW, both where they are the same, or "" where it is neither

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def _device(tensor: Tensor) -> torch.device:
    # Asking a fake tensor would be an operation that the spy sees.
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _seen(tensor: Tensor) -> Seen:
    is_map = tensor.dim() == 4
    last = is_map and tensor.is_contiguous(memory_format=torch.channels_last)
    first = is_map and tensor.is_contiguous()
    layout = "both" if last and first else "NHWC" if last else "NCHW" if first else ""
    return Seen(_device(tensor).type, tensor.dtype, tensor.shape, layout)


class Spy(TorchDispatchMode):
    """Notes operations and waits, below autograd and autocast.

    Where code needs a value, it gets a stand-in, so that one run finds all waits: `answer(place)`,
    a number for a place such as "train_utils/metrics.py:120 (count)". `before(op's name, inputs)`
    is called before an operation, and may raise what a device would.
    """

    def __init__(
        self, answer: Callable[[str], float], before: Callable[[str, list[Tensor]], None]
    ) -> None:
        super().__init__()
        self.answer, self.before = answer, before
        self.waits: list[Wait] = []
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "device":
            return _device(args[0])
        if torch.is_inference_mode_enabled():  # elsewhere autograd has taken operations apart
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(_device(tensor).type == "cuda" for tensor in tensors)
        self.before(name, tensors)
        if on_gpu and name in _WAITING:
            self._note(name)
        if name == "_local_scalar_dense":
            if on_gpu:
                self._note("a value that the host reads")
            return self._stand_in(args[0])
        if name == "is_pinned":
            return False
        if on_gpu and name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = self._without_masks(name, args)
        if name in ("_to_copy", "copy_"):
            self._look_at_copy(name, args, kwargs)
        out = self._run(func, name, tensors, args, kwargs)
        if not func.is_view and name not in ("detach", "alias", "lift_fresh"):
            outputs = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            self.ops.append(Op(name, tuple(map(_seen, tensors)), tuple(map(_seen, outputs))))
        return out

    def _run(self, func: Any, name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:
        if name in _IN_PLACE:
            devices = {_device(tensor) for tensor in tensors if tensor.dim()}
            if len(devices) > 1:
                raise RuntimeError(f"{name}: tensors on {devices}")
            return None
        if name in _BATCH_NORM:
            return _BATCH_NORM[name](*args)
        if name == "nonzero":  # nothing is found: what code looks for is most often an error
            return args[0].new_zeros((0, args[0].dim()), dtype=torch.int64)
        if name == "bincount":
            length = args[2] if len(args) > 2 else kwargs["minlength"]
            return args[0].new_zeros(length, dtype=torch.int64)
        return func(*args, **kwargs)

    def tolist(self, tensor: Tensor) -> Any:
        """What FakeTensor.tolist does: one wait."""
        if _device(tensor).type == "cuda":
            self._note("values that the host reads")
        return self._stand_ins(tensor)

    def _stand_ins(self, tensor: Tensor) -> Any:
        if tensor.dim() == 0:
            return self._stand_in(tensor)
        return [self._stand_ins(part) for part in tensor.unbind(0)]

    def _stand_in(self, value: Tensor) -> Any:
        number = self.answer(_place())
        if value.dtype == torch.bool:
            return bool(number)
        return float(number) if value.dtype.is_floating_point else int(number)

    def _without_masks(self, name: str, args: tuple) -> tuple:
        """An indexing's arguments, boolean masks replaced as if they chose everything."""
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return args
        self._note(f"{name} by a mask")
        all_of = [
            torch.arange(len(i), device=i.device) if any(i is mask for mask in masks) else i
            for i in args[1]
        ]
        return (args[0], all_of, *args[2:])

    def _look_at_copy(self, name: str, args: tuple, kwargs: dict) -> None:
        if name == "copy_":
            target, source = _device(args[0]), _device(args[1])
            waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        else:
            source = _device(args[0])
            target = torch.device(kwargs.get("device") or source)
            waits = not kwargs.get("non_blocking", False)
        if (source.type, target.type) == ("cuda", "cpu"):
            self._note("copy to the host" if waits else "copy to the host, read before it is there")
        elif (source.type, target.type) == ("cpu", "cuda") and waits:
            self._note("copy from the host")

    def _note(self, what: str) -> None:
        self.waits.append(Wait(what, _place(), current_activity().waits))


def _frames() -> Iterator[FrameType]:
    """The callers' frames, innermost first, without those of this file."""
    frame: FrameType | None = sys._getframe()
    while frame:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


def _place() -> str:
    """The innermost place in the project's own code."""
    for frame in _frames():
        path = frame.f_code.co_filename
        if path.startswith(f"{REPO}/"):
            return f"{path[len(str(REPO)) + 1 :]}:{frame.f_lineno} ({frame.f_code.co_name})"
    return "autograd"


# -- what torch does with a driver's help ---------------------------------------------------------


def _backward(root: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
    """Tensor.backward, node by node: torch's engine asks the driver which GPUs are in use."""
    with torch.no_grad():
        waiting = _uses(root.grad_fn)
        first = torch.ones_like(root) if gradient is None else gradient
        pending: dict[Any, dict[int, Tensor]] = {root.grad_fn: {root.output_nr: first}}
        ready: list[Any] = [root.grad_fn]
        while ready:
            ready.sort(key=lambda node: node._sequence_nr())  # the newest first, as torch does
            node = ready.pop()
            made = _gradients(node, pending.pop(node, {}))
            for number, (after, slot) in enumerate(node.next_functions):
                if after is None:
                    continue
                if number < len(made) and made[number] is not None:
                    _add_gradient(pending.setdefault(after, {}), slot, made[number], after)
                waiting[after] -= 1
                if not waiting[after]:
                    ready.append(after)


def _uses(root: Any) -> Counter:
    """How many gradients each node of a graph waits for."""
    uses: Counter = Counter()
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    return uses


def _add_gradient(slots: dict[int, Tensor], slot: int, gradient: Tensor, node: Any) -> None:
    """Each node gets gradients of its output's dtype, also behind an operation that promotes."""
    leaf = hasattr(node, "variable")
    dtype = node.variable.dtype if leaf else node._input_metadata[slot].dtype
    gradient = gradient.to(dtype)
    slots[slot] = slots[slot] + gradient if slot in slots else gradient


def _gradients(node: Any, got: dict[int, Tensor]) -> tuple:
    if hasattr(node, "variable"):
        if got:
            _accumulate(node.variable, got[0])
        return ()
    metadata = node._input_metadata
    gradients = [got.get(number) for number in range(len(metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # written in Python
        gradients = [
            torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) if g is None else g
            for g, m in zip(gradients, metadata, strict=True)
        ]
        made = node.apply(*gradients)  # also without any, as torch does: it may hold a collective
    else:
        made = node(*gradients) if got else ()
    return made if isinstance(made, tuple) else (made,)


def _accumulate(variable: Tensor, gradient: Tensor) -> None:
    if variable.grad is not None:
        variable.grad.add_(gradient)
        return
    strides = zip(gradient.shape, gradient.stride(), variable.stride(), strict=True)
    if not all(own == others for size, own, others in strides if size > 1):
        gradient = torch.empty_like(variable).copy_(gradient)  # torch keeps to the weight's layout
    variable.grad = gradient.detach()


def _apply(module: nn.Module, fn: Callable, recurse: bool = True) -> nn.Module:
    """nn.Module._apply without setting `.data`, which fake parameters do not allow."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for key, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = fn(parameter)
            if moved is not parameter:
                module._parameters[key] = nn.Parameter(moved, parameter.requires_grad)
    for key, buffer in module._buffers.items():
        module._buffers[key] = buffer if buffer is None else fn(buffer)
    return module


def _deepcopy(tensor: Tensor, memo: dict) -> Tensor:
    if id(tensor) not in memo:
        with torch.no_grad():
            copied = tensor.detach().clone(memory_format=torch.preserve_format)
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, tensor.requires_grad)
        memo[id(tensor)] = copied
    return memo[id(tensor)]


def _numpy(tensor: Tensor, **_: Any) -> np.ndarray:
    if _device(tensor).type == "cuda":
        raise TypeError("a tensor on cuda cannot become a NumPy array")
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def _forget_constants() -> None:
    """Forget the small tensors that the project keeps: they belong to one FakeTensorMode."""
    for module in (layers, losses, normalize):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def looks_fine(place: str) -> float:
    """A stand-in for all values: 1, and no for those that ask whether something is wrong."""
    return 0.0 if "nonfinite" in place else 1.0


@contextmanager
def fake_gpu(
    answer: Callable[[str], float] = looks_fine,
    before: Callable[[str, list[Tensor]], None] = lambda name, inputs: None,
) -> Iterator[Spy]:
    """A block in which tensors can be made on `cuda`, and what a `Spy` sees of them."""
    spy = Spy(answer, before)
    with ExitStack() as stack:
        for target, value in {
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
            "torch.cuda.get_device_properties": lambda *_: mock.Mock(major=8),
            "torch.cuda.current_device": lambda: 0,
            "torch.nn.Module._apply": _apply,
            "torch.Tensor.backward": _backward,
        }.items():
            stack.enter_context(mock.patch(target, value))
        for name, method in {
            "tolist": lambda tensor: spy.tolist(tensor),
            "__deepcopy__": _deepcopy,
            "numpy": _numpy,
        }.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, method, create=True))
        stack.callback(_forget_constants)
        _forget_constants()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(spy)
