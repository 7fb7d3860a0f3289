"""Whether everything works on this GPU, and how fast: one command of about 400 seconds.

    python -m benchmarks.gpu_check
    python -m benchmarks.gpu_check --json check.json --out logs --only gradients speed
    python -m benchmarks.gpu_check --device cpu          what a CPU can run, at a tiny size

Each check prints PASS, FAIL or SKIP, its seconds and what it saw; one failure stops no other.
A check that --seconds leaves no time for is skipped, and says so. Needs nothing but the repository:
trainings run on its embedded data, beside the checks of results and before anything is timed.
Exit code 1 if a check failed.
"""

import argparse
import json
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from benchmarks import common, gpu_correctness, gpu_runs
from benchmarks.gpu_correctness import Skipped
from train_utils.arguments import new_parser


class Check(NamedTuple):
    """A check: what it is called, what it does, and for how many seconds at most."""

    name: str
    work: Callable[[], str]
    limit: float


class Report:
    """Runs checks until the time is over, prints a line for each, and keeps what they saw.

    patience: by what the limits of checks, which are those of a GPU, are multiplied.
    """

    def __init__(self, seconds: float, patience: float = 1) -> None:
        self.start, self.seconds, self.patience = time.monotonic(), seconds, patience
        self.rows: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    @property
    def failed(self) -> int:
        return sum(row["verdict"] == "FAIL" for row in self.rows)

    def run(self, check: Check) -> None:
        began = time.monotonic()
        verdict, saw = self._outcome(check)
        took = time.monotonic() - began
        self.rows.append({"check": check.name, "verdict": verdict, "seconds": took, "saw": saw})
        print(f"{verdict}  {check.name}  ({took:.1f} s)  {saw}", flush=True)

    def _outcome(self, check: Check) -> tuple[str, str]:
        over = f"the {self.seconds:.0f} s are over"
        if self.left < 1:
            return "SKIP", over
        try:
            with _at_most(min(self.patience * check.limit, self.left)):
                return "PASS", check.work()
        except Skipped as reason:
            return "SKIP", str(reason)
        except AssertionError as wrong:
            return "FAIL", str(wrong)
        except Exception as error:
            if isinstance(error, TimeoutError) and self.left < 1:
                return "SKIP", f"{over}: not done"
            last = "".join(traceback.format_tb(error.__traceback__, limit=-2))
            return "FAIL", f"{type(error).__name__}: {str(error)[:500]}\n{last}"


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """A block that TimeoutError ends, as soon as Python has a say."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def correctness(device: torch.device, systems: Sequence[str]) -> list[Check]:
    """Whether results are right, in this process."""
    checks = gpu_correctness
    precisions = ("auto", "fp16", "off")
    all_images, one_without = [(2, 2), (3, 1)], [(2, 2), (2, 0)]
    found = [
        Check(f"waits {name} {amp}", partial(checks.no_wait, device, name, amp), 30)
        for name in systems
        for amp in precisions
    ]
    found += [Check(f"gradients {s}", partial(checks.gradients, device, s), 60) for s in systems]
    found += [
        Check(f"empty share {s}", partial(checks.empty_share, device, s), 30) for s in systems
    ]
    found += [
        Check("fp16 overflow", partial(checks.overflow, device), 30),
        Check("metrics", partial(checks.metrics, device), 30),
        Check("determinism unet", partial(checks.determinism, device, "unet"), 40),
        Check("determinism matting", partial(checks.determinism, device, "matting"), 40),
        Check("out of memory", partial(checks.out_of_memory, device), 60),
        Check("tiles", partial(checks.tiles, device), 60),
    ]
    for amp in ("off", "auto"):
        for shares, text in ((all_images, ""), (one_without, ", one without images")):
            work = partial(checks.two_processes, device, amp, shares)
            found.append(Check(f"two processes {amp}{text}", work, 100))
    return found


def speed(device: torch.device, out: Path) -> list[Check]:
    """How fast it is, nothing else running; what decides comes first."""
    gpu = device.type == "cuda"
    shape = (16, 288) if gpu else (2, 64)
    names = ("u2net_lite", "u2net_full") if gpu else ("u2net_lite",)
    found = []
    for what, work, limit in (
        ("step", partial(gpu_runs.step, out=out), 80),
        ("compiled", gpu_runs.compiled, 100),
        ("profile", gpu_runs.profile, 40),
    ):
        found += [
            Check(f"speed {what} {n}", partial(work, device, n, *shape), limit) for n in names
        ]
    return [*found, Check("speed evaluation", partial(gpu_runs.evaluation, device, out), 60)]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=400, help="of all checks together")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of checks")
    parser.add_argument("--systems", nargs="+", default=list(gpu_correctness.SYSTEMS))
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--out", type=Path, help="keep the logs of all runs in this folder")
    args = parser.parse_args(argv)
    if args.out and args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out}: is no empty folder. Name a new one")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The number of checks that failed."""
    args = parse_args(argv)
    device = torch.device(args.device)
    report = Report(args.seconds, patience=1 if device.type == "cuda" else 20)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    about = common.machine(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)

    def wanted(checks: list[Check]) -> list[Check]:
        return [c for c in checks if any(part in c.name for part in args.only)]

    with TemporaryDirectory() as folder, common.quietly():
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        scripts = gpu_runs.Scripts(device, out)
        runs = wanted([Check(name, partial(scripts.look_at, name), 250) for name in scripts.names])
        scripts.start([check.name for check in runs])
        try:
            for check in [*wanted(correctness(device, args.systems)), *runs]:
                report.run(check)
        finally:
            scripts.stop()
        for check in wanted(speed(device, out)):
            report.run(check)
    print(f"{report.failed} of {len(report.rows)} failed", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "checks": report.rows}, indent=1) + "\n")
    return report.failed


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(bool(main()))
