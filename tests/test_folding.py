"""Folding batch norm into convolutions: equal within rounding, and never where it would be wrong.

Expected values are worked out by hand, or are those of the network itself.
"""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

import src
from train_utils.folding import folded
from train_utils.sync_batchnorm import SyncBatchNorm2d

# Network → input channels, batch norms before and after folding. Those that stay: FCN's decoder
# has a ReLU between convolution and batch norm.
NETWORKS = {
    "u2net_full": (src.u2net_full, 3, 112, 0),
    "u2net_lite": (src.u2net_lite, 3, 112, 0),
    "fcn": (lambda: src.fcn(3, 4), 3, 5, 5),
    "fcn, vgg16_bn": (lambda: src.fcn(3, 4, batch_norm=True), 3, 18, 5),
    "unet": (lambda: src.unet(3, 4), 3, 18, 0),
    "unet, vgg16": (lambda: src.unet_vgg16(3, 4), 3, 8, 0),
    "unet, vgg16_bn": (lambda: src.unet_vgg16(3, 4, batch_norm=True), 3, 21, 0),
    "unet, resnet50": (lambda: src.unet_resnet50(3), 3, 63, 0),
    "deep_matting": (lambda: src.deep_matting(4), 4, 19, 0),
    "generator": (lambda: src.UNetGenerator(channels=4, levels=5), 3, 0, 0),
    "generator, batch": (lambda: src.UNetGenerator(channels=4, levels=5, norm="batch"), 3, 7, 0),
}


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def with_random_statistics(model):
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                if norm.affine:
                    norm.weight.uniform_(-1, 1.5)
                    norm.bias.normal_()
    return model


def assert_equal_outputs(model, images):
    """As well as rounding allows: 1e-12 of the largest value in fp64, 1e-5 in fp32."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        twin = copy.deepcopy(model).to(dtype).eval()
        with torch.no_grad():
            expected, found = twin(images.to(dtype)), folded(twin)(images.to(dtype))
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_what_it_gave(name):
    build, channels, before, after = NETWORKS[name]
    torch.manual_seed(0)
    model = with_random_statistics(build()).train()
    state = copy.deepcopy(model.state_dict())
    copied = folded(model)
    assert (norms(model), norms(copied)) == (before, after)
    assert not any(module.training for module in copied.modules())
    assert all(module.training for module in model.modules())  # the original is left alone …
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert_equal_outputs(model, torch.rand(1, channels, 40, 36))


def test_the_discriminator_of_pix2pix():
    torch.manual_seed(0)
    model = with_random_statistics(src.PatchDiscriminator(channels=4, norm="batch")).double().eval()
    pair = torch.rand(2, 1, 3, 40, 36, dtype=torch.float64)
    copied = folded(model)
    assert (norms(model), norms(copied)) == (3, 0)
    torch.testing.assert_close(copied(*pair), model(*pair), rtol=1e-12, atol=1e-12)


def test_by_hand():
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=1)
    values = {conv.weight: 2, conv.bias: 1, norm.weight: 5, norm.bias: 7}
    values |= {norm.running_mean: 3, norm.running_var: 3}
    with torch.no_grad():
        for tensor, value in values.items():
            tensor.fill_(value)
    conv.weight.requires_grad_(False)
    model = folded(nn.Sequential(conv, norm))
    # s = 5 / √(3 + 1) = 2.5: weight 2 · 2.5, bias 2.5 · (1 − 3) + 7.
    assert (model[0].weight.item(), model[0].bias.item()) == (5, 2)
    assert type(model[1]) is nn.Identity
    assert not model[0].weight.requires_grad  # frozen ones stay so


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 6, (1, 3), padding="same", padding_mode="reflect"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
    ],
)
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.SyncBatchNorm(6),
        SyncBatchNorm2d(6),
    ],
)
def test_all_kinds_of_layers(conv, norm):
    torch.manual_seed(0)
    model = with_random_statistics(nn.Sequential(conv, norm, nn.ReLU()))
    model = model.to(memory_format=torch.channels_last)
    copied = folded(model)
    assert type(copied[1]) is nn.Identity
    assert copied[0].weight.is_contiguous(memory_format=torch.channels_last)
    # torch's own SyncBatchNorm evaluates on any device.
    assert_equal_outputs(model, torch.rand(2, 4, 9, 8))


def test_blocks_of_torchvisions_resnets():
    torch.manual_seed(0)
    model = with_random_statistics(nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4)))
    assert (norms(model), norms(folded(model))) == (4, 0)
    assert_equal_outputs(model, torch.rand(2, 4, 9, 8))


class NormFirst(nn.Module):
    """A pre-activation block: it has a ResNet's names, and another order."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.conv1(torch.relu(self.bn1(x)))


class Skipping(nn.Sequential):
    def forward(self, x):
        return self[1](x) + self[0](x)


def shared():
    conv = nn.Conv2d(4, 4, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv, nn.BatchNorm2d(4))


def hooked():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, inputs, output: output.abs())
    return model


def weight_normed():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    return nn.Sequential(conv, nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    "build",
    [
        NormFirst,
        lambda: Skipping(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        shared,
        hooked,
        weight_normed,
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
    ],
)
def test_what_cannot_be_folded_stays(build):
    torch.manual_seed(0)
    model = with_random_statistics(build())
    assert norms(folded(model)) == norms(model) > 0
    assert_equal_outputs(model, torch.rand(2, 4, 9, 8))
