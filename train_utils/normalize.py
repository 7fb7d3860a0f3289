"""The one place where 8-bit pixels become network input."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from train_utils.device import fast_layout

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_images(
    images: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Map uint8 images [..., C, H, W] to float32 (x/255 − mean)/std, on whatever device they are.

    Float images are taken as already normalised and returned as they are, so that loaders which
    normalise on the host keep working. Batches come out in the memory format that is fast on their
    device, for training where gradients are recorded.
    """
    if images.dtype != torch.uint8:
        return images
    shift, scale = _constants(tuple(mean), tuple(std), images.device)
    if images.dim() == 4:
        layout = fast_layout(images.device, training=torch.is_grad_enabled())
        images = images.contiguous(memory_format=layout)
    return (images.float() - shift).div_(scale)


@lru_cache  # uploading the constants anew in every step would stall a GPU's queue
def _constants(mean: tuple, std: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    shift = torch.tensor([255.0 * value for value in mean], device=device).view(-1, 1, 1)
    scale = torch.tensor([255.0 * value for value in std], device=device).view(-1, 1, 1)
    return shift, scale
