"""L1, PSNR and SSIM of generated images against closed forms and a naive implementation."""

import math

import pytest
import torch
from distributed import on_ranks

from tasks.translation.metrics import TranslationMetrics, codes_of, translated
from train_utils.collectives import get_rank, get_world_size

C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def as_prediction(codes):
    return codes.double() / 127.5 - 1


def scores(*pairs):
    """Scores of (codes of the prediction, codes of the target)."""
    metric = TranslationMetrics()
    metric.update([as_prediction(pred) for pred, _ in pairs], [target for _, target in pairs])
    return metric.compute()


def constant(code, size=(12, 15)):
    return torch.full((3, *size), code, dtype=torch.uint8)


def noise(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)


def naive_ssim(x, y):
    """Wang et al. 2004, eq. 13, window by window."""

    def weights(side):
        reach = min(5, (side - 1) // 2)
        values = [math.exp(-(k * k) / 4.5) for k in range(-reach, reach + 1)]
        return [value / sum(values) for value in values]

    rows, columns = weights(x.shape[1]), weights(x.shape[2])
    total = places = 0
    for channel in range(len(x)):
        for top in range(x.shape[1] - len(rows) + 1):
            for left in range(x.shape[2] - len(columns) + 1):
                window = [
                    (
                        row * column,
                        x[channel, top + i, left + j].item(),
                        y[channel, top + i, left + j].item(),
                    )
                    for i, row in enumerate(rows)
                    for j, column in enumerate(columns)
                ]
                mean_x = sum(w * a for w, a, _ in window)
                mean_y = sum(w * b for w, _, b in window)
                var_x = sum(w * (a - mean_x) ** 2 for w, a, _ in window)
                var_y = sum(w * (b - mean_y) ** 2 for w, _, b in window)
                cov = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in window)
                total += (
                    (2 * mean_x * mean_y + C1)
                    * (2 * cov + C2)
                    / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
                )
                places += 1
    return total / places


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0, 255), (100, 110), (37, 36)])
def test_constant_images_have_closed_forms(a, b):
    result = scores((constant(a), constant(b)))
    assert result["L1"] == pytest.approx(abs(a - b) / 255, abs=1e-12)
    assert result["PSNR"] == pytest.approx(20 * math.log10(255 / abs(a - b)), abs=1e-10)
    assert result["SSIM"] == pytest.approx((2 * a * b + C1) / (a * a + b * b + C1), abs=1e-9)


def test_l1_and_psnr_by_hand():
    target = constant(100, (1, 2))
    pred = target.clone()
    pred[0, 0, 0], pred[2, 0, 1] = 103, 96  # two of six values are off, by 3 and by 4
    result = scores((pred, target))
    assert result["L1"] == pytest.approx(7 / 6 / 255, abs=1e-12)
    assert result["PSNR"] == pytest.approx(10 * math.log10(255**2 / (25 / 6)), abs=1e-10)


@pytest.mark.parametrize("size", [(13, 12), (11, 11), (30, 4), (2, 3), (1, 1)])
def test_ssim_equals_the_naive_loop(size):
    x = noise(*size)
    y = ((x.int() + noise(*size, seed=1).int() // 4) // 2).to(torch.uint8)
    assert scores((x, y))["SSIM"] == pytest.approx(naive_ssim(x, y), abs=1e-9)


def test_scores_average_over_images_not_pixels():
    pairs = [(constant(10, (40, 40)), constant(20, (40, 40))), (constant(0), constant(40))]
    result = scores(*pairs)
    each = [scores(pair) for pair in pairs]
    for name in ("L1", "PSNR", "SSIM"):
        assert result[name] == pytest.approx((each[0][name] + each[1][name]) / 2, abs=1e-11)


def test_identical_images_count_with_the_cap_and_are_named():
    metric = TranslationMetrics()
    x = noise(20, 20)
    metric.update([as_prediction(x), as_prediction(constant(0))], [x, constant(255)])
    result = metric.compute()
    assert result["PSNR"] == pytest.approx((100 + 0) / 2, abs=1e-10)
    assert scores((x, x))["SSIM"] == pytest.approx(1, abs=1e-12)
    assert metric.remarks() == ["PSNR: 1 image(s) above 100 dB count as 100"]


def test_images_smaller_than_the_window_are_named():
    metric = TranslationMetrics()
    metric.update([as_prediction(constant(0, (10, 30)))], [constant(9, (10, 30))])
    metric.update([as_prediction(constant(0, (11, 11)))], [constant(9, (11, 11))])
    assert metric.remarks() == ["SSIM: 1 image(s) narrower than its window, cut to fit them"]


def test_opposite_structure_is_negative():
    stripes = torch.arange(20).remainder(2).mul(200).to(torch.uint8).expand(3, 20, 20)
    assert scores((stripes, 200 - stripes))["SSIM"] < -0.9


# --- what is scored -----------------------------------------------------------------------------


def test_the_prediction_is_rounded_to_8_bits_as_it_is_written():
    target = constant(100)
    metric = TranslationMetrics()
    metric.update([(target.double() + 0.4) / 127.5 - 1], [target])
    assert metric.compute()["L1"] == 0


def test_the_prediction_is_resized_to_the_target():
    pred = as_prediction(torch.tensor([50, 150], dtype=torch.uint8).expand(3, 2, 2))
    finished = translated(pred, (1, 1))
    assert finished.dtype == torch.float64
    assert torch.allclose(finished, torch.tensor(100 / 255).double(), rtol=0, atol=1e-6)
    metric = TranslationMetrics()
    metric.update([pred], [constant(100, (1, 1))])
    assert metric.compute()["L1"] == 0


def test_translated_and_codes_by_hand():
    pred = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)
    finished = translated(pred, (1, 1))
    assert finished.flatten().tolist() == [0, 0.5, 1]
    assert codes_of(finished).flatten().tolist() == [0, 128, 255]


def test_every_code_survives_normalisation_and_back():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    prediction = (codes.float() - 127.5) / 127.5
    assert torch.equal(codes_of(translated(prediction, (16, 16))), codes)


# --- exactness and faults -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.01])
def test_invalid_values_make_every_score_nan(value):
    metric = TranslationMetrics()
    pred = as_prediction(constant(0))
    pred[1, 2, 3] = value
    metric.update([pred, as_prediction(constant(9))], [constant(0), constant(9)])
    assert all(math.isnan(score) for score in metric.compute().values())
    assert "1 of 2 images" in str(metric)


def test_no_images_have_no_score():
    assert all(math.isnan(score) for score in TranslationMetrics().compute().values())


@pytest.mark.parametrize(
    "target",
    [constant(0).float(), constant(0)[:1], constant(0)[0], torch.zeros(3, 0, 4, dtype=torch.uint8)],
)
def test_targets_that_do_not_fit_are_refused(target):
    with pytest.raises(ValueError, match=r"\[|pixels"):
        TranslationMetrics().sample_state(as_prediction(constant(0)), target)


def random_pair(index):
    size = (60 + index, 90)
    target = noise(*size, seed=index)
    return as_prediction(noise(64, 64, seed=100 + index)).float(), target


def test_bits_do_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        states = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            pred, target = as_prediction(noise(300, 280)), noise(300, 280, seed=1)
            states.append(TranslationMetrics().sample_state(pred, target).tolist())
    finally:
        torch.set_num_threads(before)
    assert states[0] == states[1] == states[2]


def share_of_scores(count):
    metric = TranslationMetrics()
    for index in range(get_rank(), count, get_world_size()):
        pred, target = random_pair(index)
        metric.update([pred], [target])
    metric.reduce_from_all_processes()
    return metric.compute()


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_processes():
    alone = share_of_scores(3)
    assert on_ranks(2, share_of_scores, 3) == [alone, alone]
