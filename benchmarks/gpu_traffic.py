"""What a training step asks of a GPU: operations and bytes, counted on fake tensors, without a GPU.

    python -m benchmarks.gpu_traffic
    python -m benchmarks.gpu_traffic --systems unet matting pix2pix --batch 4 --size 256

Counted is the second step of `train_one_epoch` under 16-bit autocast. An operation is one that
starts kernels. The bytes of an operation are its inputs and outputs, each once; batch norm reads
its input, and its gradient both of its inputs, twice: for the statistics, and with them.

"fused" is an estimate for `torch.compile`: what is left if elementwise operations that follow each
other are one kernel, each joined by the reductions behind it. It reads what comes from elsewhere
and writes what goes elsewhere. Convolutions, matrix products and optimizers stay as they are. The
places that pooling keeps for its gradient are a byte each there.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tasks
from benchmarks import common
from benchmarks.fake_cuda import CUDA, fake_gpu
from train_utils import train_one_epoch
from train_utils.arguments import new_parser
from train_utils.setup import clean_errors, place_models
from train_utils.train_and_eval import EpochRun, Progress, StepOptions

SYSTEMS: dict[str, dict[str, Any]] = {
    "u2net_lite": {"task": "saliency", "model": {"name": "u2net_lite"}},
    "u2net_full": {"task": "saliency", "model": {"name": "u2net_full"}},
    "fcn": {"task": "segmentation", "model": {"name": "fcn", "weights": None}},
    "unet": {"task": "segmentation", "model": {"name": "unet"}},
    "matting": {"task": "matting"},
    "pix2pix": {"task": "translation"},
}
CHANNELS = {"saliency": (3, 1), "segmentation": (3, 1), "matting": (4, 2, 3, 3)}
COUNTS = dict.fromkeys(("bce", "iou", "pixels", "images", "unknown"), 1.0)

# Parts of operations' names. Whatever is neither is elementwise, or rearranges elements.
_ALONE = (
    *("convolution", "mm", "_fused_", "_foreach_", "_amp_", "index", "scatter", "gather"),
    *("upsample_bilinear2d_backward", "unpool", "group_norm", "sort", "bernoulli", "dropout"),
)
_REDUCTIONS = ("sum", "mean", "amax", "max", "any", "all", "norm", "argmax", "statistics")
_OVERWRITTEN = ("copy_", "fill_", "zero_")  # their target is not read


class Access(NamedTuple):
    """Some bytes of the memory that a node wrote (-1: that was there before)."""

    memory: int
    writer: int
    nbytes: int
    place: tuple  # two accesses to one place share its bytes


@dataclass
class Node:
    """An operation, or one of the two parts of a batch norm."""

    name: str
    reads: list[Access]
    writes: list[Access]

    @property
    def kind(self) -> str:
        if self.name in _REDUCTIONS or self.name.endswith("statistics"):
            return "reduction"
        return "alone" if any(part in self.name for part in _ALONE) else "elementwise"


@dataclass
class Traffic(TorchDispatchMode):
    """Notes all operations on the device, and which takes what another one made."""

    nodes: list[Node] = field(default_factory=list)
    operations: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._memory: dict[int, Any] = {}  # kept alive, so that no number is given twice
        self._writer: dict[int, int] = {}

    def forget(self) -> None:
        """Start to count."""
        self.nodes, self.operations, self._writer = [], 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in ("detach", "alias", "lift_fresh", "empty", "empty_like"):
            return out
        inputs, outputs = _on_gpu((args, kwargs)), _on_gpu(out)
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info and argument.alias_info.is_write
        ]
        if written:
            outputs = _on_gpu(written)
            if name.endswith(_OVERWRITTEN):
                inputs = [x for x in inputs if all(x is not target for target in outputs)]
        if outputs:
            self.operations += 1
            self._note(name, inputs, outputs)
        return out

    def _note(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        reads = [self._access(tensor) for tensor in inputs]
        if "batch_norm" in name:
            large = [access for access, x in zip(reads, inputs, strict=True) if x.dim() == 4]
            small = [tensor for tensor in outputs if tensor.dim() < 4]
            self._add(f"{name} statistics", large, small)
            reads += [self._access(tensor) for tensor in small]
            outputs = [tensor for tensor in outputs if tensor.dim() == 4]
        self._add(name, reads, outputs)

    def _add(self, name: str, reads: list[Access], outputs: list[Tensor]) -> None:
        number = len(self.nodes)
        for tensor in outputs:
            self._writer[self._number(tensor)] = number
        self.nodes.append(Node(name, reads, [self._access(tensor) for tensor in outputs]))

    def _access(self, tensor: Tensor) -> Access:
        memory = self._number(tensor)
        expanded = (n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)
        place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        nbytes = prod(expanded) * tensor.element_size()
        return Access(memory, self._writer.get(memory, -1), nbytes, place)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._memory[storage._cdata] = storage
        return storage._cdata


def _on_gpu(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_cuda and x.numel()]


def distinct_bytes(accesses: Iterable[Access]) -> int:
    """Bytes of the places that are accessed, each once."""
    return sum({access[:2] + access[3:]: access.nbytes for access in accesses}.values())


def eager_bytes(nodes: Sequence[Node]) -> int:
    """What operations move one by one."""
    return sum(distinct_bytes(node.reads) + distinct_bytes(node.writes) for node in nodes)


def fused_bytes(nodes: Sequence[Node]) -> int:
    """What they move when elementwise ones are joined to each other, and to reductions behind.

    A node's stage is how many kernels must have ended before it. Joined are nodes of one stage of
    which one takes what the other makes: nothing then leads out of a kernel and back into it.
    """
    pooled = "max_pool2d_with_indices"
    kept = {node.writes[1].memory for node in nodes if node.name == pooled}
    for node in nodes:
        if node.name != f"{pooled}_backward":
            kept -= {access.memory for access in node.reads}

    def moved(accesses: list[Access]) -> int:
        return distinct_bytes(
            access._replace(nbytes=access.nbytes // 8) if access.memory in kept else access
            for access in accesses
        )

    stages: list[int] = []
    kernel = list(range(len(nodes)))  # by node: another one of its kernel, or itself

    def root(number: int) -> int:
        while kernel[number] != number:
            number = kernel[number]
        return number

    for number, node in enumerate(nodes):
        makers = {access.writer for access in node.reads if access.writer >= 0}
        joins = [m for m in makers if nodes[m].kind == "elementwise" and node.kind != "alone"]
        later = [stages[maker] + (maker not in joins) for maker in makers]
        stages.append(max(later, default=0))
        for maker in joins:
            if stages[maker] == stages[number]:
                kernel[root(maker)] = root(number)
    kernels: dict[int, list[int]] = {}
    for number in range(len(nodes)):
        kernels.setdefault(root(number), []).append(number)
    takers: dict[int, set[int]] = {}
    for number, node in enumerate(nodes):
        for access in node.reads:
            takers.setdefault(access.writer, set()).add(root(number))
    total = 0
    for own, members in kernels.items():
        outside = [
            access
            for member in members
            for access in nodes[member].reads
            if access.writer not in members
        ]
        # What nobody takes is a result of the step.
        leaving = [
            access
            for member in members
            if takers.get(member, set()) != {own}
            for access in nodes[member].writes
        ]
        total += moved(outside) + moved(leaving)
    return total


def step_of(system: str, batch: int, size: int) -> Traffic:
    """The second training step of a system, on a GPU that is not there."""
    values = SYSTEMS[system]
    data: dict[str, Any] = {"image_size": size}
    data |= {"crop_sizes": [size]} if values["task"] == "matting" else {}
    task = tasks.read_config({**values, "data": data}, "benchmark", {})
    cfg = task.cfg
    with fake_gpu(), Traffic() as traffic, common.quietly():
        networks = place_models(task.build_models(), CUDA, sync_bn=False)
        optimizers = task.build_optimizers(networks)
        schedules = task.build_schedulers(optimizers, 10)
        channels = CHANNELS.get(cfg.task, (3, 3))
        images = [torch.empty(batch, c, size, size, dtype=torch.uint8) for c in channels]

        class FirstForgotten(EpochRun):
            def after_step(self, progress: Progress) -> None:
                if progress.step == 1:
                    traffic.forget()

        train_one_epoch(
            networks,
            optimizers,
            [images] * 2,  # type: ignore[arg-type]
            CUDA,
            0,
            schedules,
            1000,
            losses=task.losses,
            weight=lambda batch: 1.0,
            # Of bf16 a fake GPU does not know the memory format; the bytes are the same.
            options=StepOptions(torch.float16, seed=0),
            run=FirstForgotten(),
        )
    return traffic


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--systems", nargs="+", default=["u2net_lite", "u2net_full"], choices=SYSTEMS
    )
    parser.add_argument("--batch", type=common.positive, default=16)
    parser.add_argument("--size", type=common.positive, default=288, help="side of the images")
    parser.add_argument("--top", type=int, default=0, help="also list what moves most, by name")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows = []
    for system in args.systems:
        traffic = step_of(system, args.batch, args.size)
        row = {"system": system, "operations": traffic.operations}
        row |= {"eager GB": eager_bytes(traffic.nodes) / 1e9}
        rows.append(row | {"fused GB": fused_bytes(traffic.nodes) / 1e9})
        names: Counter = Counter()
        for node in traffic.nodes:
            names[node.name] += eager_bytes([node])
        for name, nbytes in names.most_common(args.top):
            print(f"{system}  {nbytes / 1e9:8.2f} GB  {name}")
    common.report(args, rows)


if __name__ == "__main__":
    with clean_errors():
        main()
