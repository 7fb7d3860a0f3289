"""Scores of translated images, with the same bits for any order, thread and number of processes."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from train_utils.metrics import (
    MAX_PIXELS,
    ExactMetric,
    lies_in_unit_range,
    pack_state,
    to_fixed,
)

PSNR_CAP = 100.0  # dB; identical images would have an infinite one
WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_SSIM_ONE = 2**32  # fixed-point 1 of a pixel's SSIM; 3 · MAX_PIXELS of them fit


def translated(prediction: Tensor, size: Sequence[int]) -> Tensor:
    """A generated image [3, h, w] in [-1, 1] as it is scored and written: fp64 [3, H, W] in [0, 1].

    Resized to `size` bilinearly with antialiasing (fp32) if its size differs. The one place that
    finishes a generated image, for the metrics and for predict.py alike.
    """
    if prediction.shape[-2:] != tuple(size):
        batch = prediction[None].float()
        prediction = F.interpolate(batch, size=tuple(size), mode="bilinear", antialias=True)[0]
    return ((prediction.double() + 1) / 2).clamp(0, 1)


def codes_of(image: Tensor) -> Tensor:
    """An image in [0, 1] rounded to the 8-bit codes that a file holds; uint8 of the same shape."""
    return (image * 255).round().to(torch.uint8)


class TranslationMetrics(ExactMetric):
    """Held-out L1, PSNR and SSIM of generated images against their targets, means over images.

    The generated image is brought to the target's size and rounded to 8 bits first, so that these
    are the scores of the files that predict.py writes. x̂ and x below are in [0, 1].

    L1: mean |x̂ − x| over pixels and channels.
    PSNR: 10·log10(1 / mean (x̂ − x)²) in dB, at most `PSNR_CAP` per image.
    SSIM: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
    IEEE TIP 2004, eq. 13, K1 = 0.01, K2 = 0.03, under an 11×11 Gaussian window (σ = 1.5) wherever
    it lies inside the image; the mean over these places and the three channels. Along a side of
    fewer than 11 pixels the window is cut to the largest odd number of them.
    """

    name = "translation"
    invalid = "generated values not finite or outside [-1, 1]"
    num_sums = 5  # L1, PSNR / PSNR_CAP, SSIM in fixed point; images at the cap, small images

    def sample_state(self, pred: Tensor, gt: Tensor) -> Tensor:
        """State of one image: pred float [3, h, w] in [-1, 1], gt uint8 [3, H, W]."""
        if gt.dtype != torch.uint8 or gt.dim() != 3 or pred.shape[:-2] != gt.shape[:-2]:
            raise ValueError(
                f"prediction {list(pred.shape)}, target {list(gt.shape)} {gt.dtype}: give images "
                "of as many channels, the target as uint8"
            )
        height, width = gt.shape[-2:]
        if not 0 < height * width <= MAX_PIXELS:
            raise ValueError(f"{width}×{height}: an image has 1 to {MAX_PIXELS} pixels")
        pred = pred.detach()
        valid = lies_in_unit_range((pred.double() + 1) / 2)
        x, y = codes_of(translated(pred, gt.shape[-2:])).long(), gt.to(pred.device).long()
        # Sums of integers: neither the order of pixels nor the number of threads can matter.
        absolute, squared = (x - y).abs().sum().double(), (x - y).square().sum().double()
        psnr = 10 * torch.log10(255**2 * y.numel() / squared)  # inf for identical images
        sums = absolute / (255 * y.numel()), psnr.clamp(max=PSNR_CAP) / PSNR_CAP, _ssim(x, y)
        small = torch.full_like(x[0, 0, 0], min(height, width) < WINDOW)
        return pack_state(valid, *map(to_fixed, sums), (psnr >= PSNR_CAP).long(), small)

    def compute(self) -> dict[str, float]:
        l1, psnr, ssim = self._averages()[:3].tolist()
        return {"L1": l1, "PSNR": psnr * PSNR_CAP, "SSIM": ssim}

    def remarks(self) -> list[str]:
        capped, small = self.state[-2:].tolist()
        remarks = []
        if capped:
            remarks.append(f"PSNR: {capped} image(s) above {PSNR_CAP:g} dB count as {PSNR_CAP:g}")
        if small:
            remarks.append(f"SSIM: {small} image(s) narrower than its window, cut to fit them")
        return remarks


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM of two images of 8-bit codes, int64 [C, H, W], as a fp64 scalar.

    Every value is made of + − × ÷ in an order of its own, which IEEE 754 rounds alike everywhere,
    and the mean is a sum of integers.
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    xx, yy, xy = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    variance_x, variance_y = _smoothed(x * x) - xx, _smoothed(y * y) - yy
    covariance = _smoothed(x * y) - xy
    luminance = (2 * xy + _C1) / (xx + yy + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    similarity = luminance * structure
    return to_fixed(similarity, _SSIM_ONE).sum().double() / (_SSIM_ONE * similarity.numel())


def _smoothed(image: Tensor) -> Tensor:
    """Weighted means [C, H − 10, W − 10] of [C, H, W] under the window, by rows and by columns."""
    for dim in (1, 2):
        weights = _gaussian(image.shape[dim])
        length = image.shape[dim] - len(weights) + 1
        # Shifted sums, not a convolution: its kernels choose an order by size, threads and device.
        total = image.narrow(dim, 0, length) * weights[0]
        for offset, weight in enumerate(weights[1:], 1):
            total = total + image.narrow(dim, offset, length) * weight
        image = total
    return image


def _gaussian(side: int) -> list[float]:
    """Weights of the window along a side of so many pixels; they add up to 1."""
    half = (min(side, WINDOW) - 1) // 2
    weights = [math.exp(-(offset**2) / (2 * SIGMA**2)) for offset in range(-half, half + 1)]
    return [weight / math.fsum(weights) for weight in weights]
