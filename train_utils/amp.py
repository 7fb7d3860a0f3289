"""Which precision is fast on which device."""

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


def _cpu_multiplies_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def make_scaler(amp_dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler | None:
    """A GradScaler for fp16, whose small gradients would vanish without one; None otherwise."""
    return torch.amp.GradScaler(device.type) if amp_dtype is torch.float16 else None
