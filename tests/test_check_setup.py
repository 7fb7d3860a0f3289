"""The set-up part of check.py: figures worked out by hand, recipes that learn and that cannot."""

import copy
import itertools
import json
import math
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import check
from train_utils.check import costs, learning, setup
from train_utils.check.costs import Speed, largest_batch, speed
from train_utils.check.findings import Report
from train_utils.check.learning import compared, overfit, read_curve, sweep
from train_utils.check.sections import Section
from train_utils.check.setup import SetUp, check_setup
from train_utils.check.summary import summarize, summary_table
from train_utils.check.trials import Epochs, Steps, Trial, cut, untouched
from train_utils.data import GlobalBatchSampler, eval_loader, train_loader
from train_utils.dry_run import leaves_of, untrained
from train_utils.errors import UserError
from train_utils.settings import BaseConfig
from train_utils.task import BaseTask

CPU = torch.device("cpu")
SIDE = 8


class Task(BaseTask):
    """Mean squared error of one network, by SGD."""

    def __init__(self, lr=0.1, losses=None):
        super().__init__(BaseConfig(task="tests"))
        self.lr, self._losses = lr, losses

    def build_optimizers(self, models):
        return {n: torch.optim.SGD(m.parameters(), lr=self.lr) for n, m in models.items()}

    def losses(self, models, batch):
        if self._losses:
            return self._losses(models, batch)
        return {"mse": ((models["model"](batch[0]) - batch[1]) ** 2).mean()}


class Net(nn.Module):
    """Two convolutions: 3 → 4 of 1×1, and, in a list, 4 → 1 of 3×3."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.rest = nn.ModuleList([nn.Conv2d(4, 1, 3, padding=1)])

    def forward(self, x):
        for layer in self.rest:
            y = layer(self.first(x))
        return y


class Linear(nn.Module):
    """The image's first channel times a weight that starts at 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x[:, :1] * self.weight


def net():
    torch.manual_seed(0)
    return {"model": Net()}


def a_batch(images=4):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return inputs, inputs.mean(1, keepdim=True)


# -- what it is -----------------------------------------------------------------------------------


def test_parameters_and_operations_of_a_tiny_network():
    """A 1×1 convolution: 3·4 multiply-adds a pixel; a 3×3 one: 9·4; each counts as two."""
    (stages,) = summarize(Task(), net(), a_batch(1), CPU).values()
    first, second, total = stages
    assert (first.name, first.kind, first.parameters) == ("first", "Conv2d", 3 * 4 + 4)
    assert (second.name, second.parameters) == ("rest.0", 4 * 9 + 1)
    assert first.outputs == [[1, 4, SIDE, SIDE]] and second.outputs == [[1, 1, SIDE, SIDE]]
    assert first.flops == 2 * 3 * 4 * SIDE**2 and second.flops == 2 * 4 * 9 * SIDE**2
    assert (total.parameters, total.trained, total.calls) == (53, 53, 1)
    assert total.flops == first.flops + second.flops
    table = summary_table("model", stages)
    assert table.rows[0] == ["first", "Conv2d", "B × 4 × 8 × 8", "16", "1.536 k"]


def test_a_network_that_is_called_twice_or_never_is_shown_so():
    def losses(models, batch):
        twice = models["model"](batch[0]) + models["model"](batch[0])
        return {"mse": ((twice - batch[1]) ** 2).mean()}

    networks = {**net(), "other": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())}
    found = summarize(Task(losses=losses), networks, a_batch(1), CPU)
    assert [stage.calls for stage in found["model"]] == [2, 2, 2]
    assert summary_table("model", found["model"]).rows[-1][2].endswith(", called 2 times")
    assert [row[2] for row in summary_table("other", found["other"]).rows] == ["not called"] * 3
    assert found["other"][0].parameters == 12


def test_parameters_that_are_never_trained_are_named():
    """Those that no loss depends on, and those that no optimizer has; frozen ones are meant."""
    model = nn.ModuleDict({name: nn.Conv2d(1, 1, 1) for name in ("used", "unused", "unheld")})
    model["frozen"] = nn.Conv2d(1, 1, 1).requires_grad_(False)
    outputs = model["unheld"](model["frozen"](model["used"](torch.ones(1, 1, 1, 1)))).sum()
    reached = leaves_of([outputs])
    assert reached == {id(p) for name in ("used", "unheld") for p in model[name].parameters()}
    names = {f"model.{name}" for name, p in model.named_parameters() if id(p) in reached}
    held = [*model["used"].parameters(), *model["unused"].parameters()]
    optimizers = {"model": torch.optim.SGD(held, lr=0.1)}
    first, second = untrained({"model": model}, optimizers, names)
    assert first.startswith("model.unused.weight, model.unused.bias: no loss depends on these, so")
    assert "2 parameters are never trained" in first
    assert second.startswith("model.unheld.weight, model.unheld.bias: no optimizer has these")
    optimizers["model"].add_param_group({"params": [*model["unheld"].parameters()]})
    assert untrained({"model": model}, optimizers, names | {"model.unused.weight"}) == [
        first.replace("model.unused.weight, ", "").replace("that 2", "that 1")
    ]


# -- what it learns -------------------------------------------------------------------------------


def test_one_batch_is_learnt_by_heart():
    found = overfit(Task(), net(), a_batch(), CPU, 60)
    assert found.finding is None and found.line.endswith("it learns")
    assert found.steps.losses[-1] < 0.2 * found.steps.losses[0]
    assert found.line.startswith("overfit of one batch of 4 images: the loss goes from 0.")


def constant(models, batch):
    """Depends on the weights by rounding only."""
    return {"mse": 1 + 0 * models["model"](batch[0]).mean()}


def freeze_most(networks, batch):
    networks["model"].rest.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        (freeze_most, "70% of the parameters are frozen"),
        (lambda networks, batch: batch[1].fill_(0.5), "All targets of this batch are 0.5"),
        (lambda networks, batch: batch[0].copy_(batch[0][:1].clone()), "Two images of this batch"),
        (lambda networks, batch: None, "Look at the pairs on the page"),
    ],
)
def test_what_no_rate_can_learn_is_said_with_what_is_likely_wrong(change, fix, monkeypatch):
    monkeypatch.setattr(learning, "MOST_STEPS", 25)
    networks, batch = net(), a_batch()
    change(networks, batch)
    found = overfit(Task(losses=constant), networks, batch, CPU, 60)
    assert found.finding and found.finding.severity == "error"
    assert found.line.endswith("it does not learn") and found.finding.fix.startswith(fix)
    assert "ten times and a tenth fail, too" in found.finding.fix


def test_a_loss_that_falls_a_little_at_all_rates_is_a_warning(monkeypatch):
    """1 + 0.4 w² goes from 1.4 to 1 at best: targets with an entropy of their own do so, too."""
    monkeypatch.setattr(learning, "MOST_STEPS", 25)
    monkeypatch.setattr(learning, "_still_falls", lambda steps: False)
    task = Task(0.1, lambda models, batch: {"mse": 1 + 0.4 * models["model"].weight ** 2})
    found = overfit(task, {"model": Linear()}, a_batch(), CPU, 60)
    assert found.finding and found.finding.severity == "warning"
    assert found.line.endswith("it does not learn")


@pytest.mark.parametrize(("lr", "better"), [(2.5, "0.25"), (1e-2, "0.1")])
def test_a_learning_rate_that_is_too_high_or_too_low_is_named(lr, better, monkeypatch):
    """A quadratic of curvature 1: (1 − lr)^2n is left after n steps, 0.6 of it for 0.01 and 25."""
    monkeypatch.setattr(learning, "MOST_STEPS", 25)
    monkeypatch.setattr(learning, "_still_falls", lambda steps: False)
    task = Task(lr, lambda models, batch: {"mse": models["model"].weight ** 2 / 2})
    found = overfit(task, {"model": Linear()}, a_batch(), CPU, 60)
    assert found.finding and found.finding.severity == "warning"
    assert found.finding.fix == f"Try --lr {better}."
    assert "does not learn at this rate" in found.line


def test_a_sweep_finds_the_rates_of_a_quadratic():
    """Loss a·w²/2: SGD is fastest at 1/a and diverges from 2/a on, whatever the recipe's rate."""
    for a, lr in ((4.0, 0.1), (50.0, 0.1), (4.0, 0.004)):
        task = Task(lr, lambda models, batch, a=a: {"mse": a * models["model"].weight ** 2 / 2})
        trial = Trial(task, {"model": Linear()}, CPU)
        found = sweep(trial, a_batch(), 100, 60)
        assert found.rates[0] == pytest.approx(lr / 1000)
        assert found.diverged is not None and 2 / a <= found.diverged <= 20 / a
        assert found.suggestion is not None and 1 / 50 / a <= found.suggestion <= 1 / a
        assert "diverges by" in found.line


def test_a_sweep_that_has_no_time_says_so():
    task = Task(0.1, lambda models, batch: {"mse": models["model"].weight ** 2 / 2})
    found = sweep(Trial(task, {"model": Linear()}, CPU), a_batch(), 100, 0)
    assert found.suggestion is None
    assert "1 of 100 steps up to 0.0001 in 0 s, which say nothing yet" in found.line


def curve_of(losses, problem=""):
    rates = [1e-6 * 10 ** (6 * step / (len(losses) - 1)) for step in range(len(losses))]
    return Steps(rates, losses, problem=problem)


def test_a_curve_that_says_nothing_gives_no_suggestion():
    flat = [1 + 0.01 * (-1) ** step for step in range(60)]
    falling = [1 - step**2 / 3600 for step in range(60)]
    for losses, reason in (
        (flat, "falls at no rate"),
        (falling, "still falls at the highest rate tried"),
        (flat[:10], "10 steps are too few"),
    ):
        found = read_curve(curve_of(losses))
        assert found.suggestion is None and reason in found.line
        assert compared(found, 0.1) is None
    only_grows = [1.0] * 40 + [1.5**step for step in range(20)]
    found = read_curve(curve_of(only_grows))
    assert found.suggestion is None and found.diverged


def test_a_curve_that_becomes_nan_diverges_there():
    falls = [1 - 0.8 / (1 + math.exp((30 - step) / 3)) for step in range(50)]
    found = read_curve(curve_of([*falls, math.nan], "it became NaN"))
    assert found.diverged == found.rates[-1] and len(found.losses) == 50
    # Where the logistic curve is steepest, and a tenth of where it is lowest, at its last value.
    assert (found.suggestion, found.highest) == (found.rates[30], found.rates[49] / 10)


def test_the_recipes_rate_is_compared_with_the_suggestion():
    found = read_curve(
        curve_of([1 - 0.8 / (1 + math.exp((30 - step) / 3)) for step in range(50)] + [9.0] * 3)
    )
    assert compared(found, found.suggestion / 2) is compared(found, found.highest * 2) is None
    for lr in (found.suggestion / 6, found.highest * 6):
        finding = compared(found, lr)
        assert finding.severity == "note" and finding.fix == f"Try --lr {found.suggestion:.1g}."
    assert compared(found, found.diverged).severity == "warning"


# -- what it needs and takes ----------------------------------------------------------------------


def test_the_memory_of_a_batch_on_cpus_is_drawn_out_to_what_is_free(monkeypatch):
    """100 MB an image; 300 held before, 500 with two, 700 with four; 90 % of 1000 are to use."""
    peaks = iter([300.0, 500.0, 700.0])
    monkeypatch.setattr(costs, "_peak", lambda: next(peaks) * 2**20)
    monkeypatch.setattr(costs, "available_memory", lambda: 1000 * 2**20)
    found = largest_batch(Task(), net(), a_batch(), CPU, 60)
    assert found.images == 2 + (300 + 900 - 500) // 100
    assert "an estimate from 2 and 4" in found.line and "100 MB each" in found.line
    monkeypatch.setattr(costs, "_peak", lambda: 300.0 * 2**20)
    found = largest_batch(Task(), net(), a_batch(), CPU, 0)
    assert found.images is None and "not estimated" in found.line


def test_the_largest_batch_of_an_accelerator_is_tried(monkeypatch):
    """By doubling and halving, to an eighth; what is no lack of memory is an error as ever."""
    tried = []

    def losses(models, batch):
        tried.append(len(batch[0]))
        if len(batch[0]) > 37:
            raise RuntimeError("CUDA out of memory. Tried to allocate much")
        return {"mse": ((models["model"](batch[0]) - batch[1]) ** 2).mean()}

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(costs.gc, "collect", lambda: None)  # takes long beside all tests
    found = costs._tried(Task(losses=losses), net(), a_batch(), CPU, 60)
    assert 33 <= found.images <= 37 and found.line.endswith("do not fit")
    assert tried[:2] == [4, 4] and max(tried) == 64
    none = costs._tried(Task(losses=losses), net(), a_batch(100), CPU, 0)
    assert none.images == 0 and "not even 100" in none.line

    def broken(models, batch):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        costs._tried(Task(losses=broken), net(), a_batch(), CPU, 60)


def loaders(images=10, batch=4, micro=None):
    data = TensorDataset(*a_batch(images))
    sampler = GlobalBatchSampler(images, batch, micro)
    val = eval_loader(TensorDataset(*a_batch(3)), 2, 0, CPU)
    return train_loader(data, sampler, 0, CPU), val


def test_epochs_go_on_and_batches_are_cut_or_filled():
    loader, _ = loaders()
    sizes = [len(batch[0]) for batch in Epochs(loader, 5)]
    assert sizes == [4, 4, 2, 4, 4]
    inputs, _ = a_batch(2)
    assert torch.equal(cut((inputs,), 5)[0], inputs[[0, 1, 0, 1, 0]])


def test_a_step_that_takes_too_long_is_reckoned_from_a_smaller_one(monkeypatch):
    """Four images of 3 s are 12 s; a loader of 0.25 images/s has them after 16: 4 s of waiting."""
    monkeypatch.setattr(costs, "_loaded", lambda loader, seconds: 0.25)
    monkeypatch.setattr(costs, "_evaluation", lambda trial, loader, seconds: 7.0)
    loader, val_loader = loaders(micro=2)
    found = speed(Trial(Task(), net(), CPU, 2), loader, val_loader, 3.0, 20.0)
    assert found == Speed(4, 16.0, 4.0, 0.25, 7.0, measured=False)
    assert found.share_waited == 0.25


def test_hours_and_the_wait_for_data_are_reckoned_from_a_step(monkeypatch, logged):
    """Ten images in steps of 4 are 3 steps an epoch: one epoch of 2 s each, and 100 s to score."""
    found = Speed(4, 2.0, 0.5, 10.0, 100.0, measured=True)
    monkeypatch.setattr(setup, "speed", lambda *parts: found)
    loader, val_loader = loaders()
    task, networks, report, section = Task(), net(), Report("tests", "masks"), Section("Set-up")
    parts = task, networks, task.build_optimizers(networks), loader, val_loader, CPU
    setup._Look(SetUp(*parts), report, section, 60)._speed(0.1)
    (line,) = logged
    assert line.startswith("2 images/s in steps of 2 s; the loader alone 10 images/s; 25% of the")
    assert "about 0:01:46 to the end of the recipe, 0:01:40 of it in evaluations" in line
    (finding,) = report.findings
    assert finding.kind == "speed" and "--cache ram" in finding.fix


def test_a_first_step_that_is_not_finite_has_no_pace():
    task = Task(losses=lambda models, batch: {"mse": models["model"](batch[0]).mean() / 0})
    loader, _ = loaders()
    with pytest.raises(UserError, match="became NaN or infinite"):
        speed(Trial(task, net(), CPU), loader, eval_loader([], 1, 0, CPU), 0.01, 60)


# -- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["unet", "pix2pix"])
def test_a_whole_set_up_is_looked_at_and_nothing_changes_by_it(
    config, tmp_path, monkeypatch, logged
):
    """One network and two, with accumulation; the page and report.json have what was printed."""
    monkeypatch.chdir(tmp_path)
    small = ["data.train_size=6", "data.val_size=2", "train.accumulate=2", "train.epochs=3"]
    small += ["data.image_size=32", "model.channels=2"]
    small += ["model.levels=3", "model.d_channels=2"] * (config == "pix2pix")
    given, made = {}, check.SetUp

    def noted(*parts):
        given["setup"] = made(*parts)
        given["before"] = state_of(given["setup"])
        return given["setup"]

    monkeypatch.setattr(check, "SetUp", noted)
    for module, name, few in (
        (learning, "MOST_STEPS", 5),
        (setup, "SWEEP_STEPS", 20),
        (costs, "_STEPS", 3),
        # Earlier tests have needed more memory than this one does.
        (costs, "_peak", partial(next, itertools.count(2**30, 2**27))),
    ):
        monkeypatch.setattr(module, name, few)
    recipe = str(Path(check.__file__).parent / "configs" / f"{config}.yaml")
    args = ["--config", recipe, *(word for setting in small for word in ("--set", setting))]
    args += ["--setup", "--seconds", "60", "--processes", "2"]
    check.main(check.parse_args([*args, "-j", "0", "-b", "2", "--device", "cpu"]))
    assert state_of(given["setup"]) == given["before"]
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        f"check/{config}/index.html",
        f"check/{config}/report.json",
    }
    said = "\n".join(logged)
    for line in (
        "8 images per step: 2 × 2 (train.accumulate) × 2 process(es); 1 steps an epoch, 3 in all",
        "overfit of one batch of 2 images",
        "learning-rate sweep: ",
        "to the end of the recipe",
    ):
        assert line in said, line
    page = (tmp_path / "check" / config / "index.html").read_text()
    report = json.loads((tmp_path / "check" / config / "report.json").read_text())
    assert page.count("<svg") >= 2 and "learning-rate sweep" in page
    networks = ["model"] if config == "unet" else ["generator", "discriminator"]
    found = report["sections"]["Set-up"]
    assert [name for name in networks if found[name][-1]["name"] == "total"] == networks
    assert found["global_batch"] == 8 and found["overfit"] and found["seconds"] > 0


def test_what_keeps_a_training_from_its_first_step_is_a_finding(tmp_path, monkeypatch, logged):
    """A loss that is not finite, and settings with which there is no training."""
    monkeypatch.chdir(tmp_path)
    data = TensorDataset(*a_batch(4))
    loader = train_loader(data, GlobalBatchSampler(4, 2), 0, CPU)
    task = Task(losses=lambda models, batch: {"mse": models["model"](batch[0]).mean() / 0})
    task.predict = lambda models, images: models["model"](images.float())
    report, nothing = Report("tests", "masks"), eval_loader([], 1, 0, CPU)
    networks = net()
    optimizers = task.build_optimizers(networks)
    check_setup(SetUp(task, networks, optimizers, loader, nothing, CPU), report, 60)
    (finding,) = report.findings
    assert finding.severity == "error" and "loss on rank 0 became NaN" in finding.message
    args = ["--set", "data.train_size=3", "--set", "data.val_size=1", "--device", "cpu", "--setup"]
    errors = check.main(check.parse_args([*args, "--weights", "missing.pth"]))
    assert errors == 1 and "missing.pth" in (tmp_path / "check/shapes/index.html").read_text()


def test_the_generator_of_an_accelerator_is_put_back_too(monkeypatch):
    """Whatever it is called, and also after an error."""
    kept, state = [], object()
    module = SimpleNamespace(get_rng_state=lambda: state, set_rng_state=kept.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    with pytest.raises(ValueError, match="mine"), untouched(torch.device("xpu", 0)):
        raise ValueError("mine")
    assert kept == [state]


def state_of(setup):
    """All that a later training starts from, as values that can be compared."""
    tensors = {
        f"{name}.{key}": value.tolist()
        for name, network in setup.networks.items()
        for key, value in network.state_dict().items()
    }
    modes = [m.training for n in setup.networks.values() for m in n.modules()]
    gradients = [p.grad for n in setup.networks.values() for p in n.parameters()]
    rates = [g["lr"] for o in setup.optimizers.values() for g in o.param_groups]
    sampler = setup.loader.batch_sampler
    drawn = torch.get_rng_state().tolist(), random.getstate()
    place = sampler.epoch, sampler.start_step
    states = [len(o.state) for o in setup.optimizers.values()]
    return copy.deepcopy((tensors, modes, gradients, rates, drawn, place, states))
