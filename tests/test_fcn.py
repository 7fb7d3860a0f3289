"""FCN: sizes, which skips each variant adds, and what its decoder is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src import FCN, fcn, fcn8s, fcn16s, fcn32s
from src.backbones import vgg_stages

SKIPS = {fcn32s: 0, fcn16s: 1, fcn8s: 2, fcn: 4}


@pytest.fixture
def small() -> FCN:
    torch.manual_seed(0)
    return fcn(3, channels=4)


@pytest.mark.parametrize("build", SKIPS)
def test_parameter_count(build):
    """VGG-16, transposed convolutions with biases, batch norms, 32 · 2 + 2; skips have none."""
    decoder = 2_360_832 + 1_180_416 + 295_296 + 73_920 + 18_528
    with torch.device("meta"):
        net = build(2)
    assert sum(p.numel() for p in net.parameters()) == 14_714_688 + decoder + 66


@pytest.mark.parametrize("build", SKIPS)
@pytest.mark.parametrize("size", [(1, 1), (17, 33), (160, 160)])
@torch.inference_mode()
def test_logits_have_the_size_of_the_image(build, size):
    out = build(5, channels=2).eval()(torch.rand(2, 3, *size))
    assert out.shape == (2, 5, *size)


@torch.inference_mode()
def test_images_are_extended_by_their_last_row_and_column(small):
    small.eval()
    image = torch.rand(1, 3, 17, 33)
    rows = torch.arange(32).clamp(max=16)
    columns = torch.arange(64).clamp(max=32)
    extended = image[:, :, rows][:, :, :, columns]
    expected = small(extended)[:, :, :17, :33]
    torch.testing.assert_close(small(image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_one_pixel_can_be_trained_on(batch_norm):
    net = fcn(2, channels=2, batch_norm=batch_norm)
    assert net.min_train_side == 1
    net(torch.rand(1, 3, 1, 1)).sum().backward()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_empty_batch_trains_without_a_trace(batch_norm, amp):
    net = fcn(2, channels=2, batch_norm=batch_norm)
    images = torch.empty(0, 3, 40, 33)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = net(images)
    assert out.shape == (0, 2, 40, 33)
    out.sum().backward()
    assert all((p.grad == 0).all() for p in net.parameters())
    for name, buffer in net.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert (buffer == float(name.endswith("running_var"))).all(), name
    assert net.eval()(images).shape == (0, 2, 40, 33)


def cut(net: FCN, step: int) -> None:
    """Let a decoder step give zeros, whatever lies below it."""
    nn.init.zeros_(net.decoder[step][2].weight)
    nn.init.zeros_(net.decoder[step][2].bias)


@pytest.mark.parametrize(("build", "skips"), SKIPS.items())
@pytest.mark.parametrize("step", range(5))
@torch.inference_mode()
def test_each_variant_uses_its_skips_and_no_other(build, skips, step):
    """Behind a cut step, the image is seen through the skip of this step and of later ones."""
    torch.manual_seed(0)
    net = build(2, channels=8).eval()  # of fewer channels, ReLU may leave none
    cut(net, step)
    one, other = net(torch.rand(2, 3, 32, 32))
    assert torch.equal(one, other) == (step >= skips)


@pytest.mark.parametrize("step", range(4))
@torch.inference_mode()
def test_a_skip_is_a_pooled_stage_added_after_batch_norm(small, step):
    small.eval()
    cut(small, step)
    seen = {}
    small.backbone[3 - step].register_forward_hook(lambda m, i, out: seen.update(stage=out))
    small.decoder[step + 1].register_forward_hook(lambda m, i, out: seen.update(sum=i[0]))
    small(torch.rand(1, 3, 64, 32))
    assert torch.equal(seen["sum"], F.max_pool2d(seen["stage"], 2))
    assert seen["sum"].shape[2:] == (4 * 2**step, 2 * 2**step)


def test_decoder_doubles_five_times_with_relu_before_batch_norm():
    with torch.device("meta"):
        decoder = fcn(2).decoder
    assert [step[0].out_channels for step in decoder] == [512, 256, 128, 64, 32]
    for step in decoder:
        assert [type(layer) for layer in step] == [nn.ConvTranspose2d, nn.ReLU, nn.BatchNorm2d]
        assert (step[0].kernel_size, step[0].stride) == ((3, 3), (2, 2))
        assert step(torch.empty(1, step[0].in_channels, 3, 5, device="meta")).shape[2:] == (6, 10)


def test_gradient_reaches_every_parameter(small):
    (small(torch.rand(2, 3, 33, 33)) * torch.rand(2, 3, 33, 33)).sum().backward()
    missed = [name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()]
    assert missed == []


@torch.inference_mode()
def test_autocast_computes_in_bf16_and_answers_in_float32(small):
    small.eval()
    seen = set()
    for step in small.decoder:
        step.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    images = torch.rand(1, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16):
        low = small(images)
    assert seen == {torch.bfloat16}
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, small(images), atol=0.02, rtol=0)


def test_backbone_loads_and_freezes(small):
    source = vgg_stages(channels=4)
    names = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]  # of torchvision's convolutions
    convs = [layer for layer in source.modules() if isinstance(layer, nn.Conv2d)]
    small.load_backbone(
        {
            f"features.{number}.{key}": value
            for number, conv in zip(names, convs, strict=True)
            for key, value in conv.state_dict().items()
        }
    )
    loaded = small.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())
    small.freeze_backbone()
    small.train()(torch.rand(2, 3, 32, 32)).sum().backward()
    trained = {name.split(".")[0] for name, p in small.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "classifier"}
    with pytest.raises(ValueError, match=r"features\.0\.weight is missing"):
        small.load_backbone({})


def test_key_names_of_checkpoints(small):
    """Renaming a module makes every checkpoint that users hold unreadable."""
    keys = small.state_dict().keys()
    assert len(keys) == 13 * 2 + 5 * 7 + 2
    assert {
        "backbone.0.0.weight",
        "backbone.4.4.bias",
        "decoder.0.0.weight",
        "decoder.4.2.running_var",
        "classifier.bias",
    } <= keys
