"""Networks: they map images to predictions and know nothing of training."""

import difflib

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


def require_network(name: str) -> None:
    """Raise ValueError for a name that is not among those above."""
    if name in __all__:
        return
    nearest = difflib.get_close_matches(name, __all__, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(
        f"name: {name[:80]!r} is not exported by src/__init__.py, which has "
        f"{', '.join(__all__)}.{hint}"
    )
