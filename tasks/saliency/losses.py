"""Losses of salient object detection beside `criterion`."""

from collections.abc import Sequence

from torch import Tensor

from train_utils.losses import sum_of, supervised


def soft_iou_loss(inputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
    """1 − soft intersection over union, mean over images, summed over the outputs of a network.

    Each output adds the mean of 1 − (Σ p·t + 1) / (Σ p + Σ t − Σ p·t + 1), with p = σ(x) and sums
    over an image's pixels (Qin et al., "BASNet", CVPR 2019, eq. 6); the ones define it for an image
    without an object. inputs, target and result as of `criterion`.
    """
    outputs, target = supervised(inputs, target)

    def term(logits: Tensor) -> Tensor:
        p = logits.sigmoid()
        overlap, total = (p * target).flatten(1).sum(1), (p + target).flatten(1).sum(1)
        return (1 - (overlap + 1) / (total - overlap + 1)).mean()

    return sum_of(map(term, outputs))
