"""The number of processes changes the time, not the training: gradients, weights, batch norm."""

import pytest
import torch
from distributed import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from src import u2net_lite
from src.backbones import vgg_stages
from train_utils import create_lr_scheduler, get_params_groups, train_one_epoch
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.distributed_utils import get_rank, get_world_size
from train_utils.ema import ExponentialMovingAverage
from train_utils.sync_batchnorm import SyncBatchNorm2d, convert_sync_batchnorm
from train_utils.train_and_eval import StepOptions, to_device

CPU = torch.device("cpu")
SAMPLES, GLOBAL_BATCH, EPOCHS = 13, 6, 4  # three steps an epoch, the last of one sample


class Net(nn.Module):
    """A small network with batch norm that gives two deeply supervised outputs when training."""

    def __init__(self) -> None:
        super().__init__()
        # No bias before batch norm: its gradient is pure rounding noise, which Adam blows up.
        conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.BatchNorm2d(6), nn.Tanh())
        self.head = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        logits = self.head(self.body(x))
        return [logits, logits * 0.5] if self.training else torch.sigmoid(logits)


def train(dtype, clip_norm=None, network=Net, size=8):
    """Weights after four epochs on the present process group, as lists."""
    torch.manual_seed(0)
    world = get_world_size()
    net = convert_sync_batchnorm(network(), CPU).to(dtype)
    images = torch.randn(SAMPLES, 3, size, size, dtype=dtype)
    masks = (torch.rand(SAMPLES, 1, size, size) > 0.6).to(dtype)
    sampler = GlobalBatchSampler(SAMPLES, GLOBAL_BATCH, None, get_rank(), world, seed=5)
    loader = train_loader(TensorDataset(images, masks), sampler, 0, CPU)
    optimizer = torch.optim.AdamW(get_params_groups(net, 1e-2), lr=1e-2)
    schedule = create_lr_scheduler(optimizer, sampler.steps_per_epoch, EPOCHS)
    ema = {"model": ExponentialMovingAverage(net, 0.9)}
    model = DistributedDataParallel(net) if world > 1 else net
    options = StepOptions(clip_norm=clip_norm, ema=ema)
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_position(epoch)
        loss, _ = train_one_epoch(
            model, optimizer, loader, CPU, epoch, schedule, print_freq=99, options=options
        )
        losses.append(loss)
    states = [net.state_dict(), ema["model"].module.state_dict()]
    return losses, [value.double().flatten().tolist() for s in states for value in s.values()]


def flat(nested):
    return torch.tensor([number for values in nested for number in values], dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "world", "clip", "bound"),
    [
        (torch.float64, 2, None, 1e-12),
        pytest.param(torch.float64, 3, 0.05, 1e-12, marks=pytest.mark.slow),
        pytest.param(torch.float32, 2, None, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_processes_trains_the_same(dtype, world, clip, bound):
    losses, weights = train(dtype, clip)
    for other_losses, other in on_ranks(world, train, dtype, clip):
        assert torch.allclose(flat(other), flat(weights), rtol=bound, atol=bound)
        # Loss meters are fp32 on purpose; the epoch means must agree to that.
        assert other_losses == pytest.approx(losses, rel=1e-6)


@pytest.mark.slow
def test_u2net_trains_the_same_on_two_processes():
    """Twelve optimizer steps of the real network, the last of every epoch on a single image."""
    losses, weights = train(torch.float64, None, u2net_lite, 40)
    for other_losses, other in on_ranks(2, train, torch.float64, None, u2net_lite, 40):
        assert torch.allclose(flat(other), flat(weights), rtol=1e-8, atol=1e-8)
        assert other_losses == pytest.approx(losses, rel=1e-6)


def test_the_bounds_would_show_a_lost_sample(monkeypatch):
    _, weights = train(torch.float64)
    monkeypatch.setattr("test_parity.SAMPLES", SAMPLES - 1)
    _, fewer = train(torch.float64)
    assert (flat(weights) - flat(fewer)).abs().max() > 1e-4


def test_accumulation_equals_one_large_batch_without_batch_norm_statistics():
    """Micro-batches of 2 and 6 give the same gradients where nothing depends on the batch."""

    def run(micro):
        torch.manual_seed(1)
        net = nn.Conv2d(3, 1, 3, padding=1).double()
        data = TensorDataset(torch.randn(13, 3, 6, 6).double(), torch.rand(13, 1, 6, 6).double())
        sampler = GlobalBatchSampler(13, 6, micro)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        options = StepOptions(accumulate=sampler.parts_per_step)
        loader = train_loader(data, sampler, 0, CPU)
        train_one_epoch(net, optimizer, loader, CPU, 0, None, 99, options=options)
        return net.weight.detach()

    assert torch.allclose(run(6), run(2), rtol=1e-12, atol=1e-14)


def _batch_norm(shares):
    torch.manual_seed(2)
    data = torch.randn(7, 4, 3, 5, dtype=torch.float64) * 3 + 1
    start = sum(shares[: get_rank()])
    part = data[start : start + shares[get_rank()]].requires_grad_()
    norm = SyncBatchNorm2d(4).double()
    output = norm(part)
    (output.square() * torch.arange(1, 5).view(1, 4, 1, 1)).sum().backward()
    tensors = (output, part.grad, norm.running_mean, norm.running_var)
    return [tensor.detach().flatten().tolist() for tensor in tensors]


@pytest.mark.parametrize("shares", [(4, 3), (5, 2, 0)])
def test_sync_batch_norm_equals_one_process(shares):
    whole, *ranks = _batch_norm((7,)), *on_ranks(len(shares), _batch_norm, shares)
    for item in (0, 1):  # outputs and input gradients: the shares put together
        joined = [number for rank in ranks for number in rank[item]]
        assert joined == pytest.approx(whole[item], rel=1e-12, abs=1e-12)
    for item in (2, 3):  # running statistics: the same everywhere
        for rank in ranks:
            assert rank[item] == pytest.approx(whole[item], rel=1e-12)


def test_frozen_batch_norm_stays_frozen_when_it_is_synchronised():
    stages = vgg_stages(2, batch_norm=True)
    stages.freeze()
    net = convert_sync_batchnorm(nn.Sequential(stages, nn.BatchNorm2d(3)), CPU)
    synced = [m for m in net.modules() if isinstance(m, SyncBatchNorm2d)]
    assert len(synced) == 14
    assert [m.training for m in synced] == [False] * 13 + [True]
    assert [p.requires_grad for p in net.parameters()] == [False] * (4 * 13) + [True, True]


def test_ema_by_hand():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    ema = ExponentialMovingAverage(net, decay=0.5)
    nn.init.constant_(net.weight, 3.0)
    ema.update(net)  # decay (1+1)/(10+1)
    assert ema.module.weight.item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    ema.steps = 1000
    ema.update(net)
    assert ema.module.weight.item() == pytest.approx((1 * 2 / 11 + 3 * 9 / 11) / 2 + 1.5)
    assert not ema.module.weight.requires_grad


def test_to_device_keeps_the_structure_of_a_batch():
    batch = (torch.zeros(1), {"a": torch.ones(1)}, [torch.ones(2)])
    moved = to_device(batch, CPU)
    assert len(moved) == 3
    assert moved[1]["a"].item() == 1
    assert len(moved[2]) == 1
