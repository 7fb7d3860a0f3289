"""Trimaps in every pixel format, and what is refused because somebody would have to guess."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from tasks.matting.trimaps import read_trimap
from train_utils.errors import UserError

LEVELS = np.uint8([[0, 128, 255], [255, 0, 128]])


def saved(tmp_path, image, suffix="png", **options):
    path = tmp_path / f"trimap.{suffix}"
    image.save(path, **options)
    return path


def palette_image(indices, colours):
    image = Image.fromarray(np.uint8(indices), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def with_alpha(grey, alpha):
    return Image.merge("LA", [Image.fromarray(np.uint8(grey)), Image.fromarray(np.uint8(alpha))])


# --- what is a trimap ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_mode_reads_the_same(tmp_path, mode, suffix):
    trimap = read_trimap(saved(tmp_path, Image.fromarray(LEVELS).convert(mode), suffix))
    assert isinstance(trimap, tv_tensors.Mask)
    assert trimap.dtype == torch.uint8
    assert trimap.shape == (1, 2, 3)
    assert trimap[0].tolist() == LEVELS.tolist()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif"])
def test_palette_counts_by_its_colours(tmp_path, suffix):
    # Indices in another order than the levels; the red entry is in no pixel and so does not count.
    image = palette_image([[3, 1, 0]], [(255,) * 3, (128,) * 3, (255, 0, 0), (0,) * 3])
    assert read_trimap(saved(tmp_path, image, suffix))[0].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("level", [64, 102, 127, 128, 192])
def test_any_middle_grey_is_unknown(tmp_path, level):
    path = saved(tmp_path, Image.fromarray(np.uint8([[0, level, 255]])))
    assert read_trimap(path)[0].tolist() == [[0, 128, 255]]


def test_16_bits(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.uint16([[0, 32768, 65535]])))
    assert read_trimap(path)[0].tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("row", [[0, 0], [255, 255], [128, 128], [0, 255], [0, 128], [128, 255]])
def test_regions_may_be_missing(tmp_path, row):
    assert read_trimap(saved(tmp_path, Image.fromarray(np.uint8([row]))))[0].tolist() == [row]


def test_one_bit_knows_no_unknown(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[True, False]])))
    assert read_trimap(path)[0].tolist() == [[255, 0]]


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90°
    path = saved(tmp_path, Image.fromarray(np.uint8([[0, 128, 255]])), exif=exif)
    assert read_trimap(path)[0].tolist() == [[0], [128], [255]]


# --- what is refused -----------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(UserError) as error:
        read_trimap(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


def test_alpha_matte(tmp_path):
    ramp = np.uint8([[0] * 40 + [255] * 30 + list(range(10, 20))])
    message = refusal(saved(tmp_path, Image.fromarray(ramp)))
    assert "0 (40 px), 255 (30 px), 10 (1 px)" in message
    assert "and 6 more" in message  # of 12 levels, 6 are shown
    assert "not the alpha matte" in message


def test_jpeg_noise(tmp_path):
    stripes = np.repeat(np.uint8([[0, 128, 255, 0, 128]]), 20, axis=0).repeat(3, axis=1)
    assert "lossy compression" in refusal(saved(tmp_path, Image.fromarray(stripes), "jpg"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("row", [[0, 1, 2], [0, 1], [1, 1], [0, 128, 254]])
def test_codes(tmp_path, row, dtype):
    message = refusal(saved(tmp_path, Image.fromarray(np.array([row], dtype=dtype))))
    assert f"{row[-1]} ({row.count(row[-1])} px)" in message
    assert "0 for background, 128 for unknown and 255 for foreground" in message


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("level", [63, 193])
def test_greys_near_black_or_white(tmp_path, level, dtype):
    unit = np.iinfo(dtype).max // 255
    refusal(saved(tmp_path, Image.fromarray(np.array([[0, level, 255]], dtype=dtype) * unit)))


def test_two_middle_greys(tmp_path):
    assert "127 (1 px), 128 (1 px)" in refusal(
        saved(tmp_path, Image.fromarray(np.uint8([[0, 127, 128, 255]])))
    )


@pytest.mark.parametrize("palette", [False, True])
def test_colours(tmp_path, palette):
    image = palette_image([[0, 1, 1, 2]], [(0,) * 3, (255, 0, 0), (0, 0, 254)])
    message = refusal(saved(tmp_path, image if palette else image.convert("RGB")))
    assert "(255, 0, 0) (2 px), (0, 0, 254) (1 px)" in message


def test_a_photograph_is_refused_without_counting_its_colours(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    monkeypatch.setattr(np, "unique", None)
    with pytest.raises(UserError, match=r"a\.png: a trimap is grey, .* has more than 1024 colours"):
        read_trimap(tmp_path / "a.png")


def test_transparency(tmp_path):
    opaque = saved(tmp_path, with_alpha([[0, 128, 255]], [[255, 255, 255]]))
    assert read_trimap(opaque)[0].tolist() == [[0, 128, 255]]
    assert "transparent" in refusal(saved(tmp_path, with_alpha([[0, 128, 255]], [[255, 0, 255]])))
    keyed = palette_image([[0, 1]], [(0,) * 3, (255,) * 3])
    assert "transparent" in refusal(saved(tmp_path, keyed, transparency=0))
    wide = Image.fromarray(np.uint16([[0, 32768, 65535]]))
    assert "transparent" in refusal(saved(tmp_path, wide, transparency=0))


# --- real files ----------------------------------------------------------------------------------


def test_real_trimaps(shared_data):
    folder = shared_data / "matting"
    paths = [*sorted((folder / "trimap").glob("*.png")), *folder.glob("pymatting_*/*_trimap.png")]
    assert len(paths) == 10
    for path in paths:
        stored = np.array(Image.open(path).convert("L"))
        expected = np.select([stored == 0, stored == 255], [0, 255], default=128)
        assert np.array_equal(read_trimap(path)[0].numpy(), expected)
        assert (expected == 128).any()


def test_real_alpha_matte_given_by_mistake(shared_data):
    message = refusal(shared_data / "matting" / "alpha" / "GT04.png")
    assert re.search(r"0 \(175,470 px\).*, and 250 more", message)
