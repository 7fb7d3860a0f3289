"""Folders, names and lists as they come: what is paired, what is left out, what is said of it."""

import os
import re
import shlex
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

import predict
import tasks
import tasks.saliency
import validation
from my_dataset import PairFolderDataset
from src import u2net_lite
from tasks.segmentation.data import voc_pairs
from train_utils.arguments import parse_args
from train_utils.datasets import check_pair, fingerprint, pairs_of
from train_utils.errors import UserError
from train_utils.image_io import read_image, save_image
from train_utils.listing import AGAIN, BROKEN, HIDDEN, OTHER, UNREAD, described, list_folder
from train_utils.log import say_once
from train_utils.pairing import Names, columns, listed_pairs, pair_folders, read_lines
from train_utils.prediction_files import plan, remarks
from train_utils.prepare_data import prepare_datasets

SCALAR = ["--set", "data.image_size=32", "--device", "cpu", "-j", "0"]
LABELS = ["--config", "configs/unet.yaml", "--set", "data.class_names=[a,b]"]
needs_links = pytest.mark.skipif(os.name != "posix", reason="needs links")


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say_once.cache_clear()


def write(name, value=0, size=(8, 6)) -> Path:
    """A file with the suffix of an image, whichever: a white rectangle on grey."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".png": "PNG", ".gif": "GIF", ".tif": "TIFF", ".bmp": "BMP"}
    picture = Image.new("L", size, value)
    picture.paste(255, (2, 1, 5, 4))
    picture.save(path, kind.get(path.suffix.lower(), "JPEG"))
    return path


def touch(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"x")


def datasets(*argv):
    """The datasets that a command line of train.py makes, checked and ready to train on."""
    config = [] if "--config" in argv else ["--config", str(Path(__file__).parents[1] / RECIPE)]
    argv = [str(Path(__file__).parents[1] / word) if "configs/" in word else word for word in argv]
    args = parse_args([*config, *SCALAR[:2], *argv], flags=tasks.train_flags())
    task, _, _ = tasks.configure(args)
    return prepare_datasets(task, *task.build_datasets())


RECIPE = "configs/shapes.yaml"


def stems_of(*argv):
    return sorted(
        pairs_of(dataset)[i][0].stem
        for _, *sets in [datasets(*argv)]
        for dataset in sets
        for i in range(len(dataset))
    )


def refused(*argv) -> str:
    with pytest.raises(UserError) as caught:
        datasets(*argv)
    return str(caught.value)


def proposed_by(message: str) -> list[list[str]]:
    """The flags that a message proposes, each choice as a shell splits it."""
    start = message.index("--set ")
    return [shlex.split(choice) for choice in message[start:].split(", or ") if "--set" in choice]


# --- folders ------------------------------------------------------------------------------------


@needs_links
def test_links_are_followed_once_and_circles_have_an_end():
    for name in ("in/day/a.jpg", "store/night/b.jpg", "store/c.jpg"):
        write(name)
    Path("in/night").symlink_to(Path("store/night").absolute(), target_is_directory=True)
    Path("in/c.jpg").symlink_to("../store/c.jpg")
    Path("in/day/up").symlink_to("..", target_is_directory=True)
    Path("in/day/out").symlink_to(Path.cwd(), target_is_directory=True)
    Path("store/night/self").symlink_to(".", target_is_directory=True)
    Path("in/also").symlink_to("night", target_is_directory=True)
    Path("in/a_loop").symlink_to("a_loop")
    images, left_out = list_folder("in")
    # Of two links to one folder the first one by name is taken.
    assert [path.as_posix() for path in images] == ["in/also/b.jpg", "in/c.jpg", "in/day/a.jpg"]
    again = ["in/also/self", "in/day/out", "in/day/up", "in/night"]
    assert sorted(path.as_posix() for path in left_out.pop(AGAIN)) == again
    assert left_out == {BROKEN: [Path("in/a_loop")]}


@needs_links
def test_a_folder_itself_goes_before_links_to_it():
    write("in/z/a.jpg")
    Path("in/a").symlink_to("z", target_is_directory=True)
    assert list_folder("in").images == [Path("in/z/a.jpg")]


def test_what_is_no_image_is_said_by_kind_and_suffix():
    write("in/a.jpg")
    touch("in/b.HEIC", "in/c.heic", "in/d.avif", "in/e.CR2", "in/notes.txt", "in/sub/README")
    touch("in/.f.png", "in/._a.jpg", "in/.DS_Store", "in/.git/g.png", "in/h.mp4")
    images, left_out = list_folder("in")
    assert images == [Path("in/a.jpg")]
    assert described(left_out) == (
        "1 hidden image (.png), "
        "4 images that are not read (.heic 2, .avif, .cr2: convert to PNG or JPEG), "
        "2 other files (.txt, no suffix), 1 video (.mp4)"
    )
    assert [len(left_out[kind]) for kind in (UNREAD, OTHER, HIDDEN)] == [4, 2, 1]


def test_a_folder_without_images_says_what_it_holds():
    touch("in/a.heic", "in/b.txt")
    Path("masks").mkdir()
    with pytest.raises(UserError, match=r"holds no images .* 1 image that is not read \(\.heic"):
        pair_folders(Path("in"), Path("masks"))


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".gif", ".mpo", ".dib", ".TIFF"])
def test_every_suffix_of_a_format_that_is_read_counts(suffix):
    write(f"in/a{suffix}")
    assert [path.name for path in list_folder("in").images] == [f"a{suffix}"]


def test_pairs_and_what_is_left_out_are_said_in_one_line(capsys):
    for number in range(3):
        write(f"photos/{number}.jpg")
        write(f"masks/{number}.png")
    write("masks/3.png")
    write("masks/4.png")
    touch("photos/3.heic", "photos/5.avif", "photos/notes.txt", "masks/6.psd", "masks/Thumbs.db")
    for _ in range(2):
        assert PairFolderDataset("photos", "masks").unmatched_masks == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "photos: 3 pairs; left out: 2 images that are not read (.heic, .avif: convert to PNG or "
        "JPEG), 1 mask that is not read (.psd: convert to PNG), 2 masks without an image (3.png, "
        "4.png), 2 other files (.txt, .db); of these 3.heic has a mask"
    )


def test_nothing_is_said_where_nothing_is_left_out():
    write("photos/a.jpg")
    write("masks/a.png")
    assert pair_folders(Path("photos"), Path("masks")).line == ""


@needs_links
def test_masks_among_the_images_are_no_images_whichever_way_leads_there():
    for name in ("in/a.jpg", "in/masks/a.png"):
        write(name)
    touch("in/masks/notes.txt")
    Path("in/more").symlink_to("masks", target_is_directory=True)
    found = pair_folders(Path("in"), Path("in/masks"))
    assert found.stems == ["a"] and described(found.left_out) == "1 other file (.txt)"
    write("all/masks/b.png")
    write("all/masks/images/b.jpg")
    assert pair_folders(Path("all/masks/images"), Path("all/masks")).stems == ["b"]


# --- a file is its own mask ---------------------------------------------------------------------


@needs_links
@pytest.mark.parametrize("masks", ["in", "link", "in/../in"])
def test_one_folder_for_both_is_refused(masks):
    for name in ("a", "b"):
        write(f"in/{name}.jpg")
    Path("link").symlink_to("in", target_is_directory=True)
    message = refused("--images", "in", "--masks", masks)
    assert "each is its own mask. Give two folders" in message
    assert proposed_by(message) == [["--set", "data.list=FILE."]]


@needs_links
def test_an_image_that_is_its_mask_by_a_link_is_refused():
    write("in/a.png")
    write("in/b.png")
    write("masks/b.png")
    Path("masks/a.png").symlink_to("../in/a.png")
    assert "is the same file as in/a.png" in refused("--images", "in", "--masks", "masks")
    Path("masks/a.png").unlink()
    Path("masks/a.png").hardlink_to("in/a.png")
    with pytest.raises(UserError, match="is the same file"):
        check_pair((Path("in/a.png"), Path("masks/a.png")))


ONE_FOLDER = {
    "busi": ("benign ({}).png", "benign ({})_mask.png"),
    "formats": ("p{}.jpg", "p{}.png"),
    "both": ("{}_image.png", "{}-label.png"),
    "prefix": ("{}.jpg", "mask_{}.jpg"),
}


@pytest.mark.parametrize("kind", ONE_FOLDER)
def test_images_and_masks_of_one_folder_are_told_apart_as_the_error_says(kind):
    image, mask = ONE_FOLDER[kind]
    for number in (1, 2, 10, 11):
        write(f"in/{image.format(number)}")
        write(f"in/{mask.format(number)}")
    folders = "--images", "in", "--masks", "in"
    (flags,) = proposed_by(refused(*folders))
    _, train_set, val_set = datasets(*folders, *flags)
    pairs = sorted((a.name, b.name) for a, b in [*pairs_of(train_set), *pairs_of(val_set)])
    assert pairs == sorted((image.format(n), mask.format(n)) for n in (1, 2, 10, 11))


# --- names --------------------------------------------------------------------------------------

NAMED = {
    "carvana": ("{}_01.jpg", ["{}_01_mask.gif"], "data.mask_suffix=_mask"),
    "isic": ("ISIC_{}.jpg", ["ISIC_{}_segmentation.png"], "data.mask_suffix=_segmentation"),
    "dash": ("{}.jpg", ["{}-gt.png"], "data.mask_suffix=-gt"),
    "number": ("{}.jpg", ["{}_a 2.png"], "data.mask_suffix=_a 2"),
    "word for yaml": ("{}.jpg", ["{}: x.png"], 'data.mask_suffix=": x"'),
    "drive": (
        "{}_training.tif",
        ["{}_manual1.gif"],
        "data.image_suffix=_training data.mask_suffix=_manual1",
    ),
    "prefix": ("{}.jpg", ["mask_{}.png"], "data.mask_prefix=mask_"),
    "prefixes": ("img_{}.jpg", ["mask_{}.png"], "data.image_prefix=img_ data.mask_prefix=mask_"),
    "infix": (
        "train_{}.jpg",
        ["train_labels_{}.png"],
        "data.image_prefix=train_ data.mask_prefix=train_labels_",
    ),
    "two suffixes": ("{}.jpg", ["{}.jpg.png"], "data.mask_suffix=.jpg.png"),
    "half a word": ("{}_m1.jpg", ["{}_mask.png"], "data.image_suffix=_m1 data.mask_suffix=_mask"),
    "cityscapes": (
        "aachen/aachen_{}_leftImg8bit.png",
        ["aachen/aachen_{}_gtFine_labelIds.png", "aachen/aachen_{}_gtFine_color.png"],
        "data.image_suffix=_leftImg8bit data.mask_suffix=_gtFine_color",
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_names_have_around_the_common_part_is_found_and_works(kind):
    image, masks, expected = NAMED[kind]
    for number in ("0", "1", "10", "21"):
        write(f"in/{image.format(number)}")
        for value, mask in enumerate(masks):
            write(f"masks/{mask.format(number)}", value)
    folders = "--images", "in", "--masks", "masks"
    message = refused(*folders)
    assert "no mask for 4 of the 4 images" in message
    choices = proposed_by(message)
    assert len(choices) == len(masks)
    assert " ".join(choices[0][1::2]) == expected
    for flags in choices:
        _, *sets = datasets(*folders, *flags)
        assert sum(len(pairs_of(dataset)) for dataset in sets) == 4


def test_names_that_explain_nearly_all_are_proposed_with_what_they_leave():
    for number in range(30):
        write(f"in/benign ({number}).png")
        write(f"in/benign ({number})_mask.png")
    write("in/benign (7)_mask_1.png")
    folders = "--images", "in", "--masks", "in"
    message = refused(*folders)
    assert message.endswith("masks: --set data.mask_suffix=_mask (which finds no mask for 1)")
    message = refused(*folders, "--set", "data.mask_suffix=_mask")
    assert "no mask for 1 of the 31 images in in: benign (7)_mask_1.png" in message
    assert "data.image_" not in message and "data.mask_" not in message
    Path("in/benign (7)_mask_1.png").unlink()
    assert len(stems_of(*folders, "--set", "data.mask_suffix=_mask")) == 30


def test_masks_are_never_proposed_as_images():
    """Where a second mask of an image is in the way, its masks would pair as well, as images."""
    for number in range(10):
        write(f"in/{number}.png")
        write(f"in/{number}_mask.png")
    write("in/3_mask_1.png")
    folders = "--images", "in", "--masks", "in"
    message = refused(*folders)
    assert message.endswith("masks: --set data.mask_suffix=_mask (which finds no mask for 1)")
    assert "data.image_" not in refused(*folders, "--set", "data.mask_suffix=_mask")


def test_names_that_are_one_in_every_folder_explain_nothing():
    """image.png and mask.png have "ma" in common, which tells nothing."""
    for number in range(4):
        write(f"in/{number}/image.png")
        write(f"in/{number}/mask.png")
    folders = "--images", "in", "--masks", "in"
    message = refused(*folders)
    assert "list all pairs in a text file: --set data.list=FILE" in message
    assert "data.image_" not in message and "data.mask_" not in message
    for number in range(4):
        for name in ("image", "mask"):
            Path(f"in/{number}/{name}.png").rename(f"in/{number}/scan_{name}.png")
    (flags,) = proposed_by(refused(*folders))
    assert flags[1::2] == ["data.image_suffix=_image", "data.mask_suffix=_mask"]
    assert stems_of(*folders, *flags) == ["scan_image"] * 4


def test_names_that_do_not_fit_the_settings_are_told():
    for name in ("a", "b"):
        write(f"in/{name}.jpg")
        write(f"masks/{name}_gt.png")
    folders = "--images", "in", "--masks", "masks", "--set"
    message = refused(*folders, "data.mask_suffix=_mask")
    assert "(a_gt.png, b_gt.png) is named *_mask, as data.mask_suffix says" in message
    assert proposed_by(message) == [["--set", "data.mask_suffix=_gt"]]
    for name in ("a", "b"):
        Path(f"masks/{name}_gt.png").rename(f"masks/{name}.png")
    (flags,) = proposed_by(refused(*folders, "data.mask_suffix=_mask"))
    assert flags == ["--set", "data.mask_suffix=null"]
    assert stems_of(*folders, "data.mask_suffix=_mask", *flags) == ["a", "b"]


def test_files_named_otherwise_are_left_out_and_counted():
    for name in ("a_rgb.jpg", "b_rgb.jpg", "a_depth.png"):
        write(f"in/{name}")
    for name in ("a.png", "b.png"):
        write(f"masks/{name}")
    found = pair_folders(Path("in"), Path("masks"), (Names("", "_rgb"), Names()))
    assert found.stems == ["a", "b"]
    assert described(found.left_out) == "1 file without the prefix or suffix (.png)"


def test_names_that_nothing_explains_lead_to_a_list():
    for image, mask in (("cat", "1"), ("dog", "2")):
        write(f"in/{image}.jpg")
        write(f"masks/{mask}.png")
    message = refused("--images", "in", "--masks", "masks")
    assert "or list all pairs in a text file: --set data.list=FILE" in message
    Path("pairs.txt").write_text("in/cat.jpg masks/1.png\nin/dog.jpg masks/2.png\n")
    assert stems_of("--set", "data.list=pairs.txt") == ["cat", "dog"]


def test_one_image_is_no_evidence_of_what_names_have_around_them():
    write("in/cat.jpg")
    write("masks/car.png")
    assert "data.mask_suffix" not in refused("--images", "in", "--masks", "masks")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems know one form only")
def test_unicode_forms_are_one():
    name = "Äpfel é"
    for number in "12":
        write(f"in/{unicodedata.normalize('NFC', name)}{number}.jpg")
        write(f"masks/{unicodedata.normalize('NFD', name)}{number}.png")
    found = pair_folders(Path("in"), Path("masks"))
    assert found.stems == [f"{name}1", f"{name}2"]
    write(f"in/{unicodedata.normalize('NFD', name)}1.jpg")
    with pytest.raises(UserError, match="only the way in which its letters are encoded"):
        pair_folders(Path("in"), Path("masks"))


def test_of_two_files_of_one_name_the_error_says_how_to_take_one():
    for name in ("a", "b"):
        for suffix in (".jpg", ".png"):
            write(f"in/{name}{suffix}")
        write(f"masks/{name}.png")
    folders = "--images", "in", "--masks", "masks"
    message = refused(*folders)
    assert "only the suffix tells it from" in message and "take .jpg only" in message
    (flags,) = proposed_by(message.removesuffix("."))
    _, *sets = datasets(*folders, *flags)
    assert sorted(a.name for each in sets for a, _ in pairs_of(each)) == ["a.jpg", "b.jpg"]


# --- lists --------------------------------------------------------------------------------------

LISTS = {
    "tab": b"in/a b.jpg\tmasks/a b.png\nin/c,d.jpg\tmasks/c,d.png\n",
    "comma": b"# image, mask\nin/x.jpg,masks/x.png\r\n\r\n in/y.jpg , masks/y.png \r\n",
    "blanks": b"in/x.jpg   masks/x.png\nin/y.jpg masks/y.png",
    "quotes": b'"in/x.jpg","masks/x.png"\n"in/y.jpg","masks/y.png"\n',
    "mark": b"\xef\xbb\xbfin/x.jpg masks/x.png\nin/y.jpg masks/y.png\n",
    "wide": "\ufeffin/x.jpg masks/x.png\r\nin/y.jpg masks/y.png\r\n".encode("utf-16-le"),
    "old mac": b"in/x.jpg masks/x.png\rin/y.jpg masks/y.png\r",
    "windows": b"in\\x.jpg\tmasks\\x.png\nin\\y.jpg\tmasks\\y.png\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_pairs_are_read_as_programs_write_them(kind):
    names = ("a b", "c,d") if kind == "tab" else ("x", "y")
    for name in names:
        write(f"deep/in/{name}.jpg")
        write(f"deep/masks/{name}.png")
    Path("deep/pairs.txt").write_bytes(LISTS[kind])
    pairs, stems = listed_pairs(Path("deep/pairs.txt"))
    assert [(a.resolve(), b.resolve()) for a, b in pairs] == [
        (Path(f"deep/in/{n}.jpg").resolve(), Path(f"deep/masks/{n}.png").resolve()) for n in names
    ] or kind == "windows"
    assert all(a.is_file() and b.is_file() for a, b in pairs)
    assert stems == [f"in/{name}" for name in names]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,mask\nx.jpg,y.png", r"line 1: no file image; line 1: no file mask\. .*heading"),
        ("x.jpg y.png\n\nx.jpg y.png z.png", r"line 3: 3 columns, not an image and a mask"),
        ("x.jpg", r"line 1: 1 columns"),
        ("x.jpg y.png\n./x.jpg y.png", r"line 2: \./x\.jpg is in line 1, too"),
        ("x.jpg gone.png", r"line 1: no file gone\.png\. .*paths from the list's folder"),
        ("# nothing\n", r"lists no pairs"),
        ("x\0.jpg y.png", r"is no plain text\. Save it in UTF-8"),
    ],
)
def test_faults_of_lists_are_named_with_their_lines(text, said):
    write("x.jpg")
    write("y.png")
    Path("pairs.txt").write_text(text)
    with pytest.raises(UserError, match=rf"pairs\.txt: {said}"):
        listed_pairs(Path("pairs.txt"))


def test_a_list_that_is_no_file_is_named():
    Path("folder").mkdir()
    for name in ("missing.txt", "folder"):
        with pytest.raises(UserError, match=rf"{name}: .*Name a text file"):
            read_lines(Path(name))
    assert columns("a b\tc") == ["a b", "c"]


TASKS = {
    "saliency": [],
    "segmentation": [*LABELS, "--set", "data.mask_values=threshold"],
    "matting": ["--config", "configs/matting.yaml", "--set", "data.crop_sizes=[32]"],
    "translation": ["--config", "configs/pix2pix.yaml", "--set", "data.direction=BtoA"],
}


@pytest.mark.parametrize("name", TASKS)
def test_lists_train_every_task_of_pairs(name):
    rows = []
    for number in range(6):
        image = write(f"{number}/photo {number}.jpg", 40 * number, (40, 40))
        mask = Image.new("L", (40, 40))
        mask.paste(255, (10, 10, 30, 30))
        mask.save(f"{number}/truth.png")
        rows.append(f"{image}\t{number}/truth.png\n")
    Path("train.txt").write_text("".join(rows[:5]))
    Path("val.txt").write_text(rows[5])
    listed = ["--set", "data.list=train.txt"]
    _, train_set, val_set = datasets(*TASKS[name], *listed, "--set", "data.val_fraction=0.4")
    assert (len(train_set), len(val_set)) == (3, 2)
    assert len(train_set[0]) == 2
    _, train_set, val_set = datasets(*TASKS[name], *listed, "--set", "data.val_list=val.txt")
    assert (len(train_set), len(val_set)) == (5, 1)
    Path("val.txt").write_text("".join(rows[4:]))
    message = refused(*TASKS[name], *listed, "--set", "data.val_list=val.txt")
    assert "1 images are in train.txt, too, which makes scores worthless: photo 4.jpg" in message


def test_a_list_stands_alone():
    write("in/a.jpg")
    both = ["--images", "in", "--masks", "in", "--set", "data.list=x"]
    assert "--data-path, --images and data.list: name one" in refused(*both)
    assert "val_list: goes with list" in refused("--set", "data.val_list=x")
    trimaps = [
        "--config",
        "configs/matting.yaml",
        "--set",
        "data.list=x",
        "--set",
        "data.trimaps=y",
    ]
    assert "trimaps: are those of images held out of `images`" in refused(*trimaps)
    replaced = tasks.without_replaced({"list": "x"}, ("root", "images", "list", "val_list"))
    assert {"data.list", "data.val_list"} <= set(tasks.saliency.DataConfig().folders())  # may move
    assert replaced == {"root": None, "images": None, "val_list": None, "list": "x"}


# --- unequal sizes ------------------------------------------------------------------------------


def unequal_pairs(root, count=6):
    """Pairs of 40×40, but the mask of 3 is smaller, and that of 5 wider; 1 is held out."""
    for number in range(count):
        write(f"{root}/images/{number}.jpg", 40 * number, (40, 40))
        mask = Image.new("L", {3: (20, 20), 5: (50, 40)}.get(number, (40, 40)))
        mask.paste(255, (5, 5, 15, 15))
        mask.save(write(f"{root}/masks/{number}.png"))
    return ["--images", f"{root}/images", "--masks", f"{root}/masks"]


@pytest.mark.parametrize("name", TASKS)
def test_masks_of_another_size_are_refused_left_out_or_resized(name, capsys):
    folders = [*TASKS[name], *unequal_pairs("x"), "--set", "data.val_fraction=0.2"]
    message = refused(*folders)
    both = "--set data.unequal=skip, or scale their masks: --set data.unequal=resize"
    for part in ("3.jpg: 40×40 pixels, but", "has 20×20", "5.jpg: 40", both):
        assert part in message
    _, train_set, val_set = datasets(*folders, "--set", "data.unequal=skip")
    kept = {a.stem for each in (train_set, val_set) for a, _ in pairs_of(each)}
    assert kept == {"0", "1", "2", "4"}
    said = capsys.readouterr().out.splitlines()
    head = "2 of 6 pairs, whose mask has another size than the image, are left out"
    start = next(number for number, line in enumerate(said) if line.startswith(head))
    assert "3.jpg: 40×40, mask 20×20" in said[start + 1] and "5.jpg" in said[start + 2]
    _, train_set, val_set = datasets(*folders, "--set", "data.unequal=resize")
    assert len(train_set) + len(val_set) == 6
    for dataset in (train_set, val_set):
        for index in range(len(dataset)):
            assert len(dataset[index]) == 2
        for image, target in map(dataset.dataset.read, dataset.indices):
            assert image.shape[-2:] == target.shape[-2:] == (40, 40)
            if name == "segmentation":
                assert set(target.unique().tolist()) == {0, 1}  # nothing between two classes


def test_a_mask_that_lies_the_other_way_round_is_not_resized():
    write("x/images/a.jpg", size=(40, 30))
    write("x/masks/a.png", size=(30, 40))
    pair = Path("x/images/a.jpg"), Path("x/masks/a.png")
    for unequal in ("refuse", "resize"):
        with pytest.raises(UserError, match=r"EXIF rotations applied\), but .*30×40") as caught:
            check_pair(pair, unequal)
        assert "=skip" in str(caught.value) and "=resize" not in str(caught.value)
    assert check_pair(pair, "skip") == ((40, 30), (30, 40))


def test_unequal_pairs_are_cached_and_resumed_alike(tmp_path):
    folders = [*unequal_pairs("x"), "--set", f"data.cache_dir={tmp_path / 'cache'}"]
    prints = {}
    for how in ("skip", "resize"):
        sets = [
            datasets(*folders, "--set", f"data.unequal={how}", "--cache", cache)[1]
            for cache in ("none", "disk", "disk")
        ]
        prints[how] = {fingerprint(each) for each in sets}
        assert len(prints[how]) == 1
        for index in range(len(sets[0])):
            for each in sets[1:]:
                parts = [s.dataset.prepared(s.indices[index]) for s in (sets[0], each)]
                assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))
    assert prints["skip"] != prints["resize"]


def test_duts_as_it_is_distributed_trains():
    for part in ("DUTS-TR", "DUTS-TE"):
        unequal_pairs(part)
        Path(part, "images").rename(f"{part}/{part}-Image")
        Path(part, "masks").rename(f"{part}/{part}-Mask")
    _, train_set, val_set = datasets("--data-path", ".")
    assert (len(train_set), len(val_set)) == (4, 4)
    assert "3.jpg: 40×40" in refused("--data-path", ".", "--set", "data.unequal=refuse")


# --- scores -------------------------------------------------------------------------------------


def test_scores_say_how_many_pairs_were_left_out(capsys):
    folders = unequal_pairs("x")
    torch.save(u2net_lite().state_dict(), "lite.pth")
    base = ["--weights", "lite.pth", *SCALAR, "--set", "data.unequal=skip"]
    scores = validation.score_weights(with_launch(validation.parse_args([*base, *folders])))
    assert scores["n"] == 4
    assert "lite.pth: 4 images (2 left out) on 1 process(es)" in capsys.readouterr().out
    rows = [f"x/images/{n}.jpg x/masks/{n}.png\n" for n in (2, 3, 4)]
    Path("test.txt").write_text("".join(rows))
    argv = [*base, "--set", "data.list=test.txt"]
    assert validation.score_weights(with_launch(validation.parse_args(argv)))["n"] == 2


def with_launch(args):
    args.rank, args.world_size, args.local_world_size = 0, 1, 1
    return args


# --- prediction ---------------------------------------------------------------------------------


@needs_links
def test_predict_counts_what_it_left_out_and_fails_for_images_that_it_cannot_do(capsys):
    write("in/a.jpg")
    write("in/b.jpg")
    write("store/c.jpg")
    touch("in/d.heic", "in/b.cr2", "in/clip.mp4", "in/notes.txt", "in/Thumbs.db")
    Path("in/linked").symlink_to("../store", target_is_directory=True)
    Path("in/gone").symlink_to("nowhere", target_is_directory=True)
    Path("in/e.jpg").symlink_to("a.jpg")
    Path("in/circle.jpg").symlink_to("circle.jpg")
    torch.save(u2net_lite().state_dict(), "lite.pth")
    argv = ["in", "--weights", "lite.pth", "--device", "cpu", "--set", "data.image_size=32"]
    assert predict.main(predict.parse_args(argv)) == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == (
        "3 done, 3 failed (1 broken link (gone), 1 image that is not read (.heic: convert to PNG "
        "or JPEG)); left out: 1 file named a second time (e.jpg), 2 other files (.db, .txt), 1 raw "
        "file beside an image of its name (.cr2), 1 video (.mp4: name each to have it done)"
    )
    assert "in/d.heic: pictures of this format are not read. Convert it" in err
    assert "in/gone: a link that leads nowhere" in err
    assert "in/circle.jpg: cannot be read" in err
    assert sorted(path.as_posix() for path in Path("predictions").rglob("*.png")) == [
        "predictions/a.png",
        "predictions/b.png",
        "predictions/linked/c.png",
    ]
    for name in ("in/d.heic", "in/gone", "in/circle.jpg"):
        Path(name).unlink()
    assert predict.main(predict.parse_args(argv)) == 0


@needs_links
def test_patterns_follow_links_and_say_which_folders_they_leave_out():
    for name in ("in/a.png", "in/sub/b.png", "store/c.png"):
        save_image(Image.new("RGB", (4, 4)), Path(name))
    Path("in/link").symlink_to("../store", target_is_directory=True)
    Path("store/back").symlink_to("../in", target_is_directory=True)

    def planned(pattern):
        left_out = {}
        jobs = plan([pattern], Path("out"), ["map"], left_out=left_out)
        return sorted(job.outputs["map"].as_posix() for job in jobs), remarks(left_out)

    everything = ["out/a.png", "out/link/c.png", "out/sub/b.png"]
    assert (
        planned("in/**/*.png")
        == planned("in/**")
        == (
            everything,
            "; left out: 1 folder reached by a second way (back)",
        )
    )
    assert planned("in/*") == (["out/a.png"], "; left out: 2 sub-folders (link, sub)")
    assert planned("in/**/sub/*.png")[0] == ["out/sub/b.png"]


def test_images_beside_each_other_are_halved_as_in_training(capsys):
    """What was trained on files A|B of one shape gets the input's half of such files."""
    for number in range(4):
        both = Image.new("RGB", (96, 32), (10 * number, 0, 0))
        both.paste((0, 0, 200), (48, 0, 96, 32))
        (Path("data")).mkdir(exist_ok=True)
        both.save(f"data/{number}.png")
    recipe = ["--config", "configs/pix2pix.yaml", "--data-path", "data"]
    for direction, colour in (("AtoB", (30, 0, 0)), ("BtoA", (0, 0, 200))):
        task, *_ = datasets(*recipe, "--set", f"data.direction={direction}")
        assert task.cfg.data.pair_aspect == 3
        image = read_image("data/3.png")
        half = task.input_of(image, (32, 96))
        assert half.shape == (3, 32, 48) and half[:, 0, 0].tolist() == list(colour)
        assert task.input_of(image[..., :90], (32, 90)).shape == (3, 32, 90)
    assert "--set data.pair_aspect=0 takes them whole" in capsys.readouterr().out
    whole = task.with_values({"data": {"pair_aspect": 0}})
    assert whole.input_of(image, (32, 96)).shape == (3, 32, 96)
    older = task.with_values({"data": {"pair_aspect": None, "name": "aligned"}})
    assert older.input_of(image, (32, 96)).shape == (3, 32, 96)
    assert older.input_of(image[..., :64], (32, 64)).shape == (3, 32, 32)
    for number in range(4):
        write(f"two/A/{number}.png", size=(64, 32))
        write(f"two/B/{number}.png", 9, size=(64, 32))
    for where in (["--images", "two/A", "--masks", "two/B"], ["--data-path", "two"]):
        task, *_ = datasets(*recipe[:2], *where)
        assert task.input_of(image[..., :64], (32, 64)).shape == (3, 32, 64)


# --- lists of VOC -------------------------------------------------------------------------------

VOC_LISTS = {
    "plain": "im0\nim1\n",
    "suffixes": "im0.jpg\nim1.JPG\n",
    "folders": "JPEGImages/im0.jpg\n/data/VOC2012/JPEGImages/im1.jpg\n",
    "columns": "/JPEGImages/im0.jpg /SegmentationClass/im0.png\n"
    "VOC2012/JPEGImages/im1.jpg\tVOC2012/SegmentationClass/im1.png\n",
    "present": "im0  1\nim1 1\n",
    "old mac": "im0\rim1\r",
}


def voc(text: bytes):
    year = Path("VOC2012")
    for name in ("im0", "im1", "im2", "two words", "two words 1"):
        write(year / "JPEGImages" / f"{name}.jpg")
        write(year / "SegmentationClass" / f"{name}.png")
    folder = year / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "val.txt").write_text("im2\n")
    (folder / "train.txt").write_bytes(text)
    return folder / "train.txt"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", VOC_LISTS)
def test_voc_lists_are_read_as_programs_write_them(kind, encoding):
    voc(VOC_LISTS[kind].encode(encoding))
    pairs, stems = voc_pairs(".", train=True)
    assert stems == ["VOC2012/im0", "VOC2012/im1"]
    assert [(a.name, b.name) for a, b in pairs] == [("im0.jpg", "im0.png"), ("im1.jpg", "im1.png")]


def test_names_with_blanks_in_voc_lists_stay_names():
    voc(b"two words\r\ntwo words 1 \r\n")
    assert voc_pairs(".", train=True)[1] == ["VOC2012/two words", "VOC2012/two words 1"]


def test_photos_without_a_class_are_taken_out_of_a_voc_list_by_the_command_that_is_proposed():
    path = voc(b"im0  1\r\nim1 -1\r\ntwo words 0\r\n")
    with pytest.raises(UserError, match=r"im1 -1: says that a class is not in the photo") as caught:
        voc_pairs(".", train=True)
    command = shlex.split(re.search(r"by (sed .*)\), or", str(caught.value))[1])
    assert command[0] == "sed" and command[-1] == str(path)
    pattern = command[-2].removeprefix("/").removesuffix("/d").replace("[[:space:]]", r"\s")
    kept = [line for line in path.read_text().split("\n") if not re.search(pattern, line)]
    path.write_text("\n".join(kept))
    assert voc_pairs(".", train=True)[1] == ["VOC2012/im0"]


def test_lines_of_a_voc_list_that_name_nothing_are_listed():
    voc(b"im0\nim7.jpg\nim1 im2\n")
    said = r"im7\.jpg \(image\), im7\.jpg \(mask\), im1 im2 .*a line is a name, or the paths"
    with pytest.raises(UserError, match=said):
        voc_pairs(".", train=True)


def test_images_that_validate_and_are_trained_on_are_refused():
    """The same folder, one within the other, links and hard links: all are the same files."""
    for number in range(3):
        write(f"photos/{number}.png"), write(f"masks/{number}.png")
        write(f"own/{number}.png", value=9), write(f"own_masks/{number}.png")
    folders = ["--images", "photos", "--masks", "masks", "--val-masks", "own_masks"]
    datasets(*folders, "--val-images", "own")
    os.link("photos/1.png", "again.png")
    Path("again.png").replace("own/1.png")
    with pytest.raises(UserError, match=r"1 of 3 images .* trained on, too.*own/1\.png"):
        datasets(*folders, "--val-images", "own")
    with pytest.raises(UserError, match=r"3 of 3 images .* leave --val-images"):
        datasets(*folders, "--val-images", "photos")


def test_predictions_are_paired_by_the_names_of_the_masks():
    for number in range(2):
        write(f"maps/{number}.png"), write(f"masks/{number}_mask.png")
    argv = ["--predictions", "maps", "--masks", "masks", "--set", "data.mask_suffix=_mask"]
    args = with_launch(validation.parse_args([*argv, "--device", "cpu"]))
    assert validation.score_files(args)["MAE"] == 0
