"""The saliency loss against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from tasks.saliency.losses import soft_iou_loss
from train_utils.losses import criterion, unit_values

# σ(ln 3) = ¾ and σ(−ln 3) = ¼, so pixels cost −ln ¾ = 0.28768 or −ln ¼ = 1.38629; σ(0) = ½, ln 2.
LN3 = math.log(3)
LOGITS = torch.tensor([[[[LN3, LN3], [0.0, -LN3]]]])
TARGET = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
MEAN = (0.2876820724 + 1.3862943611 + 0.6931471806 + 1.3862943611) / 4


def random_batch(size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, 1, 6, 5, generator=generator, dtype=dtype)
    target = torch.randint(0, 256, (size, 1, 6, 5), generator=generator, dtype=torch.uint8)
    return logits.requires_grad_(), target


def test_one_output_is_the_mean_over_pixels():
    loss = criterion(LOGITS, TARGET)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(MEAN, abs=1e-6)


def test_seven_outputs_are_summed_with_weight_one():
    outputs = [LOGITS] + [torch.zeros_like(LOGITS)] * 6
    assert criterion(outputs, TARGET).item() == pytest.approx(MEAN + 6 * 0.6931471806, abs=1e-5)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (torch.tensor([[[[255, 0], [255, 255]]]], dtype=torch.uint8), MEAN),
        (torch.tensor([[[[True, False], [True, True]]]]), MEAN),
        (TARGET.half(), MEAN),
        # grey 51 means t = 0.2: 0.2·0.28768 + 0.8·1.38629 = 1.16657 at ln 3, and 0.50740 at −ln 3
        (
            torch.full((1, 1, 2, 2), 51, dtype=torch.uint8),
            (1.1665719034 + 1.1665719034 + 0.6931471806 + 0.5074045302) / 4,
        ),
    ],
    ids=["uint8", "bool", "half", "grey"],
)
def test_target_dtypes(target, expected):
    assert criterion(LOGITS, target).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_values_keeps_the_ends_exact(dtype):
    codes = unit_values(torch.tensor([0, 51, 255], dtype=torch.uint8), dtype)
    assert codes.dtype == dtype
    assert codes.tolist() == [0, pytest.approx(0.2), 1]


def test_unit_values_refuses_class_indices():
    with pytest.raises(TypeError, match="int64"):
        unit_values(torch.tensor([0, 1]))


def test_value_and_gradient_equal_the_reference():
    logits, target = random_batch(3)
    reference = F.binary_cross_entropy_with_logits(logits, target.float() / 255)
    loss = criterion([logits], target)
    (expected,) = torch.autograd.grad(reference, logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_large_logits_stay_finite():
    logits = torch.tensor([[[[200.0, -200.0]]]], requires_grad=True)
    loss = criterion(logits, torch.tensor([[[[0.0, 1.0]]]]))
    loss.backward()
    assert loss.item() == 200
    assert logits.grad.tolist() == [[[[0.5, -0.5]]]]


def test_bf16_logits_are_scored_in_fp32():
    _, target = random_batch(2)
    images = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    layer = torch.nn.Conv2d(3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(images)
        loss = criterion([logits, logits], target)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    reference = F.binary_cross_entropy_with_logits(logits.double(), target.double() / 255)
    assert loss.item() == pytest.approx(2 * reference.item(), rel=1e-6)
    assert criterion([logits, logits], target).item() == loss.item()  # without autocast's casts
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32


def test_fp64_stays_fp64():
    logits, target = random_batch(2, dtype=torch.float64)
    assert criterion(logits, target).dtype == torch.float64


def test_other_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\[1, 1, 2, 2\] and target \[1, 1, 4, 4\]"):
        criterion([LOGITS], torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="differ in shape"):  # would broadcast
        criterion(LOGITS, TARGET[0])
    with pytest.raises(ValueError, match="no outputs"):
        criterion([], TARGET)


# -- soft intersection over union -----------------------------------------------------------------


def test_soft_iou_of_each_image():
    """σ = ¾, ¾, ½, ¼ on t = 1, 0, 1, 1: overlap 1.5, union 2.25 + 3 − 1.5 = 3.75."""
    expected = 1 - (1.5 + 1) / (3.75 + 1)
    assert soft_iou_loss(LOGITS, TARGET).item() == pytest.approx(expected, abs=1e-6)
    # Nothing there, σ(0) = ½ on four pixels: 1 − 1 / (2 + 1).
    nothing = torch.zeros_like(TARGET)
    assert soft_iou_loss(torch.zeros_like(LOGITS), nothing).item() == pytest.approx(2 / 3, abs=1e-6)
    both = soft_iou_loss(
        torch.cat([LOGITS, torch.zeros_like(LOGITS)]), torch.cat([TARGET, nothing])
    )
    assert both.item() == pytest.approx((expected + 2 / 3) / 2, abs=1e-6)  # a mean over images
    twice = soft_iou_loss([LOGITS, LOGITS], TARGET)
    assert twice.item() == pytest.approx(2 * expected, abs=1e-6)


def test_soft_iou_of_certain_maps_and_of_other_shapes():
    assert soft_iou_loss(40 * (2 * TARGET - 1), TARGET).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="differ in shape"):
        soft_iou_loss(LOGITS, TARGET[..., :1])
