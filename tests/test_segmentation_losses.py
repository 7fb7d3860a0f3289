"""The segmentation losses against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from tasks.segmentation.losses import (
    IGNORE,
    dice_loss,
    focal_loss,
    label_counts,
    one_hot_cross_entropy,
    pixel_cross_entropy,
)

LN2, LN3 = math.log(2), math.log(3)
ALL = [pixel_cross_entropy, focal_loss, one_hot_cross_entropy, dice_loss]
names = pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.__name__)

# Two classes; softmax of (0, ln 3) is (¼, ¾), of (0, 0) is (½, ½). One row of three pixels:
#   logits (0, ln 3) → class 1, p = ¾;   logits (0, ln 3) → class 0, p = ¼;   ignored.
LOGITS = torch.tensor([[[[0.0, 0.0, 5.0]], [[LN3, LN3, -7.0]]]])
TARGET = torch.tensor([[[1, 0, IGNORE]]], dtype=torch.uint8)
COST_1, COST_0 = math.log(4 / 3), math.log(4)


def random_batch(size=4, classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(size, classes, 6, 7, generator=generator, dtype=dtype)
    target = torch.randint(0, classes + 1, (size, 1, 6, 7), generator=generator)
    target[target == classes] = IGNORE
    return logits.requires_grad_(), target.to(torch.uint8)


def test_cross_entropy_is_the_mean_over_pixels_that_count():
    assert pixel_cross_entropy(LOGITS, TARGET).item() == pytest.approx((COST_1 + COST_0) / 2)


def test_class_weights_weigh_sum_and_count():
    loss = pixel_cross_entropy(LOGITS, TARGET, class_weights=[3.0, 1.0])
    assert loss.item() == pytest.approx((COST_1 + 3 * COST_0) / 4)
    alone = pixel_cross_entropy(LOGITS, TARGET, class_weights=[0.0, 2.0])
    assert alone.item() == pytest.approx(COST_1)


def test_focal_loss():
    easy, hard = 0.5 * (1 / 4) ** 2 * COST_1, 0.5 * (3 / 4) ** 2 * COST_0
    assert focal_loss(LOGITS, TARGET).item() == pytest.approx((easy + hard) / 2)
    # p is that of the softmax, whatever the weights
    weighted = focal_loss(LOGITS, TARGET, class_weights=[3.0, 1.0])
    assert weighted.item() == pytest.approx((easy + 3 * hard) / 4)
    plain = focal_loss(LOGITS, TARGET, alpha=1.0, gamma=0.0)
    assert plain.item() == pytest.approx((COST_1 + COST_0) / 2)


def test_focal_loss_has_finite_gradients_where_the_answer_is_certain():
    logits = torch.tensor([[[[80.0]], [[-80.0]]]], requires_grad=True)
    focal_loss(logits, torch.zeros(1, 1, 1, dtype=torch.uint8), gamma=0.5).backward()
    assert torch.isfinite(logits.grad).all()


def test_one_hot_cross_entropy():
    # pixel 1: channel 0 at logit 0 (ln 2), channel 1 right at σ(ln 3) = ¾
    # pixel 2: channel 0 at logit 0 (ln 2), channel 1 wrong at 1 − σ(ln 3) = ¼
    expected = ((LN2 + COST_1) / 2 + (LN2 + COST_0) / 2) / 2
    assert one_hot_cross_entropy(LOGITS, TARGET).item() == pytest.approx(expected)


def test_dice_loss():
    # class 0: Σpg = ¼, Σp = ½, Σg = 1;  class 1: Σpg = ¾, Σp = 3/2, Σg = 1
    s = 1e-5
    dice = ((0.5 + s) / (1.5 + s) + (1.5 + s) / (2.5 + s)) / 2
    assert dice_loss(LOGITS, TARGET).item() == pytest.approx(1 - dice, abs=1e-6)


def test_dice_loss_averages_over_images_that_have_a_pixel_that_counts():
    logits = torch.cat([LOGITS, LOGITS, torch.randn(1, 2, 1, 3)])
    target = torch.cat([TARGET, torch.full((2, 1, 3), IGNORE, dtype=torch.uint8)])
    target[1, 0, 0] = 1
    # image 2 has class 1 only: Σpg = ¾, Σp = ¾, Σg = 1
    s = 1e-5
    second = 1 - (1.5 + s) / (1.75 + s)
    expected = (dice_loss(LOGITS, TARGET).item() + second) / 2
    assert dice_loss(logits, target).item() == pytest.approx(expected, abs=1e-6)


def test_dice_loss_does_not_tire_of_many_classes():
    """What a right answer gains does not shrink with the classes that the image lacks."""
    target = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    for classes in (2, 21):
        right, wrong = torch.zeros(2, 1, classes, 1, 2)
        right[0, 0, 0, 0] = right[0, 1, 0, 1] = 20
        wrong[0, 0] = 20
        assert dice_loss(right, target).item() == pytest.approx(0, abs=1e-5)
        # all class 0: 2·1 / (2 + 1) of class 0, nothing of class 1
        assert dice_loss(wrong, target).item() == pytest.approx(1 - (2 / 3) / 2, abs=1e-4)


def test_perfect_answers_cost_nothing():
    target = torch.tensor([[[0, 1], [2, IGNORE]]], dtype=torch.uint8)
    logits = torch.full((1, 3, 2, 2), -60.0)
    logits[0, [0, 1, 2], [0, 0, 1], [0, 1, 0]] = 60.0
    for loss in ALL:
        assert loss(logits, target).item() == pytest.approx(0, abs=1e-7), loss.__name__


def test_cross_entropy_equals_torch():
    logits, target = random_batch()
    weights = torch.tensor([0.5, 1, 2, 3, 0.25], dtype=torch.float64)
    reference = F.cross_entropy(logits, target[:, 0].long(), weights, ignore_index=IGNORE)
    loss = pixel_cross_entropy(logits, target, class_weights=weights.tolist())
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, reference)]
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


@names
def test_a_target_may_lack_the_channel(loss):
    logits, target = random_batch()
    assert loss(logits, target[:, 0]).item() == loss(logits, target).item()


@names
def test_logits_are_resized_to_the_target(loss):
    logits, target = random_batch()
    small = logits[..., ::2, ::2]
    resized = F.interpolate(small, (6, 7), mode="bilinear", align_corners=False)
    assert loss(small, target).item() == loss(resized, target).item()


@names
def test_nothing_that_counts_gives_exactly_zero(loss):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((2, 1, 4, 4), IGNORE, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()


@names
@pytest.mark.parametrize("size", [(4, 4), (2, 3)])
def test_empty_batch_gives_zero_with_zero_gradients(loss, size):
    weight = torch.ones(1, requires_grad=True)
    value = loss(weight * torch.zeros(0, 3, *size), torch.zeros(0, 1, 4, 4, dtype=torch.uint8))
    value.backward()
    assert value.item() == 0
    assert weight.grad.item() == 0


@names
def test_shards_weighed_by_what_counts_are_one_batch(loss):
    logits, target = random_batch()
    target[3] = IGNORE
    weighted = loss is not dice_loss
    options = {"class_weights": [0.5, 1, 2, 3, 0.25]} if weighted else {}
    whole = loss(logits, target, **options)
    shards = list(zip(logits.split([3, 1, 0]), target.split([3, 1, 0]), strict=True))
    weights = torch.tensor([0.5, 1, 2, 3, 0.25], dtype=torch.float64)
    counts = [
        label_counts(part, 5).double() @ weights
        if weighted
        else (part != IGNORE).any((1, 2, 3)).sum()
        for _, part in shards
    ]
    terms = [loss(*shard, **options) * n for shard, n in zip(shards, counts, strict=True)]
    average = sum(terms) / sum(counts)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (average, whole)]
    torch.testing.assert_close(average, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-18)


@names
def test_precision(loss):
    logits, target = random_batch()
    assert loss(logits, target).dtype == torch.float64
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(half.double(), target).item(), rel=1e-5)


@names
def test_tables_made_in_inference_serve_training(loss):
    logits, target = random_batch(classes=9)
    with torch.inference_mode():
        loss(logits, target)
    loss(logits, target).backward()
    assert logits.grad.any()


@names
def test_labels_that_are_no_class_are_named(loss):
    target = TARGET.clone()
    target[0, 0, 0] = 7
    with pytest.raises(ValueError, match="label 7: classes are 0 to 1, and 255 is ignored"):
        loss(LOGITS, target)


@names
def test_what_does_not_pair_up_is_refused(loss):
    with pytest.raises(ValueError, match=r"\[1, 2, 1, 3\] and target \[2, 1, 1, 3\]"):
        loss(LOGITS, TARGET.repeat(2, 1, 1))
    with pytest.raises(ValueError, match="int64"):
        loss(LOGITS, TARGET.long())


def test_class_weights_must_be_one_per_class():
    with pytest.raises(ValueError, match="3 class weights for 2 classes"):
        pixel_cross_entropy(LOGITS, TARGET, class_weights=[1, 1, 1])


def test_label_counts():
    assert label_counts(TARGET, 3).tolist() == [1, 1, 0]
    assert label_counts(TARGET[:0], 3).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="label 1: classes are 0 to 0"):
        label_counts(TARGET, 1)
