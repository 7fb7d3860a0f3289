"""Networks: they map images to predictions and know nothing of training."""

from .deep_matting import DeepMatting, deep_matting
from .fcn import FCN, fcn, fcn8s, fcn16s, fcn32s
from .pix2pix import PatchDiscriminator, UNetGenerator, init_weights
from .u2net import U2Net, from_official, identify, is_official, u2net_full, u2net_lite
from .unet import UNet, unet, unet_resnet50, unet_vgg16

__all__ = [
    "FCN",
    "DeepMatting",
    "PatchDiscriminator",
    "U2Net",
    "UNet",
    "UNetGenerator",
    "deep_matting",
    "fcn",
    "fcn8s",
    "fcn16s",
    "fcn32s",
    "from_official",
    "identify",
    "init_weights",
    "is_official",
    "u2net_full",
    "u2net_lite",
    "unet",
    "unet_resnet50",
    "unet_vgg16",
]
