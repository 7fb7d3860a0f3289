"""Encoders with torchvision's weights: the stages of VGG-16 and of ResNet-50, without classifier.

Sources: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015 (configuration D); He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016. Both expect images normalised by ImageNet's mean and standard deviation
when they carry torchvision's weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models import resnet50

VGG16_CONVS = (2, 2, 3, 3, 3)
RESNET50_CHANNELS = (64, 256, 512, 1024, 2048)


class Stages(nn.ModuleList):
    """The stages of an encoder, in order, which can be frozen as one."""

    frozen = False

    def freeze(self) -> None:
        """Take the weights out of training, and hold batch norm at its running statistics."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Stages":
        # A network's own train() comes by here, and would make batch norm learn again.
        return super().train(mode and not self.frozen)


def vgg_widths(channels: int = 64) -> tuple[int, ...]:
    """Output channels of the five VGG stages of base width `channels`."""
    return channels, 2 * channels, 4 * channels, 8 * channels, 8 * channels


def vgg_stages(channels: int = 64, batch_norm: bool = False, in_channels: int = 3) -> Stages:
    """Five stages of VGG-16 (2, 2, 3, 3 and 3 convolutions) of the widths of :func:`vgg_widths`.

    Each convolution is 3×3 and followed by batch norm, if asked for, and ReLU. A stage keeps the
    size of its input: the 2×2 poolings after each are the caller's, who may take features before
    or after them, or keep the indices. Convolutions start Kaiming-normal (fan out), biases at 0.
    """
    stages = Stages()
    for convs, width in zip(VGG16_CONVS, vgg_widths(channels), strict=True):
        stage = nn.Sequential()
        for _ in range(convs):
            # The bias is idle before batch norm, but torchvision's weights come with one.
            conv = nn.Conv2d(in_channels, width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.get_parameter("bias"))
            stage.append(conv)
            if batch_norm:
                stage.append(nn.BatchNorm2d(width))
            stage.append(nn.ReLU(inplace=True))
            in_channels = width
        stages.append(stage)
    return stages


def load_vgg_stages(stages: nn.ModuleList, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a whole state_dict of torchvision's vgg16 or vgg16_bn, whose classifier is ignored.

    Input channels beyond the file's start with zero weights, so that they change nothing at first
    (Xu et al., "Deep Image Matting", CVPR 2017, section 4.2). Raises ValueError that names what
    does not fit; nothing is copied then.
    """
    names, index = {}, 0
    for number, stage in enumerate(stages):
        for key in stage.state_dict():
            layer, _, name = key.partition(".")
            names[f"{number}.{key}"] = f"features.{index + int(layer)}.{name}"
        index += len(list(stage.children())) + 1  # torchvision counts the pooling too
    _load(stages, state_dict, names, ignored="classifier.")


def resnet50_stages() -> Stages:
    """Stem and layer1 … layer4 of torchvision's ResNet-50, with its initial weights.

    The maps have `RESNET50_CHANNELS` channels and 1/2, 1/4, 1/8, 1/16 and 1/32 of the input's size,
    rounded up; the stem's map is that before the max-pooling, with which the second stage begins.
    """
    net = resnet50(weights=None)
    names = (("conv1", "bn1", "relu"), ("maxpool", "layer1"), ("layer2",), ("layer3",), ("layer4",))
    stages = Stages()
    for group in names:
        stage = nn.Sequential()
        for name in group:
            stage.add_module(name, getattr(net, name))
        stages.append(stage)
    return stages


def load_resnet50_stages(stages: nn.ModuleList, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a whole state_dict of torchvision's resnet50, whose fc is ignored.

    Raises ValueError that names what does not fit; nothing is copied then.
    """
    names = {key: key.partition(".")[2] for key in stages.state_dict()}
    _load(stages, state_dict, names, ignored="fc.")


def _load(
    stages: nn.ModuleList, state_dict: Mapping[str, Tensor], names: dict[str, str], ignored: str
) -> None:
    """Copy what `names` (our key: the file's) lists, if all of it fits, and nothing else is left.

    Files of before 2018 have no num_batches_tracked; load_state_dict then keeps the count at 0.
    """
    own = stages.state_dict()
    found = {ours: state_dict[theirs] for ours, theirs in names.items() if theirs in state_dict}
    first = next(iter(own))
    if first in found:
        found[first] = _widen(found[first], own[first])
    faults = [
        f"{names[key]} is missing"
        for key in own
        if key not in found and not key.endswith(".num_batches_tracked")
    ]
    faults += [
        f"{names[key]} is {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in found.items()
        if value.shape != own[key].shape
    ]
    known = set(names.values())
    faults += [
        f"{key} is unknown"
        for key in state_dict
        if key not in known and not key.startswith(ignored)
    ]
    if faults:
        more = f"; and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise ValueError(f"these weights do not fit the encoder: {'; '.join(faults[:6])}{more}")
    stages.load_state_dict(found)


def _widen(weight: Tensor, own: Tensor) -> Tensor:
    """Append zero input channels to a convolution's weight, up to those of `own`."""
    if weight.ndim != 4 or weight.shape[1] >= own.shape[1]:
        return weight
    out_ch, in_ch, *kernel = weight.shape
    return torch.cat([weight, weight.new_zeros(out_ch, own.shape[1] - in_ch, *kernel)], dim=1)
