"""Joint transforms of image and mask, uint8 in and uint8 out.

Pixels stay 8-bit until they are on the device, where `normalize_images` makes network input of
them. All randomness is drawn from torch's default generator; a transform keeps no state.
"""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from train_utils.errors import UserError
from train_utils.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize_images

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SaliencyEval",
    "SaliencyTrain",
    "normalize_images",
    "predict_input",
]


def predict_input(image: Tensor, image_size: int) -> Tensor:
    """Resize an image, uint8 [3, H, W], to the square that the network sees, [3, S, S].

    Bilinear with antialiasing, the aspect ratio not kept. Training, evaluation and prediction all
    prepare their images by this one function.
    """
    return F.resize(image, [image_size, image_size], antialias=True)


class SaliencyTrain:
    """The U²-Net recipe: resize to a square, crop at random, flip with probability `hflip`.

    Takes an image [3, H, W] and a mask [1, H, W] of the same size, both uint8; gives both in
    `crop_size` × `crop_size`. Raises UserError if the crop is larger than the resized image.
    """

    def __init__(self, image_size: int = 320, crop_size: int = 288, hflip: float = 0.5) -> None:
        if not 1 <= crop_size <= image_size:
            raise UserError(
                f"crop_size {crop_size}: does not fit into image_size {image_size}. "
                f"Use a value from 1 to {image_size}."
            )
        self.image_size, self.crop_size, self.hflip = image_size, crop_size, hflip

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        both = predict_input(image, self.image_size), _resize_mask(mask, self.image_size)
        # Every call draws the same three numbers, whatever their values lead to.
        offsets = torch.randint(self.image_size - self.crop_size + 1, (2,)).tolist()
        flip = torch.rand(()).item() < self.hflip
        both = tuple(F.crop(x, *offsets, self.crop_size, self.crop_size) for x in both)
        return tuple(F.horizontal_flip(x) for x in both) if flip else both


class SaliencyEval:
    """Resize the image only; the mask keeps its own size and values, at which it is scored."""

    def __init__(self, image_size: int = 320) -> None:
        self.image_size = image_size

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return predict_input(image, self.image_size), mask


def _resize_mask(mask: Tensor, image_size: int) -> tv_tensors.Mask:
    """Resize a saliency mask as its image is resized: bilinear with antialiasing.

    A saliency mask is a quantity, not a label: along edges it becomes grey, the share of the new
    pixel that is salient, which is the very value that cross-entropy teaches. torchvision resizes a
    `Mask` by nearest neighbour, which suits labels but shifts edges and breaks thin parts.
    """
    grey = mask.as_subclass(torch.Tensor)
    return tv_tensors.Mask(F.resize(grey, [image_size, image_size], antialias=True))
