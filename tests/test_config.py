"""train_utils.config: every rule of reading, typing, merging, comparing and writing a config."""

import random
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from train_utils import config as cfg
from train_utils.errors import UserError


@dataclass
class Optim:
    lr: float = 1e-3
    weight_decay: float = 1e-4
    name: Literal["adamw", "sgd"] = "adamw"

    def __post_init__(self):
        if self.lr < 0:
            raise ValueError("lr: must not be negative. Write for example 1.0e-3.")


@dataclass
class Data:
    root: str | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    scales: list[float] = field(default_factory=lambda: [1.0])
    sizes: tuple[int, ...] = (320,)


@dataclass
class Crop:
    size: int = 288

    def __post_init__(self):
        if self.size % 32:
            raise ValueError("sizes that are multiples of 32 are supported")


@dataclass
class Config:
    task: str = "saliency"
    epochs: int = 360
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    resume: str | bool = False
    ema: float | None = None
    tile: Literal["auto"] | int = "auto"
    threshold: float | str = 0.5
    sync_bn: bool = False
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    crop: Crop | None = None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def from_text(tmp_path: Path, text: str) -> Config:
    return cfg.build(Config, cfg.load_yaml(write(tmp_path, text)), "recipe.yaml")


def refusal(function: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


# Reading files


def test_config_itself_does_not_import_torch():
    # A bare package stands in for train_utils/__init__.py, whose imports are its own affair.
    code = (
        "import sys, types; package = types.ModuleType('train_utils'); "
        "package.__path__ = ['train_utils']; sys.modules['train_utils'] = package; "
        "import train_utils.config; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "{}", "null"])
def test_an_empty_file_is_an_empty_dict(tmp_path, text):
    assert cfg.load_yaml(write(tmp_path, text)) == {}


@pytest.mark.parametrize("text", ["[1, 2]", "lr:0.1", "3", "false", "0", "''"])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text):
    message = refusal(cfg.load_yaml, write(tmp_path, text))
    assert "recipe.yaml: not a mapping" in message
    assert "`key: value`" in message


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("a: !!python/object/apply:os.system ['touch {0}']", "!!python/object/apply:os.system"),
        ("!!python/object/apply:os.system ['touch {0}']", "!!python/object/apply:os.system"),
        ("a: [1, {{b: !!python/name:os.system }}]", "!!python/name:os.system"),
        ("? !!python/object/apply:os.system ['touch {0}']\n: 1", "!!python/object/apply"),
        ("a: !local 1", "!local"),
        ("a: !!int x", "!!int"),
        ("a: !!timestamp x", "!!timestamp"),
        ("a: !!set {{x, y}}", "!!set"),
    ],
)
def test_tags_are_refused_and_nothing_runs(tmp_path, text, tag):
    sentinel = tmp_path / "executed"
    message = refusal(cfg.load_yaml, write(tmp_path, text.format(sentinel)))
    assert "recipe.yaml: line 1: " in message
    assert f"the tag {tag}" in message
    assert not sentinel.exists()


def test_duplicate_keys_are_refused_with_both_lines(tmp_path):
    message = refusal(cfg.load_yaml, write(tmp_path, "task: a\nepochs: 1\ntask: b\n"))
    assert "recipe.yaml: line 3: duplicate key task, see line 1. Keep one." in message
    message = refusal(cfg.load_yaml, write(tmp_path, "optim:\n  lr: 1.0\n  # again\n  'lr': 2.0\n"))
    assert "recipe.yaml: line 4: duplicate key lr, see line 2." in message
    message = refusal(cfg.load_yaml, write(tmp_path, "a: [{x: 1, x: 1}]"))
    assert "line 1: duplicate key x" in message


def test_the_same_key_in_two_sections_is_no_duplicate(tmp_path):
    assert cfg.load_yaml(write(tmp_path, "a: {lr: 1}\nb: {lr: 2}")) == {
        "a": {"lr": 1},
        "b": {"lr": 2},
    }


def test_anchors_and_merge_keys_work(tmp_path):
    text = """
first: {second: {base: &base {lr: 1.0, wd: 2.0}, same: &same {<<: *base, lr: 3.0}}}
own: {<<: *same, wd: 4.0}
twin: *base
"""
    values = cfg.load_yaml(write(tmp_path, text))
    assert values["first"]["second"]["same"] == {"lr": 3.0, "wd": 2.0}
    assert values["own"] == {"lr": 3.0, "wd": 4.0}
    assert values["twin"] == {"lr": 1.0, "wd": 2.0}


def test_nested_aliases_cannot_blow_up_an_error(tmp_path):
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12)]
    values = cfg.load_yaml(write(tmp_path, "\n".join(lines)))  # l11 has 10^12 elements in full
    message = refusal(cfg.build, Config, {"epochs": values["l11"]}, "f")
    assert message.startswith("f: holds more than 262,144 values and characters. ")
    values = cfg.load_yaml(write(tmp_path, "\n".join(lines[:4])))
    message = refusal(cfg.build, Config, {"epochs": values["l3"]}, "f")
    assert "epochs: expected a whole number" in message and len(message) < 200


def test_nested_merges_keep_each_key_once(tmp_path):
    lines = ["l0: &l0 {a: 1, b: 2}"]
    lines += [
        f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * 10)}], k{i}: {i}, a: {i}}}"
        for i in range(1, 12)  # 10^11 pairs, were they all kept
    ]
    values = cfg.load_yaml(write(tmp_path, "\n".join(lines)))
    assert values["l11"] == {"a": 11, "b": 2, **{f"k{i}": i for i in range(1, 12)}}
    keys = ", ".join(f"k{i}: 1" for i in range(3000))
    wide = [f"a: &a {{{keys}}}", *(f"b{i}: {{<<: *a}}" for i in range(1000))]
    assert "line 8: merges of too many keys" in refusal(
        cfg.load_yaml, write(tmp_path, "\n".join(wide))
    )
    first = cfg.load_yaml(write(tmp_path, "x: {<<: [{a: 1}, {a: 2, b: 2}], b: 3}"))
    assert first["x"] == {"a": 1, "b": 3}  # of a list the first counts, and own keys before all


@pytest.mark.parametrize("text", ["task: &t {x: *t}", "optim: &o {lr: *o}", "optim: &o {<<: *o}"])
def test_aliases_of_themselves_are_refused(tmp_path, text):
    assert "nested too deeply" in refusal(from_text, tmp_path, text)


def test_files_too_large_for_a_recipe_are_refused_unparsed(tmp_path):
    message = refusal(cfg.load_yaml, write(tmp_path, "a: [" + "1," * 200_000 + "]"))
    assert message.endswith("larger than 65,536 bytes. Name a recipe, a YAML file.")
    if Path("/dev/zero").exists():
        assert "/dev/zero: not a regular file" in refusal(cfg.load_yaml, "/dev/zero")


@pytest.mark.parametrize(
    "content",
    [
        "task: Größe\nepochs: 3\n".encode("utf-8-sig"),
        "task: Größe\nepochs: 3\n".encode("utf-16"),
        "task: Größe\r\nepochs: 3\r\n".encode(),
        "task: Größe\repochs: 3\r".encode(),
        "task: Größe\nepochs: 3".encode(),
    ],
    ids=["BOM", "UTF-16", "CRLF", "CR", "no newline at the end"],
)
def test_editors_of_all_kinds_may_write_a_recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert cfg.load_yaml(path) == {"task": "Größe", "epochs": 3}


@pytest.mark.parametrize("number", ["1" * 5000, "0x" + "f" * 5000, "-" + "1" * 1001])
def test_numbers_that_python_cannot_print_are_refused(tmp_path, number):
    message = refusal(cfg.load_yaml, write(tmp_path, f"a: 1\nepochs: {number}"))
    assert f"line 2: a number of {len(number)} digits" in message and len(message) < 300


@pytest.mark.parametrize("escape", [r"\0", r"\ud800"])
def test_text_that_no_file_can_have_is_refused(tmp_path, escape):
    message = refusal(from_text, tmp_path, f'data: {{root: "a{escape}b"}}')
    assert message.startswith("recipe.yaml: data.root: holds the character '\\")


@pytest.mark.parametrize(
    ("text", "line", "shown"),
    [
        ("a: 0b_", 1, "0b_"),
        ("a: 0x_", 1, "0x_"),
        ("a: 010", 1, "010"),
        ("b: 1\na: 1:30", 2, "1:30"),
        ("a: [1, -012]", 1, "-012"),
        ("a: 1:30.5", 1, "1:30.5"),
        ("a: 2024-01-31", 1, "2024-01-31"),
        ("a: 2024-13-45", 1, "2024-13-45"),
    ],
)
def test_numbers_that_yaml_reads_otherwise_than_people_are_refused(tmp_path, text, line, shown):
    message = refusal(cfg.load_yaml, write(tmp_path, text))
    assert f"recipe.yaml: line {line}: YAML 1.1 does not read {shown} as it looks" in message
    assert "quotes" in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000", 1000),
        ("0x10", 16),
        ("0", 0),
        ("-7", -7),
        (".5", 0.5),
        ("0.5", 0.5),
        ("1.0e-3", 0.001),
        ("'010'", "010"),
        ("'1:30'", "1:30"),
        ('"2024-01-31"', "2024-01-31"),
        ("1e-3", "1e-3"),  # YAML 1.1; build refuses it where a number is meant
        ("a:b", "a:b"),
        ("Größe/画像", "Größe/画像"),
    ],
)
def test_other_scalars_keep_their_yaml_meaning(tmp_path, text, value):
    read = cfg.load_yaml(write(tmp_path, f"a: {text}"))["a"]
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("key", ["on", "1", "~", "2.5", "[a, b]", "{a: b}"])
def test_keys_that_are_not_text_are_refused(tmp_path, key):
    message = refusal(cfg.load_yaml, write(tmp_path, f"a: 1\n? {key}\n: 2"))
    assert "recipe.yaml: line 2: YAML does not read this key as text. Put it in quotes." in message


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"a: 1\nb: [1, 2\n", "line 3: "),
        (b"a: 1\n\tb: 2\n", "line 2: "),
        (b"a: 1\n---\nb: 2\n", "line 2: "),
        (b"a: *nowhere\n", "line 1: found undefined alias"),
        (b"a: caf\xe9\n", "unacceptable character #x00e9"),
        (b"a: \x00\n", "unacceptable character"),
        (b"a: " + b"[" * 1_000, "nested too deeply"),
    ],
)
def test_bad_syntax_is_refused_with_the_place(tmp_path, content, cause):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    message = refusal(cfg.load_yaml, path)
    assert message.startswith(f"{path}: {cause}")
    assert cause in message
    assert "plain YAML" in message


def test_a_missing_file_names_the_near_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    for name in ("u2net_duts", "fcn_bag", "pix2pix"):
        Path(f"configs/{name}.yaml").touch()
    near = str(Path("configs/u2net_duts.yaml"))
    assert refusal(cfg.load_yaml, "configs/u2net_dut.yaml").endswith(f"Did you mean {near}?")
    assert refusal(cfg.load_yaml, "u2net_duts") == f"u2net_duts: no such file. Did you mean {near}?"
    everything = refusal(cfg.load_yaml, "elsewhere/zzz.yaml")
    assert everything.startswith(f"{Path('elsewhere/zzz.yaml')}: no such file.")
    assert all(name in everything for name in ("u2net_duts.yaml", "fcn_bag.yaml", "pix2pix.yaml"))


def test_a_folder_is_refused(tmp_path):
    assert refusal(cfg.load_yaml, tmp_path).startswith(f"{tmp_path}: ")


# Assignments of the command line


def test_assignments_become_a_nested_dict_and_later_ones_win():
    items = ["data.mean=[0, 0.5, 1e-1]", "optim.lr=1e-3", "optim.name=sgd", "optim.lr = 5E4"]
    assert cfg.parse_assignments(items) == {
        "data": {"mean": [0, 0.5, 0.1]},
        "optim": {"lr": 50000.0, "name": "sgd"},
    }
    assert cfg.parse_assignments([]) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.0e5", 100000.0),
        ("-.5", -0.5),
        ("+2e2", 200.0),
        ("12", 12),
        ("'1e-3'", "1e-3"),
        ("a=b", "a=b"),
        ("off", False),
        ("", None),
        ("null", None),
        ("1e", "1e"),
        ("e5", "e5"),
        ("runs/é", "runs/é"),
    ],
)
def test_assigned_values_are_yaml_that_knows_1e_3(text, value):
    read = cfg.parse_assignments([f"key={text}"])["key"]
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("item", ["optim.lr", "=1", ".lr=1", "optim.=1", "a..b=1", " =1", ""])
def test_a_malformed_assignment_is_refused_with_an_example(item):
    message = refusal(cfg.parse_assignments, [item])
    assert message.startswith(f"--set {shlex.quote(item)}: ")
    assert "--set optim.lr=1e-3" in message


@pytest.mark.parametrize(
    "value", ["*.jpg", "[1, 2", "!!python/name:os.system ", "010", "{a: 1, a: 2}"]
)
def test_an_unreadable_assigned_value_names_its_key(value):
    assert refusal(cfg.parse_assignments, [f"data.root={value}"]).startswith("--set data.root: ")


# Types


def test_no_values_give_the_defaults_and_values_replace_them(tmp_path):
    assert from_text(tmp_path, "") == Config()
    built = from_text(tmp_path, "epochs: 2\noptim: {lr: 1}\ndata: {mean: [0, 0.5, 1]}\ncrop: {}")
    assert built == Config(
        epochs=2, optim=Optim(lr=1.0), data=Data(mean=(0.0, 0.5, 1.0)), crop=Crop()
    )
    assert type(built.optim.lr) is float
    assert [type(x) for x in built.data.mean] == [float] * 3


def test_a_section_whose_lines_are_all_comments_keeps_its_defaults(tmp_path):
    assert from_text(tmp_path, "optim:\n  # lr: 1.0\n") == Config()


@pytest.mark.parametrize(
    ("values", "key", "fix"),
    [
        ({"optim": {"lrr": 1.0}}, "optim.lrr", "Did you mean optim.lr?"),
        ({"lr": 1.0}, "lr", "Did you mean optim.lr?"),
        ({"data": {"lr": 1.0}}, "data.lr", "Did you mean optim.lr?"),
        ({"epoch": 1}, "epoch", "Did you mean epochs?"),
        ({"LR": 1}, "LR", "Did you mean optim.lr?"),
        ({"weight-decay": 1}, "weight-decay", "Did you mean optim.weight_decay?"),
        ({"optimizer": {"lr": 1.0}}, "optimizer", "Did you mean optim?"),
        ({"crop": {"sise": 1}}, "crop.sise", "Did you mean crop.size?"),
        ({"siz": 1}, "siz", "Did you mean crop.size?"),
        ({"optim.lr": 1.0}, "optim.lr", "Nest it: write `lr:` indented under `optim:`."),
        ({"optim": {"qqqqq": 1}}, "optim.qqqqq", "Keys here: lr, weight_decay, name."),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(values, key, fix):
    message = refusal(cfg.build, Config, values, "recipe.yaml")
    assert message == f"recipe.yaml: {key}: unknown key. {fix}"


def test_of_keys_with_one_name_the_one_in_the_section_is_proposed_else_the_first():
    @dataclass
    class Gan:
        generator: Optim = field(default_factory=Optim)
        critic: Optim = field(default_factory=Optim)

    assert "mean generator.lr?" in refusal(cfg.build, Gan, {"lr": 1}, "f")
    assert "mean critic.lr?" in refusal(cfg.build, Gan, {"critic": {"lrr": 1}}, "f")


@pytest.mark.parametrize(
    ("yaml_text", "key", "expected", "fix"),
    [
        ("optim: {lr: 1e-3}", "optim.lr", "a number, got '1e-3' (str)", "write 1.0e-3"),
        ("optim: {lr: 5E4}", "optim.lr", "a number", "write 5.0e+4"),
        ("optim: {lr: 1.5e4}", "optim.lr", "a number", "write 1.5e+4"),
        ("optim: {lr: -.5}", "optim.lr", "a number", "write -0.5"),
        ("optim: {lr: '1'}", "optim.lr", "a number", "write 1.0 (without quotes)"),
        ("optim: {lr: 089}", "optim.lr", "a number", "write 89.0"),
        ("ema: 1e-3", "ema", "a number", "write 1.0e-3"),
        ("threshold: 1e-3", "threshold", "a number", "write 1.0e-3"),
        ("data: {mean: [0.1, 1e-1, 0]}", "data.mean[1]", "a number", "write 1.0e-1"),
        ("optim: {lr: high}", "optim.lr", "a number, got 'high' (str)", ""),
        ("optim: {lr: true}", "optim.lr", "a number, got True (bool)", ""),
        ("optim: {lr: null}", "optim.lr", "a number, got nothing (null)", ""),
        ("optim: {lr: .nan}", "optim.lr", "a finite number, got nan", ""),
        ("optim: {lr: -.inf}", "optim.lr", "a finite number, got -inf", ""),
        (f"optim: {{lr: 1{'0' * 400}}}", "optim.lr", "a finite number", ""),
        ("epochs: 3.0", "epochs", "a whole number, got 3.0 (float)", "Write 3 (without"),
        ("epochs: 1e3", "epochs", "a whole number", "Write 1000 (without"),
        ("epochs: '8'", "epochs", "a whole number", "Write 8 (without"),
        ("epochs: 3.5", "epochs", "a whole number, got 3.5 (float)", ""),
        ("epochs: .inf", "epochs", "a finite number", ""),
        ("epochs: yes", "epochs", "a whole number, got True (bool)", ""),
        ("sync_bn: 1", "sync_bn", "true or false, got 1 (int)", "Write true or false."),
        ("sync_bn: 'False'", "sync_bn", "true or false", "Write true or false."),
        ("task: 2012", "task", "text, got 2012 (int)", 'Put it in quotes (task: "2012"'),
        ("task: null", "task", "text, got nothing (null)", ""),
        ("data: {root: 1}", "data.root", "text", "--set 'data.root=\"1\"'"),
        ("resume: 1", "resume", "text, got 1 (int)", "Or resume: expected true or false"),
        ("resume: null", "resume", "text, got nothing (null)", "true or false"),
        ("tile: big", "tile", "one of auto", "Or tile: expected a whole number"),
        ("data: {mean: 0.5}", "data.mean", "a list such as [1, 2], got 0.5", ""),
        ("data: {mean: '0, 0, 0'}", "data.mean", "a list such as", ""),
        ("data: {mean: [0, 0]}", "data.mean", "a list of 3 values, got [0, 0]", "It has 2."),
        ("data: {scales: [1, [2]]}", "data.scales[1]", "a number, got [2] (list)", ""),
        ("data: {sizes: [1, 2, 2.5]}", "data.sizes[2]", "a whole number", ""),
        ("optim: adamw", "optim", "a section of `key: value` lines, got 'adamw'", ""),
        ("optim: [lr]", "optim", "a section", ""),
        ("crop: 3", "crop", "a section", ""),
        ("amp: fp61", "amp", "one of fp16, bf16, ", "off"),
        ("amp: on", "amp", "one of ", "off"),
        ("amp: null", "amp", "one of ", "auto"),
    ],
)
def test_a_wrong_type_is_refused_with_key_value_and_fix(tmp_path, yaml_text, key, expected, fix):
    message = refusal(from_text, tmp_path, yaml_text)
    assert message.startswith(f"recipe.yaml: {key}: expected {expected}")
    assert fix in message


def test_the_proposed_fix_for_a_number_is_read_as_that_number(tmp_path):
    for text in ("1e-3", "5E4", "1.5e4", "-.5", "+.5e-2", "3e+8", "089", "'2'", "7.e3"):
        message = refusal(from_text, tmp_path, f"optim: {{weight_decay: {text}}}")
        fix = message.partition(": write ")[2].partition(" ")[0]
        built = from_text(tmp_path, f"optim: {{weight_decay: {fix}}}")
        assert built.optim.weight_decay == float(text.strip("'"))


def test_unions_and_optional_fields_take_each_of_their_types(tmp_path):
    assert from_text(tmp_path, "resume: runs/a").resume == "runs/a"
    assert from_text(tmp_path, "resume: yes").resume is True
    assert from_text(tmp_path, "tile: 512").tile == 512
    assert from_text(tmp_path, "threshold: otsu").threshold == "otsu"
    assert from_text(tmp_path, "ema: 0.9").ema == 0.9
    assert from_text(tmp_path, "ema: ~").ema is None
    assert from_text(tmp_path, "data: {sizes: [], scales: []}").data == Data(sizes=(), scales=[])


@pytest.mark.parametrize(
    "written",
    [
        ["no", "yes"],
        ["1", "2.50", "0x10", "1_000"],
        ["null", "~", "on"],
        ["True", "off", "1e-3", ".inf"],
        ["road", "'007'", '"a, b"'],
    ],
)
def test_a_list_of_texts_has_them_as_they_are_written(tmp_path, written):
    """In a file, flat and line by line, and on the command line."""

    @dataclass
    class Names:
        names: list[str] = field(default_factory=list)
        pair: tuple[str, ...] = ()

    expected = [word.strip("'\"") for word in written]
    flow, block = f"names: [{', '.join(written)}]", "names:\n- " + "\n- ".join(written)
    for text in (flow, block, flow.replace("names", "pair")):
        built = cfg.build(Names, cfg.load_yaml(write(tmp_path, text)), "f")
        assert expected in (built.names, list(built.pair))
    values = cfg.parse_assignments([flow.replace(": ", "=", 1)])
    assert cfg.build(Names, cfg.merge({"names": ["a"]}, values), "f") == Names(expected)
    for wrong in ("[[a]]", "[{a: b}]"):
        message = refusal(cfg.build, Names, cfg.load_yaml(write(tmp_path, f"names: {wrong}")), "f")
        assert message.startswith("f: names[0]: expected text, got ")
    message = refusal(cfg.build, Names, {"names": [True]}, "f")
    assert message == "f: names[0]: expected text, got True (bool)."


@pytest.mark.parametrize("word", ["2012", "yes", "off", "1.50"])
def test_the_proposed_fix_for_a_text_is_read_as_text(word):
    """What a value was before YAML took it for a number or a truth value is not known here."""
    values = cfg.parse_assignments([f"data.root={word}"])
    message = refusal(cfg.build, Config, values, "f")
    flag, proposed = shlex.split(message[message.index("--set ") :].rstrip(")."))
    assert flag == "--set"
    fixed = cfg.build(Config, cfg.parse_assignments([proposed]), "f").data.root
    assert fixed == {"off": "no", "1.50": "1.5"}.get(word, word)


@pytest.mark.parametrize("word", ["off", "Off", "no", "false", "'off'"])
def test_off_is_the_choice_off_although_yaml_reads_a_boolean(tmp_path, word):
    assert from_text(tmp_path, f"amp: {word}").amp == "off"


def test_literals_keep_types_apart():
    @dataclass
    class Choices:
        size: Literal[1, 2] = 1
        verbose: Literal[True, "off"] = True
        switch: Literal["on", "off"] = "off"

    assert cfg.build(Choices, {"size": 2, "verbose": False, "switch": True}, "f") == Choices(
        2, "off", "on"
    )
    assert cfg.build(Choices, {"verbose": True}, "f").verbose is True
    assert "one of 1, 2" in refusal(cfg.build, Choices, {"size": True}, "f")
    assert "one of 1, 2" in refusal(cfg.build, Choices, {"size": "1"}, "f")


def test_lists_of_sections_are_built_and_checked():
    @dataclass
    class Many:
        crops: list[Crop] = field(default_factory=list)

    assert cfg.build(Many, {"crops": [{"size": 32}, None]}, "f").crops == [Crop(32), Crop()]
    message = refusal(cfg.build, Many, {"crops": [{}, {"sise": 32}]}, "f")
    assert message == "f: crops[1].sise: unknown key. Did you mean crops[1].size?"


def test_a_field_without_default_must_be_given():
    @dataclass
    class Inner:
        classes: int

    @dataclass
    class Outer:
        inner: Inner

    assert refusal(cfg.build, Outer, {}, "f") == "f: inner: missing. Give it a value."
    assert "f: inner.classes: missing." in refusal(cfg.build, Outer, {"inner": {}}, "f")
    assert cfg.build(Outer, {"inner": {"classes": 2}}, "f") == Outer(Inner(2))


def test_post_init_errors_get_source_and_section():
    assert refusal(cfg.build, Config, {"optim": {"lr": -1}}, "command line") == (
        "command line: optim.lr: must not be negative. Write for example 1.0e-3."
    )
    assert refusal(cfg.build, Config, {"crop": {"size": 33}}, "f") == (
        "f: crop: sizes that are multiples of 32 are supported"
    )
    assert refusal(cfg.build, Optim, {"lr": -1}, "f").startswith("f: lr: must not")


def test_an_unsupported_annotation_is_a_programming_error():
    @dataclass
    class Odd:
        path: Path = Path()

    with pytest.raises(TypeError, match="path"):
        cfg.build(Odd, {"path": "x"}, "f")


# Merging, comparing, writing


def test_merge_is_recursive_and_leaves_its_arguments_alone():
    base = {"optim": {"lr": 1, "wd": 2}, "task": "a", "empty": None}
    first, second = {"optim": {"lr": 3}, "empty": {"x": 1}}, {"optim": {"lr": 4}, "task": None}
    assert cfg.merge(base, first, second) == {
        "optim": {"lr": 4, "wd": 2},
        "task": None,
        "empty": {"x": 1},
    }
    assert base == {"optim": {"lr": 1, "wd": 2}, "task": "a", "empty": None}
    assert first == {"optim": {"lr": 3}, "empty": {"x": 1}}
    assert cfg.merge({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(tmp_path, "epochs: 5\noptim: {lr: 0.5, weight_decay: 0.25}\n")
    values = cfg.merge(cfg.load_yaml(path), cfg.parse_assignments(["optim.lr=1e-3"]))
    assert cfg.build(Config, values, "command line") == Config(
        epochs=5, optim=Optim(lr=0.001, weight_decay=0.25)
    )


def test_to_dict_is_plain_complete_and_independent():
    config = Config(crop=Crop(64))
    values = cfg.to_dict(config)
    assert list(values) == [
        *("task", "epochs", "amp", "resume", "ema", "tile", "threshold", "sync_bn"),
        *("optim", "data", "crop"),
    ]
    assert values["data"] == {
        "root": None,
        "mean": [0.485, 0.456, 0.406],
        "scales": [1.0],
        "sizes": [320],
    }
    assert values["crop"] == {"size": 64}
    values["data"]["scales"].append(2.0)
    assert config.data.scales == [1.0]
    with pytest.raises(TypeError, match="not a plain value"):
        cfg.to_dict({"path": Path("x")})


def test_diff_lists_dotted_keys():
    a, b = cfg.to_dict(Config()), cfg.to_dict(Config(epochs=1, optim=Optim(lr=0.5), crop=Crop()))
    assert cfg.diff(a, a) == []
    assert cfg.diff(a, b) == [
        ("epochs", 360, 1),
        ("optim.lr", 0.001, 0.5),
        ("crop.size", None, 288),
    ]
    assert cfg.diff({"old": 1, "n": [1, 2]}, {"n": [1, 3]}) == [
        ("old", 1, None),
        ("n", [1, 2], [1, 3]),
    ]


def test_the_written_file_is_readable(tmp_path):
    cfg.dump_yaml(Config(optim=Optim(lr=1e-6)), tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_text() == (
        "task: saliency\n"
        "epochs: 360\n"
        "amp: auto\n"
        "resume: false\n"
        "ema: null\n"
        "tile: auto\n"
        "threshold: 0.5\n"
        "sync_bn: false\n"
        "optim:\n"
        "  lr: 1.0e-06\n"
        "  weight_decay: 0.0001\n"
        "  name: adamw\n"
        "data:\n"
        "  root: null\n"
        "  mean: [0.485, 0.456, 0.406]\n"
        "  scales: [1.0]\n"
        "  sizes: [320]\n"
        "crop: null\n"
    )


TRICKY = [
    *("", " ", "off", "yes", "null", "~", "1", "010", "1:30", "1e-3", "1.0e-3", ".5", "nan"),
    *("2024-01-31", "a: b", "# no", "a #b", "'", '"', "*.jpg", "&a", "!!int 1", "- x", "[1", "<<"),
    *(
        "two\nlines\n",
        "tab\t",
        "trailing ",
        "Größe",
        "画像",
        "🦊",
        "\u2028",
        "\udc80",
        "=",
        "@",
    ),
]


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives_the_round_trip(tmp_path, text):
    config = Config(task=text, data=Data(root=text))
    cfg.dump_yaml(config, tmp_path / "config.yaml")
    assert cfg.build(Config, cfg.load_yaml(tmp_path / "config.yaml"), "f") == config


def test_numbers_survive_the_round_trip(tmp_path):
    rng = random.Random(0)
    numbers = [rng.uniform(-1, 1) * 10.0 ** rng.randint(-300, 300) for _ in range(300)]
    numbers += [0.0, 1e16, 1e-5, 5e-324, sys.float_info.max, 0.1 + 0.2]
    config = Config(epochs=10**30, data=Data(scales=numbers), amp="off", crop=Crop(0))
    cfg.dump_yaml(config, tmp_path / "config.yaml")
    assert cfg.build(Config, cfg.load_yaml(tmp_path / "config.yaml"), "f") == config


def test_dump_takes_dicts_and_any_safe_loader_reads_the_file(tmp_path):
    shared = [1, 2]
    values = {"b": {"on": shared, "x": shared}, "a": (1, 2)}
    cfg.dump_yaml(values, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(text) == {"b": {"on": [1, 2], "x": [1, 2]}, "a": [1, 2]}
    assert "&" not in text
    cfg.dump_yaml({"root": "Größe/画像"}, tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "root: Größe/画像\n"


def test_writing_replaces_the_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    cfg.dump_yaml(Config(epochs=1), path)
    cfg.dump_yaml(Config(epochs=2), path)
    before = path.read_bytes()
    assert b"epochs: 2" in before

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    message = refusal(cfg.dump_yaml, Config(epochs=3), path)
    assert message.startswith(f"{path}: No space left on device.")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "config.yaml"
    assert refusal(cfg.dump_yaml, Config(), path).startswith(f"{path}: ")
