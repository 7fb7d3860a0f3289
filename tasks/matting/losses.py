"""Losses of image matting, means over the unknown pixels (Xu et al., CVPR 2017, section 4.1).

predicted, alpha: [B, 1, H, W] in [0, 1];
colours: [B, 3, H, W]; see `unit_values` for uint8. unknown: bool [B, 1, H, W], the pixels that
the mean is over; 0 where there are none. Both return a 0-dim tensor, at least fp32.
"""

import torch
from torch import Tensor

from train_utils.losses import unit_values

MATTING_EPSILON = 1e-6


def alpha_prediction_loss(predicted: Tensor, alpha: Tensor, unknown: Tensor) -> Tensor:
    """Mean of √((α̂ − α)² + ε²) over the unknown pixels (eq. 1); ε = 1e-6."""
    _require_shape(predicted, alpha, unknown)
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return _mean_of_unknown(predicted.to(dtype) - unit_values(alpha, dtype), unknown)


def compositional_loss(
    predicted: Tensor, foreground: Tensor, background: Tensor, image: Tensor, unknown: Tensor
) -> Tensor:
    """The same of α̂F + (1 − α̂)B against the image, on colours in [0, 1].

    A pixel counts once, with the mean over its three channels: the loss has the scale of the
    alpha-prediction loss.
    """
    _require_shape(predicted, unknown)
    _require_shape(foreground, background, image)
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    fg, bg, truth = (unit_values(colours, dtype) for colours in (foreground, background, image))
    return _mean_of_unknown(torch.lerp(bg, fg, predicted.to(dtype)) - truth, unknown)


def _mean_of_unknown(difference: Tensor, unknown: Tensor) -> Tensor:
    distance = (difference**2 + MATTING_EPSILON**2).sqrt().mean(1, keepdim=True)
    # The paper adds ε to the count, which would then not be that of the pixels.
    return (distance * unknown).sum() / unknown.sum().clamp(min=1)


def _require_shape(*tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"shapes differ: {', '.join(map(str, sorted(shapes)))}")
