"""Letterbox, augmentation of images together with their labels, and the way back from logits."""

import colorsys

import pytest
import torch
from torchvision import tv_tensors

from tasks.segmentation.data import camvid_pairs
from tasks.segmentation.label_maps import LabelReader
from train_utils.datasets import PairDataset
from transforms import (
    IGNORE,
    SegmentationEval,
    SegmentationTrain,
    _jitter_hsv,
    letterbox_box,
    predict_input,
    restore_logits,
    segmentation_input,
)

PLAIN = {"scale": (1, 1), "aspect": 0, "hflip": 0, "hsv": (0, 0, 0)}


def stripes(height: int, width: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Labels 0 to 3 in quarters, each with a colour of its own: red, green, blue, white."""
    labels = torch.zeros(1, height, width, dtype=torch.uint8)
    labels[:, height // 2 :] += 2
    labels[:, :, width // 2 :] += 1
    colours = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8
    )
    return tv_tensors.Image(colours[labels[0].long()].permute(2, 0, 1)), tv_tensors.Mask(labels)


def decoded(image: torch.Tensor) -> torch.Tensor:
    """The label that `stripes` shows at each pixel [H, W]; grey gives IGNORE."""
    red, green, blue = (channel >= 192 for channel in image)
    labels = torch.full(image.shape[1:], IGNORE, dtype=torch.uint8)
    labels[red] = 0
    labels[green] = 1
    labels[blue] = 2
    labels[red & green & blue] = 3
    return labels


# --- letterbox ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (100, 100, (0, 0, 40, 40)),
        (50, 100, (10, 0, 20, 40)),
        (100, 25, (0, 15, 40, 10)),
        (75, 100, (5, 0, 30, 40)),
        (5, 8, (7, 0, 25, 40)),
        (1, 1, (0, 0, 40, 40)),
        (1, 5000, (19, 0, 1, 40)),
        (5000, 1, (0, 19, 40, 1)),
    ],
)
def test_letterbox_box(height, width, box):
    assert letterbox_box(height, width, 40) == box


def test_letterboxed_image_is_centred_on_grey():
    image = tv_tensors.Image(torch.full((3, 20, 40), 9, dtype=torch.uint8))
    square = segmentation_input(image, 8, "letterbox")
    assert square.dtype == torch.uint8
    assert square[1].tolist() == [[128] * 8] * 2 + [[9] * 8] * 4 + [[128] * 8] * 2


def test_letterbox_resizes_as_stretch_does():
    image, _ = stripes(30, 60)
    square = segmentation_input(image, 20, "letterbox")
    assert torch.equal(
        square[:, 5:15],
        torch.nn.functional.interpolate(
            image[None].as_subclass(torch.Tensor), (10, 20), mode="bilinear", antialias=True
        )[0],
    )
    assert torch.equal(segmentation_input(image, 20, "stretch"), predict_input(image, 20))


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_evaluation_keeps_the_mask(fit):
    image, mask = stripes(30, 60)
    square, kept = SegmentationEval(20, fit)(image, mask)
    assert torch.equal(square, segmentation_input(image, 20, fit))
    assert kept is mask


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_image_and_mask_stay_aligned(fit):
    transform = SegmentationTrain(64, fit, hsv=(0, 0, 0))
    torch.manual_seed(0)
    flipped = padded = cut = 0
    for _ in range(60):
        image, mask = transform(*stripes(90, 130))
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)
        assert image.shape == (3, 64, 64)
        assert mask.shape == (1, 64, 64)
        assert image.dtype == mask.dtype == torch.uint8
        padding = mask[0] == IGNORE
        assert (image[:, padding] == 128).all()
        # A blend of two colours has a channel between them: only borders of labels are unclear.
        clear = ((image < 64) | (image >= 192)).all(0)
        assert torch.equal(decoded(image)[clear], mask[0][clear])
        # That is 3 rows and 3 columns at most, of the cross between the four labels.
        assert (~clear & ~padding).sum() <= 2 * 3 * 64
        labels = mask[0][~padding]
        flipped += int(labels[0] % 2 == 1 and labels[-1] % 2 == 0)
        padded += int(padding.any())
        cut += int(not padding.any())
    assert flipped > 10
    assert padded > 10
    assert cut > 3


def test_the_border_of_labels_is_that_of_the_image():
    # 8 columns become 20, and the border after 3 of 8 lies at 7.5 of 20: on the centre of column 7.
    # A "nearest" that looks at the pixels' corners would give that column to the left.
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[..., 3:] = 255
    mask = (image[:1] > 0).byte()
    big, labels = SegmentationTrain(20, "stretch", **PLAIN)(image, mask)
    assert labels[0, 0].tolist() == [0] * 7 + [1] * 13
    assert (big[0, 0] >= 128).int().tolist() == [0] * 7 + [1] * 13


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(33, 80), (80, 33), (40, 40), (1, 300)])
def test_without_jitter_training_sees_what_evaluation_sees(fit, height, width):
    image, mask = stripes(height, width)
    result, labels = SegmentationTrain(40, fit, **PLAIN)(image, mask)
    assert torch.equal(result, segmentation_input(image, 40, fit))
    top, left, h, w = letterbox_box(height, width, 40) if fit == "letterbox" else (0, 0, 40, 40)
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[top : top + h, left : left + w] = True
    assert torch.equal(labels[0] != IGNORE, inside)


def test_boxes_have_the_sizes_and_places_that_are_asked_for():
    transform = SegmentationTrain(100, "letterbox", scale=(0.5, 1.5), aspect=0.2)
    # a = b: the aspect ratio stays; scale from 0.5 to 1.5; placed from corner to corner.
    assert transform._box(10, 20, 0.5, 0.5, 0.0, 0.0, 0.0) == (0, 0, 25, 50)
    assert transform._box(10, 20, 0.5, 0.5, 0.0, 0.999, 0.999) == (75, 50, 25, 50)
    assert transform._box(10, 20, 0.5, 0.5, 1.0, 0.0, 0.999) == (0, 0, 75, 150)
    assert transform._box(10, 20, 0.5, 0.5, 1.0, 0.999, 0.0) == (25, -50, 75, 150)
    # a/b = 1.2/0.8 = 1.5: from 2:1 to 3:1, the longer side as scaled.
    assert transform._box(10, 20, 1.0, 0.0, 0.5, 0.0, 0.0) == (0, 0, 33, 100)
    # a/b = 0.8/1.2 = 2/3: from 20:10 to 4:3.
    assert transform._box(10, 20, 0.0, 1.0, 0.5, 0.0, 0.0) == (0, 0, 75, 100)


def test_scales_cover_their_range():
    transform = SegmentationTrain(50, "stretch", scale=(0.2, 0.8), aspect=0, hsv=(0, 0, 0))
    torch.manual_seed(0)
    sides = [(transform(*stripes(9, 9))[1][0] != IGNORE).any(0).sum().item() for _ in range(200)]
    assert min(sides) == pytest.approx(10, abs=1)
    assert max(sides) == pytest.approx(40, abs=1)
    assert sum(sides) / 200 == pytest.approx(25, abs=2)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_thin_and_tiny_images(fit, height, width):
    image = torch.full((3, height, width), 7, dtype=torch.uint8)
    mask = torch.full((1, height, width), 2, dtype=torch.uint8)
    transform = SegmentationTrain(32, fit, hsv=(0, 0, 0))
    torch.manual_seed(0)
    for _ in range(10):
        result, labels = transform(image, mask)
        inside = labels[0] == 2
        assert inside.any()
        assert (result[:, inside] == 7).all()
        assert (labels[0, ~inside] == IGNORE).all()
    logits = torch.full((3, 32, 32), 5.0)
    restored = restore_logits(logits, (height, width), fit)
    torch.testing.assert_close(restored, torch.full((3, height, width), 5.0))


def test_training_draws_the_same_numbers_whatever_happens():
    states = []
    for transform in (
        SegmentationTrain(16, "letterbox"),
        SegmentationTrain(24, "stretch", **PLAIN),
    ):
        torch.manual_seed(0)
        transform(*stripes(20, 30))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_training_depends_on_the_default_generator_only():
    transform = SegmentationTrain(16, "letterbox")

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        return transform(*stripes(20, 30))

    (image, mask), (same_image, same_mask), (other_image, _) = run(1), run(1), run(2)
    assert torch.equal(image, same_image)
    assert torch.equal(mask, same_mask)
    assert not torch.equal(image, other_image)


# --- colours ------------------------------------------------------------------------------------


def some_colours() -> torch.Tensor:
    """Greys, primaries and random colours, uint8 [3, 1, 300]."""
    generator = torch.Generator().manual_seed(0)
    special = [[0] * 3, [255] * 3, [128] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 0, 255]]
    random = torch.randint(0, 256, (300 - len(special), 3), generator=generator)
    return torch.cat([torch.tensor(special), random]).T.reshape(3, 1, 300).byte()


def test_hsv_jitter_of_nothing_changes_nothing():
    colours = some_colours()
    assert torch.equal(_jitter_hsv(colours, 0.0, 1.0, 1.0), colours)
    assert torch.equal(_jitter_hsv(colours, 1.0, 1.0, 1.0), colours)


@pytest.mark.parametrize("jitter", [(0.1, 1.7, 0.7), (-0.1, 0.3, 1.3), (0.5, 1.0, 1.0), (0, 0, 1)])
def test_hsv_jitter_against_the_standard_library(jitter):
    colours = some_colours()
    result = _jitter_hsv(colours, *jitter)
    turn, saturation, value = jitter
    for colour, found in zip(colours[:, 0].T.tolist(), result[:, 0].T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
        expected = colorsys.hsv_to_rgb((h + turn) % 1, min(s * saturation, 1), min(v * value, 1))
        assert found == pytest.approx([255 * level for level in expected], abs=0.501)


def test_colours_change_but_not_those_of_the_padding():
    image = torch.full((3, 10, 20), 200, dtype=torch.uint8)
    image[0] = 90
    mask = torch.zeros(1, 10, 20, dtype=torch.uint8)
    transform = SegmentationTrain(16, "letterbox", scale=(1, 1), aspect=0)
    torch.manual_seed(0)
    colours = set()
    for _ in range(20):
        result, labels = transform(image, mask)
        assert (result[:, labels[0] == IGNORE] == 128).all()
        colours.add(tuple(result[:, 8, 8].tolist()))
    assert len(colours) == 20
    assert min(max(colour) for colour in colours) >= 200 * 0.7 - 1
    assert max(map(max, colours)) - min(map(max, colours)) > 50


# --- back to the image's size -------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(60, 140), (141, 60), (64, 64), (13, 40)])
def test_logits_return_to_where_the_labels_are(fit, height, width):
    image, mask = stripes(height, width)
    square = segmentation_input(image, 64, fit)
    logits = torch.stack([(decoded(square) == label).float() for label in range(4)])
    restored = restore_logits(logits, (height, width), fit)
    assert restored.shape == (4, height, width)
    # All but the pixels at the cross between the labels, which the square cannot resolve better.
    wrong = restored.argmax(0) != mask[0]
    at_cross = torch.zeros_like(wrong)
    at_cross[height // 2 - 3 : height // 2 + 3] = True
    at_cross[:, width // 2 - 3 : width // 2 + 3] = True
    assert not (wrong & ~at_cross).any()


def test_restored_logits_are_fp32_or_more():
    logits = torch.randn(2, 8, 8)
    assert restore_logits(logits.bfloat16(), (3, 8), "letterbox").dtype == torch.float32
    assert restore_logits(logits.double(), (3, 8), "letterbox").dtype == torch.float64
    assert torch.equal(restore_logits(logits, (8, 8), "letterbox"), logits)
    assert torch.equal(restore_logits(logits, (4, 8), "letterbox"), logits[:, 2:6])


def test_restored_logits_are_interpolated_between_pixel_centres():
    # 2 columns to 4: the centres of the new ones lie at −0.25, 0.25, 0.75, 1.25 of the old ones.
    logits = torch.tensor([[[0.0, 4.0], [0.0, 4.0]]])
    assert restore_logits(logits, (4, 4), "stretch")[0, 0].tolist() == [0, 1, 3, 4]


# --- real files ---------------------------------------------------------------------------------


def test_real_street_scenes(shared_data):
    pairs = camvid_pairs(shared_data / "camvid", train=True)
    reader = LabelReader(11, ignore_index=11)
    plain = PairDataset(*pairs, read_target=reader)
    augmented = PairDataset(*pairs, SegmentationTrain(96, "letterbox"), reader)
    torch.manual_seed(0)
    for index in range(0, 20, 5):
        image, mask = augmented[index]
        assert image.shape == (3, 96, 96)
        assert image.float().std() > 5
        found = set(torch.unique(mask).tolist())
        assert found <= {*torch.unique(plain[index][1]).tolist(), IGNORE}
        assert len(found) > 2
