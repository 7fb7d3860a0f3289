"""What an error proposes to type is understood, and is the way out of the situation it arose in."""

import ast
import re
import shlex
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image
from test_house import PRODUCT, tree

import check
import predict
import tasks
import validation
from tasks import segmentation
from tasks.segmentation.data import segmentation_layout
from tasks.segmentation.mask_scan import scan_masks
from train_utils.arguments import parse_args
from train_utils.checkpoint import save_checkpoint
from train_utils.config import build, merge, parse_assignments, parse_value, to_dict
from train_utils.errors import UserError
from train_utils.run_folder import choose_run_folder, find_resume
from train_utils.settings import deciding_metric
from train_utils.training_state import resumed_global_batch

PARSERS = {
    "train": partial(parse_args, flags=tasks.train_flags()),
    "validation": validation.parse_args,
    "predict": predict.parse_args,
    "check": check.parse_args,
}
OF_OTHER_PROGRAMS = {  # torchrun, docker, pip
    *("--nproc_per_node", "--master-port", "--local-addr", "--shm-size", "--force-reinstall"),
}
SECTIONS = "(?:data|model|loss|optim|optim_d|train|eval)"
KEY = rf"(?<![\w./])({SECTIONS}\.(?!py\b)[a-z_]+)(?![\w(])(?:=(\[[^]]*\]|[^\s,;)]+))?"
# What stands where a message has a value of its own, or one that only the user knows.
OPEN = re.compile(r"\{.*\}|[A-Z]+|…")


@cache
def messages() -> list[tuple[Path, int, str]]:
    """All texts of the product that are not documentation, with {} where values stand."""
    found = []
    for path in PRODUCT:
        inner, documentation = set(), set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.JoinedStr):
                inner |= {id(part) for part in node.values}
            elif isinstance(node, ast.Expr):
                documentation.add(id(node.value))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", None) for part in node.values)
                text = "".join(part if isinstance(part, str) else "{}" for part in parts)
            else:
                text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and id(node) not in inner | documentation:
                found.append((path, node.lineno, text))
    return found


@pytest.fixture
def known_flags(capsys):
    """The flags of each script, as its --help has them."""
    known = {}
    for script, parse in PARSERS.items():
        with pytest.raises(SystemExit):
            parse(["--help"])
        known[script] = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
    return known


def test_every_flag_in_a_message_is_one(known_flags):
    """Of the script whose own message it is; in shared code of any script."""
    every, seen = set().union(*known_flags.values()) | OF_OTHER_PROGRAMS, 0
    for path, line, text in messages():
        own = known_flags.get(path.stem) if path.parent == REPO else None
        if " " not in text or path.name in ("heap.py", "page.py"):  # flags of others, CSS
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            seen += 1
            assert flag in (own or every), f"{path.name}:{line}: {flag}"
    assert seen > 100


def configs_of(path: Path) -> list[type]:
    """The configs of the tasks whose message it may be."""
    names = tasks.task_names()
    own = [name for name in names if path.is_relative_to(REPO / "tasks" / name)]
    return [tasks.load_task(name).Config for name in own or names]


def keys_of(config: type) -> dict[str, object]:
    """The dotted keys of a recipe with their defaults."""
    return {
        f"{section}.{key}": value
        for section, values in to_dict(config()).items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def test_every_key_in_a_message_is_one_and_takes_the_value():
    unknown, refused, seen, values = [], [], 0, 0
    for path, line, text in messages():
        configs = configs_of(path)
        for key, value in re.findall(KEY, text) if " " in text else ():
            where, seen = f"{path.name}:{line}: {key}", seen + 1
            if not any(key in keys_of(config) for config in configs):
                unknown.append(where)
            value = value.rstrip(".:'\"")
            if not value or OPEN.search(value):
                continue
            values += 1
            section, _, name = key.partition(".")
            read = {section: {name: parse_value(value)}}
            if name in ("mask_values", "class_names"):  # go with folders and two classes
                two = {"images": "x", "masks": "y", "class_names": ["a", "b"]}
                read = merge({"data": two}, read)
            if not any(_accepts(config, read) for config in configs):
                refused.append(f"{where}={value}")
    assert not unknown and not refused
    assert seen > 50 and values > 8


def _accepts(config: type, values: dict) -> bool:
    try:
        build(config, values, "f")
    except UserError:
        return False
    return True


# -- typed for real -------------------------------------------------------------------------------


def settings_in(message: str) -> dict:
    """What the --set flags of a message say."""
    return parse_assignments(re.findall(r"--set ([\w.]+=\S+?)(?=[.,)]*(?:\s|$))", message))


@pytest.mark.parametrize(("count", "ending"), [(2, "png"), (3, "png"), (6, "png"), (3, "jpg")])
def test_binary_masks_are_read_by_what_their_refusal_proposes(tmp_path, count, ending):
    names = [f"c{index}" for index in range(count)]
    folders = {"images": str(tmp_path), "masks": str(tmp_path)}
    values = {"task": "segmentation", "data": {**folders, "class_names": names}}
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255 if ending == "png" else 200
    path = tmp_path / f"m.{ending}"
    Image.fromarray(mask).save(path)
    with pytest.raises(UserError) as caught:
        task = tasks.read_config(values, "f", {})
        scan_masks([path], segmentation.label_reader(task.cfg.data), refuse_single_class=True)
    task = tasks.read_config(values, "f", settings_in(str(caught.value)))
    reader = segmentation.label_reader(task.cfg.data)
    assert reader(path)[0, 0].tolist() == [0] * 8 + [1] * 8


def test_labels_beyond_the_classes_are_read_by_each_way_that_is_proposed(tmp_path):
    path = tmp_path / "m.png"
    Image.fromarray(np.array([[0, 1, 7]], np.uint8)).save(path)
    data = {"images": "a", "masks": "b", "class_names": ["x", "y"]}
    values = {"task": "segmentation", "data": data}

    def read(overrides):
        cfg = tasks.read_config(values, "f", overrides).cfg
        return segmentation.label_reader(cfg.data)(path).tolist()

    with pytest.raises(UserError) as caught:
        read({})
    message = str(caught.value)
    ways = re.findall(r"data\.ignore_\w+=\w+", message)
    assert len(ways) == 2 and "data.class_names must name 8" in message
    for way in ways:
        assert read(parse_assignments([way])) == [[[0, 1, 255]]]
    assert read({"data": {"class_names": list("abcdefgh")}}) == [[[0, 1, 7]]]


def test_names_of_classes_are_given_as_the_refusal_shows():
    values = {"task": "segmentation", "data": {"images": "a", "masks": "b"}}
    with pytest.raises(UserError, match="class_names: name the classes") as caught:
        tasks.read_config(values, "f", {})
    task = tasks.read_config(values, "f", settings_in(str(caught.value)))
    assert task.cfg.data.class_names == ["background", "road"]


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(2, 4, 1), (3, 1, 2), (5, 2, 3)])
def test_another_global_batch_is_put_right_by_what_is_proposed(batch, accumulate, world):
    train = {"batch_size": batch, "accumulate": accumulate}
    saved = {"global_batch": batch * accumulate * world, "world_size": world}
    state = {**saved, "args": {"train": train}}
    with pytest.raises(UserError, match="Continue with -b") as caught:
        resumed_global_batch(state, (batch + 1) * accumulate * world, world)
    words = shlex.split(str(caught.value).partition("Continue with ")[2].partition(", or")[0])
    args = PARSERS["train"](words)
    chosen = parse_assignments(args.set)["train"]["accumulate"]
    asked = vars(args)["train.batch_size"] * chosen * world
    assert resumed_global_batch(state, asked, world) == saved["global_batch"]


def test_a_run_whose_disk_is_full_continues_elsewhere_as_is_proposed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("runs/it's a run/last.pth")
    save_checkpoint({"epoch": 1}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(torch, "save", full)
        save_checkpoint({"epoch": 2}, path)
    words = shlex.split(str(caught.value).partition("or elsewhere with ")[2].rstrip("."))
    args = PARSERS["train"](words)
    assert args.output_dir == "DIR"
    assert find_resume(args.resume, args.output_dir, "name") == path


def test_a_folder_without_a_layout_gets_flags_that_train_knows(tmp_path):
    with pytest.raises((UserError, ValueError), match="--images DIR --masks DIR") as caught:
        segmentation_layout(str(tmp_path))
    args = PARSERS["train"](re.findall(r"--\w+ DIR", str(caught.value))[0].split())
    assert vars(args)["data.images"] == "DIR"


def test_a_metric_and_a_key_are_taken_from_those_that_are_offered():
    task = tasks.read_config({"train": {"best": "accuracy"}}, "f", {})
    with pytest.raises(UserError, match="Use one of ") as caught:
        deciding_metric(task.cfg, task.METRICS)
    for name in str(caught.value).partition("Use one of ")[2].partition(", or")[0].split(", "):
        task = tasks.read_config({}, "f", parse_assignments([f"train.best={name}"]))
        assert deciding_metric(task.cfg, task.METRICS)[0] == name
    with pytest.raises(UserError, match="Did you mean ") as caught:
        tasks.read_config({}, "f", parse_assignments(["train.epoch=3"]))
    key = str(caught.value).partition("Did you mean ")[2].rstrip("?")
    assert tasks.read_config({}, "f", parse_assignments([f"{key}=3"])).cfg.train.epochs == 3


@pytest.mark.parametrize("status", [True, False])
def test_a_folder_with_a_run_is_continued_as_is_proposed(tmp_path, monkeypatch, status):
    monkeypatch.chdir(tmp_path)
    save_checkpoint({"epoch": 1}, Path("out/last.pth"))
    if status:
        Path("out/status.json").write_text('{"state": "failed", "pid": 1, "time": 1.5}')
    with pytest.raises(UserError, match="--resume ") as caught:
        choose_run_folder("out", None, "name")
    words = re.findall(r"--resume \S+", str(caught.value))[0].rstrip(",.").split()
    args = PARSERS["train"]([*words, "--output-dir", "out" if status else "new"])
    assert find_resume(args.resume, args.output_dir, "name") == Path("out/last.pth")


def test_a_key_of_the_command_line_is_given_as_the_refusal_shows():
    for wrong in ("optim.lr", "=3", "lr 3"):
        with pytest.raises(UserError, match="Write for example") as caught:
            parse_assignments([wrong])
        example = str(caught.value).partition("for example ")[2].rstrip(".")
        args = PARSERS["train"](shlex.split(example))
        assert tasks.read_config({}, "f", parse_assignments(args.set)).cfg.optim.lr == 1e-3
