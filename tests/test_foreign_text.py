"""Text and structures of strangers: what is printed, proposed to be typed, and read into memory."""

import ast
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPO
from test_house import PRODUCT, tree
from torch import nn

import tasks
from predict import report
from train_utils import arguments
from train_utils.checkpoint import load_file, load_training_state, load_weights, save_checkpoint
from train_utils.config import load_yaml, parse_assignments
from train_utils.errors import UserError, brief, plain_message, printable, tell, typed
from train_utils.log import get_logger, log_to_file
from train_utils.prediction import Job, Picture
from train_utils.run_folder import _result
from train_utils.video import require_ffmpeg

# A colour, the window's title, a line of its own, C1's ESC [, delete, the direction of writing,
# a line separator, half a pair.
NASTY = "\x1b[31m \x1b]0;t\a \nerror: fine\r \x9b2J \x7f \u202e \u2066 \u2028 \ud800 \t"


def is_harmless(text: str) -> bool:
    return text.isprintable()  # a lone surrogate is not, either


# -- terminals and logs ---------------------------------------------------------------------------


def test_text_of_strangers_is_one_harmless_line():
    assert printable("Fotos/Äpfel & 苹果 → ≠.png") == "Fotos/Äpfel & 苹果 → ≠.png"
    assert printable("a\nb\x1b[31m\u202ec\x9b") == "a\\nb\\x1b[31m\\u202ec\\x9b"
    assert printable(Path("a b.png")) == "a b.png"
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\udce9.png"
    assert is_harmless(printable(NASTY))
    long = printable("a" * 10**6 + "\n" + "b" * 10**6)
    assert len(long) < 9000 and long.startswith("aaa") and long.endswith("bbb")
    assert "1,992,001 characters more" in long


def test_an_error_and_a_log_are_lines_whatever_they_quote(tmp_path, capsys):
    error = UserError(f"{NASTY}.pth: bad")
    assert is_harmless(str(error)) and is_harmless(plain_message(error))
    in_worker = UserError(f"Caught in worker\ntrain_utils.errors.UserError: {NASTY}: bad\n")
    assert plain_message(in_worker) == printable(f"{NASTY}: bad")
    handlers = list(get_logger().handlers)
    log_to_file(tmp_path / "log.txt")
    get_logger().info(NASTY.replace("\ud800", ""))  # which pytest-xdist cannot report
    for handler in set(get_logger().handlers) - set(handlers):
        get_logger().removeHandler(handler)
        handler.close()
    tell(NASTY)
    report(Picture(Job(Path(NASTY), {"map": Path(NASTY)}), 0, warning=NASTY))
    report(Picture(Job(Path(NASTY), {}), 0, error=NASTY))
    shown = capsys.readouterr()
    texts = (tmp_path / "log.txt").read_text(encoding="utf-8"), shown.out, shown.err
    lines = [line for text in texts for line in text.split("\n")]
    bad = [line for line in lines if not is_harmless(line) or line.startswith("error: fine")]
    assert not list(map(ascii, bad))
    record = {"epoch": 1, "lr": 0.1, f"val/{NASTY}": 0.5}
    assert is_harmless(_result(record)[:-1]) and _result(record).endswith("lr: 0.1\n")


def test_what_python_prints_itself_is_harmless(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, warnings\n"
        "from train_utils.arguments import parse_args\n"
        f"text = {NASTY.replace(chr(0xD800), '')!r}\n"
        "try: parse_args(['--epochs', text, text])\n"
        "except SystemExit: pass\n"
        "warnings.warn(text)\n"
        "raise RuntimeError(text)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True)
    lines = done.stderr.decode().split("\n")
    assert all(map(is_harmless, lines)) and done.returncode == 1
    assert sum("\\x1b[31m" in line for line in lines) == 3


def test_a_flag_that_is_no_value_is_told_without_a_trace(capsys):
    flags = {"data.direction": "what is made of what"}
    with pytest.raises(SystemExit):
        arguments.parse_args(["--direction", "[" * 10], flags=flags)
    assert "argument --direction: " in capsys.readouterr().err


def test_all_that_the_product_prints_goes_through_the_gate():
    for path in PRODUCT:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                text = node.args[0]
                kept = isinstance(text, ast.Call) and getattr(text.func, "id", "") == "printable"
                plain = isinstance(text, ast.JoinedStr) and {
                    ast.unparse(part.value)
                    for part in text.values
                    if isinstance(part, ast.FormattedValue)
                } <= {"done", "failed"}
                ours = ast.unparse(text) == "f'{header}\\n{stack}'"  # where our own code stands
                assert kept or plain or ours, f"{path.name}: {ast.unparse(node)}"


# -- commands that are proposed -------------------------------------------------------------------

# Numbers, and names that torch or this code gave.
OURS = (
    "max(1, images // 2)",
    "max(1, found.images)",
    "train['batch_size']",
    "device.type",
    "kind",
    "dotted",
)


def test_every_value_behind_a_flag_in_a_message_is_quoted():
    found = 0
    for path in PRODUCT:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.JoinedStr):
                continue
            for before, value in zip(node.values, node.values[1:], strict=False):
                flag = re.search(r"(^|[ (])--?[a-z-]+ $", str(getattr(before, "value", "")))
                if isinstance(value, ast.FormattedValue) and flag:
                    found += 1
                    shown = ast.unparse(value.value)
                    known = path.name == "device.py" and shown == "name"  # of a device torch has
                    number = value.format_spec and ast.unparse(value.format_spec)[-2] in "gfd"
                    kept = shown.startswith("typed(") or shown in OURS or known or number
                    assert kept, f"{path.name}: {shown}"
    assert found > 5


NAMES = (
    "$(touch x).pth",
    "a b;touch x.pth",
    "`touch x`.pth",
    "-rf.pth",
    "it's & more.pth",
    "~.pth",
    "a\n\x1b[31m$(touch x) 1'ü.pth",
)
SHELL = shutil.which("bash") or "sh"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("name", NAMES)
def test_a_proposed_command_means_the_file_and_does_nothing_else(tmp_path, monkeypatch, name):
    if SHELL == "sh" and not name.isprintable():
        pytest.skip("needs bash")
    monkeypatch.chdir(tmp_path)
    state = {
        **{key: {} for key in ("optimizer", "lr_scheduler", "ema_steps", "best_scores", "meters")},
        **{"model": {"w": torch.ones(1)}, "epoch": 1, "next_epoch": 2, "next_step": 0, "lr": 0.1},
        **{"num_samples": 9, "global_batch": 4, "world_size": 1, "args": {"task": "saliency"}},
    }
    Path("last.pth").write_bytes(b"PK")
    save_checkpoint(state, Path(name))
    with pytest.raises(UserError) as caught:
        load_training_state("last.pth")
    proposed = str(caught.value).rpartition(": --resume ")[2]
    assert Path(typed_in_a_shell(f"parsed --resume {proposed}")[1]) == Path(name)

    monkeypatch.setenv("PATH", "")  # as without ffmpeg
    with pytest.raises(UserError) as caught:
        require_ffmpeg(Path(name).with_suffix(".mp4"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    command = str(caught.value).partition(" where it is, by ")[2].rpartition(", and name")[0]
    before = set(Path().iterdir())
    first, second = command.split(" && ") if command.count("&&") == 1 else command.rsplit(" && ", 1)
    assert first.startswith("mkdir ")
    subprocess.run([SHELL, "-c", first], check=True)
    assert set(Path().iterdir()) - before == {Path(name).with_suffix("")}
    source, target = typed_in_a_shell(second.replace("ffmpeg", "parsed", 1))[1:]
    assert source == f"file:{Path(name).with_suffix('.mp4')}"
    assert target == f"file:{Path(name).with_suffix('')}/%06d.png"
    assert not Path("x").exists() and not Path("x.pth").exists()


def typed_in_a_shell(command: str) -> list[str]:
    """The words that a shell makes of a command's arguments."""
    show = f'parsed() {{ for word in "$@"; do printf "%s\\0" "$word"; done; }}; {command}'
    done = subprocess.run([SHELL, "-c", show], check=True, capture_output=True)
    return done.stdout.decode().split("\0")[:-1]


def test_a_value_is_quoted_as_a_path_is():
    assert typed("runs/a_1/last.pth") == "runs/a_1/last.pth"
    assert typed(Path("-a b")) == "'./-a b'"
    with pytest.raises(UserError) as caught:
        parse_assignments(["$(touch x)"])
    assert str(caught.value).startswith(f"--set {shlex.quote('$(touch x)')}: ")


# -- memory bombs ---------------------------------------------------------------------------------


def test_values_are_cut_without_being_written_out():
    value = "x" * 1000
    for _ in range(12):
        value = [value] * 10
    assert len(brief(value)) <= 80 and len(brief({"a": value})) <= 80
    assert brief("a") == "'a'" and brief([0.5, 2]) == "[0.5, 2]"


RECIPES = {
    "aliases": "train:\n  amp: &a0 [x, x]\n"
    + "".join(f"  k{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "aliases in keys' values": "a: &a {k: 1}\n"
    + "".join(f"b{i}: &b{i} {{x: *{'ab'[i > 0]}{i - 1 if i else ''}, y: *a}}\n" for i in range(30)),
    "long text": "task: " + "x" * 60_000,
    "long key": "x" * 1000 + ": 1",
    "digits": "train: {epochs: " + "1" * 60_000 + "}",
    "hexadecimal": "train: {epochs: 0x" + "f" * 60_000 + "}",
    "sexagesimal": "train: {epochs: 1" + ":59" * 19_000 + "}",
    "nearly a number": "train: {epochs: " + "1" * 4000 + "x}",
    "many values": "train: {amp: [" + "1," * 10_000 + "]}",
    "deep": "task: " + "[" * 60 + "]" * 60,
    "deep by aliases": "a: &a0 [1]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}]\n" for i in range(60)),
    "merges": "a: &a {"
    + ", ".join(f"k{i}: 1" for i in range(3000))
    + "}\n"
    + "".join(f"b{i}: {{<<: [*a, *a]}}\n" for i in range(900)),
    "itself": "task: &t [*t, *t]",
    "escapes": 'task: "\\e[2J\\u202e\\n"',
}


def pickled(name: str, path: Path) -> None:
    """A checkpoint that is small on the disk."""
    weights = {"w": torch.zeros(1)}
    ours = {"next_epoch": 1, "model": weights, "args": {"task": "saliency"}}
    shared: list = [1]
    for _ in range(20):
        shared = [shared] * 10
    deep: list = []
    for _ in range(900):
        deep = [deep]
    wide = torch.as_strided(torch.zeros(1), (2**20, 2**20), (0, 0))
    contents = {
        "shared in args": {**ours, "args": {"task": "saliency", "eval": {"amp": shared}}},
        "shared elsewhere": {**ours, "optimizer": shared},
        "shared keys": {**ours, "args": {("a", ("b",)): 1}},
        "deep": {**ours, "args": {"task": deep}},
        "odd types in args": {**ours, "args": {"task": torch.zeros(3)}},
        "keys that are no text": {**ours, "args": {1: 2}},
        "a long key": {"w" * 10**6: torch.zeros(1)},
        "many keys": {f"k{i}": 1 for i in range(150_000)},
        "expanded": {"w": wide},
        "expanded in ours": {**ours, "model": {"w": wide}},
        "sparse": {"w": torch.sparse_coo_tensor([[0]], [1.0], (10**9,))},
        "meta": {"w": torch.empty(10**12, device="meta")},
        "complex": {"w": torch.zeros(2, dtype=torch.complex64)},
        "quantised": {"w": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)},
    }
    if name == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/data.pkl", b"\x80\x02}.")
            archive.writestr("a/data/0", bytes(3 * 10**7))
    elif name in HAND_WRITTEN:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", HAND_WRITTEN[name])
            archive.writestr("a/version", "3\n")
            archive.writestr("a/data/0", bytes(8))
    elif name.startswith("legacy "):
        torch.save(
            contents[name.removeprefix("legacy ")], path, _use_new_zipfile_serialization=False
        )
    else:
        torch.save(contents[name], path)


PICKLES = (
    *("shared in args", "shared elsewhere", "shared keys", "deep", "odd types in args"),
    *("keys that are no text", "a long key", "many keys", "expanded", "expanded in ours", "sparse"),
    *("meta", "complex", "quantised", "compressed", "legacy shared in args", "legacy expanded"),
)
_OD = b"ccollections\nOrderedDict\n"
_STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("
_SET = b"c__builtin__\nset\n"
_SHARED = b")" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(45))  # 2**45 times ()
_DEEP = b")" + b"\x85" * 390_000
HAND_WRITTEN = {
    "a deep key": b"\x80\x02}" + _DEEP + b"K\1s.",
    "a deep key among others": b"\x80\x02}(K\1K\1" + _DEEP + b"K\1u.",
    "a deep member": b"\x80\x02" + _SET + b"]" + _DEEP + b"a\x85R.",
    "a shared key": b"\x80\x02}" + _SHARED + b"K\1s.",
    "a shared member": b"\x80\x02" + _SET + b"]" + _SHARED + b"a\x85R.",
    "a shared thing to count": b"\x80\x02ccollections\nCounter\n]" + _SHARED + b"a\x85R.",
    "a shared key of a pair": b"\x80\x02" + _OD + b"]" + _SHARED + b"N\x86a\x85R.",
    "a shared name": b"\x80\x02(X\7\0\0\0storagectorch\nFloatStorage\n"
    + _SHARED
    + b"X\3\0\0\0cpuK\1tQ.",
    "a storage of text": b"\x80\x02(X\7\0\0\0storageX\1\0\0\0aX\1\0\0\x000X\3\0\0\0cpu\x8a\5"
    + b"\0\0\0\0\1tQ.",
    "a size of tuples": b"\x80\x02"
    + _TENSOR
    + _STORAGE
    + b"K\2tQK\0(J\0\xca\x9a;K\1\x85tK\1\x85tR.",
    "shared sizes": b"\x80\x02" + _TENSOR + _SHARED + b"K\0" + _SHARED + b"\x85K\1\x85tR.",
    "memory behind a tensor's": b"\x80\x02"
    + _TENSOR
    + _STORAGE
    + b"K\2tQK\0K\2\x85J\0\0\0\x40\x85\x89"
    + _OD
    + b")RtR.",
    "a size in a size": b"\x80\x02"
    + _TENSOR
    + _STORAGE
    + b"K\2tQK\0ctorch\nSize\nJ\0\0\0\x40\x85\x85RK\1\x85\x89"
    + _OD
    + b")RtR.",
    "numbers of one hash": b"\x80\x02}("
    + b"".join(pickle.dumps(k * (2**61 - 1), 2)[2:-1] + b"N" for k in range(1, 40_000))
    + b"u.",
    "large numbers": b"\x80\x02}("
    + b"".join(pickle.dumps(k << 40, 2)[2:-1] + b"N" for k in range(1, 40_000))
    + b"u.",
    "many lists": b"\x80\x02](" + b"]" * 900_000 + b"e.",
    "many values": b"\x80\x02](" + b"N" * 3_100_000 + b"e.",
    "bytes of a zip": b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\4\0\0\0zlib\x86R.",
    "an index of a device": b"\x80\x02ctorch\ndevice\nX\3\0\0\0cpu]\x86R.",
    "another protocol": pickle.dumps({"a": 1}, 4),
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x0a\x85R.",
    "an uninitialised tensor": b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\0\0\0\0\x0a\x85R.",
    "copies of copies": b"\x80\x02]q\0("
    + b"K\1" * 5000
    + b"e("
    + (_OD.replace(b"OrderedDict", b"Counter") + b"h\0\x85R") * 1000
    + b"t.",
    "codecs": b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R.",
    "a claim of storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    + _STORAGE
    + b"\x8a\x06\0\0\0\0\0\x01tQK\0(K\1t(K\1t\x89"
    + _OD
    + b")RtR.",
    "memory before a tensor's": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
    + _STORAGE
    + b"K\2tQK\0K\2\x85J\xff\xff\xff\xff\x85\x89"
    + _OD
    + b")RtR.",
    "a memo of gigabytes": b"\x80\x02}r\xff\xff\xff\x7f.",
    "code": b"\x80\x02cos\nsystem\nX\x06\0\0\0touch \x85R.",
    "attributes": b"\x80\x02" + _OD + b")R}X\x05\0\0\0itemsK\1sb.",
    "attributes over methods": b"\x80\x02cshop\nThing\n)\x81X\1\0\0\0aK\1s"
    + b"}(X\5\0\0\0itemsK\1X\4\0\0\0keysK\1X\3\0\0\0getK\1ub.",
    "things of other code": b"\x80\x02]"
    + b"".join(b"cshop\nThing%d\n)Ra" % n for n in range(2000))
    + b".",
    "what torch would make": b"\x80\x02ctorch._utils\n_rebuild_meta_tensor_no_storage\n"
    + b"(ctorch\nfloat32\nJ\xff\xff\xff\x7f\x85K\1\x85\x89tR.",
    "no end": b"\x80\x02}",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


def test_a_network_of_thousands_of_layers_can_be_continued(tmp_path):
    """2,000 weights with AdamW's three parts of each and a moving average, as small as can be."""
    parts = torch.arange(5 * 2000.0).unbind()
    torch.save(
        {f"stages.0.blocks.{i}.weight": part for i, part in enumerate(parts)}, tmp_path / "a"
    )
    assert len(load_file(tmp_path / "a")) == len(parts)


BOMBS = """
import resource, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import test_foreign_text as here
from train_utils.errors import UserError

held = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20,) * 2)
for kind, names in (("recipe", here.RECIPES), ("pickle", (*here.PICKLES, *here.HAND_WRITTEN))):
    for name in names:
        outcomes = here.outcomes(kind, name)
        print(kind, name, *outcomes, sep="|", flush=True)
"""


def outcomes(kind: str, name: str) -> list[str]:
    """What the readers say of a bomb; any other error than a UserError passes through."""
    said = []
    if kind == "recipe":
        Path("bomb").write_text(RECIPES[name])
        readers = [lambda: tasks.read_config(load_yaml("bomb"), "bomb", {})]
    else:
        pickled(name, Path("bomb"))
        readers = [lambda: tasks.load_models("bomb", {}), lambda: load_training_state("bomb")]
    for read in readers:
        try:
            read()
            said.append("accepted")
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_bombs_are_refused_within_300_mb_and_by_a_line(tmp_path):
    limit = ["-c", BOMBS, REPO, REPO / "tests"]
    done = subprocess.run(
        [sys.executable, *limit], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert len(lines) == len(RECIPES) + len(PICKLES) + len(HAND_WRITTEN)
    for _, name, *said in lines:
        for text in said:
            assert text.startswith("bomb: ") and is_harmless(text), name
            assert len(text) < 9000, name
    assert [path.name for path in tmp_path.iterdir()] == ["bomb"]


def test_a_name_in_an_archive_is_shown_harmlessly(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(9)}, path)
    content = path.read_bytes().replace(b"a/data/0", b"a/\x1b[2J\n!")
    path.write_bytes(
        content.replace(torch.ones(9).numpy().tobytes(), torch.zeros(9).numpy().tobytes())
    )
    with pytest.raises(UserError, match="the checksum of a") as caught:
        load_file(path)
    assert is_harmless(str(caught.value)) and "\\x1b[2J\\n" in str(caught.value)


def test_an_archive_whose_parts_overlap_is_refused_unread(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(10**6))
        info = archive.getinfo("a/data/0")
        for _ in range(2000):  # all of them the same million bytes
            twin = zipfile.ZipInfo("a/data/0")
            for key in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(twin, key, getattr(info, key))
            archive.filelist.append(twin)
    with pytest.raises(UserError, match="its parts are larger than the whole"):
        load_file(path)


# -- networks that are larger than their weights --------------------------------------------------


class Unbuilt(Exception):
    """A network was allocated."""


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Layers may be made as shapes only."""
    made = nn.Conv2d.__init__

    def only_shapes(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.weight.device.type != "meta":
            raise Unbuilt

    monkeypatch.setattr(nn.Conv2d, "__init__", only_shapes)


WIDE = [
    ("segmentation", {"channels": 4000}),
    ("matting", {"channels": 4096}),
    ("translation", {"channels": 4096, "levels": 14}),
]


@pytest.mark.parametrize(("task", "model"), WIDE)
def test_a_network_that_does_not_fit_is_refused_before_it_is_built(
    tmp_path, monkeypatch, nothing_is_built, task, model
):
    args = {"task": task, "model": model}
    weights = {"next_epoch": 1, "model": {"w": torch.zeros(1)}, "args": args}
    torch.save(weights, tmp_path / "w.pth")
    monkeypatch.setattr(os, "sysconf", lambda name: 2**40)
    with pytest.raises(UserError, match=r"w\.pth: these weights do not fit .*1 unexpected: w"):
        tasks.load_models(tmp_path / "w.pth", {})
    with pytest.raises(UserError, match=r"w\.pth: these weights do not fit"):
        read = tasks.read_config(args, "w.pth", {})
        tasks.start_models(read, tmp_path / "w.pth", weights)


@pytest.mark.parametrize(("task", "model"), WIDE)
def test_a_network_beyond_the_memory_is_refused_before_it_is_built(nothing_is_built, task, model):
    read = tasks.read_config({"task": task, "model": model}, "recipe", {})
    with pytest.raises(UserError, match=r"weights take [\d,]+ GiB, and this machine has less"):
        tasks.start_models(read, None)


@pytest.mark.parametrize(
    ("task", "section", "key", "value"),
    [
        ("segmentation", "model", "channels", 40_000),
        ("matting", "model", "channels", 40_000),
        ("translation", "model", "d_channels", 40_000),
        ("translation", "model", "levels", 10**9),
        ("translation", "model", "d_layers", 10**9),
        ("saliency", "data", "image_size", 10**9),
        ("saliency", "data", "train_size", 10**12),
        ("matting", "data", "eval_size", 10**9),
        ("saliency", "train", "workers", 10**6),
        ("saliency", "train", "batch_size", 10**12),
        ("saliency", "optim", "warmup_epochs", 1e308),
        ("saliency", "optim", "warmup_factor", -1.0),
    ],
)
def test_settings_that_no_machine_can_hold_are_refused(task, section, key, value):
    with pytest.raises(UserError, match=rf"recipe: {section}\.{key}: must be "):
        tasks.read_config({"task": task, section: {key: value}}, "recipe", {})


# -- the file that is checked is the file that is read --------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "last.pth")
    for read in (load_file, load_training_state, load_weights, load_yaml):
        for path in (tmp_path / "last.pth", Path("/dev/zero")):
            with pytest.raises(UserError, match="not a regular file"):
                read(path)
    (tmp_path / "cut.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match="There is no other good checkpoint"):
        load_training_state(tmp_path / "cut.pth")  # looks beside it


def test_what_is_checked_is_what_is_read(tmp_path, monkeypatch):
    path, other = tmp_path / "w.pth", tmp_path / "other.pth"
    torch.save({"w": torch.ones(3)}, path)
    torch.save({"w": torch.zeros(3)}, other)
    load = torch.load

    def exchanged(*args, **options):
        other.replace(path)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", exchanged)
    assert torch.equal(load_file(path)["w"], torch.ones(3))
