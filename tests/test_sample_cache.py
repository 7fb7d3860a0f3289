"""Packs of decoded samples: the same samples, whatever happens to the pack."""

import errno
import importlib
import os
import pickle
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from my_dataset import PairFolderDataset, ShapesDataset
from tasks.matting.trimaps import TrimapReader
from tasks.translation.data import SideBySideDataset
from train_utils import sample_cache
from train_utils.data import KeyedDataset, SampleKey, collate
from train_utils.datasets import pairs_of
from train_utils.errors import UserError
from train_utils.image_io import read_image, read_mask
from train_utils.prepare_data import cached, without_files
from transforms import (
    MattingTrain,
    SaliencyEval,
    SaliencyTrain,
    SegmentationTrain,
    TranslationEval,
    TranslationTrain,
)

SIZES = [(40, 30), (33, 47), (64, 20), (25, 25)]


@pytest.fixture
def folders(tmp_path):
    for number, size in enumerate(SIZES):
        for name, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / name).mkdir(exist_ok=True)
            picture = np.random.default_rng([number, len(mode)]).integers(0, 256, (*size[::-1], 3))
            picture = Image.fromarray(picture.astype(np.uint8)).convert(mode)
            picture.save(tmp_path / name / f"{number}.png")
    return tmp_path / "images", tmp_path / "masks"


@pytest.fixture
def disk(tmp_path):
    return SimpleNamespace(cache="disk", cache_dir=tmp_path / "cache")


def keyed(dataset, epoch: int = 0) -> list:
    """All samples of an epoch."""
    whole = KeyedDataset(dataset, seed=1)
    return whole.__getitems__([SampleKey(epoch, index) for index in range(len(whole))])


def assert_same(first, second) -> None:
    for one, other in zip(first, second, strict=True):
        assert [type(part) for part in one] == [type(part) for part in other]
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def packs(disk) -> list:
    return sorted(disk.cache_dir.glob("*.pack"))


@contextmanager
def nothing_is_decoded() -> Iterator[None]:
    """A block in which samples come from a pack or not at all."""

    def never(*args, **options):
        raise AssertionError("an image was opened again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", never)
        yield


@pytest.mark.parametrize(
    ("transforms", "read_target"),
    [
        (SaliencyTrain(32, 24), None),
        (SaliencyEval(32), None),
        (SegmentationTrain(32, "letterbox"), None),
        (MattingTrain(16, (16, 24), 3), None),
        (TranslationTrain(16, 20, direction="BtoA"), read_image),
        (TranslationEval(16), read_image),
        (None, None),
    ],
)
def test_samples_are_the_same_with_and_without_a_cache(folders, disk, transforms, read_target):
    how = (transforms, read_target) if read_target else (transforms,)
    plain = PairFolderDataset(*folders, *how)
    dataset = cached(disk, PairFolderDataset(*folders, *how))
    for epoch in (0, 1):  # one that fills the pack, one that reads it
        assert_same(keyed(plain, epoch), keyed(dataset, epoch))
    again = cached(disk, PairFolderDataset(*folders, *how))  # of the next start
    for epoch in (0, 1):
        expected = keyed(plain, epoch)
        with nothing_is_decoded():
            assert_same(expected, keyed(dataset, epoch))
            assert_same(expected, keyed(again, epoch))


def test_side_by_side_files_and_trimaps(folders, disk, tmp_path):
    halves = tmp_path / "halves"
    halves.mkdir()
    Image.effect_noise((40, 20), 90).convert("RGB").save(halves / "a.png")
    for make in (
        lambda: SideBySideDataset(halves, TranslationTrain(8, 9)),
        lambda: matting_pairs(folders, tmp_path),
    ):
        dataset = cached(disk, make())
        keyed(dataset)
        expected = keyed(make())
        with nothing_is_decoded():
            assert_same(expected, keyed(dataset))


def matting_pairs(folders, root) -> PairFolderDataset:
    (root / "trimaps").mkdir(exist_ok=True)
    for number, size in enumerate(SIZES):
        Image.new("L", size, 128).save(root / "trimaps" / f"{number}.png")
    reader = TrimapReader(folders[1], root / "trimaps")
    return PairFolderDataset(*folders, None, reader)


def test_images_decoded_at_a_reduced_size_fit_their_slots(tmp_path, disk):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.effect_noise((101, 67), 60).save(tmp_path / name / "a.jpg")

    def make():
        transforms = SegmentationTrain(16, "letterbox", scale=(1, 1))
        folders = tmp_path / "images", tmp_path / "masks"
        return PairFolderDataset(*folders, transforms, at_least=32)

    dataset = cached(disk, make())
    keyed(dataset)
    expected = keyed(make())
    with nothing_is_decoded():
        assert_same(expected, keyed(dataset))


def test_a_subset_has_slots_for_its_own_items_only(folders, disk):
    dataset = PairFolderDataset(*folders, SaliencyTrain(32, 24))
    part = cached(disk, Subset(dataset, [3, 1]))
    assert_same(keyed(part), keyed(Subset(PairFolderDataset(*folders, dataset.transforms), [3, 1])))
    assert packs(disk)[0].stat().st_size < 3 * 32 * 32 * 4
    assert dataset[0][0].shape == (3, 24, 24)  # no slot, and none needed
    left = cached(disk, without_files(part, [pairs_of(part)[0][0]]))
    assert len(keyed(left)) == 1


def test_a_flipped_bit_anywhere_in_a_pack_changes_no_sample(folders, disk):
    make = lambda: Subset(PairFolderDataset(*folders, SaliencyTrain(32, 24)), [2])  # noqa: E731
    whole = keyed(cached(disk, make()))
    (path,) = packs(disk)
    content = path.read_bytes()
    tables, pixels = range(128), range(128, len(content))
    for offset in (*tables, *random.Random(0).sample(pixels, 16)):
        changed = bytearray(content)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        assert_same(whole, keyed(cached(disk, make())))
        dataset = cached(disk, make())
        with nothing_is_decoded():  # what was damaged has been mended
            assert_same(whole, keyed(dataset))


@pytest.mark.parametrize("kept", [lambda content: content[:-1], lambda content: b""])
def test_a_truncated_pack_is_made_again(folders, disk, kept):
    make = lambda: PairFolderDataset(*folders, SaliencyTrain(32, 24))  # noqa: E731
    whole = keyed(cached(disk, make()))
    (path,) = packs(disk)
    content = path.read_bytes()
    path.write_bytes(kept(content))
    assert_same(whole, keyed(cached(disk, make())))
    assert path.stat().st_size == len(content)


def test_a_process_killed_while_it_writes_leaves_no_wrong_sample(folders, disk, monkeypatch):
    make = lambda: PairFolderDataset(*folders, SaliencyTrain(32, 24))  # noqa: E731
    dataset = cached(disk, make())

    def killed(content):
        raise KeyboardInterrupt  # the bytes are there in part or in whole, the flag is not set

    with monkeypatch.context() as patch:
        patch.setattr(sample_cache, "zlib", SimpleNamespace(crc32=killed))
        with pytest.raises(KeyboardInterrupt):
            dataset[0]
    assert_same(keyed(make()), keyed(cached(disk, make())))


def test_nothing_in_place_reaches_the_pack(folders, disk):
    dataset = cached(disk, PairFolderDataset(*folders))
    first = [part.clone() for part in dataset[0]]
    for _ in range(2):
        for part, kept in zip(dataset[0], first, strict=True):
            assert torch.equal(part, kept)
            part.zero_()


@pytest.mark.parametrize("change", ["file", "size", "transform", "order"])
def test_what_the_items_depend_on_names_the_pack(folders, disk, change):
    old = cached(disk, PairFolderDataset(*folders, SaliencyTrain(32, 24)))
    keyed(old)
    (before,) = packs(disk)
    if change == "file":
        os.utime(folders[1] / "2.png", ns=(1, 1))
    elif change == "size":
        with (folders[0] / "2.png").open("ab") as file:
            file.write(b"\0")
    size = 33 if change == "transform" else 32
    new = PairFolderDataset(*folders, SaliencyTrain(size, 24))
    cached(disk, Subset(new, [1, 0, 2, 3]) if change == "order" else new)
    assert before in packs(disk)  # still in use
    assert len(packs(disk)) == 2
    keyed(old)
    old.cache = None
    os.utime(folders[0] / "0.png", ns=(5, 5))
    newest = cached(disk, PairFolderDataset(*folders, SaliencyTrain(32, 24)))
    assert before not in packs(disk)
    assert newest.cache.path in packs(disk)


def test_augmentation_alone_names_no_new_pack(folders, disk):
    cached(disk, PairFolderDataset(*folders, SaliencyTrain(32, 24)))
    cached(disk, PairFolderDataset(*folders, SaliencyTrain(32, 20, hflip=0.0)))
    assert len(packs(disk)) == 1


def test_training_and_validation_packs_leave_each_other_alone(folders, disk):
    for _ in range(2):
        train = cached(disk, PairFolderDataset(*folders, SaliencyTrain(32, 24)))
        train.cache = None
        val = cached(disk, PairFolderDataset(*folders, SaliencyEval(32)))
        val.cache = None
    assert len(packs(disk)) == 2


def test_a_pickled_dataset_opens_the_pack_again(folders, disk):
    dataset = cached(disk, PairFolderDataset(*folders, SaliencyTrain(32, 24)))
    whole = keyed(dataset)
    other = pickle.loads(pickle.dumps(dataset))
    with nothing_is_decoded():
        assert_same(whole, keyed(other))


def test_workers_fill_one_pack(folders, disk):
    dataset = cached(disk, PairFolderDataset(*folders, SaliencyTrain(32, 24)))
    whole = KeyedDataset(dataset, seed=1)
    keys = [SampleKey(0, index) for index in range(len(dataset))]
    loader = DataLoader(whole, 2, sampler=keys, num_workers=2, collate_fn=collate)
    batches = list(loader)
    with nothing_is_decoded():  # what the workers decoded is here, too
        samples = keyed(dataset)
    for number, batch in enumerate(batches):
        pair = samples[2 * number : 2 * number + 2]
        assert all(torch.equal(a, b) for a, b in zip(batch, collate(pair), strict=True))


def test_many_writers_of_one_slot_agree(folders, disk):
    make = lambda: PairFolderDataset(*folders, SaliencyEval(32))  # noqa: E731
    datasets = [cached(disk, make()) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        items = list(pool.map(lambda dataset: [dataset[0]], datasets))
    for item in items:
        assert_same(item, [make()[0]])


def test_no_room_is_one_clear_error(folders, disk, monkeypatch):
    make = lambda: PairFolderDataset(*folders, SaliencyTrain(32, 24))  # noqa: E731
    monkeypatch.setattr(sample_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    with pytest.raises(
        UserError, match=r"disk: the samples need 16,\d{3} bytes in .* 999 are free"
    ):
        cached(disk, make())
    assert [path.name for path in disk.cache_dir.iterdir()] == ["lock"]

    def full(descriptor, start, count):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        cached(disk, make())
    assert [path.name for path in disk.cache_dir.iterdir()] == ["lock"]


def test_a_folder_that_cannot_be_is_one_clear_error(folders, tmp_path):
    (tmp_path / "file").touch()
    data = SimpleNamespace(cache="disk", cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        cached(data, PairFolderDataset(*folders))


def test_files_that_do_not_fit_together_are_listed(folders, disk):
    for number in (1, 2):
        Image.new("L", (7, 7)).save(folders[1] / f"{number}.png")
    with pytest.raises(UserError, match=r"1\.png.*; .*2\.png"):
        cached(disk, PairFolderDataset(*folders))


def test_embedded_scenes_are_not_cached(disk, caplog):
    scenes = ShapesDataset(64, 0, 2)
    assert cached(disk, scenes) is scenes
    assert not disk.cache_dir.exists()


def test_memory_is_given_back_when_the_last_process_ends(folders, tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr(sample_cache, "_memory_folder", lambda: tmp_path / "memory")
    monkeypatch.setattr(sample_cache.atexit, "register", at_exit.append)
    data = SimpleNamespace(cache="ram", cache_dir=None)
    first, second = (
        cached(data, PairFolderDataset(*folders, SaliencyTrain(32, 24))) for _ in range(2)
    )
    assert first.cache.path == second.cache.path
    at_exit[0]()
    assert first.cache.path.exists()  # the second still uses it
    at_exit[1]()
    assert not first.cache.path.exists()


def test_more_than_the_memory_that_is_left_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_cache, "_memory_folder", lambda: tmp_path / "memory")
    monkeypatch.setattr(sample_cache, "available_memory", lambda: 1000)
    data = SimpleNamespace(cache="ram", cache_dir=None)
    with pytest.raises(UserError, match=r"1,000 are free.*shm-size"):
        cached(data, PairFolderDataset(*folders))


def test_settings_of_readers_tell_packs_apart(folders, disk):
    """Two datasets with one reader of another setting each, and one with the same one."""
    readers = [partial(read_mask_above, threshold=t) for t in (50, 200, 50)]
    pairs = [PairFolderDataset(*folders, None, reader) for reader in readers]
    pairs += [PairFolderDataset(*folders, at_least=size) for size in (8, 12, 8)]
    paths = [cached(disk, dataset).cache.path for dataset in pairs]
    assert paths[0] == paths[2] != paths[1]
    assert paths[3] == paths[5] != paths[4]


def read_mask_above(path, threshold):
    return 255 * (read_mask(path) > threshold).to(torch.uint8)


def test_an_edit_to_a_reader_makes_another_pack(folders, disk, tmp_path, monkeypatch):
    module = tmp_path / "a_reader_of_ones_own.py"
    monkeypatch.syspath_prepend(tmp_path)
    packs_by_code = []
    for code in ("mask", "255 - mask", "mask"):
        module.write_text(f"""
from train_utils.image_io import read_mask
def read(path):
    mask = read_mask(path)
    return {code}
""")
        monkeypatch.delitem(sys.modules, module.stem, raising=False)
        importlib.invalidate_caches()
        reader = importlib.import_module(module.stem).read
        dataset = cached(disk, PairFolderDataset(*folders, None, reader))
        assert_same(keyed(PairFolderDataset(*folders, None, reader)), keyed(dataset))
        packs_by_code.append(dataset.cache.path.name)
    assert packs_by_code[0] == packs_by_code[2] != packs_by_code[1]


def test_a_transform_that_is_more_than_its_parts_is_called_as_a_whole(folders, disk):
    class Inverted(SaliencyTrain):
        def __call__(self, image, mask):
            image, mask = super().__call__(image, mask)
            return 255 - image, mask

    plain, inverted = (
        PairFolderDataset(*folders, transforms=kind(32, 32, hflip=0))
        for kind in (SaliencyTrain, Inverted)
    )
    expected = 255 - plain[0][0]
    assert inverted[0][0].equal(expected)
    for _ in range(2):
        assert cached(disk, inverted)[0][0].equal(expected)


def test_files_of_others_in_the_folder_stay(folders, disk):
    disk.cache_dir.mkdir()
    names = ("notes.tmp", ".hidden.tmp", ".pixtrain-0123.tmp", "my.pack")
    others = [disk.cache_dir / name for name in names]
    for other in others:
        other.write_text("precious")
    cached(disk, PairFolderDataset(*folders))
    assert [other.read_text() for other in others] == ["precious"] * 4
