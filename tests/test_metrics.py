"""Saliency metrics: hand-computed values, published numbers, and bits that nothing may change."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from PIL import Image

from tasks.saliency.metrics import ToolboxMetrics, stretched
from train_utils.errors import UserError
from train_utils.metrics import (
    MAX_IMAGES,
    ExactMetric,
    F1Score,
    MeanAbsoluteError,
    all_scores,
    reduce_metrics,
)


def new_metrics() -> list[ExactMetric]:
    return [
        MeanAbsoluteError(),
        F1Score(),
        MeanAbsoluteError(finish=stretched),
        F1Score(finish=stretched),
        ToolboxMetrics(),
    ]


ALL = pytest.mark.parametrize("index", range(5), ids=["mae", "f1", "mae+pn", "f1+pn", "toolbox"])


def scored(metric, pred, gt):
    """The metric after one image given as rows of numbers or as a [H, W] tensor."""
    pred, gt = (x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (pred, gt))
    metric.update([pred[None]], [gt[None]])
    return metric


def codes(rows):
    return torch.tensor(rows, dtype=torch.uint8)


def random_images(count, seed=0):
    """Predictions [1, 24, 32] and uint8 masks with grey edges, of many sizes, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    preds, masks = [], []
    for i in range(count):
        preds.append(torch.rand(1, 24, 32, generator=generator))
        height, width = torch.randint(8, 60, (2,), generator=generator).tolist()
        grey = torch.rand(1, height, width, generator=generator) * 900 - 300
        masks.append(grey.clamp(0, 255).byte() if i else torch.zeros(1, 9, 7, dtype=torch.uint8))
    return preds, masks


# -- hand-computed values -------------------------------------------------------------------------


def test_mae_is_the_mean_over_images_not_over_pixels():
    metric = scored(MeanAbsoluteError(), [[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [1.0, 1.0]])
    assert metric.compute() == 0.1875  # (0 + ¼ + ½ + 0) / 4
    scored(metric, [[1.0]], [[0.0]])
    assert metric.compute() == 0.59375  # (0.1875 + 1) / 2
    assert metric.count == 2
    assert str(metric) == "MAE: 0.5938"


@pytest.mark.parametrize(
    ("pred", "gt", "expected"),
    [
        (codes([[51, 255]]), codes([[0, 255]]), 0.1),
        (torch.tensor([[0.2, 1.0]]), codes([[0, 255]]), 0.1),
        (torch.tensor([[0.2, 1.0]], dtype=torch.float64), torch.tensor([[False, True]]), 0.1),
        (torch.tensor([[0.25, 1.0]]).half(), torch.tensor([[0.0, 1.0]]), 0.125),
        (torch.tensor([[0.25, 1.0]]).bfloat16(), codes([[0, 255]]), 0.125),
        (torch.tensor([[True, False]]), torch.tensor([[0.0, 0.0]]).half(), 0.5),
        (codes([[0, 0]]), codes([[102, 0]]), 0.2),  # grey masks keep their grey
    ],
    ids=["uint8", "float32", "float64-bool", "half", "bf16", "bool", "grey"],
)
def test_mae_of_every_dtype(pred, gt, expected):
    assert scored(MeanAbsoluteError(), pred, gt).compute() == pytest.approx(expected, abs=1e-8)


def test_mae_is_accurate_to_fixed_point():
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(97, 83, generator=generator)
    gt = torch.randint(0, 256, (97, 83), generator=generator, dtype=torch.uint8)
    exact = math.fsum(
        abs(p - g / 255) for p, g in zip(pred.ravel().tolist(), gt.ravel().tolist(), strict=True)
    ) / (97 * 83)
    assert scored(MeanAbsoluteError(), pred, gt).compute() == pytest.approx(exact, abs=1.5e-11)
    as_codes = (pred * 255).byte()
    exact = (as_codes.int() - gt.int()).abs().sum().item() / (255 * 97 * 83)
    assert scored(MeanAbsoluteError(), as_codes, gt).compute() == pytest.approx(exact, abs=3e-14)


def test_f1_of_one_image():
    metric = scored(F1Score(), [[0.9, 0.8], [0.3, 0.1]], [[1.0, 0.0], [1.0, 0.0]])
    # From high to low: TP 1 FP 0, TP 1 FP 1, TP 2 FP 1, TP 2 FP 2, of P = 2.
    precision, recall = 1 / 1.0001, 1 / 2.0001
    best = 1.3 * precision * recall / (0.3 * precision + recall + 1e-8)
    assert best == pytest.approx(0.81243, abs=1e-5)
    assert metric.compute() == pytest.approx(best, abs=1e-12)
    assert str(metric) == "maxF1: 0.8124"
    last_precision, last_recall, _ = (curve[-1].item() for curve in metric.curves())
    assert last_precision == pytest.approx(2 / 4.0001, abs=1e-12)
    assert last_recall == pytest.approx(2 / 2.0001, abs=1e-12)


def test_f1_averages_curves_before_taking_f():
    metric = scored(F1Score(), [[1.0, 0.0]], [[1.0, 0.0]])
    scored(metric, [[0.5, 0.0]], [[1.0, 0.0]])
    # Above ½ only the first image has P = R = 1/1.0001; ½ lies in bin 127, 127 below the highest.
    half = 0.5 / 1.0001
    assert metric.curves().precision[126].item() == pytest.approx(half, abs=1e-12)
    assert metric.curves().recall[126].item() == pytest.approx(half, abs=1e-12)
    assert metric.curves().f[126].item() == pytest.approx(1.3 * half / 1.3, abs=1e-7)
    assert metric.curves().precision[127].item() == pytest.approx(1 / 1.0001, abs=1e-12)
    assert metric.compute() == pytest.approx(1 / 1.0001, abs=1e-7)


def test_f1_counts_mask_codes_from_128():
    metric = scored(F1Score(), codes([[255, 255, 0]]), codes([[127, 128, 0]]))
    counts = metric.pixel_counts()
    assert counts.true_positives.tolist() == [1] * 255
    assert counts.false_positives.tolist() == [1] * 254 + [2]
    assert counts.true_negatives.tolist() == [1] * 254 + [0]
    assert counts.false_negatives.tolist() == [0] * 255
    half = scored(F1Score(), [[1.0]], [[0.5]])
    assert half.pixel_counts().false_positives.tolist() == [1] * 255


@pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "float"])
def test_f1_bins_every_code_by_its_value(as_float):
    pred = torch.arange(256, dtype=torch.uint8).view(16, 16)
    pred = pred.float() / 255 if as_float else pred
    metric = scored(F1Score(), pred, torch.ones(16, 16))
    # At or above 254/255 there are 2 codes, at or above 0 all 256.
    assert metric.pixel_counts().true_positives.tolist() == list(range(2, 257))


def test_f1_bins_are_those_of_histc():
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(64, 64, generator=generator)
    gt = torch.rand(64, 64, generator=generator)
    metric = scored(F1Score(), pred, gt)
    on = torch.histc(pred[gt > 0.5], 255, 0, 1).flip(0).cumsum(0)
    off = torch.histc(pred[gt <= 0.5], 255, 0, 1).flip(0).cumsum(0)
    assert metric.pixel_counts().true_positives.tolist() == on.tolist()
    assert metric.pixel_counts().false_positives.tolist() == off.tolist()


def test_toolbox_scores_of_one_image():
    metric = scored(ToolboxMetrics(), codes([[255, 128], [64, 0]]), codes([[255, 129], [128, 0]]))
    # On the object: 255 and 128. Mean 447/1020, so the adaptive threshold 0.876 finds 255 alone:
    # P 1, R ½. The curve: 127 thresholds with P 1, R ½; 64 with P 1, R 1; 64 with P ⅔, R 1; then ½.
    curve = [0.8125] * 127 + [1.0] * 64 + [1.3 * 2 / 3 / 1.2] * 64 + [0.65 / 1.15]
    assert metric.compute() == {
        "MAE": pytest.approx((0 + 127 + 64 + 0) / 1020, abs=1e-10),
        "maxF": pytest.approx(1, abs=1e-12),
        "meanF": pytest.approx(sum(curve) / 256, abs=1e-12),
        "adpF": pytest.approx(0.8125, abs=1e-12),
    }
    assert str(metric) == "MAE: 0.1873, maxF: 1.0000, meanF: 0.8358, adpF: 0.8125"


def test_toolbox_stretches_unless_constant_and_scores_an_empty_mask_zero():
    varied = scored(ToolboxMetrics(), codes([[100, 150]]), codes([[0, 255]])).compute()
    assert varied["MAE"] == 0
    assert varied["adpF"] == 1
    constant = scored(ToolboxMetrics(), codes([[51, 51]]), codes([[0, 255]])).compute()
    # 0.2 everywhere: MAE (0.2 + 0.8) / 2; all is found from threshold 51 down, P ½, R 1.
    assert constant["MAE"] == pytest.approx(0.5, abs=1e-10)
    assert constant["maxF"] == pytest.approx(0.65 / 1.15, abs=1e-12)
    assert constant["meanF"] == pytest.approx(52 / 256 * 0.65 / 1.15, abs=1e-12)
    assert constant["adpF"] == 0
    empty = scored(ToolboxMetrics(), codes([[0, 51]]), codes([[0, 128]])).compute()
    assert empty == {"MAE": 0.5, "maxF": 0, "meanF": 0, "adpF": 0}


def test_toolbox_rounds_predictions_to_saved_maps():
    pred = torch.rand(20, 30, generator=torch.Generator().manual_seed(0))
    gt = (pred > 0.7).byte() * 255
    saved = (pred * 255).round().byte()
    of_floats, of_codes = (scored(ToolboxMetrics(), p, gt).state for p in (pred, saved))
    assert torch.equal(of_floats, of_codes)


def test_post_norm_stretches_each_prediction():
    pred, gt = torch.tensor([[0.25, 0.5, 0.75]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert scored(MeanAbsoluteError(), pred, gt).compute() == pytest.approx(1 / 3, abs=1e-10)
    post_norm = scored(MeanAbsoluteError(finish=stretched), pred, gt)  # to 0, ½, 1
    assert post_norm.compute() == pytest.approx(1 / 6, abs=1e-10)
    assert scored(F1Score(finish=stretched), pred, gt).pixel_counts().false_positives[127] == 1
    constant = scored(MeanAbsoluteError(finish=stretched), torch.full((1, 3), 0.25), gt)
    assert constant.compute() == pytest.approx(1.25 / 3, abs=1e-10)


def test_predictions_are_resized_to_the_mask():
    # Halves of pixels: 0 and 1 over four columns become 0, ¼, ¾, 1 without aligned corners.
    pred, gt = torch.tensor([[0.0, 1.0]]), codes([[0, 0, 255, 255]])
    assert scored(MeanAbsoluteError(), pred, gt).compute() == 0.125
    assert scored(MeanAbsoluteError(), codes([[0, 255]]), gt).compute() == 0.125


# -- numbers on real data -------------------------------------------------------------------------


def test_reference_numbers_on_real_predictions(shared_data):
    metrics = new_metrics()
    for path in sorted((shared_data / "sodmetrics/masks").glob("*.png")):
        mask, pred = (
            torch.from_numpy(np.array(Image.open(file).convert("L")))
            for file in (path, shared_data / "sodmetrics/preds" / path.name)
        )
        for metric in metrics:
            scored(metric, pred, mask)
    mae, f1, mae_post_norm, f1_post_norm, toolbox = (metric.compute() for metric in metrics)
    assert metrics[0].count == 3
    assert mae == pytest.approx(0.0375360, abs=5e-8)
    assert f1 == pytest.approx(0.5900964, abs=5e-8)
    assert mae_post_norm == pytest.approx(0.0377995, abs=5e-8)
    assert f1_post_norm == pytest.approx(0.5900964, abs=5e-8)
    assert toolbox == pytest.approx(
        {
            "MAE": 0.03705558476661653,
            "maxF": 0.5886784581120638,
            "meanF": 0.577051059518767,
            "adpF": 0.5816750824038355,
        },
        rel=0,
        abs=1e-11,
    )


# -- the same bits, however the work is divided ---------------------------------------------------


def states_of(*batches):
    metrics = new_metrics()
    for preds, masks in batches:
        for metric in metrics:
            metric.update(preds, masks)
    return [metric.state for metric in metrics]


def assert_equal_states(states, expected):
    assert [state.tolist() for state in states] == [state.tolist() for state in expected]


def test_order_and_batches_change_no_bit():
    preds, masks = random_images(7)
    expected = states_of((preds, masks))
    one_by_one = [([pred], [mask]) for pred, mask in zip(preds, masks, strict=True)]
    assert_equal_states(states_of(*one_by_one), expected)
    assert_equal_states(states_of((torch.stack(preds), masks)), expected)
    assert_equal_states(states_of((preds[::-1], masks[::-1])), expected)
    assert_equal_states(states_of((preds[5:], masks[5:]), (preds[:5], masks[:5])), expected)


def test_batch_layouts_change_no_bit():
    preds = torch.rand(3, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    masks = (preds > 0.4).byte() * 255
    expected = states_of((preds, masks))
    assert_equal_states(states_of((preds[:, 0], masks[:, 0])), expected)
    assert_equal_states(states_of((list(preds), masks)), expected)
    channels_last = preds.contiguous(memory_format=torch.channels_last)
    assert_equal_states(states_of((channels_last, masks.bool())), expected)
    assert_equal_states(states_of((preds.mT.contiguous().mT, masks)), expected)


@ALL
def test_merging_any_split_changes_no_bit(index):
    preds, masks = random_images(6)
    whole = new_metrics()[index]
    whole.update(preds, masks)
    for cuts in [(0, 6), (1, 5), (3, 3), (2, 2, 2)]:
        merged = new_metrics()[index]
        start = 0
        for size in cuts:
            part = new_metrics()[index]
            part.update(preds[start : start + size], masks[start : start + size])
            merged.merge(part.state)
            start += size
        assert torch.equal(merged.state, whole.state)
        assert merged.count == 6


@ALL
def test_threads_change_no_bit(index):
    metric = new_metrics()[index]
    # Large enough for torch to share one operation among threads.
    pred = torch.rand(1, 320, 320, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(1, 301, 401, generator=torch.Generator().manual_seed(1)).mul(255).byte()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = metric.sample_state(pred, mask)
        torch.set_num_threads(2)
        assert torch.equal(metric.sample_state(pred, mask), expected)
    finally:
        torch.set_num_threads(threads)
    assert metric.count == 0  # sample_state leaves the metric alone

    preds, masks = random_images(8)
    with ThreadPoolExecutor(2) as pool:
        for state in pool.map(metric.sample_state, preds, masks):
            metric.merge(state)
    serial = new_metrics()[index]
    serial.update(preds, masks)
    assert torch.equal(metric.state, serial.state)


def check_shares():
    """This process's unpadded share, reduced, must be what one process makes of all images."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for count in (5, 1):  # uneven shares; then shares without an image
        preds, masks = random_images(count, seed=count)
        metrics = new_metrics()
        for metric in metrics:
            metric.update(preds[rank::world_size], masks[rank::world_size])
        metrics[0].reduce_from_all_processes()
        metrics[1].gather_from_all_processes()
        reduce_metrics(metrics)
        reduce_metrics(metrics)
        assert_equal_states([metric.state for metric in metrics], states_of((preds, masks)))
        assert metrics[0].count == count
        with pytest.raises(RuntimeError, match="reset"):
            metrics[0].update(preds, masks)
        metrics[0].reset()
        metrics[0].update(preds, masks)
        metrics[0].reduce_from_all_processes()
        assert metrics[0].count == count * world_size


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [3, 2])
def test_several_processes_change_no_bit(world_size):
    on_ranks(world_size, check_shares)


@ALL
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_changes_no_bit_and_never_waits(index):
    metric = new_metrics()[index]
    preds = torch.rand(2, 1, 50, 60, generator=torch.Generator().manual_seed(0))
    masks = (preds * 300 - 20).clamp(0, 255).byte()
    metric.update(preds, masks)
    expected = metric.state
    metric.reset()
    preds, masks = preds.cuda(), masks.cuda()
    metric.update(preds[:1], masks[:1])  # moves the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(preds[1:], masks[1:])
        metric.update(preds[:0], masks[:0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(metric.state.cpu(), expected)


@ALL
def test_an_update_reads_no_value_back(index):
    # A meta tensor has no values: whatever would make the host wait for a device fails on it.
    metric = new_metrics()[index]
    pred = torch.empty(1, 8, 8, device="meta")
    for mask in (torch.empty(1, 8, 8, device="meta"), torch.empty(1, 9, 7, device="meta").byte()):
        assert metric.sample_state(pred, mask).shape == metric.state.shape


# -- invalid input and life cycle -----------------------------------------------------------------


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_non_finite_pixel_makes_the_score_nan(index, bad):
    metric = scored(new_metrics()[index], [[0.1, 0.9]], [[0.0, 1.0]])
    valid_sums = metric.state[2:]
    scored(metric, [[bad, 0.9]], [[0.0, 1.0]])
    assert torch.equal(metric.state[2:], valid_sums)
    result = metric.compute()
    assert all(math.isnan(x) for x in (result.values() if isinstance(result, dict) else [result]))
    assert str(metric).endswith("nan (1 of 2 images have values not finite or outside [0, 1])")
    metric.reset()
    assert metric.state.count_nonzero() == 0


def test_values_outside_the_unit_range_make_the_score_nan():
    logits, mask = torch.tensor([[-3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    assert math.isnan(scored(F1Score(), logits, mask).compute())
    assert math.isnan(scored(MeanAbsoluteError(), mask, 255 * mask).compute())
    assert scored(MeanAbsoluteError(finish=stretched), logits, mask).compute() == 0
    overshoot = torch.tensor([[-1e-7, 1 + 1e-7]])  # by an interpolation's rounding
    assert scored(MeanAbsoluteError(), overshoot, mask).compute() == pytest.approx(1e-7, rel=0.5)
    assert scored(F1Score(), overshoot, mask).compute() == pytest.approx(1, abs=1e-3)


@ALL
def test_nothing_seen_scores_nan(index):
    metric = new_metrics()[index]
    metric.update(torch.zeros(0, 1, 4, 4), [])
    assert metric.count == 0
    result = metric.compute()
    assert all(math.isnan(x) for x in (result.values() if isinstance(result, dict) else [result]))


@ALL
def test_inputs_are_left_alone_and_need_no_gradient(index):
    pred = torch.rand(1, 1, 4, 4, dtype=torch.float64).requires_grad_()
    gt = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    before = pred.tolist(), gt.tolist()
    metric = new_metrics()[index]
    metric.update(pred, gt)
    assert (pred.tolist(), gt.tolist()) == before
    assert not metric.state.requires_grad


def test_inference_mode_may_end_between_updates():
    metric = MeanAbsoluteError()
    with torch.inference_mode():
        metric.reset()
        scored(metric, [[0.0]], [[1.0]])
    scored(metric, [[1.0]], [[1.0]])
    assert metric.compute() == 0.5


def test_reducing_alone_changes_nothing():
    metric = scored(MeanAbsoluteError(), [[0.0]], [[1.0]])
    metric.reduce_from_all_processes()
    metric.gather_from_all_processes()
    scored(metric, [[1.0]], [[1.0]])
    assert metric.compute() == 0.5


def test_errors_say_what_does_not_fit():
    metric = MeanAbsoluteError()
    image = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="2 predictions for 1 masks"):
        metric.update(image, image[:1])
    with pytest.raises(ValueError, match=r"\[2, 4, 4\] is not one map"):
        metric.update(torch.zeros(2, 2, 4, 4), image)
    with pytest.raises(ValueError, match=r"\[0, 4\] is not one map"):
        metric.update(image, torch.zeros(2, 0, 4))
    with pytest.raises(TypeError, match="int64"):
        metric.update(image, image.long())
    with pytest.raises(ValueError, match="not a state of MeanAbsoluteError"):
        metric.merge(F1Score().state)
    assert metric.count == 0


def test_more_images_than_fit_are_refused():
    metric = MeanAbsoluteError()
    metric.state[0] = MAX_IMAGES + 1
    with pytest.raises(OverflowError, match="524287 fit"):
        metric.compute()


def test_two_metrics_of_one_name_are_refused():
    with pytest.raises(UserError, match="two metrics are called 'MAE'"):
        all_scores([MeanAbsoluteError(), F1Score(), MeanAbsoluteError()])
