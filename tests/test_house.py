"""How the house is built: what lies at its root, how long its parts are, who imports whom."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from conftest import REPO

SCRIPTS = {
    **{"train.py": 170, "train_multi_GPU.py": 45, "predict.py": 180, "validation.py": 130},
    "check.py": 150,
}
PRODUCT = sorted(
    path
    for pattern in ("*.py", "launch/*.py", "src/**/*.py", "tasks/**/*.py", "train_utils/**/*.py")
    for path in REPO.glob(pattern)
)
ROOT = {
    *("train.py", "train_multi_GPU.py", "validation.py", "predict.py", "export.py", "check.py"),
    *("my_dataset.py", "transforms.py", "requirements.txt", "requirements-dev.txt"),
    *("configs", "tasks", "src", "train_utils", "weights", "tests", "benchmarks", "docs", "launch"),
    *("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "SECURITY.md"),
    *("pyproject.toml", ".ci", ".gitignore", ".gitattributes", ".github"),
}


def named(path: Path) -> str:
    """A file's module."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {named(path): path for path in PRODUCT}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """The functions and methods of a file, with their lines."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno
            yield node.name, node.end_lineno - node.lineno + 1


def imported(path: Path) -> set[str]:
    """The modules of the product that a file imports, also within functions."""
    folder = path.relative_to(REPO).parent.parts
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:  # a module of a package, or what the source defines
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES else source)
    return found & MODULES.keys()


@pytest.mark.parametrize(("script", "most"), SCRIPTS.items())
def test_a_script_is_read_in_one_go(script, most):
    assert len((REPO / script).read_text(encoding="utf-8").splitlines()) <= most


def test_no_function_is_longer_than_a_screen():
    long = {
        f"{path.relative_to(REPO)}::{name}": lines
        for path in PRODUCT
        for name, lines in functions(path)
        if lines > 60
    }
    assert not long
    lines = dict(functions(REPO / "train_utils" / "train_and_eval.py"))
    assert lines["train_one_epoch"] <= 40
    assert len((REPO / "launch" / "heap.py").read_text().splitlines()) <= 40


def test_imports_make_no_circle():
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    while outside := {
        name
        for name, needed in graph.items()
        if not needed & graph.keys() or not any(name in others for others in graph.values())
    }:
        graph = {name: needed for name, needed in graph.items() if name not in outside}
    assert not graph


def test_no_import_hides_in_a_function():
    """What a file needs stands at its top, also optional packages, which `try` may do without."""
    hidden = [
        f"{path.relative_to(REPO)}: {ast.unparse(node)}"
        for path in PRODUCT
        for function in ast.walk(tree(path))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not hidden


@pytest.mark.parametrize("folder", ["src", "train_utils"])
def test_networks_and_shared_code_import_nothing_above_them(folder):
    for name, path in MODULES.items():
        if name.split(".")[0] == folder:
            assert {module.split(".")[0] for module in imported(path)} <= {folder}, name


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="asks git what belongs to the repository")
def test_the_root_holds_only_what_is_listed():
    files = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {file.split("/")[0] for file in files} <= ROOT


def test_every_shared_module_has_its_place_on_the_page_of_the_architecture():
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("### What the lines of")[2].partition("\n## ")[0]
    listed: list[str] = []
    for row in re.findall(r"^\| .*`.*", table, re.MULTILINE):
        _, _, modules, lines, _, _ = row.split("|")
        names = re.findall(r"`(\w+)`", modules)
        paths = [REPO / "train_utils" / f"{name}.py" for name in names]
        counted = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        assert abs(counted - int(lines.replace(",", ""))) <= 0.1 * counted, (row, counted)
        listed += names
    assert sorted(listed) == sorted(path.stem for path in REPO.glob("train_utils/*.py"))
