"""Matting metrics: hand-computed values, a plain reimplementation, and bits nothing may change."""

import math
from collections import deque

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.matting import metrics as matting_metrics
from tasks.matting.metrics import (
    MattingMetrics,
    connectivity_errors,
    finish_alpha,
    gradient_errors,
    largest_component,
)
from tasks.matting.trimaps import read_trimap
from train_utils.image_io import read_mask
from train_utils.metrics import MAX_IMAGES, MAX_PIXELS

NAMES = ["loss", "SAD", "MSE", "Grad", "Conn"]


def codes(rows):
    return torch.tensor(rows, dtype=torch.uint8)


def scored(prediction, truth, trimap, metric=None):
    """The metric after one image; prediction in [0, 1], truth and trimap as 8-bit rows."""
    metric = metric or MattingMetrics()
    prediction = torch.as_tensor(prediction, dtype=torch.float64)
    metric.update([prediction[None]], [torch.stack([codes(truth), codes(trimap)])])
    return metric


# -- a plain reimplementation, pixel by pixel -----------------------------------------------------


def flood_fill(mask):
    """The largest 4-connected component, the first in reading order among equals."""
    height, width = mask.shape
    seen, best = np.zeros_like(mask), []
    for start in zip(*np.nonzero(mask), strict=True):
        if seen[start]:
            continue
        seen[start] = True
        members, queue = [], deque([start])
        while queue:
            y, x = queue.popleft()
            members.append((y, x))
            for other in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= other[0] < height and 0 <= other[1] < width
                if inside and mask[other] and not seen[other]:
                    seen[other] = True
                    queue.append(other)
        best = members if len(members) > len(best) else best
    component = np.zeros_like(mask)
    for member in best:
        component[member] = True
    return component


def plain_gradient(plane):
    """|∇| with the two-dimensional kernel of the evaluation code, written out."""

    def gauss(x):
        return math.exp(-(x**2) / (2 * 1.4**2)) / (1.4 * math.sqrt(2 * math.pi))

    half = 4  # ⌈1.4 · √(−2 ln(√(2π) · 1.4 · 0.01))⌉ = ⌈3.62⌉
    offsets = range(-half, half + 1)
    kernel = np.array([[gauss(y) * -x * gauss(x) / 1.4**2 for x in offsets] for y in offsets])
    kernel /= math.sqrt((kernel**2).sum())
    padded = np.pad(plane, half, mode="edge")
    height, width = plane.shape
    magnitude = np.zeros_like(plane)
    for y in range(height):
        for x in range(width):
            window = padded[y : y + 2 * half + 1, x : x + 2 * half + 1][::-1, ::-1]
            magnitude[y, x] = math.hypot((window * kernel).sum(), (window * kernel.T).sum())
    return magnitude


def plain_scores(alpha, truth, unknown):
    """The five scores of one image, fp64 [H, W]; alpha finished, unknown bool."""
    difference = np.abs(alpha - truth)[unknown]
    level = np.full(alpha.shape, -1.0)
    for k in range(1, 11):
        component = flood_fill((alpha >= k / 10) & (truth >= k / 10))
        level[(level < 0) & ~component] = (k - 1) / 10
    level[level < 0] = 1
    phi = [1 - (v - level) * (v - level >= 0.15) for v in (alpha, truth)]
    return {
        "loss": np.mean(np.sqrt(difference**2 + 1e-12)),
        "SAD": difference.sum() / 1000,
        "MSE": np.mean(difference**2),
        "Grad": ((plain_gradient(alpha) - plain_gradient(truth)) ** 2)[unknown].sum() / 1000,
        "Conn": np.abs(phi[0] - phi[1])[unknown].sum() / 1000,
    }


def random_case(seed, size=(23, 31)):
    """Smooth random alphas with a trimap that fits the truth: prediction, truth, trimap."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 1, 5, 6, generator=generator) * 1.8 - 0.4
    planes = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[:, 0]
    truth = (planes[0] * 255).round().to(torch.uint8)
    trimap = torch.full_like(truth, 128)
    trimap[truth == 0] = 0
    trimap[truth == 255] = 255
    prediction = (0.7 * planes[0] + 0.3 * planes[1]).double()
    return prediction, truth, trimap


# -- finishing ------------------------------------------------------------------------------------


def test_known_pixels_are_replaced():
    alpha = finish_alpha(torch.tensor([[[0.25, 0.5, 0.75]]]), codes([[[0, 128, 255]]]))
    assert alpha.dtype == torch.float64
    assert alpha.tolist() == [[0, 128 / 255, 1]]  # ½ rounded to a code, half to even


def test_prediction_is_resized_to_the_trimap():
    unknown = torch.full((1, 4), 128, dtype=torch.uint8)
    # Pixel centres at ¼, ¾, 5/4, 7/4 of the two source pixels ½ and 3/2.
    resized = finish_alpha(torch.tensor([[0.0, 1.0]]), unknown)
    assert (resized * 255).tolist() == [[0, 64, 191, 255]]  # 63.75 and 191.25


def test_codes_and_rounding_and_nan():
    unknown = torch.full((1, 2), 128, dtype=torch.uint8)
    assert finish_alpha(codes([[0, 255]]), unknown).tolist() == [[0, 1]]
    assert finish_alpha(torch.tensor([[-1e-7, 1 + 1e-6]]), unknown).tolist() == [[0, 1]]
    assert math.isnan(finish_alpha(torch.tensor([[math.nan, 1.0]]), unknown)[0, 0])


def test_wrong_trimaps_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        finish_alpha(torch.rand(2, 2), torch.rand(2, 2))
    with pytest.raises(ValueError, match="not one map"):
        finish_alpha(torch.rand(2, 2), torch.zeros(2, 2, 2, dtype=torch.uint8))


# -- hand-computed values -------------------------------------------------------------------------


def test_differences_count_on_unknown_pixels_only():
    # Differences on the unknown: 0.2 and −0.4; the known ones of 0.9 and 1 are replaced.
    metric = scored([[0.9, 0.6, 0.4, 0.0]], [[0, 102, 204, 255]], [[0, 128, 128, 255]])
    scores = metric.compute()
    assert list(scores) == NAMES
    assert scores["SAD"] == pytest.approx(0.6 / 1000, abs=2e-8)
    assert scores["MSE"] == pytest.approx((0.04 + 0.16) / 2, abs=1e-10)
    assert scores["loss"] == pytest.approx(0.3, abs=1e-10)
    assert metric.remarks() == []


def test_any_value_between_is_unknown():
    metric = scored([[0.0, 0.0]], [[255, 255]], [[127, 1]])
    assert metric.compute()["MSE"] == pytest.approx(1, abs=1e-10)


def test_true_alpha_scores_zero():
    for seed in range(3):
        _, truth, trimap = random_case(seed)
        scores = scored(truth.double() / 255, truth.tolist(), trimap.tolist()).compute()
        assert scores.pop("loss") == pytest.approx(1e-6, abs=1e-10)
        assert set(scores.values()) == {0}


def test_gradient_of_a_step():
    truth, flat = np.zeros((1, 20)), np.zeros((1, 20))
    truth[:, 10:] = 1
    weight = [-x * math.exp(-(x**2) / 3.92) for x in range(-4, 5)]
    smooth = [math.exp(-(x**2) / 3.92) for x in range(-4, 5)]
    norm = math.hypot(*weight) * math.hypot(*smooth)
    # Rows are alike, so smoothing multiplies by its kernel's sum. At both pixels beside the step
    # one half of the derivative's kernel lies on ones (in its middle it is 0).
    expected = sum(weight[:4]) * sum(smooth) / norm
    errors = gradient_errors(flat, truth)
    assert errors[0, 10] == pytest.approx(expected**2, rel=1e-12)
    assert errors[0, 9] == pytest.approx(expected**2, rel=1e-12)
    assert errors[0, 5] == 0
    assert errors[0, 6] == pytest.approx((weight[0] * sum(smooth) / norm) ** 2, rel=1e-12)


def test_gradient_errors_keep_their_bound():
    # The largest derivative along x and y at once needs ones where each kernel is positive.
    smooth, derivative = map(np.array, matting_metrics._gaussian_kernels())
    along_x, along_y = np.outer(smooth, derivative), np.outer(derivative, smooth)
    bound = max(np.maximum(along_x, 0).sum(), np.maximum(along_y, 0).sum()) ** 2 * 2
    assert bound <= matting_metrics._MAX_GRADIENT_ERROR


def test_connectivity_of_two_islands():
    truth = np.array([[1.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    alpha = np.array([[1.0, 1.0, 0.5, 0.0, 1.0, 0.7]])
    # Thresholds to 0.5 connect pixels 0–2, above that 0–1: l = 1, 1, 0.5, 0, 0, 0. At 0.6 the two
    # islands 0–1 and 4–5 are equally large, and the first in reading order counts.
    # Pixel 2: φ(α) = 1 − 0.5, φ(α̂) = 1. Pixel 5: φ(α) = 0, φ(α̂) = 1 − 0.7.
    errors = connectivity_errors(alpha, truth)
    assert errors == pytest.approx(np.array([[0, 0, 0.5, 0, 0, 0.3]]), abs=1e-12)


def test_connectivity_ends_where_a_pixel_first_drops_out():
    truth = np.array([[0.1, 0.1, 0.1, 0.0, 1.0, 1.0]])
    alpha = np.array([[0.1, 0.1, 0.1, 0.0, 1.0, 0.4]])
    # The first three pixels are the largest component at 0.1, the last two only from 0.2 on: too
    # late, their l is 0.
    errors = connectivity_errors(alpha, truth)
    assert errors == pytest.approx(np.array([[0, 0, 0, 0, 0, 0.6]]), abs=1e-12)


def test_connectivity_forgives_small_distances():
    truth, alpha = np.array([[1.0, 0.64, 0.66]]), np.array([[1.0, 0.5, 0.5]])
    # l = 1, 0.5, 0.5: distances of 0.14 do not count, those of 0.16 do.
    assert connectivity_errors(alpha, truth) == pytest.approx(np.array([[0, 0, 0.16]]), abs=1e-12)


@pytest.mark.parametrize("tenth", [2, 4, 6, 8, 10])
def test_codes_that_are_tenths_reach_their_threshold(tenth):
    plane = finish_alpha(codes([[51 * tenth // 2]]), codes([[128]])).numpy()
    assert matting_metrics._connected_steps(plane).item() == tenth


def test_fully_disconnected_images():
    assert (connectivity_errors(np.zeros((2, 2)), np.ones((2, 2))) == 1).all()


# -- connected components -------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5, 0.6, 0.75, 0.95])
def test_components_are_those_of_a_flood_fill(share):
    generator = np.random.default_rng(0)
    for size in [(1, 1), (1, 12), (9, 1), (7, 13), (40, 31)]:
        for _ in range(12):
            mask = generator.random(size) < share
            assert np.array_equal(largest_component(mask), flood_fill(mask))


def test_components_of_winding_shapes():
    comb = np.ones((30, 41), dtype=bool)
    comb[:-1, 1::2] = False
    snake = np.ones((41, 30), dtype=bool)
    snake[1::4, :-1] = snake[3::4, 1:] = False
    for shape in (comb, comb[::-1], snake, snake[:, ::-1], snake.T, comb.T, np.zeros_like(comb)):
        assert np.array_equal(largest_component(shape), shape)


def test_components_do_not_join_over_corners_or_row_ends():
    mask = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 1]], dtype=bool)
    assert largest_component(mask).astype(int).tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 1]]


# -- against the plain reimplementation -----------------------------------------------------------


def assert_agrees(metric, prediction, truth, trimap):
    alpha = finish_alpha(prediction, trimap).numpy()
    expected = plain_scores(alpha, truth.numpy() / 255, (trimap == 128).numpy())
    for name, value in metric.compute().items():
        assert value == pytest.approx(expected[name], abs=5e-7), name
    return expected


@pytest.mark.parametrize("seed", range(4))
def test_random_images_agree(seed):
    prediction, truth, trimap = random_case(seed)
    metric = scored(prediction, truth.tolist(), trimap.tolist())
    expected = assert_agrees(metric, prediction, truth, trimap)
    assert min(expected.values()) > 1e-5  # nothing agrees by being zero


def test_smaller_prediction_agrees():
    _, truth, trimap = random_case(5)
    prediction = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    metric = MattingMetrics()
    metric.update(prediction[None, None], torch.stack([truth, trimap])[None])
    assert_agrees(metric, prediction, truth, trimap)


@pytest.mark.parametrize("value", [0.5, 0.0])
def test_exact_case_agrees(shared_data, value):
    folder = shared_data / "matting" / "pymatting_test32"
    truth = read_mask(folder / "test_alpha.png")[0].as_subclass(torch.Tensor)
    trimap = read_trimap(folder / "test_trimap.png")[0].as_subclass(torch.Tensor)
    prediction = torch.full((32, 32), value)
    metric = scored(prediction, truth.tolist(), trimap.tolist())
    expected = assert_agrees(metric, prediction, truth, trimap)
    assert metric.compute()["SAD"] > 0.1
    assert expected["Conn"] > 0.01


@pytest.mark.parametrize("name", ["GT04", "GT19"])
def test_photographs_agree(shared_data, name):
    truth = read_mask(shared_data / "matting" / "alpha" / f"{name}.png")[0]
    trimap = read_trimap(shared_data / "matting" / "trimap" / f"{name}.png")[0]
    unknown = np.argwhere(trimap.numpy() == 128)
    top, left = np.maximum(unknown[len(unknown) // 2] - 50, 0)
    window = (slice(top, top + 100), slice(left, left + 100))
    truth, trimap = (plane[window].as_subclass(torch.Tensor) for plane in (truth, trimap))
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    prediction = (truth.double() / 255 + 0.2 * noise).clamp(0, 1)
    metric = scored(prediction, truth.tolist(), trimap.tolist())
    expected = assert_agrees(metric, prediction, truth, trimap)
    assert min(expected.values()) > 1e-3


def test_better_predictions_score_better():
    prediction, truth, trimap = random_case(2)
    exact = truth.double() / 255
    series = [
        scored(torch.lerp(exact, prediction, t), truth.tolist(), trimap.tolist()).compute()
        for t in (0.0, 0.25, 0.5, 1.0)
    ]
    for name in NAMES:
        values = [scores[name] for scores in series]
        assert values == sorted(values)
        assert values[0] < values[-1]


# -- the state ------------------------------------------------------------------------------------


def cases():
    found = [random_case(seed, (20 + seed, 33 - seed)) for seed in range(5)]
    # One image without unknown pixels, however wrong its prediction.
    found.append((torch.zeros(4, 4).double(), codes([[255] * 4] * 4), codes([[255] * 4] * 4)))
    return [(prediction[None], torch.stack([truth, trimap])) for prediction, truth, trimap in found]


def test_order_split_and_threads_change_no_bit():
    pairs = cases()
    whole = MattingMetrics()
    whole.update(*zip(*pairs, strict=True))
    parts = [MattingMetrics(), MattingMetrics()]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for i, (prediction, target) in enumerate(reversed(pairs)):
            parts[i % 2].update([prediction], [target])
    finally:
        torch.set_num_threads(threads)
    parts[0].merge(parts[1].state)
    assert torch.equal(parts[0].state, whole.state)
    assert whole.count == 6


def test_images_without_unknown_pixels_are_left_out():
    pairs = cases()
    metric, without = MattingMetrics(policy="dilation by 1 to 30 pixels"), MattingMetrics()
    metric.update(*zip(*pairs, strict=True))
    without.update(*zip(*pairs[:-1], strict=True))
    for name, value in metric.compute().items():
        assert value == pytest.approx(without.compute()[name], rel=1e-14)
    assert metric.remarks() == [
        "trimap policy: dilation by 1 to 30 pixels",
        "1 of 6 images have no unknown pixels and are left out",
    ]
    mean = np.mean([scored(p[0], *t.tolist()).compute()["SAD"] for p, t in pairs[:-1]])
    assert metric.compute()["SAD"] == pytest.approx(mean, rel=1e-12)


def test_nothing_to_score_is_nan():
    empty = MattingMetrics()
    empty.update([], [])
    only_known = scored([[0.5]], [[255]], [[255]])
    for metric in (empty, only_known):
        assert all(math.isnan(value) for value in metric.compute().values())
    assert only_known.remarks() == ["1 of 1 images have no unknown pixels and are left out"]


@pytest.mark.parametrize("trimap", [[[128, 128]], [[0, 128]], [[0, 255]]])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
def test_invalid_predictions_make_every_score_nan(bad, trimap):
    metric = scored([[bad, 0.5]], [[0, 255]], trimap)
    scored([[0.5]], [[255]], [[128]], metric)
    assert all(math.isnan(value) for value in metric.compute().values())
    assert "1 of 2 images have an alpha not finite" in str(metric)


def test_largest_scores_fit_the_state():
    largest = MAX_PIXELS / 1000
    bounds = matting_metrics._BOUNDS
    assert bounds["SAD"] >= largest
    assert bounds["Conn"] >= largest
    assert bounds["Grad"] >= largest * matting_metrics._MAX_GRADIENT_ERROR
    assert MAX_IMAGES * 2**MattingMetrics.fraction_bits < 2**63
    assert MAX_PIXELS * 2**34 < 2**63
    half_a_million = MattingMetrics()
    one = scored([[0.0]], [[255]], [[128]]).state
    half_a_million.merge(one * MAX_IMAGES)
    assert half_a_million.compute()["MSE"] == 1


def test_half_precision_and_codes_are_taken():
    target = torch.stack([codes([[51, 204]]), codes([[128, 128]])])
    for prediction in (codes([[[102, 204]]]), torch.tensor([[[0.4, 0.8]]]).half()):
        metric = MattingMetrics()
        metric.update([prediction], [target])
        assert metric.compute()["SAD"] == pytest.approx(0.2 / 1000, abs=1e-6)


def test_predictions_read_from_a_file_score_as_codes(tmp_path):
    _, truth, trimap = random_case(1)
    Image.fromarray(truth.numpy()).save(tmp_path / "alpha.png")
    metric = MattingMetrics()
    metric.update([read_mask(tmp_path / "alpha.png")], [torch.stack([truth, trimap])])
    assert metric.compute()["SAD"] == 0
