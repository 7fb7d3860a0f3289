"""Pairs A|B of real files: layouts, directions, refusals and the training jitter."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from my_dataset import ShapesDataset
from tasks import translation
from tasks.translation.data import (
    SideBySideDataset,
    check_translation_pairs,
    read_halves,
    translation_pairs,
)
from train_utils.errors import UserError
from transforms import TranslationEval, TranslationTrain

A_GREY, B_GREY = 40, 200


def write(path: Path, size=(6, 4), value=A_GREY) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)
    return path


def write_side_by_side(path: Path, size=(12, 4)) -> Path:
    picture = Image.new("RGB", size, (A_GREY,) * 3)
    picture.paste((B_GREY,) * 3, (size[0] // 2, 0, *size))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def write_pair(a: Path, b: Path, stem: str) -> None:
    write(a / f"{stem}.jpg", value=A_GREY)
    write(b / f"{stem}.png", value=B_GREY)


def folder_data(**values):
    return translation.DataConfig(**{"val_fraction": 0.25} | values)


def stems(dataset):
    """Stems of a dataset or of a share of one."""
    if hasattr(dataset, "indices"):
        return [dataset.dataset.stems[index] for index in dataset.indices]
    return dataset.stems


# --- side by side -------------------------------------------------------------------------------


def test_the_halves_of_a_file(tmp_path):
    a, b = read_halves(write_side_by_side(tmp_path / "x.png", (10, 3)))
    for half, grey in ((a, A_GREY), (b, B_GREY)):
        assert isinstance(half, tv_tensors.Image)
        assert half.shape == (3, 3, 5)
        assert (half == grey).all()


def test_side_by_side_files_are_found_below_the_folder(tmp_path):
    for name in ("b.png", "a.PNG", "city/a.bmp"):
        write_side_by_side(tmp_path / name)
    dataset = SideBySideDataset(tmp_path)
    assert dataset.stems == ["a", "b", "city/a"]
    assert dataset.pairs[1] == (tmp_path / "b.png", tmp_path / "b.png")
    assert dataset.name(2) == str(tmp_path / "city" / "a.bmp")
    assert len(dataset) == 3
    assert [int(image[0, 0, 0]) for image in dataset[0]] == [A_GREY, B_GREY]


def test_an_odd_width_is_refused_with_the_fix(tmp_path):
    path = write(tmp_path / "odd.png", (7, 4))
    with pytest.raises(UserError, match=r"odd\.png: 7 pixels wide.*Crop it.*--images A --masks B"):
        read_halves(path)


def test_all_bad_files_are_listed_at_once(tmp_path):
    write_side_by_side(tmp_path / "good.png")
    write(tmp_path / "odd1.png", (7, 4))
    write(tmp_path / "odd2.png", (9, 4))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        check_translation_pairs(SideBySideDataset(tmp_path))
    message = str(caught.value)
    assert all(name in message for name in ("odd1.png: 7", "odd2.png: 9", "broken.png: not an"))
    assert "good.png" not in message


def test_good_files_and_embedded_scenes_pass(tmp_path):
    write_side_by_side(tmp_path / "x.png")
    write_pair(tmp_path / "A", tmp_path / "B", "p")
    check_translation_pairs(SideBySideDataset(tmp_path))
    check_translation_pairs(ShapesDataset(16, 0, 2, fields=("image", "labels")))


# --- layouts ------------------------------------------------------------------------------------

LAYOUTS = {
    "A/train B/train": lambda root, part: (root / "A" / part, root / "B" / part),
    "train/A train/B": lambda root, part: (root / part / "A", root / part / "B"),
    "trainA trainB": lambda root, part: (root / f"{part}A", root / f"{part}B"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("held_out", ["val", "test"])
def test_two_folders_with_parts(tmp_path, layout, held_out):
    for part, names in (("train", ("t1", "t2")), (held_out, ("v",))):
        for name in names:
            write_pair(*LAYOUTS[layout](tmp_path, part), name)
    data = folder_data(root=str(tmp_path))
    train, val = translation_pairs(data, train=True), translation_pairs(data, train=False)
    assert (stems(train), stems(val)) == (["t1", "t2"], ["v"])
    a, b = val[0]
    assert abs(int(a[0, 0, 0]) - A_GREY) <= 1  # JPEG
    assert b[0, 0, 0] == B_GREY


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_side_by_side_with_parts(tmp_path, held_out):
    for name in ("train/t1.png", "train/t2.png", f"{held_out}/v.png"):
        write_side_by_side(tmp_path / name)
    data = folder_data(root=str(tmp_path))
    assert stems(translation_pairs(data, train=True)) == ["t1", "t2"]
    assert stems(translation_pairs(data, train=False)) == ["v"]


def test_val_goes_before_test(tmp_path):
    for part in ("train", "val", "test"):
        write_side_by_side(tmp_path / part / f"{part}.png")
    assert stems(translation_pairs(folder_data(root=str(tmp_path)), train=False)) == ["val"]


def test_a_validation_part_alone_can_be_scored(tmp_path):
    write_side_by_side(tmp_path / "val" / "v.png")
    assert stems(translation_pairs(folder_data(root=str(tmp_path)), train=False)) == ["v"]


@pytest.mark.parametrize("layout", ["A B", "A|B", "train only", "images masks"])
def test_without_a_validation_part_a_share_is_held_out(tmp_path, layout):
    names = [f"p{i}" for i in range(8)]
    data = folder_data(root=str(tmp_path))
    for name in names:
        if layout in ("A B", "images masks"):
            write_pair(tmp_path / "A", tmp_path / "B", name)
        else:
            folder = tmp_path / "train" if layout == "train only" else tmp_path
            write_side_by_side(folder / f"{name}.png")
    if layout == "images masks":
        data = folder_data(images=str(tmp_path / "A"), masks=str(tmp_path / "B"))
    train, val = (stems(translation_pairs(data, train=part)) for part in (True, False))
    assert len(val) == 2
    assert sorted(train + val) == names
    assert stems(translation_pairs(data, train=False, all_pairs=True)) == names


def test_folders_with_their_own_validation(tmp_path):
    write_pair(tmp_path / "a", tmp_path / "b", "t")
    write_pair(tmp_path / "va", tmp_path / "vb", "v")
    folders = {"images": "a", "masks": "b", "val_images": "va", "val_masks": "vb"}
    data = folder_data(**{key: str(tmp_path / name) for key, name in folders.items()})
    assert stems(translation_pairs(data, train=True)) == ["t"]
    assert stems(translation_pairs(data, train=False)) == ["v"]


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["A", "B"])
def test_a_missing_partner_is_named(tmp_path, missing):
    for name in ("p1", "p2"):
        write_pair(tmp_path / "A", tmp_path / "B", name)
    write(tmp_path / ("B" if missing == "A" else "A") / "lonely.png")
    with pytest.raises(UserError, match=rf"{missing}: .*for 1 of the 3 images.*lonely\.png"):
        translation_pairs(folder_data(root=str(tmp_path)), train=True)


def test_partners_of_different_sizes_are_named(tmp_path):
    write_pair(tmp_path / "A", tmp_path / "B", "good")
    write(tmp_path / "A" / "bad.png", (6, 4))
    write(tmp_path / "B" / "bad.png", (5, 4))
    data = folder_data(root=str(tmp_path))
    dataset = translation_pairs(data, train=True, all_pairs=True)
    with pytest.raises(UserError, match=r"bad\.png: 6×4 pixels.*5×4"):
        check_translation_pairs(dataset)


def test_a_part_with_one_folder_is_refused(tmp_path):
    write(tmp_path / "trainA" / "x.png")
    with pytest.raises(UserError, match=r"trainB: no such folder, though .*trainA"):
        translation_pairs(folder_data(root=str(tmp_path)), train=True)


@pytest.mark.parametrize("make", [True, False])
def test_a_root_without_pairs_says_what_was_looked_for(tmp_path, make):
    root = tmp_path / "data"
    if make:
        write(root / "elsewhere" / "x.png")
    with pytest.raises(
        UserError, match=r"data: (holds no images|no such folder).*trainA.*--images"
    ):
        translation_pairs(folder_data(root=str(root)), train=True)


# --- transforms ---------------------------------------------------------------------------------


def ramp_pair(size=(40, 60)):
    """Two images whose values tell the place: a rises along x, b is a's inverse."""
    row = torch.linspace(0, 255, size[1]).round().to(torch.uint8)
    a = row.expand(3, *size).contiguous()
    return tv_tensors.Image(a), tv_tensors.Image(255 - a)


def test_training_moves_both_images_together():
    jitter = TranslationTrain(image_size=16, load_size=20, hflip=0.5)
    rising = set()
    for seed in range(12):
        torch.manual_seed(seed)
        source, target = jitter(*ramp_pair())
        assert source.shape == target.shape == (3, 16, 16)
        assert source.dtype == target.dtype == torch.uint8
        assert (source.int() + target.int() - 255).abs().max() <= 1  # rounded apart, at most
        rising.add(bool(source[0, 0, 0] < source[0, 0, -1]))
    assert rising == {True, False}


def test_training_draws_three_numbers_whatever_they_are():
    states = []
    for hflip in (0.0, 1.0):
        torch.manual_seed(0)
        TranslationTrain(16, 20, hflip)(*ramp_pair())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_crops_reach_every_border():
    jitter = TranslationTrain(image_size=16, load_size=18, hflip=0.0)
    torch.manual_seed(0)
    lowest = {int(jitter(*ramp_pair())[0].min()) for _ in range(40)}
    assert len(lowest) == 3  # three places along x


def test_evaluation_keeps_the_target():
    a, b = ramp_pair()
    source, target = TranslationEval(16)(a, b)
    assert source.shape == (3, 16, 16)
    assert torch.equal(target, b)


def test_direction():
    a, b = (tv_tensors.Image(torch.full((3, 8, 8), grey).byte()) for grey in (A_GREY, B_GREY))
    for transform in (TranslationTrain(4, 4, direction="BtoA"), TranslationEval(4, "BtoA")):
        source, target = transform(a, b)
        assert (source == B_GREY).all()
        assert (target == A_GREY).all()
    source, target = TranslationTrain(4, 4)(a, b)
    assert (int(source[0, 0, 0]), int(target[0, 0, 0])) == (A_GREY, B_GREY)


# --- real data ----------------------------------------------------------------------------------


def test_facades(shared_data):
    data = folder_data(root=str(shared_data / "pix2pix"))
    train, val = (translation_pairs(data, train=part) for part in (True, False))
    assert (len(train), len(val)) == (80, 20)
    check_translation_pairs(train)
    check_translation_pairs(val)
    for photo, labels in val:
        assert photo.shape == labels.shape == (3, 256, 256)
        # The wall of a label map is blue.
        blueness = [(half[2].int() - half[0].int()).float().mean() for half in (photo, labels)]
        assert blueness[0] < 8 < blueness[1]
