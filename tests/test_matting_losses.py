"""The two matting losses against numbers worked out by hand."""

import math

import pytest
import torch

from tasks.matting.losses import alpha_prediction_loss, compositional_loss


def maps(*rows: list[float]) -> torch.Tensor:
    """One picture, [1, channels, 1, W], from a row per channel."""
    return torch.tensor(rows, dtype=torch.float64)[None, :, None]


PREDICTED = maps([0.5, 0.25, 1.0, 0.0])
ALPHA = maps([1.0, 0.0, 0.0, 0.0])
UNKNOWN = maps([1, 1, 0, 1]).bool()
# |α̂ − α| is ½, ¼ and 0 on the unknown pixels; where it is 0, √ε² = 1e-6 remains.
ALPHA_LOSS = (0.5 + 0.25 + 1e-6) / 3

FOREGROUND = maps([1.0, 0.8, 0.0, 0.3], [1.0, 0.4, 0.0, 0.3], [0.0, 0.0, 0.0, 0.3])
BACKGROUND = maps([0.0, 0.4, 0.0, 0.1], [1.0, 0.0, 0.0, 0.2], [0.6, 0.0, 0.0, 0.3])
# As alpha says: F in the first pixel, B in the others.
IMAGE = maps([1.0, 0.4, 0.0, 0.1], [1.0, 0.0, 0.0, 0.2], [0.0, 0.0, 0.0, 0.3])
# ½F + ½B − I: −½, 0, 0.3; ¼F + ¾B − I: 0.1, 0.1, 0; B − I: 0, 0, 0. Means over three channels.
COMPOSITIONAL_LOSS = (0.8 + 0.2 + 5 * 1e-6) / 3 / 3


def test_alpha_prediction_loss_by_hand():
    loss = alpha_prediction_loss(PREDICTED, ALPHA, UNKNOWN)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(ALPHA_LOSS, abs=1e-6)


def test_compositional_loss_by_hand():
    loss = compositional_loss(PREDICTED, FOREGROUND, BACKGROUND, IMAGE, UNKNOWN)
    assert loss.item() == pytest.approx(COMPOSITIONAL_LOSS, abs=1e-6)


def test_the_truth_costs_epsilon():
    assert alpha_prediction_loss(ALPHA, ALPHA, UNKNOWN).item() == pytest.approx(1e-6, rel=1e-3)
    loss = compositional_loss(ALPHA, FOREGROUND, BACKGROUND, IMAGE, UNKNOWN)
    assert loss.item() == pytest.approx(1e-6, rel=1e-3)


def test_codes_mean_shares_of_255():
    predicted = torch.full((1, 1, 1, 1), 0.5)
    code = torch.full((1, 1, 1, 1), 51, dtype=torch.uint8)
    colour = code.expand(1, 3, 1, 1)
    unknown = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    assert alpha_prediction_loss(predicted, code, unknown).item() == pytest.approx(0.3, abs=1e-6)
    # F = 0.2, B = 0, ½F = 0.1 against 0.2
    loss = compositional_loss(predicted, colour, torch.zeros_like(colour), colour, unknown)
    assert loss.item() == pytest.approx(0.1, abs=1e-6)


def test_gradients_reach_unknown_pixels_only():
    predicted = PREDICTED.clone().requires_grad_()
    alpha_prediction_loss(predicted, ALPHA, UNKNOWN).backward()
    # ±1/3; 0 at the third pixel, which is known, and at the last one, which is right.
    assert predicted.grad.flatten().tolist() == pytest.approx([-1 / 3, 1 / 3, 0, 0], abs=1e-6)


def both(predicted, alpha, colours, unknown):
    return [
        alpha_prediction_loss(predicted, alpha, unknown),
        compositional_loss(predicted, colours, colours, colours, unknown),
    ]


@pytest.mark.parametrize("size", [0, 2], ids=["empty batch", "nothing unknown"])
def test_nothing_to_learn_costs_nothing(size):
    predicted = torch.rand(size, 1, 4, 4, requires_grad=True)
    colours = torch.rand(size, 3, 4, 4)
    unknown = torch.zeros(size, 1, 4, 4, dtype=torch.bool)
    for loss in both(predicted, predicted.detach(), colours, unknown):
        assert loss.item() == 0
        predicted.grad = None
        loss.backward()
        assert predicted.grad.shape == predicted.shape
        assert not predicted.grad.any()


def test_half_precision_predictions_are_compared_in_full():
    predicted = torch.full((1, 1, 300, 300), 0.5, dtype=torch.bfloat16)
    alpha, unknown = torch.full((1, 1, 300, 300), 0.501), predicted > 0
    loss = alpha_prediction_loss(predicted, alpha, unknown)
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), 1e-3, rel_tol=1e-3)


@pytest.mark.parametrize("odd", range(3))
def test_shapes_that_would_broadcast_are_refused(odd):
    predicted, alpha, unknown = (torch.ones(2, 1, 3, 3) for _ in range(3))
    tensors = [predicted, alpha, unknown.bool()]
    tensors[odd] = tensors[odd][:1]
    with pytest.raises(ValueError, match="shapes differ"):
        alpha_prediction_loss(*tensors)
