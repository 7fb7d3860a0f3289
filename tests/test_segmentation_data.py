"""The layouts of segmentation data: VOC's years and lists, CamVid's and the bag set's folders."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tasks.segmentation.data import bag_pairs, camvid_pairs, segmentation_layout, voc_pairs
from tasks.segmentation.label_maps import LabelReader
from train_utils.datasets import PairDataset, check_pairs
from train_utils.errors import UserError


def write(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), value).save(path)
    return path


def make_year(year: Path, train: list[str], val: list[str], suffix: str = ".jpg") -> Path:
    for name in (*train, *val):
        write(year / "JPEGImages" / f"{name}{suffix}")
        write(year / "SegmentationClass" / f"{name}.png")
    write_list(year, "train", "".join(f"{name}\n" for name in train))
    write_list(year, "val", "".join(f"{name}\n" for name in val))
    return year


def write_list(year: Path, part: str, text: str) -> Path:
    path = year / "ImageSets" / "Segmentation" / f"{part}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


# --- VOC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_root_may_be_any_of_three_folders(tmp_path, inner):
    year = make_year(tmp_path / "VOCdevkit" / "VOC2012", ["a", "b"], ["c"])
    pairs, stems = voc_pairs(tmp_path / inner, train=True)
    assert pairs == [
        (year / "JPEGImages" / f"{name}.jpg", year / "SegmentationClass" / f"{name}.png")
        for name in ("a", "b")
    ]
    assert stems == ["VOC2012/a", "VOC2012/b"]
    assert voc_pairs(tmp_path / inner, train=False)[1] == ["VOC2012/c"]


def test_voc_lists_order_the_pairs_and_may_be_written_in_any_way(tmp_path):
    make_year(tmp_path / "VOC2012", ["b", "a", "two words"], ["c"], suffix=".png")
    write_list(tmp_path / "VOC2012", "train", "\ufeffb\r\n\r\n  two words \r\na\r\nb")
    assert voc_pairs(tmp_path, train=True)[1] == ["VOC2012/b", "VOC2012/two words", "VOC2012/a"]


def test_voc_years_are_joined_and_the_latest_decides_about_a_photo(tmp_path):
    make_year(tmp_path / "VOC2012", ["2007_000001", "2008_000009"], ["2007_000002"])
    make_year(tmp_path / "VOC2007", ["000002", "000003"], ["000001", "000004"])
    assert voc_pairs(tmp_path, train=True)[1] == [
        "VOC2012/2007_000001",
        "VOC2012/2008_000009",
        "VOC2007/000003",
    ]
    assert voc_pairs(tmp_path, train=False)[1] == ["VOC2012/2007_000002", "VOC2007/000004"]


def test_voc_lists_that_share_a_name_are_refused(tmp_path):
    year = make_year(tmp_path / "VOC2007", ["a", "b", "c"], ["d"])
    write_list(year, "val", "d\nb\na\n")
    for train in (True, False):
        with pytest.raises(UserError, match=r"Segmentation: 2 images are to train and .*: a, b\."):
            voc_pairs(tmp_path, train)


def test_voc_missing_lists(tmp_path):
    year = make_year(tmp_path / "VOC2007", ["a"], ["b"])
    (year / "ImageSets" / "Segmentation" / "train.txt").unlink()
    assert voc_pairs(tmp_path, train=False)[1] == ["VOC2007/b"]
    with pytest.raises(UserError, match=r"train\.txt: no such list.*images to train on"):
        voc_pairs(tmp_path, train=True)
    write_list(year, "train", "\n")
    with pytest.raises(UserError, match=r"train\.txt: the list is empty"):
        voc_pairs(tmp_path, train=True)
    (year / "ImageSets" / "Segmentation" / "val.txt").unlink()
    write_list(year, "train", "a")
    with pytest.raises(UserError, match=r"val\.txt: no such list.*images to validate with"):
        voc_pairs(tmp_path, train=True)  # nobody could say whether the lists share a name


def test_voc_missing_files_are_listed_at_once(tmp_path):
    year = make_year(tmp_path / "VOC2007", ["a", *(f"x{n:02}" for n in range(11))], ["b"])
    for mask in (year / "SegmentationClass").glob("x*"):
        mask.unlink()
    (year / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"12 files .*: a \(image\), x00 \(mask\), .*, and 2 more"):
        voc_pairs(tmp_path, train=True)
    assert voc_pairs(tmp_path, train=False)[1] == ["VOC2007/b"]


def test_voc_elsewhere(tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(UserError, match="looked for VOCdevkit/VOC2012 or VOC2007, found holiday"):
        voc_pairs(tmp_path, train=True)


# --- CamVid and bag -----------------------------------------------------------------------------


def make_camvid(root: Path, **parts: list[str]) -> Path:
    value = 0
    for part, names in parts.items():
        for name in names:
            value += 1
            write(root / part / f"{name}.png", value)
            write(root / f"{part}annot" / f"{name}.png")
    return root


def test_camvid(tmp_path):
    root = make_camvid(tmp_path, train=["b", "a"], val=["c"], test=["d"])
    pairs, stems = camvid_pairs(root, train=True)
    assert stems == ["a", "b"]
    assert pairs[0] == (root / "train" / "a.png", root / "trainannot" / "a.png")
    assert camvid_pairs(root, train=False)[1] == ["c"]


def test_camvid_without_val_validates_with_test(tmp_path):
    root = make_camvid(tmp_path, train=["a"], test=["d", "e"])
    assert camvid_pairs(root, train=False)[1] == ["d", "e"]
    assert camvid_pairs(root, train=True)[1] == ["a"]


def test_camvid_copies_of_training_images_are_refused(tmp_path):
    root = make_camvid(tmp_path, train=["1", "2"], val=["1", "2"])
    assert camvid_pairs(root, train=True)[1] == ["1", "2"]  # the same names, other images
    (root / "val" / "2.png").write_bytes((root / "train" / "2.png").read_bytes())
    for train in (True, False):
        with pytest.raises(UserError, match=r"1 images are to train and to validate, .*: 2\."):
            camvid_pairs(root, train)


def test_camvid_missing_masks(tmp_path):
    root = make_camvid(tmp_path, train=["a", "b"], val=["c"])
    (root / "trainannot" / "a.png").unlink()
    with pytest.raises(UserError, match=r"no mask for 1 of the 2 images .*: a\.png\."):
        camvid_pairs(root, train=True)


@pytest.mark.parametrize("plural", ["", "s"])
def test_bag(tmp_path, plural):
    for name in ("b", "a"):
        write(tmp_path / f"image{plural}" / f"{name}.jpg")
        write(tmp_path / f"mask{plural}" / f"{name}.jpg")
    pairs, stems = bag_pairs(tmp_path)
    assert stems == ["a", "b"]
    assert pairs[0] == (
        tmp_path / f"image{plural}" / "a.jpg",
        tmp_path / f"mask{plural}" / "a.jpg",
    )


def test_bag_elsewhere(tmp_path):
    (tmp_path / "image").mkdir()
    with pytest.raises(UserError, match="looked for image and mask, found image"):
        bag_pairs(tmp_path)


# --- layouts ------------------------------------------------------------------------------------


def test_layouts(tmp_path):
    make_year(tmp_path / "v" / "VOCdevkit" / "VOC2007", ["a"], ["b"])
    make_camvid(tmp_path / "c", train=["a"], val=["b"])
    write(tmp_path / "b" / "images" / "a.jpg")
    write(tmp_path / "b" / "masks" / "a.jpg")
    assert [segmentation_layout(tmp_path / name) for name in "vcb"] == ["voc", "camvid", "bag"]
    with pytest.raises(UserError) as caught:
        segmentation_layout(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: looked for VOCdevkit/VOC2012 or VOC2007 (voc), train and trainannot "
        "(camvid), image and mask (bag), found b, c, v. Give the folder that holds these, or your "
        "own pairs by --images DIR --masks DIR."
    )
    with pytest.raises(UserError, match=r"nowhere: looked for .*, no such folder"):
        segmentation_layout(tmp_path / "nowhere")


# --- real files ---------------------------------------------------------------------------------


def test_real_voc(shared_data):
    root = shared_data / "voc"
    assert segmentation_layout(root) == "voc"
    (train, _), (val, stems) = voc_pairs(root, train=True), voc_pairs(root, train=False)
    assert (len(train), len(val)) == (100, 12)
    dataset = PairDataset(val, stems, read_target=LabelReader(4))
    check_pairs(dataset)
    image, mask = dataset[0]
    assert image.shape == (3, 256, 256)
    assert mask.shape == (1, 256, 256)
    assert mask.max() <= 3


def test_real_voc_photos_without_lists(shared_data):
    root = shared_data / "voc_real3"
    assert segmentation_layout(root) == "voc"
    with pytest.raises(UserError, match=r"train\.txt: no such list"):
        voc_pairs(root, train=True)


def test_real_camvid(shared_data):
    root = shared_data / "camvid"
    assert segmentation_layout(root) == "camvid"
    train, val = camvid_pairs(root, train=True), camvid_pairs(root, train=False)
    assert (len(train[0]), len(val[0])) == (20, 6)
    dataset = PairDataset(*train, read_target=LabelReader(11, ignore_index=11))
    check_pairs(dataset)
    assert set(torch.unique(dataset[0][1]).tolist()) <= {*range(11), 255}


def test_real_bag(shared_data):
    root = shared_data / "bag"
    assert segmentation_layout(root) == "bag"
    dataset = PairDataset(*bag_pairs(root), read_target=LabelReader(2, mode="threshold"))
    check_pairs(dataset)
    assert len(dataset) == 40
    image, mask = dataset[0]
    grey = image.float().mean(0, keepdim=True)
    assert grey[mask == 1].mean() < grey[mask == 0].mean()  # bags before a white ground
