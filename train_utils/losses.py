"""Losses: pure functions of network outputs and targets, normalised by global counts."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # the class index of pixels that count in no loss and no score


def unit_values(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Masks and maps as numbers of `dtype`: uint8 codes mean code/255, bool 0/1, floats themselves.

    Raises TypeError for any other dtype, since nobody could tell which scale it has.
    """
    if values.dtype == torch.uint8:
        # A product, because a GPU replaces the quotient by one: so all devices agree to the bit.
        return values.to(dtype) * (1 / 255)
    if values.dtype == torch.bool or values.is_floating_point():
        return values.to(dtype)
    raise TypeError(f"{values.dtype} has no agreed scale: give uint8 (0..255), bool or float")


def criterion(
    inputs: Tensor | Sequence[Tensor], target: Tensor, count: float | Tensor | None = None
) -> Tensor:
    """Binary cross-entropy on logits, summed over the outputs of a deeply supervised network.

    Each output adds (Σ over pixels of −t·log σ(x) − (1−t)·log(1 − σ(x))) / count with weight 1
    (Qin et al., "U²-Net", Pattern Recognition 2020, eq. 1 and 2).

    inputs: logits [B, 1, H, W], or a list of them. target: same shape; see `unit_values`.
    count: what the sums are divided by, > 0; by default the number of target's pixels, which makes
    each term a mean. Under DistributedDataParallel, which averages gradients over processes, pass
    (pixels of the global batch) / world_size: then every pixel weighs the same however unevenly
    the batch is shared out.

    Returns a 0-dim tensor, at least fp32 whatever the autocast dtype; an empty batch gives 0 with
    zero gradients. Raises ValueError when an output and the target differ in shape.
    """
    outputs, target = _supervised(inputs, target)
    terms = [
        F.binary_cross_entropy_with_logits(logits, target, reduction="sum") for logits in outputs
    ]
    return torch.stack(terms).sum() / (max(target.numel(), 1) if count is None else count)


def soft_iou_loss(
    inputs: Tensor | Sequence[Tensor], target: Tensor, count: float | Tensor | None = None
) -> Tensor:
    """1 − soft intersection over union of each image, summed over the outputs of a network.

    Each output adds (Σ over images of 1 − (Σ p·t + 1) / (Σ p + Σ t − Σ p·t + 1)) / count, with
    p = σ(x), sums over the image's pixels (Qin et al., "BASNet", CVPR 2019, eq. 6), and the ones
    to define it for an image without an object.

    inputs, target: as `criterion`. count: by default the number of images; under
    DistributedDataParallel (images of the global batch) / world_size.

    Returns a 0-dim tensor, at least fp32; an empty batch gives 0 with zero gradients.
    """
    outputs, target = _supervised(inputs, target)
    terms = []
    for logits in outputs:
        p = logits.sigmoid()
        overlap, total = (p * target).flatten(1).sum(1), (p + target).flatten(1).sum(1)
        terms.append((1 - (overlap + 1) / (total - overlap + 1)).sum())
    return torch.stack(terms).sum() / (max(len(target), 1) if count is None else count)


def _supervised(inputs: Tensor | Sequence[Tensor], target: Tensor) -> tuple[list[Tensor], Tensor]:
    """Logits and their common target, at least fp32; ValueError where their shapes differ."""
    outputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not outputs:
        raise ValueError("no outputs: give logits or a list of logits")
    for logits in outputs:
        if logits.shape != target.shape:
            raise ValueError(
                f"logits {list(logits.shape)} and target {list(target.shape)} differ in shape: "
                "resize one to the other before the loss"
            )
    dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    return [logits.to(dtype) for logits in outputs], unit_values(target, dtype)


# -- semantic segmentation ------------------------------------------------------------------------
#
# logits: [B, C, h, w]; where the target has another size they are resized to it bilinearly.
# target: class indices, uint8 [B, 1, H, W] or [B, H, W]; IGNORE marks pixels that do not count.
# class_weights: one per class; a pixel of class y weighs w_y in sum and count alike. None: all 1.
# count: what the sum is divided by, see each loss and `criterion`; by default this batch's own. A
# batch in which nothing counts, or an empty one, gives 0 with zero gradients.
# All return a 0-dim tensor, at least fp32 whatever the autocast dtype; all raise ValueError for
# shapes that do not pair up and, on CPUs, for a label that is no class: on a GPU, looking would
# make the host wait (`label_counts` sees the same labels before they go there).


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
    logits: Tensor,
    target: Tensor,
    count: float | Tensor | None = None,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Softmax cross-entropy: Σ −w_y·log p_y / count; count: Σ w_y over the pixels that count."""
    scores, labels, weights = _scored_pixels(logits, target, class_weights)
    log_p = scores.log_softmax(1).gather(1, labels)
    return _share(-log_p * weights, weights, count)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    count: float | Tensor | None = None,
    class_weights: Sequence[float] | None = None,
    alpha: float = 0.5,
    gamma: float = 2.0,
) -> Tensor:
    """Σ −w_y·α·(1 − p_y)^γ·log p_y / count (Lin et al., "Focal Loss", ICCV 2017); count: Σ w_y."""
    scores, labels, weights = _scored_pixels(logits, target, class_weights)
    log_p = scores.log_softmax(1).gather(1, labels)
    # 1 − p, kept off 0, where the power's slope would be infinite for γ < 1.
    rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps)
    return _share(-alpha * rest**gamma * log_p * weights, weights, count)


def one_hot_cross_entropy(
    logits: Tensor,
    target: Tensor,
    count: float | Tensor | None = None,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Binary cross-entropy of each class's logits against its one-hot mask, the classes' mean.

    Σ w_y·(1/C)·Σ_c BCE(σ(x_c), [y = c]) / count; count: Σ w_y over the pixels that count.
    """
    scores, labels, weights = _scored_pixels(logits, target, class_weights)
    one_hot = _one_hot(labels, scores)
    terms = F.binary_cross_entropy_with_logits(scores, one_hot, reduction="none")
    return _share(terms.mean(1, keepdim=True) * weights, weights, count)


def dice_loss(
    logits: Tensor,
    target: Tensor,
    count: float | Tensor | None = None,
    smooth: float = 1e-5,
) -> Tensor:
    """Σ over images of (1 − the mean of (2·Σ p·g + s) / (Σ p + Σ g + s)) / count.

    p: softmax probabilities, g: one-hot mask, Σ over the image's pixels that count (Milletari et
    al., "V-Net", 3DV 2016, with plain sums below). The mean is over the classes that the image's
    mask holds: the term of any other is next to 0 whatever is predicted, and of 21 classes of which
    an image shows two, it would make nine tenths of the loss a constant. Of each image by itself,
    so that a batch can be shared out over processes exactly.
    count: images with pixels that count.
    """
    scores, labels, valid = _scored_pixels(logits, target, None)
    p, g = scores.softmax(1) * valid, _one_hot(labels, scores) * valid
    overlap, total, size = (values.sum((2, 3)) for values in (p * g, p + g, g))  # [B, C]
    there = (size > 0).to(p.dtype)
    terms = (2 * overlap + smooth) / (total + smooth) * there
    counted = valid.amax((1, 2, 3))  # [B]
    losses = counted - terms.sum(1) / there.sum(1).clamp(min=1)
    return losses.sum() / (_own_count(counted) if count is None else count)


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


def _share(losses: Tensor, weights: Tensor, count: float | Tensor | None) -> Tensor:
    """Weighted pixel losses [B, 1, H, W] summed, over `count`."""
    return losses.sum() / (_own_count(weights) if count is None else count)


def _own_count(parts: Tensor) -> Tensor:
    total = parts.sum()
    return torch.where(total > 0, total, 1)  # where nothing counts, the sum is 0: 0/1, not 0/0


# --- image translation --------------------------------------------------------------------------


def least_squares_gan(logits: Tensor, label: float, count: float) -> Tensor:
    """Least-squares GAN term: Σ over images of the mean (logit − label)², divided by `count`.

    Mao et al., "Least Squares Generative Adversarial Networks", ICCV 2017, with labels 1 (real) and
    0 (fake). logits: [B, 1, h, w], a map of any size. count: images, divided by the processes where
    DistributedDataParallel averages over them (see `criterion`).
    At least fp32; an empty batch gives 0 with zero gradients.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits - label).square().flatten(1).mean(dim=1).sum() / count


def l1_term(prediction: Tensor, target: Tensor, count: float) -> Tensor:
    """Σ over images of the mean |prediction − target|, divided by `count`, the number of images.

    Both [B, C, H, W]; at least fp32; an empty batch gives 0 with zero gradients. Raises ValueError
    if the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {list(prediction.shape)} and target {list(target.shape)} differ in shape"
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    difference = prediction.to(dtype) - target.to(dtype)
    return difference.abs().flatten(1).mean(dim=1).sum() / count


# -- image matting --------------------------------------------------------------------------------
#
# Xu et al., "Deep Image Matting", CVPR 2017, section 4.1. predicted, alpha: [B, 1, H, W] in [0, 1];
# colours: [B, 3, H, W]; see `unit_values` for uint8. unknown: bool [B, 1, H, W], the pixels that
# count. count: how many those are, as in `criterion`; by default in this batch. A batch without
# any, or an empty one, gives 0 with zero gradients. Both return a 0-dim tensor, at least fp32.

MATTING_EPSILON = 1e-6


def alpha_prediction_loss(
    predicted: Tensor, alpha: Tensor, unknown: Tensor, count: float | Tensor | None = None
) -> Tensor:
    """Σ √((α̂ − α)² + ε²) / count over the unknown pixels (eq. 1); ε = 1e-6, also beside a count
    that is the batch's own.
    """
    _require_shape(predicted, alpha, unknown)
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return _mean_of_unknown(predicted.to(dtype) - unit_values(alpha, dtype), unknown, count)


def compositional_loss(
    predicted: Tensor,
    foreground: Tensor,
    background: Tensor,
    image: Tensor,
    unknown: Tensor,
    count: float | Tensor | None = None,
) -> Tensor:
    """The same of α̂F + (1 − α̂)B against the image, on colours in [0, 1].

    A pixel counts once, with the mean over its three channels: the loss has the scale of the
    alpha-prediction loss.
    """
    _require_shape(predicted, unknown)
    _require_shape(foreground, background, image)
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    fg, bg, truth = (unit_values(colours, dtype) for colours in (foreground, background, image))
    return _mean_of_unknown(torch.lerp(bg, fg, predicted.to(dtype)) - truth, unknown, count)


def _mean_of_unknown(
    difference: Tensor, unknown: Tensor, count: float | Tensor | None = None
) -> Tensor:
    distance = (difference**2 + MATTING_EPSILON**2).sqrt().mean(1, keepdim=True)
    total = (distance * unknown).sum()
    # A given count is never 0, and divides as it is: an ε beside it would weigh more or less with
    # the number of processes that the count is divided by.
    return total / (unknown.sum() + MATTING_EPSILON if count is None else count)


def _require_shape(*tensors: Tensor) -> None:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"shapes differ: {', '.join(map(str, sorted(shapes)))}")
