"""The learning-rate schedule's values and the parameter groups."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

from train_utils import create_lr_scheduler, get_params_groups
from train_utils.schedule import (
    apply_schedule,
    describe_schedules,
    make_optimizer,
    make_schedule,
    scale_learning_rate,
)
from train_utils.settings import OptimConfig


def rates(count, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = create_lr_scheduler(optimizer, **options)
    values = []
    for _ in range(count):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_warm_up_then_cosine_by_hand():
    # W = 4 warm-up steps, T = 12 steps, wf = 1e-3, ef = 1e-6, base rate 2
    values = rates(13, num_step=4, epochs=3, warmup_epochs=1)
    assert values[0] == pytest.approx(2 * 1e-3, abs=1e-15)
    assert values[1] == pytest.approx(2 * (1e-3 * 0.75 + 0.25), abs=1e-12)
    assert values[4] == pytest.approx(2.0, abs=1e-12)
    assert values[8] == pytest.approx(2 * (0.5 * (1 - 1e-6) + 1e-6), abs=1e-12)  # cos(π/2) = 0
    quarter = (1 + math.sqrt(0.5)) / 2
    assert values[6] == pytest.approx(2 * (quarter * (1 - 1e-6) + 1e-6), abs=1e-12)
    assert values[12] == pytest.approx(2e-6, abs=1e-15)


def test_without_warm_up_it_starts_at_the_base_rate():
    assert rates(1, num_step=5, epochs=1, warmup=False)[0] == 2.0


def test_warm_up_longer_than_the_training_and_steps_beyond_its_end():
    assert max(rates(4, num_step=2, epochs=1, warmup_epochs=5)) < 2.0
    assert rates(7, num_step=2, epochs=2, warmup=False)[-1] == pytest.approx(2e-6)


@pytest.mark.parametrize("bad", [{"num_step": 0, "epochs": 1}, {"num_step": 1, "epochs": 0}])
def test_no_steps_are_refused(bad):
    with pytest.raises(ValueError, match="must be positive"):
        rates(1, **bad)


def test_groups_are_undecayed_then_decayed_without_frozen_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    plain, decayed = get_params_groups(model, weight_decay=0.1)
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in plain["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert [names[id(p)] for p in decayed["params"]] == ["0.weight"]
    bilinear = nn.Module()
    bilinear.bias = nn.Parameter(torch.zeros(2, 2))  # of two dimensions, not decayed by its name
    plain, decayed = get_params_groups(nn.Sequential(bilinear), weight_decay=0.1)
    assert (len(plain["params"]), len(decayed["params"])) == (1, 0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_optimizers_by_name_have_the_recipe_s_numbers(name, kind):
    optim = OptimConfig(name=name, lr=0.5, weight_decay=0.25, momentum=0.7, betas=(0.5, 0.9))
    optimizer = make_optimizer(nn.Conv2d(1, 1, 1), optim)
    assert type(optimizer) is kind
    plain, decayed = optimizer.param_groups
    assert (plain["lr"], plain["weight_decay"], decayed["weight_decay"]) == (0.5, 0.0, 0.25)
    expected = ("momentum", 0.7) if name == "sgd" else ("betas", (0.5, 0.9))
    assert plain[expected[0]] == expected[1]


def schedule_of(**optim):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    return optimizer, make_schedule(optimizer, OptimConfig(**optim), steps_per_epoch=2, epochs=6)


def walk(optimizer, schedule, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_constant_and_halving_schedules():
    assert walk(*schedule_of(schedule="constant"), 5) == [0.5] * 5
    halving = schedule_of(schedule="halving", halve_epochs=2)
    assert walk(*halving, 9) == [0.5] * 4 + [0.25] * 4 + [0.125]


def test_a_plateau_scales_the_rate_now_and_for_the_rest_of_the_schedule():
    optimizer, schedule = schedule_of(schedule="halving", halve_epochs=2)
    walk(optimizer, schedule, 3)
    scale_learning_rate(optimizer, schedule, 0.6)
    assert walk(optimizer, schedule, 3) == pytest.approx([0.3, 0.15, 0.15])
    resumed_optimizer, resumed = schedule_of(schedule="halving", halve_epochs=2)
    resumed.load_state_dict(schedule.state_dict())
    apply_schedule(resumed_optimizer, resumed)
    assert walk(resumed_optimizer, resumed, 3) == walk(optimizer, schedule, 3)


def test_the_header_shows_what_the_schedule_will_reach():
    _, halving = schedule_of(schedule="halving", halve_epochs=2)
    _, constant = schedule_of(schedule="constant")
    text = describe_schedules({"generator": halving, "discriminator": constant}, steps=12)
    assert "generator 0.5 → 0.125 (×0.25)" in text
    assert "discriminator 0.5 → 0.5 (×1)" in text
    assert "(×0.5)" in describe_schedules({"generator": halving}, steps=8)  # not yet the second


@pytest.mark.parametrize("resumed", [False, True])
def test_momentum_survives_an_overflow_in_the_first_step(resumed):
    """A GradScaler skips that step, and fused SGD would leave momentum as memory happened to be."""
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    optimizer = make_optimizer(net, OptimConfig(name="sgd", lr=0.1))
    if resumed:  # from a file of torch's own SGD before its first step
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {}, "param_groups": groups})
    scaler = torch.amp.GradScaler("cpu")
    with mock.patch("torch.empty_like", lambda t, **_: torch.full_like(t, torch.nan)):
        for factor in (math.inf, 1.0):
            scaler.scale((net(torch.ones(1, 8)) * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_momentum_that_starts_at_zeros_changes_no_bit():
    torch.manual_seed(0)
    nets = [nn.Linear(8, 8) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = make_optimizer(nets[0], OptimConfig(name="sgd", lr=0.1, weight_decay=0.0))
    others = torch.optim.SGD(nets[1].parameters(), lr=0.1, momentum=0.9, fused=True)
    for _ in range(3):
        for net, optimizer in zip(nets, (ours, others), strict=True):
            net(torch.ones(1, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
