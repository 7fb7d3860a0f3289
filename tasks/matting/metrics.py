"""Scores of alpha mattes on the unknown region, with the same bits however they are computed.

SAD, MSE, Grad and Conn are those of Rhemann et al., "A Perceptually Motivated Online Benchmark for
Image Matting", CVPR 2009, with the constants of the benchmark's evaluation code. What is scored is
`finish_alpha`; the true alpha is taken as it is, also where it contradicts the trimap.

After the resizing everything is fp64 numpy on the CPU: per pixel a fixed order of single operations
that IEEE 754 defines to the bit, and sums over pixels are sums of integers (see `_sum`), as are
those over images (see `ExactMetric`). So no number of threads, processes or batches changes a bit.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from train_utils.losses import unit_values
from train_utils.metrics import (
    ExactMetric,
    lies_in_unit_range,
    pack_state,
    resize_prediction,
    single_map,
    to_fixed,
)
from transforms import BACKGROUND, FOREGROUND

EPSILON = 1e-6  # of the alpha-prediction loss
# Scores in the order of the state, each with a bound that no image of MAX_PIXELS exceeds: the state
# holds their ratio, rounded by 2⁻⁴⁵. So Grad is rounded by 2.4e-7, and SAD and Conn by 1.5e-8.
_BOUNDS = {"loss": 1, "SAD": 2**19, "MSE": 1, "Grad": 2**23, "Conn": 2**19}
_MAX_GRADIENT_ERROR = 16  # squared difference of gradient magnitudes, for alphas in [0, 1]
_SIGMA = 1.4
_STEPS = 10  # thresholds 0.1, 0.2 … 1 of the connectivity
_NEAR = 0.15  # distances to the connected level below it do not count


class MattingMetrics(ExactMetric):
    """Averages over images of the scores on the unknown region, all 0 for the true alpha.

    loss: mean of √((α̂ − α)² + ε²), the alpha-prediction loss (Xu et al., "Deep Image Matting",
    CVPR 2017), ε for a perfect matte. SAD: Σ |α̂ − α| / 1000. MSE: mean of (α̂ − α)². Grad, Conn:
    `gradient_errors` and `connectivity_errors`, each summed / 1000.

    Images without unknown pixels have no score: they are left out of the averages and named by
    `remarks`, with `policy`, the text that says where the trimaps come from.
    """

    name = "matting"
    invalid = "an alpha not finite or outside [0, 1]"
    on_host = True
    num_sums = len(_BOUNDS) + 1  # the last one counts the images that are left out

    def __init__(self, policy: str = "") -> None:
        super().__init__()
        self.policy = policy

    def sample_state(self, prediction: Tensor, target: Tensor) -> Tensor:
        """State of one image, on the CPU.

        prediction: alpha [1, h, w] or [h, w]. target: uint8 [2, H, W], true alpha and trimap.
        """
        prediction, (truth, trimap) = prediction.detach().cpu(), target.detach().cpu()
        valid = lies_in_unit_range(unit_values(prediction))
        unknown = (trimap != BACKGROUND) & (trimap != FOREGROUND)
        if not (valid and unknown.any()):
            left_out = (~unknown.any()).long()
            return pack_state(valid, torch.zeros(len(_BOUNDS), dtype=torch.int64), left_out)
        alpha = finish_alpha(prediction, trimap).numpy()
        scores = _scores(alpha, unit_values(truth, torch.float64).numpy(), unknown.numpy())
        ratios = [scores[name] / bound for name, bound in _BOUNDS.items()]
        fixed = to_fixed(torch.tensor(ratios, dtype=torch.float64))
        return pack_state(valid, fixed, torch.tensor(0))

    def compute(self) -> dict[str, float]:
        """loss, SAD, MSE, Grad and Conn; nan without a scored image or with an invalid one."""
        averages = self._averages()
        left_out = int(self.state[-1])
        share = self.count / (self.count - left_out) if self.count > left_out else math.nan
        return {
            name: average * share * bound
            for (name, bound), average in zip(_BOUNDS.items(), averages.tolist(), strict=False)
        }

    def remarks(self) -> list[str]:
        """The images that are left out, and the trimaps' policy."""
        left_out = int(self.state[-1])
        remarks = [f"trimap policy: {self.policy}"] if self.policy else []
        if left_out:
            remarks.append(
                f"{left_out} of {self.count} images have no unknown pixels and are left out"
            )
        return remarks


def finish_alpha(prediction: Tensor, trimap: Tensor) -> Tensor:
    """A predicted alpha as it is scored and written: at the trimap's size, true to it, in 8 bits.

    prediction: alpha in [0, 1], [1, h, w] or [h, w], resized bilinearly, clamped, as the resizing
    may round beyond [0, 1], and rounded to whole 255ths. trimap: uint8 [1, H, W] or [H, W]; its
    background becomes 0 and its foreground 1. Returns fp64 [H, W] on the prediction's device.
    The one place that finishes a prediction, for the metrics and for predict.py alike.
    """
    if trimap.dtype != torch.uint8:
        raise TypeError(f"a trimap is uint8, not {trimap.dtype}")
    trimap = single_map(trimap).to(prediction.device)
    resized = resize_prediction(single_map(prediction), trimap.shape)
    alpha = (unit_values(resized, torch.float64).clamp(0, 1) * 255).round() / 255
    return alpha.masked_fill(trimap == BACKGROUND, 0).masked_fill(trimap == FOREGROUND, 1)


def _scores(alpha: np.ndarray, truth: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """Scores by name of two alphas, fp64 [H, W], where `unknown`, bool [H, W], is true."""
    difference = alpha[unknown] - truth[unknown]
    pixels = difference.size
    squares = difference * difference
    gradient = gradient_errors(alpha, truth)[unknown]
    return {
        "loss": _sum(np.sqrt(squares + EPSILON**2)) / pixels,
        "SAD": _sum(np.abs(difference)) / 1000,
        "MSE": _sum(squares) / pixels,
        "Grad": _sum(gradient / _MAX_GRADIENT_ERROR) * _MAX_GRADIENT_ERROR / 1000,
        "Conn": _sum(connectivity_errors(alpha, truth)[unknown]) / 1000,
    }


def _sum(values: np.ndarray) -> float:
    """Sum of values in [0, 1], each rounded by at most 2⁻³⁵ (3e-11); exact, so in any order.

    MAX_PIXELS (2²⁸) of them fit int64.
    """
    return int(np.rint(values * 2.0**34).astype(np.int64).sum()) / 2**34


# -- gradient error -------------------------------------------------------------------------------


def gradient_errors(alpha: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Squared differences of two alphas' gradient magnitudes; fp64 [H, W], all of them."""
    return (_gradient_magnitude(alpha) - _gradient_magnitude(truth)) ** 2


def _gradient_magnitude(plane: np.ndarray) -> np.ndarray:
    """|∇| by first-order Gaussian derivatives, borders replicated; fp64 [H, W]."""
    smooth, derivative = _gaussian_kernels()
    along_x = _convolve(_convolve(plane, smooth, axis=0), derivative, axis=1)
    along_y = _convolve(_convolve(plane, smooth, axis=1), derivative, axis=0)
    return np.sqrt(along_x * along_x + along_y * along_y)


@lru_cache
def _gaussian_kernels() -> tuple[list[float], list[float]]:
    """A Gaussian and its derivative, cut where the Gaussian falls below 1e-2, each of 2-norm 1.

    Their outer product is the evaluation code's kernel, normalised by √Σk².
    """
    half = math.ceil(_SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * _SIGMA * 1e-2)))
    smooth = [math.exp(-(x**2) / (2 * _SIGMA**2)) for x in range(-half, half + 1)]
    derivative = [-x * value for x, value in zip(range(-half, half + 1), smooth, strict=True)]
    return _normalised(smooth), _normalised(derivative)


def _normalised(kernel: list[float]) -> list[float]:
    norm = math.sqrt(math.fsum(value**2 for value in kernel))
    return [value / norm for value in kernel]


def _convolve(plane: np.ndarray, kernel: list[float], axis: int) -> np.ndarray:
    """True convolution (of a kernel of odd length) along one axis, the border replicated.

    Shifted additions rather than a library's convolution, whose order of addition is its own.
    """
    half = len(kernel) // 2
    padding = [(half, half) if i == axis else (0, 0) for i in range(2)]
    padded = np.moveaxis(np.pad(plane, padding, mode="edge"), axis, 0)
    length = plane.shape[axis]
    total = np.zeros_like(padded[:length])
    for offset, weight in enumerate(reversed(kernel)):
        total += weight * padded[offset : offset + length]
    return np.moveaxis(total, 0, axis)


# -- connectivity error ---------------------------------------------------------------------------


def connectivity_errors(alpha: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|φ(α̂) − φ(α)| of two alphas; fp64 [H, W].

    φ(v) = 1 − d·[d ≥ 0.15], where d = v − l, and l is the highest threshold 0, 0.1 … 1 up to which
    the pixel stays in the largest 4-connected component of the pixels where both alphas reach it.
    """
    level = _connected_steps(np.minimum(alpha, truth)) / _STEPS
    return np.abs(_disconnection(alpha - level) - _disconnection(truth - level))


def _disconnection(distance: np.ndarray) -> np.ndarray:
    return np.where(distance >= _NEAR, distance, 0)


def _connected_steps(plane: np.ndarray) -> np.ndarray:
    """Up to which of the thresholds 1/10 … 10/10 each pixel stays connected; int64 [H, W]."""
    # The slack is for the codes 51, 102 … 255, which are tenths, but maybe not to the last bit.
    reached = np.floor(plane * _STEPS + 1e-9)
    connected = np.ones(plane.shape, dtype=bool)
    steps = np.zeros(plane.shape, dtype=np.int64)
    for step in range(1, _STEPS + 1):
        connected &= largest_component(reached >= step)
        steps += connected
    return steps


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected component of a mask, bool [H, W]; empty if the mask is.

    Of several that are equally large, the one that comes first in reading order.
    """
    height, width = mask.shape
    # In rows that end with a gap, a run of pixels never reaches into the next row.
    flat = np.zeros((height, width + 1), dtype=np.int8)
    flat[:, :width] = mask
    edges = np.flatnonzero(np.diff(flat.ravel(), prepend=np.int8(0)))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return np.zeros_like(mask)
    root = _roots(*_touching_runs(starts, ends, width + 1), len(starts))
    sizes = np.bincount(root, weights=ends - starts)
    chosen = root == sizes.argmax()
    steps = np.zeros(flat.size, dtype=np.int8)
    steps[starts[chosen]] = 1
    steps[ends[chosen]] = -1
    return np.cumsum(steps, dtype=np.int8).reshape(flat.shape)[:, :width].astype(bool)


def _touching_runs(
    starts: np.ndarray, ends: np.ndarray, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (upper, lower) of runs in neighbouring rows that share a column, by number."""
    first = np.searchsorted(ends, starts + stride, side="right")
    last = np.searchsorted(starts, ends + stride, side="left")
    counts = last - first
    upper = np.repeat(np.arange(len(starts)), counts)
    position = np.arange(len(upper)) - np.repeat(np.cumsum(counts) - counts, counts)
    return upper, np.repeat(first, counts) + position


def _roots(one: np.ndarray, other: np.ndarray, count: int) -> np.ndarray:
    """For nodes 0 … count − 1 under the edges (one, other): the smallest node of each one's tree.

    In each round every root hooks onto its smallest neighbouring root, and all paths are halved
    until they are flat; edges within a tree drop out.
    """
    root = np.arange(count)
    while len(one):
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(root, above := root[root]):
            root = above
        one, other = root[one], root[other]
        apart = one != other
        one, other = one[apart], other[apart]
    return root
