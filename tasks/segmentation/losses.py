"""Losses of semantic segmentation: the mean over the pixels that count, or over images.

logits: [B, C, h, w]; where the target has another size they are resized to it bilinearly.
target: class indices, uint8 [B, 1, H, W] or [B, H, W]; IGNORE marks pixels that do not count.
class_weights: one per class; a pixel of class y weighs w_y in sum and mean alike. None: all 1.
All return a 0-dim tensor, at least fp32 whatever the autocast dtype, 0 where nothing counts; all
raise ValueError for shapes that do not pair up and, on CPUs, for a label that is no class: on a
GPU, looking would make the host wait (`label_counts` sees the same labels before they go there).
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from transforms import IGNORE


def label_counts(target: Tensor, num_classes: int) -> Tensor:
    """Pixels of each class in a map of class indices on the CPU, int64 [num_classes].

    Raises ValueError naming a label that is neither a class nor IGNORE.
    """
    counts = torch.bincount(target.flatten(), minlength=256)
    others = counts[num_classes:IGNORE].nonzero()
    if len(others):
        raise ValueError(
            f"label {int(others[0]) + num_classes}: classes are 0 to {num_classes - 1}, and "
            f"{IGNORE} is ignored"
        )
    return counts[:num_classes]


def pixel_cross_entropy(
    logits: Tensor, target: Tensor, class_weights: Sequence[float] | None = None
) -> Tensor:
    """Softmax cross-entropy, the weighted mean over pixels of −log p_y: Σ −w_y·log p_y / Σ w_y."""
    scores, labels, weights = _scored_pixels(logits, target, class_weights)
    return _weighted_mean(-_log_p(scores, labels), weights)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    class_weights: Sequence[float] | None = None,
    alpha: float = 0.5,
    gamma: float = 2.0,
) -> Tensor:
    """The weighted mean of −α·(1 − p_y)^γ·log p_y (Lin et al., "Focal Loss", ICCV 2017)."""
    scores, labels, weights = _scored_pixels(logits, target, class_weights)
    log_p = _log_p(scores, labels)
    # 1 − p, kept off 0, where the power's slope would be infinite for γ < 1.
    rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps)
    return _weighted_mean(-alpha * rest**gamma * log_p, weights)


def one_hot_cross_entropy(
    logits: Tensor, target: Tensor, class_weights: Sequence[float] | None = None
) -> Tensor:
    """Binary cross-entropy of each class's logits against its one-hot mask, the classes' mean.

    The weighted mean over pixels of (1/C)·Σ_c BCE(σ(x_c), [y = c]).
    """
    scores, labels, weights = _scored_pixels(logits, target, class_weights)
    one_hot = _one_hot(labels, scores)
    terms = F.binary_cross_entropy_with_logits(scores, one_hot, reduction="none")
    return _weighted_mean(terms.mean(1, keepdim=True), weights)


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 − the mean over classes of (2·Σ p·g + s) / (Σ p + Σ g + s), mean over images.

    p: softmax probabilities, g: one-hot mask, Σ over the image's pixels that count (Milletari et
    al., "V-Net", 3DV 2016, with plain sums below). The mean is over the classes that the image's
    mask holds: the term of any other is next to 0 whatever is predicted, and of 21 classes of which
    an image shows two, it would make nine tenths of the loss a constant. Of each image by itself,
    so that a batch can be shared out over processes exactly; images in which no pixel counts are
    left out of the mean.
    """
    scores, labels, valid = _scored_pixels(logits, target, None)
    p, g = scores.softmax(1) * valid, _one_hot(labels, scores) * valid
    overlap, total, size = (values.sum((2, 3)) for values in (p * g, p + g, g))  # [B, C]
    there = (size > 0).to(p.dtype)
    terms = (2 * overlap + smooth) / (total + smooth) * there
    counted = valid.amax((1, 2, 3))  # [B]
    losses = counted - terms.sum(1) / there.sum(1).clamp(min=1)
    return losses.sum() / counted.sum().clamp(min=1)


def _scored_pixels(
    logits: Tensor, target: Tensor, class_weights: Sequence[float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the target's size, class indices int64 [B, 1, H, W], and the pixels' weights.

    Ignored pixels have weight 0 and class 0.
    """
    target = target.unsqueeze(1) if target.dim() == 3 else target
    if target.dtype != torch.uint8:
        raise ValueError(f"target: {target.dtype} instead of uint8 class indices")
    if logits.dim() != 4 or target.shape[:2] != (len(logits), 1):
        raise ValueError(
            f"logits {list(logits.shape)} and target {list(target.shape)} do not pair up: give "
            "[B, C, h, w] and [B, 1, H, W]"
        )
    if target.device.type == "cpu":
        label_counts(target, logits.shape[1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype)
    if scores.shape[-2:] != target.shape[-2:]:
        size = target.shape[-2:]
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    num_classes = logits.shape[1]
    weights = tuple(class_weights) if class_weights is not None else (1.0,) * num_classes
    index = target.long()
    weight = _weight_table(weights, num_classes, dtype, target.device)[index]
    return scores, index.masked_fill(index == IGNORE, 0), weight


@lru_cache  # uploading the table anew in every step would stall a GPU's queue
def _weight_table(
    class_weights: tuple[float, ...], num_classes: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Weight of each uint8 label, [256]: 0 where it is no class."""
    if len(class_weights) != num_classes:
        raise ValueError(f"{len(class_weights)} class weights for {num_classes} classes")
    padding = [0.0] * (256 - num_classes)
    with torch.inference_mode(False):  # evaluation may come first, and training needs it too
        return torch.tensor([*class_weights, *padding], dtype=dtype, device=device)


def _one_hot(labels: Tensor, scores: Tensor) -> Tensor:
    classes = torch.arange(scores.shape[1], device=scores.device)
    return (labels == classes[:, None, None]).to(scores.dtype)


def _log_p(scores: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each pixel's class, [B, 1, H, W]."""
    return scores.log_softmax(1).gather(1, labels)


def _weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total > 0, total, 1)  # 0/1, not 0/0
