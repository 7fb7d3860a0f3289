"""Trimaps, crops, composites and the three sources of matting data, on real files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from my_dataset import ShapesDataset
from tasks.matting.data import (
    CompositionDataset,
    check_matting_files,
    composition_pairs,
    matting_pairs,
)
from tasks.matting.trimaps import read_trimap
from train_utils import shapes
from train_utils.datasets import fingerprint, pairs_of
from train_utils.errors import UserError
from train_utils.image_io import read_image, read_mask
from train_utils.pairing import Names
from transforms import MattingEval, MattingTrain, composite, cover, make_trimap, matting_input


def row(*codes: int) -> torch.Tensor:
    """An alpha of one row, uint8 [1, 1, W]."""
    return torch.tensor(codes, dtype=torch.uint8)[None, None]


def disc(size: int = 64, radius: int = 20) -> torch.Tensor:
    """A disc with a grey rim, uint8 [1, size, size]."""
    y, x = torch.meshgrid(*[torch.arange(size) - size // 2] * 2, indexing="ij")
    distance = (x**2 + y**2).float().sqrt()
    return ((radius - distance) / 6 * 255).clamp(0, 255).byte()[None]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --- trimaps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("erode", "dilate", "expected"),
    [
        (0, 0, (0, 0, 0, 128, 255, 255, 255, 255, 255, 255)),
        (1, 0, (0, 0, 0, 128, 128, 255, 255, 255, 255, 255)),
        (3, 2, (0, 128, 128, 128, 128, 128, 128, 255, 255, 255)),
        (9, 9, (128,) * 10),
    ],
)
def test_trimap_by_hand(erode, dilate, expected):
    # The right border ends the picture, not the object: nothing erodes from there.
    alpha = row(0, 0, 0, 7, 255, 255, 255, 255, 255, 255)
    assert make_trimap(alpha, erode, dilate).flatten().tolist() == list(expected)
    assert make_trimap(alpha.mT, erode, dilate).flatten().tolist() == list(expected)


@pytest.mark.parametrize(("erode", "dilate"), [(1, 1), (2, 5), (7, 3), (40, 16)])
def test_trimap_is_that_of_a_square_element(erode, dilate):
    alpha = noise(1, 23, 31).float().sub(200).mul(8).clamp(0, 255).byte()
    alpha[:, 5:20, 5:25] = 255
    alpha[:, 12:, 16:] = 0

    def pooled(mask, radius):
        return torch.nn.functional.max_pool2d(mask.float(), 2 * radius + 1, 1, radius) > 0

    near, opaque = pooled(alpha > 0, dilate), ~pooled(alpha < 255, erode)
    expected = torch.where(opaque, 255, torch.where(near, 128, 0))
    assert torch.equal(make_trimap(alpha, erode, dilate), expected.byte())


def test_trimap_of_a_plain_alpha_has_nothing_unknown():
    assert make_trimap(row(0, 0, 0), 2, 2).tolist() == row(0, 0, 0).tolist()
    assert make_trimap(row(255, 255, 255), 2, 2).tolist() == row(255, 255, 255).tolist()


def test_trimap_of_real_alphas_holds_their_fractions(shared_data):
    for path in sorted((shared_data / "matting" / "alpha").iterdir())[:3]:
        alpha = read_mask(path).as_subclass(torch.Tensor)
        trimap = make_trimap(alpha, 10, 10)
        assert set(trimap.unique().tolist()) == {0, 128, 255}
        assert (alpha[trimap == 255] == 255).all()
        assert (alpha[trimap == 0] == 0).all()


# --- composites ----------------------------------------------------------------------------------


def test_composite_by_hand():
    foreground, background = row(200, 200, 200, 3), row(100, 100, 100, 0)
    # 51/255 = 1/5: 120; 128·3/255 = 1.506, rounded to 2
    assert composite(foreground, background, row(255, 0, 51, 128)).tolist() == [
        [[200, 100, 120, 2]]
    ]


def test_composite_is_that_of_the_scenes():
    scene = shapes.render_scene(3, 5, 48)
    assert torch.equal(composite(scene.foreground, scene.background, scene.alpha), scene.image)


def test_a_large_background_is_cut():
    image = torch.arange(5 * 8, dtype=torch.uint8).reshape(1, 5, 8)
    assert torch.equal(cover(image, (3, 4)), image[:, 1:4, 2:6])
    assert torch.equal(cover(image, (3, 4), (0, 0)), image[:, :3, :4])
    assert torch.equal(cover(image, (3, 4), (1, 1)), image[:, 2:, 4:])
    assert torch.equal(cover(image, (5, 8), (0.9, 0.1)), image)


def test_a_small_background_is_enlarged_with_its_aspect_ratio():
    image = torch.zeros(1, 4, 4, dtype=torch.uint8)
    image[..., 2:] = 200
    # To 12×12, of which 6 rows are taken: black to the left of column 6, save for the blending.
    covering = cover(image, (6, 12))
    assert covering.shape == (1, 6, 12)
    assert (covering[..., :5] == 0).all()
    assert (covering[..., 7:] == 200).all()
    for size in [(1, 9), (7, 5), (13, 4)]:
        assert cover(noise(3, 5, 6), size).shape == (3, *size)


# --- transforms ----------------------------------------------------------------------------------

PLAIN = {"hflip": 0.0, "jitter": (0.0, 0.0, 0.0, 0.0)}


def test_training_items_are_exact_composites():
    transform = MattingTrain(image_size=32, crop_sizes=(24, 48), max_radius=4)
    torch.manual_seed(0)
    for _ in range(10):
        parts = noise(3, 64, 64), disc(), noise(3, 64, 64, seed=1)
        inputs, target, foreground, background = transform(*parts)
        assert inputs.shape == (4, 32, 32)
        assert target.shape == (2, 32, 32)
        assert {x.dtype for x in (inputs, target, foreground, background)} == {torch.uint8}
        assert torch.equal(inputs[:3], composite(foreground, background, target[:1]))
        assert torch.equal(inputs[3], target[1])
        assert (target[0][target[1] == 255] == 255).all()
        assert (target[0][target[1] == 0] == 0).all()


def test_ready_images_give_no_parts():
    alpha = disc()
    transform = MattingTrain(image_size=16, crop_sizes=(16,), max_radius=3, **PLAIN)
    torch.manual_seed(0)
    inputs, target = transform(alpha.expand(3, -1, -1), alpha)
    assert torch.equal(inputs[1], target[0])  # image and alpha are cut at the same place
    assert torch.equal(inputs[3], target[1])


def test_crops_centre_on_unknown_pixels():
    alpha = torch.zeros(1, 50, 60, dtype=torch.uint8)
    alpha[0, 31, 17] = 90
    transform = MattingTrain(image_size=9, crop_sizes=(9,), max_radius=1, **PLAIN)
    torch.manual_seed(0)
    places = set()
    for _ in range(100):
        target = transform(noise(3, 50, 60), alpha)[1]
        places.add(divmod(int(target[0].argmax()), 9))
    # The unknown pixels are the nine around the grey one, which lies as far from the centre.
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


@pytest.mark.parametrize("code", [0, 255])
def test_an_alpha_without_unknown_pixels_is_cut_anywhere(code):
    alpha = torch.full((1, 40, 40), code, dtype=torch.uint8)
    position = torch.arange(1600).reshape(1, 40, 40)
    image = torch.cat([position % 256, position // 256, position * 0]).byte()
    transform = MattingTrain(image_size=1, crop_sizes=(1,), max_radius=2, **PLAIN)
    torch.manual_seed(0)
    cuts = [transform(image, alpha) for _ in range(200)]
    assert {int(target[1]) for _, target in cuts} == {code}
    seen = {int(inputs[0]) + 256 * int(inputs[1]) for inputs, _ in cuts}
    assert len(seen) > 150
    assert min(seen) < 160
    assert max(seen) > 1440


def test_a_crop_mirrors_a_picture_that_is_smaller():
    alpha = row(0, 0, 128)
    transform = MattingTrain(image_size=15, crop_sizes=(15,), max_radius=1, **PLAIN)
    torch.manual_seed(1)
    inputs, target = transform(alpha.expand(3, -1, -1), alpha)
    doubled = [0, 0, 128, 128, 0, 0] * 4
    line = target[0, 0].tolist()
    assert line in [doubled[start : start + 15] for start in range(6)]
    assert torch.equal(target[0], target[0, :1].expand(15, -1))
    assert torch.equal(inputs[:3], target[:1].expand(3, -1, -1))


def test_flip_turns_everything_alike():
    parts = noise(3, 64, 64), disc() // 2 + noise(1, 64, 64, seed=4) // 2, noise(3, 64, 64, seed=1)
    options = {"image_size": 20, "crop_sizes": (20,), "max_radius": 3}
    cuts = []
    for hflip in (0.0, 1.0):
        torch.manual_seed(5)
        cuts.append(MattingTrain(**options, hflip=hflip, jitter=(0.1, 0, 0, 0))(*parts))
    for plain, flipped in zip(*cuts, strict=True):
        assert torch.equal(plain.flip(-1), flipped)


@pytest.mark.parametrize("kind", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_colours_of_both_parts_change_alike(kind):
    grey_free = noise(3, 16, 16)
    jitter = [0.0] * 4
    jitter[kind] = 0.4
    transform = MattingTrain(image_size=16, crop_sizes=(16,), max_radius=1, hflip=0, jitter=jitter)
    torch.manual_seed(2)
    alpha = torch.full((1, 16, 16), 128, dtype=torch.uint8)
    results = [transform(grey_free, alpha, grey_free) for _ in range(5)]
    assert all(torch.equal(item[2], item[3]) for item in results)
    assert len({item[2].float().std(0).mean().item() for item in results}) == 5


def test_all_sizes_and_radii_occur():
    alpha = torch.zeros(1, 99, 99, dtype=torch.uint8)
    alpha[0, 49, 49] = 90
    transform = MattingTrain(image_size=99, crop_sizes=(99,), max_radius=3, **PLAIN)
    torch.manual_seed(0)
    dilations = {int((transform(noise(3, 99, 99), alpha)[1][1] == 128).sum()) for _ in range(60)}
    # Squares of 3, 5 and 7 pixels, some of them mirrored as they lie near the border: never fewer.
    assert {9, 25, 49} <= dilations
    image = torch.arange(400, dtype=torch.uint8).expand(3, 400, -1)[:, :200, :200]
    transform = MattingTrain(image_size=8, crop_sizes=(8, 80), max_radius=1, **PLAIN)
    slopes = {
        int(inputs[0, 0].int().diff().abs().max() > 5)
        for inputs, _ in (transform(image, torch.zeros_like(image[:1])) for _ in range(30))
    }
    assert slopes == {0, 1}


def test_every_call_draws_as_much():
    states = []
    for alpha in (disc(), torch.zeros(1, 64, 64, dtype=torch.uint8)):
        for background in (None, noise(3, 64, 64)):
            torch.manual_seed(0)
            MattingTrain(16, (16, 32), 4)(noise(3, 64, 64), alpha, background)
            states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize("eval_size", [None, 70, 200])
def test_whole_images_stay_as_they_are(eval_size):
    image, trimap = noise(3, 50, 70), make_trimap(noise(1, 50, 70), 1, 1)
    assert torch.equal(matting_input(image, trimap, eval_size), torch.cat([image, trimap]))


@pytest.mark.parametrize(
    ("size", "eval_size", "expected"),
    [((60, 90), 30, (20, 30)), ((90, 61), 30, (30, 20)), ((300, 1), 30, (30, 1))],
)
def test_large_images_are_scaled_down(size, eval_size, expected):
    trimap = make_trimap(noise(1, *size), 0, 0)
    inputs = matting_input(noise(3, *size), trimap, eval_size)
    assert inputs.shape == (4, *expected)
    assert set(inputs[3].unique().tolist()) <= {0, 128, 255}


def test_nearest_neighbour_takes_the_middle():
    trimap = row(0, 128, 255, 0, 0, 128)
    assert matting_input(trimap.expand(3, -1, -1), trimap, 2)[3].tolist() == [[128, 0]]


def test_evaluation_scores_at_the_files_size():
    alpha = disc(80, 30)
    inputs, target = MattingEval(40, radius=5)(noise(3, 80, 80), alpha)
    assert inputs.shape == (4, 40, 40)
    assert torch.equal(target, torch.cat([alpha, make_trimap(alpha, 5, 5)]))
    given = torch.where(alpha > 100, 128, 0).byte()
    inputs, target = MattingEval()(noise(3, 80, 80), torch.cat([alpha, given]))
    assert torch.equal(target, torch.cat([alpha, given]))
    assert torch.equal(inputs, torch.cat([noise(3, 80, 80), given]))


# --- embedded scenes -----------------------------------------------------------------------------


PARTS = "foreground", "alpha", "background"


def test_scenes_come_as_parts():
    dataset = ShapesDataset(40, seed=2, count=3, first=7, fields=PARTS)
    scene = shapes.render_scene(2, 8, 40, familiar=True)
    for _ in range(2):  # drawn, then kept
        parts = dataset[1]
        assert len(parts) == 3
        for part, truth in zip(
            parts, (scene.foreground, scene.alpha, scene.background), strict=True
        ):
            assert torch.equal(part, truth)
            part.zero_()  # what is kept must not change
    assert dataset.name(1) == "scene 8 (seed 2)"
    assert pairs_of(dataset) == []
    evaluated = ShapesDataset(40, 2, 3, 7, MattingEval(radius=2), PARTS)[1]
    assert torch.equal(evaluated[0][:3], scene.image)


# --- foregrounds and backgrounds -----------------------------------------------------------------


def write(path: Path, size=(8, 6), value=0, mode="L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path, Path]:
    """Foregrounds a … d, their alphas, and backgrounds of grey values 1 … 5."""
    for value, stem in enumerate("abcd"):
        write(tmp_path / "fg" / f"{stem}.png", value=(100 + value,) * 3, mode="RGB")
        write(tmp_path / "alpha" / f"{stem}.png", value=50 * value + 51)
    for value in range(1, 6):
        write(tmp_path / "bg" / f"{value}.png", (9, 9), (value,) * 3, "RGB")
    return tmp_path / "fg", tmp_path / "alpha", tmp_path / "bg"


def settings(folders, **values) -> SimpleNamespace:
    counts = {"per_foreground": 6, "val_per_foreground": 3, "val_fraction": 0.25, "seed": 0}
    defaults = {**counts, "names": (Names(), Names()), "mask_channel": None}
    return SimpleNamespace(composed_folders=lambda: folders, **(defaults | values))


def test_another_background_makes_other_data(folders):
    before = fingerprint(CompositionDataset(*folders))
    write(folders[2] / "6.png", (9, 9), (6,) * 3, "RGB")
    assert fingerprint(CompositionDataset(*folders)) != before


def test_each_foreground_lies_on_several_backgrounds(folders):
    dataset = CompositionDataset(*folders, per_foreground=6)
    assert len(dataset) == len(dataset.pairs) == len(dataset.stems) == 24
    assert dataset.stems[5:7] == ["a", "b"]
    assert dataset.pairs[6] == (folders[0] / "b.png", folders[1] / "b.png")
    assert dataset.name(7) == f"{folders[0] / 'b.png'} (composite 2)"
    torch.manual_seed(0)
    seen = set()
    for index in range(6, 12):
        foreground, alpha, background = dataset[index]
        assert (foreground == 101).all()
        assert (alpha == 101).all()
        assert background.shape == foreground.shape == (3, 6, 8)
        seen.add(int(background[0, 0, 0]))
    assert len(seen) > 2
    torch.manual_seed(0)
    assert {int(dataset[index][2][0, 0, 0]) for index in range(6, 12)} == seen


def test_validation_composites_are_fixed_by_names(folders):
    def values(root=folders):
        dataset = CompositionDataset(*root, per_foreground=6, train=False)
        return [int(dataset[index][2][0, 0, 0]) for index in range(len(dataset))]

    torch.manual_seed(0)
    before = values()
    torch.manual_seed(1)
    assert values() == before
    for start in range(0, 24, 6):  # each of the five once, and then the first one again
        assert sorted(before[start : start + 5]) == [1, 2, 3, 4, 5]
        assert before[start + 5] == before[start]
    assert len({tuple(before[start : start + 5]) for start in range(0, 24, 6)}) > 1
    name = CompositionDataset(*folders, 6, train=False).name(0)
    assert name == f"{folders[0] / 'a.png'} on {folders[2] / f'{before[0]}.png'}"
    moved = folders[0].parent.rename(folders[0].parent.with_name("moved"))
    assert values((moved / "fg", moved / "alpha", moved / "bg")) == before


def test_the_split_goes_by_foreground(folders):
    data = settings(folders)
    train, val = composition_pairs(data, train=True), composition_pairs(data, train=False)
    assert (len(train), len(val)) == (3 * 6, 1 * 3)

    def stems(part):
        return {part.dataset.stems[index] for index in part.indices}

    assert len(stems(train)) == 3
    assert stems(train) | stems(val) == set("abcd")
    assert len(composition_pairs(data, train=False, all_pairs=True)) == 4 * 3


def test_one_foreground_cannot_be_split(folders):
    for stem in "bcd":
        (folders[0] / f"{stem}.png").unlink()
    with pytest.raises(UserError, match=r"a\.png: one foreground cannot be split .* Add fore"):
        composition_pairs(settings(folders), train=True)
    everything = composition_pairs(settings(folders), train=False, all_pairs=True)
    assert len(everything) == 3


def test_a_foregrounds_own_transparency_is_ignored(folders):
    colours = np.full((6, 8, 4), 60, dtype=np.uint8)
    colours[..., 3] = np.arange(8) * 30
    Image.fromarray(colours, "RGBA").save(folders[0] / "a.png")
    foreground, alpha, _ = CompositionDataset(*folders)[0]
    assert (foreground == 60).all()
    assert (alpha == 51).all()


def test_a_background_folder_without_images_is_refused(folders, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: holds no images"):
        CompositionDataset(*folders[:2], tmp_path / "none")
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        CompositionDataset(*folders[:2], tmp_path / "nowhere")


def test_missing_alphas_are_listed(folders):
    (folders[1] / "b.png").unlink()
    with pytest.raises(UserError, match=r"alpha: no mask for 1 of the 4 images in .*fg: b\.png"):
        CompositionDataset(*folders)


def test_an_alpha_of_another_size_is_named(folders):
    write(folders[1] / "c.png", (8, 7))
    dataset = CompositionDataset(*folders, per_foreground=3)
    with pytest.raises(UserError, match=r"c\.png: 8×6 pixels, but .*c\.png has 8×7"):
        dataset[6]
    with pytest.raises(UserError) as caught:
        check_matting_files(Subset(dataset, range(len(dataset))))
    assert str(caught.value).count("c.png: 8×6") == 1  # not once for each composite


def test_backgrounds_too_narrow_to_cover_are_refused(folders):
    # 1 pixel high, on a foreground of 3000: enlarged to 3000 × 15,000,000 pixels.
    foregrounds, alphas, backgrounds = folders
    Image.new("RGB", (5, 3000)).save(foregrounds / "tall.png")
    Image.new("L", (5, 3000)).save(alphas / "tall.png")
    Image.new("RGB", (5000, 1)).save(backgrounds / "line.png")
    dataset = CompositionDataset(foregrounds, alphas, backgrounds)
    with pytest.raises(UserError, match=r"line\.png: 5000×1 pixels, .* enlarged 3000 times"):
        check_matting_files(dataset)
    (backgrounds / "line.png").unlink()
    check_matting_files(dataset := CompositionDataset(foregrounds, alphas, backgrounds))
    assert dataset[0][2].shape == dataset[0][0].shape


def test_damaged_backgrounds_are_found_at_once(folders):
    check_matting_files(CompositionDataset(*folders))
    for value in (2, 4):
        (folders[2] / f"{value}.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"2\.png: .*; .*4\.png: "):
        check_matting_files(CompositionDataset(*folders))


# --- ready images --------------------------------------------------------------------------------


def ready(images, masks, **values) -> SimpleNamespace:
    keys = "val_images", "val_masks", "trimaps", "val_trimaps", "list", "val_list", "mask_channel"
    defaults = {**dict.fromkeys(keys), "names": (Names(), Names())}
    return SimpleNamespace(
        images=images, masks=masks, val_fraction=0.25, seed=0, **(defaults | values)
    )


@pytest.fixture
def trimaps(folders) -> Path:
    for stem in "abcd":
        write(folders[0].parent / "trimaps" / f"{stem}.png", value=128)
    return folders[0].parent / "trimaps"


def test_trimaps_belong_to_the_held_out_images(folders, trimaps):
    data = ready(*folders[:2], trimaps=trimaps)
    train, val = matting_pairs(data, train=True), matting_pairs(data, train=False)
    assert (len(train), len(val)) == (3, 1)
    assert train[0][1].shape == (1, 6, 8)
    image, target = val[0]
    assert image.shape == (3, 6, 8)
    assert target.shape == (2, 6, 8)
    assert (target[1] == 128).all()
    assert len(matting_pairs(data, train=False, all_pairs=True)) == 4
    assert matting_pairs(ready(*folders[:2]), train=False)[0][1].shape == (1, 6, 8)


def test_validation_folders_have_trimaps_of_their_own(folders, trimaps):
    values = {"val_images": folders[0], "val_masks": folders[1], "val_trimaps": trimaps}
    data = ready(*folders[:2], **values)
    assert len(matting_pairs(data, train=True)) == len(matting_pairs(data, train=False)) == 4
    assert matting_pairs(data, train=False)[3][1].shape == (2, 6, 8)


def test_missing_trimaps_are_listed(folders, trimaps):
    for stem in "bd":
        (trimaps / f"{stem}.png").unlink()
    data = ready(*folders[:2], trimaps=trimaps)
    with pytest.raises(UserError, match=r"trimaps: no trimap for 2 of the 4 .*: b\.png, d\.png"):
        matting_pairs(data, train=False, all_pairs=True)


def test_trimaps_are_checked_whole(folders, trimaps):
    data = ready(*folders[:2], trimaps=trimaps)
    dataset = matting_pairs(data, train=False, all_pairs=True)
    check_matting_files(dataset)
    write(trimaps / "b.png", (6, 8), 128)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(trimaps / "d.png")
    with pytest.raises(UserError, match=r"b\.png: 8×6 .* 6×8.*; .*d\.png: a trimap has 0, 255 and"):
        check_matting_files(dataset)


def test_real_images_with_their_trimaps(shared_data):
    root = shared_data / "matting"
    data = ready(root / "image", root / "alpha", trimaps=root / "trimap")
    dataset = matting_pairs(data, False, MattingEval(eval_size=200), all_pairs=True)
    assert len(dataset) == 8
    check_matting_files(dataset)
    inputs, target = dataset[1]
    path = root / "image" / "GT08.png"
    assert target.shape == (2, *read_image(path).shape[-2:]) == (2, 800, 647)
    assert inputs.shape == (4, 200, 162)
    assert torch.equal(target[1:], read_trimap(root / "trimap" / "GT08.png"))
    train = matting_pairs(data, True, MattingTrain(crop_sizes=(320,)))
    torch.manual_seed(0)
    inputs, target = train[0]
    assert inputs.shape == (4, 320, 320)
    assert set(target[1].unique().tolist()) <= {0, 128, 255}
    assert target[1, 160, 160] == 128  # the middle of the crop, not resized


def test_cut_outs_are_foregrounds_and_alphas(folders, tmp_path):
    """One folder for both, also by another name: alpha channels are alphas, or it is refused."""
    for number in range(2):
        picture = Image.new("RGBA", (6, 4), (10 * number, 200, 30, 0))
        picture.putpixel((2, 1), (10 * number, 200, 30, 99))
        Path(tmp_path / "cut").mkdir(exist_ok=True)
        picture.save(tmp_path / "cut" / f"{number}.png")
    data = settings((tmp_path / "cut", tmp_path / "bg" / ".." / "cut", folders[2]))
    dataset = composition_pairs(data, train=False, all_pairs=True)
    foreground, alpha, _ = dataset[0]
    assert foreground[:, 0, 0].tolist() == [0, 200, 30]
    assert alpha.sum() == alpha[0, 1, 2] == 99
    check_matting_files(dataset)
    Image.new("RGB", (6, 4)).save(tmp_path / "cut" / "opaque.png")
    dataset = composition_pairs(data, train=False, all_pairs=True)
    with pytest.raises(UserError, match=r"opaque\.png.*alpha"):
        dataset[len(dataset) - 1]
