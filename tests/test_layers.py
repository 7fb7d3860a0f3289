"""Layers that networks share: the gradient of resizing, and the layout of memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src import DeepMatting, UNetGenerator, fcn, u2net_lite, unet, unet_resnet50, unet_vgg16
from src.layers import (
    GatheredResize,
    extend,
    norm_by_image,
    resize,
    scatter_unpool,
)

LAST = torch.channels_last


def gradients(shape, size, dtype):
    """(ours, torch's in fp64) for the same random input and gradient of the result."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y = resize(x, torch.Size(size))
    gradient = torch.randn(y.shape).to(dtype)
    y.backward(gradient)
    F.interpolate(exact, size=size, mode="bilinear").backward(gradient.double())
    return x.grad, exact.grad


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 3, 5, 7), (1, 1, 9, 4), (2, 16, 12, 12)])
def test_gradient_of_doubling(shape):
    doubled = (2 * shape[2], 2 * shape[3])
    ours, exact = gradients(shape, doubled, torch.float32)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=2e-6)
    assert ours.is_contiguous(memory_format=LAST)
    ours, exact = gradients(shape, doubled, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-6)


def test_gradient_of_doubling_by_hand():
    # A single row (a, b): each becomes four pixels wide, and a also fills what lies left of it.
    x = torch.zeros(1, 1, 1, 2, requires_grad=True)
    gradient = torch.tensor([[[[1.0, 10.0, 100.0, 1000.0]] * 2]])
    resize(x, torch.Size((2, 4))).backward(gradient)
    a, b = 1 + 7.5 + 25, 2.5 + 75 + 1000
    assert x.grad.flatten().tolist() == [2 * a, 2 * b]


def test_only_fast_doubling_has_its_own_gradient():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    assert "Doubling" in resize(x, torch.Size((8, 8))).grad_fn.name()
    for other, size in ((x, (8, 7)), (x, (9, 8)), (x.double(), (8, 8))):
        y = resize(other, torch.Size(size))
        assert "Upsample" in y.grad_fn.name()
        torch.testing.assert_close(y, F.interpolate(other, size=size, mode="bilinear"))
    with torch.no_grad():
        assert resize(x, torch.Size((8, 8))).grad_fn is None


def test_an_empty_batch_has_a_gradient():
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    resize(x, torch.Size((8, 8))).sum().backward()
    assert x.grad.shape == x.shape


# -- what GPUs run, by its results on a CPU -------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 3, 5, 7), (10, 14)),
        ((2, 3, 1, 1), (2, 2)),
        ((2, 4, 9, 4), (18, 7)),  # one side larger, one as it was and cut
        ((1, 1, 3, 3), (24, 25)),
        ((2, 3, 8, 9), (5, 4)),
    ],
)
def test_gathered_gradient_of_resizing(shape, size):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    # As `join` gives it: a part of the gradient of a wider map.
    gradient = torch.randn(shape[0], shape[1] + 3, *size, dtype=torch.float64)
    gradient = gradient.contiguous(memory_format=LAST)[:, :-3]
    y = GatheredResize.apply(x, torch.Size(size))
    y.backward(gradient)
    expected = F.interpolate(reference, size=size, mode="bilinear")
    expected.backward(gradient)
    assert torch.equal(y, expected)
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-12, atol=1e-12)
    assert x.grad.is_contiguous(memory_format=LAST)


def test_gathered_gradient_of_an_empty_batch():
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    GatheredResize.apply(x, torch.Size((8, 8))).sum().backward()
    assert x.grad.shape == x.shape


def test_unpooling_by_scattering_is_torch_s():
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 8, 6, dtype=torch.float64).contiguous(memory_format=LAST)
    x, indices = F.max_pool2d(maps, 2, return_indices=True)
    results = []
    for unpool in (scatter_unpool, lambda x, indices: F.max_unpool2d(x, indices, 2)):
        values = x.clone().requires_grad_()
        y = unpool(values, indices)
        y.backward(maps)
        results.append((y, values.grad))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)
        assert ours.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("images", [1, 3])
def test_norm_by_image_is_instance_norm(images):
    torch.manual_seed(0)
    norm = nn.GroupNorm(5, 5).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(images, 5, 4, 6, dtype=torch.float64).contiguous(memory_format=LAST)
    y = norm_by_image(x, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(y, norm(x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=LAST)


def test_extending_repeats_the_border():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert extend(x, 1) is x
    assert extend(x, 2)[0, 0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5]]


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (u2net_lite, 3),
        (partial(unet, 4, 8), 3),
        (partial(unet_vgg16, 4, 8, batch_norm=True), 3),
        (partial(unet_resnet50, 4), 3),
        (partial(fcn, 4, 8, batch_norm=True), 3),
        (partial(DeepMatting, 8), 4),
        (partial(UNetGenerator, channels=8, levels=5), 3),
    ],
    ids=["u2net", "unet", "unet_vgg16", "unet_resnet50", "fcn", "matting", "pix2pix"],
)
def test_networks_stay_channels_last(network, channels):
    """One layer that answers in NCHW would have every later one convert its input."""
    model = network().to(memory_format=LAST).train()
    elsewhere = []

    def check(name, inputs, output):
        # NCHW with one channel or of one pixel is channels-last, too.
        tensors = [*inputs, output]
        elsewhere.extend(name for x in tensors if not x.is_contiguous(memory_format=LAST))

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, i, o, name=name: check(name, i, o))
    output = model(torch.randn(2, channels, 64, 64).contiguous(memory_format=LAST))
    sum(y.square().mean() for y in (output if isinstance(output, list) else [output])).backward()
    assert elsewhere == []
    gradients = [p.grad for p in model.parameters() if p.ndim == 4]
    assert gradients and all(grad.is_contiguous(memory_format=LAST) for grad in gradients)
