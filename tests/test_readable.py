"""The decode scan before the first step, and pairs with damaged files that are left out."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import on_ranks
from PIL import Image
from torch.utils.data import Subset

import tasks
from my_dataset import PairFolderDataset, ShapesDataset
from tasks.matting.data import CompositionDataset, check_matting_files
from tasks.matting.trimaps import TrimapReader
from tasks.translation.data import SideBySideDataset
from train_utils.datasets import check_pairs, fingerprint, pairs_of
from train_utils.errors import UserError
from train_utils.prepare_data import verify_files, without_files

NOTHING = SimpleNamespace(verify=False, skip_unreadable=False, cache="none")
VERIFY = SimpleNamespace(verify=True, skip_unreadable=False, cache="none")
SKIP = SimpleNamespace(verify=False, skip_unreadable=True, cache="none")  # implies the scan


def write_noise(path: Path, mode: str = "L", size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert(mode).save(path)


def cut(path: Path, share: float = 0.5) -> None:
    """Leave the header and a part of the pixels, so that only decoding finds out."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def make_folders(root: Path, count: int = 6) -> tuple[Path, Path]:
    for number in range(count):
        write_noise(root / "images" / f"{number}.jpg", "RGB")
        write_noise(root / "masks" / f"{number}.png")
    return root / "images", root / "masks"


@pytest.fixture
def damaged(tmp_path):
    """Six pairs; of 1 the image is cut, of 4 the mask, and the image of 5 is empty."""
    images, masks = make_folders(tmp_path)
    cut(images / "1.jpg")
    cut(masks / "4.png")
    (images / "5.jpg").write_bytes(b"")
    return images, masks


def stems(dataset) -> list[str]:
    return [image.stem for image, _ in pairs_of(dataset)]


def refusal(*args) -> str:
    with pytest.raises(UserError) as caught:
        verify_files(*args)
    return str(caught.value)


def test_nothing_is_decoded_unless_asked_for(damaged):
    dataset = PairFolderDataset(*damaged)
    assert verify_files(NOTHING, dataset) == [dataset]


def test_verify_lists_all_damaged_files_of_all_datasets(damaged, tmp_path):
    images, masks = make_folders(tmp_path / "val")
    cut(masks / "0.png")
    check_pairs(PairFolderDataset(images, masks))  # its headers are intact
    train, val = PairFolderDataset(*damaged), PairFolderDataset(images, masks)
    message = refusal(VERIFY, train, val)
    assert message.startswith("4 of 24 files cannot be used: ")
    found = [text.partition(": ")[0] for text in message.partition(": ")[2].split("; ")]
    places = (damaged[0] / "1.jpg", damaged[1] / "4.png", damaged[0] / "5.jpg", masks / "0.png")
    assert found == list(map(str, places))


def test_the_list_is_bounded_and_counts_the_rest(tmp_path):
    images, masks = make_folders(tmp_path, 14)
    for mask in masks.iterdir():
        cut(mask)
    message = refusal(VERIFY, PairFolderDataset(images, masks))
    assert message.startswith("14 of 28 files cannot be used: ")
    assert message.endswith("; and 4 more")
    assert message.count("Replace the file") == 10


def test_verify_reads_as_the_datasets_do(tmp_path):
    images, masks = make_folders(tmp_path, 2)
    Image.new("I;16", (40, 30), 200).save(masks / "0.png")
    assert "0.png: 16-bit pixels of which none exceeds 200" in refusal(
        VERIFY, PairFolderDataset(images, masks)
    )


def test_good_data_pass_unchanged(tmp_path):
    dataset = PairFolderDataset(*make_folders(tmp_path, 2))
    part, scenes = Subset(dataset, [1]), ShapesDataset(16, 0, 2)
    assert verify_files(VERIFY, dataset, part, scenes) == [dataset, part, scenes]
    assert verify_files(SKIP, dataset, part, scenes) == [dataset, part, scenes]


def test_damaged_pairs_are_left_out_counted_and_listed(damaged, capsys):
    dataset = PairFolderDataset(*damaged)
    whole, part = verify_files(SKIP, dataset, Subset(dataset, [5, 4, 3, 0]))
    assert stems(whole) == ["0", "2", "3"]
    assert stems(part) == ["3", "0"]
    check_pairs(whole)
    assert [whole[index][0].shape for index in range(3)] == [(3, 30, 40)] * 3
    log = capsys.readouterr().out
    assert "decoded all 12 files of the data; 3 are damaged" in log
    for name in ("images/1.jpg: ", "masks/4.png: ", "images/5.jpg: the file is empty"):
        assert log.count(name) == 1


def test_the_fingerprint_is_of_what_is_left(damaged, tmp_path):
    (left,) = verify_files(SKIP, PairFolderDataset(*damaged))
    images, masks = (shutil.copytree(x, tmp_path / "copy" / x.name) for x in damaged)
    for stem in (1, 4, 5):
        (images / f"{stem}.jpg").unlink()
        (masks / f"{stem}.png").unlink()
    assert fingerprint(left) == fingerprint(PairFolderDataset(images, masks))
    # A file that breaks while a run is interrupted makes other data, which resuming refuses.
    cut(damaged[0] / "0.jpg")
    (less,) = verify_files(SKIP, PairFolderDataset(*damaged))
    assert fingerprint(less) != fingerprint(left)
    assert fingerprint(less) == fingerprint(without_files(left, [damaged[0] / "0.jpg"]))


def test_only_damage_is_skipped(damaged):
    images, masks = damaged
    Image.new("F", (40, 30)).save(masks / "2.tif")
    (masks / "2.png").unlink()
    (images / "3.jpg").unlink()
    (images / "3.jpg").symlink_to("nowhere")
    message = refusal(SKIP, PairFolderDataset(images, masks))
    assert message.startswith("2 of 12 files cannot be used: ")
    assert "2.tif: 32-bit and float" in message and "3.jpg: no such file" in message


def test_nothing_left_is_refused(tmp_path):
    images, masks = make_folders(tmp_path, 2)
    for image in images.iterdir():
        cut(image)
    message = refusal(SKIP, PairFolderDataset(images, masks))
    assert message.startswith(f"{images}: nothing is left of the 2 pairs to train or to validate")


def test_halves_of_damaged_files(tmp_path):
    for name in "ab":
        write_noise(tmp_path / f"{name}.png", "RGB")
    cut(tmp_path / "a.png")
    (left,) = verify_files(SKIP, SideBySideDataset(tmp_path))
    assert stems(left) == ["b"]
    assert refusal(VERIFY, SideBySideDataset(tmp_path)).startswith("1 of 2 files")


def test_damaged_foregrounds_and_backgrounds(tmp_path):
    images, masks = make_folders(tmp_path, 3)
    for name in "xy":
        write_noise(tmp_path / "backgrounds" / f"{name}.png", "RGB")
    folders = images, masks, tmp_path / "backgrounds"
    before = fingerprint(CompositionDataset(*folders, 2))
    (images / "1.jpg").write_bytes(b"")
    cut(tmp_path / "backgrounds" / "x.png")
    (left,) = verify_files(SKIP, CompositionDataset(*folders, 2))
    assert stems(left) == ["0", "0", "2", "2"]
    assert [path.name for path in left.dataset.backgrounds] == ["y.png"]
    assert fingerprint(left) != before
    check_matting_files(left)
    assert left[0][2].shape == (3, 30, 40)
    cut(tmp_path / "backgrounds" / "y.png")
    dataset = CompositionDataset(*folders, 2)
    assert "nothing is left" in refusal(SKIP, dataset)


def test_a_damaged_trimap_is_refused(tmp_path):
    images, masks = make_folders(tmp_path, 2)
    for number in range(2):
        Image.new("L", (40, 30), 128).save(masks.parent / f"{number}.png")
    cut(tmp_path / "1.png")
    reader = TrimapReader(masks, tmp_path)
    reader.files = {str(number): tmp_path / f"{number}.png" for number in range(2)}
    dataset = PairFolderDataset(images, masks, read_target=reader)
    for asked in (VERIFY, SKIP):
        assert f"{tmp_path / '1.png'}: damaged" in refusal(asked, dataset)


@pytest.mark.parametrize("name", tasks.task_names())
def test_every_task_has_both_settings_off(name):
    data = tasks.load_task(name).Config().data
    assert not data.verify and not data.skip_unreadable


def left_on_this_rank(images: str, masks: str) -> tuple[list[str], str]:
    (left,) = verify_files(SKIP, PairFolderDataset(images, masks))
    return stems(left), fingerprint(left)


@pytest.mark.slow
def test_all_ranks_leave_the_same_out(damaged):
    images, masks = map(str, damaged)
    first, second = on_ranks(2, left_on_this_rank, images, masks)
    assert first[0] == ["0", "2", "3"]
    assert second == first
