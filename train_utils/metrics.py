"""Metrics with the same bits for any order, batch size, thread and number of processes.

Sums of floats depend on their order, sums of integers do not. So a metric's whole state is one
int64 tensor: counters, and per-image values in fixed point with `FRACTION_BITS` binary places. Each
image's value is rounded once, by at most 2⁻⁴⁵ (3e-14); all that follows, over batches, threads and
ranks, is exact. Scores are at most 1 per image, so a state holds `MAX_IMAGES` (half a million).

Predictions and masks: uint8 codes mean code/255, bool 0/1, floats are used as they are. Values that
are not finite or leave [0, 1] make the score nan, never a number that only looks valid.
Nothing in an update waits for the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from train_utils.activity import waiting
from train_utils.collectives import collective_device, is_dist_avail_and_initialized
from train_utils.errors import UserError, described
from train_utils.losses import unit_values

Images = Tensor | Sequence[Tensor]
Finish = Callable[[Tensor], Tensor]

FRACTION_BITS = 44
MAX_IMAGES = 2 ** (63 - FRACTION_BITS) - 1
MAX_PIXELS = 2**28
PIXEL_ONE = 255 * 2**27  # fixed-point 1 of a pixel: 8-bit codes are exact, MAX_PIXELS of them fit
_SLACK = 1e-6  # by which rounding in an interpolation may overshoot [0, 1]
BETA2 = 0.3


class ExactMetric(ABC):
    """An average over images whose state is one int64 tensor that merges by addition.

    state: [images, images with invalid values, the metric's own sums ...]. A metric whose values
    can exceed 1 per image chooses fewer `fraction_bits`, so that its sums still fit. `on_host`: it
    computes on the CPU whatever it is given, and so on threads beside a device. `invalid`: what
    an invalid image has, for messages.
    """

    name: str
    num_sums: int
    fraction_bits = FRACTION_BITS
    on_host = False
    invalid = "values not finite or outside [0, 1]"

    def __init__(self) -> None:
        self.state = torch.zeros(2 + self.num_sums, dtype=torch.int64)
        self.reduced = False

    @abstractmethod
    def sample_state(self, pred: Tensor, gt: Tensor) -> Tensor:
        """State of one image, without side effects: for threads that leave the adding to another.

        pred, gt: [1, H, W] or [H, W], of any two sizes; the prediction is resized to the mask.
        """

    @abstractmethod
    def compute(self) -> float | dict[str, float]:
        """The score over all images so far; nan for none, or if any held invalid values."""

    def scores(self) -> dict[str, float]:
        """`compute` by name, as it is logged and written."""
        result = self.compute()
        return result if isinstance(result, dict) else {self.name: result}

    def remarks(self) -> list[str]:
        """What a reader of the scores must know, e.g. which classes were left out of a mean."""
        return []

    def update(self, pred: Images, gt: Images) -> None:
        """Add a batch, which may be empty.

        pred, gt: [B, 1, H, W], [B, H, W], or a list of [1, H, W] whose sizes may differ.
        Raises ValueError if they do not pair up.
        """
        if len(pred) != len(gt):
            raise ValueError(f"{len(pred)} predictions for {len(gt)} masks")
        for one_pred, one_gt in zip(pred, gt, strict=True):
            contribution = self.sample_state(one_pred, one_gt)
            self.state = self.state.to(contribution.device)
            self.merge(contribution)

    def merge(self, other_state: Tensor) -> None:
        """Add another metric's `state`, or a `sample_state`.

        Raises RuntimeError after a reduction: what it adds would be on this process alone.
        """
        if self.reduced:
            raise RuntimeError(f"{self.name} is already summed over processes: reset() it first")
        if other_state.shape != self.state.shape or other_state.dtype != torch.int64:
            raise ValueError(f"not a state of {type(self).__name__}: {list(other_state.shape)}")
        # Out of place, as a tensor from inference mode may not be changed outside of it.
        self.state = self.state + other_state.to(self.state.device)

    def reset(self) -> None:
        self.state = torch.zeros_like(self.state)
        self.reduced = False

    def reduce_from_all_processes(self) -> None:
        """Sum the state over all processes, once: see `reduce_metrics`."""
        reduce_metrics([self])

    gather_from_all_processes = reduce_from_all_processes

    @property
    def count(self) -> int:
        """Number of images."""
        return int(self.state[0])

    def __str__(self) -> str:
        result = self.compute()
        scores = result if isinstance(result, dict) else {self.name: result}
        text = ", ".join(f"{name}: {score:.4f}" for name, score in scores.items())
        return text + "".join(f" ({remark})" for remark in self.invalid_images())

    def invalid_images(self) -> list[str]:
        """A remark on images whose values are invalid, if there are any."""
        count, invalid = self.state[:2].tolist()
        return [f"{invalid} of {count} images have {self.invalid}"] if invalid else []

    def _averages(self) -> Tensor:
        """The fixed-point sums as fp64 averages over images, on the CPU."""
        state = self.state.cpu()
        count, invalid = state[:2].tolist()
        if count > MAX_IMAGES:
            raise OverflowError(f"{self.name}: {count} images, but only {MAX_IMAGES} fit a state")
        if count == 0 or invalid:
            return torch.full((self.num_sums,), torch.nan, dtype=torch.float64)
        return state[2:].double() / 2**self.fraction_bits / count


def reduce_metrics(metrics: Iterable[ExactMetric], stop: bool = False) -> bool:
    """Sum the states of several metrics over all processes in one collective.

    `stop` goes with them: returns whether it was true on any process.

    Every process must call it with the same metrics, also those that saw no image. Metrics that are
    reduced already are passed over; without a process group nothing happens.
    """
    pending = [metric for metric in metrics if not metric.reduced]
    if not pending or not is_dist_avail_and_initialized():
        return stop
    device = collective_device()
    states = [metric.state.to(device) for metric in pending]
    total = torch.cat([*states, torch.tensor([int(stop)], device=device)])
    with waiting("adding up the scores"):
        dist.all_reduce(total)
        *parts, stops = total.split([*map(len, states), 1])
        stopped = bool(stops)  # where the sum was only queued, the host waits here
    for metric, part in zip(pending, parts, strict=True):
        metric.state = part.to(metric.state.device)
        metric.reduced = True
    return stopped


def all_scores(metrics: Iterable[ExactMetric]) -> dict[str, float]:
    """The scores of several metrics by name. Raises UserError for a name that two of them give."""
    scores: dict[str, float] = {}
    for metric in metrics:
        own = metric.scores()
        if twice := own.keys() & scores.keys():
            raise UserError(f"two metrics are called {min(twice)!r}. Give one another name.")
        scores |= own
    return scores


def all_remarks(metrics: Iterable[ExactMetric]) -> list[str]:
    """The remarks of several metrics."""
    return [
        remark
        for metric in metrics
        for remark in (*(f"{metric.name}: {x}" for x in metric.invalid_images()), *metric.remarks())
    ]


class MeanAbsoluteError(ExactMetric):
    """Mean over images of the mean |prediction − mask|; grey masks count with their grey value.

    finish: what becomes of each prediction, fp64 [H, W] of the mask's size, before it is scored.
    A pixel's difference is rounded by at most 1.5e-11; among 8-bit codes it is exact.
    """

    name = "MAE"
    num_sums = 1

    def __init__(self, finish: Finish | None = None) -> None:
        super().__init__()
        self.finish = finish

    def sample_state(self, pred: Tensor, gt: Tensor) -> Tensor:
        pred, gt, valid = scored_pair(pred, gt, self.finish)
        total = to_fixed((pred - gt).abs_(), PIXEL_ONE).sum()
        return pack_state(valid, mean_of_fixed(total, gt.numel()))

    def compute(self) -> float:
        return self._averages().item()


class ImageMean(ExactMetric):
    """The mean over images of a function of prediction and mask: a score of one's own in a line.

    function: (prediction, mask), fp64 [H, W] each, in [0, 1] and of the mask's size → a number
    (a 0-dim tensor, on the same device). Each image's is rounded by at most 3e-8. Not finite, or
    beyond ±10⁶: the score is nan. Raises UserError where the function returns no number.
    """

    invalid = f"{ExactMetric.invalid}, or a function's number not finite or beyond ±10⁶"
    num_sums = 1
    fraction_bits = 24
    largest = 10**6

    def __init__(self, name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.name, self.function = name, function
        super().__init__()

    def sample_state(self, pred: Tensor, gt: Tensor) -> Tensor:
        pred, gt, valid = scored_pair(pred, gt)
        value = self.function(pred, gt)
        if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)):
            raise UserError(
                f"{self.name}: its function returned {described(value)}. Return one number of each "
                "image, such as (prediction - mask).abs().mean()."
            )
        value = torch.as_tensor(value, device=pred.device).detach().double()
        sound = value.abs() <= self.largest  # not of nan
        fixed = to_fixed(torch.where(sound, value, 0), 2**self.fraction_bits)
        return pack_state(valid & sound, fixed)

    def compute(self) -> float:
        return self._averages().item()


class FCurves(NamedTuple):
    """Curves over thresholds that fall from 254/255 to 0; fp64 [255] each."""

    precision: Tensor
    recall: Tensor
    f: Tensor


class PixelCounts(NamedTuple):
    """Pixels of all images at each threshold, from 254/255 down to 0; int64 [255] each."""

    true_positives: Tensor
    false_positives: Tensor
    true_negatives: Tensor
    false_negatives: Tensor


class F1Score(ExactMetric):
    """maxF1 (β² = 0.3): the best F over thresholds, of precision and recall averaged over images.

    A pixel is positive where the mask is > 0.5, and found where the prediction reaches the
    threshold. Bins are those of `torch.histc(prediction, 255, 0, 1)`.
    finish: as for MeanAbsoluteError.
    """

    name = "maxF1"
    bins = 255
    num_sums = 4 * bins  # precision, recall (fixed point); found and wrongly found pixels (counts)

    def __init__(self, finish: Finish | None = None) -> None:
        super().__init__()
        self.finish = finish

    def sample_state(self, pred: Tensor, gt: Tensor) -> Tensor:
        pred, gt, valid = scored_pair(pred, gt, self.finish)
        # In fp32, as histc does, so that code/255 lands in the bin of its code; 1 in the last one.
        index = pred.float().mul_(self.bins).long()
        tp, fp = map(at_or_above, count_by_bin(index, gt > 0.5, self.bins))
        precision = tp.double() / (tp.double() + fp + 1e-4)
        recall = tp.double() / (tp[-1].double() + 1e-4)
        return pack_state(valid, to_fixed(precision), to_fixed(recall), tp, fp)

    def curves(self) -> FCurves:
        """Averaged precision and recall, and the F of both, whose maximum is the score."""
        precision, recall = self._averages()[: 2 * self.bins].split(self.bins)
        f = (1 + BETA2) * precision * recall / (BETA2 * precision + recall + 1e-8)
        return FCurves(precision, recall, f)

    def pixel_counts(self) -> PixelCounts:
        """What a precision-recall plot over all pixels needs; invalid images are left out."""
        tp, fp = self.state[2 + 2 * self.bins :].cpu().split(self.bins)
        return PixelCounts(tp, fp, fp[-1] - fp, tp[-1] - tp)

    def compute(self) -> float:
        return self.curves().f.max().item()


def prediction_at(pred: Tensor, size: Sequence[int], finish: Finish | None = None) -> Tensor:
    """A map [h, w] as it is scored: resized to `size`, fp64, finished.

    The one place that makes this of a prediction, for the metrics and for predict.py alike.
    """
    pred = unit_values(resize_prediction(pred, size), torch.float64)
    return finish(pred) if finish else pred


def scored_pair(
    pred: Tensor, gt: Tensor, finish: Finish | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction and mask as fp64 [H, W] of the mask's size, and whether both lie in [0, 1]."""
    pred, gt = single_map(pred), single_map(gt)
    gt = unit_values(gt.to(pred.device), torch.float64)
    pred = prediction_at(pred, gt.shape, finish)
    return pred, gt, lies_in_unit_range(pred) & lies_in_unit_range(gt)


def single_map(values: Tensor) -> Tensor:
    plane = values.detach()
    if plane.dim() == 3 and plane.shape[0] == 1:
        plane = plane[0]
    if plane.dim() != 2 or not 0 < plane.numel() <= MAX_PIXELS:
        raise ValueError(
            f"{list(values.shape)} is not one map: give [1, H, W] of 1 to {MAX_PIXELS} pixels"
        )
    return plane


def resize_prediction(pred: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a map [h, w] to `size` bilinearly (corners not aligned, fp32) if its size differs."""
    if pred.shape == tuple(size):
        return pred
    batch = unit_values(pred)[None, None]
    return F.interpolate(batch, size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def lies_in_unit_range(values: Tensor) -> Tensor:
    low, high = values.aminmax()  # both nan if any value is
    return (low >= -_SLACK) & (high <= 1 + _SLACK)


def to_fixed(values: Tensor, one: float = 2**FRACTION_BITS) -> Tensor:
    return (values * one).round_().long()


def mean_of_fixed(total: Tensor, pixels: int) -> Tensor:
    """Turn a sum over pixels in units of 1/PIXEL_ONE into a mean with FRACTION_BITS."""
    return to_fixed(total.double(), 2**FRACTION_BITS / (pixels * PIXEL_ONE))


def count_by_bin(index: Tensor, positive: Tensor, bins: int) -> Tensor:
    """Histograms [2, bins] of positive and other pixels; indices beyond go to the end bins.

    scatter_add_ of integers is exact, and unlike bincount does not make the host wait for a GPU.
    """
    key = index.clamp_(0, bins - 1).add_(~positive, alpha=bins).flatten()
    histogram = torch.zeros(2 * bins, dtype=torch.int64, device=key.device)
    return histogram.scatter_add_(0, key, torch.ones_like(key)).view(2, bins)


def at_or_above(counts: Tensor) -> Tensor:
    """Sums of a histogram [bins] from the highest bin down to each."""
    return counts.flip(0).cumsum(0)


def pack_state(valid: Tensor, *sums: Tensor) -> Tensor:
    """One image's state; of an invalid image only the counters are kept."""
    counters = torch.stack([torch.ones_like(valid), ~valid]).long()
    values = torch.cat([part.reshape(-1) for part in sums])
    return torch.cat([counters, torch.where(valid, values, 0)])
