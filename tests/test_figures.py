"""A figure that stands in several places is the same in all of them, and follows from its table."""

import re
from math import ceil

import pytest
from conftest import REPO
from test_edits import EDITS, touched

from train_utils.errors import UserError
from train_utils.run_folder import newest_best_checkpoint

WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def tables(path):
    """The rows of a page's tables, each a dict by the columns' names."""
    rows, columns = [], None
    for line in (REPO / path).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
        elif set(line) - set("|- "):
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


ROWS = tables("docs/performance.md")


def measured(kind, name, column):
    """A cell of docs/performance.md, of the row that has this name in its column `kind`."""
    (cell,) = [row[column] for row in ROWS if row.get(kind) == name]
    return cell


def quoted(path, pattern):
    """What a pattern's only group finds in a file, where it must match once."""
    text = (REPO / path).read_text(encoding="utf-8")
    (cell,) = re.findall(pattern, " ".join(text.split()))  # sentences in one line
    return cell


def same(one, other):
    """Whether two figures agree as far as the shorter of them goes."""
    digits = min(len(text.partition(".")[2]) for text in (one, other))
    return abs(float(one) - float(other)) <= 0.5 * 10**-digits + 1e-9


def test_what_the_same_figure_is():
    assert same("1.86", "1.856") and same("2.9", "2.915") and same("18", "17.6")
    assert not same("1.55", "1.86") and not same("1.86", "1.85") and not same("18", "17.4")


FIGURES = {
    "README: training": (
        quoted("README.md", r"u2net_full trains ([\d.]+) times as fast"),
        measured("system", "u2net_full", "× plain"),
    ),
    "a cache in memory": (
        quoted("docs/data.md", r"Loading is then ([\d.]+) to [\d.]+ times"),
        measured("work", "ram cache, second", "ratio"),
    ),
    "a cache on disk": (
        quoted("docs/data.md", r"Loading is then [\d.]+ to ([\d.]+) times"),
        measured("work", "disk cache, second", "ratio"),
    ),
    "a step of u2net_lite": (
        quoted("docs/scaling.md", r"at 288² \(([\d.]+) s on both cores\)"),
        str(float(measured("system", "u2net_lite", "ours ms")) / 1000),
    ),
    "U2NETP's MAE": (
        quoted("docs/results.md", r"without mean and standard deviation: MAE ([\d.]+)"),
        quoted("docs/performance.md", r"for ([\d.]+) and [\d.]+ in fp32"),
    ),
    "U2NETP's maxF1": (
        quoted(
            "docs/results.md",
            r"without mean and standard deviation: MAE [\d.]+, maxF1 ([\d.]+)",
        ),
        quoted("docs/performance.md", r"for [\d.]+ and ([\d.]+) in fp32"),
    ),
    "a save": (
        quoted("docs/performance.md", r"a save per 100 steps costs ([\d.]+) % of u2net_full"),
        quoted("docs/reliability.md", r"\| u2net_full, idle .*? % / ([\d.]+) % \|"),
    ),
    "faults": (
        quoted("README.md", r"\[(\d+) faults, what happens"),
        quoted("docs/reliability.md", r"what becomes of (\d+) faults"),
    ),
    "faults, of launching": (
        quoted("docs/launching.md", r"lists (\d+) faults, what happens"),
        quoted("docs/reliability.md", r"what becomes of (\d+) faults"),
    ),
    "3.5× for u2net_lite": (
        quoted("docs/performance.md", r"3\.5× would need ([\d.]+) of"),
        str(3.5 / float(measured("system", "u2net_lite", "limit"))),
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_two_places_have_the_same_figure(name):
    one, other = FIGURES[name]
    assert same(one, other)


def test_what_is_called_out_of_reach_is_beyond_its_limit():
    quoted("docs/performance.md", r"(in fp32 3× is beyond the limit for u2net_full)")
    assert float(measured("system", "u2net_full", "limit")) < 3
    quoted(
        "docs/performance.md", r"(it is beyond the limit for u2net_lite, u2net_full and unet_vgg16)"
    )
    for model in ("u2net_lite", "u2net_full", "unet_vgg16"):
        assert float(measured("model", model, "limit")) < 3


def test_ratios_and_shares_follow_from_their_rows():
    compared = 0
    for row in ROWS:
        values = {name: float(cell) for name, cell in row.items() if re.fullmatch(r"[\d.]+", cell)}
        ratios = {name: name.removeprefix("× ") for name in values if name.startswith("× ")}
        for name, plain in {**ratios, **({"ratio": "plain"} if "ratio" in values else {})}.items():
            unit = next(unit for unit in ("ms", "s", "img/s", "/s") if f"ours {unit}" in values)
            ratio = values[f"{plain} {unit}"] / values[f"ours {unit}"]
            ratio = 1 / ratio if unit.endswith("/s") else ratio
            assert values[name] == pytest.approx(ratio, rel=0.02), row
            compared += 1
        if "limit" in values:
            assert values["limit"] == pytest.approx(values["× plain"] / values["share"], rel=0.02)
        if {"GFLOP/img", "batch", "ceiling"} <= values.keys():
            rate = values["GFLOP/img"] * values["batch"] / values["ours ms"] * 1000
            assert values["share"] == pytest.approx(rate / values["ceiling"], rel=0.02), row
    assert compared >= 15


def test_the_first_result_takes_as_long_as_is_promised(tmp_path):
    (row,) = [row for row in tables("docs/results.md") if row.get("command") == "`python train.py`"]
    minutes, seconds = map(int, re.fullmatch(r"(\d+) min (\d+) s", row["time"]).groups())
    limit = ceil(minutes + seconds / 60)
    assert quoted("README.md", r"in less than (\w+) minutes on two CPU cores") == WORDS[limit]
    assert quoted("README.zh-CN.md", r"不到 (\d+) 分钟") == str(limit)
    assert quoted("train.py", r"embedded data: no download, (\d+) minutes") == str(limit)
    with pytest.raises(UserError, match=rf"\({limit} minutes on two cores\)"):
        newest_best_checkpoint(tmp_path)


PLACES = {
    "a loss": "a. loss",
    "a network": "b. network",
    "an augmentation": "c. augmentation",
    "a metric": "d. metric",
    "a task": "e. task",
    "your own torch Dataset": "f. dataset",
    "another optimizer": "g. optimizer",
    "a scalar in the log": "h. scalar",
}


@pytest.mark.parametrize("what", PLACES)
def test_an_edit_takes_as_many_lines_as_readme_says(what):
    (row,) = [row for row in tables("README.md") if row.get("what") == what]
    _, lines = touched(EDITS[PLACES[what]])
    assert row["lines"].partition(",")[0] == str(lines)


def test_the_depth_task_takes_as_many_lines_as_architecture_says():
    _, lines = touched(EDITS["e. task"])
    assert quoted("docs/architecture.md", r"adds a depth task in (\d+) lines") == str(lines)
