"""The training loop against the few lines of plain torch that it stands for, on one process."""

import copy
import traceback

import pytest
import torch
from steps import Noting
from torch import nn
from torch.utils.data import TensorDataset

from train_utils import criterion, train_one_epoch
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.ema import ExponentialMovingAverage
from train_utils.errors import UserError
from train_utils.train_and_eval import EpochRun, StepOptions, mean_losses

CPU = torch.device("cpu")
SAMPLES, BATCH = 10, 4  # three steps, the last one of two images
LR = 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1)

    def forward(self, x):
        return self.norm(self.conv(x))


def make_net():
    torch.manual_seed(0)
    return Net()


def pairs():
    generator = torch.Generator().manual_seed(1)
    shape = (SAMPLES, 1, 4, 4)
    images = torch.randn(SAMPLES, 3, 4, 4, generator=generator)
    return images, torch.rand(shape, generator=generator)


def train(net, epoch=0, micro_batch=None, schedule=None, data=None, run=None, **others):
    """(mean loss, last rate) of an epoch in the order of the samples, by SGD."""
    sampler = GlobalBatchSampler(SAMPLES, BATCH, micro_batch, shuffle=False)
    run = run or EpochRun()
    sampler.set_position(epoch, run.start_step)
    loader = train_loader(TensorDataset(*(data or pairs())), sampler, 0, CPU)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    others["options"] = StepOptions(accumulate=sampler.parts_per_step, **others.get("options", {}))
    return train_one_epoch(net, optimizer, loader, CPU, epoch, scheduler, 99, run=run, **others)


def plainly(net, rates=(LR, LR, LR), clip=lambda parameters: None):
    """Losses of the same steps as every tutorial takes them."""
    net.train()
    losses = []
    batches = zip(*(each.split(BATCH) for each in pairs()), strict=True)
    for rate, (images, target) in zip(rates, batches, strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        loss = criterion(net(images), target)
        loss.backward()
        clip(list(net.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same(net, other, tolerance=1e-6):
    for (name, value), expected in zip(
        net.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert (value - expected).abs().max() <= tolerance, name


def test_an_epoch_is_that_of_a_plain_loop():
    net, other = make_net(), make_net().eval()
    loss, rate = train(net.eval())  # the loop itself takes care of the mode
    first, second, last = plainly(other)
    assert_same(net, other)
    assert loss == pytest.approx((4 * first + 4 * second + 2 * last) / 10)
    assert rate == LR


def test_the_schedule_steps_after_every_step():
    net, other = make_net(), make_net()
    _, rate = train(net, schedule=lambda step: 0.5**step)
    plainly(other, rates=(LR, LR / 2, LR / 4))
    assert_same(net, other)
    assert rate == pytest.approx(LR / 4)  # that of the last step


@pytest.mark.parametrize("clip", [{"clip_norm": 0.05}, {"clip_value": 0.02}])
def test_gradients_are_clipped_as_torch_does(clip):
    net, other = make_net(), make_net()
    train(net, options=clip)
    if "clip_norm" in clip:
        plainly(other, clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05))
    else:
        plainly(other, clip=lambda parameters: nn.utils.clip_grad_value_(parameters, 0.02))
    assert_same(net, other)
    free = make_net()
    plainly(free)
    with pytest.raises(AssertionError):
        assert_same(net, free, tolerance=1e-4)


def test_a_scaled_loss_is_unscaled_before_it_is_clipped():
    net, other = make_net(), make_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = {"clip_norm": 0.05, "amp_dtype": torch.bfloat16}
    train(net, options=options, scaler=scaler)
    plainly(other, clip=lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05))
    assert_same(net, other, tolerance=1e-2)
    start = make_net().conv.weight
    moved = (other.conv.weight - start).norm()
    assert (net.conv.weight - other.conv.weight).norm() < 0.1 * moved


class Linear(nn.Module):
    """Without batch norm, so that parts of a batch are a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_parts_of_a_step_are_one_step(micro_batch, capsys):
    net, other = Linear(), Linear()
    loss, _ = train(net, micro_batch=micro_batch)
    first, second, last = plainly(other)
    assert_same(net, other)
    assert loss == pytest.approx((4 * first + 4 * second + 2 * last) / 10, rel=1e-5)
    assert "[3/3]" in capsys.readouterr().out  # steps, not parts


def test_progress_counts_steps_and_images_and_a_stop_ends_the_epoch():
    seen = []

    def note(progress):
        seen.append((progress.epoch, progress.step, progress.logger.images, progress.stop))

    net, other = make_net(), make_net()
    train(net, epoch=5, run=Noting(note, stops=lambda: len(seen) == 1))
    assert seen == [(5, 1, 4, False), (5, 2, 8, True)]
    for images, target in [*zip(*(each.split(BATCH) for each in pairs()), strict=True)][:2]:
        other.train()
        optimizer = torch.optim.SGD(other.parameters(), lr=LR)
        criterion(other(images), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(net, other)


@pytest.mark.parametrize("mean", [torch.mean, lambda x: x.sum() / 0], ids=["finite", "0/0"])
def test_a_step_in_which_nothing_counts_changes_nothing(mean):
    def losses(models, batch):
        return {"loss": mean(models["model"](batch[0]))}

    net = Linear()
    before = copy.deepcopy(net)
    loss, _ = train(net, losses=losses, weight=lambda batch: 0.0)
    assert loss == 0
    assert_same(net, before, tolerance=0)


def squares(models, batch):
    """Means over images, and one over valid pixels: those whose target is above a half."""
    outputs, target = models["model"](batch[0]), batch[1]
    valid = target > 0.5
    errors = (outputs - target).square()
    return {
        "all": errors.mean(),
        "valid": (errors * valid).sum() / valid.sum(),
        "shown": outputs.mean().detach(),
        "number": outputs.mean().item(),
    }


def valid_pixels(batch):
    return {"valid": float((batch[1] > 0.5).sum())}


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_means_over_parts_are_weighed_by_what_they_are_over(micro_batch):
    """Losses and values that are only logged, in parts of unlike size of which one has nothing."""
    images, target = pairs()
    target[1] = 0.25
    runs = []
    for micro in (None, micro_batch):
        net, run = Linear(), EpochRun()
        loss, _ = train(
            net,
            micro_batch=micro,
            data=(images, target),
            losses=squares,
            weight=valid_pixels,
            run=run,
        )
        runs.append((net, mean_losses(run.logger)))
        assert loss == mean_losses(run.logger)["loss"]
    (net, logged), (parted, logged_of_parts) = runs
    assert_same(net, parted)
    assert list(logged) == ["loss", "all", "valid", "shown", "number"]
    assert logged["number"] == pytest.approx(logged["shown"], rel=1e-5)
    assert logged == pytest.approx(logged_of_parts, rel=1e-5)
    assert logged["loss"] == pytest.approx(logged["all"] + logged["valid"], rel=1e-5)


def test_a_single_loss_is_logged_as_loss_whatever_its_name():
    run = EpochRun()
    train(Linear(), losses=lambda models, batch: {"mse": models["model"](batch[0]).mean()}, run=run)
    assert list(mean_losses(run.logger)) == ["loss"]


def test_losses_without_a_gradient_are_refused():
    def losses(models, batch):
        return {"mse": models["model"](batch[0]).mean().detach()}

    with pytest.raises(UserError, match=r"no loss has a gradient \(mse\)"):
        train(Linear(), losses=losses)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_value_that_is_only_logged_is_no_reason_to_lower_the_rate(mode, scaled):
    def losses(models, batch):
        loss = models["model"](batch[0]).square().mean()
        return {"loss": loss, "shown": loss.detach() / 0}

    net, other = Linear(), Linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if scaled else None
    with pytest.raises(UserError, match=r"shown became NaN.*only logged.*nan_to_num") as caught:
        train(net, losses=losses, options={"on_nonfinite": mode}, scaler=scaler)
    assert "--lr" not in str(caught.value)
    with pytest.raises(AssertionError):  # no step is skipped for it
        assert_same(net, other)


def test_a_loss_that_is_infinite_by_itself_stops_though_its_gradients_are_not():
    def losses(models, batch):
        return {"loss": models["model"](batch[0]).mean() + float("inf")}

    net = Linear()
    with pytest.raises(UserError, match=r"step 1 of 3: loss on rank 0"):
        train(net, losses=losses)
    assert_same(net, Linear(), tolerance=0)


def test_the_average_passes_over_steps_that_are_skipped():
    images, target = pairs()
    images[5] = float("nan")  # in the second step
    net = make_net()
    average = ExponentialMovingAverage(net, 0.9)
    # Gradients are not finite in the second step: taken, it would spoil the weights for good.
    loss, _ = train(
        net,
        data=(images, target),
        options={"ema": {"model": average}, "on_nonfinite": "skip"},
    )
    assert average.steps == 2 and loss == loss
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert net.norm.num_batches_tracked == 2


def test_losses_of_several_networks_and_their_rates():
    def losses(models, batch):
        for name, factor in (("first", 1), ("second", 3)):
            assert all(p.grad is None for p in models["second"].parameters())
            yield name, {name: factor * models[name](batch[0]).square().mean()}
            assert all(p.grad is not None for p in models[name].parameters())

    nets = {"first": Linear(), "second": Linear()}
    optimizers = {
        name: torch.optim.SGD(net.parameters(), lr=rate)
        for (name, net), rate in zip(nets.items(), (0.1, 0.01), strict=True)
    }
    loader = train_loader(TensorDataset(*pairs()), GlobalBatchSampler(SAMPLES, SAMPLES), 0, CPU)
    expected = Linear()(pairs()[0]).square().mean().item()
    run = EpochRun()
    loss, rate = train_one_epoch(nets, optimizers, loader, CPU, 0, None, losses=losses, run=run)
    assert (loss, rate) == (pytest.approx(expected), 0.1)
    assert mean_losses(run.logger) == pytest.approx({"loss": expected, "second": 3 * expected})
    assert run.logger.read["lr_second"].value == 0.01


class Drawing(Linear):
    """Notes what dropout would draw."""

    def forward(self, x):
        self.drawn.append(torch.rand(()).item())
        return super().forward(x)


def draws(seed, epoch, start_step=0):
    net = Drawing()
    net.drawn = []
    train(net, epoch=epoch, run=EpochRun(start_step=start_step), options={"seed": seed})
    return net.drawn


def test_dropout_is_drawn_by_seed_epoch_and_step_also_after_a_restart():
    whole = draws(7, epoch=2)
    assert len(set(whole)) == 3
    assert draws(7, epoch=2, start_step=1) == whole[1:]
    others = [*draws(7, epoch=1), *draws(8, epoch=2)]
    assert not set(whole) & set(others)


def test_four_frames_lie_between_a_script_and_the_backward_pass(monkeypatch):
    backward, between = torch.Tensor.backward, []

    def noted(loss):
        stack = [frame.name for frame in traceback.extract_stack()]
        between.append(stack[stack.index("train_one_epoch") : -1])
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", noted)
    train(make_net())
    assert len(between[0]) <= 4, between[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda loss: {"mine": loss[None]}, r"'mine' has the shape \[1\]\. Give its mean"),
        (lambda loss: {"mine": loss, "more": [loss]}, r"'more' is a list"),
        (lambda loss: {"mine": None}, r"'mine' is a NoneType"),
        (lambda loss: {"loss": loss, "mine": loss}, r"'loss' is a column of the log already"),
        (lambda loss: {"mine": loss, "lr": 0.5}, r"'lr' is a column of the log already"),
        (lambda loss: loss, r"Return a dict of means by name"),
    ],
)
def test_what_is_no_dict_of_single_numbers_is_refused_by_name(given, message):
    def losses(models, batch):
        return given(models["model"](batch[0]).square().mean())

    with pytest.raises(UserError, match=message):
        train(make_net(), losses=losses)
