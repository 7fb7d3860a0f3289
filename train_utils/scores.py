"""What an evaluation of its own reports: every score at full precision, as text and as JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_utils.errors import UserError, typed
from train_utils.files import read_regular, write_text
from train_utils.log import get_logger
from train_utils.metrics import ExactMetric, all_remarks, all_scores

_LARGEST = 1_000_000  # bytes of a file of scores


def scores_of(metrics: Sequence[ExactMetric]) -> dict[str, Any]:
    """All scores by name, `n`, the number of images, and `remarks` if there are any."""
    remarks = all_remarks(metrics)
    return {
        **all_scores(metrics),
        "n": metrics[0].count,
        **({"remarks": remarks} if remarks else {}),
    }


def report(scores: dict[str, Any]) -> None:
    """Log the scores in a line, and each remark in one; UserError where nothing was scored."""
    numbers, remarks = dict(scores), scores.get("remarks", [])
    numbers.pop("remarks", None)
    if scores["n"] == 0:
        raise UserError("no image was scored: the data set is empty. Check its folder.")
    if all(math.isnan(score) for name, score in numbers.items() if name != "n"):
        raise UserError(
            f"nothing could be scored ({'; '.join(remarks) or 'every score is nan'}). Check the "
            "targets, and the weights for values that are not finite."
        )
    get_logger().info("  ".join(f"{name}: {value:.6g}" for name, value in numbers.items()))
    for remark in remarks:
        get_logger().info(remark)


def check_json(path: Path) -> None:
    """Raise UserError for a file that `write_json` may not replace: any but one of scores."""
    problem = "holds something else than scores"
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            return
        content = read_regular(path, _LARGEST)
        if not content or type(json.loads(content).get("n")) is int:
            return
    except FileNotFoundError:
        return
    except OSError as error:
        problem = str(error.strerror)
    except (ValueError, AttributeError, RecursionError):
        pass
    raise UserError(f"--json {typed(path)}: {problem}. Choose another file.")


def write_json(path: Path, scores: dict[str, Any]) -> None:
    """Write the scores, whole or not at all; UserError for a file of something else."""
    check_json(path)
    finite = {name: None if score != score else score for name, score in scores.items()}
    text = json.dumps(finite, indent=2) + "\n"
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_text(text, encoding="utf-8")
        else:
            write_text(path, text)
    except OSError as error:
        raise UserError(
            f"--json {typed(path)}: cannot be written ({error.strerror}). Choose another file."
        ) from error
