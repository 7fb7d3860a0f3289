"""The object's own colours, so that a cut-out brings no halo of its old background."""

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 10  # per level
SMOOTHNESS = 1e-5  # ε: weight of the colours' smoothness where alpha does not change
EDGE_SMOOTHNESS = 1.0  # ω: additional weight per unit of |∇alpha|


def estimate_foreground(image: Tensor, alpha: Tensor) -> Tensor:
    """Foreground colours F of an image I = alpha·F + (1 − alpha)·B, uint8 [3, H, W].

    image: uint8 [3, H, W]. alpha: floats [H, W] in [0, 1], on the same device. Where alpha is 1 the
    result is the image, where it is 0 any smooth continuation. Takes some 150 bytes per pixel.

    Germer, Uelwer, Conrad, Harmeling, "Fast Multi-Level Foreground Estimation", ICPR 2020: colours
    F and B that minimise Σ (alpha·F + (1 − alpha)·B − I)² + Σ (ε + ω·|Δalpha|)(ΔF² + ΔB²), the
    second sum over neighbouring pixels. A few Jacobi iterations per level, from a single pixel to
    the full size, each level starting from the one before: coarse levels carry colours far.
    Raises ValueError if the sizes differ.
    """
    if image.shape != (3, *alpha.shape):
        raise ValueError(f"image {list(image.shape)} and alpha {list(alpha.shape)} differ in size")
    fine_image, fine_alpha = image[None] / 255, alpha[None, None].float()
    layers = fine_image.repeat(2, 1, 1, 1)
    for size in _sizes(*alpha.shape):
        # Of nearest pixels the compositing equation holds; of averages it would not.
        layers, level_image, level_alpha = (
            F.interpolate(planes, size=size, mode="nearest-exact")
            for planes in (layers, fine_image, fine_alpha)
        )
        layers = _refine(layers, level_image, level_alpha)
    foreground = (layers[0] * 255).round_().to(torch.uint8)
    return torch.where(alpha == 1, image, foreground)


def _sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes from one pixel to the image's own, by factors of two."""
    halvings = (max(height, width) - 1).bit_length()
    return [(-(-height >> k), -(-width >> k)) for k in range(halvings, -1, -1)]


def _refine(layers: Tensor, image: Tensor, alpha: Tensor) -> Tensor:
    """Iterate on foreground and background [2, 3, h, w] of an image [1, 3, h, w] with its alpha.

    Given its neighbours' weighted means F̄ and B̄, a pixel's minimum is that of a 2×2 system, whose
    solution is F = F̄ + alpha·r / d and B = B̄ + (1 − alpha)·r / d, with the residual
    r = I − alpha·F̄ − (1 − alpha)·B̄ and d = alpha² + (1 − alpha)² + Σ weights.
    """
    shares = torch.cat([alpha, 1 - alpha])
    weights = [
        SMOOTHNESS + EDGE_SMOOTHNESS * (neighbour - alpha).abs() for neighbour in _neighbours(alpha)
    ]
    total = sum(weights)
    weights = [weight / total for weight in weights]
    gain = shares / (shares.square().sum(dim=0) + total)
    for _ in range(ITERATIONS):
        neighbours = _neighbours(layers)
        means = sum(weight * layer for weight, layer in zip(weights, neighbours, strict=True))
        residual = image - (shares * means).sum(dim=0)
        layers = (means + gain * residual).clamp_(0, 1)
    return layers


def _neighbours(planes: Tensor) -> list[Tensor]:
    """Every pixel's upper, lower, left and right neighbour; at the border the pixel itself."""
    padded = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    return [
        padded[..., :-2, 1:-1],
        padded[..., 2:, 1:-1],
        padded[..., 1:-1, :-2],
        padded[..., 1:-1, 2:],
    ]
