"""What a run may change when it continues, and what it never saves."""

import copy

import pytest
import torch
from steps import Noting
from test_contract import assert_equal
from torch import nn
from torch.utils.data import TensorDataset

from tasks.saliency import Config
from train_utils import create_lr_scheduler, train_one_epoch
from train_utils.config import to_dict
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.ema import ExponentialMovingAverage
from train_utils.errors import UserError
from train_utils.settings import TrainConfig
from train_utils.train_and_eval import Progress
from train_utils.training_state import (
    TrainingState,
    resumed_forward_batch,
    resumed_global_batch,
)

CPU = torch.device("cpu")


def make_state(epochs=8, scaler=None, **changes):
    net = nn.Conv2d(3, 1, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    schedule = create_lr_scheduler(optimizer, 10, epochs, warmup=False)
    config = to_dict(Config())
    config["train"]["epochs"] = epochs
    fields = {
        "models": {"model": net},
        "optimizers": {"model": optimizer},
        "schedulers": {"model": schedule},
        "scalers": {"model": scaler},
        "ema": {},
        "config": config,
        "data": "abc",
        "sampler": GlobalBatchSampler(9, 4),
    }
    return TrainingState(**{**fields, **changes})


def test_more_epochs_follow_the_new_schedule_from_the_first_step():
    old = make_state(epochs=8)
    for _ in range(80):
        old.optimizers["model"].step()
        old.schedulers["model"].step()
    assert old.optimizers["model"].param_groups[0]["lr"] == pytest.approx(0.5e-6)
    new = make_state(epochs=16)
    new.restore(old.capture(), "last.pth")
    # Half of the cosine is left.
    assert new.optimizers["model"].param_groups[0]["lr"] == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(("step", "trained"), [(2, 3), (0, 2)])  # of epoch 3, nothing yet
def test_what_is_captured_is_restored(step, trained):
    def state_at(epoch, step, moved):
        state = trained_state(scaler=torch.amp.GradScaler("cpu", init_scale=512.0 * moved))
        average = ExponentialMovingAverage(state.models["model"], 0.9)
        for _ in range(moved):
            average.update(state.models["model"])
            state.schedulers["model"].step()
        state.ema, state.epoch, state.step = {"model": average}, epoch, step
        state.lr, state.stale = 0.1 * moved, moved
        state.best_scores, state.meters = {"MAE": 0.3 * moved}, {"loss": [2.5 * moved, 4.0]}
        return state

    saved = copy.deepcopy(state_at(3, step, moved=3).capture())
    assert (saved["next_epoch"], saved["next_step"], saved["epoch"]) == (3, step, trained)
    assert (saved["lr"], saved["stale"], saved["ema_steps"]) == (
        pytest.approx(0.3),
        3,
        {"model": 3},
    )
    assert saved["scaler"]["scale"] == 1536 and saved["lr_scheduler"]["last_epoch"] == 3
    fresh = state_at(0, 0, moved=1)
    fresh.restore(copy.deepcopy(saved), "last.pth")
    assert_equal(fresh.capture(), saved, "state")


def test_an_fp16_checkpoint_continues_in_another_precision():
    saved = make_state().capture()
    saved["scaler"] = {"scale": 65536.0, "growth_factor": 2.0}
    make_state().restore(saved, "last.pth")


@pytest.mark.parametrize(
    ("section", "key", "value"), [("optim", "lr", 0.1), ("data", "image_size", 64)]
)
def test_other_settings_are_refused_with_the_difference(section, key, value):
    saved = make_state().capture()
    other = make_state()
    other.config[section][key] = value
    with pytest.raises(UserError, match=rf"{section}\.{key}: .* → {value}.*--weights"):
        other.restore(saved, "last.pth")


def test_other_data_is_refused():
    with pytest.raises(UserError, match="9 samples, now there are 8"):
        make_state(sampler=GlobalBatchSampler(8, 4)).restore(make_state().capture(), "last.pth")


def test_global_batch_outlives_changes_of_the_world_size():
    def saved(world, batch):
        return {
            "global_batch": 4,
            "world_size": world,
            "args": {"train": {"batch_size": batch, "accumulate": 1}},
        }

    assert resumed_global_batch(saved(2, 2), 4, 2) == 4
    assert resumed_global_batch(saved(2, 2), 2, 1) == 4  # a process less
    assert resumed_global_batch(saved(1, 2), 2, 1) == 4  # and once more with the same settings
    assert resumed_global_batch(saved(2, 2), 3, 3) == 4  # another number, with any settings
    with pytest.raises(UserError, match="global batch of 4"):
        resumed_global_batch(saved(1, 4), 8, 1)


def test_synchronised_batch_norm_keeps_its_group_over_changes_of_the_world_size():
    train = TrainConfig(batch_size=4, accumulate=2, sync_bn=True)
    first = {"world_size": 2, "args": {"train": {"batch_size": 4}}}
    assert resumed_forward_batch(first, train, 1) == 8
    then = {**first, "world_size": 1, "forward_batch": 8}
    assert resumed_forward_batch(then, train, 3) == 8
    # As asked for: another size, or every process for itself.
    assert resumed_forward_batch(then, TrainConfig(batch_size=2, sync_bn=True), 3) == 6
    assert resumed_forward_batch(then, TrainConfig(batch_size=4), 3) == 12


def test_best_scores_follow_the_deciding_metric():
    state = make_state()
    assert not state.note_scores({"MAE": 0.2, "maxF1": float("nan")}, "maxF1", "max")
    assert (state.best_scores, state.stale) == ({}, 1)
    assert state.note_scores({"MAE": 0.3, "maxF1": 0.5}, "maxF1", "max")
    assert not state.note_scores({"MAE": 0.1, "maxF1": 0.5}, "maxF1", "max")  # no better
    assert not state.note_scores({"MAE": 0.1, "maxF1": 0.4}, "maxF1", "max")
    assert not state.note_scores({"MAE": 0.1, "maxF1": float("nan")}, "maxF1", "max")
    assert state.best_scores == {"MAE": 0.3, "maxF1": 0.5}
    assert state.note_scores({"MAE": 0.2, "maxF1": 0.1}, "MAE", "min")


def test_weights_that_are_not_finite_are_never_captured():
    state = make_state()
    with torch.no_grad():
        state.models["model"].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="weights of model became NaN or infinite"):
        state.capture()


def test_a_loss_that_is_not_finite_stops_before_its_step_and_is_named():
    images = torch.randn(8, 3, 4, 4)
    images[5] = float("nan")
    data = TensorDataset(images, torch.rand(8, 1, 4, 4))
    net = nn.Conv2d(3, 1, 1)
    sampler = GlobalBatchSampler(8, 1, shuffle=False)
    steps = []

    def note(progress: Progress) -> None:
        steps.append(progress.step)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"step 6 of 8: loss on rank 0 \(sample 5\) became NaN"):
        train_one_epoch(
            net, optimizer, train_loader(data, sampler, 0, CPU), CPU, 0, None, 1, run=Noting(note)
        )
    assert steps == [1, 2, 3, 4, 5]


def test_stale_evaluations_are_counted_and_a_smaller_rate_survives_a_restart():
    state = make_state()
    improved = [state.note_scores({"loss": v}, "loss", "min") for v in (3.0, 2.0, 2.0, 5.0)]
    assert improved == [True, True, False, False]
    assert (state.stale, state.best_scores) == (2, {"loss": 2.0})
    assert not state.note_scores({"loss": float("nan")}, "loss", "min")
    assert state.stale == 3
    state.scale_learning_rates(0.5)
    assert state.optimizers["model"].param_groups[0]["lr"] == pytest.approx(0.25)
    resumed = make_state()
    resumed.restore(state.capture(), "last.pth")
    assert resumed.stale == 3
    assert resumed.optimizers["model"].param_groups[0]["lr"] == pytest.approx(0.25)
    assert resumed.note_scores({"loss": 1.0}, "loss", "min")
    assert resumed.stale == 0


def test_other_data_of_the_same_number_are_refused():
    saved = make_state().capture()
    with pytest.raises(UserError, match="samples of other names"):
        make_state(data="xyz").restore(saved, "last.pth")
    del saved["data"]  # a file from before it was kept
    make_state(data="xyz").restore(saved, "last.pth")


def trained_state(**changes):
    """A state after a step, so that its optimizer holds something for each parameter."""
    state = make_state(**changes)
    state.models["model"](torch.ones(1, 3, 2, 2)).sum().backward()
    state.optimizers["model"].step()
    return state


def misfits(change, **kind):
    """What is said of a captured state that `change` spoilt; nothing may have been copied."""
    saved, fresh = trained_state(**kind).capture(), trained_state(**kind)
    change(saved)
    before = copy.deepcopy(fresh.capture())
    with pytest.raises(UserError) as caught:
        fresh.restore(saved, "last.pth")
    after = fresh.capture()
    assert all(torch.equal(before["model"][k], v) for k, v in after["model"].items())
    states = after["optimizer"]["state"], before["optimizer"]["state"]
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[1])
    assert after["lr_scheduler"] == before["lr_scheduler"]
    return str(caught.value)


def test_optimizer_state_of_other_shapes_is_refused_before_anything_is_copied():
    def swap(saved):
        states = saved["optimizer"]["state"]
        states[0], states[1] = states[1], states[0]

    message = misfits(swap)
    assert message.startswith("last.pth: ") and "--weights" in message
    for part in ("exp_avg", "exp_avg_sq"):
        assert f"optimizer of model: weight: {part} (1,) ≠ (1, 3, 1, 1)" in message
        assert f"optimizer of model: bias: {part} (1, 3, 1, 1) ≠ (1,)" in message


def _sgd(saved):
    net = nn.Conv2d(3, 1, 1)
    saved["optimizer"] = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["optimizer"]["param_groups"][0]["params"].pop(),
            "groups of [1] parameters ≠ [2]",
        ),
        (
            lambda s: s["optimizer"]["param_groups"].append({"params": []}),
            "[2, 0] parameters ≠ [2]",
        ),
        (lambda s: s["optimizer"]["param_groups"].clear(), "lacks param_groups or state"),
        (lambda s: s.update(optimizer={"state": {}}), "lacks param_groups or state"),
        (lambda s: s["optimizer"].update(state=[]), "lacks param_groups or state"),
        (
            lambda s: s["optimizer"]["state"][1].pop("exp_avg"),
            "bias: lacks some of exp_avg, exp_avg",
        ),
        (lambda s: s["optimizer"]["state"].update({0: 7}), "weight: lacks some of exp_avg"),
        (_sgd, "optimizer of model: is of another kind"),
        (lambda s: s["lr_scheduler"].pop("last_epoch"), "lr_scheduler of model: lacks last_epoch"),
        (
            lambda s: s["lr_scheduler"]["base_lrs"].append(1.0),
            "lr_scheduler of model: lacks base_lrs",
        ),
        (lambda s: s["model"].pop("bias"), "1 missing: bias"),
    ],
)
def test_training_state_that_does_not_fit_is_refused_by_name(change, message):
    assert message in misfits(change)


def test_a_scaler_and_a_moving_average_that_do_not_fit():
    scaler = torch.amp.GradScaler("cpu")
    text = misfits(lambda s: s["scaler"].pop("growth_interval"), scaler=scaler)
    assert "scaler of model: lacks growth_interval" in text
    other = ExponentialMovingAverage(nn.Conv2d(3, 2, 1), 0.9).module.state_dict()
    average = {"model": ExponentialMovingAverage(nn.Conv2d(3, 1, 1), 0.9)}
    text = misfits(lambda s: s.update(ema=other), ema=average)
    assert "last.pth, moving average: these weights do not fit" in text
    assert "bias (2,) ≠ (1,)" in text


def test_two_networks_are_checked_by_name():
    def named(state):
        parts = ("models", "optimizers", "schedulers", "scalers")
        for part in parts:
            one = getattr(state, part)["model"]
            other = getattr(make_state(), part)["model"]
            setattr(state, part, {"generator": one, "discriminator": other})
        return state

    saved = named(trained_state()).capture()
    named(make_state()).restore(saved, "last.pth")
    del saved["optimizer"]["discriminator"]
    saved["optimizer"]["generator"]["state"][1]["exp_avg"] = torch.zeros(2)
    with pytest.raises(UserError) as caught:
        named(make_state()).restore(saved, "last.pth")
    assert "optimizer of generator: bias: exp_avg (2,) ≠ (1,)" in str(caught.value)
    assert "optimizer of discriminator: is missing" in str(caught.value)


# -- what a checkpoint brings from elsewhere ------------------------------------------------------


def test_options_of_a_checkpoint_do_not_replace_the_code_s_unseen(capsys):
    saved = trained_state().capture()
    saved["optimizer"]["param_groups"][0].update(
        maximize=True, weight_decay=-9.0, betas=(0.0, 0.5), lr=1e9, foreach=False
    )
    fresh = make_state()
    fresh.restore(saved, "last.pth")
    (group,) = fresh.optimizers["model"].param_groups
    assert (group["maximize"], group["weight_decay"], group["betas"]) == (False, 0.01, (0.9, 0.999))
    assert group["lr"] == 0.5  # the schedule's
    said = capsys.readouterr().out
    assert said == (
        "last.pth: the optimizer goes on as these settings and this code make it, with betas "
        "(0.9, 0.999), not (0.0, 0.5); foreach None, not False; maximize False, not True; "
        "weight_decay 0.01, not -9.0\n"
    )
    make_state().restore(trained_state().capture(), "last.pth")
    assert capsys.readouterr().out == ""  # nothing differs


class Counting(torch.optim.AdamW):
    """Keeps a count in its groups, as some libraries' optimizers do."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for group in self.param_groups:
            group["k"] = 0


def test_what_an_optimizer_keeps_in_its_groups_is_restored():
    def counting(k):
        state = make_state()
        state.optimizers["model"] = Counting(state.models["model"].parameters(), lr=0.5)
        state.schedulers["model"] = create_lr_scheduler(state.optimizers["model"], 10, 8)
        state.optimizers["model"].param_groups[0]["k"] = k
        return state

    saved, fresh = counting(7).capture(), counting(0)
    saved["optimizer"]["param_groups"][0]["maximize"] = True  # of the class below
    fresh.restore(saved, "last.pth")
    (group,) = fresh.optimizers["model"].param_groups
    assert (group["k"], group["maximize"]) == (7, False)


def _set(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(saved):
        for key in keys:
            saved = saved[key]
        saved[last] = value

    return change


GROUP, FIRST = ("optimizer", "param_groups", 0), ("optimizer", "state", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(*GROUP, "lr", float("nan")), "optimizer of model: lr: nan ≠ 0.5"),
        (_set(*GROUP, "betas", [0.9] * 100), "optimizer of model: betas: [0.9, 0.9, "),
        (_set(*GROUP, "weight_decay", "x" * 999), "optimizer of model: weight_decay: 'xxx"),
        (_set(*GROUP, "params", [0, 0]), "numbers its parameters in another way"),
        (_set(*GROUP, "params", ["a", "b"]), "numbers its parameters in another way"),
        (_set("optimizer", "state", 99, {}), "has 1 states of no parameter"),
        (_set(*FIRST, "step", torch.tensor(-5.0)), "weight: step tensor(-5.) is of another kind"),
        (_set(*FIRST, "step", torch.tensor(float("nan"))), "weight: step tensor(nan) is"),
        (_set(*FIRST, "exp_avg", torch.zeros(1, 3, 1, 1).long()), "weight: exp_avg tensor"),
        (_set("lr_scheduler", "last_epoch", -1), "last_epoch -1 ≠ 0"),
        (_set("lr_scheduler", "last_epoch", 10**99), "last_epoch 1000"),
        (_set("lr_scheduler", "base_lrs", [1e9]), "base_lrs [1000000000.0], more than [0.5]"),
        (_set("lr_scheduler", "base_lrs", [-0.5]), "base_lrs [-0.5], more than [0.5]"),
        (_set("lr_scheduler", "base_lrs", [float("nan")]), "base_lrs [nan] ≠ [0.5]"),
        (_set("lr_scheduler", "lr_lambdas", [{"a": 1}]), "lr_lambdas [{'a': 1}] ≠ [None]"),
        (_set("lr_scheduler", "step", [1]), "lr_scheduler of model: step [1] ≠ None"),
        (_set("next_step", 4), "continues at step 4 of an epoch that has 3"),
    ],
)
def test_state_that_would_spoil_the_training_is_refused(change, message):
    assert message in misfits(change)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", float("nan")),
        ("scale", -1.0),
        ("growth_factor", 1e9),
        ("growth_interval", -1),
        ("_growth_tracker", -1),
        ("_growth_tracker", "x"),
    ],
)
def test_a_scaler_s_state_that_no_scaler_has_is_refused(key, value):
    scaler = torch.amp.GradScaler("cpu")
    assert f"scaler of model: {key} {value!r} ≠ " in misfits(
        _set("scaler", key, value), scaler=scaler
    )


def test_a_rate_that_a_plateau_lowered_is_told(capsys):
    state = trained_state()
    state.scale_learning_rates(0.5)
    capsys.readouterr()
    make_state().restore(state.capture(), "last.pth")
    assert capsys.readouterr().out == "last.pth: lr of model goes on from 0.25, not 0.5\n"
    state = trained_state(schedulers={})
    state.optimizers["model"].param_groups[0]["lr"] = 1e9
    make_state(schedulers={}).restore(state.capture(), "last.pth")
    assert capsys.readouterr().out == "last.pth: lr of model goes on from 1e+09, not 0.5\n"
