"""Masks in alpha channels, metadata of any size, colour profiles, frames: files as they come."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_image_io import (
    encode,
    grey,
    jpeg_with_segments,
    palette_image,
    png,
    png_with,
    rows,
    within,
)
from test_predict import predictor
from test_refusals import refused

import train
from tasks.matting.data import read_foreground
from tasks.segmentation.label_maps import LabelReader
from train_utils import colour_profiles, image_io
from train_utils.errors import UserError
from train_utils.image_io import (
    MaskReader,
    image_size,
    is_damaged,
    read_colours,
    read_image,
    read_image_and_mask,
    read_map,
    read_mask,
    save_image,
    saved_here,
)
from train_utils.prediction_files import plan

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
DISC = np.where((np.indices((16, 16)) - 7.5).__pow__(2).sum(0) < 30, 255, 0).astype(np.uint8)


def rgba(colours, alpha) -> Image.Image:
    image = Image.fromarray(np.broadcast_to(np.uint8(colours), (*alpha.shape, 3)).copy())
    image.putalpha(Image.fromarray(alpha))
    return image


PHOTO = np.random.default_rng(0).integers(0, 90, (16, 16, 3), dtype=np.uint8)  # dark
GREY_PHOTO = np.repeat(np.random.default_rng(1).integers(20, 220, (16, 16, 1), np.uint8), 3, 2)
TWO_LEVELS = np.repeat(DISC[..., None], 3, 2)


# --- alpha --------------------------------------------------------------------------------------


@pytest.mark.parametrize("colours", [PHOTO, GREY_PHOTO, (255, 255, 255), (0, 0, 0), (200, 0, 0)])
@pytest.mark.parametrize("kind", ["png", "tif", "webp", "LA.png", "P.png", "key.gif"])
def test_alpha_that_varies_is_the_mask(tmp_path, colours, kind):
    image, path = rgba(colours, DISC), tmp_path / f"a.{kind}"
    if kind == "LA.png":
        image = image.convert("LA")
    elif kind == "P.png":
        image = image.quantize(64, Image.Quantize.FASTOCTREE)
    image.save(path, **({"lossless": True} if kind == "webp" else {}))
    if kind in ("P.png", "key.gif") and colours is GREY_PHOTO:  # of 16 levels: may be a mask
        with pytest.raises(UserError, match="its alpha varies"):
            read_mask(path)
    else:
        assert np.array_equal(read_mask(path)[0], DISC)
    assert np.array_equal(MaskReader("alpha")(path)[0], DISC)
    assert np.array_equal(read_map(path, "alpha")[0], DISC)
    photo = png(tmp_path / "photo.png", Image.fromarray(PHOTO))
    assert np.array_equal(read_image_and_mask(photo, path, None, MaskReader("alpha"))[1][0], DISC)


def test_soft_alpha_and_16_bits(tmp_path):
    path = png(tmp_path / "a.png", rgba(PHOTO, RAMP))
    assert np.array_equal(read_mask(path)[0], RAMP)
    save_image(rgba(PHOTO, RAMP), tmp_path / "cutout.png")  # as predict.py --cutout
    assert np.array_equal(read_mask(tmp_path / "cutout.png")[0], RAMP)
    ones = png(tmp_path / "ones.png", rgba(PHOTO, DISC // 255))
    assert np.array_equal(read_mask(ones)[0], DISC)  # 0 and 1, as in any mask


def test_opaque_alpha_is_dropped(tmp_path):
    path = png(tmp_path / "a.png", rgba(TWO_LEVELS, np.full_like(DISC, 255)))
    assert np.array_equal(read_mask(path)[0], DISC)
    assert read_mask(path).equal(MaskReader("luminance")(path))
    assert MaskReader("alpha")(path).unique().tolist() == [255]


@pytest.mark.parametrize(
    ("colours", "alpha"),
    [
        (TWO_LEVELS, np.where(np.arange(16) < 14, 255, 0) * np.ones((16, 1), int)),  # a border
        (TWO_LEVELS // 255 * 38, RAMP),
        (TWO_LEVELS, np.zeros((16, 16))),
        (TWO_LEVELS, np.full((16, 16), 128)),
    ],
    ids=["transparent border", "class code on soft alpha", "nothing visible", "half transparent"],
)
def test_two_possible_masks_are_refused(tmp_path, colours, alpha):
    path = png(tmp_path / "a.png", rgba(colours, alpha.astype(np.uint8)))
    problem = r"a\.png: its alpha varies.*--set data\.mask_channel=alpha, or luminance"
    for read in (read_mask, read_map, LabelReader(2, mode="threshold")):
        with pytest.raises(UserError, match=problem):
            read(path)
    assert np.array_equal(MaskReader("alpha")(path)[0], alpha)
    over_black = np.rint(colours[..., 0].astype(float) * alpha / 255)
    assert abs(MaskReader("luminance")(path)[0].numpy() - over_black).max() <= 1
    labels = LabelReader(2, mode="threshold", object="bright", channel="alpha")(path)
    assert np.array_equal(labels[0], alpha >= 128)


def test_greys_that_follow_alpha_are_no_second_mask(tmp_path):
    path = png(tmp_path / "a.png", rgba(np.repeat(RAMP[..., None], 3, 2), RAMP))
    assert np.array_equal(read_mask(path)[0], RAMP)


def test_classes_of_a_palette_with_a_transparent_one(tmp_path):
    colours = palette_image([[0, 1, 2]], [(0, 0, 0), (128, 0, 0), (224, 224, 192)])
    path = png(tmp_path / "void.png", colours, transparency=2)  # background is seen, void is not
    with pytest.raises(UserError, match=r"void\.png: its alpha varies, and its colours look like"):
        read_mask(path)
    assert rows(MaskReader("luminance")(path)) == [[0, 255, 0]]
    assert rows(MaskReader("alpha")(path)) == [[255, 255, 0]]
    path = png(tmp_path / "cut.png", colours, transparency=0)  # by both rules the same
    assert rows(read_mask(path)) == [[0, 255, 255]]


def test_a_mask_without_alpha_has_none_to_take(tmp_path):
    for image in (grey(DISC), grey(DISC.astype(np.uint16) * 257)):
        path = png(tmp_path / "a.png", image)
        with pytest.raises(UserError, match=r"a\.png: has no alpha channel.*Set it to null"):
            MaskReader("alpha")(path)
        assert np.array_equal(read_map(path, "alpha")[0], DISC)


def test_a_map_of_colours_is_refused(tmp_path):
    for image in (Image.fromarray(PHOTO), palette_image([[0, 1]], [(0, 0, 0), (200, 0, 0)])):
        with pytest.raises(UserError, match=r"a\.png: a map is grey"):
            read_map(png(tmp_path / "a.png", image))
    assert rows(read_map(png(tmp_path / "a.png", grey([[0, 1]])))) == [[0, 1]]


def test_a_threshold_makes_two_levels(tmp_path):
    path = png(tmp_path / "a.png", grey([[0, 2, 38, 75]]))
    assert rows(MaskReader(threshold=1)(path)) == [[0, 255, 255, 255]]
    assert rows(MaskReader(threshold=38)(path)) == [[0, 0, 255, 255]]


# --- metadata -----------------------------------------------------------------------------------

LONG = 20 * 2**20


def text(kind: bytes, size: int) -> tuple[bytes, bytes]:
    body = bytes(size) if kind == b"iCCP" else b"x" * size
    packed = zlib.compress(body, 1)
    return kind, {
        b"tEXt": b"a\0" + body,
        b"zTXt": b"a\0\0" + packed,
        b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + packed,
        b"iCCP": b"a\0\0" + packed,
    }[kind]


def behind_pixels(content: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    more = png_with(*chunks)
    parts = more[more.index(chunks[0][0]) - 4 : more.index(b"IDAT") - 4]
    return content[:-12] + parts + content[-12:]


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_with_any_amount_of_metadata_is_read(tmp_path, kind):
    plain = encode(grey([[5]]), "PNG")
    contents = [png_with(text(kind, LONG)), png_with(*[text(kind, 9 * 2**20)] * 7)]
    contents += [behind_pixels(plain, text(kind, size)) for size in (LONG, 9)]
    path = tmp_path / "a.png"
    for content in contents:
        path.write_bytes(content)
        assert rows(read_image(path)) == [[(5, 5, 5)]] and rows(read_mask(path)) == [[5]]
        assert image_size(path) == (1, 1)
        assert not is_damaged(path) and not saved_here(path)
        path.write_bytes(content[:-20])  # still, what is cut is cut
        assert is_damaged(path)
    at = contents[0].index(kind) + 100
    path.write_bytes(contents[0][:at] + b"?" + contents[0][at + 1 :])
    assert is_damaged(path)


def test_metadata_beyond_the_bound_take_no_memory_and_no_time(tmp_path, monkeypatch):
    """Bombs are unpacked up to 48 MiB in all, however many there are, and never reach Pillow."""
    unpacked, decompress = [], zlib.decompressobj

    class Counting:
        def __init__(self):
            self.inner = decompress()

        def decompress(self, data, limit):
            unpacked.append(limit)
            return self.inner.decompress(data, limit)

    path = tmp_path / "bomb.png"
    path.write_bytes(png_with(*[text(b"zTXt", 2**26)] * 40))
    with monkeypatch.context() as patch, within(20):
        patch.setattr("train_utils.image_bounds.zlib.decompressobj", Counting)
        assert rows(read_mask(path)) == [[5]]
    assert sum(unpacked) <= 48 * 2**20
    with pytest.raises(ValueError, match="too large"):  # so says Pillow
        Image.open(path)


def test_short_metadata_still_count(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()
    old = f"\nexif\n{len(body)}\n{body.hex()}\n".encode()
    long = text(b"zTXt", LONG)
    chunk = (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(old))
    plain = encode(grey([[1, 2, 3]]), "PNG")
    place = plain.index(b"IDAT") - 4
    parts = png_with(long, chunk, long)
    parts = parts[parts.index(b"zTXt") - 4 : parts.index(b"IDAT") - 4]
    (tmp_path / "a.png").write_bytes(plain[:place] + parts + plain[place:])
    assert image_size(tmp_path / "a.png") == (1, 3)
    assert rows(read_mask(tmp_path / "a.png")) == [[1], [2], [3]]


def test_metadata_of_other_formats(tmp_path):
    rgb = Image.new("RGB", (3, 2), (9, 9, 9))
    exif = Image.Exif()
    exif[0x9286] = b"x" * 60_000
    long = 2**21
    files = {
        "a.jpg": jpeg_with_segments(
            0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000), 99
        ),
        "b.jpg": jpeg_with_segments(0xE1, b"Exif\0\0" + exif.tobytes()[6:], 9),
        "c.jpg": jpeg_with_segments(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000), 255),
        "d.jpg": jpeg_with_segments(0xED, b"Photoshop 3.0\0" + bytes(65_000), 99),
        "e.jpg": jpeg_with_segments(0xFE, bytes(65_000), 99),
        "a.webp": encode(rgb, "WEBP", xmp=bytes(long), icc_profile=bytes(long), exif=bytes(long)),
        "a.tif": encode(rgb, "TIFF", icc_profile=bytes(long), tiffinfo={700: bytes(long)}),
        "a.gif": encode(rgb, "GIF", comment=b"x" * long),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert read_image(tmp_path / name).unique().tolist() in ([9], [5]), name


# --- colour profiles ----------------------------------------------------------------------------


def profile_with(**tags: bytes) -> bytes:
    """sRGB's profile with other tags in place of some."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", content, 128)[0]):
        name, start, _ = struct.unpack_from(">4sII", content, 132 + 12 * number)
        if new := tags.get(name.decode()):
            content[start : start + len(new)] = new
    return bytes(content)


SRGB = profile_with()
GAMMA_1 = b"para\0\0\0\0\0\0\0\0" + struct.pack(">i", 65536)  # y = x
LINEAR = profile_with(rTRC=GAMMA_1, gTRC=GAMMA_1, bTRC=GAMMA_1)  # its three curves are one


def srgb_of_linear(value: int) -> int:
    x = value / 255
    return round(255 * (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055))


def test_a_profile_is_converted_to_srgb(tmp_path):
    colours = np.uint8([[(10, 100, 200), (0, 0, 0), (255, 255, 255)]])
    wanted = [[tuple(srgb_of_linear(v) for v in colour) for colour in row] for row in colours]
    image = Image.fromarray(colours)
    for suffix, options in (("png", {}), ("tif", {}), ("webp", {"lossless": True})):
        path = tmp_path / f"a.{suffix}"
        image.save(path, icc_profile=LINEAR, **options)
        assert np.allclose(rows(read_image(path)), wanted, atol=1), suffix
        assert np.array_equal(read_colours(path).permute(1, 2, 0), colours)
        mask = png(tmp_path / "mask.png", grey([[0, 128, 255]]), icc_profile=LINEAR)
        read, alpha = read_image_and_mask(path, mask)
        assert np.allclose(rows(read), wanted, atol=1) and rows(alpha) == [[0, 128, 255]]
    palette = palette_image([[0, 1, 2]], [tuple(map(int, colour)) for colour in colours[0]])
    path = png(tmp_path / "p.png", palette, icc_profile=LINEAR)
    assert np.allclose(rows(read_image(path)), wanted, atol=1)
    faint = image.convert("RGBA")
    faint.putalpha(grey([[255, 0, 51]]))
    path = png(tmp_path / "faint.png", faint, icc_profile=LINEAR)
    assert np.allclose(rows(read_image(path))[0][:2], [wanted[0][0], (255,) * 3], atol=1)
    assert np.allclose(rows(read_foreground(path)), wanted, atol=1)
    reader = LabelReader(3, mode="colour", palette=colours[0].tolist())
    assert rows(reader(tmp_path / "a.png")) == [[0, 1, 2]]
    frames = [image, Image.fromarray(255 - colours)]
    frames[0].save(
        tmp_path / "two.png", save_all=True, append_images=frames[1:], icc_profile=LINEAR
    )
    assert np.allclose(rows(next(image_io.frames_of(tmp_path / "two.png"))), wanted, atol=1)


def test_what_keeps_its_bits(tmp_path):
    """sRGB, by what a profile does, not what it is called; broken, too large, of another space."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (SRGB, LINEAR[:200], b"nonsense" * 99, lab, LINEAR + bytes(2**22), b"x"):
        path = png(tmp_path / "a.png", Image.fromarray(pixels), icc_profile=profile)
        assert np.array_equal(read_image(path).permute(1, 2, 0), pixels)
    called_srgb = ImageCms.ImageCmsProfile(io.BytesIO(LINEAR)).profile.profile_description
    assert "sRGB" in called_srgb
    for mode in ("1", "L"):  # a profile of colours says nothing of grey
        image = Image.fromarray(pixels[..., 0]).convert(mode)
        path = png(tmp_path / "a.png", image, icc_profile=LINEAR)
        assert np.array_equal(read_image(path)[0], np.array(image.convert("L")))


def icc(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile of version 2."""
    start = 132 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = bytearray(128)
    size = start + len(data)
    head[:24] = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, kind, space, connection)
    head[36:40] = b"acsp"
    head[68:80] = D50
    return bytes(head) + table + data


D50 = struct.pack(">3i", 63190, 65536, 54061)


def test_grey_and_16_bits_by_a_grey_profile(tmp_path):
    tags = {b"wtpt": b"XYZ \0\0\0\0" + D50, b"kTRC": b"curv\0\0\0\0\0\0\0\0"}  # y = x
    linear = icc(b"mntr", b"GRAY", b"XYZ ", tags)
    wanted = [srgb_of_linear(value) for value in (10, 100, 200)]
    levels = np.uint8([[10, 100, 200]])
    for image in (grey(levels), grey(levels.astype(np.uint16) * 257, np.uint16)):
        path = png(tmp_path / "a.png", image, icc_profile=linear)
        assert np.allclose([pixel[0] for pixel in rows(read_image(path))[0]], wanted, atol=1)
        assert rows(read_mask(path)) == levels.tolist()
    both = Image.merge("LA", [grey(levels), grey([[255, 255, 0]])])
    path = png(tmp_path / "la.png", both, icc_profile=linear)
    assert np.allclose([p[0] for p in rows(read_image(path))[0]], [*wanted[:2], 255], atol=1)


def test_cmyk_by_its_profile(tmp_path):
    """Of four inks only black shows: L* falls from 100 to 0, which is sRGB 119 in the middle."""
    identity = struct.pack(">9i", *[65536 * (n % 4 == 0) for n in range(9)])
    corners = b"".join(bytes([0 if n % 2 else 255, 128, 128]) for n in range(16))
    table = b"mft1\0\0\0\0\4\3\2\0" + identity + bytes(range(256)) * 4 + corners
    table += bytes(range(256)) * 3
    profile = icc(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})
    inks = Image.fromarray(np.uint8([[(255, 0, 0, 0), (0, 0, 0, 255), (9, 9, 9, 128)]]), "CMYK")
    inks.save(tmp_path / "a.tif", icc_profile=profile)
    wanted = [[(255,) * 3, (0,) * 3, (119,) * 3]]
    assert np.allclose(rows(read_image(tmp_path / "a.tif")), wanted, atol=2)
    inks.resize((96, 32), Image.Resampling.NEAREST).save(tmp_path / "a.jpg", icc_profile=profile)
    assert abs(read_image(tmp_path / "a.jpg")[:, 16, 80].int() - 119).max() <= 3
    assert rows(read_colours(tmp_path / "a.tif"))[0][0] == (0, 255, 255)


def test_without_little_cms_a_profile_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(image_io, "HAS_LITTLE_CMS", False)
    path = png(tmp_path / "a.png", Image.new("RGB", (2, 2)), icc_profile=LINEAR)
    with pytest.raises(UserError, match=r"a\.png: has a colour profile.*LittleCMS.*pip install"):
        read_image(path)
    assert read_mask(path).unique().tolist() == [0]


def test_transforms_are_kept_and_serve_several_threads(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = png(tmp_path / "a.png", Image.fromarray(pixels), icc_profile=LINEAR)
    colour_profiles.to_srgb.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(read_image, [path] * 16))
    assert all(image.equal(read[0]) for image in read)
    assert colour_profiles.to_srgb.cache_info().currsize == 1


# --- frames -------------------------------------------------------------------------------------


def test_training_refuses_frames_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            Image.fromarray(DISC).save(f"{folder}/{number}.png")
    frames = [Image.fromarray(DISC), Image.fromarray(255 - DISC)]
    (tmp_path / "images/0.png").unlink()
    frames[0].save("images/0.gif", save_all=True, append_images=frames[1:])
    message = refused(train, "--images", "images", "--masks", "masks", "--device", "cpu")
    assert "images/0.gif: has 2 frames. Save each as a file of its own" in message


def test_predict_does_every_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (10, 20, 30)]
    for name, options in (("a.gif", {}), ("b.tif", {}), ("c.webp", {"lossless": True})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    frames[0].save(tmp_path / "d.gif")  # a still
    out = tmp_path / "out"

    def predict():
        jobs = plan([str(tmp_path)], out, ["map", "cutout"])
        done = list(predictor("cpu").run(jobs))
        assert not [picture.error for picture in done if picture.error]
        return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))

    kinds = [f"00000{n}{kind}.png" for n in (1, 2, 3) for kind in ("", "_cutout")]
    expected = [f"{stem}/{name}" for stem in "abc" for name in kinds]
    assert predict() == sorted([*expected, "d.png", "d_cutout.png"])
    for stem in "abc":
        maps = [Image.open(out / stem / f"00000{n}.png").getextrema() for n in (1, 2, 3)]
        assert maps == [(10, 10), (20, 20), (30, 30)], stem
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:2])
    assert "a/000003.png" not in predict()  # nothing is left of what was longer
    with pytest.raises(UserError, match=r"its frames need a trimap each"):
        plan([str(tmp_path / "a.gif")], out, ["map"], {"trimap": str(tmp_path / "d.gif")})


def test_a_file_whose_later_frames_are_damaged_gives_those_before(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    first, *others = map(Image.fromarray, noise)
    path = tmp_path / "a.gif"
    first.save(path, save_all=True, append_images=others)
    path.write_bytes(path.read_bytes()[:-500])
    done = list(predictor("cpu").run(plan([str(path)], tmp_path / "out", ["map"])))
    assert [bool(picture.error) for picture in done] == [False, False, True]
    assert "a.gif: damaged or truncated" in done[2].error
