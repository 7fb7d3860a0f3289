"""Foreground colours of composites whose truth is known, and of a real photograph."""

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.matting.foreground import estimate_foreground


def composite(foreground, background, alpha):
    """alpha·F + (1 − alpha)·B as an 8-bit image stores it."""
    return (alpha * foreground + (1 - alpha) * background).round().to(torch.uint8)


def error(estimate, truth, alpha):
    """Mean absolute difference on mixed pixels, in grey levels, weighted by alpha as it shows."""
    weight = torch.where(alpha < 1, alpha, 0).double()
    difference = (estimate.double() - truth.double()).abs().mean(dim=0)
    return ((difference * weight).sum() / weight.sum()).item()


def soft_disc(height=120, width=160):
    """F, B fp32 [3, H, W] that vary smoothly, and the alpha of a disc with a frayed border."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [torch.sin(x / 15), torch.cos(y / 12), torch.sin((x + y) / 20)]
    foreground = torch.stack([180 + 50 * waves[0], 120 + 60 * waves[1], 60 + 40 * waves[2]])
    background = torch.stack([40 + 30 * waves[1], 60 + 50 * waves[2], 200 + 40 * waves[0]])
    distance = ((x - width / 2) ** 2 + (y - height / 2) ** 2).sqrt() / (height / 2.4)
    frayed = distance + 0.15 * torch.sin(x.float()) * torch.cos(y / 1.3)
    return foreground, background, (4 * (1 - frayed)).clamp(0, 1)


def read(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_smooth_colours_under_a_soft_alpha():
    foreground, background, alpha = soft_disc()
    image = composite(foreground, background, alpha)
    estimate = estimate_foreground(image, alpha)
    assert estimate.dtype == torch.uint8
    assert estimate.shape == image.shape
    assert error(image, foreground, alpha) > 40
    assert error(estimate, foreground, alpha) < 3
    assert torch.equal(estimate[:, alpha == 1], image[:, alpha == 1])


def test_plain_colours_are_found_nearly_exactly():
    colours = torch.tensor([[200.0, 40.0, 10.0], [20.0, 90.0, 180.0]])[..., None, None]
    alpha = soft_disc()[2]
    foreground = colours[0].expand(3, *alpha.shape)
    estimate = estimate_foreground(composite(*colours, alpha), alpha)
    seen = alpha > 0.02
    assert (estimate.double() - foreground)[:, seen].abs().max() <= 1
    assert error(estimate, foreground, alpha) < 0.01


def test_transposing_commutes():
    foreground, background, alpha = soft_disc(40, 57)
    image = composite(foreground, background, alpha)
    transposed = estimate_foreground(image.mT.contiguous(), alpha.T.contiguous())
    assert (transposed.mT.int() - estimate_foreground(image, alpha).int()).abs().max() <= 1


def test_alpha_of_ones_returns_the_image():
    image = torch.randint(0, 256, (3, 13, 9), dtype=torch.uint8)
    assert torch.equal(estimate_foreground(image, torch.ones(13, 9)), image)


def test_alpha_of_zeros_returns_something_smooth():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    estimate = estimate_foreground(image, torch.zeros(32, 32)).int()
    assert estimate.diff(dim=1).abs().max() <= 1
    assert estimate.diff(dim=2).abs().max() <= 1


def test_plain_image_stays_as_it_is():
    image = torch.tensor([7, 100, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 21, 34)
    alpha = torch.rand(21, 34, generator=torch.Generator().manual_seed(0))
    assert torch.equal(estimate_foreground(image, alpha), image)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 1), (2, 3)])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_tiny_images(size, value):
    image = torch.full((3, *size), 77, dtype=torch.uint8)
    assert torch.equal(estimate_foreground(image, torch.full(size, value)), image)


def test_threads_and_alpha_dtype_change_nothing():
    foreground, background, alpha = soft_disc(200, 300)
    image = composite(foreground, background, alpha)
    threads = torch.get_num_threads()
    estimate = estimate_foreground(image, alpha)
    try:
        torch.set_num_threads(2)
        assert torch.equal(estimate_foreground(image, alpha.double()), estimate)
    finally:
        torch.set_num_threads(threads)


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="differ in size"):
        estimate_foreground(torch.zeros(3, 4, 5, dtype=torch.uint8), torch.zeros(5, 4))


def test_exact_case(shared_data):
    folder = shared_data / "matting" / "pymatting_test32"
    foreground, background, image, alpha = (
        read(folder / f"test{part}.png").float()
        for part in ("_foreground", "_background", "", "_alpha")
    )
    alpha = alpha[0] / 255
    mixed = composite(foreground, background, alpha)
    assert error(mixed, foreground, alpha) > 25
    assert error(estimate_foreground(mixed, alpha), foreground, alpha) < 0.1
    # The stored picture was composited on other terms: up to 90 grey levels off the equation.
    stored = image.to(torch.uint8)
    estimate = estimate_foreground(stored, alpha)
    assert error(estimate, foreground, alpha) < 0.7 * error(stored, foreground, alpha)


def test_no_halo_around_the_lemur(shared_data):
    folder = shared_data / "matting" / "pymatting_lemur"
    image, foreground = read(folder / "lemur.png"), read(folder / "lemur_foreground.png")
    alpha = read(folder / "lemur_alpha.png")[0] / 255
    estimate = estimate_foreground(image, alpha)
    # Against the colours that another, far slower method found for the same alpha.
    assert error(image, foreground, alpha) > 3.5
    assert error(estimate, foreground, alpha) < 1.2
    # The white fur of the head stands before dark trees, which must not show at its rim.
    rim = torch.zeros_like(alpha, dtype=torch.bool)
    rim[60:90, 310:390] = True
    rim &= (alpha > 0.1) & (alpha < 0.9)
    assert image[:, rim].float().quantile(0.1) < 130
    assert estimate[:, rim].float().quantile(0.1) > 200
