"""U²-Net against a second, independent reading of the paper; conversion of the authors' weights."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks.common import convolution_flops
from src import from_official, identify, is_official, u2net_full, u2net_lite
from src.u2net import RSU4, RSU4F, RSU7, ConvBNReLU

# The published networks, stage by stage: levels, in, mid and out channels.
ORIGINAL_FULL = {
    "stage1": (7, 3, 32, 64),
    "stage2": (6, 64, 32, 128),
    "stage3": (5, 128, 64, 256),
    "stage4": (4, 256, 128, 512),
    "stage5": (4, 512, 256, 512),
    "stage6": (4, 512, 256, 512),
    "stage5d": (4, 1024, 256, 512),
    "stage4d": (4, 1024, 128, 256),
    "stage3d": (5, 512, 64, 128),
    "stage2d": (6, 256, 32, 64),
    "stage1d": (7, 128, 16, 64),
}
ORIGINAL_LITE = {
    name: (levels, 3 if name == "stage1" else 128 if name.endswith("d") else 64, 16, 64)
    for name, (levels, *_) in ORIGINAL_FULL.items()
}
NOT_POOLED = {"stage5", "stage6", "stage5d"}  # the RSU-4F blocks


def random_official(stages: dict, out_ch: int = 1) -> dict[str, torch.Tensor]:
    """Weights with the official keys in float64, with batch norm statistics of every sign."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    def conv(name, in_ch, out_ch, size=3):
        state[f"{name}.weight"] = normal(out_ch, in_ch, size, size, std=(2 / in_ch) ** 0.5 / size)
        state[f"{name}.bias"] = normal(out_ch)

    def conv_bn(name, in_ch, out_ch):
        conv(f"{name}.conv_s1", in_ch, out_ch)
        state[f"{name}.bn_s1.weight"] = 1 + normal(out_ch, std=0.1)
        state[f"{name}.bn_s1.bias"] = normal(out_ch, std=0.5)
        state[f"{name}.bn_s1.running_mean"] = normal(out_ch)
        state[f"{name}.bn_s1.running_var"] = normal(out_ch).square() + 0.5
        state[f"{name}.bn_s1.num_batches_tracked"] = torch.tensor(7)

    for stage, (levels, in_ch, mid, out) in stages.items():
        conv_bn(f"{stage}.rebnconvin", in_ch, out)
        for level in range(1, levels + 1):
            conv_bn(f"{stage}.rebnconv{level}", out if level == 1 else mid, mid)
        for level in range(levels - 1, 0, -1):
            conv_bn(f"{stage}.rebnconv{level}d", 2 * mid, out if level == 1 else mid)
    for level in range(1, 7):
        stage = "stage6" if level == 6 else f"stage{level}d"
        conv(f"side{level}", stages[stage][-1], out_ch)
    conv("outconv", 6 * out_ch, out_ch, size=1)
    return state


def oracle(state: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The original network as a recursion over its own keys: logits [fused, side1 … side6]."""

    def conv_bn_relu(name, x, dilation):
        conv, bn = f"{name}.conv_s1", f"{name}.bn_s1"
        weight, bias = state[f"{conv}.weight"], state[f"{conv}.bias"]
        x = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)
        stats = (state[f"{bn}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *stats))

    def pool(x):
        return F.max_pool2d(x, 2, stride=2, ceil_mode=True)

    def upsample(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    def inner(stage, level, x):
        flat = stage in NOT_POOLED
        bottom = f"{stage}.rebnconv{level + 1}.conv_s1.weight" not in state
        dilation = 2 ** (level - 1) if flat else 2 if bottom else 1
        here = conv_bn_relu(f"{stage}.rebnconv{level}", x, dilation)
        if bottom:
            return here
        next_is_bottom = f"{stage}.rebnconv{level + 2}.conv_s1.weight" not in state
        below = inner(stage, level + 1, here if flat or next_is_bottom else pool(here))
        joined = torch.cat([upsample(below, here), here], 1)
        return conv_bn_relu(f"{stage}.rebnconv{level}d", joined, dilation)

    def block(stage, x):
        x = conv_bn_relu(f"{stage}.rebnconvin", x, 1)
        return inner(stage, 1, x) + x

    def outer(level, x):
        skip = block(f"stage{level}", x)
        if level == 6:
            return [skip]
        below = outer(level + 1, pool(skip))
        return [block(f"stage{level}d", torch.cat([upsample(below[0], skip), skip], 1)), *below]

    sides = []
    for level, feature in enumerate(outer(1, x), start=1):
        weight, bias = state[f"side{level}.weight"], state[f"side{level}.bias"]
        sides.append(upsample(F.conv2d(feature, weight, bias, padding=1), x))
    return [F.conv2d(torch.cat(sides, 1), state["outconv.weight"], state["outconv.bias"]), *sides]


def loaded(build, state: dict[str, torch.Tensor], out_ch: int = 1) -> nn.Module:
    """Our network in eval mode on the converted weights, of which it shares the memory."""
    with torch.device("meta"):
        net = build(out_ch)
    net.load_state_dict(from_official(state), strict=True, assign=True)
    return net.eval()


@pytest.fixture(scope="module")
def official_lite() -> dict[str, torch.Tensor]:
    return random_official(ORIGINAL_LITE)


@pytest.fixture
def lite():
    torch.manual_seed(0)
    return u2net_lite()


# --- the network -----------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "expected"), [(u2net_full, 43_995_469), (u2net_lite, 1_128_333)])
def test_parameter_count(build, expected):
    with torch.device("meta"):
        net = build()
    assert sum(p.numel() for p in net.parameters()) == expected


def test_training_cost_at_288():
    """Forward and backward of one image take 284.5 GFLOP: no map is larger than it should be."""
    with torch.device("meta"):
        net, image = u2net_full(), torch.zeros(1, 3, 288, 288)
    work = convolution_flops(lambda: sum(logits.sum() for logits in net(image)).backward())
    assert work / 1e9 == pytest.approx(284.5, abs=0.05)


@pytest.mark.parametrize("size", [(1, 1), (1, 37), (5, 3), (33, 50), (64, 64)])
@torch.inference_mode()
def test_eval_returns_one_probability_map_of_any_size(lite, size):
    out = lite.eval()(torch.rand(2, 3, *size))
    assert out.shape == (2, 1, *size)
    assert ((out >= 0) & (out <= 1)).all()


@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_training_returns_seven_logit_maps(size):
    out = u2net_lite(out_ch=3)(torch.rand(2, 3, *size))
    assert isinstance(out, list)
    assert [tuple(logits.shape) for logits in out] == [(2, 3, *size)] * 7
    assert any(logits.min() < 0 for logits in out)  # no sigmoid inside


def test_one_pixel_needs_no_interpolation(lite, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("interpolated between equal sizes")

    monkeypatch.setattr(F, "interpolate", fail)
    lite.eval()(torch.rand(1, 3, 1, 1))


def test_gradient_reaches_every_parameter(lite):
    out = lite(torch.rand(2, 3, 33, 33))
    sum((logits * torch.rand_like(logits)).sum() for logits in out).backward()
    assert [name for name, p in lite.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_empty_batch_trains_without_a_trace(lite, layout, amp):
    lite.to(memory_format=layout)
    images = torch.empty(0, 3, 40, 33).to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = lite(images)
    assert [tuple(logits.shape) for logits in out] == [(0, 1, 40, 33)] * 7
    sum(logits.sum() for logits in out).backward()
    assert all((p.grad == 0).all() for p in lite.parameters())
    for name, buffer in lite.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert (buffer == float(name.endswith("running_var"))).all(), name
    assert lite.eval()(images).shape == (0, 1, 40, 33)


def test_one_small_image_cannot_be_normalised_in_training(lite):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        lite(torch.rand(1, 3, 32, 32))
    assert len(lite(torch.rand(1, 3, 32, 33))) == 7


@pytest.mark.parametrize("amp", [False, True])
def test_channels_last_is_kept_throughout(amp):
    net = u2net_lite(out_ch=3).to(memory_format=torch.channels_last)
    lost = []

    def check(name):
        def hook(module, inputs, output):
            if not output.is_contiguous(memory_format=torch.channels_last):
                lost.append(name)

        return hook

    for name, module in net.named_modules():
        if name:
            module.register_forward_hook(check(name))
    images = torch.rand(2, 3, 64, 96).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = net(images)
    assert lost == []
    assert all(logits.is_contiguous(memory_format=torch.channels_last) for logits in out)


@torch.inference_mode()
def test_autocast_computes_in_bf16_and_answers_in_float32(lite):
    lite.eval()
    seen = set()
    for module in lite.modules():
        if isinstance(module, ConvBNReLU):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    images = torch.rand(1, 3, 48, 48)
    with torch.autocast("cpu", torch.bfloat16):
        low = lite(images)
    assert seen == {torch.bfloat16}
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, lite(images), atol=0.01, rtol=0)


def test_state_dict_round_trip(lite):
    images = torch.rand(2, 3, 40, 40)
    lite(images)  # running statistics that differ from those of a fresh network
    file = io.BytesIO()
    torch.save(lite.state_dict(), file)
    file.seek(0)
    copy = u2net_lite()
    copy.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(copy.eval()(images), lite.eval()(images))


def test_key_names_of_checkpoints(lite):
    """Renaming a module makes every checkpoint that users hold unreadable."""
    keys = lite.state_dict().keys()
    assert len(keys) == 112 * 6 + 7 * 2  # conv weight and five of batch norm; side and out convs
    assert {
        "encoder.1.conv_in.conv.weight",
        "encoder.1.down.7.bn.running_var",
        "encoder.6.up.3.bn.weight",
        "decoder.5.down.4.bn.num_batches_tracked",
        "decoder.1.up.6.conv.weight",
        "side.6.weight",
        "out_conv.bias",
    } <= keys


# --- the block -------------------------------------------------------------------------------


def as_identity(block: nn.Module) -> nn.Module:
    """Let each conv add up its input channels pixel by pixel, and batch norm do nothing."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            module.weight.data[:, :, 1, 1] = 1
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # nothing beside 1; older torch refuses 0
    return block.eval()


@pytest.mark.parametrize(("make", "factor"), [(RSU7, 8), (RSU4, 5), (RSU4F, 5)])
def test_block_adds_one_skip_per_level_and_the_residual(make, factor):
    """With L levels: the bottom, L − 1 skips and the residual each contribute the input once."""
    image = torch.full((1, 1, 5, 6), 0.5)
    torch.testing.assert_close(as_identity(make(1, 1, 1))(image), factor * image)


def level_outputs(block: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs = {}
    for name, module in block.named_modules():
        if isinstance(module, ConvBNReLU):
            module.register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
    block(image)
    return outputs


def test_pooled_block_halves_with_ceil_between_first_and_bottom_level():
    outputs = level_outputs(RSU7(1, 1, 1).eval(), torch.rand(1, 1, 33, 50))
    sizes = {name: tuple(output.shape[2:]) for name, output in outputs.items()}
    down = [(33, 50), (17, 25), (9, 13), (5, 7), (3, 4), (2, 2), (2, 2)]
    assert [sizes[f"down.{level}"] for level in range(1, 8)] == down
    assert [sizes[f"up.{level}"] for level in range(1, 7)] == down[:-1]


@pytest.mark.parametrize(
    ("make", "name", "dilation"),
    [
        (RSU4F, "conv_in", 1),
        (RSU4F, "down.1", 1),
        (RSU4F, "down.2", 2),
        (RSU4F, "down.3", 4),
        (RSU4F, "down.4", 8),
        (RSU4F, "up.3", 4),
        (RSU4F, "up.2", 2),
        (RSU4F, "up.1", 1),
        (RSU7, "down.6", 1),
        (RSU7, "down.7", 2),
        (RSU7, "up.6", 1),
    ],
)
def test_dilation_of_each_level(make, name, dilation):
    """A one-pixel impulse comes back at nine points, ``dilation`` apart."""
    layer = as_identity(make(1, 1, 1)).get_submodule(name)
    nn.init.ones_(layer.conv.weight)
    impulse = torch.zeros(1, layer.conv.in_channels, 21, 21)
    impulse[0, 0, 10, 10] = 1
    rows, columns = layer(impulse)[0, 0].nonzero(as_tuple=True)
    reach = {10 - dilation, 10, 10 + dilation}
    assert {*zip(rows.tolist(), columns.tolist(), strict=True)} == {
        (row, column) for row in reach for column in reach
    }


# --- the authors' weights ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "stages", "out_ch", "size"),
    [
        (u2net_full, ORIGINAL_FULL, 1, (33, 50)),
        (u2net_lite, ORIGINAL_LITE, 1, (37, 50)),
        (u2net_lite, ORIGINAL_LITE, 3, (1, 37)),
    ],
)
@torch.inference_mode()
def test_converted_weights_give_the_original_outputs(build, stages, out_ch, size):
    state = random_official(stages, out_ch)
    net = loaded(build, state, out_ch)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).double()
    expected = oracle(state, images)
    torch.testing.assert_close(net(images), expected[0].sigmoid(), atol=1e-9, rtol=0)
    net.training = True  # of the outermost module only: all logits, but batch norm as in eval mode
    torch.testing.assert_close(net(images), expected, atol=1e-9, rtol=1e-9)


@torch.inference_mode()
def test_real_weights_give_the_original_output(shared_data):
    path = shared_data / "weights" / "u2netp_official_keys.pth"
    state = torch.load(path, weights_only=True)
    assert len(state) == 798
    assert is_official(state)
    assert identify(from_official(state)) == ("u2net_lite", 1)
    photo = min((shared_data / "saliency" / "DUTS-TE" / "DUTS-TE-Image").iterdir())
    pixels = np.asarray(Image.open(photo).convert("RGB").resize((160, 120)))
    image = torch.from_numpy(pixels / 255).float().permute(2, 0, 1)[None]
    expected = oracle(state, image)[0].sigmoid()
    assert expected.max() - expected.min() > 0.5  # something was found: the maps are not blank
    torch.testing.assert_close(loaded(u2net_lite, state)(image), expected, atol=1e-5, rtol=0)


def strict_diff(state: dict[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Keys that the lite network misses in the converted weights, and those it does not expect."""
    with torch.device("meta"):
        ours = u2net_lite().state_dict().keys()
    theirs = from_official(state).keys()
    return ours - theirs, theirs - ours


def test_conversion_leaves_its_input_alone(official_lite):
    before = {key: value.clone() for key, value in official_lite.items()}
    assert strict_diff(official_lite) == (set(), set())
    assert official_lite.keys() == before.keys()
    assert all(torch.equal(official_lite[key], value) for key, value in before.items())


def test_conversion_keeps_unknown_keys(official_lite):
    extra = {"stage9.rebnconv1.conv_s1.weight": torch.zeros(1), "epoch": torch.zeros(1)}
    assert strict_diff(official_lite | extra) == (set(), set(extra))


@pytest.mark.parametrize(
    ("lost", "missing", "unexpected"),
    [
        (
            "stage1.rebnconvin.conv_s1.bias",
            "encoder.1.conv_in.bn.running_mean",
            "stage1.rebnconvin.bn_s1.running_mean",
        ),
        (
            "stage5d.rebnconv3d.bn_s1.running_mean",
            "decoder.5.up.3.bn.running_mean",
            "stage5d.rebnconv3d.conv_s1.bias",
        ),
        ("stage2.rebnconv6.conv_s1.weight", "encoder.2.down.6.conv.weight", None),
        ("side3.bias", "side.3.bias", None),
        ("outconv.weight", "out_conv.weight", None),
    ],
)
def test_missing_tensor_is_left_for_the_key_diff(official_lite, lost, missing, unexpected):
    damaged = {key: value for key, value in official_lite.items() if key != lost}
    assert is_official(damaged)
    assert strict_diff(damaged) == ({missing}, {unexpected} if unexpected else set())


def test_bias_of_another_shape_is_not_folded(official_lite):
    bias, mean = "stage1.rebnconvin.conv_s1.bias", "stage1.rebnconvin.bn_s1.running_mean"
    damaged = official_lite | {bias: torch.zeros(1)}  # would broadcast
    assert strict_diff(damaged) == ({"encoder.1.conv_in.bn.running_mean"}, {bias, mean})


def test_mixed_files_lose_nothing(official_lite):
    ours = {"out_conv.bias": torch.zeros(1)}
    assert strict_diff(official_lite | ours) == (set(), {"outconv.bias"})


def test_weights_trained_without_biases_are_only_renamed(official_lite):
    plain = {k: v for k, v in official_lite.items() if not k.endswith("conv_s1.bias")}
    assert identify(from_official(plain)) == ("u2net_lite", 1)
    mean = plain["stage4d.rebnconv4.bn_s1.running_mean"]
    assert from_official(plain)["decoder.4.down.4.bn.running_mean"] is mean


def test_half_precision_files_are_folded_in_float32():
    name = "stage3.rebnconv2."
    state = {
        name + "conv_s1.bias": torch.tensor([0.0625]).half(),
        name + "bn_s1.running_mean": torch.tensor([200.0]).half(),
    }
    folded = from_official(state)["encoder.3.down.2.bn.running_mean"]
    assert folded.tolist() == [199.9375]  # float16 goes in steps of 0.125 here


def test_is_official_tells_files_apart(official_lite, lite):
    assert is_official(official_lite)
    assert is_official({"stage1.rebnconvin.bn_s1.weight": torch.ones(64)})
    assert not is_official(lite.state_dict())
    assert not is_official({"side1.weight": torch.ones(1), "stage1.weight": torch.ones(1)})
    assert not is_official({})


@pytest.mark.parametrize("build", [u2net_full, u2net_lite])
@pytest.mark.parametrize("out_ch", [1, 3])
def test_identify_names_variant_and_channels(build, out_ch):
    with torch.device("meta"):
        state = build(out_ch).state_dict()
    assert identify(state) == (build.__name__, out_ch)


def test_identify_refuses_what_does_not_fit_exactly(official_lite, lite):
    state = lite.state_dict()
    assert identify({}) is None
    assert identify(nn.Linear(2, 2).state_dict()) is None
    assert identify(official_lite) is None  # not converted yet
    assert identify(state | {"head.weight": torch.zeros(1)}) is None
    assert identify(state | {"side.1.bias": torch.zeros(2)}) is None
    assert identify(state | {"side.1.bias": "text"}) is None
    for bias in (3, torch.tensor(1.0), torch.zeros(0), torch.zeros(2)):
        assert identify(state | {"out_conv.bias": bias}) is None
    del state["encoder.1.conv_in.bn.running_var"]
    assert identify(state) is None


def test_identify_and_conversion_draw_no_random_numbers(official_lite):
    before = torch.get_rng_state()
    identify(from_official(official_lite))
    assert torch.equal(torch.get_rng_state(), before)
