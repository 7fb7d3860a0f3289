"""The part of a check that costs next to nothing, which every training begins with."""

from typing import Any

import numpy as np
from torch.utils.data import Subset

from train_utils.check.findings import CheckedPair, Finding, Report
from train_utils.check.images import find_sizes
from train_utils.datasets import pairs_of, try_all
from train_utils.image_io import image_size

_LOOKED_AT = 200  # images, by their headers: some hundredths of a second


def first_look(dataset: Any, side: int) -> list[Finding]:
    """What the sizes of some images say, for a network that is trained on at `side`."""
    some = range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))
    sizes, _ = try_all([image for image, _ in pairs_of(Subset(dataset, some))], image_size)
    if not sizes:
        return []
    pairs = [CheckedPair("train", path.stem, str(path), "") for path in sizes]
    report = Report("", "masks", pairs)
    width, height = np.array(list(sizes.values()), float).T
    report.statistics = {"width": width, "height": height}
    find_sizes(report, side)
    return report.ranked()
