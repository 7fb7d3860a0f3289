"""Kill trainings at random, again and again, and compare their ends with undisturbed ones.

    python tests/soak.py --minutes 60

Round after round, the systems take turns: each trains on two processes until it has finished,
whatever is killed meanwhile: one rank, all ranks or a loader's worker, and in the starts by
torchrun that one itself, or everything. The number of loader workers changes from start to start.
The last and the best checkpoint and the records must be those of an undisturbed run, bit for bit;
the first difference ends the soak with exit code 1 and keeps the folder.
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
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from distributed import Script, children  # noqa: E402
from test_contract import CASES, OPTIONS, assert_equal  # noqa: E402
from test_scripts import command, records, weights  # noqa: E402

LONGER = ["--epochs", 3, "--set", "data.train_size=21"]  # six steps an epoch
_PATIENCE = 12  # starts without a step: most are killed while they begin
_TORCHRUN_STARTS = (
    6  # one in so many starts; the others are forked, which takes a tenth of the time
)
_A_START = 600  # seconds after which it must have ended
# The training, which first notes its process's number.
SCRIPT = f"""
import os, runpy, sys
open(os.environ["RANK"] + ".pid", "w").write(str(os.getpid()))
sys.path.insert(0, {str(REPO)!r})
runpy.run_path({str(REPO / "train_multi_GPU.py")!r}, run_name="__main__")
"""
RANKS = ("rank 0", "rank 1", "all ranks", "loader worker")
LAUNCHER = ("torchrun", "everything")


class Start:
    """One start of a training on two processes, which continues what is there."""

    def __init__(self, folder: Path, name: str, workers: int, torchrun: bool) -> None:
        config = REPO / "configs" / f"{name}.yaml"
        arguments: list[Any] = ["--config", config, *OPTIONS, *CASES[name][0], *LONGER]
        arguments += ["-j", workers, "--resume", "auto"]
        self.folder, self.torchrun, self._script = folder, None, None
        script = folder / "script.py"
        script.write_text(SCRIPT)
        for number in folder.glob("*.pid"):
            number.unlink()
        if not torchrun:
            self._script = Script(folder, script, *arguments, processes=2)
            return
        launch = command(script, *arguments, processes=2)
        launch.insert(launch.index("--standalone"), "--max-restarts=3")
        with (folder / "torchrun.txt").open("a") as output:
            self.torchrun = subprocess.Popen(launch, cwd=folder, stdout=output, stderr=output)

    def victims(self, target: str) -> Sequence[int]:
        """The processes to kill."""
        ranks = self._ranks()
        launcher = [self.torchrun.pid] if self.torchrun else []
        workers = [pid for rank in ranks for pid in children(rank)]
        return {
            "rank 0": ranks[:1],
            "rank 1": ranks[1:],
            "all ranks": ranks,
            "torchrun": launcher,
            "everything": [*ranks, *launcher],
            "loader worker": workers[:1],
        }[target]

    def _ranks(self) -> list[int]:
        """The processes that train and run, as far as they have begun."""
        numbers = [self.folder / f"{rank}.pid" for rank in range(2)]
        found = [int(number.read_text() or 0) for number in numbers if number.exists()]
        return [pid for pid in found if _runs(pid)]

    def wait(self) -> int:
        """Its exit code. What a killed torchrun leaves behind has ended by then, too."""
        if self._script:
            return self._script.wait(timeout=_A_START).returncode
        ranks = set()
        end = time.monotonic() + _A_START
        while self.torchrun.poll() is None or any(map(_runs, ranks)):
            assert time.monotonic() < end, "a start by torchrun does not end"
            ranks |= set(self._ranks())
            time.sleep(0.05)
        return self.torchrun.returncode


def _runs(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def position(folder: Path) -> tuple[int, int]:
    """The epoch and step of the last save; (-1, -1) before the first, the largest at the end."""
    with suppress(OSError, ValueError):
        status = json.loads((folder / "run" / "status.json").read_text())
        if status["state"] == "finished":
            return sys.maxsize, 0
    with suppress(OSError):
        state = weights(folder / "run")
        return state["next_epoch"], state["next_step"]
    return -1, -1


class Round:
    """A training that is killed until it has finished all the same."""

    def __init__(self, folder: Path, name: str, draw: random.Random) -> None:
        self.folder, self.name, self.draw = folder, name, draw
        self.kills: Counter[str] = Counter()

    def run(self, end: float) -> bool:
        """Whether it has finished before the time was over. AssertionError if it makes no way."""
        stuck, last = 0, (-1, -1)
        while position(self.folder)[0] != sys.maxsize:
            if time.monotonic() > end:
                return False
            self._start()
            stuck = stuck + 1 if position(self.folder) <= last else 0
            last = max(last, position(self.folder))
            assert stuck < _PATIENCE, f"{stuck} starts have not come beyond epoch, step {last}"
        return True

    def _start(self) -> None:
        torchrun = self.draw.randrange(_TORCHRUN_STARTS) == 0
        start = Start(self.folder, self.name, self.draw.choice((0, 0, 1, 2)), torchrun)
        ended, before = threading.Event(), self.kills.total()
        killer = threading.Thread(target=self._strike, args=(start, ended))
        killer.start()
        code = start.wait()
        ended.set()
        killer.join()
        struck = self.kills.total() > before
        assert struck or not code, f"a start ended with {code} although nothing was killed"

    def _strike(self, start: Start, ended: threading.Event) -> None:
        """Kill something, at any moment of a step that is drawn, again and again."""
        targets = RANKS + (LAUNCHER if start.torchrun else ())
        while not self._steps(ended, self.draw.randrange(8)):
            target = self.draw.choice(targets)
            for pid in start.victims(target):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.kills[target] += 1
                    print(f"{self.name} at {position(self.folder)}: {target} killed", flush=True)

    def _steps(self, ended: threading.Event, number: int) -> bool:
        """Wait for so many saves, one a step, and a part of the next; whether the start ended."""
        status, last, pause = self.folder / "run" / "status.json", None, 1.0
        for _ in range(number):
            begin, stamp = time.monotonic(), last
            while stamp == last and not ended.wait(0.02):
                with suppress(OSError):
                    stamp = status.stat().st_mtime_ns
            last, pause = stamp, time.monotonic() - begin
        return ended.wait(self.draw.uniform(0, pause))


def train_undisturbed(folder: Path, name: str) -> None:
    folder.mkdir()
    assert Start(folder, name, 0, torchrun=False).wait() == 0, f"{name} fails by itself"


def compare(one: Path, other: Path) -> None:
    one, other = one / "run", other / "run"
    assert records(one) == records(other), "metrics.jsonl"
    for file in ("last.pth", "model_best.pth"):
        states = [weights(run, file) for run in (one, other)]
        for state in states:
            del state["args"]["train"]["workers"]  # which may change from start to start
        assert_equal(*states, file)


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
    names = list(CASES)
    while time.monotonic() < end:
        name = names[rounds % len(names)]
        disturbed = folder / "disturbed"
        disturbed.mkdir()
        try:
            if not (folder / name).exists():
                train_undisturbed(folder / name, name)
            this = Round(disturbed, name, draw)
            finished = this.run(end)
            if finished:
                compare(folder / name, disturbed)
        except Exception as error:
            print(f"round {rounds + 1}: not as the undisturbed run: {error}. Kept in {folder}")
            return 1
        kills += this.kills
        shutil.rmtree(disturbed)
        if finished:
            rounds += 1
            struck = ", ".join(f"{target}: {count}" for target, count in sorted(kills.items()))
            print(
                f"round {rounds}, {name}: the same to the bit; {kills.total()} kills so far "
                f"({struck})",
                flush=True,
            )
    shutil.rmtree(folder)
    return 0 if rounds else 1


if __name__ == "__main__":
    sys.exit(main())
