"""What the documents name is there."""

import re

import pytest
from conftest import REPO

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


def test_links_of_the_page_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (REPO / "docs" / target).exists(), target
