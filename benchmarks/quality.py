"""Quality per image and per minute: recipes of U²-Net side by side, from the same start.

    python -m benchmarks.quality --images DIR --masks DIR --out board
    python -m benchmarks.quality --images DIR --masks DIR --out board --rows published iou --seeds 0
    python -m benchmarks.quality --out board --show                the board of what has run so far

Every row is one lever on top of the published recipe (configs/u2net_lite.yaml), or several; see
ROWS. A row is a training by train.py, or several one after the other, each from the weights of the
one before. All rows of a seed start from the same weights, on the same pairs, and are scored on the
same tenth, held out by its names. A board that is killed goes on where it was when the same command
is given again. Minutes are those of this machine while the row ran; compare them on a quiet one.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import make_parser, positive, report
from train_utils.errors import UserError
from train_utils.run_folder import BEST, read_status
from train_utils.setup import clean_errors

REPO = Path(__file__).resolve().parents[1]
RECIPE = REPO / "configs" / "u2net_lite.yaml"
HALF = 1 / sqrt(2)  # of the side: half the pixels

# One training: its share of the epochs, its side relative to --size, and the keys that it sets.
Phase = tuple[float, float, Mapping[str, Any]]
_AVERAGED = {"train.ema": 0.998, "optim.schedule": "constant"}
_IOU = {"loss.terms": "[bce,iou]"}
ROWS: dict[str, list[Phase]] = {
    "published": [(1, 1, {})],
    "iou": [(1, 1, _IOU)],
    "ema": [(1, 1, {"train.ema": 0.998})],
    "averaged": [(1, 1, _AVERAGED)],
    "half": [(1, HALF, {})],
    "progressive": [(0.5, HALF, {}), (0.5, 1, {"optim.lr": 0.0005, "optim.warmup_epochs": 0.1})],
    "batch 8": [(1, 1, {"train.batch_size": 8})],
    "lr × 3": [(1, 1, {"optim.lr": 0.003})],
    "iou averaged": [(1, 1, _IOU | _AVERAGED)],
    "iou averaged batch 8 half": [(1, HALF, _IOU | _AVERAGED | {"train.batch_size": 8})],
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__ or "", rounds=1)
    add = parser.add_argument
    add("--images", metavar="DIR", help="photographs, as train.py takes them …")
    add("--masks", metavar="DIR", help="… and their masks")
    add("--out", type=Path, required=True, metavar="DIR", help="run folders, one per training")
    add("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--size", type=positive, default=96, help="side that images are resized to")
    add("--epochs", type=positive, default=8)
    add("--show", action="store_true", help="train nothing")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="passed on to all trainings")
    args = parser.parse_args(argv)
    if not args.show and not (args.images and args.masks):
        parser.error("give --images DIR --masks DIR, or --show")
    return args


def run_folder(out: Path, row: str, seed: int, phase: int) -> Path:
    return out / f"{row.replace(' ', '-')}-seed{seed}-{phase}"


def phase_epochs(phase: Phase, epochs: int) -> int:
    return max(1, round(phase[0] * epochs))


def train_row(args: argparse.Namespace, row: str, seed: int) -> None:
    """Run what is left of a row's trainings."""
    for number, phase in enumerate(ROWS[row]):
        folder = run_folder(args.out, row, seed, number)
        if _is_finished(folder):
            continue
        _, side, keys = phase
        command = [sys.executable, REPO / "train.py", "--config", RECIPE, "--device", args.device]
        command += ["--images", args.images, "--masks", args.masks, "--seed", seed]
        command += ["--epochs", phase_epochs(phase, args.epochs), "--eval-interval", 1]
        command += ["--output-dir", folder, "--resume", "auto"]
        keys = {"data.image_size": round(side * args.size), "train.save_steps": 50, **keys}
        for assignment in [*(f"{key}={value}" for key, value in keys.items()), *args.set]:
            command += ["--set", assignment]
        if number:
            command += ["--weights", run_folder(args.out, row, seed, number - 1) / BEST]
        if subprocess.run([str(part) for part in command], check=False).returncode:
            raise UserError(f"{folder}: its training ended early. The same command continues it.")


def _is_finished(folder: Path) -> bool:
    return read_status(folder).get("state") == "finished"


def read_row(out: Path, row: str, seed: int) -> list[dict[str, float]]:
    """After every epoch so far: images and megapixels trained on, minutes, MAE and maxF1.

    Minutes are images over the rate, which a run that was killed knows for its last start only.
    """
    points: list[dict[str, float]] = []
    images = pixels = minutes = 0.0
    for number in range(len(ROWS[row])):
        folder = run_folder(out, row, seed, number)
        if not (folder / "metrics.jsonl").exists():
            break
        config = yaml.safe_load((folder / "config.yaml").read_text())
        side, batch_size = round(0.9 * config["data"]["image_size"]), config["train"]["batch_size"]
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            epoch = json.loads(line)
            trained = batch_size * epoch["step"] / (epoch["epoch"] + 1)
            images, pixels = images + trained, pixels + trained * side**2 / 1e6
            minutes += trained / epoch["img_per_s"] / 60
            scores = {name: epoch[f"val/{name}"] for name in ("MAE", "maxF1")}
            points.append({"images": images, "Mpx": pixels, "min": minutes, **scores})
    return points


def board(out: Path, rows: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A line per row and seed: its best epoch, and what it took to reach the published recipe's."""
    lines = []
    for seed in seeds:
        goal = max((p["maxF1"] for p in read_row(out, "published", seed)), default=float("inf"))
        for row in rows:
            if points := read_row(out, row, seed):
                best = max(points, key=lambda point: point["maxF1"])
                level = next((p for p in points if p["maxF1"] >= goal), None)
                line = {"row": row, "seed": seed, "epochs": len(points), **points[-1]}
                line |= {"best maxF1": best["maxF1"]}
                names = ("images", "Mpx", "min")
                line |= {f"{n} to level": level[n] if level else float("nan") for n in names}
                lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.show:
        for seed in args.seeds:
            for row in args.rows:
                train_row(args, row, seed)
    report(args, board(args.out, args.rows, args.seeds))


if __name__ == "__main__":
    with clean_errors():
        main()
