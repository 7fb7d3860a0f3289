"""Losses of paired image translation, means over the batch."""

import torch
from torch import Tensor


def least_squares_gan(logits: Tensor, label: float) -> Tensor:
    """Least-squares GAN term: the mean of (logit − label)².

    Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017, with labels 1 (real) and
    0 (fake). logits: [B, 1, h, w], a map of any size. At least fp32.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits - label).square().mean()


def l1_term(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean |prediction − target|, of [B, C, H, W] both; at least fp32.

    Raises ValueError if the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape"
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).abs().mean()
