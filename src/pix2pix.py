"""The networks of pix2pix: a U-Net that translates an image, a PatchGAN that judges the result.

Source: Isola, Zhu, Zhou, Efros, "Image-to-Image Translation with Conditional Adversarial Networks",
CVPR 2017, appendix 6.1. All convolutions are 4×4. Images are floats in [-1, 1].

The paper's batch norm works with the statistics of the test batch itself, at one image per batch.
That is instance norm with a learned scale and shift, the default here: no image of a batch depends
on another, in training or in evaluation. "batch" is ordinary batch norm with running statistics.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from .layers import InstanceNorm, extend

Norm = Literal["instance", "batch"]

_DROPOUT_LEVELS = 3  # the innermost levels of the decoder


class UNetGenerator(nn.Module):
    """U-Net of `levels` stride-2 levels: [B, in_ch, H, W] → [B, out_ch, H, W] in [-1, 1].

    Widths are 1, 2, 4, 8, 8, … times `channels`. The three innermost decoder levels drop features
    with probability `dropout` in training; the outermost one, which makes the image, never does.
    Neither the first nor the innermost level of the encoder is normalised: the innermost map may be
    a single pixel, which any norm would turn to 0.

    Any size from 1×1 up: borders are repeated up to a multiple of 2^levels, and cropped away again.
    An empty batch (B = 0) is fine. Under autocast the result is float32.
    """

    def __init__(
        self,
        in_ch: int = 3,
        out_ch: int = 3,
        channels: int = 64,
        levels: int = 8,
        norm: Norm = "instance",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.levels = levels
        widths = [channels * min(2**level, 8) for level in range(levels)]
        encoder, decoder = [], []
        for level, width in enumerate(widths):
            first, innermost = level == 0, level == levels - 1
            parts: list[nn.Module] = [] if first else [nn.LeakyReLU(0.2)]
            below = in_ch if first else widths[level - 1]
            parts += _conv(nn.Conv2d, below, width, None if first or innermost else norm)
            encoder.append(nn.Sequential(*parts))
        for level in reversed(range(levels)):
            last, innermost = level == 0, level == levels - 1
            joined = widths[level] if innermost else 2 * widths[level]
            out = out_ch if last else widths[level - 1]
            parts = [nn.ReLU(), *_conv(nn.ConvTranspose2d, joined, out, None if last else norm)]
            if not last and level >= levels - _DROPOUT_LEVELS:
                parts.append(nn.Dropout(dropout))
            decoder.append(nn.Sequential(*parts))
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)

    def forward(self, source: Tensor) -> Tensor:
        height, width = source.shape[-2:]
        x = extend(source, 2**self.levels)
        skips = []
        for down in self.encoder:
            x = down(x)
            skips.append(x)
        x = skips.pop()
        for up in self.decoder:
            x = up(x)
            if skips:
                x = torch.cat([x, skips.pop()], dim=1)
        # In bf16 the codes near black and white, where tanh is close to ±1, would be rounded away.
        return torch.tanh(x[..., :height, :width].to(torch.promote_types(x.dtype, torch.float32)))


class PatchDiscriminator(nn.Module):
    """PatchGAN: judges overlapping patches of (image, source), each by one logit.

    image, source: [B, C, H, W] of one size, C of both together being `in_ch`. Returns logits
    [B, 1, h, w], one for every patch that the convolutions place; an empty batch is fine.
    `layers` counts the convolutions of stride 2 and sets the patch: 1, 2, 3, 4, 5 give 16, 34, 70,
    142, 286 pixels. Raises ValueError for images with a side below `smallest_side(layers)`.
    """

    def __init__(
        self, in_ch: int = 6, channels: int = 64, layers: int = 3, norm: Norm = "instance"
    ) -> None:
        super().__init__()
        self.smallest_side = smallest_side(layers)
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        parts: list[nn.Module] = [*_conv(nn.Conv2d, in_ch, channels, None), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            stride = 2 if layer < layers else 1
            parts += _conv(nn.Conv2d, widths[layer - 1], widths[layer], norm, stride)
            parts.append(nn.LeakyReLU(0.2))
        self.body = nn.Sequential(*parts, *_conv(nn.Conv2d, widths[-1], 1, None, stride=1))

    def forward(self, image: Tensor, source: Tensor) -> Tensor:
        if min(image.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"images of {image.shape[-1]}×{image.shape[-2]} pixels: this discriminator needs "
                f"{self.smallest_side} a side. Use larger images or fewer layers."
            )
        return self.body(torch.cat([image, source], dim=1))


def smallest_side(layers: int) -> int:
    """Side of the smallest image that a `PatchDiscriminator` of so many layers can score.

    Each stride-2 convolution halves it, and the two of stride 1 then take a pixel each.
    """
    return 3 * 2**layers


def init_weights(network: nn.Module) -> None:
    """Start in place as the paper does: convolutions from N(0, 0.02²), norms' scales N(1, 0.02²).

    All biases start at 0. The scales are those of the authors' code; the paper does not name them.
    """
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1.0, 0.02)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _conv(
    kind: type[nn.Module], in_ch: int, out_ch: int, norm: Norm | None, stride: int = 2
) -> list[nn.Module]:
    """A 4×4 convolution and its norm, which replaces the bias that it would cancel."""
    conv = kind(in_ch, out_ch, 4, stride=stride, padding=1, bias=norm is None)
    if norm is None:
        return [conv]
    return [conv, nn.BatchNorm2d(out_ch) if norm == "batch" else InstanceNorm(out_ch)]
