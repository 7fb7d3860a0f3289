"""U-Net with one of three encoders: the plain one of 2015, VGG-16 or ResNet-50.

Source: Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", MICCAI 2015. Unlike there, convolutions are padded, so that the logits have the
image's size, and the decoder upsamples bilinearly, which leaves no checkerboard.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from .backbones import (
    RESNET50_CHANNELS,
    Stages,
    load_resnet50_stages,
    load_vgg_stages,
    resnet50_stages,
    vgg_stages,
    vgg_widths,
)
from .layers import ConvBNReLU, autocast_off, halve, join, resize


class UNet(nn.Module):
    """Encoder stages joined to a decoder by skips; build it with one of the builders below.

    Takes float images [B, 3, H, W] of any size from 1×1 up and returns logits
    [B, num_classes, H, W], in float32 under autocast, when training and otherwise. Training on one
    image whose sides are both shorter than `min_train_side` raises ValueError: its deepest map is
    one pixel, of which batch norm has no variance. An empty batch (B = 0) is fine.

    The decoder has batch norm with every encoder: its layers start from random weights, and behind
    an encoder without, such as vgg16, nothing else would keep their scale.

    `widths` are the stages' output channels, and `decoder_widths` those of the decoder, from the
    deepest; one more than there are skips adds a level at the image's size. `pooled`: each stage
    but the first takes its input pooled by 2; otherwise the stages shrink it themselves.
    """

    def __init__(
        self,
        backbone: Stages,
        widths: Sequence[int],
        decoder_widths: Sequence[int],
        num_classes: int,
        pooled: bool,
        load: Callable[[Stages, Mapping[str, Tensor]], None] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.pooled = pooled
        self._load = load
        skip_widths = [*reversed(widths[:-1]), 0]
        below = widths[-1]
        self.decoder = nn.ModuleList()
        for skip, out_ch in zip(skip_widths, decoder_widths, strict=False):
            self.decoder.append(_two_convs(below + skip, out_ch))
            below = out_ch
        self.classifier = nn.Conv2d(below, num_classes, 1)

    @property
    def min_train_side(self) -> int:
        """Pixels that the longer side of a lone training image needs."""
        normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in self.backbone.modules())
        # Each decoder level undoes one halving, so that the first works at half that stride.
        stride = 2 ** len(self.decoder)
        return 1 + (stride if normalised and not self.backbone.frozen else stride // 2)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        skips: list[Tensor] = []
        for stage in self.backbone:
            x = stage(halve(x) if self.pooled and skips else x)
            skips.append(x)
        skips.pop()
        for convs in self.decoder:
            x = convs(join(x, skips.pop()) if skips else resize(x, size))
        with autocast_off(x.device.type):  # arg-max and loss need more digits than bf16 has
            return self.classifier(x.to(self.classifier.weight.dtype))

    def load_backbone(self, state_dict: Mapping[str, Tensor]) -> None:
        """Start from torchvision's weights of the encoder (ValueError where they do not fit)."""
        if self._load is None:
            raise ValueError("the plain encoder has no pretrained weights")
        self._load(self.backbone, state_dict)

    def freeze_backbone(self) -> None:
        """Train the decoder only; batch norm in the encoder keeps its statistics."""
        self.backbone.freeze()


def unet(num_classes: int, channels: int = 64) -> UNet:
    """The encoder of 2015: five stages of two 3×3 convolutions, here with batch norm."""
    widths = [channels * 2**level for level in range(5)]
    inputs = [3, *widths[:-1]]
    stages = Stages(_two_convs(*pair) for pair in zip(inputs, widths, strict=True))
    return UNet(stages, widths, widths[-2::-1], num_classes, pooled=True)


def unet_vgg16(num_classes: int, channels: int = 64, batch_norm: bool = False) -> UNet:
    """The encoder is VGG-16 up to its last convolution; torchvision's weights need 64 channels."""
    widths = vgg_widths(channels)
    stages = vgg_stages(channels, batch_norm)
    return UNet(stages, widths, widths[-2::-1], num_classes, pooled=True, load=load_vgg_stages)


def unet_resnet50(num_classes: int) -> UNet:
    """The encoder is ResNet-50; a fifth decoder level works at the image's own size."""
    return UNet(
        resnet50_stages(),
        RESNET50_CHANNELS,
        (512, 256, 128, 64, 64),
        num_classes,
        pooled=False,
        load=load_resnet50_stages,
    )


def _two_convs(in_ch: int, out_ch: int) -> nn.Sequential:
    return nn.Sequential(ConvBNReLU(in_ch, out_ch), ConvBNReLU(out_ch, out_ch))
