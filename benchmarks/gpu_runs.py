"""The scripts on a GPU, and how fast they are: the checks of `gpu_check` that start programs.

Each returns what it saw, and raises AssertionError where that is wrong, or `Skipped`.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity

from benchmarks.gpu_correctness import Skipped, need_gpu, train
from train_utils.train_and_eval import Progress

REPO = Path(__file__).resolve().parents[1]
RECIPES = ("shapes", "fcn", "unet", "matting", "pix2pix")
LIMIT = 200  # seconds of one program on a GPU's machine


class Scripts:
    """Chains of the repository's scripts, all side by side, each in a folder of its own.

    On a GPU they see the recipes' own data for two epochs; on a CPU a tiny share of it, of which
    nothing is learned.
    """

    def __init__(self, device: torch.device, out: Path) -> None:
        self.device, self.out = str(device), out
        self.tiny = device.type != "cuda"
        self.limit = 20 * LIMIT if self.tiny else LIMIT
        images, val_images = (8, 2) if self.tiny else (96, 16)
        self.small = ["--set", f"data.train_size={images}", "--set", f"data.val_size={val_images}"]
        self.size = self.small if self.tiny else []
        self.chains: dict[str, Callable[[], str]] = {
            **{f"training {name}": partial(self._trains, name) for name in RECIPES},
            "resume on CPU and back": self._resumes,
            "torchrun": self._torchrun,
            "validation on both": self._validates,
            "prediction on both": self._predicts,
        }
        self._pool = ThreadPoolExecutor(len(self.chains))
        self._results: dict[str, Future[str]] = {}
        self._running: set[subprocess.Popen] = set()

    @property
    def names(self) -> list[str]:
        return list(self.chains)

    def start(self, names: Sequence[str]) -> None:
        """Begin with all chains of these names."""
        self._results = {name: self._pool.submit(self.chains[name]) for name in names}

    def look_at(self, name: str) -> str:
        """Wait for a chain, and return what it saw."""
        return self._results[name].result()

    def stop(self) -> None:
        """End what is still running."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.kill()
        self._pool.shutdown()

    def run(self, name: str, *command: str) -> str:
        """Output of one of the repository's programs; AssertionError unless it ends with 0."""
        log = self.out / f"{name.replace(' ', '_')}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=REPO, stdout=file, stderr=subprocess.STDOUT
            )
        self._running.add(process)
        try:
            code: int | str = process.wait(self.limit)
        except subprocess.TimeoutExpired:
            code = f"none after {self.limit} s"
        finally:
            process.kill()
            process.wait()
            self._running.discard(process)
        text = log.read_text(errors="replace")
        assert code == 0, f"{' '.join(command[:3])}: exit code {code}\n{text[-800:]}"
        return text

    def train(self, name: str, recipe: str, *options: str, device: str | None = None) -> list[dict]:
        """The epochs' records of a training, in the run folder of this name."""
        folder = self.out / f"run_{name}"
        command = ["train.py", "--config", f"configs/{recipe}.yaml", "-j", "2", *options]
        command += ["--output-dir", str(folder), "--device", device or self.device]
        self.run(f"{name}_{len(list(self.out.glob(f'{name}_*.log')))}", *command)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _trains(self, recipe: str) -> str:
        records = self.train(recipe, recipe, "--epochs", "2", *self.size)
        key = "train/pixel" if recipe == "pix2pix" else "train/loss"
        first, last = records[0][key], records[-1][key]
        text = f"{key} {first:.4f} → {last:.4f}, {records[-1]['img_per_s']:.0f} img/s"
        assert len(records) == 2 and (last < first or self.tiny), text
        return text

    def _resumes(self) -> str:
        options = ("--resume", "auto", *self.small)
        for epochs, device in ((1, self.device), (2, "cpu"), (3, self.device)):
            records = self.train("resume", "fcn", "--epochs", str(epochs), *options, device=device)
        done = [record["epoch"] for record in records]
        losses = ", ".join(f"{record['train/loss']:.4f}" for record in records)
        assert done == [0, 1, 2], f"epochs {done}"
        fell = records[-1]["train/loss"] < records[0]["train/loss"]
        assert fell or self.tiny, losses
        return f"losses on {self.device}, cpu, {self.device}: {losses}"

    def _torchrun(self) -> str:
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
        script = ("train_multi_GPU.py", "--config", "configs/unet.yaml", "--epochs", "1", "-j", "2")
        options = ("--sync-bn", "--set", "train.ema=0.99")
        place = ("--output-dir", str(self.out / "run_torchrun"), "--device", self.device)
        text = self.run("torchrun", *launch, *script, *options, *place, *self.small)
        assert "Epoch: [0]" in text, text[-400:]
        return "one process in a group of its own"

    def _validates(self) -> str:
        """The same scores of the same weights on both devices, in fp32."""
        self.train("validation", "unet", "--epochs", "1", *self.small)
        weights = self.out / "run_validation" / "model_best.pth"
        scores: list[dict[str, Any]] = []
        for device in (self.device, "cpu"):
            file = self.out / f"scores_{len(scores)}.json"
            command = ("validation.py", "--weights", str(weights), "--json", str(file), "-j", "2")
            precise = ("--device", device, "--set", "eval.amp=off")
            self.run(f"validate_{len(scores)}", *command, *precise)
            scores.append(json.loads(file.read_text()))
        numbers = [key for key, value in scores[1].items() if isinstance(value, float)]
        off = max(abs(scores[0][key] - scores[1][key]) for key in numbers)
        text = f"{len(numbers)} scores, off by {off:.1e} at most"
        assert numbers and off < 5e-3, text
        return text

    def _predicts(self) -> str:
        """The same maps of the same pictures on both devices, in fp32."""
        self.train("prediction", "shapes", "--epochs", "1", *self.small)
        weights = self.out / "run_prediction" / "model_best.pth"
        for device in (self.device, "cpu"):
            folder = str(self.out / f"maps_{device}")
            command = ("predict.py", "docs", "-o", folder, "--weights", str(weights))
            self.run(f"predict_{device}", *command, "--device", device, "--set", "eval.amp=off")
        maps = sorted(path.name for path in (self.out / "maps_cpu").glob("*.png"))
        off = 0.0
        for name in maps:
            pair = [
                Image.open(self.out / f"maps_{device}" / name) for device in (self.device, "cpu")
            ]
            one, other = (np.asarray(image, np.float32) for image in pair)
            off = max(off, float(np.abs(one - other).mean()))
        text = f"{len(maps)} maps, off by {off:.3f} of 255 on average"
        assert maps and off < 1, text
        return text


# -- speed ----------------------------------------------------------------------------------------


def _benchmark(name: str, out: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of one of the other benchmarks."""
    target = out / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", str(target)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-800:]}"
    return json.loads(target.read_text())["rows"]


def _shown(row: dict[str, Any]) -> str:
    numbers = {key: value for key, value in row.items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())


def step(device: torch.device, system: str, batch: int, size: int, out: Path) -> str:
    """A training step against the usual way, and that under autocast; memory at the peak."""
    gpu = device.type == "cuda"
    counted = ("--steps", "20", "--rounds", "3") if gpu else ("--rounds", "1")
    sizes = ("--batches", str(batch), "--size", str(size))
    options = ("--systems", system, "--device", str(device), *sizes, *counted)
    (row,) = _benchmark("training_step", out, *options)
    return _shown(row)


def evaluation(device: torch.device, out: Path) -> str:
    """Scoring u2net_full against the usual way."""
    need_gpu(device)
    options = ("--models", "u2net_full", "--images", "64", "--device", str(device))
    (row,) = _benchmark("evaluation", out, *options)
    return _shown(row)


def milliseconds(
    device: torch.device, system: str, batch: int, size: int, wrap: Callable
) -> tuple[float, float]:
    """(seconds until the second step is done, median milliseconds of a step after it)."""
    marks: list[float] = []

    def after_step(progress: Progress) -> None:
        if progress.step == 2 or not progress.step % 10:  # between them the host runs ahead
            torch.cuda.synchronize(device)
            marks.append(time.perf_counter())

    start = time.perf_counter()
    data = {"images": batch, "size": size, "steps": 50}
    train(system, device, after_step=after_step, wrap=wrap, **data)  # type: ignore[arg-type]
    # After step 2 comes step 10, then every tenth.
    return marks[0] - start, median((b - a) * 100 for a, b in pairwise(marks[1:]))


def compiled(device: torch.device, system: str, batch: int, size: int) -> str:
    """torch.compile against eager, also with CUDA graphs: per step, and after how many it pays."""
    need_gpu(device)
    torch.backends.cudnn.benchmark = True
    begin, eager = milliseconds(device, system, batch, size, dict)
    text = [f"eager {eager:.1f} ms"]
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()

        def wrap(networks: dict[str, nn.Module], mode: str = mode) -> dict[str, Any]:
            return {name: torch.compile(each, mode=mode) for name, each in networks.items()}

        late, fast = milliseconds(device, system, batch, size, wrap)
        pays = f"{(late - begin) * 1e3 / (eager - fast):.0f}" if fast < eager else "no number of"
        text.append(
            f"{mode} {fast:.1f} ms ({eager / fast:.2f}×), {late - begin:.0f} s to compile, "
            f"which pay after {pays} steps"
        )
    return "; ".join(text)


def profile(device: torch.device, system: str, batch: int, size: int) -> str:
    """Kernels of three steps, and the ten that take longest."""
    need_gpu(device)
    torch.backends.cudnn.benchmark = True
    recorder = torch.profiler.profile(activities=[ProfilerActivity.CUDA])

    def after_step(progress: Progress) -> None:
        if progress.step in (6, 9):
            torch.cuda.synchronize(device)
            (recorder.start if progress.step == 6 else recorder.stop)()

    torch.cuda.reset_peak_memory_stats(device)
    train(system, device, images=batch, size=size, steps=10, after_step=after_step)
    times: Counter[str] = Counter()
    kernels = [event for event in recorder.events() if event.device_type.name == "CUDA"]
    for event in kernels:
        times[event.name] += event.device_time_total / 3e3
    if not kernels:
        raise Skipped("the profiler saw no kernels")
    rows = [f"\n    {ms:7.2f} ms  {name[:110]}" for name, ms in times.most_common(10)]
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    total = f"{len(kernels) // 3} kernels, {sum(times.values()):.1f} ms a step; {peak:.0f} MB"
    return total + "".join(rows)
