"""The figures that README.md, docs/data.md and docs/performance.md quote, in a quarter of an hour.

    python -m benchmarks.headline --json headline.json
    python -m benchmarks.headline --data-path DUTS       # photographs for the table of loading

For a machine that does nothing else. It ends with the tables in Markdown, to be put in place of
those of docs/performance.md; tests/test_figures.py then tells what else says otherwise. The JSON
file is written after every benchmark.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Rows, shown
from train_utils.arguments import new_parser
from train_utils.errors import UserError
from train_utils.setup import clean_errors

REPO = Path(__file__).resolve().parents[1]
COMMANDS = (
    "training_step --systems u2net_full u2net_lite --batches 4 --rounds 3",
    "training_step --systems unet_vgg16 --batches 1 --rounds 3",
    "training_step --systems fcn matting pix2pix --batches 2 --rounds 3",
    "loading",
    "evaluation --images 4 --rounds 3",
    "prediction --count 8 --rounds 3",
    "startup --rounds 2",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--data-path", help="for loading: holds DUTS-TR or DUTS-TE")
    return parser.parse_args(argv)


def run_benchmark(name: str, *options: str) -> dict[str, Any]:
    """What a benchmark writes as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "figures.json")
        launch("-m", f"benchmarks.{name}", *options, "--json", str(target))
        return json.loads(target.read_text())


def run_training(*options: str) -> dict[str, Any]:
    """The best scores of `python train.py`, and the time from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        launch("train.py", "--output-dir", folder, *options)
        minutes, seconds = divmod(round(time.perf_counter() - start), 60)
        scores = json.loads(Path(folder, "status.json").read_text())["best"]
    row = {"work": "python train.py", "time": f"{minutes} min {seconds} s", **scores}
    return {"rows": [row]}


def launch(*command: str) -> None:
    """Run Python in the repository's folder; raises UserError if that fails."""
    print(f"\n> python {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=REPO).returncode:
        raise UserError(f"python {' '.join(command)}: failed.")


def markdown(rows: Rows) -> str:
    """Rows as a table of a Markdown page, a column per key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, ["---"] * len(columns)]
    cells += [[shown(row.get(key)) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    results: dict[str, list[dict]] = {}
    for command in COMMANDS:
        name, *options = command.split()
        if name == "loading" and args.data_path:
            options += ["--data-path", str(Path(args.data_path).resolve())]
        results.setdefault(name, []).append(run_benchmark(name, *options))
        _write(args, results)
    results["train.py"] = [run_training()]
    _write(args, results)
    for name, found in results.items():
        print(f"\n{name}\n\n{markdown([row for each in found for row in each['rows']])}")


def _write(args: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    with clean_errors():
        main()
