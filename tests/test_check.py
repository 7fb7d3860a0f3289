"""check.py on a small clean set, and on copies of it with one fault each."""

import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from PIL import Image, ImageCms, ImageDraw, ImageFilter

import check
import tasks
from train_utils.arguments import parse_args
from train_utils.check import data
from train_utils.check.copies import grouped
from train_utils.check.data import check_data
from train_utils.check.duplicates import SAME, SYMMETRIES, alike_pairs, combined, inverse, symmetric
from train_utils.check.first_look import first_look
from train_utils.check.look import count_objects
from train_utils.datasets import pairs_of
from train_utils.errors import UserError
from train_utils.pairing import listed_pairs

WIDTH, HEIGHT, TRAIN, VAL = 120, 90, 18, 8
PAGE = (REPO / "docs" / "check.md").read_text(encoding="utf-8")
UNET = REPO / "configs" / "unet.yaml"
SHAPES = REPO / "configs" / "shapes.yaml"


def scene(number: int) -> tuple[Image.Image, Image.Image]:
    """A textured picture with an object of another texture, and the object's mask."""
    rng = np.random.default_rng(number)

    def texture(cells):
        grid = Image.fromarray(rng.integers(40, 215, (cells, cells, 3), dtype=np.uint8))
        return grid.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)

    mask = Image.new("L", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(mask)
    left, top = rng.integers(12, 50), rng.integers(10, 30)
    corners = [(0, 0), (45, 8), (30, 42), (4, 25)]
    draw.polygon([(left + x, top + y) for x, y in corners], fill=255)
    draw.ellipse([left + 22, top + 4, left + 56, top + 24], fill=255)
    image = texture(7)
    image.paste(texture(12).point(lambda v: 40 + (v + 120) % 216), mask=mask)
    noise = rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)), mask


class Place:
    """A set of pairs in four folders, and what is asked of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.words = root, ["--config", str(SHAPES), "--device", "cpu"]

    def file(self, kind: str, number: int, split: str = "train") -> Path:
        """The path of an image or of a mask."""
        return self.root / split / kind / f"{number:03}.png"

    def edit(self, kind, number, change, split="train"):
        """Have a file replaced by what `change` makes of its picture."""
        path = self.file(kind, number, split)
        with Image.open(path) as picture:
            picture.load()
        change(picture).save(path)

    def all(self, kind, change):
        for number in range(TRAIN):
            self.edit(kind, number, change)

    def arguments(self):
        words = list(self.words)
        for flag, split, kind in (
            ("--images", "train", "images"),
            ("--masks", "train", "masks"),
            ("--val-images", "val", "images"),
            ("--val-masks", "val", "masks"),
        ):
            words += [flag, str(self.root / split / kind)]
        return words

    def findings(self, full=True):
        task = tasks.new_task(check.parse_args(self.arguments()))
        return check_data(task, full)


@pytest.fixture(scope="module")
def clean_folder(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("clean"))
    for split, first, count in (("train", 0, TRAIN), ("val", 100, VAL)):
        for kind in ("images", "masks"):
            (place.root / split / kind).mkdir(parents=True)
        for number in range(count):
            image, mask = scene(first + number)
            image.save(place.file("images", number, split))
            mask.save(place.file("masks", number, split))
    return place.root


@pytest.fixture
def place(clean_folder, tmp_path):
    shutil.copytree(clean_folder, tmp_path / "set")
    return Place(tmp_path / "set")


def classes(place, names="[ground,thing]", values=1):
    """The set as one of class indices."""
    place.words = ["--config", str(UNET), "--device", "cpu", "--set", f"data.class_names={names}"]
    for split, count in (("train", TRAIN), ("val", VAL)):
        for number in range(count):
            place.edit("masks", number, lambda m: m.point(lambda v: values * (v > 0)), split)


def test_a_clean_set_has_no_finding(clean_folder):
    for full in (True, False):
        report = Place(clean_folder).findings(full)
        assert report.findings == []
    assert len(report.pairs) == TRAIN + VAL == len(report.decoded)


def test_a_clean_set_of_classes_has_no_finding(place):
    classes(place)
    report = place.findings()
    assert report.findings == []
    assert report.classes["thing"][1] == TRAIN + VAL
    assert sum(share for share, _ in report.classes.values()) == pytest.approx(1)


# --- faults --------------------------------------------------------------------------------------


def shifted(picture, dx, dy):
    return picture.transform(picture.size, Image.Transform.AFFINE, (1, 0, -dx, 0, 1, -dy))


def mirrored(picture):
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def copy_image(place, change=lambda picture: picture, split="val"):
    """Image 3 of the training set, changed, as number 1 of a split, with its mask changed alike."""
    for kind in ("images", "masks"):
        with Image.open(place.file(kind, 3)) as picture:
            picture.load()
            changed = change(picture.convert("RGB") if kind == "images" else picture)
        changed.save(place.file(kind, 1, split), compress_level=9)


def saved_anew(picture):
    half = picture.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.BICUBIC)
    return half.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def write(path, content):
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def exchanged(place, one, other):
    paths = place.file("masks", one), place.file("masks", other)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[::-1], strict=True):
        path.write_bytes(content)


def moved_on(place, by=1):
    """The masks of all images as those of the next ones."""
    contents = [place.file("masks", number).read_bytes() for number in range(TRAIN)]
    for number in range(TRAIN):
        place.file("masks", number).write_bytes(contents[number - by])


def every_third_inverted(place):
    for number in range(0, TRAIN, 3):
        place.edit("masks", number, lambda m: m.point(lambda v: 255 - v))


def mixed_up(place):
    contents = [place.file("masks", number).read_bytes() for number in range(TRAIN)]
    order = np.random.default_rng(4).permutation(TRAIN)
    for number, other in enumerate(order):
        place.file("masks", number).write_bytes(contents[other])


def turned_photo(place):
    path = place.file("images", 2)
    with Image.open(path) as picture:
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path, exif=exif)


def with_profile(place):
    path = place.file("images", 2)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    with Image.open(path) as picture:
        picture.save(path, icc_profile=profile.tobytes())


def black_by_class(place):
    classes(place, "[ground,thing,never]")


def only_in_validation(place):
    classes(place, "[ground,thing,rare]")
    for number in range(VAL):
        place.edit("masks", number, lambda m: m.point(lambda v: 2 * v), "val")


def beyond(place):
    classes(place)
    place.edit("masks", 5, lambda m: m.point(lambda v: 7 * v))


def of_two_levels(place):
    classes(place, values=255)


def speck(mask):
    small = Image.new("L", mask.size)
    small.paste(255, (60, 40, 65, 45))
    return small


FAULTS = {
    "image without a mask": ("pairs", lambda p: p.file("masks", 2).unlink()),
    "mask without an image": ("left out", lambda p: p.file("images", 2).unlink()),
    "other file": ("left out", lambda p: write(p.root / "train" / "images" / "a.heic", b"x")),
    "cut file": ("unreadable", lambda p: cut(p.file("images", 2))),
    "cut mask": ("unreadable", lambda p: cut(p.file("masks", 2))),
    "empty file": ("unreadable", lambda p: write(p.file("images", 2), b"")),
    "no image": ("unreadable", lambda p: write(p.file("images", 2), b"no image")),
    "unequal size": ("unequal size", lambda p: p.edit("masks", 2, lambda m: m.resize((60, 45)))),
    "turned photo": ("turned", turned_photo),
    "narrow": (
        "narrow",
        lambda p: [p.edit(k, 2, lambda i: i.resize((600, 90))) for k in ("images", "masks")],
    ),
    "tiny image": (
        "tiny image",
        lambda p: [p.edit(k, 2, lambda i: i.resize((12, 9))) for k in ("images", "masks")],
    ),
    "blank image": ("blank image", lambda p: p.edit("images", 2, lambda i: i.point(lambda v: 9))),
    "mask is image": (
        "mask is image",
        lambda p: shutil.copy(p.file("images", 2), p.file("masks", 2)),
    ),
    "empty mask": ("empty mask", lambda p: p.edit("masks", 2, lambda m: m.point(lambda v: 0))),
    "full mask": ("full mask", lambda p: p.edit("masks", 2, lambda m: m.point(lambda v: 255))),
    "no mask has an object": (
        "no object",
        lambda p: p.all("masks", lambda m: m.point(lambda v: 0)),
    ),
    "masks of 0 and 2": (
        "no object",
        lambda p: p.all("masks", lambda m: m.point(lambda v: v and 2)),
    ),
    "one mask inside out": (
        "inside out",
        lambda p: p.edit("masks", 2, lambda m: m.point(lambda v: 255 - v)),
    ),
    "every third mask inside out": ("inside out", every_third_inverted),
    "all masks inside out": (
        "inside out",
        lambda p: p.all("masks", lambda m: m.point(lambda v: 255 - v)),
    ),
    "tiny object": ("tiny object", lambda p: p.edit("masks", 2, speck)),
    "grey levels": (
        "grey levels",
        lambda p: p.all("masks", lambda m: m.filter(ImageFilter.GaussianBlur(3))),
    ),
    "one mask for two": (
        "same mask",
        lambda p: shutil.copy(p.file("masks", 3), p.file("masks", 2)),
    ),
    "the same file in both": (
        "leak",
        lambda p: [shutil.copy(p.file(k, 3), p.file(k, 1, "val")) for k in ("images", "masks")],
    ),
    "the same pixels in both": ("leak", copy_image),
    "mirrored in both": ("leak", partial(copy_image, change=mirrored)),
    "turned in both": (
        "leak",
        partial(copy_image, change=lambda i: i.transpose(Image.Transpose.ROTATE_180)),
    ),
    "saved anew in both": ("leak", partial(copy_image, change=saved_anew)),
    "cut a little in both": (
        "neighbours",
        partial(copy_image, change=lambda i: i.crop((2, 1, WIDTH, HEIGHT)).resize(i.size)),
    ),
    "the same twice in one": ("copies", partial(copy_image, split="train")),
    "one picture, two masks": (
        "contradiction",
        lambda p: shutil.copy(p.file("images", 3), p.file("images", 2)),
    ),
    "one mask shifted": (
        "shifted mask",
        lambda p: p.edit("masks", 17, lambda m: shifted(m, 12, 9)),
    ),
    "one mask mirrored": ("mirrored mask", lambda p: p.edit("masks", 17, mirrored)),
    "two masks exchanged": ("exchanged mask", lambda p: exchanged(p, 0, 13)),
    "all masks shifted": (
        "misplaced masks",
        lambda p: p.all("masks", lambda m: shifted(m, 7, -6)),
    ),
    "all masks mirrored": ("misplaced masks", lambda p: p.all("masks", mirrored)),
    "masks one name off": ("misplaced masks", moved_on),
    "masks mixed up": ("misplaced masks", mixed_up),
    "grey image": ("modes", lambda p: p.edit("images", 2, lambda i: i.convert("L"))),
    "colour profile": ("profile", with_profile),
    "class in no mask": ("missing class", black_by_class),
    "class only in validation": ("missing class", only_in_validation),
    "label beyond the classes": ("unreadable", beyond),
    "0 and 255 as classes": ("refused", of_two_levels),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(place, fault):
    kind, plant = FAULTS[fault]
    plant(place)
    report = place.findings()
    found = [finding.kind for finding in report.findings]
    assert f"`{kind}`" in PAGE
    assert kind in found, [finding.line() for finding in report.findings]


def test_it_says_by_how_many_names_masks_are_off_though_some_are_held_out(place):
    """Those beside a held-out name seem to be off by one less."""
    moved_on(place, by=2)
    place.arguments = lambda: [*place.words, *Place.arguments(place)[4:8]]
    found = [f.message for f in place.findings().findings if f.severity == "error"]
    assert len(found) == 1 and "belong to the images 2 before theirs" in found[0]


def test_masks_of_which_a_few_are_off_alike_are_mixed_up(place):
    contents = [place.file("masks", number).read_bytes() for number in range(TRAIN)]
    for number in range(TRAIN):
        place.file("masks", number).write_bytes(contents[(5 * number + 3) % TRAIN])
    (found,) = place.findings().findings
    assert "mixed up" in found.message


def test_processes_see_what_threads_see(place, monkeypatch):
    cut(place.file("images", 2))
    reports = [place.findings()]
    monkeypatch.setattr(data, "PROCESSES_FROM", 1)
    reports.append(place.findings())
    assert reports[0].to_json() == reports[1].to_json()
    assert [finding.kind for finding in reports[1].findings] == ["unreadable"]


# --- the verdict ---------------------------------------------------------------------------------


def run(place, folder, *more):
    """Exit status of check.py, and its report."""
    failed = check.main(check.parse_args([*place.arguments(), *more, "-o", str(folder)]))
    return failed, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def trained(report):
    """The task and the datasets of the command that a report proposes."""
    program, script, *words = shlex.split(report["command"])
    assert (program, script) == ("python", "train.py")
    task = tasks.new_task(parse_args(words, flags=tasks.train_flags()))
    datasets = task.build_datasets()
    task.prepare_data(*datasets)
    return task, datasets


def test_a_clean_set_is_trained_with_the_words_that_were_given(clean_folder, tmp_path, capsys):
    place = Place(clean_folder)
    place.words += ["--epochs", "3"]
    failed, report = run(place, tmp_path / "out")
    assert not failed and report["findings"] == []
    assert report["command"] == shlex.join(["python", "train.py", *place.arguments()])
    assert report["command"] in capsys.readouterr().out
    assert trained(report)[0].cfg.train.epochs == 3
    for name, count in (("train.txt", TRAIN), ("val.txt", VAL)):
        assert len(listed_pairs(tmp_path / "out" / name)[0]) == count


def test_copies_with_thin_masks_do_not_contradict(place):
    """Lines that are thinner than a pixel of the small pictures that are compared."""

    def thin(picture):
        lines = Image.new("L", picture.size)
        for left in range(10, 100, 9):
            ImageDraw.Draw(lines).line([left, 10, left, 80], 255)
        return lines

    place.edit("masks", 3, thin)
    copy_image(place, mirrored, "train")
    assert [finding.kind for finding in place.findings().findings] == ["copies"]


def test_the_split_keeps_copies_on_one_side_and_the_command_trains_on_it(place, tmp_path):
    copy_image(place, mirrored)
    cut(place.file("images", 5))
    folder = tmp_path / "an out"
    failed, report = run(place, folder, "--full")
    assert failed and "--images" not in report["command"]
    _, datasets = trained(report)
    images = [{image.name for image, _ in dataset.pairs} for dataset in datasets]
    assert [len(each) for each in images] == [TRAIN - 2, VAL]  # without the copy and the damaged
    place.words = shlex.split(report["command"])[2:]
    place.arguments = lambda: place.words
    with pytest.raises(UserError, match="is read, and would be written over"):
        run(place, folder)
    failed, _ = run(place, tmp_path / "again", "--full")
    assert not failed


def test_of_a_held_out_share_alike_images_go_where_the_first_of_them_is(place, tmp_path):
    for number in range(8):  # copies of whatever is held out
        for kind in ("images", "masks"):
            shutil.copy(place.file(kind, number), place.file(kind, number + 100))
    place.arguments = lambda: [*place.words, *Place.arguments(place)[2:-4]][2:]
    _, report = run(place, tmp_path / "out", "--set", "data.val_fraction=0.3")
    _, datasets = trained(report)
    names = [{int(path.stem) % 100 for path, _ in pairs_of(dataset)} for dataset in datasets]
    assert not names[0] & names[1]
    assert sum(map(len, datasets)) == TRAIN + 8


def test_where_no_split_is_left_the_finding_says_so(place, tmp_path):
    """A folder with copies of one picture only, of which a share is held out."""
    for number in range(1, TRAIN):
        for kind in ("images", "masks"):
            shutil.copy(place.file(kind, 0), place.file(kind, number))
    place.arguments = lambda: [*place.words, *Place.arguments(place)[4:8]]
    words = [*place.arguments(), "-o", str(tmp_path / "out")]
    assert check.main(check.parse_args(words)) == 1
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    leak = next(finding for finding in found["findings"] if finding["kind"] == "leak")
    assert "no split was written" in leak["fix"]
    assert leak["examples"][0].endswith(f" = {TRAIN - 3} more")
    assert not (tmp_path / "out" / "train.txt").exists() and "data.list" not in found["command"]


def test_damaged_files_that_are_left_out_are_no_error(place, tmp_path):
    """The setting that the finding proposes mends it, unless nothing would be left."""
    cut(place.file("images", 3))
    place.file("masks", 4).write_bytes(b"")
    skip = ["--set", "data.skip_unreadable=true"]
    failed, report = run(place, tmp_path / "out")
    assert failed and all(skip[1] in finding["fix"] for finding in report["findings"])
    failed, report = run(place, tmp_path / "out", *skip)
    assert not failed and len(report["findings"]) == 2
    assert all("are left out" in finding["fix"] for finding in report["findings"])
    _, datasets = trained(report)
    assert [len(pairs_of(dataset)) for dataset in datasets] == [TRAIN - 2, VAL]
    for number in range(VAL):
        cut(place.file("images", number, "val"))
    assert run(place, tmp_path / "out", *skip)[0]


def test_what_a_refusal_proposes_is_tried_and_goes_into_the_command(place, tmp_path):
    of_two_levels(place)
    failed, report = run(place, tmp_path / "out")
    assert failed and [finding["kind"] for finding in report["findings"]] == ["refused"]
    assert report["classes"]["thing"][1] == TRAIN + VAL
    assert trained(report)[0].cfg.data.mask_values == "threshold"


def test_files_of_others_and_edited_ones_stay(place, tmp_path):
    folder = tmp_path / "out"
    run(place, folder)
    run(place, folder)  # its own files are replaced
    for name in ("train.txt", "report.json"):
        path = folder / name
        written = path.read_text(encoding="utf-8")
        path.write_text(written.replace("000", "001"), encoding="utf-8")
        with pytest.raises(UserError, match="edited since"):
            run(place, folder)
        path.write_text(written, encoding="utf-8")
    elsewhere = tmp_path / "mine.json"
    elsewhere.write_text("{}")
    with pytest.raises(UserError, match="not written by check"):
        run(place, folder, "--json", str(elsewhere))
    with pytest.raises(UserError, match="not a folder"):
        run(place, elsewhere)
    assert elsewhere.read_text() == "{}"


def test_embedded_data_are_not_looked_at(tmp_path, capsys):
    words = ["--config", str(SHAPES), "-o", str(tmp_path / "out")]
    assert check.main(check.parse_args(words)) == 0
    assert "ShapesDataset has no pairs of files to look at" in capsys.readouterr().out


def test_side_by_side_pictures_are_looked_at(tmp_path):
    for split, first, count in (("train", 0, 12), ("val", 30, 4)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for number in range(first, first + count):
            image, _ = scene(number)
            both = Image.new("RGB", (2 * WIDTH, HEIGHT))
            both.paste(image)
            both.paste(image.point(lambda v: 255 - v), (WIDTH, 0))
            both.save(tmp_path / "set" / split / f"{number}.png")
    config = str(REPO / "configs" / "pix2pix_facades.yaml")
    words = [
        "--config",
        config,
        "--data-path",
        str(tmp_path / "set"),
        "--set",
        "data.image_size=64",
    ]
    report = check_data(tasks.new_task(check.parse_args(words)), True)
    assert report.findings == [] and report.statistics["width"].tolist() == [WIDTH] * 16
    image, target = report.read(0, 60)
    assert image.shape == target.shape == (45, 60, 3)


def test_a_training_says_what_sizes_tell(clean_folder):
    place = Place(clean_folder)
    place.words += ["--set", "data.image_size=16"]
    task = tasks.new_task(check.parse_args(place.arguments()))
    first, *_ = found = first_look(task.build_datasets()[0], 16)
    assert [finding.kind for finding in found] == ["image size"]
    assert f"images of {WIDTH} pixels or more, trained on at 16" in first.line()


# --- parts ---------------------------------------------------------------------------------------


def test_symmetries_are_found_and_combine():
    pictures = np.stack([np.asarray(scene(n)[0].convert("L").resize((64, 64))) for n in range(4)])
    for name in SYMMETRIES:
        turned = symmetric(pictures[2], name)
        assert [found[:3] for found in alike_pairs(np.stack([*pictures, turned]))] == [(2, 4, name)]
        assert (symmetric(turned, inverse(name)) == pictures[2]).all()
        for then in SYMMETRIES:
            both = symmetric(turned, then)
            assert (both == symmetric(pictures[2], combined(name, then))).all()


def slices(count):
    """Pictures of one bright outline, each with marks of its own."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 63 - 0.5
    outline = 140.0 * ((x / 0.42) ** 2 + (y / 0.35) ** 2 < 1)
    marks = rng.normal(0, 20, (count, 16, 16)).repeat(4, 1).repeat(4, 2)
    pictures = outline * rng.uniform(0.7, 1, (count, 1, 1)) + marks * (outline > 0)
    return np.clip(pictures + rng.normal(0, 3, pictures.shape), 0, 255).astype(np.uint8)


def test_what_all_pictures_of_a_set_show_makes_none_a_copy():
    """The outline of a body in its scanner, and a camera that stands still before nothing."""
    pictures = slices(30)
    assert alike_pairs(pictures) == []
    pictures[7] = mirror = pictures[3, :, ::-1]
    saved = Image.fromarray(pictures[9]).resize((48, 48)).resize((64, 64))
    pictures[8] = np.asarray(saved)
    found = alike_pairs(pictures)
    assert [(i, j, name) for i, j, name, _ in found] == [(3, 7, "mirrored"), (8, 9, "same")]
    assert all(likeness >= SAME for *_, likeness in found)
    noise = np.random.default_rng(1).normal(0, 2, (12, 64, 64))
    still = np.clip(mirror + noise, 0, 255).astype(np.uint8)
    assert len(alike_pairs(still)) == 12 * 11 // 2


def test_groups_know_how_each_member_is_like_the_first():
    links = {
        (1, 4): ("pixels", "mirrored"),
        (0, 4): ("near", "turned by 90°"),
        (2, 3): ("bytes", "same"),
    }
    first, second = grouped(links)
    assert first[0] == ("bytes", "same") and first[4] == ("near", "turned by 90°")
    assert first[1] == ("near", combined("turned by 90°", "mirrored"))
    assert second == {2: ("bytes", "same"), 3: ("bytes", "same")}


def test_connected_parts_are_counted():
    rows = ["##..#", "....#", ".#.#.", "#...#"]  # corners touch
    objects = np.array([[char == "#" for char in row] for row in rows])
    assert count_objects(objects) == 3
    assert count_objects(np.zeros((3, 3), bool)) == 0
    ring = np.pad(np.zeros((3, 3), bool), 1, constant_values=True)
    assert count_objects(ring) == 1


def test_frames_of_a_film_are_not_mixed_up(shared_data, tmp_path, capsys):
    """The mask of a frame fits its neighbours nearly as well: CamVid has six to validate."""
    words = ["--config", str(REPO / "configs" / "unet_camvid.yaml"), "-o", str(tmp_path / "check")]
    camvid = str(shared_data / "camvid")
    assert check.main(check.parse_args([*words, "--data-path", camvid])) == 0
    assert "misplaced" not in capsys.readouterr().out
