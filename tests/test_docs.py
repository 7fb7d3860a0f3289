"""What the documents name is there, and what they tell to type is understood."""

import dataclasses
import importlib.util
import re
import shlex
from functools import partial

import pytest
import test_edits
import yaml
from conftest import REPO

import check
import predict
import tasks
import validation
from train_utils import settings
from train_utils.arguments import parse_args
from train_utils.config import load_yaml, parse_assignments

PAGE = (REPO / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \|(.+)\|(.+)\|(.+)\|$", PAGE, flags=re.MULTILINE)
ATTACKS = re.findall(
    r"^\| (\d) \|(.+)\|(.+)\|(.+)\|$",
    (REPO / "docs" / "security.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)
DATA = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
ODD = re.findall(r"^\| (.+) \| (.+) \|$", DATA.partition("\n## Odd inputs")[2], flags=re.MULTILINE)
NAMED = [(row[1], row[3]) for row in [*ROWS, *ATTACKS]] + ODD[1:]


def test_every_fault_has_a_row():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 54))


@pytest.mark.parametrize("tests", [tests for _, tests in NAMED], ids=[kind for kind, _ in NAMED])
def test_every_fault_attack_and_odd_input_names_tests_that_exist(tests):
    module, names = None, re.findall(r"`([^`]+)`", tests)
    assert names
    for name in names:
        if name.endswith(".py"):
            assert (REPO / "tests" / name).is_file()
            continue
        file, _, function = name.rpartition("::")
        if name.startswith("…"):
            file, function = module, name[1:]
        elif not file:
            file, function = name, ""
        module = file
        text = (REPO / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, name


# -- links and commands of all documents ----------------------------------------------------------

ENGLISH, CHINESE = REPO / "README.md", REPO / "README.zh-CN.md"
PAGES = sorted((REPO / "docs").glob("*.md"))
DOCUMENTS = [*sorted(REPO.glob("*.md")), *PAGES]
PARSERS = {
    "check.py": check.parse_args,
    "train.py": partial(parse_args, flags=tasks.train_flags()),
    "train_multi_GPU.py": partial(parse_args, flags=tasks.train_flags()),
    "validation.py": validation.parse_args,
    "predict.py": predict.parse_args,
}


def links(document):
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"\]\((?!https?:)([^)]+)\)", text)


def headings(document):
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in links(document):
        target, _, anchor = link.partition("#")
        path = document.parent / target if target else document
        assert path.exists(), link
        assert not anchor or anchor in headings(path), link


def spans(text):
    """What stands between backticks, outside of code blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


FILES = [path.relative_to(REPO).as_posix() for path in REPO.rglob("*.*") if path.is_file()]
OF_A_RUN = {"config.yaml"}  # is in a run's folder


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=lambda p: p.name
)
def test_files_that_are_named_exist(document):
    """By their path, or by its end where the text says in which folder they are."""
    for span in spans(document.read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w./-]+\.(py|yaml|sh|md|toml)", span) and span not in OF_A_RUN:
            assert any(f"/{file}".endswith(f"/{span}") for file in FILES), span


def commands():
    """(document, command) of every line of a script, or of a benchmark, that a document shows."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name, value in re.findall(r'^([A-Z]+)="(.+)"$', text, flags=re.MULTILINE):
            text = text.replace(f"${name}", value)
        lines = "".join(blocks(text)).replace("\\\n", " ").splitlines()
        for line in [*lines, *(" ".join(span.split()) for span in spans(text))]:
            command = re.sub(r"\s#.*|…|^\(\w\) ", "", line).rpartition("&&")[2].strip()
            if re.search(r"(python|torchrun) .*(\w\.py|-m benchmarks)", command):
                yield document.name, command


@pytest.mark.parametrize(("document", "command"), sorted(set(commands())))
def test_commands_are_understood(document, command):
    """By the scripts' own parsers; settings by the recipe's, or by any system's without one."""
    words = shlex.split(command.removesuffix("--help"))
    module = next((word for word in words if word.startswith("benchmarks.")), None)
    if module:
        assert importlib.util.find_spec(module), command
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (REPO / script).is_file()
    if script not in PARSERS:
        return
    args = PARSERS[script](
        words[words.index(script) + 1 :] or ["photo.jpg"] * (script == "predict.py")
    )
    if args.config:
        assert (REPO / args.config).is_file()
    settings = parse_assignments(args.set)
    assert_keys_exist(settings, args.config)


def assert_keys_exist(settings, config):
    if config:
        recipes = [REPO / config]
    else:
        recipes = [
            REPO / "configs" / f"{name}.yaml" for name in ("shapes", "unet", "matting", "pix2pix")
        ]
    for section, values in settings.items():
        for key in values:
            assert any(
                hasattr(
                    getattr(tasks.read_config(load_yaml(recipe), "recipe", {}).cfg, section), key
                )
                for recipe in recipes
            ), f"{section}.{key}"


# -- README, in two languages ---------------------------------------------------------------------


def test_readme_is_short():
    assert len(ENGLISH.read_text(encoding="utf-8").split()) <= 1600


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda path: path.name)
def test_every_page_is_linked(readme):
    expected = {f"docs/{page.name}" for page in PAGES} | {"CONTRIBUTING.md", "CHANGELOG.md"}
    other = CHINESE if readme == ENGLISH else ENGLISH
    assert expected | {other.name} <= set(links(readme))


def without_comments(text):
    return [re.sub(r"\s+#.*", "", line) for block in blocks(text) for line in block.splitlines()]


def cells(text):
    """Of each table row: its code, its links and its figures."""
    return [
        (
            re.findall(r"`([^`]+)`", row),
            re.findall(r"\]\(([^)]+)\)", row),
            re.findall(r"\d+(?:\.\d+)?", re.sub(r"`[^`]+`|\]\([^)]+\)", "", row)),
        )
        for row in re.findall(r"^\|.+\|$", text, flags=re.MULTILINE)
    ]


def test_both_languages_show_the_same():
    english, chinese = (path.read_text(encoding="utf-8") for path in (ENGLISH, CHINESE))
    assert without_comments(english) == without_comments(chinese)
    assert cells(english) == cells(chinese)
    assert english.count("\n## ") == chinese.count("\n## ")
    figures = [set(re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", text)) for text in (english, chinese)]
    assert figures[0] <= figures[1]
    names = {ENGLISH.name, CHINESE.name}
    assert set(links(ENGLISH)) - names == set(links(CHINESE)) - names


def rows_of(text, heading):
    """The cells of the rows below a heading, up to the next one."""
    part = text.partition(f"\n## {heading}")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \|$", part, flags=re.MULTILINE)[1:]
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


EDITS = rows_of(ENGLISH.read_text(encoding="utf-8"), "Where to edit")


@pytest.mark.parametrize("row", EDITS, ids=lambda row: row[0])
def test_places_to_edit_are_there(row):
    """Every file, and in it every function and line that the table names; classes anywhere."""
    _, where, place, _ = row
    files = [REPO / name.replace("<name>", "saliency") for name in spans(where)]
    texts = [f.read_text(encoding="utf-8") for f in files if f.is_file()]
    classes = "".join(
        f.read_text(encoding="utf-8") for f in (*REPO.glob("*.py"), *REPO.glob("*/*.py"))
    )
    for name in spans(place):
        if not re.fullmatch(r"[\w.]+", name):  # a line, or an option
            line = name.partition("…")[0]
            assert name.startswith("--set ") or any(line in text for text in texts), name
            continue
        for part in name.split("."):
            found = any(f"def {part}(" in text or f"class {part}(" in text for text in texts)
            assert found or re.search(rf"^class {part}\b", classes, flags=re.M), part
    # of a new recipe nothing is there yet
    assert all(file.exists() or file.parent.name == "configs" for file in files) and files


@pytest.mark.parametrize("name", test_edits.EDITS)
def test_the_table_says_how_many_lines_an_edit_takes(name):
    (row,) = [row for row in EDITS if name.partition(". ")[2] in row[0].lower()]
    _, lines = test_edits.touched(test_edits.EDITS[name])
    assert re.match(r"\d+", row[3])[0] == str(lines)


# -- settings -------------------------------------------------------------------------------------

SETTINGS = (REPO / "docs" / "settings.md").read_text(encoding="utf-8")
SHARED = {
    "Training": ("train", settings.TrainConfig),
    "Optimizer": ("optim", settings.OptimConfig),
    "Evaluation": ("eval", settings.EvalConfig),
    "Data": ("data", settings.PhotoData),
}


def defaults(section, cls):
    """(key, default) of a section, as YAML writes it."""
    made = {}
    for field in dataclasses.fields(cls):
        value = field.default_factory() if field.default is dataclasses.MISSING else field.default
        value = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        made[f"`{section}.{field.name}`"] = f"`{text}`"
    return made


@pytest.mark.parametrize("heading", SHARED)
def test_shared_settings_are_described(heading):
    rows = {row[0]: row[1] for row in rows_of(SETTINGS, heading)}
    assert rows == defaults(*SHARED[heading])


@pytest.mark.parametrize("name", tasks.task_names())
def test_settings_of_a_task_are_described(name):
    module, expected = tasks.load_task(name), {}
    config = module.Config
    for field in dataclasses.fields(config):
        if field.name in ("data", "model", "loss", "eval"):
            expected |= defaults(field.name, field.default_factory)
    shared = [defaults(*SHARED[heading]) for heading in ("Evaluation", "Data")]
    rows = {row[0]: row[1] for row in rows_of(SETTINGS, name.capitalize())}
    assert rows == {key: v for key, v in expected.items() if not any(key in s for s in shared)}
    (best,) = [row[2] for row in rows_of(SETTINGS, "Training") if row[0] == "`train.best`"]
    listed = best.partition(f"{name.capitalize() if name == 'saliency' else name}: ")[2]
    assert re.findall(r"`(\w+)`", listed.partition(";")[0]) == list(module.Task.METRICS)
