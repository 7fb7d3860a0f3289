"""FCN: VGG-16 features, upsampled step by step while shallower features are added.

Source: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation",
CVPR 2015. Unlike there, all upsampling is learned from torch's initial weights, in five steps of
two with ReLU and batch norm, so that no classifier is needed on any skip.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import load_vgg_stages, vgg_stages, vgg_widths
from .layers import autocast_off, extend

STRIDE = 32  # of the deepest map


class FCN(nn.Module):
    """VGG-16 and a decoder of five doublings; the builders below fix `skips`.

    Takes float images [B, 3, H, W] of any size from 1×1 up and returns logits
    [B, num_classes, H, W], in float32 under autocast, when training and otherwise. Images are
    extended to a multiple of 32 by their last row and column, and the logits cropped. Since the
    deepest map under a batch norm has 2×2 pixels or more, one image of any size can be trained on,
    and an empty batch (B = 0) is fine.

    `skips`: how many of pool4, pool3, pool2 and pool1, in this order, are added to the decoder.
    `channels`: width of the first stage, 2 or more; the published network has 64.
    """

    min_train_side = 1  # a lone training image needs a side of that many pixels

    def __init__(self, num_classes: int, skips: int, channels: int, batch_norm: bool):
        super().__init__()
        self.skips = skips
        self.backbone = vgg_stages(channels, batch_norm)
        widths = [*reversed(vgg_widths(channels)), channels // 2]
        self.decoder = nn.ModuleList(_double(in_ch, out_ch) for in_ch, out_ch in pairwise(widths))
        self.classifier = nn.Conv2d(channels // 2, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = extend(x, STRIDE)
        pooled = []
        for stage in self.backbone:
            x = F.max_pool2d(stage(x), 2)
            pooled.append(x)
        added = pooled[-2::-1][: self.skips]
        for step, double in enumerate(self.decoder):
            x = double(x)
            if step < len(added):
                x = x + added[step]
        x = x[..., :height, :width]
        with autocast_off(x.device.type):  # arg-max and loss need more digits than bf16 has
            return self.classifier(x.to(self.classifier.weight.dtype))

    def load_backbone(self, state_dict: Mapping[str, Tensor]) -> None:
        """Start from torchvision's vgg16 or vgg16_bn (ValueError where it does not fit)."""
        load_vgg_stages(self.backbone, state_dict)

    def freeze_backbone(self) -> None:
        """Train the decoder only; batch norm in the encoder keeps its statistics."""
        self.backbone.freeze()


def fcn32s(num_classes: int, channels: int = 64, batch_norm: bool = False) -> FCN:
    """No skip: every boundary comes from the map of stride 32."""
    return FCN(num_classes, 0, channels, batch_norm)


def fcn16s(num_classes: int, channels: int = 64, batch_norm: bool = False) -> FCN:
    """One skip, from pool4."""
    return FCN(num_classes, 1, channels, batch_norm)


def fcn8s(num_classes: int, channels: int = 64, batch_norm: bool = False) -> FCN:
    """Two skips, from pool4 and pool3."""
    return FCN(num_classes, 2, channels, batch_norm)


def fcn(num_classes: int, channels: int = 64, batch_norm: bool = False) -> FCN:
    """All four skips, from pool4 to pool1."""
    return FCN(num_classes, 4, channels, batch_norm)


def _double(in_ch: int, out_ch: int) -> nn.Sequential:
    """[B, in_ch, H, W] → [B, out_ch, 2H, 2W]."""
    conv = nn.ConvTranspose2d(in_ch, out_ch, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(conv, nn.ReLU(inplace=True), nn.BatchNorm2d(out_ch))
