"""Hostile files through the scripts: each is used or refused, within bounds, and nothing is lost.

    python tests/soak_hostile.py --count 10000
    python tests/soak_hostile.py --kinds weights recipe --seed 7

Every trial makes a folder of its own, with weights, recipes, videos, run folders, caches, images or
names that are damaged, swollen or laid as traps, and runs a script on it in a forked process. A
trial is wrong if the script ends by anything but its exit codes, shows a traceback, prints control
characters or a forged line, takes more than 5 seconds of CPU or 300 MB beyond what the script takes
of intact files, hangs, runs code of a file, or changes, makes or removes any file that it was not
given to write. Wrong trials keep their folder. Exit code 1 if there was one.
"""

import argparse
import atexit
import gc
import hashlib
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from test_fuzz_loaders import ENCODED, RECIPES, damage, mutated  # noqa: E402

import predict  # noqa: E402, F401
import tasks  # noqa: E402
import train  # noqa: E402, F401
import train_utils  # noqa: E402
import validation  # noqa: E402, F401
from train_utils.errors import UserError  # noqa: E402

CPU_SECONDS, MEGABYTES, HANGS_AFTER = 5, 300, 60
TINY = [
    *("--config", str(REPO / "configs" / "unet.yaml"), "--device", "cpu", "-j", "0", "-b", "2"),
    *("--set", "data.image_size=24", "--set", "model.channels=4", "--set", "model.weights=null"),
    *("--set", "data.class_names=[ground,object]", "--amp", "off"),
]
CPU = ["--device", "cpu"]
FORGED = "FORGED"
ENOUGH = "the first step would come now"
TRAPS = (
    *("\x1b[2J\x1b]0;x\x07", f"a\n{FORGED}", f"a\r{FORGED}", f"a\u2028{FORGED}", f"a\x85{FORGED}"),
    *("\u202egnp.exe", "\x9b31m", "$(touch pwned)", "`touch pwned`", "; touch pwned", "-rf"),
    *("../../up", "/etc/passwd", "x" * 100_000, "\x00", "%s%n", "{0.__class__}", "", " ", "é" * 90),
)
NUMBERS = (None, True, -1, 0, 1, 2**31, 2**63, 10**30, 10**6000, 1e-320, -1e308, 0.5, "1", [], {})
RUN_FILES = (
    *("last.pth", "model_best.pth", "model_0000.pth", "metrics.jsonl", "results.txt", "log.txt"),
    *("config.yaml", "status.json", ".lock", "samples", "failed_rank1.txt", ".last.pth.tmp"),
)
DECOYS = (
    *("model_0.pth", "model_25.pth", "model_00000.pth.bak", ".draft.tmp", ".pixtrain-notes.tmp"),
    *("failed_rank_notes.txt", "notes.txt", "samples/holiday.png", "events.out.mine", "lock"),
)


class Trial(NamedTuple):
    """A script with its arguments; `trains`: it may take its steps, else it ends before them."""

    script: str
    arguments: list[str]
    trains: bool = False


class Outcome(NamedTuple):
    """How a forked process ended; None for one that had to be killed; `megabytes`: its peak."""

    code: int | None
    cpu: float
    megabytes: float
    output: bytes


# -- what is hostile ------------------------------------------------------------------------------


def bomb(rng: random.Random) -> Any:
    """A value that is small in a file and large when written out."""
    value: Any = rng.choice(TRAPS)
    for _ in range(rng.randrange(6, 11)):
        value = [value] * 10 if rng.random() < 0.7 else {f"k{i}": value for i in range(10)}
    return value


def deep(rng: random.Random) -> Any:
    value: Any = 0
    for _ in range(rng.choice([20, 90, 200])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def odd_tensor(like: torch.Tensor, rng: random.Random) -> torch.Tensor:
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.zeros(1).expand(like.numel() or 1).reshape(-1)[: like.numel()],
        lambda: torch.zeros(0),
        lambda: like.double() if like.is_floating_point() else like.float(),
        lambda: torch.full_like(like, float("nan")) if like.is_floating_point() else like,
        lambda: torch.zeros(like.shape, dtype=torch.complex64),
        lambda: torch.zeros(3, 3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8),
        lambda: torch.empty(like.shape, device="meta"),
        lambda: torch.zeros(like.shape, dtype=torch.bool),
        lambda: like.reshape(-1),
    ]
    return rng.choice(kinds)()


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of the items in nested dicts and lists, four levels deep."""
    if len(path) == 4 or not isinstance(value, (dict, list)):
        return []
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [found for k, v in items for found in [(*path, k), *places(v, (*path, k))]]


def spoil(state: dict, rng: random.Random) -> None:
    """Change one item, anywhere in a nested dict, in place."""
    path = rng.choice([found for found in places(state) if rng.random() < 0.1] or places(state))
    inside: Any = state
    for key in path[:-1]:
        inside = inside[key]
    key, old = path[-1], inside[path[-1]]
    action = rng.choice(["number", "text", "bomb", "deep", "tensor", "drop", "rename", "crowd"])
    if action == "tensor" and isinstance(old, torch.Tensor):
        inside[key] = odd_tensor(old, rng)
    elif action == "drop":
        del inside[key]
    elif action == "rename" and isinstance(inside, dict):
        inside[rng.choice([*TRAPS, 3, (1, 2)])] = inside.pop(key)
    elif action == "crowd" and isinstance(inside, dict):
        inside.update((f"{rng.choice(TRAPS)[:30]}{i}", old) for i in range(20_000))
    else:
        makers = {"bomb": bomb, "deep": deep, "text": lambda r: r.choice(TRAPS)}
        inside[key] = makers.get(action, lambda r: r.choice(NUMBERS))(rng)


class Code:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


def write_weights(path: Path, base: Path, rng: random.Random) -> None:
    """A checkpoint, or weights, with something wrong inside, around or at its bytes."""
    state = torch.load(base / "run" / "last.pth", weights_only=True)
    form = rng.choice(["ours", "ours", "ours", "bare", "wrapped"])
    if form != "ours":
        state = state["model"] if form == "bare" else {"state_dict": state["model"], "epoch": 3}
    where = rng.choice(["inside", "inside", "inside", "bytes", "zip", "old", "code", "recipe"])
    if where == "code":
        state[rng.choice(["args", "model", "x"])] = Code()
    elif where == "recipe" and "args" in state:
        spoil(state["args"], rng)
    elif where in ("inside", "old", "recipe"):
        for _ in range(rng.randrange(1, 4)):
            spoil(state, rng)
    torch.save(state, path, _use_new_zipfile_serialization=where != "old")
    if where == "bytes" or (where == "old" and rng.random() < 0.5):
        path.write_bytes(damage(path.read_bytes(), rng.choice(["cut", "flip", "noise"]), rng))
    if where == "zip":
        rezip(path, base, rng)


def rezip(path: Path, base: Path, rng: random.Random) -> None:
    """The members of a zip file packed anew: compressed, under other names, too many, too large."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = rng.choice(["compressed", "bomb", "names", "many"])
    method = zipfile.ZIP_STORED if kind in ("names", "many") else zipfile.ZIP_DEFLATED
    if kind == "bomb":
        shutil.copy(base / "bomb.zip", path)
    with zipfile.ZipFile(path, "a" if kind == "bomb" else "w", method) as archive:
        for name, content in members.items():
            trap = rng.choice(TRAPS)[:100].replace("\x00", "") if kind == "names" else ""
            archive.writestr(name + (trap if rng.random() < 0.2 else ""), content)
        for number in range(30_000 if kind == "many" else 0):
            archive.writestr(f"archive/x{number}", b"")


def yaml_bomb(rng: random.Random) -> str:
    levels = rng.randrange(4, 12)
    lines = [f"x0: &x0 [{', '.join(['abcdefgh'] * 10)}]"]
    for n in range(1, levels):
        one = rng.choice([f"[{', '.join([f'*x{n - 1}'] * 10)}]", f"{{<<: [*x{n - 1}], b: *x0}}"])
        lines.append(f"x{n}: &x{n} {one}")
    key = rng.choice(["task", "data", "model", "data:\n  images", "optim:\n  lr", "loss:\n  terms"])
    return "\n".join([*lines, f"{key}: *x{levels - 1}"])


def write_recipe(path: Path, rng: random.Random) -> None:
    """A recipe with other lines, values and bytes than it should have."""
    text = mutated(rng.choice(RECIPES), rng)
    kind = rng.choice(["mutated", "mutated", "bomb", "deep", "long", "trap", "number"])
    quoted = '"' + rng.choice(TRAPS).encode("unicode_escape").decode().replace('"', "") + '"'
    lines = text.split("\n")
    place = rng.randrange(len(lines))
    key = lines[place].partition(":")[0]
    if kind == "bomb":
        text = yaml_bomb(rng)
    elif kind == "deep":
        text = f"{text}\nx: " + "[" * rng.choice([50, 5000, 10**6])
    elif kind == "long":
        lines[place] = f"{key}: {rng.choice('1a-x') * 10**6}"
        text = "\n".join(lines)
    elif kind == "trap":
        lines[place] = rng.choice([f"{key}: {quoted}", f"{quoted}: 1", f"{key}: [{quoted}, 2]"])
        text = "\n".join(lines)
    elif kind == "number":
        lines[place] = f"{key}: {rng.choice([10**9, 40_000, '1e30', -5, '0x' + 'f' * 5000])}"
        text = "\n".join(lines)
    path.write_bytes(text.encode("utf-8", "replace"))


def lay_trap(path: Path, precious: Path, rng: random.Random) -> None:
    """Put something else where a file of ours lies or would lie."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    kind = rng.choice(
        ["link", "dangling", "fifo", "folder", "bytes", "json", "empty", "cut", "gone"]
    )
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "dangling":
        path.symlink_to(precious.parent / "new")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    elif kind == "bytes":
        path.write_bytes(rng.choice([rng.randbytes(300), f"{FORGED}\x1b[2J\n".encode() * 9]))
    elif kind == "json":
        texts = ["[]", "3", "null", '{"launchers": 3}', "[" * 10**5, '{"epoch": "x"}', "NaN"]
        texts += ['{"epoch": 1e999}', '{"epoch": 0, "lr": null, "val/\\u001b[2J": "x"}', "9" * 9999]
        path.write_text("\n".join(rng.sample(texts, 3)))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])


# -- trials, by kind ------------------------------------------------------------------------------


def folders(base: Path) -> list[str]:
    return ["--images", str(base / "images"), "--masks", str(base / "masks")]


def weights_trial(place: Path, base: Path, rng: random.Random) -> Trial:
    name = rng.choice(["w.pth", "w.pth", "$(touch pwned).pth", "a\nFORGED.pth", "-w.pth"])
    path = place / "given" / name
    write_weights(path, base, rng)
    weights = [f"--weights={path}"]
    if rng.random() < 0.2:
        weights += ["--config", str(REPO / "configs" / "unet.yaml")]
    use = rng.choice(["predict", "validation", "start", "resume"])
    if use == "predict":
        return Trial("predict.py", [str(base / "images" / "0.png"), "-o", "out", *weights, *CPU])
    if use == "validation":
        return Trial("validation.py", [*weights, *folders(base), *CPU, "-j", "0"])
    out = ["--output-dir", "out/run"]
    if use == "start":
        return Trial("train.py", [*TINY, *folders(base), *weights[:1], *out])
    return Trial("train.py", [f"--resume={path}", *CPU, *out])


def recipe_trial(place: Path, base: Path, rng: random.Random) -> Trial:
    path = place / "given" / rng.choice(["r.yaml", "r.yaml", "a\x1b[2Jb.yaml"])
    write_recipe(path, rng)
    recipe = [f"--config={path}", *CPU]
    if rng.random() < 0.7:
        out = ["--output-dir", "out/run", "-j", "0"]
        return Trial("train.py", [*recipe, *(folders(base) if rng.random() < 0.5 else []), *out])
    weights = ["--weights", str(base / "bare.pth"), *recipe]
    if rng.random() < 0.5:
        return Trial("validation.py", [*weights, *folders(base), "-j", "0"])
    return Trial("predict.py", [str(base / "images" / "0.png"), "-o", "out", *weights])


def run_trial(place: Path, base: Path, rng: random.Random) -> Trial:
    """A run folder, ours or not, in which others have written."""
    runs = place / "out" / "runs" / "unet"
    runs.mkdir(parents=True)
    run = runs / "1"
    if rng.random() < 0.75:
        shutil.copytree(base / "run", run)
        for name in rng.sample(RUN_FILES, rng.randrange(0, 4)):
            lay_trap(run / name, place / "given" / "precious.txt", rng)
    run.mkdir(exist_ok=True)
    for name in rng.sample(DECOYS, rng.randrange(0, 4)):
        if not os.path.lexists((run / name).parent):  # a link that leads nowhere is there
            (run / name).parent.mkdir()
        if (run / name).parent.is_dir() and not (run / name).parent.is_symlink():
            (run / name).write_text("mine")
    use = rng.choice(["new", "auto", "other", "newest", "newest of all"])
    if use == "newest of all":
        script = rng.choice(["validation.py", "predict.py"])
        inputs = [*folders(base), "-j", "0"] if script == "validation.py" else ["-o", "pictures"]
        inputs += [str(base / "images" / "0.png")] if script == "predict.py" else []
        return Trial(script, [*inputs, *CPU])
    arguments = [*TINY, *folders(base), "--epochs", "2"]
    if use in ("new", "auto"):
        arguments += ["--output-dir", "runs/unet/1"]
    if use == "other":
        arguments += [f"--resume={rng.choice([run, run / 'last.pth'])}", "--output-dir", "other"]
    elif use != "new":
        arguments += ["--resume", "auto"]
    return Trial("train.py", arguments, trains=True)


def cache_trial(place: Path, base: Path, rng: random.Random) -> Trial:
    shutil.copytree(base / "cache", place / "cache", dirs_exist_ok=True, symlinks=True)
    files = [path for path in (place / "cache").rglob("*") if rng.random() < 0.7]
    for path in files[:3]:
        if rng.random() < 0.5 and path.is_file() and path.stat().st_size:
            kind = rng.choice(["cut", "flip", "noise", "hole", "missing"])
            path.write_bytes(damage(path.read_bytes(), kind, rng))
        elif path.exists() or path.is_symlink():
            lay_trap(path, place / "given" / "precious.txt", rng)
    arguments = [*TINY, *folders(base), "--epochs", "1", "--cache", "disk"]
    return Trial("train.py", [*arguments, "--output-dir", "out/run"], trains=True)


def image_trial(place: Path, base: Path, rng: random.Random) -> Trial:
    weights = ["--weights", str(base / "run" / "last.pth"), *CPU]
    given = place / "given"
    for number in range(4):
        path = given / f"{number}{rng.choice(['.png', '.jpg', '.tif', '.webp', '.bmp'])}"
        kind = rng.choice(["flip", "noise", "hole", "splice", "head", "cut", "trap", "shell"])
        if kind == "trap":
            lay_trap(path, given / "precious.txt", rng)
        else:
            path.write_bytes(damage(rng.choice(ENCODED)[1], kind.replace("shell", "head"), rng))
    use = rng.choice(["predict", "predict", "masks", "predictions"])
    if use == "predict":
        return Trial("predict.py", ["given", "-o", "out", "--overlay", *weights])
    pair = ["--images", str(base / "images"), "--masks", "given"]
    if use == "masks":
        return Trial("validation.py", [*pair, *weights, "-j", "0"])
    return Trial("validation.py", ["--predictions", "given", "--masks", str(base / "masks"), *CPU])


def video_trial(place: Path, base: Path, rng: random.Random) -> Trial:
    """A video whose decoder, a program that prints what it is told to, goes astray."""
    frame = b"P6\n5 4\n255\n" + bytes(60)
    frames = [frame] * rng.randrange(0, 5)
    odd = [
        b"",
        b"P6\n5 4\n255\n",
        b"P6\n99999 99999\n255\n",
        b"P6\n-5 4\n255\n",
        b"P5\n1 1\n255\n\0",
    ]
    odd += [
        b"\0" * 10**6,
        b"P6\n" * 10**5,
        b"P6\n" + b"9" * 10**6 + b" 1\n255\n",
        rng.randbytes(99),
    ]
    frames.insert(rng.randrange(len(frames) + 1), rng.choice(odd))
    (place / "stream").write_bytes(b"".join(frames))
    words = rng.choice(["", "\\033[2J", f"a\\n{FORGED}", "x" * 10**5])
    script = f'#!/bin/sh\ncat {place}/stream\nprintf "{words}" >&2\nexit {rng.choice([0, 0, 1])}\n'
    (place / "bin").mkdir()
    (place / "bin" / "ffmpeg").write_text(script)
    (place / "bin" / "ffmpeg").chmod(0o755)
    os.environ["PATH"] = f"{place / 'bin'}:{os.environ['PATH']}"
    name = rng.choice(["clip.mp4", "...mp4", "$(touch pwned).mp4", f"a\n{FORGED}.mkv", "..mov"])
    path = place / "given" / name
    path.write_bytes(rng.randbytes(50))
    if rng.random() < 0.2:
        lay_trap(path, place / "given" / "precious.txt", rng)
    weights = ["--weights", str(base / "run" / "last.pth"), *CPU]
    return Trial("predict.py", [f"given/{name}", "-o", "out", *weights])


def name_trial(place: Path, base: Path, rng: random.Random) -> Trial:
    stems = (
        "...",
        "..",
        "a",
        "a\n" + FORGED,
        "\x1b[2J",
        "$(touch pwned)",
        "n" * 251,
        "-o",
        "~",
        "*",
    )
    names = [f"{stem}.png" for stem in rng.sample(stems, 4)]
    for name in names:
        shutil.copy(base / "images" / "0.png", place / "given" / name)
    (place / "out" / "a.png").write_text("mine")
    forms = ("given", "given/.", "given/../given", "given/*", "*/../given/*", "given/../../*/given")
    inputs = [rng.choice([*forms, *(f"given/{name}" for name in names)]) for _ in range(2)]
    weights = ["--weights", str(base / "run" / "last.pth"), *CPU]
    extra = rng.choice([[], ["--overlay"]])
    return Trial("predict.py", ["-o", "out", *extra, *weights, "--", *inputs])


KINDS: dict[str, Callable[[Path, Path, random.Random], Trial]] = {
    "weights": weights_trial,
    "recipe": recipe_trial,
    "run": run_trial,
    "cache": cache_trial,
    "image": image_trial,
    "video": video_trial,
    "name": name_trial,
}

# -- what a trial did -----------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: its type and mode, and its content or target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content: Any = str(path.readlink()) if stat.S_ISLNK(mode) else ""
        if stat.S_ISREG(mode):
            content = hashlib.sha1(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = (mode, content)
    return found


def may_change(name: str, script: str) -> bool:
    """Whether a script was given this file of the trial's folder to write."""
    top, _, rest = name.partition("/")
    if top == "cache":
        return True
    if top != "out" and not (top in ("pictures", "other") and script != "validation.py"):
        return False
    own = Path(name).name
    mine = any(rest.endswith(f"/{decoy}") for decoy in DECOYS) or own in ("mine.txt",)
    return not mine and (script != "predict.py" or not rest.startswith("runs/"))


def wrong(trial: Trial, outcome: Outcome, before: dict[str, tuple], after: dict[str, tuple]) -> str:
    """What a trial shows that must not be; empty if all is well."""
    text = outcome.output.decode(errors="surrogateescape")
    valid = ENOUGH in text  # a recipe's own network may be large
    controls = {
        c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
    }
    changed = [n for n in sorted(before.keys() | after.keys()) if before.get(n) != after.get(n)]
    problems = {
        "killed after a hang": outcome.code is None,
        f"exit code {outcome.code}": outcome.code not in (0, 1, 2),
        "traceback": "Traceback (most" in text or "Exception ignored" in text,
        f"printed {sorted(map(ascii, controls))}": bool(controls),
        "forged line": any(line.startswith(FORGED) for line in text.split("\n")),
        "no reason": outcome.code != 0 and "error: " not in text,
        f"{outcome.cpu:.1f} s of CPU": outcome.cpu > CPU_SECONDS and not valid,
        f"{outcome.megabytes:.0f} MB": outcome.megabytes > MEGABYTES and not valid,
        "ran code": any("pwned" in name and "$" not in name for name in after),
    }
    found = [what for what, is_so in problems.items() if is_so]
    return "; ".join(found + [f"changed {n!r}" for n in changed if not may_change(n, trial.script)])


def would_train(*_args: Any, **_options: Any) -> None:
    raise UserError(ENOUGH)


def enter(trial: Trial, place: Path) -> str:
    """Make this process one that starts the script; returns what it is to run."""
    os.chdir(place / "out" if (place / "out" / "runs").exists() else place)
    os.environ |= {"XDG_CACHE_HOME": str(place / "cache"), "HOME": str(place)}
    file = os.open(
        place.parent / f"{place.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
    )
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, size + 2**31))
    sys.argv = [str(REPO / trial.script), *trial.arguments]
    if not trial.trains:
        train_utils.train_one_epoch = would_train  # type: ignore[assignment]
    return sys.argv[0]


def watch(process: int, place: Path) -> Outcome:
    """Wait for a forked process, at most for so long."""
    end, code = time.monotonic() + HANGS_AFTER, None
    while True:
        number, status, usage = os.wait4(process, os.WNOHANG)
        if number:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            usage = os.wait4(process, 0)[2]
            break
        time.sleep(0.005)
    output = place.parent / f"{place.name}.txt"
    cpu, megabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6
    return Outcome(code, cpu, megabytes, output.read_bytes())


def make_files(base: Path) -> None:
    """Images, their masks, and a zip file that unpacks to a gigabyte."""
    rng = np.random.default_rng(0)
    for folder, values in (("images", 256), ("masks", 2)):
        (base / folder).mkdir()
        for number in range(4):
            size = (24, 20, 3) if folder == "images" else (24, 20)
            pixels = rng.integers(0, values, size, dtype=np.uint8)
            Image.fromarray(pixels).save(base / folder / f"{number}.png")
    with zipfile.ZipFile(base / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/bomb", bytes(2**30))


def ordinary_trials(base: Path) -> list[Trial]:
    """One of each script on intact files; the first one makes the run and the caches."""
    run = [*TINY, *folders(base), "--epochs", "1", "--cache", "disk", "--output-dir", "run"]
    weights = ["--weights", "run/last.pth", *CPU]
    return [
        Trial("train.py", run, trains=True),
        Trial("validation.py", [*folders(base), *weights, "-j", "0"]),
        Trial("predict.py", [str(base / "images"), "-o", "pictures", "--overlay", *weights]),
    ]


def soak(args: argparse.Namespace, folder: Path) -> str | int:
    """All trials; the exit code, or in a forked process the script to run."""
    base = folder / "base"
    (base / "cache").mkdir(parents=True)
    make_files(base)
    usual: dict[str, float] = {}
    for trial in ordinary_trials(base):
        if not (process := os.fork()):
            return enter(trial, base)
        outcome = watch(process, base)
        assert outcome.code == 0, outcome.output.decode()
        usual[trial.script] = outcome.megabytes
    torch.save(torch.load(base / "run" / "last.pth")["model"], base / "bare.pth")

    given = tree(base)
    codes, bad, worst = Counter[tuple[str, int | None]](), 0, Outcome(0, 0, 0, b"")
    for number in range(args.count):
        kind, place = args.kinds[number % len(args.kinds)], folder / f"{number}"
        for name in ("given", "out", "cache"):
            (place / name).mkdir(parents=True)
        (place / "given" / "precious.txt").write_text("precious")
        path = os.environ["PATH"]
        trial = KINDS[kind](place, base, random.Random(f"{args.seed}/{number}"))
        before = tree(place)
        if not (process := os.fork()):
            return enter(trial, place)
        os.environ["PATH"] = path
        outcome = watch(process, place)
        outcome = outcome._replace(megabytes=outcome.megabytes - usual[trial.script])
        codes[kind, outcome.code] += 1
        worst = Outcome(0, *(max(pair) for pair in zip(worst[1:3], outcome[1:3], strict=True)), b"")
        if problem := wrong(trial, outcome, before, tree(place)):
            bad += 1
            command = f"{trial.script} {trial.arguments!r:.300}"
            print(f"{kind} {number}: {problem}\n  {command}", flush=True)
        else:
            shutil.rmtree(place)
            (folder / f"{number}.txt").unlink()
        if (number + 1) % 500 == 0:
            print(f"{number + 1} trials, {bad} wrong", flush=True)
    if tree(base) != given:
        bad += 1
        print("the shared folder has changed")
    ended = ", ".join(f"{kind} {code}: {n}" for (kind, code), n in sorted(codes.items(), key=str))
    most = f"at most {worst.cpu:.1f} s of CPU and {worst.megabytes:.0f} MB more than usual"
    print(f"done: {args.count} trials, {bad} wrong, {most}\nexit codes: {ended}")
    return int(bad > 0)


def main() -> str | int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks.all_tasks()  # imported once, not in every trial
    folder = Path(tempfile.mkdtemp(prefix="soak-hostile-"))
    print(f"in {folder}", flush=True)
    gc.freeze()
    return soak(args, folder)


def run_as(script: str, module: dict[str, Any]) -> NoReturn:
    """Run a script in this forked process, and end it without taking the interpreter apart.

    That would take longer than most trials, since all that the process shares is copied for it.
    module: the globals of the soak, in which the script runs.
    """
    code: Any = 0
    module["__file__"] = script
    try:
        exec(compile(Path(script).read_text(encoding="utf-8"), script, "exec"), module)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    outcome = main()
    if isinstance(outcome, int):
        sys.exit(outcome)
    run_as(outcome, globals())
