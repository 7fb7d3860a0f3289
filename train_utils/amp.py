"""Which precision is fast on which device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train_utils.errors import UserError


def choose_amp_dtype(mode: str, device: torch.device, key: str = "train.amp") -> torch.dtype | None:
    """Autocast dtype for `auto`, `bf16`, `fp16` or `off` (the value of `key`); None means fp32.

    `auto` picks bf16 where the hardware multiplies it natively, fp16 on older GPUs, and fp32 on
    CPUs without bf16 units, where emulated bf16 is several times slower than fp32.
    Raises UserError for fp16 on a CPU.
    """
    if mode == "off":
        return None
    if mode == "bf16":
        return torch.bfloat16
    if mode == "fp16":
        if device.type == "cpu":
            raise UserError(f"{key}=fp16: CPUs have no fast fp16. Use bf16 or off.")
        return torch.float16
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16
    return None


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may multiply fp32 in TF32, which keeps 10 of 23 binary places and is faster.

    Of convolutions and matrix products alike; torch's own default is convolutions only. GPUs before
    Ampere, and CPUs, have none.
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


def _cpu_multiplies_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def make_scaler(amp_dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler | None:
    """A GradScaler for fp16, whose small gradients would vanish without one; None otherwise."""
    return torch.amp.GradScaler(device.type) if amp_dtype is torch.float16 else None
