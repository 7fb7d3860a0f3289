"""Images run by tiles give what the whole image gives, at the seams too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from src import unet
from src.deep_matting import STRIDE, DeepMatting
from tasks import matting
from train_utils.errors import UserError
from train_utils.tiles import MIN_PIXELS, _spans, by_rows, limited, tiled
from transforms import BACKGROUND, FOREGROUND, UNKNOWN


def calibrated(network: nn.Module, channels: int) -> nn.Module:
    """In evaluation mode, with the batch statistics of noise, as if it had been trained on that."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network(torch.rand(2, channels, 96, 96))
    return network.eval()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_places_of_tiles_by_hand():
    assert _spans(100, 100, 32, 16) == [(slice(0, 100), slice(0, 100))]
    # Two tiles would reach 2 · 96 − 32 = 160 pixels; of three, each goes 48 pixels further.
    assert _spans(161, 96, 32, 16) == [
        (slice(0, 80), slice(0, 64)),
        (slice(48, 128), slice(16, 64)),
        (slice(96, 161), slice(16, 65)),
    ]


@pytest.mark.parametrize("tile, overlap, align", [(64, 32, 16), (96, 32, 32), (40, 8, 8)])
def test_kept_parts_of_tiles_are_the_whole(tile, overlap, align):
    for length in range(1, 400):
        place = 0
        for seen, kept in _spans(length, tile, overlap, align):
            assert seen.start % align == 0 and seen.stop - seen.start <= tile
            assert seen.start + kept.start == place
            cut = (seen.start > 0, seen.stop < length)
            assert kept.start == cut[0] * overlap // 2
            assert seen.stop - seen.start - kept.stop == cut[1] * overlap // 2
            place = seen.start + kept.stop
        assert place == length


def test_a_convolution_by_tiles_is_exact():
    kernel = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    images = torch.randn(2, 3, 61, 130, dtype=torch.float64)
    whole = F.conv2d(images, kernel, padding=4)
    seen = []

    def forward(tile):
        seen.append(tile.shape[-2:])
        return F.conv2d(tile, kernel, padding=4)

    by_tiles = tiled(forward, images, tile=32, overlap=8, align=8)
    torch.testing.assert_close(by_tiles, whole, rtol=0, atol=1e-12)
    # Of 61 − 8 rows and 130 − 8 columns, a tile of 32 adds 24 at most: 3 × 6 tiles.
    assert len(seen) == 18 and max(map(max, seen)) == 32


def test_tiles_off_the_grid_are_refused():
    for lengths in ((48, 16, 32), (64, 16, 32), (64, 64, 32)):
        with pytest.raises(ValueError, match="on a grid of 32"):
            tiled(lambda x: x, torch.zeros(1, 1, 200, 200), *lengths)


def test_deep_matting_by_tiles_is_the_whole_to_the_seams():
    """Its receptive field ends 160 pixels from a cut, and all pooling windows agree."""
    network = calibrated(DeepMatting(channels=2), 4)
    images = torch.rand(1, 4, 200, 900)
    with torch.inference_mode():
        whole = network(images)
        by_tiles = tiled(network, images, tile=512, overlap=320, align=STRIDE)
        near_a_cut = network(images[..., :480]) - whole[..., :480]
    assert whole.std() > 0.01
    assert (by_tiles - whole).abs().max() < 1e-4
    # What the margin is needed for: in the 160 pixels before the cut the tile is another picture.
    assert near_a_cut[..., :320].abs().max() < 1 / 255 < near_a_cut[..., 320:352].abs().max()


def test_a_unet_by_tiles_is_the_whole_to_the_seams():
    network = calibrated(unet(2, channels=4), 3)
    images = torch.rand(1, 3, 96, 512)  # of other sizes, its maps are no halves of each other
    with torch.inference_mode():
        whole = network(images)
        by_tiles = tiled(network, images, tile=384, overlap=256, align=16)
    assert whole.std() > 0.01
    assert (by_tiles - whole).abs().max() < 1 / 255


def test_only_inputs_beyond_the_budget_are_cut():
    sizes = []

    def predict(models, images):
        sizes.append(tuple(images.shape[-2:]))
        return models + images[:, :1]

    budget = limited(predict, max_pixels=64 * 64, stride=16, margin=16)
    small, large = torch.rand(2, 3, 60, 68), torch.rand(1, 3, 70, 130)
    assert torch.equal(budget(1, small), 1 + small[:, :1])
    assert sizes == [(60, 68)]
    assert torch.equal(budget(1, large), 1 + large[:, :1])
    assert len(sizes) == 1 + 2 * 4 and max(map(max, sizes[1:])) == 64


def test_matting_is_cut_by_its_config():
    """What evaluation and predict.py both call, with a large image and a budget that is not."""
    cfg = matting.Config()
    cfg.model.channels, cfg.eval.max_pixels = 1, MIN_PIXELS
    models = {"model": calibrated(DeepMatting(1), 4)}
    inputs = torch.randint(256, (1, 4, 420, 700), dtype=torch.uint8)
    inputs[:, 3] = UNKNOWN
    inputs[..., 3, :40, :] = BACKGROUND
    inputs[..., 3, 40:80, :] = FOREGROUND
    with torch.inference_mode():
        by_tiles = matting.Task(cfg).predict(models, inputs)
        cfg.eval.max_pixels = 420 * 700
        whole = matting.Task(cfg).predict(models, inputs)
    assert (by_tiles - whole).abs().max() < 1 / 255
    assert (by_tiles[..., :40, :] == 0).all() and (by_tiles[..., 40:80, :] == 1).all()


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="max_pixels: must be at least 262144"):
        matting.EvalConfig(max_pixels=MIN_PIXELS - 1)
    with pytest.raises(UserError, match="max_pixels"):
        from train_utils.config import build

        build(matting.Config, {"eval": {"max_pixels": 10}}, "test")


def test_bands_of_rows_are_the_whole():
    picture = torch.rand(5, 2**19, 1)  # bands of two rows
    seen = []

    def paint(rows):
        seen.append(rows)
        return picture[rows] * 2

    assert torch.equal(by_rows(paint, 5, 2**19), picture * 2)
    assert seen == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert by_rows(lambda rows: picture[rows, :2], 1, 2**21).shape == (1, 2, 1)
