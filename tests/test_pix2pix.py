"""pix2pix's generator and discriminator, by the paper's appendix 6.1."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src import PatchDiscriminator, UNetGenerator, init_weights
from src.pix2pix import smallest_side

NORMS = (nn.GroupNorm, nn.BatchNorm2d)


def small_generator(levels=3, norm="instance", dropout=0.0):
    torch.manual_seed(0)
    return UNetGenerator(channels=4, levels=levels, norm=norm, dropout=dropout).double()


def small_discriminator(layers=3, norm="instance"):
    torch.manual_seed(0)
    return PatchDiscriminator(channels=4, layers=layers, norm=norm).double()


def images(batch, height, width):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def kinds_in(level):
    return [type(module) for module in level]


# --- generator ----------------------------------------------------------------------------------


def test_generator_of_the_paper():
    with torch.device("meta"):
        network = UNetGenerator()
    convs = [m for m in network.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [64, 128, 256, 512, 512, 512, 512, 512]
    # Each decoder level but the first takes the features of the one below and the skip.
    transposed = [m for m in network.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.in_channels for m in transposed] == [512, 1024, 1024, 1024, 1024, 512, 256, 128]
    assert [m.out_channels for m in transposed] == [512, 512, 512, 512, 256, 128, 64, 3]
    # By hand: 16 weights per pair of channels, 2 per normed channel, 64 + 512 + 3 biases.
    pairs = 3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 4 * 512**2
    pairs += 512**2 + 3 * 1024 * 512 + 1024 * 256 + 512 * 128 + 256 * 64 + 128 * 3
    normed = (128 + 256 + 4 * 512) + (4 * 512 + 256 + 128 + 64)
    expected = 16 * pairs + 2 * normed + 64 + 512 + 3
    assert sum(p.numel() for p in network.parameters()) == expected == 54_414_531


def test_norm_and_dropout_stand_where_the_paper_has_them():
    network = UNetGenerator(channels=4, levels=5, norm="batch", dropout=0.5)
    normed = [any(kind in NORMS for kind in kinds_in(level)) for level in network.encoder]
    assert normed == [False, True, True, True, False]
    normed = [any(kind in NORMS for kind in kinds_in(level)) for level in network.decoder]
    assert normed == [True, True, True, True, False]
    dropped = [nn.Dropout in kinds_in(level) for level in network.decoder]
    assert dropped == [True, True, True, False, False]
    slopes = [level[0].negative_slope for level in list(network.encoder)[1:]]
    assert slopes == [0.2] * 4
    assert all(kinds_in(level)[0] is nn.ReLU for level in network.decoder)


@pytest.mark.parametrize(("levels", "dropped"), [(1, [False]), (2, [True, False])])
def test_the_level_that_makes_the_image_never_drops(levels, dropped):
    network = UNetGenerator(channels=4, levels=levels)
    assert [nn.Dropout in kinds_in(level) for level in network.decoder] == dropped


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (13, 9), (3, 40)])
def test_any_size_comes_back_in_the_range_of_tanh(size):
    output = small_generator()(images(2, *size))
    assert output.shape == (2, 3, *size)
    assert output.abs().max() <= 1


def test_borders_are_repeated_and_cropped_away():
    network, x = small_generator(levels=3), images(1, 13, 20)
    padded = network(F.pad(x, (0, 4, 0, 3), mode="replicate"))
    assert torch.equal(network(x), padded[..., :13, :20])


def test_the_innermost_pixel_reaches_the_image():
    """A norm over its one value would make it 0 whatever the input."""
    network, x = small_generator(levels=3), images(1, 8, 8)
    before = network(x)
    with torch.no_grad():
        network.encoder[-1][-1].bias += 1
    assert (network(x) - before).abs().max() > 1e-3


def test_skips_join_equal_levels():
    """Without the innermost features the outermost skip alone still carries the input."""
    network = small_generator(levels=2, norm="batch").eval()
    x = images(1, 8, 8).requires_grad_()
    with torch.no_grad():
        network.decoder[-1][1].weight[:4] = 0  # what comes from below; the skip comes after it
    # One output pixel then sees 2×2 of the first level's map, and these 6×6 pixels of the input.
    network(x)[0, :, 4, 4].sum().backward()
    rows, columns = (x.grad[0].abs().sum(0) > 0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 6, 1, 6)


def test_instance_norm_keeps_the_images_of_a_batch_apart():
    network, x = small_generator(), images(3, 16, 16)
    together = network(x)
    alone = torch.cat([network(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    assert torch.equal(network.eval()(x), together)


def test_instance_norm_is_batch_norm_on_a_batch_of_one():
    torch.manual_seed(3)
    instance, batch = small_generator(), small_generator(norm="batch")
    batch.load_state_dict(instance.state_dict(), strict=False)  # all but the running statistics
    x = images(1, 16, 16)
    assert torch.allclose(instance(x), batch.train()(x), rtol=0, atol=1e-12)


def test_dropout_is_for_training_only():
    network, x = small_generator(dropout=0.5), images(1, 16, 16)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_autocast_gives_float32():
    with torch.autocast("cpu", torch.bfloat16):
        output = small_generator().float()(images(1, 8, 8).float())
    assert output.dtype == torch.float32


# --- discriminator ------------------------------------------------------------------------------


def test_discriminator_of_the_paper():
    network = PatchDiscriminator()
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [64, 128, 256, 512, 1]
    assert [m.stride[0] for m in convs] == [2, 2, 2, 1, 1]
    # By hand: weights, norms' scales and shifts, the biases of the first and the last layer.
    pairs = 6 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512
    expected = 16 * pairs + 2 * (128 + 256 + 512) + 64 + 1
    assert sum(p.numel() for p in network.parameters()) == expected == 2_768_705


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field(layers, patch):
    # Batch norm in evaluation: instance norm would let every pixel of a map see all others.
    network = small_discriminator(layers, "batch").eval()
    image, source = images(1, 128, 128).requires_grad_(), images(1, 128, 128).requires_grad_()
    logits = network(image, source)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    for x in (image, source):
        rows, columns = (x.grad[0].abs().sum(0) > 0).nonzero().T
        assert rows.max() - rows.min() + 1 == patch
        assert columns.max() - columns.min() + 1 == patch


@pytest.mark.parametrize(
    ("size", "expected"), [((256, 256), (30, 30)), ((24, 24), (1, 1)), ((65, 130), (6, 14))]
)
def test_the_network_gives_the_size_of_its_map(size, expected):
    x = images(2, *size)
    assert small_discriminator()(x, x).shape == (2, 1, *expected)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_smallest_image_trains_and_a_smaller_one_is_refused(layers, norm):
    network = small_discriminator(layers, norm)
    side = smallest_side(layers)
    assert network.smallest_side == side
    x = images(1, side, side)
    logits = network(x, x)
    assert logits.shape == (1, 1, 1, 1)
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    with pytest.raises(ValueError, match=f"needs {side} a side"):
        network(images(1, 100, side - 1), images(1, 100, side - 1))


# --- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_an_empty_batch_has_zero_gradients(norm):
    generator, discriminator = small_generator(norm=norm), small_discriminator(norm=norm)
    source = images(1, 29, 24)[:0]
    fake = generator(source)
    assert fake.shape == (0, 3, 29, 24)
    discriminator(fake, source).sum().backward()
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        assert parameter.grad is not None
        assert not parameter.grad.any()
    buffers = dict(generator.named_buffers())
    assert all(torch.isfinite(value).all() for value in buffers.values())


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_initial_weights(norm):
    torch.manual_seed(0)
    network = UNetGenerator(channels=16, levels=5, norm=norm)
    init_weights(network)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            n = module.weight.numel()  # five standard errors of the mean and of the deviation
            assert abs(module.weight.mean()) < 5 * 0.02 / n**0.5
            assert abs(module.weight.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
        elif isinstance(module, NORMS):
            assert 0 < (module.weight - 1).abs().max() < 0.12
        else:
            continue
        assert module.bias is None or not module.bias.any()
