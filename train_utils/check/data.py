"""What the files of a task's data hold: pairs, headers, pixels."""

from torch.utils.data import Dataset

from train_utils.check.findings import CheckedPair, Finding, Report, Split
from train_utils.data import unwrap_subset
from train_utils.datasets import pairs_of
from train_utils.errors import UserError
from train_utils.task import BaseTask


def check_data(task: BaseTask, full: bool) -> Report:
    """Look at the files behind a task's training and validation data; full: at all of their pixels.

    What a training would refuse becomes a finding.
    """
    report = Report(task.name, task.TARGETS)
    try:
        datasets = task.build_datasets()
    except UserError as error:
        report.findings.append(Finding("pairs", "error", str(error)))
        return report
    report.pairs = _pairs("train", datasets[0]) + _pairs("val", datasets[1])
    return report


def _pairs(split: Split, dataset: Dataset) -> list[CheckedPair]:
    """The pairs of files behind a dataset, each once, however often it comes."""
    full, indices = unwrap_subset(dataset)
    pairs = pairs_of(dataset)
    named = {pair: full.stems[index] for index, pair in zip(indices, pairs, strict=False)}
    return [CheckedPair(split, name, *map(str, pair)) for pair, name in named.items()]
