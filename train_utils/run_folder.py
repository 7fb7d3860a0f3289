"""A run's folder: what is written where, by rank 0 only."""

import errno
import filecmp
import json
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from train_utils.checkpoint import (
    CheckpointWriter,
    load_training_state,
    offer_another,
)
from train_utils.collectives import call_on_main, get_rank, is_main_process, lost_peers
from train_utils.config import dump_yaml
from train_utils.distributed_utils import launcher_ids, mkdir
from train_utils.errors import (
    FREE_DISK,
    FULL_DISK,
    UserError,
    plain_message,
    printable,
    shortened,
    tell,
    typed,
)
from train_utils.files import (
    files_named,
    open_regular,
    read_regular,
    remove_temporaries,
    sync_folder,
    write_text,
    written_whole,
)
from train_utils.image_io import save_image
from train_utils.log import get_logger, log_to_file, say_once

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LAST, BEST = "last.pth", "model_best.pth"
AT_ONCE = "SIGINT, at once"
STATES = ("running", "finished", "stopped", "failed")
_WAIT_FOR_REASONS = 3.0  # seconds that a failing rank may take to say why, on a shared disk

_LOG, _METRICS, _RESULTS, _STATUS = "log.txt", "metrics.jsonl", "results.txt", "status.json"
_LOCK, _SAMPLES = ".lock", "samples"
_NUMBERED = r"model_([0-9]{4}|[1-9][0-9]{4,})\.pth"
_REASON = r"failed_rank[0-9]+\.txt"
# A new run refuses a folder with files of these names, in capitals too, and of similar ones.
_TAKEN = re.compile(
    r"(last|model_(best|[0-9]+))\.pth|metrics\.jsonl|(results|log|failed_rank[0-9]+)\.txt"
    r"|config\.yaml|status\.json|\.lock|samples|events\.out\.tfevents\..*",
    re.IGNORECASE | re.DOTALL,
)
# Bytes; more is nothing that a run writes. A line of metrics.jsonl has hundreds.
_STATUS_SIZE, _METRICS_SIZE, _LINE_SIZE = 1_000_000, 1_000_000_000, 1_000_000


def choose_run_folder(output_dir: str | None, resume: Path | None, config_name: str) -> Path:
    """`output_dir`, or the resumed run's own, or a new runs/<config>/<time>; it is there then.

    Rank 0 chooses for all ranks, whose clocks may differ. Raises UserError for a folder that holds
    another run or cannot be written.
    """

    def prepare() -> str:
        if output_dir:
            path = Path(output_dir)
        else:
            path = resume.parent if resume else _new_folder(Path("runs", config_name))
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}: is not UTF-8, as TensorBoard needs it. Choose another --output-dir."
            ) from error
        resumed = resume if resume and _is_same(path, resume.parent) else None
        copies = {}  # by their new names: records and best checkpoint go on in a new folder
        if resume and not resumed:
            records = {name: resume.parent / name for name in (_METRICS, BEST)}
            copies = {name: file for name, file in records.items() if os.path.lexists(file)}
        if resume and (not resumed or resume.name != LAST):
            copies[LAST] = resume
        _refuse(path, resumed, copies)
        mkdir(path)
        with _file_errors(path):
            _claim(path, resumed, copies)
            for name, source in copies.items():
                _copy(source, path / name, links=True)
            if resume and resume.name != LAST:
                _go_back(path, resume)
        return str(path)

    return Path(call_on_main(prepare))


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """UserError for what the file system refuses to do with a file, or with those of a folder."""
    try:
        yield
    except OSError as error:
        place = Path(os.fsdecode(error.filename2 or error.filename or path))
        place = path if place.name.startswith(".pixtrain-") else place
        remedy = "Remove or mend it, or choose another --output-dir."
        if error.errno in FULL_DISK:
            remedy = FREE_DISK
        raise UserError(f"{place}: cannot be used ({error.strerror}). {remedy}") from error


def _taken(path: Path) -> dict[str, int]:
    """What a folder holds of the names that a run uses, with sizes in bytes."""
    try:
        with os.scandir(path) as entries:
            sizes = {e.name: e.stat(follow_symlinks=False).st_size for e in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        listed = f"cannot be listed ({error.strerror})"
        problem = "is a file, no folder" if path.is_file() else listed
        raise UserError(f"{path}: {problem}. Choose another --output-dir.") from error
    # A start that was killed before it wrote its status leaves an empty lock.
    return {n: size for n, size in sizes.items() if _TAKEN.fullmatch(n) and (n != _LOCK or size)}


def _refuse(path: Path, resumed: Path | None, copies: Mapping[str, Path]) -> None:
    """Raise UserError for a folder with another run, or with files of others under a run's names.

    resumed: the checkpoint there that the run continues from. A folder is a run's if it has a run's
    status.json. copies: what is about to be copied there, by new names; such copies may be there
    already, from a start that was killed.
    """
    taken, status = _taken(path), read_status(path)
    foreign = taken.keys() - {resumed.name if resumed else ""}
    if foreign and not status:
        begun = resumed or path / LAST
        elsewhere = f" To continue {begun} there: --resume {typed(begun)}"
        raise UserError(
            f"{path}: holds {shortened(sorted(foreign))}, which a run would write over or remove, "
            f"and no {_STATUS} of a run: it was left as it is. Choose another --output-dir."
            f"{elsewhere if resumed or LAST in foreign else ''}"
        )
    if resumed:
        return
    run = rf"last\.pth|model_best\.pth|{_NUMBERED}"
    kept = [n for n, size in taken.items() if re.fullmatch(run, n) or (n == _METRICS and size)]
    kept = [n for n in kept if n not in copies or not _is_alike(path / n, copies[n])]
    if kept:
        raise UserError(
            f"{path}: holds a run already ({shortened(sorted(kept))}). Continue it with --resume "
            "auto, or choose another --output-dir."
        )


def _is_alike(path: Path, source: Path) -> bool:
    with suppress(OSError):
        return filecmp.cmp(path, source, shallow=False)
    return False


def _claim(path: Path, resumed: Path | None, copies: Mapping[str, Path]) -> None:
    """Lock a folder, make it known as a run's, and look whether its files can be used.

    Raises UserError for a folder that another run has, and OSError.
    """
    lock = _lock(path)
    _refuse(path, resumed, copies)  # once more: what another run did until it was locked
    for name in (_LOG, _METRICS, _RESULTS):
        if os.path.lexists(path / name):
            _open_to_append(path / name).close()
    _refuse_link(path / _SAMPLES)
    _warn_of_others(path)
    if not resumed or not read_status(path):
        _write_status(path, "running")
    if os.fstat(lock.fileno()).st_nlink == 1:
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        lock.flush()


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path}: is a link. Remove it, or choose another --output-dir.")


def _warn_of_others(path: Path) -> None:
    """Say who else may replace a run's files: users who may write to its folder or rename it."""
    if not hasattr(os, "geteuid"):
        return
    path = Path(os.path.realpath(path))
    if (owner := path.stat().st_uid) != os.geteuid():
        get_logger().warning(
            f"warning: {path}: belongs to another user ({owner}), who could replace the files of "
            "this run. To avoid that, choose another --output-dir."
        )
    for folder in (path, *path.parents):
        about = folder.stat()
        # Many systems give each user a group of the same number, with nobody else in it.
        alone = about.st_gid == about.st_uid != 0
        writable = about.st_mode & (stat.S_IWOTH if alone else stat.S_IWOTH | stat.S_IWGRP)
        if writable and (folder == path or not about.st_mode & stat.S_ISVTX):
            get_logger().warning(
                f"warning: {folder}: others may write there, and so could replace the files of "
                f"this run. To keep them out: chmod go-w {typed(folder)}"
            )
            return


def _copy(source: Path, target: Path, links: bool = False) -> None:
    with open_regular(source, links=links) as content, written_whole(target) as file:
        shutil.copyfileobj(content, file)


def _open_to_append(path: Path) -> IO[str]:
    """Open a record; one with another name (a hard link, by `cp -al`) is parted from that first."""
    if os.path.lexists(path) and path.lstat().st_nlink > 1:
        _copy(path, path)
    return open_regular(path, "a")


def _go_back(path: Path, earlier: Path) -> None:
    """Remove a best checkpoint that is later than the one to continue from."""
    best = path / BEST
    if best.exists() and not _is_same(earlier, best):
        position = load_training_state(earlier)["next_epoch"]
        if load_training_state(best)["next_epoch"] > position:
            get_logger().info(f"removing {best}, from the epochs that are trained again")
            best.unlink()
            sync_folder(path)


def _new_folder(parent: Path) -> Path:
    """Make <parent>/<time>; runs that start within a second get a number."""
    mkdir(parent)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in (stamp, *(f"{stamp}-{number}" for number in range(2, 1000))):
        try:
            (parent / name).mkdir()
        except FileExistsError:
            continue
        except OSError:
            pass  # told by the caller's mkdir
        return parent / name
    raise UserError(f"{parent}: too many runs within a second. Name one with --output-dir.")


_locked_files: list[IO] = []  # kept open: closing a file gives its lock up


def _lock(path: Path) -> IO[str]:
    """Keep others from a run folder for the life of this process; UserError names who has it."""
    file = open_regular(path / _LOCK, "a+", hard_links=True)
    if fcntl is None:
        return file
    try:
        # A record lock, unlike flock, dies with this process even while its loader workers live.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file  # a file system without locks
        file.seek(0)
        owner = file.read(300).strip()
        file.close()
        known = re.fullmatch(r"[0-9]+ on [A-Za-z0-9_.-]+", owner)
        raise UserError(
            f"{path}: {f'process {owner}' if known else 'another process'} is training in this "
            "folder. Wait for it, or choose another --output-dir."
        ) from error
    _locked_files.append(file)
    return file


def find_resume(request: str | None, output_dir: str | None, config_name: str) -> Path | None:
    """The checkpoint that `--resume` means: a file, a run folder, or `auto`.

    `auto` takes `output_dir`'s, or that of the newest run under runs/<config>; where there is none
    yet, it starts anew. Rank 0 looks for all ranks. Raises UserError for a path without checkpoint.
    """
    if request is None:
        return None
    if request != "auto":
        path = Path(request, LAST) if Path(request).is_dir() else Path(request)
        if not path.is_file():
            raise UserError(
                f"--resume {typed(request)}: no checkpoint at {path}. Try --resume auto."
            )
        return path
    newest = call_on_main(lambda: _newest_run(output_dir, config_name))
    return newest and Path(newest)


def _newest_run(output_dir: str | None, config_name: str) -> str | None:
    """The last checkpoint of the run that `--resume auto` means, if there is one."""
    folder = Path(output_dir) if output_dir else Path("runs", config_name)
    runs = [folder] if output_dir else sorted(folder.glob("*/"), key=_last_change, reverse=True)
    for run in runs:
        if os.path.lexists(run / LAST):
            return str(run / LAST)
        if files_named(run, rf"model_best\.pth|{_NUMBERED}"):
            raise UserError(
                f"{run / LAST}: is gone, and a new start would lose the other checkpoints of this "
                f"run. {offer_another(run / LAST)}"
            )
        if not output_dir:
            get_logger().info(f"--resume auto: passing over {run}, which has no {LAST}")
    get_logger().info(f"--resume auto: no {LAST} in {folder} yet, starting a new run")
    return None


def _last_change(run: Path) -> float:
    files = (path for path in (run, run / LAST, run / _STATUS) if path.exists())
    return max(path.stat().st_mtime for path in files)


def restarted_run(request: str | None, output_dir: str | None, config_name: str) -> Path | None:
    """The run folder of an earlier start by the same torchrun, where this is a restart.

    torchrun starts all processes anew after one has failed (--max-restarts) or nodes have come or
    gone, by the first command line: what they find is that their launcher's run is there already.
    """
    launchers = launcher_ids()

    def look() -> str | None:
        if output_dir:
            folders = [Path(output_dir)]
        elif request not in (None, "auto"):
            folders = [Path(request), Path(request).parent]
        else:
            folders = sorted(Path("runs", config_name).glob("*"), reverse=True)
        ours = (path for path in folders if set(launchers) & set(_launchers_of(path)))
        return next(map(str, ours), None)

    found = call_on_main(look) if launchers else None
    if found:
        get_logger().info(f"started again by the same torchrun: continuing {found}")
    return found and Path(found)


def _launchers_of(path: Path) -> list[str]:
    launchers = read_status(path).get("launchers")
    return [x for x in launchers if isinstance(x, str)] if isinstance(launchers, list) else []


def read_status(path: Path) -> dict[str, Any]:
    """What a run has written in its folder's status.json; empty, and said, for anything else."""
    file = path / _STATUS
    try:
        status = json.loads(read_regular(file, _STATUS_SIZE))
        if _is_status(status):
            return status
        problem = "a run writes something else there"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        problem = str(error.strerror)
    except (ValueError, RecursionError):
        problem = "it is no JSON"
    say_once(f"{file}: is no run's status ({problem})")
    return {}


def _is_status(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("state") not in STATES:
        return False
    return type(value.get("pid")) is int and isinstance(value.get("time"), (int, float))


def _write_status(path: Path, state: str, **details: Any) -> None:
    record = {"state": state, "pid": os.getpid(), "time": time.time(), **details}
    with _file_errors(path / _STATUS):
        write_text(path / _STATUS, json.dumps(record) + "\n")


def newest_best_checkpoint(root: Path = Path("runs")) -> Path:
    """The best checkpoint of the newest run; UserError tells how to get one if there is none."""
    found = [path for path in root.glob(f"**/{BEST}") if path.is_file()]
    if not found:
        raise UserError(
            f"{root.resolve()}: no run with a {BEST} yet. Train one with `python train.py` "
            "(6 minutes on two cores), or name a file with --weights."
        )
    return max(found, key=lambda path: path.stat().st_mtime)


class RunFolder:
    """Config, logs, metrics, TensorBoard events, status and checkpoints of one run.

    Every method may be called on all ranks; only rank 0 touches the disk. A run that continues at
    (epoch, step) first loses the records of what it is about to do again, so that no step is
    recorded twice.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], epoch: int = 0, step: int = 0):
        self.path, self.launchers = path, launcher_ids()
        self.writer: Any = None
        self._checkpoints = CheckpointWriter()
        if not is_main_process():
            return
        self.status("running", step=step)
        with _file_errors(path):
            self._forget_reasons()  # of a run that was killed while it failed
            remove_temporaries(path)
            log_to_file(path / _LOG)
            dump_yaml(dict(config), path / "config.yaml")
            self._keep_records_before(epoch)
            # Nobody can tell the name beforehand, and have it be a link to another file.
            suffix = f".{uuid.uuid4().hex}"
            self.writer = SummaryWriter(
                str(path), purge_step=step + 1, flush_secs=30, filename_suffix=suffix
            )

    def _keep_records_before(self, epoch: int) -> None:
        for file in files_named(self.path, _NUMBERED):
            if _epoch_of_file(file) >= epoch:
                get_logger().info(f"removing {file}, from the epochs that are trained again")
                file.unlink()
        file = self.path / _METRICS
        if not os.path.lexists(file):
            return
        unread = 0
        with (
            open_regular(file, limit=_METRICS_SIZE) as lines,
            written_whole(self.path / _RESULTS) as results,
            written_whole(file) as records,
        ):
            while line := lines.readline(_LINE_SIZE):
                record = _parsed(line)
                unread += record is None
                if record and record["epoch"] < epoch:
                    records.write(line.strip() + b"\n")
                    results.write(_result(record).encode(errors="backslashreplace"))
        if unread:
            get_logger().info(f"{file}: {unread} line(s) were no epoch's record, and are left out")

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self.writer is not None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            with suppress(UserError):  # it stops all the same
                self.status("stopped", reason=AT_ONCE)
        elif error is not None and not isinstance(error, SystemExit):
            self._fail(error)
        try:
            self.wait_saved()
        except Exception as unsaved:
            if error is None:
                self._fail(unsaved)
                raise
            get_logger().error(f"failed as well: {plain_message(unsaved)}")
        finally:
            if self.writer:
                with suppress(*([OSError] if error else [])):  # a full disk, told already
                    self.writer.close()

    def _fail(self, error: BaseException) -> None:
        """Write why the run failed; another rank's reason where this one only lost that rank."""
        reason = f"{type(error).__name__}: {plain_message(error)}"[:2000]
        if not is_main_process():
            if not lost_peers(error):
                with suppress(OSError):
                    write_text(self.path / f"failed_rank{get_rank()}.txt", reason)
            return
        deadline = time.monotonic() + _WAIT_FOR_REASONS
        while lost_peers(error) and time.monotonic() < deadline:
            if files := sorted(files_named(self.path, _REASON)):
                reason = "; ".join(f"{file.stem[7:]}: {_read_reason(file)}" for file in files)
                break
            time.sleep(0.05)
        with suppress(OSError):
            self._forget_reasons()
        get_logger().error(f"failed: {reason}")
        with suppress(UserError):  # a full disk, which the reason tells better
            self.status("failed", reason=reason)

    def give_up(self, reason: str) -> NoReturn:
        """Write why and end this process at once, from any thread: its main one may hang."""
        self._fail(UserError(reason))
        tell(f"error (rank {get_rank()}): {reason}")
        os._exit(1)

    def _forget_reasons(self) -> None:
        for file in files_named(self.path, _REASON):
            file.unlink(missing_ok=True)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """A step's values to TensorBoard, under train/."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"train/{name}", value, step)

    def log_epoch(self, record: Mapping[str, Any]) -> None:
        """One epoch's object to metrics.jsonl, results.txt and TensorBoard.

        Its train/ values, means over the epoch, are epoch/ ones in TensorBoard, which has those of
        the steps under train/.
        """
        if not self.writer:
            return
        lines = {_METRICS: json.dumps(record) + "\n", _RESULTS: _result(record)}
        for name, line in lines.items():
            with _file_errors(self.path / name), _open_to_append(self.path / name) as file:
                file.write(line)
        for name, value in record.items():
            if "/" in name or name == "img_per_s":
                tag = name.replace("train/", "epoch/")
                self.writer.add_scalar(tag, value, record["step"])
        self.writer.flush()

    def log_evaluation(
        self, sheet: Tensor, curves: Mapping[str, Mapping[str, Tensor]], step: int
    ) -> None:
        """To TensorBoard: a uint8 picture [3, H, W], and precision–recall curves by tag.

        A curve holds the arguments of TensorBoard's raw curve.
        """
        if self.writer:
            self.writer.add_image("val/sheet", sheet, step)
            for tag, curve in curves.items():
                thresholds = len(curve["precision"])
                self.writer.add_pr_curve_raw(
                    tag, **curve, global_step=step, num_thresholds=thresholds
                )

    def save_sheet(self, picture: Tensor, step: int) -> None:
        """A uint8 picture [3, H, W] as samples/step_<step>.png."""
        if self.writer:
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            _refuse_link(self.path / _SAMPLES)
            save_image(image, self.path / _SAMPLES / f"step_{step:07d}.png")

    def save(
        self,
        state: Mapping[str, Any],
        best: bool = False,
        numbered: int | None = None,
        keep: int = 0,
        keep_every: int = 0,
    ) -> None:
        """Write last.pth, and the same file as model_best.pth and model_<epoch>.pth where asked.

        Of the numbered files the newest `keep` stay, and those of every `keep_every`-th epoch.
        Returns when `state` may change; `wait_saved` when the files are there. Either raises
        UserError if they, or those of the last call, could not be written.
        """
        if not is_main_process():
            return

        def stays(epoch: int) -> bool:
            return keep_every > 0 and (epoch + 1) % keep_every == 0

        links = [self.path / BEST] if best else []
        if numbered is not None and (keep > 0 or stays(numbered)):
            links.append(self.path / f"model_{numbered:04d}.pth")

        def prune() -> None:
            if numbered is None:
                return
            files = sorted(files_named(self.path, _NUMBERED), key=_epoch_of_file)
            passing = [file for file in files if not stays(_epoch_of_file(file))]
            with _file_errors(self.path):
                for old in passing[: -keep or None]:
                    old.unlink(missing_ok=True)

        self.writer.flush()  # what the checkpoint will not do again must be on the disk
        self._checkpoints.submit(state, self.path / LAST, tuple(links), prune)

    def wait_saved(self) -> None:
        """Return when the checkpoint that was saved last is on the disk; UserError if it failed."""
        self._checkpoints.wait()

    def status(self, state: str, **details: Any) -> None:
        """Write status.json: running, finished, stopped or failed, and why."""
        if is_main_process():
            details |= {"launchers": self.launchers} if self.launchers else {}
            _write_status(self.path, state, **details)


def _epoch_of_file(path: Path) -> int:
    return int(path.stem.partition("_")[2])


def _read_reason(file: Path) -> str:
    try:
        return read_regular(file, 10_000).decode(errors="replace")
    except OSError as error:
        return str(error.strerror)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An epoch's record; None for half a line, from a kill, and for what no run has written."""
    try:
        record = json.loads(line)
        _result(record)
        return record if type(record["epoch"]) is int else None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


def _result(record: Mapping[str, Any]) -> str:
    """An evaluated epoch's line of results.txt; empty for other epochs."""
    if not any(name.startswith("val/") for name in record):
        return ""
    figures = {name: value for name, value in record.items() if name.startswith(("train/", "val/"))}
    text = "  ".join(f"{name}: {value:.5f}" for name, value in figures.items())
    return printable(f"epoch: {record['epoch']}  {text}  lr: {record['lr']:.6g}") + "\n"


def contact_sheet(rows: list[list[Tensor]], size: int = 160) -> Tensor:
    """Images row by row, e.g. input | truth | prediction, as one uint8 picture [3, H, W].

    Each is [1 or 3, h, w], uint8 or float in [0, 1], and is fitted into a white square.
    """
    squares = [_fitted(image, size) for row in rows for image in row]
    return make_grid(squares, nrow=len(rows[0]), padding=4, pad_value=255)


def _fitted(image: Tensor, size: int) -> Tensor:
    image = F.to_dtype(image, torch.float32, scale=True).clamp(0, 1)
    scale = size / max(image.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
    image = F.resize(image.expand(3, -1, -1), [height, width], antialias=True)
    left, top = (size - width) // 2, (size - height) // 2
    edges = [left, top, size - width - left, size - height - top]
    return F.pad((image * 255).round().byte(), edges, fill=255)
