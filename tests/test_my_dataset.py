"""Pairing, splitting and checking of real files, and the embedded scenes."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

import my_dataset
from my_dataset import DUTSDataset, PairFolderDataset, ShapesDataset
from train_utils import shapes
from train_utils.datasets import PathPairs, check_pairs, fingerprint, split_pairs
from train_utils.errors import UserError


def write(path: Path, size: tuple[int, int] = (4, 3), mode: str = "L", value=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def make_pairs(root: Path, stems: list[str]) -> tuple[Path, Path]:
    """Folders of images and of masks, the n-th pair of grey value n."""
    for value, stem in enumerate(stems):
        write(root / "images" / f"{stem}.jpg", mode="RGB", value=(value,) * 3)
        write(root / "masks" / f"{stem}.png", value=value)
    return root / "images", root / "masks"


def values(dataset: Dataset) -> list[tuple[int, int]]:
    return [(image[0, 0, 0].item(), mask[0, 0, 0].item()) for image, mask in dataset]


# --- pairs of folders ---------------------------------------------------------------------------


def test_pairs_go_by_the_path_without_its_suffix(tmp_path):
    images, masks = make_pairs(tmp_path, ["b", "a.v2", "city/a", "city/deep/a"])
    dataset = PairFolderDataset(images, masks)
    assert len(dataset) == 4
    assert dataset.stems == ["a.v2", "b", "city/a", "city/deep/a"]
    assert values(dataset) == [(1, 255), (0, 0), (2, 2), (3, 3)]  # a mask of 1s is a 0/1 mask
    assert dataset.name(2) == str(images / "city" / "a.jpg")
    assert dataset.pairs[2] == (images / "city" / "a.jpg", masks / "city" / "a.png")
    image, mask = dataset[0]
    assert isinstance(image, tv_tensors.Image)
    assert isinstance(mask, tv_tensors.Mask)
    assert image.shape == (3, 3, 4)
    assert mask.shape == (1, 3, 4)


def test_transforms_get_image_and_mask(tmp_path):
    folders = make_pairs(tmp_path, ["a"])
    plain = PairFolderDataset(*folders)[0]
    dataset = PairFolderDataset(*folders, transforms=lambda image, mask: (mask, image))
    assert torch.equal(dataset[0][1], plain[0])
    assert torch.equal(dataset[0][0], plain[1])


def test_masks_without_image_are_counted(tmp_path):
    images, masks = make_pairs(tmp_path, ["a", "b"])
    assert PairFolderDataset(images, masks).unmatched_masks == 0
    write(masks / "c.png")
    write(masks / "sub" / "a.png")
    dataset = PairFolderDataset(images, masks)
    assert dataset.unmatched_masks == 2
    assert len(dataset) == 2


def test_all_missing_masks_are_listed_at_once(tmp_path):
    images, masks = make_pairs(tmp_path, ["kept", "x1", "x2"])
    (masks / "x1.png").unlink()
    (masks / "x2.png").unlink()
    with pytest.raises(UserError) as caught:
        PairFolderDataset(images, masks)
    assert str(caught.value).startswith(
        f"{masks}: no mask for 2 of the 3 images in {images}: x1.jpg, x2.jpg. Name each mask"
    )


def test_a_long_list_of_missing_masks_is_cut(tmp_path):
    images, masks = make_pairs(tmp_path, ["kept", *(f"x{n:02}" for n in range(12))])
    for mask in masks.glob("x*"):
        mask.unlink()
    with pytest.raises(UserError, match=r"no mask for 12 of .*x09\.jpg, and 2 more\. Name"):
        PairFolderDataset(images, masks)


def test_masks_with_close_names_are_pointed_out(tmp_path):
    for stem, mask in (("1", "1_mask"), ("10", "10_mask"), ("Dog", "dog"), ("owl", "unlike")):
        write(tmp_path / "images" / f"{stem}.jpg", mode="RGB")
        write(tmp_path / "masks" / f"{mask}.png")
    hints = r"look close: 1 ~ 1_mask; 10 ~ 10_mask; Dog ~ dog\. Name each"
    with pytest.raises(UserError, match=hints):
        PairFolderDataset(tmp_path / "images", tmp_path / "masks")


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_two_files_of_one_stem_are_refused(tmp_path, folder):
    folders = make_pairs(tmp_path, ["a"])
    write(tmp_path / folder / "a.bmp")
    with pytest.raises(UserError, match=rf"{folder}.a\.\w+: only the suffix .* a\.bmp.*Remove"):
        PairFolderDataset(*folders)


def test_masks_may_lie_in_a_folder_among_the_images(tmp_path, monkeypatch):
    write(tmp_path / "a.jpg", mode="RGB")
    write(tmp_path / "masks" / "a.png")
    assert PairFolderDataset(tmp_path, tmp_path / "masks").stems == ["a"]
    monkeypatch.chdir(tmp_path)
    assert PairFolderDataset(".", tmp_path / "masks").stems == ["a"]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"holds no images but those in .*masks\."):
        PairFolderDataset(tmp_path, tmp_path / "masks")


def test_missing_folders_are_named(tmp_path):
    images, _ = make_pairs(tmp_path, ["a"])
    with pytest.raises(UserError, match="nowhere: no such folder"):
        PairFolderDataset(images, tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        PairFolderDataset(tmp_path / "nowhere", images)


def test_sizes_that_differ_are_refused_when_read(tmp_path):
    images, masks = make_pairs(tmp_path, ["a", "b"])
    write(masks / "b.png", size=(3, 4))
    dataset = PairFolderDataset(images, masks)
    assert dataset[0][1].shape == (1, 3, 4)
    with pytest.raises(
        UserError,
        match=r"b\.jpg: 4×3 pixels \(EXIF rotations applied\), but .*b\.png has 3×4\. Rep",
    ):
        dataset[1]


def test_orientation_counts_before_sizes_are_compared(tmp_path):
    images, masks = make_pairs(tmp_path, ["a"])
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.new("RGB", (4, 3)).save(images / "a.jpg", exif=tag)
    dataset = PairFolderDataset(images, masks)
    with pytest.raises(UserError, match=r"a\.jpg: 3×4 pixels"):
        dataset[0]
    with pytest.raises(UserError, match=r"a\.jpg: 3×4 pixels"):
        check_pairs(dataset)
    write(masks / "a.png", size=(3, 4))
    check_pairs(dataset)
    assert dataset[0][0].shape == (3, 4, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux file systems take any bytes")
def test_names_that_are_not_utf_8(tmp_path):
    folders = make_pairs(tmp_path, [os.fsdecode(b"caf\xe9"), "b"])
    dataset = PairFolderDataset(*folders)
    assert dataset.name(1).endswith("caf\\udce9.jpg")
    assert sum(map(len, split_pairs(dataset, 0.5, 0))) == 2
    dataset.pairs[1][1].write_bytes(b"")
    with pytest.raises(UserError) as caught:
        check_pairs(dataset)
    str(caught.value).encode()


# --- check_pairs --------------------------------------------------------------------------------


def test_check_pairs_lists_every_bad_pair(tmp_path):
    images, masks = make_pairs(tmp_path, ["a", "b", "c", "d"])
    write(masks / "b.png", size=(5, 5))
    (images / "c.jpg").write_bytes(b"")
    dataset = PairFolderDataset(images, masks)
    with pytest.raises(UserError) as caught:
        check_pairs(dataset)
    first, second = str(caught.value).split("; ")
    assert first.startswith(f"{images / 'b.jpg'}: 4×3 pixels, but {masks / 'b.png'} has 5")
    assert second.startswith(f"{images / 'c.jpg'}: the file is empty")


def test_check_pairs_cuts_a_long_list(tmp_path):
    images, masks = make_pairs(tmp_path, [f"{n:02}" for n in range(13)])
    for mask in masks.iterdir():
        mask.write_bytes(b"")
    with pytest.raises(UserError, match=r"09\.png: the file is empty.*; and 3 more$"):
        check_pairs(PairFolderDataset(images, masks))


def test_check_pairs_reads_no_pixels(tmp_path):
    images, masks = make_pairs(tmp_path, ["a"])
    Image.effect_noise((64, 64), 99).save(masks / "a.png")
    write(images / "a.jpg", size=(64, 64), mode="RGB")
    content = (masks / "a.png").read_bytes()
    (masks / "a.png").write_bytes(content[: len(content) // 2])
    dataset = PairFolderDataset(images, masks)
    check_pairs(dataset)
    with pytest.raises(UserError, match="truncated"):
        dataset[0]


def test_check_pairs_of_subsets_and_of_shapes(tmp_path):
    images, masks = make_pairs(tmp_path, ["a", "b", "c"])
    write(masks / "b.png", size=(5, 5))
    dataset = PairFolderDataset(images, masks)
    check_pairs(Subset(dataset, [0, 2]))
    check_pairs(Subset(Subset(dataset, [2, 1]), [0]))
    with pytest.raises(UserError, match=r"b\.jpg"):
        check_pairs(Subset(dataset, [2, 1]))
    check_pairs(ShapesDataset(16, 0, 3))
    check_pairs(Subset(ShapesDataset(16, 0, 3), [1]))


# --- split_pairs --------------------------------------------------------------------------------


def names(dataset: PairFolderDataset, indices: list[int]) -> set[str]:
    return {dataset.stems[index] for index in indices}


def test_split_is_a_partition_of_the_asked_share(tmp_path):
    dataset = PairFolderDataset(*make_pairs(tmp_path, [f"{n}" for n in range(20)]))
    train, val = split_pairs(dataset, 0.25, seed=0)
    assert len(val) == 5
    assert sorted(train + val) == list(range(20))
    assert train == sorted(train)
    assert val == sorted(val)
    assert split_pairs(dataset, 0.25, seed=0) == (train, val)
    assert split_pairs(dataset, 0.25, seed=1) != (train, val)


def test_split_goes_by_names_alone(tmp_path):
    stems = [f"{n:02}" for n in range(20)]
    dataset = PairFolderDataset(*make_pairs(tmp_path / "here", stems))
    moved = PairFolderDataset(*make_pairs(tmp_path / "there", stems))
    moved.stems.reverse()
    moved.pairs = list(moved.pairs)[::-1]
    for old, new in zip(split_pairs(dataset, 0.3, 7), split_pairs(moved, 0.3, 7), strict=True):
        assert names(dataset, old) == names(moved, new)
    # A new pair takes at most one place in the held-out set.
    grown = PairFolderDataset(*make_pairs(tmp_path / "grown", [*stems, "new"]))
    _, val = split_pairs(dataset, 0.3, 7)
    _, grown_val = split_pairs(grown, 0.3, 7)
    assert len(names(grown, grown_val) - names(dataset, val)) <= 1


def test_split_is_the_same_on_every_machine(tmp_path):
    # Pinned: were the split to change, a resumed run would train on what it had held out.
    dataset = PairFolderDataset(*make_pairs(tmp_path, list("abcdefgh")))
    assert names(dataset, split_pairs(dataset, 0.25, seed=0)[1]) == {"e", "h"}


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_split_leaves_something_on_both_sides(tmp_path, fraction):
    dataset = PairFolderDataset(*make_pairs(tmp_path, ["a", "b"]))
    assert [len(part) for part in split_pairs(dataset, fraction, 0)] == [1, 1]


def test_split_refuses_one_pair(tmp_path):
    one = PairFolderDataset(*make_pairs(tmp_path / "one", ["a"]))
    with pytest.raises(UserError, match=r"a\.jpg: one pair cannot be split"):
        split_pairs(one, 0.5, 0)


# --- DUTS ---------------------------------------------------------------------------------------


def test_duts_layout(tmp_path):
    for part, value in (("DUTS-TR", 5), ("DUTS-TE", 6)):
        write(tmp_path / part / f"{part}-Image" / "a.jpg", mode="RGB")
        write(tmp_path / part / f"{part}-Mask" / "a.png", value=value)
    assert values(DUTSDataset(tmp_path)) == [(0, 5)]
    assert values(DUTSDataset(str(tmp_path), False)) == [(0, 6)]
    swapped = DUTSDataset(str(tmp_path), True, lambda image, mask: (mask, image))
    assert values(swapped) == [(5, 0)]


def test_collate_fn_stacks_or_lists(tmp_path):
    for stem, size in (("a", (4, 3)), ("b", (4, 3)), ("c", (2, 2))):
        write(tmp_path / "DUTS-TR" / "DUTS-TR-Image" / f"{stem}.jpg", size=size, mode="RGB")
        write(tmp_path / "DUTS-TR" / "DUTS-TR-Mask" / f"{stem}.png", size=size)
    dataset = DUTSDataset(tmp_path)
    images, masks = DUTSDataset.collate_fn([dataset[0], dataset[1]])
    assert images.shape == (2, 3, 3, 4)
    assert masks.shape == (2, 1, 3, 4)
    images, masks = dataset.collate_fn([dataset[0], dataset[2]])
    assert [mask.shape for mask in masks] == [(1, 3, 4), (1, 2, 2)]


def test_duts_layout_is_explained(tmp_path):
    (tmp_path / "DUTS-TR" / "DUTS-TR-Image").mkdir(parents=True)
    (tmp_path / "readme.txt").touch()
    with pytest.raises(UserError) as caught:
        DUTSDataset(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: looked for DUTS-TR/DUTS-TR-Image and DUTS-TR/DUTS-TR-Mask, "
        "found DUTS-TR, readme.txt. Give the folder that holds DUTS-TR, "
        "or your own pairs by --images DIR --masks DIR."
    )
    with pytest.raises(UserError, match=r"DUTS-TE/DUTS-TE-Image.*no such folder\. Give the folder"):
        DUTSDataset(tmp_path / "missing", train=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found an empty folder"):
        DUTSDataset(tmp_path / "empty")


def test_real_duts_layout(shared_data):
    train = DUTSDataset(shared_data / "saliency")
    test = DUTSDataset(shared_data / "saliency", train=False)
    assert (len(train), len(test)) == (320, 80)
    assert train.unmatched_masks == test.unmatched_masks == 0
    check_pairs(test)
    image, mask = test[3]
    assert image.shape[1:] == mask.shape[1:]
    assert mask.unique().tolist() == [0, 255]


def test_real_folders_of_jpeg_masks(shared_data):
    dataset = PairFolderDataset(shared_data / "bag" / "image", shared_data / "bag" / "mask")
    assert len(dataset) == 40
    check_pairs(dataset)
    _, mask = dataset[0]
    assert len(mask.unique()) > 2  # JPEG's grey levels are kept


# --- embedded shapes ----------------------------------------------------------------------------


def test_shapes_are_scenes_from_first_on():
    dataset = ShapesDataset(32, seed=3, count=4, first=10)
    assert len(dataset) == 4
    for index in (0, 3):
        scene = shapes.render_scene(3, 10 + index, 32)
        image, mask = dataset[index]
        assert isinstance(image, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)
        assert torch.equal(image, scene.image)
        assert torch.equal(mask, scene.mask)
    assert dataset.name(3) == "scene 13 (seed 3)"
    with pytest.raises(IndexError):
        dataset[4]


@pytest.mark.parametrize("target", ["mask", "classes", "alpha", "labels"])
def test_shapes_targets(target):
    scene = shapes.render_scene(0, 0, 32)
    _, tensor = ShapesDataset(32, 0, 1, fields=("image", target))[0]
    assert torch.equal(tensor, getattr(scene, target))
    expected = tv_tensors.Image if target == "labels" else tv_tensors.Mask
    assert isinstance(tensor, expected)


@pytest.mark.parametrize("target", ["classes", "labels"])
def test_classes_come_with_familiar_scenes(target):
    image, truth = ShapesDataset(32, 0, 1, fields=("image", target))[0]
    scene = shapes.render_scene(0, 0, 32, familiar=True)
    assert torch.equal(image, scene.image)
    assert torch.equal(truth, getattr(scene, target))


def test_shapes_are_drawn_once_and_kept_intact(monkeypatch):
    drawn = []
    render = shapes.render_scene

    def count(seed, index, *rest):
        drawn.append(index)
        return render(seed, index, *rest)

    monkeypatch.setattr(shapes, "render_scene", count)

    def blacken(image, mask):
        return image.zero_(), mask.zero_()

    dataset = ShapesDataset(32, 0, 2, transforms=blacken)
    assert dataset[0][0].sum() == 0
    dataset.transforms = None
    assert torch.equal(dataset[0][0], render(0, 0, 32).image)
    assert torch.equal(dataset[0][1], render(0, 0, 32).mask)
    assert drawn == [0]


def test_shapes_keep_no_more_than_their_share_of_memory(monkeypatch):
    monkeypatch.setattr(my_dataset, "_SHAPES_CACHE_BYTES", 2 * 4 * 16 * 16)
    dataset = ShapesDataset(16, 0, 3)
    items = [dataset[index] for index in range(3)]
    calls = []
    render = shapes.render_scene
    monkeypatch.setattr(shapes, "render_scene", lambda *key: calls.append(key) or render(*key))
    again = [dataset[index] for index in range(3)]
    assert calls == [(0, 2, 16, False)]
    for (image, mask), (same_image, same_mask) in zip(items, again, strict=True):
        assert torch.equal(image, same_image)
        assert torch.equal(mask, same_mask)


def test_shapes_leave_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert ShapesDataset(16, 0, 1)[0] is not None
    assert torch.equal(torch.rand(3), expected)


def test_shapes_refuse_what_cannot_be_drawn():
    with pytest.raises(UserError, match="size 8: too small"):
        ShapesDataset(8, 0, 1)


def test_masks_read_through_a_dataset_keep_every_value(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write(tmp_path / "images" / "a.jpg", size=(16, 16), mode="RGB")
    (tmp_path / "masks").mkdir()
    Image.fromarray(values).save(tmp_path / "masks" / "a.png")
    _, mask = PairFolderDataset(tmp_path / "images", tmp_path / "masks")[0]
    assert np.array_equal(mask[0], values)


def test_a_fingerprint_knows_names_and_order_but_not_places(tmp_path):
    def make(place, names):
        for folder in ("images", "masks"):
            (tmp_path / place / folder).mkdir(parents=True)
            for name in names:
                Image.new("L", (4, 4)).save(tmp_path / place / folder / f"{name}.png")
        return PairFolderDataset(tmp_path / place / "images", tmp_path / place / "masks")

    first, moved, other = make("a", "xyz"), make("b", "xyz"), make("c", "xyw")
    assert fingerprint(first) == fingerprint(moved) != fingerprint(other)
    parts = [fingerprint(Subset(first, indices)) for indices in ([0, 1], [1, 0], [0, 2])]
    assert len({*parts, fingerprint(first)}) == 4
    scenes = [ShapesDataset(32, 0, 3), ShapesDataset(32, 1, 3), ShapesDataset(32, 0, 3, first=1)]
    assert len({fingerprint(dataset) for dataset in scenes}) == 3


def test_pairs_of_paths_are_a_sequence(tmp_path):
    paths = [(Path(f"a/{n}ü.jpg"), Path(os.fsdecode(b"b/\xff%d.png" % n))) for n in range(5)]
    pairs = PathPairs(paths)
    assert (len(pairs), pairs[0], pairs[-1]) == (5, paths[0], paths[4])
    assert list(pairs) == paths == list(pickle.loads(pickle.dumps(pairs)))
    assert len(PathPairs([])) == 0 and list(PathPairs([])) == []
    with pytest.raises(IndexError):
        pairs[5]


def test_draft_reads_large_jpegs_small_and_masks_whole(tmp_path):
    for name, size in (("images", (100, 60)), ("masks", (100, 60))):
        (tmp_path / name).mkdir()
        Image.new("L", size, 9).save(tmp_path / name / "a.jpg")
    folders = tmp_path / "images", tmp_path / "masks"
    dataset = PairFolderDataset(*folders, at_least=30)
    image, mask = dataset[0]
    assert (image.shape, mask.shape) == ((3, 30, 50), (1, 60, 100))
    check_pairs(dataset)
    Image.new("L", (50, 30), 9).save(tmp_path / "masks" / "a.jpg")  # the size as decoded
    with pytest.raises(UserError, match="100×60 pixels, but"):
        check_pairs(dataset)
