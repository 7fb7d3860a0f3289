"""Geometry, values and randomness of the joint transforms."""

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from my_dataset import DUTSDataset
from train_utils.errors import UserError
from train_utils.normalize import IMAGENET_MEAN, IMAGENET_STD, normalize_images
from transforms import (
    SaliencyEval,
    SaliencyTrain,
    SegmentationEval,
    SegmentationTrain,
    predict_input,
    segmentation_input,
)


def blobs(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A smooth random grey picture, uint8 [1, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (fine[0] * 255).clamp(0, 255).byte()


def pair(height: int = 60, width: int = 90) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose red channel is the mask."""
    mask = blobs(height, width)
    image = torch.cat([mask, blobs(height, width, 1), blobs(height, width, 2)])
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


def test_train_moves_image_and_mask_together():
    transform = SaliencyTrain(image_size=50, crop_size=40)
    torch.manual_seed(0)
    for _ in range(20):
        image, mask = transform(*pair())
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)
        assert image.shape == (3, 40, 40)
        assert mask.shape == (1, 40, 40)
        assert image.dtype == mask.dtype == torch.uint8
        # Resizing may round one channel of an RGB image otherwise than a single channel.
        assert (image[:1].int() - mask.int()).abs().max() <= 1


def test_train_cuts_every_window_either_way_round():
    size, crop = 6, 4
    image = torch.arange(3 * size * size, dtype=torch.uint8).reshape(3, size, size)
    windows = {}
    for top in range(3):
        for left in range(3):
            window = image[:, top : top + crop, left : left + crop]
            windows[repr(window.flatten().tolist())] = (top, left, False)
            windows[repr(window.flip(-1).flatten().tolist())] = (top, left, True)
    transform = SaliencyTrain(size, crop, hflip=0.5)
    torch.manual_seed(0)
    seen = {windows[repr(transform(image, image[:1])[0].flatten().tolist())] for _ in range(400)}
    assert len(seen) == 18


@pytest.mark.parametrize(("hflip", "share"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_flip_probability(hflip, share):
    image = torch.tensor([[[0, 9]] * 2] * 3, dtype=torch.uint8)
    transform = SaliencyTrain(2, 2, hflip)
    torch.manual_seed(0)
    flips = [transform(image, image[:1])[1][0, 0, 0].item() == 9 for _ in range(400)]
    assert sum(flips) / 400 == pytest.approx(share, abs=0.06)


def test_train_depends_on_the_default_generator_only():
    transform = SaliencyTrain(50, 30)

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        return transform(*pair())

    (image, mask), (same_image, same_mask), (other_image, _) = run(1), run(1), run(2)
    assert torch.equal(image, same_image)
    assert torch.equal(mask, same_mask)
    assert not torch.equal(image, other_image)


def test_train_draws_the_same_numbers_whatever_happens():
    states = []
    for transform in (SaliencyTrain(50, 30, 0.0), SaliencyTrain(64, 64, 1.0)):
        torch.manual_seed(0)
        transform(*pair())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_mask_edges_become_the_share_that_is_salient():
    # 16 columns become 4. A new column weighs eight old ones by a triangle: 1, 3, 5, 7, 7, 5, 3, 1.
    # The object ends in the middle of the second column's triangle: half of the weight is on 255.
    mask = torch.zeros(1, 16, 16, dtype=torch.uint8)
    mask[..., :6] = 255
    image, resized = SaliencyTrain(4, 4, hflip=0.0)(mask.expand(3, -1, -1), tv_tensors.Mask(mask))
    for row in [*resized[0].tolist(), *image[0].tolist()]:
        assert row == pytest.approx([255, 127.5, 0, 0], abs=0.5)


def test_eval_keeps_the_mask_and_resizes_the_image():
    image, mask = pair(60, 90)
    resized, kept = SaliencyEval(32)(image, mask)
    assert resized.shape == (3, 32, 32)
    assert resized.dtype == torch.uint8
    assert isinstance(kept, tv_tensors.Mask) and kept.equal(mask)


def test_evaluation_and_prediction_prepare_images_alike():
    image, mask = pair()
    assert torch.equal(SaliencyEval(48)(image, mask)[0], predict_input(image, 48))
    train = SaliencyTrain(48, 48, hflip=0.0)
    assert torch.equal(train(image, mask)[0], predict_input(image, 48))


def test_predict_input_resizes_as_pillow_does():
    # The filter of both is a triangle of the scale's width; they differ in rounding.
    image, _ = pair(123, 77)
    reference = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (64, 64), Image.Resampling.BILINEAR
    )
    reference = torch.frombuffer(bytearray(reference.tobytes()), dtype=torch.uint8)
    resized = predict_input(image, 64).permute(1, 2, 0).flatten()
    assert (resized.int() - reference.int()).abs().max() <= 1


def test_predict_input_of_the_right_size_is_the_image():
    image, _ = pair(32, 32)
    assert torch.equal(predict_input(image, 32), image)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1)])
def test_thin_images_come_out_square(height, width):
    image, mask = SaliencyTrain(32, 32)(
        tv_tensors.Image(torch.full((3, height, width), 7, dtype=torch.uint8)),
        tv_tensors.Mask(torch.full((1, height, width), 255, dtype=torch.uint8)),
    )
    assert torch.equal(image, torch.full_like(image, 7))
    assert torch.equal(mask, torch.full_like(mask, 255))


def test_normalize_images():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = (0.5, 0.1, 0.2), (0.25, 0.5, 0.4)
    expected = torch.tensor([(0 - 0.5) / 0.25, (0.2 - 0.1) / 0.5, (1 - 0.2) / 0.4])
    result = normalize_images(images, mean, std)
    assert result.dtype == torch.float32
    assert type(result) is torch.Tensor
    torch.testing.assert_close(result.flatten(), expected)
    torch.testing.assert_close(normalize_images(images[0], mean, std), result[0])
    by_default = normalize_images(images).flatten()
    reference = (images.flatten() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(by_default, reference)


def test_normalize_images_leaves_floats_alone():
    images = torch.rand(2, 3, 4, 4)
    assert normalize_images(images) is images


def test_normalize_images_gives_plain_tensors_and_leaves_its_input_alone():
    images = tv_tensors.Image(torch.full((2, 3, 4, 4), 9, dtype=torch.uint8))
    assert not isinstance(normalize_images(images), tv_tensors.TVTensor)
    assert (images == 9).all()


def test_real_photographs(shared_data):
    dataset = DUTSDataset(shared_data / "saliency", transforms=SaliencyTrain())
    torch.manual_seed(0)
    for index in range(0, 320, 64):
        image, mask = dataset[index]
        assert image.shape == (3, 288, 288)
        assert mask.shape == (1, 288, 288)
        assert image.float().std() > 5
        grey = ((mask > 0) & (mask < 255)).float().mean()
        assert 0 < grey < 0.2  # soft edges, and nothing but edges


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("sides", [(60, 90), (400, 267), (7, 301), (50, 50), (1, 1)])
def test_training_samples_are_those_of_one_step_after_the_other(sides, beside):
    """Resize, crop and flip of each by itself, by torchvision; `beside`: as files are read."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (*sides, 4), dtype=torch.uint8, generator=generator)
    both = pixels.permute(2, 0, 1)
    image, mask = both[:3], both[3:]
    apart = pixels[..., :3].contiguous().permute(2, 0, 1), mask.contiguous()
    before = pixels.clone()
    for seed in range(4):
        torch.manual_seed(seed)
        sample = SaliencyTrain(50, 41)(*((image, mask) if beside else apart))
        torch.manual_seed(seed)
        top, left = torch.randint(10, (2,)).tolist()
        flip = torch.rand(()) < 0.5
        for part, plane in zip(sample, apart, strict=True):
            expected = F.crop(F.resize(plane, [50, 50], antialias=True), top, left, 41, 41)
            assert torch.equal(part, F.horizontal_flip(expected) if flip else expected)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_an_image_decoded_at_a_reduced_size_is_placed_as_the_whole_one(fit):
    mask = torch.zeros(1, 1001, 1500, dtype=torch.uint8)
    half = torch.full((3, 501, 750), 7, dtype=torch.uint8)
    whole = segmentation_input(torch.full((3, 1001, 1500), 7, dtype=torch.uint8), 1000, fit)
    assert torch.equal(SegmentationEval(1000, fit)(half, mask)[0], whole)
    train = SegmentationTrain(1000, fit, (1, 1), 0, 0, (0, 0, 0))
    assert torch.equal(train(half, mask)[0], whole)


def test_the_crop_must_fit():
    with pytest.raises(UserError, match="crops of 33 pixels do not fit into images of 32"):
        SaliencyTrain(32, 33)
    with pytest.raises(UserError, match="crops of 0 pixels"):
        SaliencyTrain(32, 0)
