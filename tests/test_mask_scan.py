"""What masks hold is counted before the first step, and masks that teach nothing are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_refusals import refused

import tasks
import train
import validation
from train_utils import init_distributed_mode
from train_utils.datasets import PairDataset
from train_utils.errors import UserError
from train_utils.image_io import MASK_RULES, MaskReader
from train_utils.mask_scan import GreyScan, check_grey_masks, scan_grey_masks

DISC = np.where((np.indices((16, 16)) - 7.5).__pow__(2).sum(0) < 30, 255, 0).astype(np.uint8)
INSIDE = int((DISC > 0).sum())
READER = MaskReader()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save(name: str, image) -> Path:
    path = Path("masks", name)
    path.parent.mkdir(exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(np.uint8(image))).save(path)
    return path


def with_alpha(alpha) -> Image.Image:
    photo = np.random.default_rng(0).integers(0, 200, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(photo)
    image.putalpha(Image.fromarray(np.uint8(alpha)))
    return image


def dataset(*masks: Path) -> PairDataset:
    return PairDataset([(mask, mask) for mask in masks], [mask.stem for mask in masks])


def check(*masks: Path, reader: MaskReader = READER, train: bool = True) -> None:
    sets = (dataset(*masks), dataset(*masks)) if train else (None, dataset(*masks))
    check_grey_masks(*sets, reader, "Cut at {level}.")


def test_counts(capsys, caplog):
    coloured = Image.fromarray(np.uint8([[(200, 0, 0)] * 16] * 16))
    palette = Image.fromarray(DISC // 255, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    masks = [save("a.png", DISC), save("b.png", DISC * 0), save("c.png", DISC // 255 * 38)]
    masks += [save("d.png", with_alpha(DISC)), save("e.png", coloured), save("f.png", palette)]
    scan = scan_grey_masks(masks, MaskReader())
    assert (scan.files, scan.pixels, scan.object) == (6, 6 * 256, 3 * INSIDE)
    assert (scan.empty, scan.dark) == (3, 2)  # red is 60 of 255
    once = ("alpha", "colours", "coloured palette")
    assert scan.rules == {rule: int(rule in once) for rule in MASK_RULES}
    assert scan.histogram[38] == INSIDE and scan.histogram[60] == 256
    check(*masks)
    text = capsys.readouterr().out + caplog.text
    assert "training masks: 6 files, 17.19% of the pixels are object, 3 files hold none" in text
    for remark in (
        "1 of 6 masks are black",
        "2 hold nothing from 128 of 255 on, but are not black",
        "few and dark grey levels: 0 (",
        "of 1 the alpha channel is taken as the mask",
        "1 hold colours, of which the luminance is taken",
        "1 are palettes of colours: all but index 0 is the object",
    ):
        assert remark in text
    assert "warning: training masks" in text and "warning: validation masks" in text


def test_soft_masks_and_plain_ones_are_not_warned_of(capsys, caplog):
    ramp = np.arange(256).reshape(16, 16)
    check(save("a.png", DISC), save("b.png", ramp))
    assert "warning" not in capsys.readouterr().out + caplog.text


@pytest.mark.parametrize(
    ("levels", "cut"), [((2,), 1), ((38, 75), 1), ((76,), 1), (range(2, 120), 59)]
)
def test_masks_without_an_object_are_refused_with_a_level_to_cut_at(levels, cut):
    masks = [save(f"{level}.png", DISC // 255 * level) for level in levels]
    for training in (True, False):
        with pytest.raises(UserError, match=rf"^masks: no mask holds an object.* Cut at {cut}\."):
            check(*masks, train=training)
    check(*masks, reader=MaskReader(threshold=cut))


def test_class_codes_of_which_some_files_hold_1_only_are_refused():
    masks = [save("a.png", DISC // 255), save("b.png", DISC // 255 * 2)]
    with pytest.raises(UserError, match=r"1 masks hold 0 and 1 only.* 1 others.* Cut at 1\."):
        check(*masks)
    check(masks[0])
    check(*masks, reader=MaskReader(threshold=1))


def test_masks_that_are_all_black_or_all_object():
    black, white = save("a.png", DISC * 0), save("b.png", DISC * 0 + 255)
    with pytest.raises(UserError, match=r"masks: all masks are black\. Check that these are"):
        check(black)
    with pytest.raises(UserError, match=r"masks: all masks are black"):
        check(black, train=False)
    with pytest.raises(UserError, match="all pixels of all masks are object"):
        check(white)
    with pytest.raises(UserError, match="all pixels of all masks are object"):
        check(save("d.png", [[1, 2]]), reader=MaskReader(threshold=1))
    hidden = save("c.png", with_alpha(DISC * 0))
    with pytest.raises(UserError, match=r"all masks are black.* Or set data\.mask_channel=lum"):
        check(hidden)


def test_a_few_that_are_held_out_may_be_black_or_full(capsys, caplog):
    mixed = dataset(save("a.png", DISC), save("b.png", DISC * 0), save("c.png", DISC * 0 + 255))
    for name, remark in (("b", "all masks are black"), ("c", "all pixels of all masks are obj")):
        check_grey_masks(mixed, dataset(Path(f"masks/{name}.png")), MaskReader(), "")
        assert f"warning: validation masks: {remark}" in caplog.text.replace(
            "1 of 1 masks are black; ", ""
        )
    check(Path("masks/c.png"), train=False)


def test_alpha_here_and_opaque_there_is_refused():
    masks = [save("a.png", with_alpha(DISC)), save("b.png", with_alpha(DISC * 0 + 255))]
    with pytest.raises(UserError, match=r"of 1 masks the alpha.* of 1 others it is opaque.*=alpha"):
        check(*masks)
    check(*masks, reader=MaskReader("alpha"))
    folders(with_alpha(DISC), 6)
    for number in (0, 2, 4):
        save(f"{number}.png", with_alpha(DISC * 0 + 255))
    for name in ("a", "b"):
        Path(f"masks/{name}.png").unlink()
    data = {"images": "images", "masks": "masks", "class_names": ["no", "yes"]}
    data |= {"mask_values": "threshold"}
    with pytest.raises(UserError, match=r"masks the alpha channel varies.* others it is opaque"):
        prepared({"task": "segmentation", "data": data})
    prepared({"task": "segmentation", "data": data | {"mask_channel": "alpha"}})


def test_the_counts_are_kept_for_this_reader_and_these_files(monkeypatch):
    masks, read = [save("a.png", DISC), save("b.png", DISC * 0)], []
    measure = GreyScan.measure

    def counting(path, reader):
        read.append(path)
        return measure(path, reader)

    monkeypatch.setattr(GreyScan, "measure", staticmethod(counting))
    scans = [vars(scan_grey_masks(masks, MaskReader())) for _ in range(2)]
    assert read == masks and scans[0] == scans[1]
    scan_grey_masks(masks, MaskReader(threshold=1))
    assert len(read) == 4
    save("b.png", DISC)
    assert scan_grey_masks(masks, MaskReader()).empty == 0 and len(read) == 6
    (Path("masks") / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 2 masks cannot.*b\.png: the file is empty"):
        scan_grey_masks(masks, MaskReader())


def folders(mask, count: int = 3) -> tuple[str, ...]:
    for folder in ("images", "masks"):
        Path(folder).mkdir(exist_ok=True)
    for number in range(count):
        Image.effect_noise((16, 16), 50).convert("RGB").save(f"images/{number}.jpg")
        save(f"{number}.png", mask)
    return "--images", "images", "--masks", "masks"


def prepared(recipe: dict) -> None:
    task = tasks.read_config(recipe, "recipe", {})
    task.prepare_data(*task.build_datasets())


@pytest.mark.parametrize("task", ["saliency", "matting"])
def test_dark_masks_are_refused_before_the_first_step(task):
    argv = folders(DISC // 255 * 2)
    fix = "--set data.mask_threshold=1" if task == "saliency" else "levels from 0 to 255"
    config = () if task == "saliency" else ("--config", "matting.yaml")
    Path("matting.yaml").write_text("task: matting\n")
    message = refused(train, *argv, *config)
    assert "masks: no mask holds an object" in message and fix in message
    if task == "saliency":
        data = {"images": "images", "masks": "masks", "mask_threshold": 1}
        prepared({"task": task, "data": data})


@pytest.mark.parametrize("task", ["saliency", "matting"])
def test_every_reader_takes_alpha(task):
    """Of ready images and of foregrounds, with trimaps and without."""
    folders(with_alpha(DISC))
    data = {"images": "images", "masks": "masks"}
    kinds = [data, {"foregrounds": "images", "alphas": "masks", "backgrounds": "images"}]
    if task == "matting":
        Path("trimaps").mkdir()
        for number in range(3):
            Image.fromarray(DISC).save(f"trimaps/{number}.png")
        kinds += [data | {"trimaps": "trimaps"}]
    for given in kinds if task == "matting" else [data]:
        made = tasks.read_config({"task": task, "data": given}, "recipe", {})
        train_set, val_set = made.build_datasets()
        made.prepare_data(train_set, val_set)
        full = getattr(val_set, "dataset", val_set)
        assert np.array_equal(full.read_target(Path("masks/0.png"))[0], DISC)
        given |= {"mask_channel": "luminance"}
        made = tasks.read_config({"task": task, "data": given}, "recipe", {})
        full = getattr(made.build_datasets()[1], "dataset", None)
        assert full.read_target(Path("masks/0.png"))[0].max() < 210


def test_predictions_and_masks_in_alpha_are_scored_by_it():
    """Cut-outs against cut-outs: no error, though their luminance differs."""
    folders(with_alpha(DISC))
    shutil.copytree("masks", "maps")
    argv = ("--predictions", "maps", "--masks", "masks", "--json", "s.json", "--device", "cpu")
    args = validation.parse_args([*argv])
    init_distributed_mode(args)
    validation.main(args)
    assert json.loads(Path("s.json").read_text())["MAE"] == 0
    folders(DISC * 0)
    message = refused(validation, "--predictions", "maps", "--masks", "masks", "--device", "cpu")
    assert "masks: all masks are black" in message
