"""U²-Net: a U of six encoder and five decoder stages, each of which is a small U itself (an RSU).

Source: Qin et al., "U²-Net: Going Deeper with Nested U-Structure for Salient Object Detection",
Pattern Recognition 106, 2020. Weights start from torch's defaults (Kaiming-uniform convolutions,
unit batch norm).

Parameter names follow the paper's numbering: ``encoder.1`` … ``encoder.6`` are En1 … En6,
``decoder.5`` … ``decoder.1`` are De5 … De1, and the levels inside a block are numbered likewise.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn

from .layers import ConvBNReLU, autocast_off, halve, join, resize


class RSU(nn.Module):
    """ReSidual U-block, a U of ``len(dilations)`` levels: [B, in_ch, H, W] → [B, out_ch, H, W].

    ``dilations`` lists the levels from the first to the bottom; the way up repeats them in reverse
    without the bottom. If ``pooled``, each level between the first and the bottom halves its input.
    """

    def __init__(
        self, dilations: tuple[int, ...], pooled: bool, in_ch: int, mid_ch: int, out_ch: int
    ):
        super().__init__()
        bottom = len(dilations)
        self.halving_levels = range(2, bottom) if pooled else range(0)
        self.conv_in = ConvBNReLU(in_ch, out_ch)
        self.down = _numbered(
            (level, ConvBNReLU(out_ch if level == 1 else mid_ch, mid_ch, dilation))
            for level, dilation in enumerate(dilations, start=1)
        )
        self.up = _numbered(
            (level, ConvBNReLU(2 * mid_ch, out_ch if level == 1 else mid_ch, dilations[level - 1]))
            for level in range(bottom - 1, 0, -1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = residual = self.conv_in(x)
        skips = []
        for level, conv in enumerate(self.down.values(), start=1):
            x = conv(halve(x) if level in self.halving_levels else x)
            skips.append(x)
        x = skips.pop()
        for conv in self.up.values():
            x = conv(join(x, skips.pop()))
        return x + residual


RSU7 = partial(RSU, (1, 1, 1, 1, 1, 1, 2), True)
RSU6 = partial(RSU, (1, 1, 1, 1, 1, 2), True)
RSU5 = partial(RSU, (1, 1, 1, 1, 2), True)
RSU4 = partial(RSU, (1, 1, 1, 2), True)
RSU4F = partial(RSU, (1, 2, 4, 8), False)  # the deepest maps are too small to be pooled further

# Stage number: (block, in, mid and out channels). A decoder stage takes the map below and the skip.
Stages = dict[int, tuple]

FULL_ENCODER: Stages = {
    1: (RSU7, 3, 32, 64),
    2: (RSU6, 64, 32, 128),
    3: (RSU5, 128, 64, 256),
    4: (RSU4, 256, 128, 512),
    5: (RSU4F, 512, 256, 512),
    6: (RSU4F, 512, 256, 512),
}
FULL_DECODER: Stages = {
    5: (RSU4F, 1024, 256, 512),
    4: (RSU4, 1024, 128, 256),
    3: (RSU5, 512, 64, 128),
    2: (RSU6, 256, 32, 64),
    1: (RSU7, 128, 16, 64),
}
LITE_ENCODER: Stages = {
    1: (RSU7, 3, 16, 64),
    2: (RSU6, 64, 16, 64),
    3: (RSU5, 64, 16, 64),
    4: (RSU4, 64, 16, 64),
    5: (RSU4F, 64, 16, 64),
    6: (RSU4F, 64, 16, 64),
}
LITE_DECODER: Stages = {
    5: (RSU4F, 128, 16, 64),
    4: (RSU4, 128, 16, 64),
    3: (RSU5, 128, 16, 64),
    2: (RSU6, 128, 16, 64),
    1: (RSU7, 128, 16, 64),
}


class U2Net(nn.Module):
    """The nested U; build it with :func:`u2net_full` or :func:`u2net_lite`.

    Takes float images [B, 3, H, W] of any size from 1×1 up. In training mode it returns the list
    [fused, side1 … side6] of logits, each [B, out_ch, H, W], where side1 … side5 come from
    De1 … De5 and side6 from En6; in eval mode sigmoid(fused), in [0, 1]. Both are float32 under
    autocast. Training one image of at most 32×32 raises ValueError: its deepest map is one pixel,
    of which batch norm has no variance. An empty batch (B = 0) is fine.
    """

    def __init__(self, encoder: Stages, decoder: Stages, out_ch: int):
        super().__init__()
        self.encoder = _numbered((n, block(*channels)) for n, (block, *channels) in encoder.items())
        self.decoder = _numbered((n, block(*channels)) for n, (block, *channels) in decoder.items())
        bottom = len(encoder)
        stages = {bottom: encoder[bottom]} | decoder
        self.side = _numbered(
            (n, nn.Conv2d(stage_out, out_ch, 3, padding=1)) for n, (*_, stage_out) in stages.items()
        )
        self.out_conv = nn.Conv2d(len(stages) * out_ch, out_ch, 1)

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        size = x.shape[-2:]
        skips: list[Tensor] = []
        for stage in self.encoder.values():
            x = stage(halve(skips[-1]) if skips else x)
            skips.append(x)
        x = skips.pop()
        features = [x]
        for stage in self.decoder.values():
            x = stage(join(x, skips.pop()))
            features.append(x)
        fused, sides = self._logits(features, size)
        return [fused, *sides] if self.training else torch.sigmoid(fused)

    def _logits(self, features: list[Tensor], size: torch.Size) -> tuple[Tensor, list[Tensor]]:
        """Side maps De1 … En6 at ``size`` and their fusion, from the features of En6 … De1."""
        sides = [conv(x) for conv, x in zip(self.side.values(), features, strict=True)]
        # A bf16 probability map has only some hundred grey levels, and fp32 is cheap out here.
        with autocast_off(sides[0].device.type):
            maps = [resize(side.to(self.out_conv.weight.dtype), size) for side in reversed(sides)]
            return self.out_conv(torch.cat(maps, dim=1)), maps


def u2net_full(out_ch: int = 1) -> U2Net:
    """U²-Net with 43,995,469 parameters (``out_ch=1``)."""
    return U2Net(FULL_ENCODER, FULL_DECODER, out_ch)


def u2net_lite(out_ch: int = 1) -> U2Net:
    """U²-Net† of the paper, the small variant: 1,128,333 parameters (``out_ch=1``)."""
    return U2Net(LITE_ENCODER, LITE_DECODER, out_ch)


def identify(state_dict: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Return the builder's name and ``out_ch`` that fit these keys and shapes exactly, or None.

    The keys are ours; an official file goes through :func:`from_official` first.
    """
    bias = state_dict.get("out_conv.bias")
    if not isinstance(bias, Tensor) or bias.ndim != 1 or len(bias) == 0:
        return None
    shapes = {key: getattr(value, "shape", None) for key, value in state_dict.items()}
    for build in (u2net_full, u2net_lite):
        with torch.device("meta"):  # shapes only: nothing is allocated or drawn
            fitting = build(len(bias)).state_dict()
        if shapes == {key: value.shape for key, value in fitting.items()}:
            return build.__name__, len(bias)
    return None


def is_official(state_dict: Mapping[str, Tensor]) -> bool:
    """Tell whether the keys are those of the authors' U2NET and U2NETP files, complete or not."""
    names = _official_names()
    return any(str(key).startswith("stage") and key in names for key in state_dict)


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the authors' U2NET or U2NETP weights to ours, with equal outputs in eval mode.

    Their convolutions add a bias before batch norm subtracts the running mean, so the bias moves
    there: (w·x + bias) − mean = w·x − (mean − bias). Where only one of the two is given, or their
    shapes differ, they keep their official keys, as do keys that are unknown: a strict load then
    names them. A file without any such bias is renamed only. Tensors are shared, not copied.
    """
    biased = any(str(key).endswith(".conv_s1.bias") for key in state_dict)
    converted = dict(state_dict)
    for official, ours in _official_names().items():
        if official not in state_dict or ours in state_dict:
            continue
        value = state_dict[official]
        if biased and official.endswith(".bn_s1.running_mean"):
            bias_key = official.replace(".bn_s1.running_mean", ".conv_s1.bias")
            bias = state_dict.get(bias_key)
            if bias is None or bias.shape != value.shape:
                continue
            # The difference has more digits than a half-precision file holds.
            value = value.to(torch.promote_types(value.dtype, torch.float32)) - bias
            del converted[bias_key]
        del converted[official]
        converted[ours] = value
    return converted


# What to replace in a key of ours, in this order, to spell it as the authors do.
_OFFICIAL_SPELLING = {
    r"^encoder\.(\d)": r"stage\1",
    r"^decoder\.(\d)": r"stage\1d",
    r"\.conv_in": ".rebnconvin",
    r"\.down\.(\d)": r".rebnconv\1",
    r"\.up\.(\d)": r".rebnconv\1d",
    r"\.(conv|bn)\.": r".\1_s1.",
    r"^side\.(\d)": r"side\1",
    r"^out_conv": "outconv",
}


@cache
def _official_names() -> dict[str, str]:
    """Map each official key that has a counterpart to ours; both variants have the same keys."""
    with torch.device("meta"):
        ours = u2net_lite().state_dict()
    names = {}
    for key in ours:
        official = key
        for pattern, spelling in _OFFICIAL_SPELLING.items():
            official = re.sub(pattern, spelling, official)
        names[official] = key
    return names


def _numbered(modules: Iterable[tuple[int, nn.Module]]) -> nn.ModuleDict:
    return nn.ModuleDict({str(number): module for number, module in modules})
