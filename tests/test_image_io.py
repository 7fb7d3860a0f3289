"""Every pixel format, orientation and defect as a real file, against the module's table."""

import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile
from PIL.PngImagePlugin import PngInfo
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from tasks.matting.data import read_foreground
from tasks.matting.trimaps import read_trimap
from tasks.segmentation.label_maps import read_label_file
from train_utils import image_bounds, image_io
from train_utils.errors import UserError
from train_utils.image_io import (
    MAX_PIXELS,
    MaskReader,
    count_frames,
    frames_of,
    image_size,
    is_damaged,
    read_image,
    read_image_and_mask,
    read_mask,
    save_image,
    saved_here,
)
from train_utils.listing import list_images

RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, "PNG", **options)
    return path


def grey(values, dtype=np.uint8) -> Image.Image:
    return Image.fromarray(np.array(values, dtype=dtype))


def png_of(path: Path, bits: int, colour_type: int, row: bytes, width: int, key=b"") -> Path:
    """A PNG of one row as it is given, in kinds that Pillow cannot write; `key`: transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + (chunk(b"tRNS", key) if key else b"") + pixels)
    return path


def palette_image(indices, colours) -> Image.Image:
    image = Image.fromarray(np.array(indices, dtype=np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def rows(tensor: torch.Tensor) -> list:
    """[1, H, W] → nested lists; [3, H, W] → rows of (r, g, b)."""
    if tensor.shape[0] == 1:
        return tensor[0].tolist()
    return [[tuple(pixel) for pixel in row] for row in tensor.permute(1, 2, 0).tolist()]


def assert_image(tensor: torch.Tensor) -> None:
    assert isinstance(tensor, tv_tensors.Image)
    assert tensor.dtype == torch.uint8
    assert tensor.dim() == 3
    assert tensor.shape[0] == 3


def assert_mask(tensor: torch.Tensor) -> None:
    assert isinstance(tensor, tv_tensors.Mask)
    assert tensor.dtype == torch.uint8
    assert tensor.dim() == 3
    assert tensor.shape[0] == 1


# --- pixel formats ------------------------------------------------------------------------------


def test_rgb_image_keeps_its_bytes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 7, 3), dtype=np.uint8)
    image = read_image(png(tmp_path / "a.png", Image.fromarray(pixels)))
    assert_image(image)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_rgb_mask_is_luminance(tmp_path):
    path = png(tmp_path / "a.png", Image.fromarray(np.uint8([[RED, GREEN, WHITE, BLACK]])))
    mask = read_mask(path)
    assert_mask(mask)
    assert rows(mask) == [[76, 150, 255, 0]]  # 0.299·255 = 76.2, 0.587·255 = 149.7


def test_grey_is_replicated_and_kept(tmp_path):
    path = png(tmp_path / "a.png", grey([[0, 7, 255]]))
    assert rows(read_image(path)) == [[(0, 0, 0), (7, 7, 7), (255, 255, 255)]]
    assert rows(read_mask(path)) == [[0, 7, 255]]


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_one_bit_becomes_0_and_255(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.array([[True, False, True]])).save(path)
    assert rows(read_image(path)) == [[WHITE, BLACK, WHITE]]
    assert rows(read_mask(path)) == [[255, 0, 255]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF little-endian", "TIFF big-endian"])
def test_16_bits_are_scaled_over_the_whole_range(tmp_path, kind):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / "a.img"
    if kind == "TIFF big-endian":
        image = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values)
    image.save(path, kind.split()[0])
    expected = np.rint(values.astype(float) * 255 / 65535).astype(np.uint8)
    assert np.array_equal(read_mask(path)[0].numpy(), expected)
    image = read_image(path)
    assert_image(image)
    assert all(np.array_equal(channel.numpy(), expected) for channel in image)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("highest", [2, 20, 255])
def test_16_bits_of_values_up_to_255_are_refused(tmp_path, suffix, highest):
    # Masks that a tool has widened without scaling: read by the rule they would be all black.
    path = tmp_path / f"a.{suffix}"
    grey([[0, 1], [2, highest]], np.uint16).save(path)
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=rf"exceeds {highest} of 65535.* black\. Save it with"):
            read(path)
    assert read_label_file(path).tolist() == [[0, 1], [2, highest]]  # class indices are not scaled
    grey([[0, 1], [2, 256]], np.uint16).save(path)
    assert rows(read_mask(path)) == [[0, 0], [0, 1]]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colours_are_cut_to_8_but_not_to_nothing(tmp_path, colour_type, channels):
    def save(colour, alpha):
        values = [colour] * (channels - 1 + channels % 2) + [alpha] * (1 - channels % 2)
        row = struct.pack(f">{channels}H", *values)
        return png_of(tmp_path / "a.png", 16, colour_type, row, 1)

    assert rows(read_image(save(200 * 256 + 255, 65535))) == [[(200,) * 3]]
    for read in (read_image, read_foreground, read_mask, read_trimap, read_label_file):
        with pytest.raises(UserError, match=r"a\.png: 16-bit colours of which none exceeds 255"):
            read(save(255, 65535))


def test_16_bit_planes_of_a_tiff_are_refused(tmp_path):
    chunky = encode(Image.new("RGB", (2, 1), RED), "TIFF")
    path = tmp_path / "a.tif"
    planes = struct.pack("<HHII", 284, 3, 1, 2)
    assert chunky.count(struct.pack("<HHII", 284, 3, 1, 1)) == 1
    bits = struct.pack("<HHH", 8, 8, 8)
    assert chunky.count(bits) == 1
    planar = chunky.replace(struct.pack("<HHII", 284, 3, 1, 1), planes)
    path.write_bytes(planar.replace(bits, struct.pack("<HHH", 16, 16, 16)))
    for read in (read_image, read_mask, read_label_file, image_size):
        with pytest.raises(UserError, match=r"a\.tif: planes of 16 bits are not supported"):
            read(path)


def test_palette_image_takes_its_colours_and_its_transparency(tmp_path):
    image = palette_image([[0, 1, 2]], [RED, GREEN, (10, 20, 30)])
    assert rows(read_image(png(tmp_path / "a.png", image))) == [[RED, GREEN, (10, 20, 30)]]
    keyed = png(tmp_path / "b.png", image, transparency=0)
    assert rows(read_image(keyed)) == [[WHITE, GREEN, (10, 20, 30)]]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif"])
def test_palette_mask_of_greys_keeps_them(tmp_path, suffix):
    # As trimaps are stored. The third, coloured entry is in no pixel and so does not count.
    image = palette_image([[0, 1, 3]], [BLACK, (128,) * 3, RED, WHITE])
    image.save(tmp_path / f"a.{suffix}")
    assert rows(read_mask(tmp_path / f"a.{suffix}")) == [[0, 128, 255]]


def test_palette_mask_of_colours_is_object_against_index_0(tmp_path):
    # VOC's colours: the luminance of class 1 would be 38.
    image = palette_image([[0, 1, 2]], [BLACK, (128, 0, 0), (0, 128, 0)])
    assert rows(read_mask(png(tmp_path / "a.png", image))) == [[0, 255, 255]]
    # Index 0 is the background whatever its colour.
    image = palette_image([[0, 1]], [RED, BLACK])
    assert rows(read_mask(png(tmp_path / "b.png", image))) == [[0, 255]]


def test_palette_mask_with_transparent_entries_is_alpha(tmp_path):
    colours = palette_image([[0, 1, 2]], [RED, GREEN, RED])
    path = png(tmp_path / "a.png", colours, transparency=bytes([255, 51, 0]))
    assert rows(read_mask(path)) == [[255, 51, 0]]  # alpha
    assert rows(MaskReader("luminance")(path)) == [[0, 51, 0]]  # index 0 is the background
    greys = palette_image([[0, 1, 2]], [WHITE, (100,) * 3, RED])
    path = png(tmp_path / "b.png", greys, transparency=bytes([255, 51, 0]))
    by_greys = MaskReader("luminance")(path)
    assert rows(by_greys) == [[255, 20, 0]]  # 100·51/255 = 20; the red is not visible


def test_palette_with_alpha_channel(tmp_path):
    image = palette_image([[0, 1, 1]], [BLACK, RED]).convert("PA")
    image.putalpha(grey([[255, 255, 51]]))
    assert image.mode == "PA"
    image.save(tmp_path / "a.tif")
    assert rows(read_mask(tmp_path / "a.tif")) == [[255, 255, 51]]
    assert rows(MaskReader("luminance")(tmp_path / "a.tif")) == [[0, 255, 51]]
    assert rows(read_image(tmp_path / "a.tif")) == [[BLACK, RED, (255, 204, 204)]]


def test_alpha_composites_images_over_white_and_is_the_mask(tmp_path):
    pixels = np.uint8([[(*RED, 0), (*RED, 51), (*RED, 255)]])
    path = png(tmp_path / "a.png", Image.fromarray(pixels))
    assert rows(read_image(path)) == [[WHITE, (255, 204, 204), RED]]
    assert rows(read_mask(path)) == [[0, 51, 255]]
    assert rows(MaskReader("luminance")(path)) == [[0, 15, 76]]  # red 51 → 15.2, red 255 → 76.2


def test_grey_with_alpha(tmp_path):
    path = png(tmp_path / "a.png", Image.fromarray(np.uint8([[(100, 0), (100, 51), (100, 255)]])))
    assert Image.open(path).mode == "LA"
    assert rows(read_mask(path)) == [[0, 51, 255]]
    assert rows(MaskReader("luminance")(path)) == [[0, 20, 100]]
    assert [pixel[0] for pixel in rows(read_image(path))[0]] == [255, 224, 100]  # 20 + 204


def test_premultiplied_grey_of_tiff(tmp_path):
    path = tmp_path / "a.tif"
    straight = encode(Image.fromarray(np.uint8([[(20, 51), (100, 255)]])), "TIFF")
    extra_samples = [struct.pack("<HHII", 338, 3, 1, value) for value in (2, 1)]
    assert straight.count(extra_samples[0]) == 1
    path.write_bytes(straight.replace(*extra_samples))
    with Image.open(path) as image:
        assert image.mode == "La"
    assert rows(read_mask(path)) == [[51, 255]]
    assert rows(MaskReader("luminance")(path)) == [[20, 100]]


def test_transparent_colour_key(tmp_path):
    rgb = png(tmp_path / "a.png", Image.fromarray(np.uint8([[RED, GREEN]])), transparency=RED)
    assert rows(read_image(rgb)) == [[WHITE, GREEN]]
    assert rows(read_mask(rgb)) == [[0, 150]]
    wide = png(tmp_path / "b.png", grey([[257, 51400]], np.uint16), transparency=51400)
    assert rows(read_image(wide)) == [[(1, 1, 1), WHITE]]
    assert rows(read_mask(wide)) == [[1, 0]]


@pytest.mark.parametrize(("bits", "key", "row"), [(2, 1, b"\x1b"), (4, 1, b"\x01\x23")])
def test_the_transparent_grey_of_a_few_bits(tmp_path, bits, key, row):
    # Pixels 0, 1, 2, 3; Pillow spreads them over 8 bits, but not the key.
    path = png_of(tmp_path / "a.png", bits, 0, row, 4, struct.pack(">H", key))
    step = {2: 85, 4: 17}[bits]
    assert rows(read_mask(path)) == [[0, 0, 2 * step, 3 * step]]
    assert [pixel[0] for pixel in rows(read_image(path))[0]] == [0, 255, 2 * step, 3 * step]
    with pytest.raises(UserError, match="may not be transparent"):
        read_trimap(path)


def test_a_transparent_colour_of_16_bits_is_refused(tmp_path):
    row, key = struct.pack(">6H", 300, 0, 0, 0, 300, 0), struct.pack(">3H", 300, 0, 0)
    path = png_of(tmp_path / "a.png", 16, 2, row, 2, key)
    for read in (read_image, read_mask, read_label_file, image_size):
        with pytest.raises(UserError, match=r"a\.png: a transparent colour of 16 bits"):
            read(path)


def test_cmyk(tmp_path):
    image = Image.fromarray(np.uint8([[(0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)]]), "CMYK")
    image.save(tmp_path / "a.tif")
    assert rows(read_image(tmp_path / "a.tif")) == [[RED, BLACK, WHITE]]
    assert rows(read_mask(tmp_path / "a.tif")) == [[76, 0, 255]]
    image.resize((96, 32), Image.Resampling.NEAREST).save(tmp_path / "a.jpg", quality=100)
    assert abs(read_image(tmp_path / "a.jpg")[:, 16, 16].int() - torch.tensor(RED)).max() <= 3


def test_ycbcr_and_lab(tmp_path):
    rgb = Image.new("RGB", (2, 1), (200, 60, 30))
    rgb.convert("YCbCr").save(tmp_path / "ycbcr.tif")
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    ImageCms.applyTransform(rgb, to_lab).save(tmp_path / "lab.tif")
    for name, mode in (("ycbcr.tif", "YCbCr"), ("lab.tif", "LAB")):
        with Image.open(tmp_path / name) as image:
            assert image.mode == mode
        pixel = read_image(tmp_path / name)[:, 0, 0].int()
        assert abs(pixel - torch.tensor([200, 60, 30])).max() <= 3, name
        assert abs(int(read_mask(tmp_path / name)[0, 0, 0]) - 98) <= 2, name


def animation(path: Path, frames: list[Image.Image], **options) -> Path:
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    return path


def test_several_frames_are_refused_and_read_one_by_one(tmp_path):
    frames = [Image.new("RGB", (2, 1), colour) for colour in (RED, GREEN, WHITE)]
    for suffix, options in (("gif", {}), ("png", {}), ("tif", {}), ("webp", {"lossless": True})):
        path = animation(tmp_path / f"a.{suffix}", frames, **options)
        what = "pages" if suffix == "tif" else "frames"
        for read in (read_image, read_mask, read_label_file, read_trimap, image_size):
            with pytest.raises(
                UserError, match=rf"a\.{suffix}: has 3 {what}\. Save each as a file"
            ):
                read(path)
        assert not is_damaged(path)
        assert count_frames(path) == 3
        read = [rows(frame) for frame in frames_of(path)]
        assert read == [[[colour, colour]] for colour in (RED, GREEN, WHITE)], suffix
    still = png(tmp_path / "still.png", frames[0])
    assert count_frames(still) == count_frames(tmp_path / "missing.png") == 1
    assert [rows(frame) for frame in frames_of(still)] == [rows(read_image(still))]


def tiff_of_pages(*pages: dict[int, int]) -> bytes:
    """Grey squares, plain and uncompressed; each page is its side and its further tags."""
    content = b"II*\0" + struct.pack("<I", 8)
    for number, page in enumerate(pages):
        side = page[256]
        start = len(content) + 2 + 12 * (len(page) + 7) + 4
        tags = {257: side, 258: 8, 259: 1, 262: 1, 273: start, 278: side, 279: side**2} | page
        entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
        after = start + side**2 if number + 1 < len(pages) else 0
        content += struct.pack("<H", len(tags)) + b"".join(entries) + struct.pack("<I", after)
        content += bytes([side]) * side**2
    return content


def test_what_is_no_page(tmp_path):
    """Reduced copies and masks in a TIFF, the still of an APNG, further pictures of a phone's."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiff_of_pages({256: 9}, {256: 4}))
    with pytest.raises(UserError, match=r"a\.tif: has 2 pages"):
        image_size(path)
    for tag, kind in ((254, 1), (254, 4), (254, 5), (255, 2)):
        for pages in ([{256: 9}, {256: 4, tag: kind}], [{256: 4, tag: kind}, {256: 9}]):
            path.write_bytes(tiff_of_pages(*pages))
            assert image_size(path) == (9, 9), (tag, kind)
            assert read_mask(path).unique().tolist() == [9]
            assert count_frames(path) == 1
    circle = bytearray(tiff_of_pages({256: 9}, {256: 4}))
    second = struct.unpack_from("<I", circle, 8 + 2 + 12 * 8)[0]
    struct.pack_into("<I", circle, second + 2 + 12 * 8, 8)
    path.write_bytes(circle)
    assert count_frames(path) == 2
    path.write_bytes(tiff_of_pages({256: 4, 254: 1}))
    assert image_size(path) == (4, 4)  # there is nothing else
    large, small = Image.new("RGB", (8, 8), RED), Image.new("RGB", (2, 2), RED)
    assert count_frames(animation(tmp_path / "b.png", [large, large], default_image=True)) == 1
    animation(tmp_path / "c.mpo", [large, small], format="MPO")
    with Image.open(tmp_path / "c.mpo") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert read_image(tmp_path / "c.mpo").shape == (3, 8, 8)


def test_frames_beyond_a_bound_are_refused(tmp_path, monkeypatch):
    path = animation(tmp_path / "a.gif", [Image.new("L", (9, 9), n) for n in range(5)])
    monkeypatch.setattr(image_io, "_MAX_FRAME_PIXELS", 404)
    frames = frames_of(path)
    assert [len(next(frames)) for _ in range(4)] == [3] * 4
    with pytest.raises(UserError, match=r"a\.gif: its 5 frames .* 404 pixels together\. Split it"):
        next(frames)
    monkeypatch.setattr(image_bounds, "MAX_PAGES", 4)
    path = animation(tmp_path / "a.tif", [Image.new("L", (9, 9), n) for n in range(5)])
    with pytest.raises(UserError, match=r"a\.tif: more than 4 pages\. Split it"):
        next(frames_of(path))


@pytest.mark.parametrize(
    "image",
    [
        grey([[0, 1], [1, 0]]),
        grey([[0, 1], [1, 0]], np.uint16),
        Image.fromarray(np.uint8([[BLACK, (1, 1, 1)], [(1, 1, 1), BLACK]])),
        palette_image([[0, 1], [1, 0]], [BLACK, (1, 1, 1)]),
    ],
    ids=["grey", "16 bits", "RGB", "palette"],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_lossless_0_1_masks_are_0_255(tmp_path, image, suffix):
    image.save(tmp_path / f"a.{suffix}")
    assert rows(read_mask(tmp_path / f"a.{suffix}")) == [[0, 255], [255, 0]]


def test_lossless_0_1_masks_as_bmp_and_gif(tmp_path):
    for suffix in ("bmp", "gif"):
        grey([[0, 1], [1, 0]]).save(tmp_path / f"a.{suffix}")
        assert rows(read_mask(tmp_path / f"a.{suffix}")) == [[0, 255], [255, 0]], suffix


def test_other_small_values_are_grey_levels(tmp_path):
    assert rows(read_mask(png(tmp_path / "all.png", grey([[1, 1]])))) == [[255, 255]]
    assert rows(read_mask(png(tmp_path / "none.png", grey([[0, 0]])))) == [[0, 0]]
    assert rows(read_mask(png(tmp_path / "three.png", grey([[0, 1, 2]])))) == [[0, 1, 2]]
    image = read_image(png(tmp_path / "image.png", grey([[0, 1]])))
    assert rows(image) == [[BLACK, (1, 1, 1)]]


def test_a_1_in_a_lossy_file_may_be_noise(tmp_path):
    ones = grey(np.eye(16).repeat(8, 0).repeat(8, 1))
    ones.save(tmp_path / "a.jpg", quality=100)
    ones.save(tmp_path / "a.tif", compression="jpeg")
    for name in ("a.jpg", "a.tif"):
        assert read_mask(tmp_path / name).max() == 1, name


# --- orientation --------------------------------------------------------------------------------

UPRIGHT = {  # how a picture stored with each EXIF orientation is to be turned; stored [H, W, C]
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
    ids=["JPEG", "PNG", "WebP", "TIFF", "TIFF-LZW"],
)
def test_orientation_is_applied(tmp_path, file_format, options, orientation):
    stored = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8))
    tag = Image.Exif()
    tag[0x0112] = orientation
    plain, tagged = tmp_path / "plain", tmp_path / "tagged"
    plain.write_bytes(encode(stored, file_format, **options))
    tagged.write_bytes(encode(stored, file_format, exif=tag, **options))

    upright = UPRIGHT[orientation](read_image(plain).permute(1, 2, 0).numpy())
    assert np.array_equal(read_image(tagged).permute(1, 2, 0).numpy(), upright)
    upright = UPRIGHT[orientation](read_mask(plain).permute(1, 2, 0).numpy())
    assert np.array_equal(read_mask(tagged).permute(1, 2, 0).numpy(), upright)
    assert image_size(tagged) == (upright.shape[1], upright.shape[0])
    assert image_size(plain) == (40, 24)


def test_orientation_of_palette_and_wide_masks(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6  # a quarter turn clockwise
    wide = png(tmp_path / "a.png", grey([[0, 257], [514, 771]], np.uint16), exif=tag)
    assert rows(read_mask(wide)) == [[2, 0], [3, 1]]
    colours = palette_image([[0, 1], [1, 1]], [BLACK, RED])
    assert rows(read_mask(png(tmp_path / "b.png", colours, exif=tag))) == [[255, 0], [255, 255]]


def test_a_tag_behind_the_pixels_counts_nowhere(tmp_path):
    # `image_size` cannot see it without reading all pixels, and must agree with `read_image`.
    tag = Image.Exif()
    tag[0x0112] = 6
    data = encode(Image.new("L", (5, 3)), "PNG", exif=tag)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path = tmp_path / "a.png"
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    with Image.open(path) as image:
        assert image.getexif()[0x0112] == 6
    assert read_image(path).shape == (3, 3, 5)
    assert image_size(path) == (5, 3)


@pytest.mark.parametrize("exif", [b"Exif\x00\x00", b"Exif\x00\x00garbage!", b"Exif\x00\x00II*\x00"])
def test_broken_exif_counts_as_none(tmp_path, exif):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (5, 3), RED).save(path, exif=exif)
    assert read_image(path).shape == (3, 3, 5)
    assert image_size(path) == (5, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_undefined_orientation_counts_as_none(tmp_path, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    path = tmp_path / "a.jpg"
    Image.new("RGB", (5, 3), RED).save(path, exif=tag)
    assert read_image(path).shape == (3, 3, 5)
    assert image_size(path) == (5, 3)


# --- sizes --------------------------------------------------------------------------------------


def png_of_zeros(width: int, height: int) -> bytes:
    """A 1-bit PNG of any size, made without holding its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(20000, 20000), (10001, 10000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch, width, height):
    def never(self):
        raise AssertionError("decoded")

    path = tmp_path / "huge.png"
    path.write_bytes(png_of_zeros(width, height))
    assert path.stat().st_size < 300_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    for read in (read_image, read_mask, image_size):
        with pytest.raises(UserError, match=rf"huge\.png: .*{MAX_PIXELS:,} pixels\. Scale it down"):
            read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_itself_is_allowed(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_of_zeros(MAX_PIXELS // 2000, 2000))
    assert image_size(path) == (MAX_PIXELS // 2000, 2000)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1)])
def test_thin_images(tmp_path, width, height):
    path = png(tmp_path / "a.png", Image.new("L", (width, height), 200))
    assert read_image(path).shape == (3, height, width)
    assert read_mask(path).shape == (1, height, width)
    assert image_size(path) == (width, height)


# --- bombs: small files that cost much ----------------------------------------------------------


def jpeg_of_scans(scans: int, size: int, progressive: bool = True) -> bytes:
    """A grey JPEG whose last scan comes again and again; or one of three colours, each in its own.

    Other segments between the scans pretend to end the image.
    """
    plain = encode(Image.new("L", (size, size), 77), "JPEG", progressive=progressive)
    end = b"\xff\xfe\0\6\xff\xd9\xff\xd9"  # a comment
    start = plain.rindex(b"\xff\xda")
    if progressive:
        return plain[:start] + (plain[start:-2] + end) * scans + b"\xff\xd9"
    colours = encode(Image.new("RGB", (size, size)), "JPEG", subsampling=0)
    pixels = plain[start + 10 : -2] if scans < 10 else b""  # decoders make up what is missing
    each = [b"\xff\xda\0\x08\1" + bytes([1 + n % 3, 0, 0, 63, 0]) + pixels for n in range(scans)]
    return colours[: colours.index(b"\xff\xda")] + end.join(each) + b"\xff\xd9"


def jpeg_with_segments(kind: int, body: bytes, count: int) -> bytes:
    plain = encode(grey([[5]]), "JPEG")
    segment = b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body
    return plain[:2] + segment * count + plain[2:]


def tiff(tags: dict[int, int | bytes], data: bytes, big: bool = False) -> bytes:
    """A grey TIFF of 1×1 pixel with more tags: values, or arrays of 32 bits."""
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1} | tags
    arrays, entries = data, []
    for tag, value in sorted(tags.items()):
        array = isinstance(value, bytes)
        place = (16 if big else 8) + len(arrays) if array else value
        count = len(value) // 4 if array else 1
        entries.append(struct.pack("<HHQQ" if big else "<HHII", tag, 4, count, place))
        arrays += value if array else b""
    start = (16 if big else 8) + len(arrays)
    head = (
        b"II+\0\x08\0\0\0" + struct.pack("<Q", start)
        if big
        else b"II*\0" + struct.pack("<I", start)
    )
    directory = struct.pack("<Q" if big else "<H", len(entries)) + b"".join(entries) + bytes(8)
    return head + arrays + directory


def bmp_in_run_length_code(width: int, height: int, runs: bytes) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    return b"BM" + struct.pack("<III", start + len(runs), 0, start) + header + bytes(1024) + runs


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    plain = encode(grey([[5]]), "PNG")
    place = plain.index(b"IDAT") - 4
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return plain[:place] + b"".join(parts) + plain[place:]


def thin_png() -> bytes:
    rows = png_of_zeros(1, 1)
    header = b"IHDR" + struct.pack(">II", 1, 70_000) + rows[24:29]
    return rows[:12] + header + struct.pack(">I", zlib.crc32(header)) + rows[33:]


STRIPS = bytes(4 * (2**18 + 1))
TILE = zlib.compress(bytes(16), 1)
BOMBS = {
    "scans": (lambda: jpeg_of_scans(2100, 1000), "more than 2000 scans of 1,000,000 pixels"),
    "plain scans": (lambda: jpeg_of_scans(510, 2000, False), "more than 500 scans of 4,000,000"),
    "exif": (lambda: jpeg_with_segments(0xE1, b"Exif\0\0II", 101), "thousands of parts"),
    "hidden exif": (
        lambda: jpeg_with_segments(0xF0, b"\xff\xe1\0\x10Exif\0\0" + bytes(8), 101),
        "thousands of parts",
    ),
    "comments": (lambda: jpeg_with_segments(0xFE, b"", 10_001), "thousands of parts"),
    "tile": (
        lambda: tiff({322: 30_000, 323: 30_000, 324: 8, 325: 9}, TILE),
        "tiles of 900,000,000",
    ),
    "long tile": (
        lambda: tiff({322: 16, 323: 2**24, 324: 8, 325: 9}, TILE),
        "tiles of 268,435,456",
    ),
    "strips": (lambda: tiff({273: STRIPS, 279: 9, 259: 1}, b""), "262,145 strips or tiles"),
    "strips of a BigTIFF": (lambda: tiff({273: STRIPS, 279: 9}, b"", big=True), "262,145 strips"),
    "tags": (lambda: tiff(dict.fromkeys(range(1000, 5100), 1), b""), "4,106 tags"),
    "run-length code": (
        lambda: bmp_in_run_length_code(5000, 5000, b"\1\0\0\0" * 5001),
        "4,194,304 pixels in run-length code",
    ),
    "runs": (lambda: bmp_in_run_length_code(10, 10, b"\xff\1" * 3000), "500,000 small pieces"),
    "chunks": (lambda: png_with(*[(b"abCd", b"")] * 2600), "500,000 small pieces"),
    "thin": (thin_png, "1×70000 has a side of more than 65,535 pixels"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_cost_much(tmp_path, monkeypatch, name):
    make, problem = BOMBS[name]
    path = tmp_path / "bomb.png"  # which no decoder asks for
    path.write_bytes(make())
    assert path.stat().st_size < 2_200_000
    monkeypatch.setattr(image_bounds._InPieces, "left", 5000)  # of 500,000, which take a second
    if name != "runs":
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    for read in (read_image, read_mask):
        with within(20), pytest.raises(UserError, match=rf"bomb\.png: .*{problem}.*\. \w+"):
            read(path)


def test_what_only_looks_like_a_bomb_is_read(tmp_path):
    """The usual number of scans, long metadata, a tile that is a little larger than its image."""
    rgb = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    progressive = encode(rgb, "JPEG", progressive=True)
    long_text, tile = zlib.compress(bytes(3 << 20)), zlib.compress(bytes(2**20))
    intact = {
        "progressive": progressive,
        "followed": progressive + jpeg_of_scans(30, 8),  # as phones append pictures and films
        "three scans": jpeg_of_scans(3, 50, False),
        "profile": jpeg_with_segments(0xE2, b"ICC_PROFILE\0\1\1" + bytes(3000), 255),
        "a long segment": jpeg_with_segments(0xE1, b"Exif\0\0" + bytes(65_000), 3),
        "text": png_with((b"zTXt", b"a\0\0" + long_text), (b"iCCP", b"a\0\0" + long_text)),
        "tile": tiff({322: 1024, 323: 1024, 324: 8, 325: len(tile)}, tile),
        "runs": bmp_in_run_length_code(4, 2, b"\4\1\0\0\4\2\0\1"),
    }
    for name, content in intact.items():
        (tmp_path / name).write_bytes(content)
        assert_image(read_image(tmp_path / name))
    assert torch.equal(read_image(tmp_path / "followed"), read_image(tmp_path / "progressive"))
    assert image_size(tmp_path / "progressive") == (50, 40)


def test_a_file_of_gigabytes_is_not_read_whole(tmp_path):
    path = tmp_path / "a.webp"
    path.write_bytes(encode(grey([[5]]), "WEBP"))
    with path.open("r+b") as file:
        file.truncate(2**30 + 1)  # a hole, which takes no room
    with pytest.raises(UserError, match=r"a\.webp: larger than 1,073,741,824 bytes\. Scale"):
        read_image(path)


# --- refusals -----------------------------------------------------------------------------------


def test_unreadable_files_are_named_with_cause_and_fix(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image\n" * 20)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    for name, cause in (
        ("empty.png", "empty.* Replace"),
        ("text.png", "not an image.* Replace"),
        ("folder.png", "cannot be read.* Check"),
        ("dangling.png", "no such file.* Check"),
        ("missing.png", "no such file.* Check"),
    ):
        for read in (read_image, read_mask, image_size):
            with pytest.raises(UserError, match=rf"{name}: .*{cause}"):
                read(tmp_path / name)


class Hanging(BaseException):
    """Raised in what takes too long; readers catch every `Exception`."""


@contextmanager
def within(seconds: int):
    def stop(*_):
        raise Hanging

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_unopened(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    readers = (read_image, read_foreground, read_mask, read_trimap, read_label_file, image_size)
    with within(10):
        assert list_images(tmp_path) == [pipe]
        for read in readers:
            for path in (pipe, "/dev/zero"):
                with pytest.raises(UserError, match=rf"{path}: a pipe or a device\. Save"):
                    read(path)
        assert not saved_here(pipe)


def test_what_is_damaged_and_what_is_not(tmp_path):
    good = png(tmp_path / "good.png", grey([[1, 2]]))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "huge.png").write_bytes(png_of_zeros(20000, 10))
    grey([[0.5]], np.float32).save(tmp_path / "float.tif")
    for name in ("empty.png", "text.png", "cut.png"):
        assert is_damaged(tmp_path / name), name
    for name in ("good.png", "float.tif", "missing.png", "."):
        assert not is_damaged(tmp_path / name), name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_io, "MAX_PIXELS", 10_000)
        assert not is_damaged(tmp_path / "huge.png")


UNDER_A_LIMIT = """
import importlib, os, resource, sys, warnings
from pathlib import Path
from train_utils import image_io
from train_utils.config import load_yaml
from train_utils.errors import UserError

warnings.simplefilter("ignore")
places = [place.split(":") for place in sys.argv[1].split(",")]
readers = [getattr(importlib.import_module(module), name) for module, name in places]
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 50 * 2**20,) * 2)
for path in sorted(Path(".").iterdir()):
    for read in [load_yaml] if path.suffix == ".yaml" else readers:
        try:
            print(read.__name__, "nothing" if read(path) is None else "read")
        except UserError as error:
            print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by Linux' means")
def test_memory_stays_bounded_and_a_plain_c_locale_is_enough(tmp_path):
    """Bombs of all kinds, and names of all kinds, in one process of 50 MiB more than it starts."""
    (tmp_path / "bomb.png").write_bytes(png_of_zeros(20000, 20000))
    (tmp_path / "fits.png").write_bytes(png_of_zeros(8000, 5000))  # 40 MB, 120 MB as RGB
    png(tmp_path / "größe 画.png", grey([[9]]))
    png(tmp_path / os.fsdecode(b"caf\xe9.png"), grey([[9]]))
    layers = ["l0: &l0 {a: 1}"]
    layers += [f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    (tmp_path / "layers.yaml").write_text("\n".join(layers))
    readers = "train_utils.image_io:read_image,train_utils.image_io:read_mask,"
    readers += "tasks.matting.data:read_foreground,tasks.matting.trimaps:read_trimap,"
    readers += "tasks.segmentation.label_maps:read_label_file"
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONIOENCODING": "ascii:backslashreplace", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, readers],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("bomb.png: has far more than 100,000,000") for line in lines) == 5
    assert sum(line.startswith("fits.png: too little memory") for line in lines) == 5
    assert lines.count("read_image read") == lines.count("read_label_file read") == 2
    assert "load_yaml read" in lines


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path, file_format, kept):
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), file_format)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * kept)])
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=r"cut\.img: .*Replace"):
            read(path)


def test_no_flipped_bit_of_a_png_changes_a_mask_unnoticed(tmp_path):
    y, x = np.mgrid[:64, :64]
    disc = ((y - 32) ** 2 + (x - 32) ** 2 < 400).astype(np.uint8) * 255
    data, path = encode(grey(disc), "PNG"), tmp_path / "a.png"
    refused = 0
    for bit in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert np.array_equal(read_mask(path)[0].numpy(), disc)
        except UserError:
            refused += 1
    assert refused > 8 * len(data) // 7 * 0.9


def test_values_without_a_fixed_range_are_refused(tmp_path):
    grey([[0, 1]], np.float32).save(tmp_path / "float.tif")
    grey([[0, 70000]], np.int32).save(tmp_path / "int.tif")
    for name in ("float.tif", "int.tif"):
        for read in (read_image, read_mask, image_size):
            with pytest.raises(UserError, match=rf"{name}: 32-bit and float.* PNG of 8 or 16 bits"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    ("tag", "value", "other", "cause"),
    [(258, 16, 12, "12-bit"), (262, 1, 0, "0 for white")],
    ids=["bits per sample", "photometric interpretation"],
)
def test_tiffs_that_pillow_would_misread_are_refused(tmp_path, tag, value, other, cause):
    data = encode(grey(np.zeros((4, 4)), np.uint16), "TIFF")
    entry = struct.pack("<HHII", tag, 3, 1, value)
    assert data.count(entry) == 1
    path = tmp_path / "a.tif"
    path.write_bytes(data.replace(entry, struct.pack("<HHII", tag, 3, 1, other)))
    for read in (read_image, read_mask, image_size):
        with pytest.raises(UserError, match=cause):
            read(path)


def test_an_image_without_pixels_is_refused(tmp_path):
    path = tmp_path / "a.gif"
    data = bytearray(encode(grey([[5]]), "GIF"))
    data[6:8] = data[data.index(b",") + 5 : data.index(b",") + 7] = b"\x00\x00"  # both widths
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.gif"):
        read_mask(path)


def small_files() -> list[bytes]:
    y, x = np.mgrid[:12, :9]
    rgb = Image.fromarray(np.stack([y * 20, x * 25, (x + y) * 12], -1).astype(np.uint8))
    tag = Image.Exif()
    tag[0x0112] = 6
    return [
        encode(rgb, "JPEG", exif=tag),
        encode(rgb.convert("CMYK"), "JPEG"),
        encode(rgb, "PNG"),
        encode(rgb.convert("P"), "PNG", transparency=3),
        encode(grey(y * x * 600, np.uint16), "PNG"),
        encode(rgb, "BMP"),
        encode(rgb.convert("P"), "BMP"),
        encode(rgb, "WEBP", exif=tag),
        encode(rgb, "TIFF", exif=tag),
        encode(rgb.convert("P"), "TIFF"),
        encode(grey(y * x * 600, np.uint16), "TIFF", compression="tiff_lzw"),
        encode(rgb.convert("LA"), "TIFF"),
        encode(rgb.convert("P"), "GIF", transparency=3),
    ]


SMALL_FILES = small_files()


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it finds in damaged metadata
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_files_give_pixels_or_a_user_error(tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(SMALL_FILES)))
    for _ in range(data.draw(st.integers(0, 4))):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path / "damaged.img"
    path.write_bytes(content[:cut])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_io, "MAX_PIXELS", 10**6)  # a flipped bit in a width costs no gigabytes
        for read, check in ((read_image, assert_image), (read_mask, assert_mask)):
            try:
                tensor = read(path)
                check(tensor)
                assert image_size(path) == (tensor.shape[2], tensor.shape[1])
            except UserError as error:
                assert "damaged.img: " in str(error)


# --- names and folders --------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux file systems take any bytes")
@pytest.mark.parametrize("name", ["苹果 ü.png", os.fsdecode(b"caf\xe9\xff.png"), "line\nbreak.png"])
def test_any_name_works(tmp_path, name):
    folder = tmp_path / name.removesuffix(".png")
    path = folder / name
    save_image(grey([[9]]), path)
    assert rows(read_mask(path)) == [[9]]
    assert list_images(folder) == [path]
    path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_mask(path)
    assert str(caught.value).encode("utf-8").decode().isprintable()


def test_list_images(tmp_path):
    names = ["b.png", "a.JPG", "B.tiff", "c.WebP", "sub/a.bmp", "sub/deep/x.jpeg", "sub.png"]
    others = ["d.apng", "d.dib", "d.gif", "d.jfi", "d.jfif", "d.jif", "d.jpe", "d.MPO", "d.tif"]
    names += others
    ignored = [
        ".hidden.png",
        "._a.JPG",
        "notes.txt",
        "png",
        "a.png.bak",
        ".cache/x.png",
        "sub/._y.png",
    ]
    for name in names + ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    top = sorted(["B.tiff", "a.JPG", "b.png", "c.WebP", "sub.png", *others])
    assert list_images(tmp_path) == [tmp_path / name for name in top]
    everything = [*top, "sub/a.bmp", "sub/deep/x.jpeg"]
    assert list_images(tmp_path, recursive=True) == [tmp_path / name for name in everything]
    assert list_images(str(tmp_path)) == list_images(tmp_path)


def test_list_images_refuses_folders_without_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").touch()
    with pytest.raises(UserError, match=r"holds no images \(\.jpg .*Check the path"):
        list_images(tmp_path)
    with pytest.raises(UserError, match=r"missing: no such folder\. Check the path"):
        list_images(tmp_path / "missing")
    with pytest.raises(UserError, match=r"notes\.txt: is not a folder\. Check the path"):
        list_images(tmp_path / "notes.txt")


# --- saving -------------------------------------------------------------------------------------


def test_save_image_is_lossless_and_makes_folders(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (5, 4, 4), dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "a.png"
    save_image(Image.fromarray(pixels), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.array(image), pixels)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.png"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_was_saved_here(tmp_path):
    save_image(grey([[1]]), tmp_path / "a.png")
    assert saved_here(tmp_path / "a.png")
    # Nothing but the mark distinguishes the file from the one that Pillow alone would have written.
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "edited.png").write_bytes(content[:-9] + b"x" + content[-8:])
    first_edition = PngInfo()
    first_edition.add_text("Software", "pixtrain")
    grey([[1]]).save(tmp_path / "old.png", pnginfo=first_edition)
    assert saved_here(tmp_path / "old.png")
    (tmp_path / "bomb.png").write_bytes(png_of_zeros(20000, 20000))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:30])
    png(tmp_path / "other.png", grey([[1]]))
    for name in ("bomb.png", "cut.png", "other.png", "missing.png", "edited.png"):
        assert not saved_here(tmp_path / name), name


def test_save_image_takes_the_longest_name(tmp_path):
    path = tmp_path / f"{'n' * 251}.png"
    save_image(grey([[1]]), path)
    assert path.exists()


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_image(grey([[1, 2]]), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space left.*Make room"):
        save_image(grey([[3, 4]]), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_save_image_refuses_impossible_places(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a\.png: cannot be written"):
        save_image(grey([[1]]), tmp_path / "file" / "a.png")
    with pytest.raises(ValueError, match=r"saved as \.png"):
        save_image(grey([[1]]), tmp_path / "a.jpg")


# --- real files ---------------------------------------------------------------------------------


def test_real_photographs_and_masks(shared_data):
    images = list_images(shared_data / "saliency" / "DUTS-TE" / "DUTS-TE-Image")
    assert len(images) == 80
    for path in images[::8]:
        mask_path = shared_data / "saliency" / "DUTS-TE" / "DUTS-TE-Mask" / f"{path.stem}.png"
        image, mask = read_image(path), read_mask(mask_path)
        assert np.array_equal(image.permute(1, 2, 0), np.array(Image.open(path)))
        assert np.array_equal(mask[0], np.array(Image.open(mask_path)))
        assert image_size(path) == image_size(mask_path) == (image.shape[2], image.shape[1])


def test_real_palette_masks(shared_data):
    # alphamatting.com's trimaps are palettes of greys, VOC's labels palettes of colours.
    for path in list_images(shared_data / "matting" / "trimap")[:2]:
        assert read_mask(path).unique().tolist() == [0, 128, 255]
    for path in list_images(shared_data / "voc_real3" / "SegmentationClass"):
        indices = np.array(Image.open(path))
        assert np.array_equal(read_mask(path)[0], (indices > 0) * 255)


def test_real_grey_photographs_are_grey_everywhere(shared_data):
    for path in list_images(shared_data / "voc/VOCdevkit/VOC2007/JPEGImages")[:5]:
        red, green, blue = read_image(path)
        assert torch.equal(red, green)
        assert torch.equal(red, blue)


# --- image and mask at once, and JPEGs at a reduced size -----------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB", "I;16"])
def test_an_image_and_its_mask_are_read_as_each_by_itself(tmp_path, mode):
    generator = np.random.default_rng(0)
    if mode == "I;16":
        mask = Image.fromarray(generator.integers(0, 2**16, (9, 13)).astype(np.uint16))
    else:
        pixels = generator.integers(0, 256, (9, 13, 4)).astype(np.uint8)
        mask = Image.fromarray(pixels).convert(mode)
    mask.save(tmp_path / "mask.png")
    for name in ("mask.png", "image.jpg"):
        if name == "image.jpg":
            Image.effect_noise((13, 9), 90).convert("RGB").save(tmp_path / name)
        image, target = read_image_and_mask(tmp_path / name, tmp_path / "mask.png")
        assert isinstance(image, tv_tensors.Image) and isinstance(target, tv_tensors.Mask)
        assert torch.equal(image, read_image(tmp_path / name))
        assert torch.equal(target, read_mask(tmp_path / "mask.png"))
        assert image.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()


def test_an_image_and_a_mask_of_another_size_lie_apart(tmp_path):
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "image.png")
    Image.new("L", (4, 5), 7).save(tmp_path / "mask.png")
    image, mask = read_image_and_mask(tmp_path / "image.png", tmp_path / "mask.png")
    assert (image.shape, mask.shape) == ((3, 4, 5), (1, 5, 4))
    assert image[:, 0, 0].tolist() == [1, 2, 3] and mask.unique().tolist() == [7]


@pytest.mark.parametrize(
    ("at_least", "size"),
    [(None, (203, 101)), (102, (203, 101)), (51, (203, 101)), (50, (102, 51)), (12, (26, 13))],
)
def test_a_jpeg_is_decoded_at_a_reduced_size(tmp_path, at_least, size):
    # 101 is twice 50 and eight times 12; sides are rounded up: ⌈203/2⌉ = 102, ⌈101/8⌉ = 13.
    picture = Image.linear_gradient("L").resize((203, 101)).convert("RGB")
    picture.save(tmp_path / "a.jpg", quality=95)
    picture.save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.jpg", at_least)
    assert image.shape[:0:-1] == size == image_size(tmp_path / "a.jpg", at_least)
    whole = read_image(tmp_path / "a.jpg")
    small, smaller = (F.resize(x, [6, 6], antialias=True).int() for x in (whole, image))
    stretched = size[1] * round(101 / size[1]) / 101 - 1
    assert (small - smaller).abs().max() <= 2 + 255 * stretched
    assert torch.equal(read_image(tmp_path / "a.png", at_least), read_image(tmp_path / "a.png"))


def test_a_turned_jpeg_is_reduced_and_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg", 16) == (16, 32)
    assert read_image(tmp_path / "a.jpg", 16).shape == (3, 32, 16)
