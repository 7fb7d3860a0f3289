"""Mask maps on real files of every kind, and the scan of a set of masks."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from tasks.segmentation.label_maps import LabelReader, read_label_file
from tasks.segmentation.mask_scan import MaskScan, scan_masks
from train_utils.errors import UserError

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def save(path: Path, values, mode: str = "L", **options) -> Path:
    image = Image.fromarray(np.array(values, dtype=np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image = image.convert("L")
        image.putpalette(bytes([*BLACK, *RED, *GREEN, *BLUE]) + bytes(252 * 3))
    elif mode == "1":
        image = image.point(lambda value: 255 * value).convert("1")
    image.save(path, **options)
    return path


def png_of_few_bits(path: Path, bits: int, row: bytes, width: int) -> Path:
    """A grey PNG of one row with `bits` bits per pixel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    return path


def classes(mask: torch.Tensor) -> list:
    assert isinstance(mask, tv_tensors.Mask)
    assert mask.dtype == torch.uint8
    assert mask.shape[0] == 1
    return mask[0].tolist()


# --- label files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("L", [[0, 1, 255], [7, 128, 2]]),
        ("P", [[0, 1, 2], [3, 255, 0]]),
        ("I;16", [[0, 1, 255], [7, 128, 2]]),
        ("1", [[0, 1, 1], [1, 0, 0]]),
        ("RGB", [[RED, GREEN, BLACK], [BLACK, BLUE, RED]]),
    ],
)
def test_label_files_give_what_they_store(tmp_path, mode, values):
    labels = read_label_file(save(tmp_path / "a.png", values, mode))
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[list(x) if mode == "RGB" else x for x in row] for row in values]


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x60"), (2, b"\x1b"), (4, b"\x01\x23")])
def test_few_bits_are_not_scaled(tmp_path, bits, row):
    expected = [0, 1, 1, 0] if bits == 1 else [0, 1, 2, 3]
    path = png_of_few_bits(tmp_path / "a.png", bits, row, 4)
    assert read_label_file(path).tolist() == [expected]


def test_opaque_alpha_is_dropped_and_other_alpha_refused(tmp_path):
    pixels = np.array([[[1, 2, 3, 255], [4, 5, 6, 255]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    assert read_label_file(tmp_path / "rgba.png").tolist() == [[[1, 2, 3], [4, 5, 6]]]
    Image.fromarray(pixels[..., 2:]).save(tmp_path / "la.png")
    assert read_label_file(tmp_path / "la.png").tolist() == [[3, 6]]
    pixels[0, 0, 3] = 254
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    with pytest.raises(UserError, match=r"rgba\.png: some pixels are transparent"):
        read_label_file(tmp_path / "rgba.png")


def test_label_files_that_hold_no_labels(tmp_path):
    with pytest.raises(UserError, match=r"a\.png: 16-bit labels up to 256, but"):
        read_label_file(save(tmp_path / "a.png", [[0, 256]], "I;16"))
    Image.new("CMYK", (2, 2)).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: CMYK pixels hold no labels"):
        read_label_file(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["1", "L"])
def test_tiffs_in_which_0_is_white_hold_no_labels(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.new(mode, (8, 2)).save(path)
    content, black_is_0 = path.read_bytes(), struct.pack("<HHII", 262, 3, 1, 1)
    assert content.count(black_is_0) == 1
    path.write_bytes(content.replace(black_is_0, struct.pack("<HHII", 262, 3, 1, 0)))
    with pytest.raises(UserError, match=r"a\.tif: a TIFF in which 0 is white"):
        read_label_file(path)


def test_label_files_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise
    path = save(tmp_path / "a.png", [[0, 1, 2], [3, 4, 5]], exif=exif)
    assert read_label_file(path).tolist() == [[3, 0], [4, 1], [5, 2]]


def test_damaged_label_files(tmp_path):
    path = save(tmp_path / "a.png", np.arange(240).reshape(12, 20))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.png: damaged or truncated"):
        read_label_file(path)
    with pytest.raises(UserError, match=r"b\.png: no such file"):
        read_label_file(tmp_path / "b.png")


# --- class indices ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_index(tmp_path, mode):
    path = save(tmp_path / "a.png", [[0, 1, 2], [3, 255, 0]], mode)
    assert classes(LabelReader(4)(path)) == [[0, 1, 2], [3, 255, 0]]
    assert classes(LabelReader(4, ignore_index=1)(save(tmp_path / "b.png", [[0, 1, 2]], mode))) == [
        [0, 255, 2]
    ]
    assert classes(LabelReader(2, ignore_beyond=True)(path)) == [[0, 1, 255], [255, 255, 0]]


def test_one_bit_and_grey_rgb_are_indices(tmp_path):
    assert classes(LabelReader(2)(save(tmp_path / "a.png", [[0, 1]], "1"))) == [[0, 1]]
    grey = save(tmp_path / "b.png", [[(0, 0, 0), (2, 2, 2)]], "RGB")
    assert classes(LabelReader(3)(grey)) == [[0, 2]]


def test_values_beyond_the_classes_are_refused(tmp_path):
    path = save(tmp_path / "a.png", [[0, 7, 7], [9, 255, 1]])
    with pytest.raises(UserError) as caught:
        LabelReader(4)(path)
    assert str(caught.value) == (
        f"{path}: label 7 on 2 pixels, 9 on 1 pixel, but the 4 classes are 0 to 3. If these are "
        "classes, data.class_names must name 10; if not, data.ignore_index=7 leaves out one value, "
        "and data.ignore_beyond=true all that are no classes."
    )
    with pytest.raises(UserError, match="label 9 on 1 pixel, but"):
        LabelReader(8)(path)
    with pytest.raises(UserError, match="label 9 on 1 pixel, 255 on 1 pixel, but"):
        LabelReader(8, ignore_index=None)(path)


def test_binary_and_jpeg_masks_in_index_mode_are_recognised(tmp_path):
    path = save(tmp_path / "a.png", [[0, 255]])
    fix = "binary mask: --set data.mask_values=threshold --set data.mask_object=bright"
    with pytest.raises(UserError, match=fix):
        LabelReader(2, ignore_index=None)(path)
    blurred = save(tmp_path / "a.jpg", np.kron(np.eye(9), np.full((5, 5), 255)))
    with pytest.raises(UserError, match=r"JPEG blurs labels\. If the mask has two levels: --set"):
        LabelReader(2)(blurred)


def test_colours_in_index_mode_are_refused(tmp_path):
    path = save(tmp_path / "a.png", [[RED, BLACK]], "RGB")
    with pytest.raises(UserError, match=r"a\.png: holds colours.*mask_values=colour and data\.pal"):
        LabelReader(2)(path)


def test_colour(tmp_path):
    reader = LabelReader(3, mode="colour", palette=[BLACK, GREEN, RED])
    rgb = save(tmp_path / "a.png", [[RED, GREEN], [(224, 224, 192), BLACK]], "RGB")
    assert classes(reader(rgb)) == [[2, 1], [255, 0]]
    assert classes(reader(save(tmp_path / "b.png", [[0, 1, 2]], "P"))) == [[0, 2, 1]]


def test_the_palette_may_hold_the_usual_void_colour(tmp_path):
    reader = LabelReader(2, mode="colour", palette=[BLACK, (224, 224, 192)])
    path = save(tmp_path / "a.png", [[(224, 224, 192), BLACK]], "RGB")
    assert classes(reader(path)) == [[1, 0]]


def test_unknown_colours_are_refused(tmp_path):
    path = save(tmp_path / "a.png", [[RED, RED, RED], [RED, BLUE, (1, 2, 3)], [BLUE] * 3], "RGB")
    with pytest.raises(UserError) as caught:
        LabelReader(2, mode="colour", palette=[BLACK, RED])(path)
    assert str(caught.value) == (
        f"{path}: colour (0, 0, 255) at x=1, y=1 is not in data.palette; in all, "
        "5 pixels of colours that are no class (4 pixels of this one). Add it to data.palette, or "
        "correct the mask."
    )


@pytest.mark.parametrize(
    ("object_is", "expected"), [("dark", [[1, 1, 0, 0]]), ("bright", [[0, 0, 1, 1]])]
)
def test_threshold(tmp_path, object_is, expected):
    path = save(tmp_path / "a.png", [[0, 99, 100, 255]])
    reader = LabelReader(2, mode="threshold", threshold=100, object=object_is)
    assert classes(reader(path)) == expected
    assert classes(reader(save(tmp_path / "b.png", [[0, 0, 1, 1]]))) == expected  # a 0/1 mask


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_classes": 1}, "class_names"),
        ({"num_classes": 256}, "class_names"),
        ({"class_names": ["a"]}, "class_names"),
        ({"ignore_index": 256}, "ignore_index"),
        ({"threshold": 0}, "mask_threshold"),
        ({"mode": "threshold"}, "class_names"),
        ({"mode": "colour"}, "palette"),
        ({"mode": "colour", "palette": [RED, RED, BLUE]}, "palette"),
        ({"mode": "colour", "palette": [RED, (0, 0, 256), BLUE]}, "palette"),
    ],
)
def test_settings_that_make_no_sense(settings, key):
    with pytest.raises(ValueError, match=f"^{key}: "):
        LabelReader(**{"num_classes": 3, **settings})


def test_readers_can_be_sent_to_workers(tmp_path):
    path = save(tmp_path / "a.png", [[RED, BLACK]], "RGB")
    reader = LabelReader(2, ["ground", "thing"], mode="colour", palette=[BLACK, RED])
    assert classes(pickle.loads(pickle.dumps(reader))(path)) == [[1, 0]]


# --- scan ---------------------------------------------------------------------------------------


def three_masks(folder: Path) -> list[Path]:
    """By class 0, 1, 2, 3 and ignored: 6 0 2 0 0 | 2 4 0 0 2 | 0 0 0 0 4 pixels."""
    return [
        save(folder / "a.png", [[0, 0, 0, 0], [0, 0, 2, 2]]),
        save(folder / "b.png", [[0, 0, 1, 1], [1, 1, 255, 255]]),
        save(folder / "c.png", [[255] * 4]),
    ]


def test_scan_counts(tmp_path):
    reader = LabelReader(4, ["ground", "disc", "square", "ring"])
    scan = scan_masks(three_masks(tmp_path), reader, tmp_path / "cache")
    assert (scan.files, scan.ignored, scan.ignored_files, scan.blank_files) == (3, 6, 2, 1)
    assert scan.class_counts == [8, 4, 2, 0]
    assert scan.class_files == [2, 1, 1, 0]
    assert scan.class_extent == [14, 6, 8, 0]
    assert {v: n for v, n in enumerate(scan.raw_histogram) if n} == {0: 8, 1: 4, 2: 2, 255: 6}
    assert scan.absent == ["ring"]
    assert scan.lines() == [
        "masks: 3 files, 20 pixels",
        "  0 ground        8 pixels   40.00%  in 2 files",
        "  1 disc          4 pixels   20.00%  in 1 files",
        "  2 square        2 pixels   10.00%  in 1 files",
        "  ignored (255)   6 pixels   30.00%  in 2 files",
        "  in no mask: ring",
        "  1 files hold nothing but ignored pixels",
    ]


def test_class_weights_balance_by_the_median_frequency(tmp_path):
    # freq: 8/14 = 4/7, 4/6 = 2/3, 2/8 = 1/4; their median is 4/7.
    scan = scan_masks(three_masks(tmp_path), LabelReader(4), tmp_path / "cache")
    assert scan.class_weights() == pytest.approx([1, 6 / 7, 16 / 7, 0])


def test_scan_draws_no_random_numbers(tmp_path):
    state = torch.get_rng_state()
    scan_masks(three_masks(tmp_path), LabelReader(4), tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), state)


def test_faulty_masks_are_reported_together(tmp_path):
    paths = three_masks(tmp_path)
    paths += [save(tmp_path / f"d{n:02}.png", [[0, 9]]) for n in range(11)]
    paths += [tmp_path / "missing.png"]
    with pytest.raises(UserError) as caught:
        scan_masks(paths, LabelReader(4), tmp_path / "cache")
    text = str(caught.value)
    assert text.startswith("12 of 15 masks cannot be used: ")
    assert text.count(": label 9 on 1 pixel") == 10
    assert text.endswith("; and 2 more")


def test_the_scan_is_cached_until_something_changes(tmp_path, monkeypatch):
    paths, cache = three_masks(tmp_path), tmp_path / "cache"
    reads = []
    values = LabelReader.values
    monkeypatch.setattr(
        LabelReader, "values", lambda self, path: reads.append(path) or values(self, path)
    )

    def reads_of_scan(reader: LabelReader) -> int:
        reads.clear()
        scans.append(scan_masks(paths, reader, cache))
        return len(reads)

    scans: list[MaskScan] = []
    assert reads_of_scan(LabelReader(4)) == 3
    assert reads_of_scan(LabelReader(4)) == 0
    assert scans[0].lines() == scans[1].lines()
    assert reads_of_scan(LabelReader(3)) == 3
    save(paths[0], [[0] * 5, [1] * 5])
    assert reads_of_scan(LabelReader(4)) == 3
    assert scans[-1].class_counts == [7, 9, 0, 0]


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "null", '{"files": 3}', "\udcff"])
def test_a_damaged_cache_is_ignored(tmp_path, content):
    paths, cache = three_masks(tmp_path), tmp_path / "cache"
    scan = scan_masks(paths, LabelReader(4), cache)
    (file,) = cache.iterdir()
    file.write_text(content, errors="surrogateescape")
    assert scan_masks(paths, LabelReader(4), cache).lines() == scan.lines()


def test_an_unwritable_cache_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    scan = scan_masks(three_masks(tmp_path), LabelReader(4), tmp_path / "file" / "cache")
    assert scan.files == 3


def test_the_cache_lies_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    scan_masks(three_masks(tmp_path), LabelReader(4))
    assert len(list((tmp_path / "xdg" / "pixtrain" / "mask_scans").glob("*.scan"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    scan_masks(three_masks(tmp_path), LabelReader(4))
    assert len(list((tmp_path / "home/.cache/pixtrain/mask_scans").glob("*.scan"))) == 1


def test_a_single_class_is_refused_with_a_hint(tmp_path):
    paths, cache = [save(tmp_path / "a.png", [[0, 0]])], tmp_path / "cache"
    with pytest.raises(UserError, match=r"all pixels that count are class 0 \(class 0\), so there"):
        scan_masks(paths, LabelReader(2), cache)
    assert scan_masks(paths, LabelReader(2), cache, refuse_single_class=False).files == 1
    with pytest.raises(UserError, match="all pixels of all masks are ignored"):
        scan_masks([save(tmp_path / "b.png", [[255]])], LabelReader(2), cache)


def test_binary_masks_read_as_indices_are_recognised(tmp_path):
    # 255 is ignored by default, so every file passes on its own.
    paths = [save(tmp_path / "a.png", [[0, 255]]), save(tmp_path / "b.png", [[0, 0]])]
    with pytest.raises(UserError, match=r"binary masks\. Use --set data\.mask_values=threshold"):
        scan_masks(paths, LabelReader(2), tmp_path / "cache")


def test_masks_on_one_side_of_the_threshold_are_refused(tmp_path):
    path = save(tmp_path / "a.png", [[3, 40], [40, 40]])
    reader = LabelReader(2, mode="threshold")
    with pytest.raises(UserError, match=r"\(3 to 40\) lie on one side of the threshold 128"):
        scan_masks([path], reader, tmp_path / "cache")


@pytest.mark.parametrize(("level", "near"), [(95, False), (96, True), (160, True), (161, False)])
def test_masks_without_two_levels_are_refused(tmp_path, level, near):
    path = save(tmp_path / "a.png", [[0] * 94 + [level] * 6])
    save(tmp_path / "b.png", [[255] * 10])
    paths = [path, tmp_path / "b.png"]  # 6 of 110 pixels: 5.5 %
    reader = LabelReader(2, mode="threshold", object="bright")
    if near:
        with pytest.raises(UserError, match="5% of the masks' pixels are within 32 grey levels"):
            scan_masks(paths, reader, tmp_path / "cache")
    else:
        assert sum(scan_masks(paths, reader, tmp_path / "cache").class_counts) == 110


def test_an_object_that_covers_most_is_warned_of(tmp_path):
    path = save(tmp_path / "a.png", [[0, 0, 0, 255]])
    dark, bright = (
        scan_masks([path], LabelReader(2, mode="threshold", object=side), tmp_path / "cache")
        for side in ("dark", "bright")
    )
    assert "more than half" in "\n".join(dark.lines())
    assert "data.mask_object=bright" in "\n".join(dark.lines())
    assert "more than half" not in "\n".join(bright.lines())


# --- real files ---------------------------------------------------------------------------------


def test_bag(shared_data, tmp_path):
    paths = sorted((shared_data / "bag" / "mask").glob("*.jpg"))
    reader = LabelReader(2, ["background", "bag"], mode="threshold", object="dark")
    scan = scan_masks(paths, reader, tmp_path)
    assert scan.files == scan.class_files[1] == 40
    assert scan.ignored == 0
    assert scan.class_counts[1] / sum(scan.class_counts) == pytest.approx(0.348, abs=0.001)
    assert "0.00% of the pixels are within 32 grey levels" in "\n".join(scan.lines())
    assert "warning" not in "\n".join(scan.lines())
    with pytest.raises(UserError, match=r"40 of 40 masks cannot be used.*JPEG blurs labels"):
        scan_masks(paths, LabelReader(2), tmp_path)


def test_voc(shared_data, tmp_path):
    paths = sorted((shared_data / "voc_real3" / "SegmentationClass").glob("*.png"))
    scan = scan_masks(paths, LabelReader(21), tmp_path)
    assert [c for c, count in enumerate(scan.class_counts) if count] == [0, 5, 6, 7, 9, 15, 18]
    assert scan.ignored > 0
    first = np.asarray(Image.open(paths[0]))
    assert LabelReader(21)(paths[0])[0].tolist() == first.tolist()
    with pytest.raises(UserError, match=r"2011_000003\.png: label 15 on \d+ pixels, but the 15"):
        LabelReader(15)(paths[0])


def test_voc_by_its_colours_is_voc_by_its_indices(shared_data):
    path = shared_data / "voc_real3" / "SegmentationClass" / "2011_000003.png"
    with Image.open(path) as image:
        colours = np.array(image.getpalette()[: 21 * 3]).reshape(-1, 3).tolist()
    by_colour = LabelReader(21, mode="colour", palette=colours)(path)
    assert torch.equal(by_colour, LabelReader(21)(path))
    assert (by_colour == 255).any()


def test_camvid(shared_data, tmp_path):
    paths = sorted((shared_data / "camvid" / "trainannot").glob("*.png"))
    scan = scan_masks(paths, LabelReader(11, ignore_index=11), tmp_path)
    assert sum(scan.class_counts) + scan.ignored == 20 * 360 * 480
    assert "ignored (11)" in "\n".join(scan.lines())
    # Sky, building and road are common and found in nearly all frames; poles are thin.
    weights = scan.class_weights()
    assert min(weights) > 0
    assert weights[2] > 1 > max(weights[1], weights[3])
