"""Scores of saliency maps beside MAE and maxF1, and the stretching of maps ("post norm")."""

import torch
from torch import Tensor

from train_utils.metrics import (
    BETA2,
    PIXEL_ONE,
    ExactMetric,
    at_or_above,
    count_by_bin,
    mean_of_fixed,
    pack_state,
    scored_pair,
    to_fixed,
)


def stretched(saliency: Tensor) -> Tensor:
    """A map stretched to [0, 1]; one of a single value stays as it is."""
    low, high = saliency.aminmax()
    return torch.where(high > low, (saliency - low) / (high - low), saliency)


class ToolboxMetrics(ExactMetric):
    """Scores by the protocol of the field's common toolbox, comparable with published tables.

    The prediction is rounded to 8 bits, as a saved map would be, and stretched to [0, 1] unless it
    is constant; a pixel is salient where the mask's code is > 128. `compute` gives MAE; maxF and
    meanF of the F curve (β² = 0.3, thresholds 255 … 0) averaged over images; and adpF, the average
    F at each image's own threshold min(2 · mean, 1). An empty mask scores F = 0.
    Agrees to 1e-11 with github.com/lartpang/PySODMetrics.
    """

    name = "toolbox"
    codes = 256
    num_sums = 2 + codes  # MAE, adaptive F, F curve

    def sample_state(self, pred: Tensor, gt: Tensor) -> Tensor:
        pred, gt, valid = scored_pair(pred, gt)
        # All scores follow from how often each code occurs on and off the object.
        code, salient = (pred * 255).round_().long(), (gt * 255).round_() > 128
        on, off = counts = count_by_bin(code, salient, self.codes)
        value = _stretched_codes(on + off > 0)
        fixed = to_fixed(value, PIXEL_ONE)
        absolute_error = (on * (PIXEL_ONE - fixed) + off * fixed).sum()
        mean = ((on + off) * fixed).sum().double() / (gt.numel() * PIXEL_ONE)
        found = value >= (2 * mean).clamp(max=1)
        adaptive_f = _toolbox_f((on * found).sum(), (off * found).sum(), on.sum())
        # Truncated, not rounded, to 8 bits again: published numbers are made so.
        level = (value * 255).long().expand(2, -1)
        on, off = torch.zeros_like(counts).scatter_add_(1, level, counts)
        curve = _toolbox_f(at_or_above(on), at_or_above(off), on.sum())
        return pack_state(
            valid,
            mean_of_fixed(absolute_error, gt.numel()),
            to_fixed(adaptive_f),
            to_fixed(curve),
        )

    def compute(self) -> dict[str, float]:
        mae, adaptive, *_ = averages = self._averages()
        curve = averages[2:]
        scores = {"MAE": mae, "maxF": curve.max(), "meanF": curve.mean(), "adpF": adaptive}
        return {name: score.item() for name, score in scores.items()}

    def scores(self) -> dict[str, float]:
        return {f"{self.name}/{name}": score for name, score in self.compute().items()}


def _stretched_codes(present: Tensor) -> Tensor:
    """The value in [0, 1] of each of 256 codes, such that those present span all of it."""
    code = torch.arange(256, dtype=torch.float64, device=present.device)
    # The toolbox's arithmetic step by step, since it truncates the result: a true quotient, which
    # a GPU takes only for a tensor divisor.
    value = code / torch.full_like(code, 255)
    low = torch.where(present, value, 1).amin()
    high = torch.where(present, value, 0).amax()
    stretched = torch.where(high > low, (value - low) / (high - low), value)
    return torch.where(present, stretched, 0)


def _toolbox_f(tp: Tensor, fp: Tensor, positives: Tensor) -> Tensor:
    precision = tp.double() / (tp + fp).clamp(min=1)
    recall = tp.double() / positives.clamp(min=1)
    product = precision * recall
    denominator = torch.where(product > 0, BETA2 * precision + recall, 1)
    return (1 + BETA2) * product / denominator
