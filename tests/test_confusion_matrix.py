"""Segmentation scores against hand-worked numbers and numpy, and the exactness of their state."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tasks.segmentation.confusion_matrix import ConfusionMatrix, most_likely
from tasks.segmentation.losses import dice_loss, pixel_cross_entropy
from transforms import IGNORE

NAMES = ["ground", "cat", "dog"]


def at_size(logits, size):
    """As evaluation finishes logits, in short."""
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits[None], tuple(size), mode="bilinear", align_corners=False)[0]


def image_loss(logits, truth):
    pair = logits[None], truth[None]
    return pixel_cross_entropy(*pair) + dice_loss(*pair)


def metric(names=NAMES, loss=None):
    return ConfusionMatrix(names, at_size, loss)


def answers(classes, num_classes=3):
    """Logits [C, H, W] whose arg-max is the given class map."""
    return F.one_hot(torch.tensor(classes), num_classes).permute(2, 0, 1).float()


def labels(classes):
    return torch.tensor(classes, dtype=torch.uint8)[None]


def random_samples(count=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        truth = torch.randint(0, classes + 1, (1, 5 + index, 7), generator=generator)
        truth[truth == classes] = IGNORE
        logits = 4 * torch.randn(classes, 6, 6, generator=generator)
        samples.append((logits, truth.to(torch.uint8)))
    return samples


def test_hand_worked_scores():
    scores = metric()
    predicted = answers([[0, 0, 1], [1, 1, 2]])
    truth = labels([[0, 1, 1], [1, 2, IGNORE]])
    scores.update(predicted[None], truth[None])
    # ground: TP 1, FP 1, FN 0;  cat: TP 2, FP 1, FN 1;  dog: TP 0, FP 0, FN 1 (its hit is ignored)
    assert scores.matrix().tolist() == [[1, 0, 0], [1, 2, 0], [0, 1, 0]]
    assert scores.compute() == pytest.approx(
        {
            "mIoU": (1 / 2 + 2 / 4 + 0) / 3,
            "mPA": (1 + 2 / 3 + 0) / 3,
            "precision": (1 / 2 + 2 / 3 + 0) / 3,
            "accuracy": 3 / 5,
            "IoU/ground": 1 / 2,
            "IoU/cat": 2 / 4,
            "IoU/dog": 0,
        }
    )
    assert scores.remarks() == []


def test_classes_that_the_masks_lack_are_left_out_and_named():
    scores = metric([*NAMES, "fox"])
    scores.update(answers([[0, 0], [1, 2]], 4)[None], labels([[0, 0], [1, 1]])[None])
    # dog is predicted but never true: a false positive that costs cat, no score of its own
    result = scores.compute()
    assert result["mIoU"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["mPA"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["precision"] == 1
    assert result["accuracy"] == pytest.approx(3 / 4)
    assert [name for name in result if "/" in name] == ["IoU/ground", "IoU/cat"]
    (remark,) = scores.remarks()
    assert remark.endswith(": dog (predicted for 1 pixels), fox")


def test_matrix_equals_numpy_over_all_images():
    scores, expected = metric(list("abcd")), np.zeros(16, dtype=np.int64)
    for logits, truth in random_samples():
        scores.update(logits[None], truth[None])
        predicted = at_size(logits, truth.shape[-2:]).argmax(0).numpy()
        valid = truth[0].numpy() != IGNORE
        key = truth[0].numpy()[valid].astype(np.int64) * 4 + predicted[valid]
        expected += np.bincount(key, minlength=16)
    np.testing.assert_array_equal(scores.matrix().numpy().ravel(), expected)
    assert scores.count == 6


def test_loss_is_the_mean_over_images_that_have_one():
    scores = metric(loss=image_loss)
    logits, truth = answers([[0, 1], [2, 2]]), labels([[0, 1], [1, IGNORE]])
    empty = torch.full((1, 2, 2), IGNORE, dtype=torch.uint8)
    scores.update([logits, 2 * logits, logits], [truth, truth, empty])
    expected = (image_loss(logits, truth) + image_loss(2 * logits, truth)) / 2
    assert scores.compute()["loss"] == pytest.approx(expected.item(), abs=1e-8)
    assert any("1 of 3 images have no pixel" in remark for remark in scores.remarks())


def test_the_same_bits_for_any_order_split_and_threads():
    samples = random_samples(8)
    # An image's loss is a float sum, which evaluation takes on one thread; this one has no order.
    make = partial(metric, list("abcd"), lambda logits, truth: (truth == 0).sum() / 7)
    whole = make()
    for logits, truth in samples:
        whole.update(logits[None], truth[None])
    parts = [make() for _ in range(3)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for number in (5, 1, 7, 0, 3, 2, 6, 4):
            parts[number % 3].update(*([column] for column in samples[number]))
    finally:
        torch.set_num_threads(threads)
    merged = make()
    for part in (parts[2], parts[0], parts[1]):
        merged.merge(part.state)
    assert torch.equal(merged.state, whole.state)
    assert merged.compute() == whole.compute()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_make_every_score_nan(bad):
    scores = metric(loss=image_loss)
    logits, truth = answers([[0, 1], [2, 2]]), labels([[0, 1], [2, 2]])
    broken = logits.clone()
    broken[1, 0, 0] = bad
    scores.update([logits, broken], [truth, truth])
    result = scores.compute()
    assert list(result) == ["mIoU", "mPA", "precision", "accuracy", "loss"]
    assert all(map(math.isnan, result.values()))
    assert "1 of 2 images" in str(scores)


def test_a_label_that_is_no_class_makes_every_score_nan():
    scores = metric(loss=image_loss)
    scores.update(answers([[0, 1]])[None], labels([[0, 3]])[None])
    assert math.isnan(scores.compute()["mIoU"])


@pytest.mark.parametrize("images", [0, 2])
def test_nothing_to_score_is_nan(images):
    scores = metric(loss=image_loss)
    truth = torch.full((images, 1, 2, 2), IGNORE, dtype=torch.uint8)
    scores.update(torch.zeros(images, 3, 2, 2), truth)
    assert all(map(math.isnan, scores.compute().values()))
    assert not any("/" in name for name in scores.compute())


def test_a_huge_loss_is_capped():
    scores = metric(loss=lambda logits, truth: torch.tensor(1e30))
    scores.update(answers([[0, 1]])[None], labels([[0, 1]])[None])
    assert scores.compute()["loss"] == 4096


def test_logits_of_another_class_count_are_refused():
    with pytest.raises(ValueError, match="2 channels of logits for 3 classes"):
        metric().update(torch.zeros(1, 2, 2, 2), labels([[0, 1], [1, 1]])[None])


def test_the_largest_of_planes_is_argmax():
    logits = torch.randint(4, (5, 6, 7)).float()  # with many that are equal
    assert torch.equal(most_likely(logits), logits.argmax(0).to(torch.uint8))
    assert torch.equal(most_likely(iter(logits[:1])), torch.zeros(6, 7, dtype=torch.uint8))
