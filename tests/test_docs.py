"""What the documents name is there, and what they tell to type is understood."""

import importlib.util
import re
import shlex

import pytest
from conftest import REPO

import arguments
import predict
import tasks
from train_utils.config import load_yaml, parse_assignments

PAGE = (REPO / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \|(.+)\|(.+)\|(.+)\|$", PAGE, flags=re.MULTILINE)


def test_every_fault_has_a_row():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 54))


@pytest.mark.parametrize(("number", "tests"), [(row[0], row[3]) for row in ROWS])
def test_every_fault_names_tests_that_exist(number, tests):
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

DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
PARSERS = {
    "train.py": arguments.parse_args,
    "train_multi_GPU.py": arguments.parse_args,
    "validation.py": arguments.parse_validation_args,
    "predict.py": predict.parse_args,
}


def links(document):
    return re.findall(r"\]\((?!https?:)([^)]+)\)", document.read_text(encoding="utf-8"))


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


def commands():
    """(document, command) of every line of a script, or of a benchmark, that a document shows."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for name, value in re.findall(r'^([A-Z]+)="(.+)"$', text, flags=re.MULTILINE):
            text = text.replace(f"${name}", value)
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        lines = "".join(blocks).replace("\\\n", " ").splitlines()
        spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        for line in [*lines, *(" ".join(span.split()) for span in spans)]:
            command = re.sub(r"\s#.*|…", "", line).rpartition("&&")[2].strip()
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
