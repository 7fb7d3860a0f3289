"""Change one line of the product at a time, and see which test notices.

    python tests/mutations.py                     all of them, about half an hour on two cores
    python tests/mutations.py 3 17 --verbose      some, with what pytest said

Each mutation is made in a copy of the repository, where the tests that should notice are run. Exit
code 1 if any was not noticed, or fits no line any more.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]

LOOP = "test_loop.py"
STATE = "test_training_state.py"
PROCESSES = "test_parity.py -k 2-shapes"
RANKS = "test_reduction.py"


class Mutation(NamedTuple):
    """`old` → `new` in the one line of `file` that holds it; `tests` should fail then."""

    file: str
    old: str
    new: str
    tests: str


M = Mutation
LOOP_FILE = "train_utils/train_and_eval.py"
MUTATIONS = [
    # the loop
    M(LOOP_FILE, "world * w / sums[name]", "w / sums[name]", PROCESSES),
    M(LOOP_FILE, "mean if share == 1 else mean * share", "mean", LOOP),
    M(LOOP_FILE, "*local, shown, stop, 1", "*local, shown, 0, 1", "test_survival.py"),
    M(LOOP_FILE, "float(len(batch[0]))\n    given", "1.0\n    given", LOOP),
    M(LOOP_FILE, "total[name] + loss if name in total", "loss if name in total", LOOP),
    M(LOOP_FILE, "torch.manual_seed(stable_seed(self.options.seed, self._steps_before, get_rank()))", "pass", LOOP),
    M(LOOP_FILE, "self.batches.epoch * self.batches.steps + number", "number", LOOP),
    M(LOOP_FILE, "self._steps_before, get_rank()))", "self._steps_before, 0))", RANKS),
    M(LOOP_FILE, "number < len(self._parts) or not synchronise", "False", "test_reduction.py"),
    M(LOOP_FILE, "            if not skip:  # the first step", "            if True:  # the first step", RANKS),
    M(LOOP_FILE, "self.options.ema and not skip", "self.options.ema", LOOP),
    M(LOOP_FILE, "self.schedulers[name].step()", "pass", LOOP),
    M(LOOP_FILE, "self.scalers[name].unscale_(self.optimizers[name])", "pass", LOOP),
    M(LOOP_FILE, "parameters(), options.clip_norm)", "parameters(), 2 * options.clip_norm)", LOOP),
    M(LOOP_FILE, "        broadcast_tensors(list(network.buffers()))", "        pass", "test_parity.py test_exactness.py"),
    M(LOOP_FILE, "stop=bool(stop_requested and stop_requested())", "stop=False", "test_evaluate.py test_survival.py"),
    M(LOOP_FILE, "kept[number] for number in sorted(kept)", "kept[number] for number in kept", "test_evaluate.py"),
    M(LOOP_FILE, "    yield from waiting.values()", "    yield from ()", "test_evaluate.py"),
    M(LOOP_FILE, "network.train()", "pass", LOOP),
    M(LOOP_FILE, "> _MAX_WAITING", "> 10**9", "test_evaluate.py"),
    # the state
    M("train_utils/training_state.py", "            module.load_state_dict(dict(state[key]))", "            pass", STATE),
    M("train_utils/training_state.py", "trainer.load_state_dict(content)", "pass", STATE),
    M("train_utils/training_state.py", "ema.steps = state[\"ema_steps\"].get(name, 0)", "ema.steps = 0", STATE),
    M("train_utils/training_state.py", "apply_schedule(self.optimizers[name], schedule)", "pass", STATE),
    M("train_utils/training_state.py", "self.epoch, self.step = state[\"next_epoch\"], state[\"next_step\"]", "self.epoch, self.step = state[\"next_epoch\"], 0", STATE),
    M("train_utils/training_state.py", "state.get(\"stale\", 0)", "0", STATE),
    M("train_utils/training_state.py", "self.best_scores, self.meters, self.lr = state[\"best_scores\"], state[\"meters\"], state[\"lr\"]", "self.meters, self.lr = state[\"meters\"], state[\"lr\"]", STATE),
    M("train_utils/training_state.py", "if value != value or not better:", "if not better:", STATE),
    M("train_utils/training_state.py", "state[\"num_samples\"] != self.sampler.num_samples", "False", STATE),
    M("train_utils/training_state.py", "if not norms.isfinite().all():", "if False:", STATE),
    M("train_utils/training_state.py", "state.get(\"forward_batch\", saved_batch * state[\"world_size\"])", "train.batch_size * world_size", STATE),
    M("train_utils/ema.py", "decay = min(self.decay, (1 + self.steps) / (10 + self.steps))", "decay = self.decay", "test_parity.py"),
    M("train_utils/ema.py", "copy_all(list(self.module.buffers()), list(model.buffers()))", "pass", "test_parity.py"),
    M("train_utils/files.py", "    temporary = _temporary(path.parent)\n    try:\n        with temporary.open(\"xb\")", "    temporary = path\n    try:\n        with temporary.open(\"wb\")", "test_files.py test_checkpoint.py"),
    M("train_utils/files.py", "getattr(os, \"O_NOFOLLOW\", 0)", "0", "test_security_files.py"),
    M("train_utils/files.py", "if not stat.S_ISREG(about.st_mode):", "if False:", "test_security_files.py"),
    M("train_utils/files.py", "about.st_nlink > 1", "about.st_nlink > 2", "test_security_files.py"),
    M("train_utils/files.py", "and entry.is_file(follow_symlinks=False)", "", "test_security_files.py"),
    M("train_utils/run_folder.py", "if foreign and not status:", "if False:", "test_security_files.py"),
    M("train_utils/run_folder.py", "if not resumed or not read_status(path):", "if not resumed:", "test_security_files.py"),
    M("train_utils/run_folder.py", "[0-9]{4}|[1-9][0-9]{4,}", "[0-9]+", "test_security_files.py"),
    M("train_utils/image_io.py", "not Path(path).is_symlink() and ", "", "test_security_files.py"),
    # samples
    M("train_utils/data.py", "share = [SampleKey(epoch, index) for index in batch[self.rank :: self.world_size]]", "share = [SampleKey(epoch, index) for index in batch]", "test_data.py"),
    M("train_utils/data.py", "for step in range(self.start_step, self.steps_per_epoch):", "for step in range(self.steps_per_epoch):", "test_data.py"),
    M("train_utils/data.py", "generator = torch.Generator().manual_seed(stable_seed(self.seed, epoch))", "generator = torch.Generator().manual_seed(self.seed)", "test_data.py"),
    M("train_utils/data.py", "seed_generators(stable_seed(self.seed, key.epoch, key.index))", "seed_generators(stable_seed(self.seed, key.index))", "test_data.py"),
    M("train_utils/data.py", "self.indices = range(rank, num_samples, world_size)", "self.indices = range(num_samples)", "test_data.py"),
    M("train_utils/data.py", "return item if key.real else _StandIn(item)", "return item", "test_data.py"),
    M("train_utils/data.py", "torch.set_rng_state(states[0])", "pass", "test_data.py"),
    M("train_utils/data.py", "parts - self.start_step * self.parts_per_step", "parts", "test_data.py"),
    # processes
    M("train_utils/metrics.py", "        dist.all_reduce(total)", "        pass", "test_metrics.py test_exactness.py"),
    M("train_utils/metrics.py", "        metric.reduced = True", "        pass", "test_metrics.py"),
    M("train_utils/collectives.py", "            dist.all_reduce(vector)", "            pass", PROCESSES),
    M("train_utils/collectives.py", "            dist.broadcast(flat, src=0)", "            pass", "test_parity.py test_exactness.py test_distributed_utils.py"),
    M("train_utils/metric_logger.py", "(stacked / get_world_size()).tolist()", "stacked.tolist()", RANKS),
    M("train_utils/sync_batchnorm.py", "total / (total - 1)", "1.0", "test_sync_batchnorm.py test_parity.py"),
    M("train_utils/sync_batchnorm.py", "        total = gradient.contiguous()\n        _add_up(total)", "        total = gradient.contiguous()", "test_parity.py"),
    M("train_utils/nonfinite.py", "return sum_over_ranks(flags) if self.scaled else flags", "return flags", RANKS),
    # metrics
    M("train_utils/metrics.py", "gt > 0.5, self.bins", "gt >= 0.5, self.bins", "test_metrics.py"),
    M("train_utils/metrics.py", "tp.double() / (tp.double() + fp + 1e-4)", "tp.double() / (tp.double() + fp + 1e-8)", "test_metrics.py"),
    M("train_utils/metrics.py", "BETA2 = 0.3", "BETA2 = 1.0", "test_metrics.py"),
    M("train_utils/metrics.py", "torch.where(valid, values, 0)", "values", "test_metrics.py"),
    M("train_utils/metrics.py", "return counts.flip(0).cumsum(0)", "return counts.cumsum(0)", "test_metrics.py"),
    M("train_utils/metrics.py", "align_corners=False", "align_corners=True", "test_metrics.py"),
    M("tasks/segmentation/confusion_matrix.py", "right / (true + predicted - right).double()", "right / (true + predicted).double()", "test_confusion_matrix.py"),
    M("tasks/segmentation/confusion_matrix.py", "values[occurs].mean() for values", "values.mean() for values", "test_confusion_matrix.py"),
    M("tasks/segmentation/confusion_matrix.py", "torch.where(counted, cell, classes**2)", "torch.where(known, cell, classes**2)", "test_confusion_matrix.py"),
    M("tasks/matting/metrics.py", "masked_fill(trimap == BACKGROUND, 0)", "masked_fill(trimap == BACKGROUND, 1)", "test_matting_metrics.py"),
    M("tasks/matting/metrics.py", "connected &= largest_component(reached >= step)", "connected &= reached >= step", "test_matting_metrics.py"),
    M("tasks/translation/metrics.py", "10 * torch.log10(255**2 * y.numel() / squared)", "20 * torch.log10(255**2 * y.numel() / squared)", "test_translation_metrics.py"),
    M("tasks/translation/metrics.py", "covariance = _smoothed(x * y) - xy", "covariance = _smoothed(x * y)", "test_translation_metrics.py"),
    # losses and schedule
    M("train_utils/losses.py", "return torch.stack(list(terms)).sum()", "return torch.stack(list(terms)).mean()", "test_losses.py"),
    M("tasks/saliency/losses.py", "(overlap + 1) / (total - overlap + 1)", "(overlap + 1) / (total + 1)", "test_losses.py"),
    M("tasks/segmentation/losses.py", "(losses * weights).sum() / torch.where(total > 0, total, 1)", "(losses * weights).sum() / weights.numel()", "test_segmentation_losses.py"),
    M("tasks/segmentation/losses.py", "counted - terms.sum(1) / there.sum(1).clamp(min=1)", "counted - terms.mean(1)", "test_segmentation_losses.py"),
    M("tasks/matting/losses.py", "(distance * unknown).sum() / unknown.sum().clamp(min=1)", "(distance * unknown).mean()", "test_matting_losses.py"),
    M("tasks/translation/losses.py", "return (logits - label).square().mean()", "return (logits - 1).square().mean()", "test_translation_task.py"),
    M("train_utils/schedule.py", "alpha = step / warmup_steps", "alpha = (step + 1) / warmup_steps", "test_schedule.py"),
    M("train_utils/schedule.py", "is_plain = parameter.ndim == 1 or name.endswith(\".bias\")", "is_plain = parameter.ndim == 1", "test_schedule.py"),
    M("train_utils/schedule.py", "schedule.base_lrs = [base * factor for base in schedule.base_lrs]", "pass", "test_schedule.py test_training_state.py"),
]  # fmt: skip


class Outcome(NamedTuple):
    """What became of a mutation: killed, survived or stale, and by which test."""

    verdict: str
    by: str
    output: str


def outcome_of(mutation: Mutation) -> Outcome:
    """Run the tests of a mutation in a copy of the repository; without it they must pass."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder, "repo")
        skipped = shutil.ignore_patterns("__pycache__", ".git", "runs", ".*_cache")
        shutil.copytree(REPO, copy, ignore=skipped)
        file = copy / mutation.file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if text.count(mutation.old) != 1:
            return Outcome("stale", "", "")
        file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        failed, output = first_failure(copy, mutation.tests)
        if failed:
            file.write_text(text, encoding="utf-8")
            unmutated = first_failure(copy, f"{failed.partition('::')[0]} -k {name_of(failed)}")
            if unmutated[0]:
                return Outcome("red", failed, unmutated[1])
        return Outcome("killed" if failed else "survived", failed, output)


def first_failure(copy: Path, tests: str) -> tuple[str, str]:
    """The first of the tests that fails in a copy, empty if none does, and pytest's output."""
    names, _, chosen = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in names.split()] + (["-k", chosen] if chosen else [])
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    return (failed[0] if failed else ""), done.stdout


def name_of(test: str) -> str:
    """The name of a test's function."""
    return re.split(r"::|\[|@", test)[1]


def lines(chosen: list[int], verbose: bool) -> Iterator[tuple[str, Outcome]]:
    """The outcomes, in order."""
    with ThreadPoolExecutor(2) as pool:
        for number, outcome in zip(
            chosen, pool.map(lambda n: outcome_of(MUTATIONS[n]), chosen), strict=True
        ):
            mutation = MUTATIONS[number]
            change = f"{mutation.old.strip()} → {mutation.new.strip()}".replace("\n", "⏎")
            text = f"{number:2} {outcome.verdict:8} {mutation.file}: {change}  {outcome.by}"
            yield f"{text}\n{outcome.output}" if verbose else text, outcome


def main() -> int:
    """Print a line a mutation; the number of those that went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="default: all")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    unnoticed = 0
    for line, outcome in lines(args.numbers or list(range(len(MUTATIONS))), args.verbose):
        print(line, flush=True)
        unnoticed += outcome.verdict != "killed"
    print(f"{unnoticed} not noticed")
    return unnoticed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
