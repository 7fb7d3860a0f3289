"""Deep Image Matting: image and trimap to alpha, through an encoder that remembers its maxima.

Source: Xu, Price, Cohen, Huang, "Deep Image Matting", CVPR 2017, section 4.1, the encoder–decoder
stage. The second stage there, a small network that is trained afterwards to sharpen alpha, is not
built.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import load_vgg_stages, vgg_stages, vgg_widths
from .layers import autocast_off, extend, unpool

STRIDE = 32  # of the deepest map


class DeepMatting(nn.Module):
    """VGG-16 with batch norm, and a decoder that unpools to where each maximum came from.

    Takes float images [B, 4, H, W], RGB and trimap, of any size from 1×1 up. Returns alpha
    [B, 1, H, W]: logits in training mode, their sigmoid in eval mode, in float32 under autocast.
    Images are extended to a multiple of 32 by their last row and column, and alpha is cropped.
    Training one image of at most 32×32 raises ValueError: its deepest map is one pixel, of which
    batch norm has no variance. An empty batch (B = 0) is fine.

    The decoder follows the paper: a 1×1 convolution at the bottom, then five unpoolings, each with
    a 5×5 convolution, to 512, 512, 256, 128, 64 and 64 channels (for `channels` = 64, the width of
    the first stage), and a 5×5 convolution to alpha. The decoder's batch norm is an addition.
    """

    min_train_side = STRIDE + 1  # a lone training image needs a side of that many pixels

    def __init__(self, channels: int = 64):
        super().__init__()
        self.backbone = vgg_stages(channels, batch_norm=True, in_channels=4)
        # A map is unpooled by the indices of a pooling that had as many channels.
        above, *widths = [*reversed(vgg_widths(channels)), channels]
        self.bottom = _conv_bn_relu(above, above, kernel=1)
        self.decoder = nn.ModuleList()
        for width in widths:
            self.decoder.append(_conv_bn_relu(above, width, kernel=5))
            above = width
        self.alpha = nn.Conv2d(channels, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = extend(x, STRIDE)
        indices = []
        for stage in self.backbone:
            x, maxima = F.max_pool2d(stage(x), 2, return_indices=True)
            indices.append(maxima)
        x = self.bottom(x)
        for conv in self.decoder:
            x = conv(unpool(x, indices.pop()))
        with autocast_off(x.device.type):  # bf16 would leave alpha some hundred levels
            logits = self.alpha(x.to(self.alpha.weight.dtype))[..., :height, :width]
        return logits if self.training else torch.sigmoid(logits)

    def load_backbone(self, state_dict: Mapping[str, Tensor]) -> None:
        """Start from torchvision's vgg16_bn; the trimap's channel starts at zero.

        Raises ValueError where the weights do not fit.
        """
        load_vgg_stages(self.backbone, state_dict)


def deep_matting(channels: int = 64) -> DeepMatting:
    """The network of the paper for `channels` = 64, with 25,947,329 parameters."""
    return DeepMatting(channels)


def _conv_bn_relu(in_ch: int, out_ch: int, kernel: int) -> nn.Sequential:
    # No bias: batch norm subtracts the mean, and any constant with it.
    conv = nn.Conv2d(in_ch, out_ch, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_ch), nn.ReLU(inplace=True))
