"""All that differs by device: which are there, what they can do, how their processes meet.

Elsewhere the project knows of devices only whether they are the CPU. An accelerator is what
`torch.accelerator` finds: cuda (AMD's cards, too, go by that name), xpu (Intel), mps (Apple), …
What is said of those other than cuda is taken from torch's sources.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from train_utils.errors import UserError, typed
from train_utils.log import say_once

# What launchers restrict a process to single devices by.
_RESTRICTIONS = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)


class Feature(Enum):
    """What not every device has, and what happens without it."""

    FP64 = "fp64: what needs it, such as scores, is computed on the CPU"
    GRAD_SCALER = "gradient scaling, which fp16 needs: precision is chosen as by auto"
    PINNED_MEMORY = "page-locked memory: the host waits for copies to and from the device"
    COMPILE = "torch.compile to rely on: the networks run as they are"


def has(device: torch.device, feature: Feature) -> bool:
    """Whether a device has a feature; where it has not, the log says so, once."""
    missing = feature in _lacks(device)
    if missing:
        say_once(f"{device.type} has no {feature.value}")
    return not missing


def _lacks(device: torch.device) -> set[Feature]:
    if device.type in ("cpu", "cuda"):
        return set()
    if device.type == "xpu":
        fp64 = torch.xpu.get_device_properties(device).has_fp64
        return set() if fp64 else {Feature.FP64, Feature.GRAD_SCALER}
    if device.type == "mps":
        return {Feature.FP64, Feature.PINNED_MEMORY, Feature.COMPILE}
    return set(Feature)


def pins_memory(device: torch.device) -> bool:
    """Whether memory of the host is to be page-locked for copies to and from a device."""
    return device.type != "cpu" and has(device, Feature.PINNED_MEMORY)


def fp64_device(device: torch.device) -> torch.device:
    """Where results of a device are computed with in fp64: there, or else on the CPU."""
    return device if has(device, Feature.FP64) else torch.device("cpu")


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """The 16-bit type that a device multiplies faster than fp32; None where none is known to be.

    CPUs without bf16 units emulate it, several times slower than fp32.
    """
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    elif device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        native = module.is_bf16_supported(including_emulation=False)
    else:
        native = False
    if native:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def fuses_sync_batch_norm(device: torch.device) -> bool:
    """Whether torch has kernels of its own for batch norm over all processes."""
    return device.type == "cuda"


def fast_layout(device: torch.device, training: bool) -> torch.memory_format:
    """The memory format in which convolutions of batches are fast.

    Channels-last, but for training on CPUs with AVX2 alone: there the weights' gradients of
    channels-last convolutions are slow, and most systems trained at 0.6 to 0.8 of the speed of a
    plain loop (docs/performance.md). Evaluation is faster in channels-last there, too.
    """
    if training and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return torch.contiguous_format
    return torch.channels_last


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may multiply fp32 in TF32, which keeps 10 of 23 binary places and is faster.

    Of convolutions and matrix products alike; torch's own default is convolutions only. GPUs before
    Ampere, and other devices, have none.
    """
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """A block with `allow_tf32(allowed)`."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def describe_precision(amp_dtype: torch.dtype | None, device: torch.device, tf32: bool) -> str:
    """What a run computes in, for its first line."""
    name = str(amp_dtype or torch.float32).removeprefix("torch.")
    if device.type != "cuda":
        return name
    return f"{name}, TF32 {'on' if tf32 else 'off'}"


def peak_memory() -> int | None:
    """Bytes that the accelerator's allocator held at most; None: not in use or not counted."""
    accelerator = torch.accelerator.current_accelerator()
    module: Any = torch.get_device_module(accelerator) if accelerator else None
    if not (hasattr(module, "max_memory_allocated") and module.is_initialized()):
        return None
    return module.max_memory_allocated()


# -- a device for each process --------------------------------------------------------------------


def resolve_device(name: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`, … into this process's device.

    Several processes of a node get one each; the number in a name is for a single process.
    Raises UserError for a device that is not there and for more processes than devices; there is no
    silent fall-back to the CPU for a device that was asked for by name.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    kind, count = (found.type, torch.accelerator.device_count()) if found else ("cpu", 0)
    device = _parse(kind if name == "auto" else name)
    if device.type == "cpu":
        return device
    if device.type != kind:
        raise UserError(
            f"--device {name}: torch sees {kind if count else 'no GPU'}. Use --device {kind}, or "
            f"install the driver and a build of torch for {device.type}."
        )
    if local_world_size > 1 and not process_group_backend(device):
        refuse_several(device)
    apart = local_world_size > count and _sees_only_its_own(count)
    if local_world_size > count and not apart:
        raise UserError(
            f"--device {name}: {local_world_size} processes on this node but {count} GPU(s). "
            f"Launch with --nproc_per_node={count}, or use --device cpu."
        )
    index = local_rank if local_world_size > 1 and not apart else device.index or 0
    if index >= count:
        raise UserError(f"--device {name}: this node has {count} GPU(s), numbered from 0.")
    return torch.device(kind, index)


def _parse(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.type == "cpu" and name != "cpu"):
        raise UserError(
            f"--device {typed(name)}: no such device. Use auto, cpu, cuda, cuda:0, or another "
            "accelerator of torch's (xpu, mps)."
        )
    return device


def _sees_only_its_own(count: int) -> bool:
    """Whether the launcher has shared out the devices, so that number 0 is another one in each.

    `refuse_shared_device` finds out where that is not so.
    """
    if "SLURM_GPUS_PER_TASK" in os.environ and "LOCAL_RANK" not in os.environ:
        return True  # in a torchrun within a task several processes share the task's devices
    on_node = os.environ.get("SLURM_GPUS_ON_NODE", "")
    hidden = on_node.isdecimal() and int(on_node) > count and "LOCAL_RANK" not in os.environ
    return count == 1 and (hidden or any(os.environ.get(name) for name in _RESTRICTIONS))


def process_group_backend(device: torch.device) -> str | None:
    """What `init_process_group` takes for processes on such devices; None if there is nothing.

    Accelerators have gloo beside their own, for numbers on the host.
    """
    if device.type == "cpu":
        return "gloo"
    try:
        own = dist.get_default_backend_for_device(device.type)
    except ValueError:
        return None
    return None if own == "gloo" else f"cpu:gloo,{device.type}:{own}"  # gloo adds up on hosts only


def refuse_several(device: torch.device) -> NoReturn:
    """UserError for processes on devices that cannot exchange gradients."""
    raise UserError(
        f"--device {device.type}: torch has no collectives for it, so processes cannot work "
        "together. Start one with python instead of a launcher, or use --device cpu."
    )


def refuse_shared_device(
    device: torch.device, store: Any, rank: int, world_size: int, local_world_size: int
) -> None:
    """UserError, on all of them, if processes that each see one device see the same one.

    store: shared by all processes. Devices are told apart by the ids of the hardware, since each is
    number 0 to its process; where torch does not know them, the collectives will complain.
    """
    if device.type == "cpu":
        return
    properties = torch.get_device_module(device).get_device_properties(device)
    store.set(f"device/{rank}", str(getattr(properties, "uuid", "")))
    if local_world_size <= torch.accelerator.device_count():
        return
    ids = store.multi_get([f"device/{other}" for other in range(world_size)])
    alike = [other for other in range(world_size) if ids[other] == ids[rank] != b""]
    if len(alike) > 1:
        raise UserError(
            f"--device {device.type}: ranks {', '.join(map(str, alike))} see one and the same GPU. "
            "Launch one process for each GPU, or have the launcher give each its own."
        )


def take_device(device: torch.device) -> None:
    """Make a device the one that this process means when it names none."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
