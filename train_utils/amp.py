"""Which precision is fast on which device."""

import torch

from train_utils.device import Feature, fast_dtype, has
from train_utils.errors import UserError


def choose_amp_dtype(mode: str, device: torch.device, key: str = "train.amp") -> torch.dtype | None:
    """Autocast dtype for `auto`, `bf16`, `fp16` or `off` (the value of `key`); None means fp32.

    `auto` picks bf16 where the hardware multiplies it natively, fp16 on older NVIDIA GPUs, and fp32
    elsewhere. fp16 becomes `auto` on a device without gradient scaling.
    Raises UserError for fp16 on a CPU.
    """
    if mode == "off":
        return None
    if mode == "bf16":
        return torch.bfloat16
    if mode == "fp16":
        if device.type == "cpu":
            raise UserError(f"{key}=fp16: CPUs have no fast fp16. Use bf16 or off.")
        if has(device, Feature.GRAD_SCALER):
            return torch.float16
    return fast_dtype(device)


def make_scaler(amp_dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler | None:
    """A GradScaler for fp16, whose small gradients would vanish without one; None otherwise."""
    return torch.amp.GradScaler(device.type) if amp_dtype is torch.float16 else None
