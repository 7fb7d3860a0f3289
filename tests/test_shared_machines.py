"""Caches where other users are: what they may not read, replace, cut short or hold up."""

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.segmentation.label_maps import LabelReader
from tasks.segmentation.mask_scan import scan_masks
from train_utils import sample_cache
from train_utils.errors import UserError
from train_utils.sample_cache import SampleCache, open_cache

OTHER = 65534
SHAPES = [[(3, 8, 8), (1, 8, 8)], [(3, 5, 7), (1, 5, 7)]]

two_users = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="acts as two users: needs root"
)
posix = pytest.mark.skipif(os.name != "posix", reason="users, modes and pipes as POSIX has them")
pytestmark = posix


def make(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample behind an item: every value is its number and one."""
    image, mask = (torch.full(shape, number + 1, dtype=torch.uint8) for shape in SHAPES[number])
    return image, mask


def sevens(number: int) -> tuple[torch.Tensor, ...]:
    """What an attacker would have the victim train on."""
    return tuple(torch.full_like(part, 7) for part in make(number))


def never(number: int) -> tuple[torch.Tensor, ...]:
    raise AssertionError("a sample was made again")


def opened(files: list[Path], folder: Path | None, kind: str = "disk") -> SampleCache:
    return open_cache(kind, folder, [0, 1], files, "description", "family", lambda: SHAPES)


def filled(files: list[Path], folder: Path | None, kind: str = "disk") -> SampleCache:
    cache = opened(files, folder, kind)
    assert_right(cache)
    return cache


def assert_right(cache: SampleCache, source: Callable = make) -> None:
    for number in (0, 1):
        for part, expected in zip(cache.get(number, source), make(number), strict=True):
            assert torch.equal(part, expected)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def save(path: Path, values: list[list[int]]) -> Path:
    Image.fromarray(np.array(values, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def files(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    return [tmp_path / "a.png", tmp_path / "b.png"]


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The folder of packs in a shared memory of this test's own."""
    shared = tmp_path / "shm"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(sample_cache, "_SHARED_MEMORY", shared)
    monkeypatch.setattr(sample_cache.atexit, "register", lambda remove: None)
    return shared / f"pixtrain-{os.getuid()}"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "pixtrain"


# --- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "home", "named"])
def test_what_is_kept_is_closed_to_others_whatever_the_umask(files, memory, home, place, tmp_path):
    folder = tmp_path / "named" if place == "named" else None
    before = os.umask(0)
    try:
        cache = filled(files, folder, "ram" if place == "memory" else "disk")
        scan_masks([save(tmp_path / "m.png", [[0, 1]])], LabelReader(2))
    finally:
        os.umask(before)
    assert mode(cache.path.parent) == mode(home / "mask_scans") == 0o700
    kept = [*cache.path.parent.iterdir(), *(home / "mask_scans").iterdir()]
    assert [mode(path) for path in kept] == [0o600] * 3


def link_to_a_folder_of_ours(place: Path) -> None:
    (place.parent / "precious").mkdir()
    place.symlink_to(place.parent / "precious")


def open_to_all(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)


def a_file(place: Path) -> None:
    place.touch()


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


def of_another_user(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.chown(place, OTHER, OTHER)


FOLDERS = {
    link_to_a_folder_of_ours: "a link",
    open_to_all: "everyone may write to it",
    a_file: "no folder",
    a_pipe: "no folder",
    of_another_user: f"belongs to user {OTHER}",
}
FOLDER_CASES = [
    pytest.param(make_it, cause, marks=[two_users] if make_it is of_another_user else [])
    for make_it, cause in FOLDERS.items()
]


@pytest.mark.parametrize(("make_it", "cause"), FOLDER_CASES)
def test_a_folder_in_shared_memory_that_is_not_ours_alone_is_refused(files, memory, make_it, cause):
    make_it(memory)
    with pytest.raises(UserError, match=f"{memory}: {cause}.*rm -r {memory}.*--cache disk"):
        opened(files, None, "ram")
    assert not memory.is_dir() or not list(memory.iterdir())


@pytest.mark.parametrize(("make_it", "cause"), FOLDER_CASES)
def test_a_cache_folder_that_is_not_ours_alone_is_refused(
    files, home, make_it, cause, tmp_path, capsys
):
    home.mkdir(parents=True)
    make_it(home / "samples")
    with pytest.raises(UserError, match=rf"samples: {cause}.*rm -r .*--set data\.cache_dir=DIR"):
        opened(files, None)
    shutil.rmtree(home)
    home.mkdir()
    make_it(home / "mask_scans")
    scan = scan_masks([save(tmp_path / "m.png", [[0, 1]])], LabelReader(2))
    assert scan.class_counts == [1, 1]
    assert f"mask_scans: {cause}" in capsys.readouterr().out
    assert not (home / "mask_scans").is_dir() or not list((home / "mask_scans").iterdir())


def test_a_folder_of_ours_that_others_may_enter_is_closed(files, memory):
    memory.mkdir()
    memory.chmod(0o2775)  # as a volume's fsGroup leaves it
    opened(files, None, "ram")
    assert mode(memory) & 0o077 == 0


@pytest.mark.parametrize("bits", [0o700, 0o755, 0o775])
def test_a_named_folder_of_ours_is_taken_as_it_is(files, tmp_path, bits):
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    folder.chmod(bits)
    link.symlink_to(folder)
    cache = filled(files, link)
    assert mode(folder) == bits
    assert mode(cache.path) == mode(folder / "lock") == 0o600


@pytest.mark.parametrize(
    "bits", [0o1777, pytest.param(0o1755, marks=two_users), pytest.param(0o1777, marks=two_users)]
)
def test_a_named_folder_that_is_not_ours_is_refused_with_one_that_works(files, tmp_path, bits):
    scratch = tmp_path / "my scratch"
    scratch.mkdir()
    if os.geteuid() == 0:
        os.chown(scratch, OTHER, OTHER)
    scratch.chmod(bits)
    with pytest.raises(UserError, match=r"scratch: (belongs to|everyone)") as caught:
        opened(files, scratch)
    assert not list(scratch.iterdir())
    assert "or go without: --cache none" in str(caught.value)
    words = shlex.split(str(caught.value))
    (setting,) = [word for word in words if word.startswith("data.cache_dir=")]
    filled(files, Path(setting.removeprefix("data.cache_dir=").rstrip(",")))


def test_a_file_named_as_the_folder_is_one_clear_error(files):
    with pytest.raises(UserError, match=r"a\.png: no folder; name a folder .* data\.cache_dir=DIR"):
        opened(files, files[0])


@two_users
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_link_of_another_user_is_followed_to_a_folder(files, tmp_path, depth):
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(precious)
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    folder = Path(link, *"ab"[:depth])
    with pytest.raises(UserError, match=f"{link}: a link of user {OTHER}.*rm -r {link}"):
        opened(files, folder)
    scan = scan_masks([save(tmp_path / "m.png", [[0, 1]])], LabelReader(2), folder)
    assert scan.class_counts == [1, 1]
    assert not list(precious.iterdir())


def test_a_cache_folder_behind_links_of_the_users_own_works(files, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "home" / ".cache").symlink_to(tmp_path / "disk")
    filled(files, None)
    scan_masks([save(tmp_path / "m.png", [[0, 1]])], LabelReader(2))
    assert [path.name for path in sorted((tmp_path / "disk/pixtrain").iterdir())] == [
        "mask_scans",
        "samples",
    ]


# --- locks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "another user's"])
def test_a_lock_that_is_no_file_of_ours_is_neither_written_nor_waited_for(files, tmp_path, kind):
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("acts as two users: needs root")
    folder, target = tmp_path / "cache", tmp_path / "target"
    folder.mkdir()
    lock = folder / "lock"
    if kind == "link":
        target.write_text("precious")
    if "link" in kind:
        lock.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.touch()
        os.chown(lock, OTHER, OTHER)
    with pytest.raises(UserError, match=rf"lock: .*rm -r {lock}"):
        opened(files, folder)
    assert target.exists() == (kind == "link")
    assert kind != "link" or target.read_text() == "precious"


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_held_lock_is_named_waited_for_and_given_up(files, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "cache"
    filled(files, folder)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder / "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"held\n"
        monkeypatch.setattr(sample_cache, "_SILENCE", 0)
        monkeypatch.setattr(sample_cache, "_PATIENCE", 0.1)
        with pytest.raises(UserError, match=rf"lock: held for .* by process {process.pid}\. "):
            opened(files, folder)
        waiting = f"waiting for {folder / 'lock'}, held by process {process.pid}"
        assert capsys.readouterr().out.count(waiting) == 1
        monkeypatch.setattr(sample_cache, "_PATIENCE", 60)
        release = threading.Timer(0.1, process.stdin.close)
        release.start()
        assert_right(opened(files, folder), never)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


# --- packs ---------------------------------------------------------------------------------------


def whole_pack_of_sevens(files: list[Path], folder: Path) -> Path:
    cache = opened(files, folder)
    for number in (0, 1):
        cache.get(number, sevens)
    return cache.path


@pytest.mark.parametrize("kind", ["link", "pipe", "hard link", "another user's"])
def test_a_pack_that_is_no_file_of_ours_is_made_again(files, tmp_path, kind, capsys):
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("acts as two users: needs root")
    folder, other = tmp_path / "cache", tmp_path / "other"
    path = whole_pack_of_sevens(files, folder)
    other.write_bytes(b"precious" if kind == "hard link" else path.read_bytes())
    path.unlink()
    if kind == "link":
        path.symlink_to(other)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "hard link":
        path.hardlink_to(other)
    else:
        path.write_bytes(other.read_bytes())
        os.chown(path, OTHER, OTHER)
    before = other.read_bytes()
    capsys.readouterr()
    filled(files, folder)
    assert_right(opened(files, folder), never)
    assert stat.S_ISREG(path.lstat().st_mode)
    assert path.lstat().st_uid == os.geteuid()
    assert other.read_bytes() == before
    assert f"{path}: " in capsys.readouterr().out


def test_a_folder_in_a_packs_place_is_one_clear_error(files, tmp_path):
    path = filled(files, tmp_path / "cache").path
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        opened(files, tmp_path / "cache")


def test_a_pack_of_other_items_is_not_taken_for_ours(files, tmp_path):
    content = whole_pack_of_sevens(files, tmp_path / "cache").read_bytes()
    path = opened(files[::-1], tmp_path / "cache").path
    assert path.stat().st_size == len(content)
    path.write_bytes(content)
    filled(files[::-1], tmp_path / "cache")


def with_header(content: bytes, path: Path, shapes: np.ndarray, size: int | None = None) -> bytes:
    """A pack whose shapes are others, under a header that fits them."""
    start = sample_cache._HEADER.itemsize
    table = shapes.astype("<u4").tobytes()
    crc = zlib.crc32(table, zlib.crc32(path.name.encode()))
    header = np.array([(crc, size or len(content))], sample_cache._HEADER).tobytes()
    return header + table + content[start + len(table) :]


HUGE = np.array([[[2**31, 2**31, 4], [0, 0, 0]], [[3, 5, 7], [1, 5, 7]]])  # 2^64, or 0 in int64
BROKEN = {
    "nothing": lambda content, path: b"",
    "a byte": lambda content, path: content[:1],
    "a header": lambda content, path: content[:16],
    "zeros": lambda content, path: bytes(len(content)),
    "ones": lambda content, path: b"\xff" * len(content),
    "cut": lambda content, path: content[:-1],
    "longer": lambda content, path: content + b"\0",
    "product beyond int64": lambda content, path: with_header(content, path, HUGE),
    "larger than the file": lambda content, path: with_header(content, path, HUGE >> 8),
    "empty": lambda content, path: with_header(content, path, HUGE * 0),
    "size beyond the file": lambda content, path: with_header(content, path, HUGE >> 8, 2**63),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_malformed_pack_is_made_again_with_a_line(files, tmp_path, what, capsys):
    path = filled(files, tmp_path).path
    content = path.read_bytes()
    path.write_bytes(BROKEN[what](content, path))
    capsys.readouterr()
    filled(files, tmp_path)
    assert path.read_bytes() == content
    assert f"{path}: no whole cache of these samples" in capsys.readouterr().out


def test_any_bytes_for_a_pack_are_made_again(files, tmp_path):
    path = filled(files, tmp_path).path
    content = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(content)
        for place in random.integers(0, 96, 3):
            changed[place] = random.integers(256)
        path.write_bytes(changed)
        filled(files, tmp_path)


def test_temporaries_of_others_in_a_named_folder_stay(files, tmp_path):
    folder = tmp_path / "run"
    filled(files, folder)
    pack = next(folder.glob("*.pack"))
    others = [".pixtrain-0123456789abcdef0123456789abcdef.tmp", "x.pack", f"{pack.name}.old"]
    for name in others:
        (folder / name).write_text("precious")
    left_by_a_kill = folder / f"{pack.name}.{'0' * 32}.tmp"
    left_by_a_kill.touch()
    os.mkfifo(folder / f"{pack.name}.{'1' * 32}.tmp")
    os.utime(files[0], ns=(1, 1))
    filled(files, folder)  # another pack, so that what is outdated goes
    assert [(folder / name).read_text() for name in others] == ["precious"] * 3
    assert not left_by_a_kill.exists()


# --- mask scans ----------------------------------------------------------------------------------


def test_a_mask_of_the_same_size_and_time_is_scanned_again(tmp_path):
    path = save(tmp_path / "m.png", [[0, 1, 0, 1]])
    before = path.stat()
    assert scan_masks([path], LabelReader(3), tmp_path / "scans").class_counts == [2, 2, 0]
    save(path, [[0, 2, 0, 2]])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert scan_masks([path], LabelReader(3), tmp_path / "scans").class_counts == [2, 0, 2]


def test_a_scan_is_small_however_many_masks_there_are(tmp_path):
    paths = [save(tmp_path / f"{n}.png", [[0, 1]]) for n in range(30)]
    first = scan_masks(paths, LabelReader(2), tmp_path / "scans")
    (kept,) = (tmp_path / "scans").iterdir()
    assert kept.stat().st_size < 3000
    again = scan_masks(paths, LabelReader(2), tmp_path / "scans")
    assert vars(again) == vars(first)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "another user's", "flipped", "longer"])
def test_a_scan_that_is_not_ours_or_not_whole_is_none(tmp_path, kind):
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("acts as two users: needs root")
    paths, folder = [save(tmp_path / "m.png", [[0, 1, 1]])], tmp_path / "scans"
    scan = scan_masks(paths, LabelReader(2), folder)
    (kept,) = folder.iterdir()
    content = kept.read_bytes()
    target = tmp_path / "target"
    target.write_bytes(content)
    kept.unlink()
    if kind == "link":
        kept.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(kept)
    elif kind == "folder":
        kept.mkdir()
    else:
        changed = bytearray(content)
        changed[-8 if kind != "longer" else slice(0, 0)] = 77 if kind != "longer" else b"\0"
        kept.write_bytes(changed)
        if kind == "another user's":
            os.chown(kept, OTHER, OTHER)
    assert vars(scan_masks(paths, LabelReader(2), folder)) == vars(scan)
    assert target.read_bytes() == content
    assert kind == "folder" or (kept.read_bytes() == content and not kept.is_symlink())


# --- two users -----------------------------------------------------------------------------------


def as_other_user(job: Callable[[], object]) -> str:
    """What a job gives another user: its result or its error as text, or how its process died."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        text = "nothing"
        try:
            signal.alarm(30)
            os.setgroups([])
            os.setgid(OTHER)
            os.setuid(OTHER)
            text = repr(job())
        except BaseException as error:
            text = type(error).__name__
        finally:
            os.write(writing, text.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text or f"signal {os.WTERMSIG(status)}"


@pytest.fixture
def shared():
    """A folder that every user reaches, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@two_users
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_another_user_can_do_nothing_to_a_cache(files, shared, kind, monkeypatch):
    monkeypatch.setattr(sample_cache, "_SHARED_MEMORY", shared)
    monkeypatch.setattr(sample_cache.atexit, "register", lambda remove: None)
    shared.chmod(0o1777)
    if kind == "disk":
        (shared / "named").mkdir()
        (shared / "named").chmod(0o755)
    cache = filled(files, shared / "named", kind)
    pack, lock = cache.path, cache.path.parent / "lock"
    assert as_other_user(lambda: 1) == "1"
    for attack in (
        pack.read_bytes,
        lambda: os.truncate(pack, 0),
        lambda: pack.open("r+b"),
        lambda: lock.open("rb"),  # all that flock needs
        pack.unlink,
        lock.unlink,
        lambda: pack.parent.rename(shared / "away"),
        lambda: (pack.parent / "new").touch(),
    ):
        assert as_other_user(attack) == "PermissionError"
    listed = as_other_user(lambda: list(pack.parent.iterdir()))
    assert kind == "disk" or listed == "PermissionError"
    assert_right(cache, never)


@two_users
def test_what_another_user_has_made_first_is_refused_by_its_victim(files, shared, monkeypatch):
    """The victim is who has no rights: root could read and write through everything."""
    monkeypatch.setattr(sample_cache, "_SHARED_MEMORY", shared)
    for file in files:
        shutil.copy(file, shared)
    theirs = [shared / file.name for file in files]
    place = shared / f"pixtrain-{OTHER}"
    shared.chmod(0o1777)

    def victim() -> str:
        try:
            opened(theirs, None, "ram")
        except UserError as error:
            return str(error)
        return "taken"

    for bits in (0o777, 0o700):
        place.mkdir()
        place.chmod(bits)
        assert "belongs to user 0" in as_other_user(victim)
        assert not list(place.iterdir())
        place.rmdir()
    (shared / "real").mkdir()
    (shared / "real").chmod(0o700)
    os.chown(shared / "real", OTHER, OTHER)
    place.symlink_to(shared / "real")
    assert "a link" in as_other_user(victim)
    assert not list((shared / "real").iterdir())
    place.unlink()
    assert as_other_user(victim) == "'taken'"
