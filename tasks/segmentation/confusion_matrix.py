"""Segmentation scores from one confusion matrix, the same bits for any order and any processes."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from train_utils.metrics import ExactMetric, pack_state
from transforms import IGNORE

MAX_IMAGES = 2**20
_MAX_LOSS = 2.0**12  # of one image: MAX_IMAGES of them fit a state


class ConfusionMatrix(ExactMetric):
    """IoU, recall, precision, accuracy and loss of class maps, over all pixels of all images.

    Pixels are counted by (true class, predicted class); those that are IGNORE in the mask do not
    count. Of class c, IoU = TP / (TP + FP + FN), recall = TP / (TP + FN) and precision =
    TP / (TP + FP), 0 where the class is never predicted. mIoU, mPA (mean pixel accuracy: recall)
    and precision are means over the classes that occur in the masks; a class that does not is left
    out, even where it is predicted (which costs the other classes their IoU), and named in
    `remarks`. accuracy is the share of right pixels. An image with a logit that is not finite, or
    with a label that is no class, makes every score nan.

    finish: (logits [C, h, w], (H, W)) → logits [C, H, W] at the mask's size, as they are written.
    loss: (finished logits [C, H, W], mask [1, H, W]) → 0-dim loss, averaged over the images with
    pixels that count, of which one adds at most 4096. Its sums over pixels are floats: they have
    the same bits because evaluation takes each image on one thread.
    """

    name = "confusion"
    fraction_bits = 30
    invalid = "logits not finite, or labels that are no class"

    def __init__(
        self,
        class_names: Sequence[str],
        finish: Callable[[Tensor, Sequence[int]], Tensor],
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.class_names = list(class_names)
        self.num_sums = len(self.class_names) ** 2 + 2
        super().__init__()
        self.finish, self.loss = finish, loss

    def sample_state(self, pred: Tensor, gt: Tensor) -> Tensor:
        """State of one image: logits [C, h, w] of any size, class indices uint8 [1, H, W]."""
        classes = len(self.class_names)
        if len(pred) != classes:
            raise ValueError(f"{len(pred)} channels of logits for {classes} classes")
        truth = gt.detach().to(pred.device).reshape(gt.shape[-2:])
        logits = self.finish(pred.detach(), truth.shape)
        known = (truth < classes) | (truth == IGNORE)
        sound = torch.isfinite(pred).all() & known.all()
        counted = truth < classes
        cell = truth.long() * classes + most_likely(logits)
        key = torch.where(counted, cell, classes**2).flatten()
        # Scattered, since bincount would make the host wait for a GPU; the last bin is not kept.
        counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=key.device)
        counts = counts.scatter_add_(0, key, torch.ones_like(key))[:-1]
        loss = self._fixed_loss(logits, torch.where(known, truth, IGNORE)[None])
        return pack_state(sound, counts, loss, counted.any().long())

    def _fixed_loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        if self.loss is None:
            return torch.zeros((), dtype=torch.int64, device=logits.device)
        loss = self.loss(logits, truth).double().clamp(max=_MAX_LOSS)
        return (loss * 2**self.fraction_bits).round().long()

    def matrix(self) -> Tensor:
        """Pixels by true (row) and predicted class, int64 [C, C]; invalid images are left out."""
        classes = len(self.class_names)
        return self.state[2 : 2 + classes**2].view(classes, classes).cpu()

    def compute(self) -> dict[str, float]:
        """mIoU, mPA, precision, accuracy, loss (if there is one), and IoU/<class> of each class.

        nan for no images, for images without any pixel that counts, and if any was invalid.
        """
        names = ["mIoU", "mPA", "precision", "accuracy"] + ["loss"] * (self.loss is not None)
        count, invalid = self.state[:2].tolist()
        if count > MAX_IMAGES:
            raise OverflowError(f"{self.name}: {count} images, but only {MAX_IMAGES} fit a state")
        matrix = self.matrix()
        if invalid or not matrix.any():
            return dict.fromkeys(names, float("nan"))
        right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        occurs = true > 0
        iou = right / (true + predicted - right).double()
        recall = right / true.double()
        precision = right / predicted.clamp(min=1).double()
        means = [values[occurs].mean() for values in (iou, recall, precision)]
        accuracy = right.sum() / true.sum().double()
        total, images = self.state[-2:].tolist()
        values = [*map(float, means), float(accuracy), total / 2**self.fraction_bits / images]
        scores = dict(zip(names, values, strict=False))
        kept = zip(self.class_names, iou.tolist(), occurs.tolist(), strict=True)
        return scores | {f"IoU/{name}": value for name, value, there in kept if there}

    def remarks(self) -> list[str]:
        """Names the classes that the means leave out, and images without a pixel that counts."""
        remarks = []
        matrix = self.matrix()
        columns = zip(self.class_names, matrix.sum(1).tolist(), matrix.sum(0).tolist(), strict=True)
        absent = [
            name + (f" (predicted for {found} pixels)" if found else "")
            for name, true, found in columns
            if not true
        ]
        if absent:
            remarks.append(f"not in the masks, and so not in the means: {', '.join(absent)}")
        images, invalid = self.state[:2].tolist()
        unlabelled = images - invalid - int(self.state[-1])
        if unlabelled:
            remarks.append(f"{unlabelled} of {images} images have no pixel that counts")
        return remarks


def most_likely(planes: Iterable[Tensor]) -> Tensor:
    """Which of up to 256 planes, floats [H, W], is the largest in each pixel: uint8 [H, W].

    The first of equal ones, as by argmax, but the planes need not be there at one time; and argmax
    over the first dimension is several times slower on CPUs. Nothing is promised for nan.
    """
    planes = iter(planes)
    best = next(planes)
    index = torch.zeros_like(best, dtype=torch.uint8)
    for number, plane in enumerate(planes, 1):
        index.masked_fill_(plane > best, number)
        best = torch.maximum(best, plane)
    return index
