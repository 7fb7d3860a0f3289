"""Nothing is lost, and nothing written elsewhere, in folders that others filled or may write to."""

import json
import os
import signal
import stat
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_checkpoint import training_state

import train
from train_utils import run_folder
from train_utils.errors import UserError
from train_utils.files import open_regular, read_regular
from train_utils.image_io import save_image
from train_utils.log import get_logger, say_once
from train_utils.prediction import (
    Job,
    Picture,
    Predictor,
    check_replaceable,
    frame_by_frame,
    remove_frames_after,
)
from train_utils.prediction_files import plan
from train_utils.run_folder import RunFolder, choose_run_folder, newest_best_checkpoint
from train_utils.stop import StopSignals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs links, pipes and owners")
RECORD = {"epoch": 0, "step": 4, "lr": 0.1, "train/loss": 1.0, "val/MAE": 0.5, "img_per_s": 9.0}
OURS = '{"state": "failed", "pid": 1, "time": 1.5}\n'


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say_once.cache_clear()


def tree(folder=".") -> dict[str, object]:
    """Everything below a folder: what it is, and what it holds."""
    found: dict[str, object] = {}
    for path in sorted(Path(folder).rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path)] = (stat.S_IFMT(mode), path.readlink() if path.is_symlink() else content)
    return found


@contextmanager
def started(folder, resume=None, epoch=0):
    """A run in a folder, as train.py starts one."""
    handlers = list(get_logger().handlers)
    try:
        with RunFolder(choose_run_folder(str(folder), resume, "name"), {"a": 1}, epoch) as run:
            yield run
    finally:
        for handler in set(get_logger().handlers) - set(handlers):
            get_logger().removeHandler(handler)
            handler.close()


def fill(folder, **files) -> Path:
    """A folder with files, whose names have a double underline for the point."""
    Path(folder).mkdir(exist_ok=True)
    for name, text in files.items():
        Path(folder, name.replace("__", ".")).write_text(text)
    return Path(folder)


def fill_run(folder="run") -> Path:
    """A run of one epoch that can be continued."""
    metrics = json.dumps(RECORD) + "\n"
    fill(folder, status__json=OURS, metrics__jsonl=metrics, log__txt="begun\n", _pad="")
    Path(folder, "_pad").unlink()
    torch.save(training_state(next_epoch=1, next_step=0), Path(folder, "last.pth"))
    return Path(folder)


# -- folders of others ----------------------------------------------------------------------------

NAMES = (
    *("last.pth", "model_best.pth", "model_0.pth", "model_25.pth", "model_0003.pth", "LAST.PTH"),
    *("metrics.jsonl", "results.txt", "log.txt", "config.yaml", "status.json", ".lock", "samples"),
    *("events.out.tfevents.1.host", "failed_rank0.txt"),
)


@pytest.mark.parametrize("kind", ["file", "link", "pipe", "folder"])
def test_a_new_run_refuses_a_folder_with_any_name_that_it_would_write(kind):
    Path("precious").write_text("precious")
    make = {
        "file": lambda path: path.write_text("precious"),
        "link": lambda path: path.symlink_to("../precious"),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
    }[kind]
    for name in NAMES:
        folder = Path(f"of {name}")
        folder.mkdir()
        make(folder / name)
        before = tree()
        with pytest.raises(UserError) as refusal:
            choose_run_folder(str(folder), None, "name")
        assert name in str(refusal.value) and "--output-dir" in str(refusal.value)
        assert tree() == before


def test_what_no_run_of_ours_has_named_so_stays():
    names = ("model_26_ema.pth", "checkpoint.pth", ".draft.tmp", "failed_rank_notes.txt")
    names += (".pixtrain-1.tmp", "model_.pth", "x" * 200, "photo.jpg")
    for name in names:
        Path("run").mkdir(exist_ok=True)
        Path("run", name).write_text("precious")
    with started("run"):
        pass
    assert all(Path("run", name).read_text() == "precious" for name in names)


def test_a_continued_run_removes_only_regular_files_of_its_own_names():
    folder, hexadecimal = fill_run(), "0" * 32
    removed = ("model_0007.pth", "model_12345.pth", "failed_rank3.txt")
    removed += (f".pixtrain-{hexadecimal}.tmp",)
    kept = ("model_25.pth", "model_00025.pth", "model_0003_ema.pth", "failed_rank_notes.txt")
    kept += (
        f".pixtrain-pack-{hexadecimal}.tmp",
        ".last.pth.tmp",
        "model_٠٠٠٧.pth",
        "failed_rankx.txt",
    )
    for name in (*removed, *kept):
        (folder / name).write_text("x")
    (folder / "model_0008.pth").mkdir()
    (folder / "model_0009.pth").symlink_to("last.pth")
    with started(folder, folder / "last.pth", epoch=1) as run:
        run.save({"n": 1}, numbered=10, keep=1)
    assert not [name for name in removed if (folder / name).exists()]
    assert all((folder / name).read_text() == "x" for name in kept)
    assert (folder / "model_0008.pth").is_dir() and (folder / "model_0009.pth").is_symlink()
    assert json.loads((folder / "metrics.jsonl").read_text()) == RECORD


def test_a_run_s_own_folder_is_known_by_its_status():
    folder = fill_run()
    before = tree()
    with pytest.raises(UserError, match=r"holds a run already.*--resume auto"):
        choose_run_folder("run", None, "name")
    (folder / "last.pth").rename("last.pth")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):  # its record is a run, too
        choose_run_folder("run", None, "name")
    Path("last.pth").rename(folder / "last.pth")
    assert tree() == before
    with started(folder, folder / "last.pth", epoch=1):
        pass

    # A checkpoint among other files is no reason to take them for a run's: it can go elsewhere.
    (folder / "status.json").unlink()
    for path in (folder / ".lock", *folder.glob("events.*"), folder / "config.yaml"):
        path.unlink()
    before = tree("run")
    with pytest.raises(UserError, match=r"log\.txt, metrics\.jsonl, results\.txt, which"):
        choose_run_folder(None, folder / "last.pth", "name")
    assert tree("run") == before
    with started("new", folder / "last.pth", epoch=1):
        assert json.loads(Path("new/metrics.jsonl").read_text()) == RECORD
    Path("alone").mkdir()
    torch.save(training_state(), "alone/last.pth")
    with started("alone", Path("alone/last.pth")):
        pass


@pytest.mark.parametrize("continued", [False, True])
def test_a_start_that_is_killed_anywhere_can_be_started_again(monkeypatch, continued):
    source = fill_run("source")
    torch.save(training_state(next_epoch=1), source / "model_best.pth")
    resume = source / "last.pth" if continued else None

    class Killed(BaseException):
        pass

    def start(folder, kill):
        calls = iter(range(100))

        def reaching(function):
            def call(*args, **more):
                for act in (lambda: None, lambda: function(*args, **more)):
                    act()
                    if next(calls) == kill:
                        raise Killed

            return call

        with monkeypatch.context() as patch:
            for name in ("write_text", "_copy", "_go_back"):
                patch.setattr(run_folder, name, reaching(getattr(run_folder, name)))
            choose_run_folder(str(folder), resume, "name")

    for kill in range(8 if continued else 2):
        folder = Path(f"run{kill}")
        with pytest.raises(Killed):
            start(folder, kill)
        with started(folder, resume, epoch=int(continued)) as run:
            run.log_epoch({**RECORD, "epoch": int(continued)})
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0, 1][: 1 + continued]
        assert (folder / "model_best.pth").exists() == (folder / "last.pth").exists() == continued
    start(Path("whole"), kill + 1)


@pytest.mark.parametrize("name", ["last.pth", "model_best.pth", "metrics.jsonl"])
def test_what_is_in_a_folder_whose_start_failed_is_not_lost(name):
    """Only copies of what the run would copy there itself may be replaced."""
    source = fill_run("source")
    torch.save(training_state(next_epoch=1), source / "model_best.pth")
    status = {**json.loads(OURS), "starting": True}  # as versions before 1.1 marked such a folder
    new = fill("new", status__json=json.dumps(status))
    (new / name).write_text("precious")
    before = tree()
    for resume in (None, source / "last.pth"):
        with pytest.raises(UserError, match=rf"new: holds a run already \({name}\)"):
            choose_run_folder("new", resume, "name")
        assert tree() == before
    (new / name).write_bytes((source / name).read_bytes())
    with pytest.raises(UserError, match="holds a run already"):
        choose_run_folder("new", None, "name")
    with started("new", source / "last.pth", epoch=1):
        assert (new / name).read_bytes() == (source / name).read_bytes()


# -- links, pipes and folders of a run's names ----------------------------------------------------

APPENDED = (".lock", "log.txt", "metrics.jsonl", "results.txt")


def plant(path, kind):
    """Put something at a path that leads a writer elsewhere, or keeps it waiting."""
    path.unlink(missing_ok=True)
    Path("precious").write_text("precious")
    if kind == "link":
        path.symlink_to(Path("precious").absolute())
    elif kind == "hard link":
        path.hardlink_to("precious")
    elif kind == "dangling link":
        path.symlink_to(Path("new").absolute())
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


def test_links_of_the_run_that_is_continued_elsewhere_are_followed():
    source = fill_run("source")
    torch.save(training_state(next_epoch=1), source / "model_0000.pth")
    (source / "model_best.pth").symlink_to("model_0000.pth")
    (source / "metrics.jsonl").rename("records")
    (source / "metrics.jsonl").symlink_to("../records")
    with started("new", source / "last.pth", epoch=1):
        for name in ("model_best.pth", "metrics.jsonl"):
            assert not Path("new", name).is_symlink()
            assert Path("new", name).read_bytes() == (source / name).read_bytes()


def test_a_run_with_hard_links_goes_on_and_leaves_the_other_files_alone():
    """As `cp -al` makes them, before the run or during it."""
    folder, other = fill_run(), Path("other")
    fill(folder, results__txt="epoch: 0\n", _lock="")
    (folder / "_lock").rename(folder / ".lock")
    (folder / ".lock").write_text("1 on host\n")

    def link_all():
        other.mkdir(exist_ok=True)
        for name in APPENDED:
            (other / name).unlink(missing_ok=True)
            (other / name).hardlink_to(folder / name)
        return tree(other)

    before = link_all()
    with started(folder, folder / "last.pth", epoch=1) as run:
        assert tree(other) == before
        run.log_epoch({**RECORD, "epoch": 1})
        assert tree(other) == before
        records = {k: v for k, v in link_all().items() if "log.txt" not in k}
        run.log_epoch({**RECORD, "epoch": 2})
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert {k: v for k, v in tree(other).items() if "log.txt" not in k} == records


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_lines_are_added_to_regular_files_only(kind):
    for name in APPENDED:
        folder = fill_run(f"of {name}")
        plant(folder / name, kind)
        (folder / "model_0009.pth").write_text("x")
        with pytest.raises(UserError, match=rf"{name}: cannot be used \("):
            choose_run_folder(None, folder / "last.pth", "name")
        with pytest.raises(OSError):
            open_regular(folder / name, "a")
        assert (folder / "model_0009.pth").exists() and not Path("new").exists()
    assert Path("precious").read_text() == "precious"


def test_a_link_that_is_put_there_during_the_run_is_not_followed():
    with started("run") as run:
        for name in ("metrics.jsonl", "results.txt"):
            plant(Path("run", name), "link")
            with pytest.raises(UserError, match=rf"{name}: cannot be used \(is a link\)"):
                run.log_epoch(RECORD)
            Path("run", name).unlink()
        Path("elsewhere").mkdir()
        Path("run/samples").symlink_to("../elsewhere")
        with pytest.raises(UserError, match="samples: is a link"):
            run.save_sheet(torch.zeros(3, 4, 4, dtype=torch.uint8), 1)
    assert Path("precious").read_text() == "precious" and not list(Path("elsewhere").iterdir())
    Path("run/metrics.jsonl").unlink(missing_ok=True)
    with pytest.raises(UserError, match="samples: is a link"):
        choose_run_folder("run", None, "name")


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_files_that_are_written_whole_replace_what_is_there_or_are_refused(kind):
    for name in ("config.yaml", "last.pth", "model_best.pth", "model_0001.pth"):
        folder = fill_run(f"of {name}")
        torch.save(training_state(), "source.pth")
        plant(folder / name, kind)
        try:
            resume = Path("source.pth") if name == "last.pth" else folder / "last.pth"
            with started(folder, resume, epoch=1) as run:
                run.save({"n": 1}, best=True, numbered=1, keep=2)
        except UserError as error:
            assert kind == "folder" or name == "last.pth"
            assert name in str(error)
        else:
            assert (folder / name).is_file() and not (folder / name).is_symlink()
    assert Path("precious").read_text() == "precious" and not Path("new").exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_records_and_reasons_that_are_no_files_are_not_read(kind):
    folder = fill_run()
    for name in ("failed_rank0.txt", "status.json"):
        plant(folder / name, kind)
    assert run_folder._launchers_of(folder) == []
    with pytest.raises(UserError, match=r"no status\.json of a run"):
        choose_run_folder("run", None, "name")
    fill_run("other")
    plant(Path("other/metrics.jsonl"), "dangling link" if kind == "link" else kind)
    with pytest.raises(UserError, match=r"other/metrics\.jsonl: cannot be used"):
        choose_run_folder("new", Path("other/last.pth"), "name")


@pytest.mark.parametrize("kind", ["dangling link", "pipe", "folder"])
def test_a_last_checkpoint_that_is_no_file_is_refused_without_waiting(kind):
    folder = fill_run()
    torch.save(training_state(), folder / "model_0003.pth")
    plant(folder / "last.pth", kind)
    plant(folder / "model_best.pth", kind)  # is looked at for what to offer instead
    for options in (["--resume", "auto", "--output-dir", "run"], ["--resume", "run"]):
        with pytest.raises(UserError, match=r"run/last\.pth") as refusal:
            train.main(train.parse_args(["--device", "cpu", *options]))
        if "auto" in options:
            assert "--resume run/model_0003.pth" in str(refusal.value)
    with pytest.raises(UserError, match=r"no run with a model_best\.pth"):
        newest_best_checkpoint(folder)


def test_nobody_can_tell_the_name_of_the_events_beforehand():
    with started("run"):
        pass
    (events,) = Path("run").glob("events.out.tfevents.*")
    assert len(events.suffix) == 1 + 32


# -- what others have written ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"5", b"null", b'"running"', b"[" * 100_000, b"\xff\xfe\x00", b"NaN"),
        *(b'{"launchers": 5}', b'{"state": [], "pid": 1, "time": 1}', b'{"state": "sent"}'),
        *(b'{"state": "failed", "pid": "1", "time": 1}', b'{"a":' * 50_000, b"9" * 200_000),
        *(OURS.encode() + b" " * 1_000_000, b'{"state": "failed", "pid": true, "time": 1}'),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_status_of_others_is_said_and_makes_no_run(content, capsys):
    folder = fill_run()
    (folder / "status.json").write_bytes(content)
    assert run_folder._launchers_of(folder) == []
    assert "run/status.json: is no run's status" in capsys.readouterr().out
    before = tree()
    with pytest.raises(UserError, match=r"holds last\.pth, log\.txt, metrics\.jsonl, status\.json"):
        choose_run_folder("run", None, "name")
    assert tree() == before


def test_launchers_are_texts():
    folder = fill_run()
    status = {**json.loads(OURS), "launchers": ["a", 5, ["b"], None]}
    (folder / "status.json").write_text(json.dumps(status))
    assert run_folder._launchers_of(folder) == ["a"]
    (folder / "status.json").write_text(json.dumps({**status, "launchers": {"a": 1}}))
    assert run_folder._launchers_of(folder) == []


def test_lines_of_metrics_that_are_no_records_are_counted_and_left_out(capsys):
    folder, line = fill_run(), json.dumps(RECORD).encode()
    others = [
        b"[]",
        b"5",
        b"{}",
        b'{"epoch": "0"}',
        b'{"epoch": true}',
        b'{"epoch": 0, "val/a": 1}',
    ]
    others += [b'{"epoch": 0, "lr": 1, "val/a": "x"}', b"[" * 100_000, b"\xff", line[:20]]
    others += [b'{"epoch": 0, "lr": 1, "val/a": 1' + b"0" * 400 + b"}", b"1" * 10_000]
    (folder / "metrics.jsonl").write_bytes(b"\n".join([line, *others]))
    with started(folder, folder / "last.pth", epoch=1):
        assert f"{len(others)} line(s) were no epoch's record" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == line + b"\n"
    assert len((folder / "results.txt").read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_records_of_a_very_long_run_are_kept(capsys):
    folder, line = fill_run(), json.dumps({**RECORD, "val/pad": "x"}).encode()
    (folder / "metrics.jsonl").write_bytes((json.dumps(RECORD).encode() + b"\n") * 250_000)
    assert (folder / "metrics.jsonl").stat().st_size > 20_000_000
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"x" * 2_500_000 + line + b"\n")
    with started("new", folder / "last.pth", epoch=1):
        assert "line(s) were no epoch's record" in capsys.readouterr().out
    assert Path("new/metrics.jsonl").read_bytes().count(b"\n") == 250_000


def test_a_file_is_read_up_to_a_limit():
    Path("a").write_bytes(b"12345")
    assert read_regular(Path("a"), 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(Path("a"), 4)


def test_an_owner_of_a_lock_that_is_none_is_not_shown(monkeypatch):
    class Locks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def lockf(*_):
            raise BlockingIOError(11, "held")

    monkeypatch.setattr(run_folder, "fcntl", Locks)
    fill("run", _lock="")
    for text, shown in (
        ("12 on host-1.x\n", "process 12 on host-1.x"),
        ("1\x1b[2J\n", "another process"),
    ):
        Path("run/.lock").write_text(text)
        with pytest.raises(UserError, match=f"run: {shown} is training"):
            run_folder._lock(Path("run"))


def test_a_second_interrupt_ends_the_process_though_the_status_cannot_be_written(monkeypatch):
    ended, run = threading.Event(), SimpleNamespace(give_up=None)

    def refuse(*_args, **_more):
        raise UserError("status.json: cannot be used")

    run.status = refuse
    before = {
        name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    monkeypatch.setattr("train_utils.stop._TIME_TO_UNWIND", 0)
    monkeypatch.setattr("train_utils.stop.os._exit", lambda _: ended.set())
    try:
        with StopSignals(run, 0) as stop:
            stop._arriving.send(bytes([signal.SIGINT] * 2))
            assert ended.wait(30)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- who may write there --------------------------------------------------------------------------


def test_a_folder_that_others_may_write_to_is_warned_of(capsys):
    Path("above/run").mkdir(parents=True)
    Path("above/run").chmod(0o755)
    for folder, mode, said in (
        *(("above/run", 0o777, True), ("above/run", 0o1777, True), ("above/run", 0o700, False)),
        *(("above", 0o777, True), ("above", 0o1777, False), ("above", 0o755, False)),
    ):
        Path(folder).chmod(mode)
        run_folder._warn_of_others(Path("above/run"))
        assert (f"{Path(folder).absolute()}: others may" in capsys.readouterr().out) == said
    Path("above/run").chmod(0o770)
    alone = Path("above/run").stat().st_gid == os.getuid() != 0
    run_folder._warn_of_others(Path("above/run"))
    assert ("others may" in capsys.readouterr().out) != alone
    if os.getuid() == 0:
        os.chown("above/run", 12345, 12345)
        run_folder._warn_of_others(Path("above/run"))
        assert "belongs to another user (12345)" in capsys.readouterr().out


# -- predictions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder", "link to a map"])
def test_predictions_replace_nothing_but_predictions(kind):
    Image.new("RGB", (8, 8)).save("a.jpg")
    save_image(Image.new("L", (8, 8)), "map.png")
    for name in ("a.png", "a_cutout.png"):
        out = Path(f"of {name}")
        out.mkdir()
        if kind == "link to a map":
            (out / name).symlink_to("../map.png")
        else:
            plant(out / name, kind)
        before = tree()
        with pytest.raises(UserError, match=f"{name}: exists and was not written by predict.py"):
            plan(["a.jpg"], out, ["map", "cutout"])
        assert tree() == before


def test_a_link_to_nowhere_is_no_output_folder():
    Image.new("RGB", (8, 8)).save("a.jpg")
    for target in ("new", "out"):
        Path("out").unlink(missing_ok=True)
        Path("out").symlink_to(target)
        with pytest.raises(UserError, match="out: not a folder"):
            plan(["a.jpg"], Path("out/deep"), ["map"])


def test_what_came_while_others_were_predicted_is_not_replaced(tmp_path):
    check_replaceable(Path("a.png"))
    Image.new("L", (8, 8)).save("a.png")
    with pytest.raises(UserError, match=r"a\.png: exists"):
        check_replaceable(Path("a.png"))


class OneMap:
    """A task whose map is a black picture."""

    def render(self, **_):
        return {"map": Image.new("L", (8, 8))}


@pytest.mark.parametrize(("moved", "affected"), [("out", 4), ("out/deep", 1), ("out/clip", 3)])
def test_a_folder_that_becomes_a_link_during_the_predictions_is_not_followed(
    moved, affected, monkeypatch
):
    """An image, a video of two frames, and the frames that are left of a longer one."""
    monkeypatch.setattr("train_utils.prediction_files.require_ffmpeg", lambda path: None)
    monkeypatch.setattr("train_utils.prediction.read_frames", lambda _: (x for x in (None, None)))
    for name in (
        "in/deep/a.png",
        "in/clip.mp4",
        "elsewhere/000003.png",
        "elsewhere/clip/000003.png",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        save_image(Image.new("RGB", (8, 8)), Path("a.png"))
        Path("a.png").rename(name)
    Path("out/deep").mkdir(parents=True)
    Path("out/clip").mkdir()
    jobs = plan(["in", "in/clip.mp4"], Path("out"), ["map"])
    Path(moved).rename("old")
    Path(moved).symlink_to(Path("elsewhere").absolute())
    before = tree("elsewhere")
    predictor = Predictor(OneMap(), {}, torch.device("cpu"))
    errors = [job.error or predictor.write(Picture(job)).error for job in frame_by_frame(jobs)]
    assert (
        len([error for error in errors if "outside of the folder, by a link" in error]) == affected
    )
    assert tree("elsewhere") == before


def test_a_prediction_that_was_edited_is_not_replaced():
    Image.new("RGB", (8, 8)).save("a.jpg")
    save_image(Image.new("L", (8, 8)), "a.png")
    with Image.open("a.png") as image:
        image.load()
        kept = PngInfo()
        kept.add_text("Software", image.info["Software"])
        image.putpixel((0, 0), 255)
        image.save("a.png", pnginfo=kept)
    with pytest.raises(UserError, match=r"a\.png: exists and was not written by predict\.py"):
        plan(["a.jpg"], Path(), ["map"])


def test_a_shorter_video_removes_no_links():
    save_image(Image.new("L", (2, 2)), "map.png")
    Path("000003.png").symlink_to("map.png")
    remove_frames_after(2, Job(Path("clip.mp4"), {"map": Path("%06d.png")}))
    assert Path("000003.png").is_symlink()
