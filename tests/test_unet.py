"""U-Net with its three encoders: sizes, skips, small batches, and freezing."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from src import UNet, unet, unet_resnet50, unet_vgg16

# Small networks by name; ResNet-50 has one width only.
SMALL = {
    "plain": lambda: unet(3, channels=2),
    "vgg16": lambda: unet_vgg16(3, channels=2),
    "vgg16_bn": lambda: unet_vgg16(3, channels=2, batch_norm=True),
    "resnet50": lambda: unet_resnet50(3),
}


@cache
def fresh(name: str) -> UNet:
    torch.manual_seed(0)
    return SMALL[name]()


@pytest.fixture(params=SMALL)
def net(request) -> UNet:
    return copy.deepcopy(fresh(request.param))  # drawing ResNet-50 takes longer than most tests


VGG_DECODER = 7_079_936 + 2_360_320 + 590_336 + 147_712
PLAIN_ENCODER = 38_848 + 221_696 + 885_760 + 3_540_992 + 14_159_872
PLAIN_DECODER = 9_439_232 + 2_360_320 + 590_336 + 147_712
RESNET_DECODER = 16_517_120 + 2_950_144 + 737_792 + 147_712 + 73_984


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (unet, PLAIN_ENCODER + PLAIN_DECODER),
        (unet_vgg16, 14_714_688 + VGG_DECODER),
        (unet_resnet50, 23_508_032 + RESNET_DECODER),
    ],
)
def test_parameter_count(build, expected):
    """9·in·out + 2·out per convolution with batch norm, two in each level; 64 · 21 + 21 at last."""
    with torch.device("meta"):
        net = build(21)
    assert sum(p.numel() for p in net.parameters()) == expected + 1365


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (160, 160)])
@torch.inference_mode()
def test_logits_have_the_size_of_the_image(net, size):
    assert net.eval()(torch.rand(2, 3, *size)).shape == (2, 3, *size)


def test_a_lone_image_needs_the_stated_side(net):
    small = net.min_train_side - 1
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.rand(1, 3, small, small))
    assert net(torch.rand(1, 3, 1, small + 1)).shape == (1, 3, 1, small + 1)


def test_with_a_frozen_encoder_too_a_lone_image_needs_the_stated_side(net):
    net.freeze_backbone()
    test_a_lone_image_needs_the_stated_side(net.train())


@pytest.mark.parametrize(
    ("name", "side", "frozen"),
    [("plain", 17, 9), ("vgg16", 9, 9), ("vgg16_bn", 17, 9), ("resnet50", 33, 17)],
)
def test_side_of_a_lone_image(name, side, frozen):
    """One more than the stride of the deepest map under a batch norm that trains."""
    with torch.device("meta"):
        net = SMALL[name]()
    assert net.min_train_side == side
    net.freeze_backbone()
    assert net.min_train_side == frozen


@pytest.mark.parametrize("amp", [False, True])
def test_empty_batch_trains_without_a_trace(net, amp):
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    images = torch.empty(0, 3, 40, 33)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = net(images)
    assert out.shape == (0, 3, 40, 33)
    out.sum().backward()
    assert all((p.grad == 0).all() for p in net.parameters())
    for name, buffer in net.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(buffer, before[name]), name
    assert net.eval()(images).shape == (0, 3, 40, 33)


@torch.inference_mode()
def test_each_level_joins_the_upsampled_map_and_its_skip(net):
    net.eval()
    skips, inputs, outputs = [], [], []
    for stage in net.backbone:
        stage.register_forward_hook(lambda m, i, out: skips.append(out))
    for level in net.decoder:
        level.register_forward_pre_hook(lambda m, i: inputs.append(i[0]))
        level.register_forward_hook(lambda m, i, out: outputs.append(out))
    net(torch.rand(1, 3, 37, 50))
    below = skips.pop()
    for joined, out in zip(inputs, outputs, strict=True):
        skip = skips.pop() if skips else torch.empty(1, 0, 37, 50)
        up = F.interpolate(below, skip.shape[2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(joined, torch.cat([up, skip], 1), atol=1e-6, rtol=1e-5)
        below = out
    assert skips == []
    assert below.shape[2:] == (37, 50)


@pytest.mark.parametrize("name", ["plain", "vgg16"])
@torch.inference_mode()
def test_stages_but_the_first_are_pooled_with_ceil(name):
    net = SMALL[name]().eval()
    inputs = []
    for stage in net.backbone:
        stage.register_forward_pre_hook(lambda m, i: inputs.append(tuple(i[0].shape[2:])))
    net(torch.rand(1, 3, 33, 50))
    assert inputs == [(33, 50), (17, 25), (9, 13), (5, 7), (3, 4)]


def test_gradient_reaches_every_parameter(net):
    (net(torch.rand(2, 3, 65, 65)) * torch.rand(2, 3, 65, 65)).sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # Batch norm subtracts the bias that VGG's convolutions have: its gradient is noise, or none.
    assert [name for name in dead if not name.startswith("backbone.")] == []
    assert [name for name in dead if not name.endswith("bias")] == []


@torch.inference_mode()
def test_autocast_computes_in_bf16_and_answers_in_float32(net):
    net.eval()
    seen = set()
    for level in net.decoder:
        level.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    images = torch.rand(1, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(images)
    assert seen == {torch.bfloat16}
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, net(images), atol=0.03, rtol=0)


def test_resnet_backbone_loads():
    net, source = unet_resnet50(2), torchvision.models.resnet50()
    net.load_backbone(source.state_dict())
    assert torch.equal(net.backbone[4].layer4[2].conv3.weight, source.layer4[2].conv3.weight)


def test_backbone_of_other_weights_is_refused():
    with pytest.raises(ValueError, match=r"features\.0\.weight is missing"):
        unet_vgg16(2, channels=2).load_backbone({})
    with pytest.raises(ValueError, match="no pretrained weights"):
        unet(2, channels=2).load_backbone({})


def test_freezing_trains_the_decoder_only(net):
    net.freeze_backbone()
    before = {name: buffer.clone() for name, buffer in net.backbone.named_buffers()}
    net.train()(torch.rand(2, 3, 33, 33)).sum().backward()
    trained = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "classifier"}
    assert all(torch.equal(b, before[name]) for name, b in net.backbone.named_buffers())
    norms = [layer for layer in net.decoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 1 for norm in norms)


def test_key_names_of_checkpoints():
    """Renaming a module makes every checkpoint that users hold unreadable."""
    expected = {
        "plain": {"backbone.4.1.bn.running_var", "decoder.3.0.conv.weight", "classifier.bias"},
        "vgg16": {"backbone.4.4.bias", "decoder.0.1.conv.weight", "classifier.weight"},
        "resnet50": {"backbone.0.conv1.weight", "backbone.4.layer4.2.bn3.bias"},
    }
    for name, keys in expected.items():
        with torch.device("meta"):
            net = SMALL[name]()
        assert keys <= net.state_dict().keys()
