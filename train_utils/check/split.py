"""A split in which no picture is on both sides, as list files, and the command that trains."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from train_utils.check.data import Configure
from train_utils.check.findings import CheckedPair, Finding, Report
from train_utils.check.output import CheckFolder
from train_utils.config import as_value, diff, to_dict
from train_utils.errors import UserError, typed
from train_utils.pairing import columns
from train_utils.settings import FolderData
from train_utils.task import BaseTask

LISTS = "train.txt", "val.txt"
_SPLIT = "The split that is written beside this report keeps them on one side."
_BY_HAND = "Keep all of a group in one of the two; report.json has the groups."
_NONE_LEFT = (
    "Nothing would be left in one of the two without them, so that no split was written: validate "
    "on other pictures."
)


def require_other_lists(folder: CheckFolder, data: FolderData) -> None:
    """UserError where the lists that are read are those that would be written."""
    for path in filter(None, (data.list, data.val_list)):
        if Path(path).resolve() in [(folder.path / name).resolve() for name in LISTS]:
            raise UserError(
                f"{path}: is read, and would be written over. Choose another folder with -o, for "
                f"example -o {typed(folder.path.with_name(f'{folder.path.name}_again'))}"
            )


def write_lists(report: Report, folder: CheckFolder) -> list[Path]:
    """Write both parts of the split without leaks, and say so in the findings about leaks.

    None are written where a part would be empty, or where lists cannot hold such pairs.
    """
    parts = without_leaks(report)
    lists = _write(report, parts, folder)
    for finding in report.findings:
        if finding.kind in ("leak", "neighbours") and finding.severity != "note":
            finding.fix = _SPLIT if lists else _BY_HAND if all(parts) else _NONE_LEFT
    return lists


def _write(report: Report, parts: Sequence[list[CheckedPair]], folder: CheckFolder) -> list[Path]:
    lines = [[_line(pair) for pair in part] for part in parts]
    if not all(lines) or any(pair.image == pair.target for part in parts for pair in part):
        return []
    unlisted = [line for part in lines for line in part if not _can_be_listed(line)]
    if unlisted:
        text = "names that a list of pairs cannot hold, so none was written"
        report.findings.append(
            Finding("no list", "note", text, "Rename them.", len(unlisted), unlisted)
        )
        return []
    return [folder.write(name, "\n".join(part)) for name, part in zip(LISTS, lines, strict=True)]


def without_leaks(report: Report) -> tuple[list[CheckedPair], list[CheckedPair]]:
    """Training and validation pairs, each readable, with alike images on one side.

    Where the validation pairs are a share that a hash of names held out, alike ones go where the
    first of them is. Given ones stay, so that scores can be compared: training ones are left out.
    """
    side = {index: pair.split for index, pair in enumerate(report.pairs)}
    for group in report.alike:
        if group.across and report.held_out:
            side |= dict.fromkeys(group.pairs, report.pairs[group.pairs[0]].split)
        elif group.across:
            for index in group.pairs:
                if side.get(index) == "train":
                    del side[index]
    for index in report.unusable:
        side.pop(index, None)
    parts = [
        [report.pairs[i] for i in sorted(side) if side[i] == split] for split in ("train", "val")
    ]
    return parts[0], parts[1]


def _line(pair: CheckedPair) -> str:
    return "\t".join(str(Path(path).absolute()) for path in (pair.image, pair.target))


def _can_be_listed(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    parts = line.split("\t")
    return len(parts) == 2 and columns(line) == parts and not {*"\r\n"} & {*line}


def training_command(
    words: Sequence[str],
    report: Report,
    task: BaseTask,
    lists: Sequence[Path],
    configure: Configure,
) -> str:
    """The command line to train with: the words that were given, and what mends the findings.

    lists: those of a split without leaks, where it has to be another one.
    """
    words = [*words]
    for setting in dict.fromkeys(s for finding in report.findings for s in finding.settings):
        words += ["--set", setting]
    if lists:
        listed = _without_sources(words, task.cfg.data.sources)
        for key, path in zip(("list", "val_list"), lists, strict=True):
            listed += ["--set", f"data.{key}={as_value(str(path))}"]
        try:
            listed += _kept_settings(task, configure(listed))
            configure(listed).build_datasets()
            words = listed
        except UserError:
            pass  # of a task that takes no lists; the finding about leaks stays
    return " ".join(["python train.py", *map(_typed, words)])


def _without_sources(words: Sequence[str], sources: Sequence[str]) -> list[str]:
    """A command line without what says where the data is."""
    parser = argparse.ArgumentParser(add_help=False)
    for flag in ("--data-path", "--images", "--masks", "--val-images", "--val-masks"):
        parser.add_argument(flag)
    parser.add_argument("--set", action="append", default=[])
    found, rest = parser.parse_known_args(words)
    keys = tuple(f"data.{key}=" for key in sources)
    return rest + [w for s in found.set if not s.startswith(keys) for w in ("--set", s)]


def _kept_settings(old: BaseTask, new: BaseTask) -> list[str]:
    """What the old sources of the data decided by default, said outright."""
    words = []
    for key, before, _ in diff(to_dict(old.cfg), to_dict(new.cfg)):
        if key.removeprefix("data.") not in old.cfg.data.sources:
            words += ["--set", f"{key}={json.dumps(before)}"]
    return words


def _typed(word: str) -> str:
    return shlex.quote(word) if word.startswith("-") else typed(word)
