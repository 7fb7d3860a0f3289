"""Kill a training at random, again and again, and compare its end with an undisturbed one.

    python tests/soak.py --minutes 60

Every round trains the same small network on two processes until it has finished, whatever is
killed meanwhile: one rank, all ranks, torchrun, everything, or a loader's worker. The number of
loader workers changes from start to start. The final weights, optimizer, schedule, moving average
and records must be those of the undisturbed run, bit for bit; the first difference ends the soak
with exit code 1 and keeps the folder.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from distributed import children  # noqa: E402
from test_survival import OPTIONS, assert_same_run  # noqa: E402

LONGER = ["--epochs", "6", "--set", "data.train_size=47", "--set", "data.val_size=9"]
_PATIENCE = 12  # starts without a step: most are killed while they import
TARGETS = ("rank 0", "rank 1", "all ranks", "torchrun", "everything", "loader worker")


def start(folder: Path, workers: int) -> subprocess.Popen:
    """One torchrun of the training in `folder`, which continues what is there."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3"]
    script = [str(REPO / "train_multi_GPU.py"), *map(str, OPTIONS), *LONGER]
    where = ["-j", str(workers), "--output-dir", str(folder), "--resume", "auto"]
    with (folder.parent / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, *script, *where],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def victims(target: str, launcher: int) -> Sequence[int]:
    """The processes to kill."""
    ranks = children(launcher)
    workers = [pid for rank in ranks for pid in children(rank)]
    return {
        "rank 0": ranks[:1],
        "rank 1": ranks[1:],
        "all ranks": ranks,
        "torchrun": [launcher],
        "everything": [*ranks, launcher],
        "loader worker": workers[:1],
    }[target]


def status(folder: Path) -> dict:
    """What a run's status.json says; nothing where there is none yet."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "status.json").read_text())
    return {}


def position(folder: Path) -> tuple[int, int]:
    """The epoch and step of the last save."""
    saved = status(folder)
    return saved.get("epoch", 0), saved.get("step", 0)


def one_start(folder: Path, draw: random.Random, kills: Counter[str], end: float) -> None:
    """Start the training once, and kill something as long as it runs; AssertionError if it fails
    although nothing was killed.
    """
    process, struck = start(folder, workers=draw.choice((0, 1, 2))), 0
    try:
        while process.poll() is None and time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draw.uniform(0.5, 25))
                continue
            target = draw.choice(TARGETS)
            for pid in victims(target, process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills[target] += 1
                    struck += 1
    finally:
        ended = process.poll()
        for pid in [*children(process.pid), process.pid] if ended is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert struck or not ended, f"a start ended with {ended} although nothing was killed"


def disturbed_run(folder: Path, draw: random.Random, kills: Counter[str], end: float) -> bool:
    """Train in `folder` to the end through random kills; False when the time is over.

    AssertionError if it makes no way: starts that hang or refuse would look like long ones.
    """
    folder.mkdir()
    stuck, last = 0, (-1, -1)
    while status(folder).get("state") != "finished":
        if time.monotonic() > end:
            return False
        one_start(folder, draw, kills, end)
        stuck = stuck + 1 if position(folder) <= last else 0
        last = max(last, position(folder))
        assert stuck < _PATIENCE, f"{stuck} starts have not come beyond epoch, step {last}"
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="default: the time")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    seed = int(time.time()) if args.seed is None else args.seed
    draw, kills, rounds = random.Random(seed), Counter[str](), 0
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {seed}, in {folder}", flush=True)

    (folder / "undisturbed").mkdir()
    if start(folder / "undisturbed", workers=0).wait():
        print((folder / "output.txt").read_text())
        return 1
    while True:
        try:
            if not disturbed_run(folder / "disturbed", draw, kills, end):
                break
            assert_same_run(folder / "undisturbed", folder / "disturbed")
        except AssertionError as error:
            print(f"round {rounds + 1}: not as the undisturbed run: {error}. Kept in {folder}")
            return 1
        rounds += 1
        shutil.rmtree(folder / "disturbed")
        struck = ", ".join(f"{target}: {count}" for target, count in sorted(kills.items()))
        print(f"round {rounds}: the same to the bit; killed so far: {struck}", flush=True)
    shutil.rmtree(folder)
    return 0 if rounds else 1


if __name__ == "__main__":
    sys.exit(main())
