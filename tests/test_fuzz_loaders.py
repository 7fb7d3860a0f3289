"""Random files through every loader: exactly the right answer, or a UserError that names the file.

Intact images are compared with expectations computed here from the pixels that were saved. Damaged
ones must give pixels of the right kind or be refused; only of PNG, the one format with checksums,
can it be asked that the pixels are those that were saved.
"""

import io
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from test_image_io import UPRIGHT, within
from test_odd_files import LINEAR
from torchvision import tv_tensors

import tasks
from tasks.matting.data import read_foreground
from tasks.matting.trimaps import read_trimap
from tasks.segmentation.label_maps import LabelReader, read_label_file
from train_utils import image_io
from train_utils.config import build, load_yaml, to_dict
from train_utils.data import collate
from train_utils.errors import UserError
from train_utils.image_io import MaskReader, image_size, read_image, read_mask
from train_utils.prepare_data import verify_files

REPO = Path(__file__).resolve().parents[1]
FIXTURES_STAY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def examples(count: int) -> settings:
    """The same examples in every run: a failure is a defect, not luck."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=FIXTURES_STAY
    )


# --- intact images -------------------------------------------------------------------------------

BANDS = {"1": 1, "L": 1, "I;16": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
MODES = {
    "PNG": ("1", "L", "I;16", "P", "LA", "RGB", "RGBA"),
    "TIFF": ("1", "L", "I;16", "P", "LA", "RGB", "RGBA", "CMYK"),
    "BMP": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
}
KINDS = [(file_format, mode) for file_format, modes in MODES.items() for mode in modes]
COLOUR = ("LA", "RGB", "RGBA", "CMYK")
OPTIONS = {"WEBP": {"lossless": True, "exact": True}}


class Picture:
    """Pixels as they are stored, [H, W] or [H, W, bands], and a file of them."""

    def __init__(self, path: Path, kind: tuple[str, str], size, high: int, seed: int, turn: int):
        self.path, (file_format, self.mode) = path, kind
        rng = np.random.default_rng(seed)
        shape = (*size, BANDS[self.mode]) if BANDS[self.mode] > 1 else size
        wide = self.mode == "I;16"
        self.stored = rng.integers(0, high + 1, shape, dtype=np.uint16 if wide else np.uint8)
        if self.mode in ("LA", "RGBA") and high % 2:  # as of half of all files
            self.stored[..., -1] = 255
        if self.mode == "1":
            self.stored = self.stored % 2
            image = Image.fromarray(self.stored.astype(bool))
        else:
            image = Image.fromarray(self.stored, None if wide else self.mode)
        if self.mode == "P":
            greys = np.repeat(rng.integers(0, 256, (256, 1)), 3, axis=1)
            self.palette = greys if high % 2 else rng.integers(0, 256, (256, 3))
            image.putpalette(self.palette.astype(np.uint8).tobytes())
        options = OPTIONS.get(file_format, {})
        if file_format != "BMP" and turn != 1:
            exif = Image.Exif()
            exif[0x0112] = turn
            options = {**options, "exif": exif}
            self.stored = UPRIGHT[turn](self.stored)
        image.save(path, file_format, **options)

    def colours(self, backdrop: int) -> np.ndarray:
        """[H, W, 3] in real numbers, transparency over a plain backdrop."""
        pixels = self.stored.astype(np.float64)
        if self.mode == "P":
            return self.palette[self.stored].astype(np.float64)
        if self.mode == "CMYK":
            return (255 - pixels[..., :3]) * (255 - pixels[..., 3:]) / 255
        if self.mode in ("LA", "RGBA"):
            alpha = pixels[..., -1:] / 255
            pixels = pixels[..., :-1] * alpha + backdrop * (1 - alpha)
            return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        scale = {"1": 255, "I;16": 255 / 65535}.get(self.mode, 1)
        return (pixels if self.mode == "RGB" else pixels[..., None].repeat(3, axis=2)) * scale


@st.composite
def pictures(draw, folder: Path) -> Picture:
    kind = draw(st.sampled_from(KINDS))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    high = draw(st.sampled_from([1, 2, 254, 255, *([256, 65535] if kind[1] == "I;16" else [])]))
    suffix = draw(st.sampled_from([".png", ".jpg", ".TIF", ""]))  # which says nothing
    seed, turn = draw(st.integers(0, 2**32)), draw(st.integers(1, 8))
    return Picture(folder / f"picture{suffix}", kind, size, high, seed, turn)


def refused(read, path: Path) -> bool:
    try:
        read(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        return True
    return False


def would_be_black(picture: Picture) -> bool:
    return picture.mode == "I;16" and 1 < picture.stored.max() <= 255


@examples(350)
@given(data=st.data())
def test_intact_images_and_masks_are_exact(tmp_path, data):
    picture = data.draw(pictures(tmp_path))
    path = picture.path
    with warnings.catch_warnings(), within(20):
        warnings.simplefilter("error")
        if would_be_black(picture):
            assert refused(read_image, path) and refused(read_mask, path)
            return
        image, mask = read_image(path), MaskReader("luminance")(path)
        foreground = read_foreground(path)
        by_the_rule = None if refused(read_mask, path) else read_mask(path)
    assert isinstance(image, tv_tensors.Image) and isinstance(mask, tv_tensors.Mask)
    assert image.dtype == mask.dtype == torch.uint8
    height, width = picture.stored.shape[:2]
    assert image_size(path) == (width, height)

    # Blending rounds twice; all else rounds once or, but for 16 bits, not at all.
    exact = picture.mode in ("1", "L", "P", "RGB")
    tolerance = 0 if exact else 0.5 if picture.mode == "I;16" else 1
    colours = picture.colours(255)
    assert np.abs(image.permute(1, 2, 0).numpy() - colours).max() <= tolerance
    if picture.mode in ("LA", "RGBA"):
        assert (foreground.permute(1, 2, 0).numpy() == picture.stored[..., :-1]).all()
    else:
        assert torch.equal(foreground, image)

    assert mask.shape == (1, height, width)
    levels, tolerance = mask_levels(picture)
    if picture.mode not in COLOUR or not 0.4 < levels.max() < 2.6:  # not sure to round to 1 or not
        assert np.abs(mask[0].numpy() - levels).max() <= tolerance
    if picture.mode not in ("LA", "RGBA") or (alpha := picture.stored[..., -1]).min() == 255:
        assert by_the_rule.equal(mask)
    elif by_the_rule is not None:  # refused where the greys look like a mask, too
        assert np.array_equal(by_the_rule[0], alpha * (255 if alpha.max() == 1 else 1))


def mask_levels(picture: Picture) -> tuple[np.ndarray, float]:
    """The grey levels that a mask has, and by how much rounding may change them."""
    stored = picture.stored
    if picture.mode in COLOUR:
        return picture.colours(0) @ (0.299, 0.587, 0.114), 1 if picture.mode == "RGB" else 2
    if picture.mode == "P":
        colours = picture.palette[stored]
        if (colours != colours[..., :1]).any():
            return 255 * (stored > 0), 0
        stored = colours[..., 0]
    if stored.max() == 1:
        return 255 * stored, 0
    return (stored / 257, 0.5) if picture.mode == "I;16" else (stored, 0)


@examples(150)
@given(data=st.data())
def test_intact_label_files_give_what_they_store_or_name_the_file(tmp_path, data):
    picture = data.draw(pictures(tmp_path))
    stored, path = picture.stored, picture.path
    alpha = picture.mode in ("LA", "RGBA")
    if picture.mode == "CMYK" or stored.max() > 255 or (alpha and (stored[..., -1] != 255).any()):
        assert refused(read_label_file, path)
        return
    labels = read_label_file(path)
    expected = stored[..., :-1].squeeze(-1) if picture.mode == "LA" else stored
    expected = expected[..., :3] if picture.mode == "RGBA" else expected
    assert labels.dtype == np.uint8 and np.array_equal(labels, expected)

    classes = data.draw(st.sampled_from([2, 3, 128]))
    reader = LabelReader(classes)
    coloured = labels.ndim == 3 and (labels != labels[..., :1]).any()
    if coloured or ((labels >= classes) & (labels != 255)).any():
        assert refused(reader, path)
    else:
        indices = labels[..., 0] if labels.ndim == 3 else labels
        assert np.array_equal(reader(path)[0].numpy(), indices)


@examples(120)
@given(
    mode=st.sampled_from(["L", "RGB", "P", "I;16", "LA"]),
    levels=st.lists(st.sampled_from([0, 255, 128, 127, 64, 192, 63, 193, 1, 254]), min_size=1),
    suffix=st.sampled_from([".png", ".tif"]),
)
def test_intact_trimaps_have_three_levels_or_are_refused(tmp_path, mode, levels, suffix):
    grey, path = np.array([levels], dtype=np.uint8), tmp_path / f"trimap{suffix}"
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "P":  # indices that run against the levels
        image = Image.fromarray(255 - grey, "P")
        image.putpalette(bytes(255 - index for index in range(256) for _ in range(3)))
    else:
        image = Image.fromarray(grey).convert(mode)
    image.save(path)
    between = set(levels) - {0, 255}
    if len(between) > 1 or any(not 64 <= level <= 192 for level in between):
        assert refused(read_trimap, path)
    else:
        expected = np.select([grey == 0, grey == 255], [0, 255], 128)
        assert np.array_equal(read_trimap(path)[0].numpy(), expected)


# --- damaged images ------------------------------------------------------------------------------


def encoded() -> list[tuple[str, bytes]]:
    """Small files of every format, among them animations and the kinds that are refused."""
    rng = np.random.default_rng(5)
    rgb = Image.fromarray(rng.integers(0, 256, (11, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    described = PngImagePlugin.PngInfo()
    described.add_text("Comment", "a text " * 9, zip=True)
    kinds = [
        (rgb, "PNG", {"exif": exif}),
        (rgb.convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(rng.integers(0, 65536, (9, 7), dtype=np.uint16)), "PNG", {}),
        (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgb, "JPEG", {"exif": exif}),
        (rgb.convert("CMYK"), "JPEG", {"progressive": True}),
        (rgb.convert("P"), "BMP", {}),
        (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgb, "TIFF", {"exif": exif}),
        (rgb.convert("LA"), "TIFF", {"compression": "tiff_lzw"}),
        (Image.fromarray(rng.random((5, 6), dtype=np.float32)), "TIFF", {}),
        (rgb.convert("P"), "GIF", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgb.convert("P"), "GIF", {"comment": b"a comment"}),
        (rgb, "TIFF", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        *((rgb, kind, {"icc_profile": LINEAR}) for kind in ("JPEG", "PNG", "TIFF", "WEBP")),
        (rgb.convert("L"), "PNG", {"icc_profile": LINEAR, "pnginfo": described}),
    ]
    files = []
    for image, file_format, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **options)
        files.append((file_format, buffer.getvalue()))
    return files


ENCODED = encoded()
READERS = (read_image, read_foreground, read_mask, read_trimap, read_label_file, LabelReader(3))


def damage(content: bytes, kind: str, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(content)), rng.randrange(1, 40)
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        flipped = bytearray(content)
        for _ in range(rng.randrange(1, 5)):
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == "noise":
        return content[:place] + rng.randbytes(length) + content[place + length :]
    if kind == "hole":  # blocks that a disk has lost
        return content[:place] + bytes(length) + content[place + length :]
    if kind == "missing":
        return content[:place] + content[place + length :]
    if kind == "splice":
        return content[:place] + rng.choice(ENCODED)[1][place:]
    return content[: rng.randrange(12)] + rng.randbytes(200)  # "head": random behind a signature


DAMAGES = ["cut", "flip", "flip", "noise", "hole", "missing", "splice", "head"]
NAMED = [".png", ".jpg", ".gif", ".txt"]


def try_damaged(folder: Path, number: int, kind: str, seed: int, suffix: str) -> None:
    """One of ENCODED, damaged: every reader gives pixels of the size in the header, or names it."""
    file_format, content = ENCODED[number]
    intact, path = folder / "intact", folder / f"damaged{suffix}"
    intact.write_bytes(content)
    path.write_bytes(damage(content, kind, random.Random(seed)))
    with pytest.MonkeyPatch.context() as patch, within(20):
        patch.setattr(image_io, "MAX_PIXELS", 10**6)  # a flipped bit in a width costs no gigabytes
        for read in READERS:
            try:
                result = torch.as_tensor(read(path))
            except UserError as error:
                assert str(error).startswith(f"{path}: ")
                continue
            assert result.dtype == torch.uint8 and result.numel()
            if read is not read_label_file:
                colour = read in (read_image, read_foreground)
                assert result.dim() == 3 and len(result) == (3 if colour else 1)
                assert image_size(path) == (result.shape[2], result.shape[1])
            if file_format == "PNG" and kind != "splice":
                assert torch.equal(result, torch.as_tensor(read(intact)))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it finds in damaged metadata
@examples(450)
@given(
    number=st.integers(0, len(ENCODED) - 1),
    kind=st.sampled_from(DAMAGES),
    seed=st.integers(0, 2**32),
    suffix=st.sampled_from(NAMED),
)
def test_damaged_files_are_read_or_refused(tmp_path, number, kind, seed, suffix):
    try_damaged(tmp_path, number, kind, seed, suffix)


# --- whole data sets -----------------------------------------------------------------------------

SUFFIXES = [".png", ".tif", ".bmp", ".jpg", ".webp"]
TARGETS = {
    "saliency": ({}, [("L", 255), ("L", 1), ("1", 1), ("P", 255), ("RGBA", 255)]),
    "segmentation": ({"class_names": ["a", "b"]}, [("L", 1), ("1", 1), ("P", 1), ("L", 2)]),
    "matting": ({}, [("L", 255), ("1", 1), ("LA", 255), ("I;16", 65535), ("I;16", 255)]),
    "translation": ({"load_size": 40}, [("RGB", 255), ("L", 255), ("P", 255), ("RGBA", 255)]),
}


def fill(path: Path, mode: str, high: int, size: tuple[int, int], rng: np.random.Generator) -> None:
    bands = BANDS[mode]
    dtype = np.uint16 if mode == "I;16" else np.uint8
    pixels = rng.integers(0, high + 1, (*size, bands) if bands > 1 else size, dtype=dtype)
    image = Image.fromarray(pixels > 0 if mode == "1" else pixels)
    if mode == "P":
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        image.save(path)
    except (OSError, ValueError):  # a mode that the format lacks
        image.convert("L" if mode in ("1", "LA", "I;16") else "RGB").save(path)


@pytest.mark.parametrize("name", TARGETS)
@examples(25)
@given(seed=st.integers(0, 2**32), fault=st.sampled_from(["none", "none", "size", "cut"]))
def test_folders_of_random_pairs_are_refused_or_give_batches(tmp_path, name, seed, fault):
    rng, (values, kinds) = np.random.default_rng(seed), TARGETS[name]
    folder = tmp_path / f"{fault}{seed}"
    for number in range(rng.integers(2, 5)):
        size = tuple(rng.choice([1, 2, 17, 60], 2).tolist())
        image, target = (f"{number}{rng.choice(SUFFIXES)}" for _ in range(2))
        mode = str(rng.choice(["1", "L", "I;16", "P", "LA", "RGB", "RGBA"]))
        fill(folder / "images" / image, mode, 65535 if mode == "I;16" else 255, size, rng)
        kind = kinds[rng.integers(len(kinds))]
        size = (size[0] + 1, size[1]) if (fault, number) == ("size", 0) else size
        fill(folder / "masks" / target, *kind, size, rng)
        if (fault, number) == ("cut", 0):
            path = folder / "masks" / target
            path.write_bytes(path.read_bytes()[: rng.integers(50)])
    folders = {"images": str(folder / "images"), "masks": str(folder / "masks")}
    data = {**values, **folders, "image_size": 33, "verify": True, "seed": 1}
    with warnings.catch_warnings(), within(30), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        task = tasks.read_config({"task": name, "data": data}, "test", {})
        cfg = task.cfg
        try:
            datasets = verify_files(cfg.data, *task.build_datasets())
            task.prepare_data(*datasets)
        except UserError as error:
            assert str(folder) in str(error)
            return
        assert fault == "none"
        for dataset in datasets:
            collate([dataset[index] for index in range(len(dataset))])


# --- recipes -------------------------------------------------------------------------------------

RECIPES = [path.read_text(encoding="utf-8") for path in sorted((REPO / "configs").glob("*.yaml"))]
NASTY = [
    *("", " ", "~", "[]", "{}", "- x", "&a", "*a", "<<: *a", "!!python/name:os.system ", "? ", ":"),
    *(
        ".nan",
        ".inf",
        "-.inf",
        "1e-3",
        "1e999",
        "0x_",
        "0b_",
        "1" * 400,
        "-1",
        "true",
        "010",
        "1:3",
    ),
    *(
        '"\\0"',
        '"\\ud800"',
        "'",
        '"',
        "%",
        "@",
        "\t",
        "\x00",
        "\ufeff",
        "\u2028",
        "\r",
        "---",
        "...",
    ),
    *("{data: {data: 1}}", "[[[[", "task: matting", "data: 3", "2024-01-31", "=", "0", "1", "# x"),
]


ODD_NUMBERS = [".nan", ".inf", "-.inf", "1e999", "-1", "0", "1.5"]


def mutated(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(lines))
        kind = rng.choice(
            ["drop", "double", "value", "number", "insert", "character", "indent", "splice"]
        )
        line = lines[place]
        if kind == "drop":
            lines[place : place + 1] = []
        elif kind == "double":
            lines.insert(rng.randrange(len(lines)), line)
        elif kind == "value":
            lines[place] = f"{line.partition(':')[0]}: {rng.choice(NASTY)}"
        elif kind == "number":
            lines[place] = f"{line.partition(':')[0]}: {rng.choice(ODD_NUMBERS)}"
        elif kind == "insert":
            lines.insert(place, rng.choice(["", "  "]) + rng.choice(NASTY))
        elif kind == "character" and line:
            cut = rng.randrange(len(line))
            lines[place] = line[:cut] + chr(rng.randrange(0x180)) + line[cut + 1 :]
        elif kind == "indent":
            lines[place] = " " * rng.randrange(4) + line.strip()
        elif kind == "splice":
            lines[place:] = rng.choice(RECIPES).split("\n")[place:]
        lines = lines or [""]
    return "\n".join(lines)


def numbers(values) -> list[float]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return [number for value in values for number in numbers(value)]
    return [values] if isinstance(values, float) else []


@examples(300)
@given(number=st.integers(0, len(RECIPES) - 1), seed=st.integers(0, 2**32))
def test_mutated_recipes_are_refused_or_valid(tmp_path, number, seed):
    path = tmp_path / "recipe.yaml"
    rng = random.Random(seed)
    encoding = rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
    path.write_bytes(mutated(RECIPES[number], rng).encode(encoding, "replace"))
    with within(20):
        try:
            cfg = tasks.read_config(load_yaml(path), str(path), {}).cfg
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 2000
            return
    values = to_dict(cfg)
    assert build(type(cfg), values, "again") == cfg
    assert all(abs(value) < float("inf") for value in numbers(values))


@pytest.mark.parametrize("name", tasks.task_names())
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_no_number_of_any_recipe_may_be_infinite(name, number):
    sections = to_dict(tasks.load_task(name).Config())
    keys = [
        (section, key)
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    assert ("optim", "lr") in keys
    for section, key in keys:
        with pytest.raises(
            UserError, match=rf"^recipe: {section}\.{key}: expected a finite number"
        ):
            tasks.read_config({"task": name, section: {key: number}}, "recipe", {})
