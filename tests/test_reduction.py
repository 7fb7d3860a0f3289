"""What processes exchange: how often, how much, and how gradients are summed."""

import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from train_utils import evaluate, train_one_epoch
from train_utils.activity import set_activity
from train_utils.collectives import get_rank, sum_over_ranks
from train_utils.metric_logger import MetricLogger
from train_utils.metrics import MeanAbsoluteError
from train_utils.setup import wrap_models
from train_utils.train_and_eval import EpochRun, StepOptions
from train_utils.watch import Watch

CPU = torch.device("cpu")
COLLECTIVES = (
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "recv",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
)


def record_collectives():
    """A list to which every collective of this process adds its name and the bytes it carries."""
    called = []

    def recorded(name):
        function = getattr(dist, name)

        def call(*args, **options):
            data = args[0] if args else None
            called.append((name, data.nbytes if isinstance(data, torch.Tensor) else None))
            return function(*args, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, recorded(name))
    return called


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return torch.sigmoid(self.norm(images).mean(dim=1, keepdim=True))


def _collectives_by_meters(*counts):
    """What an epoch of 6 steps, a line every 3, and an evaluation call, by numbers of meters."""
    called = record_collectives()
    return [_collectives(meters, called) for meters in counts]


def _collectives(meters, called):
    models = wrap_models({"model": Scale()}, CPU, compile=False)
    optimizer = torch.optim.SGD(models["model"].parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    batch = (torch.rand(2, 3, 8, 8), torch.rand(2, 1, 8, 8))

    def losses(models, batch):
        loss = (models["model"](batch[0]) - batch[1]).square().mean()
        return {"loss": loss, **{f"loss_{i}": loss.detach() for i in range(1, meters)}}

    called.clear()
    train_one_epoch(models, optimizer, [batch] * 6, CPU, 0, schedule, 3, losses=losses)
    training = called[:]
    called.clear()
    metrics = [MeanAbsoluteError() for _ in range(meters)]
    evaluate(
        models,
        [batch],
        CPU,
        metrics=metrics,
        predict=lambda models, images: models["model"](images),
        stop_requested=lambda: False,
    )
    return training, called[:]


@pytest.mark.slow  # processes
def test_one_collective_per_step_line_and_evaluation_for_any_number_of_meters():
    """None more, that is; and one more for each type of the buffers that evaluation takes over."""
    for few, many in on_ranks(2, _collectives_by_meters, 2, 30):
        (training, evaluation), steps, lines, dtypes = few, 6, 3, 2
        assert 0 < len(training) <= steps + lines
        assert 0 < len(evaluation) <= 1 + dtypes
        assert [len(part) for part in many] == [len(training), len(evaluation)]
        # Each meter is three or fewer numbers of 8 bytes more in a line, and in an evaluation.
        assert carried(many[0]) - carried(training) <= lines * 28 * 3 * 8
        assert carried(many[1]) - carried(evaluation) <= 28 * 3 * 8


def carried(called):
    return sum(size for _, size in called)


def _sum_and_its_collectives():
    called = record_collectives()
    return sum_over_ranks([2.0 ** get_rank(), 0.1]), len(called)


@pytest.mark.slow  # processes
@pytest.mark.parametrize(
    ("world", "expected"),
    [(2, [1.0 + 2, 0.1 + 0.1]), (4, [1.0 + 2 + 4 + 8, 0.1 + 0.1 + 0.1 + 0.1])],
)
def test_a_few_numbers_are_added_up_in_two_collectives_at_most(world, expected):
    for found, collectives in on_ranks(world, _sum_and_its_collectives):
        assert found == expected
        assert collectives <= 2


class Factor(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return self.factor * images


def _epoch_of_two_part_steps(**options):
    """What three steps come to on this rank.

    Sums of gradients, random numbers by part, skipped images, the last weight, the first loss.
    """
    models = wrap_models({"model": Factor()}, CPU, compile=False)
    sums, drawn = [], []

    def counted(group, bucket):
        sums.append(1)
        return allreduce_hook(group, bucket)

    models["model"].register_comm_hook(None, counted)

    def losses(models, batch):
        drawn.append(torch.rand(()).item())
        # In the second step, on the second process only.
        spoilt = len(drawn) in (3, 4) and get_rank() == 1 and "on_nonfinite" in options
        loss = models["model"](batch[0]).square().mean()
        return {"loss": loss * (float("inf") if spoilt else 1)}

    optimizer = torch.optim.SGD(models["model"].parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    scaler = torch.amp.GradScaler("cpu") if options else None
    run = EpochRun()
    train_one_epoch(
        models,
        optimizer,
        [(torch.full((2, 1, 4, 4), 1.0 + get_rank()),)] * 6,
        CPU,
        0,
        schedule,
        scaler=scaler,
        losses=losses,
        options=StepOptions(accumulate=2, seed=7, **options),
        run=run,
    )
    skipped = run.logger.meters["skipped"].total if options else 0
    first_loss = run.logger.meters["loss"].window[0]
    return len(sums), drawn, skipped, models["model"].module.factor.item(), first_loss


def _both_epochs():
    return _epoch_of_two_part_steps(), _epoch_of_two_part_steps(on_nonfinite="skip"), _mean()


def _mean():
    """The mean of 0, once, on rank 0 and of 1, three times, on rank 1."""
    logger = MetricLogger()
    logger.update(2 * get_rank() + 1, rank=get_rank())
    logger.synchronize_between_processes()
    return logger.rank.global_avg


@pytest.mark.slow  # processes
def test_processes_sum_gradients_once_a_step_draw_by_rank_skip_together_and_share_means():
    (first, skipping, mean), (second, skipping_too, same_mean) = on_ranks(2, _both_epochs)
    for sums, drawn, *_ in (first, second):
        assert sums == 3  # not one for each part
        assert len(set(drawn)) == 6
    assert not set(first[1]) & set(second[1])
    assert mean == same_mean == 0.75
    for _, _, skipped, factor, first_loss in (skipping, skipping_too):
        assert first_loss == (1 + 4) / 2
        assert skipped == 2 * 2 * 2  # one step of four images, on two processes
        assert factor == skipping[3]  # which nan is not


class CountingStore:
    def __init__(self):
        self.requests, self.bytes = 0, 0

    def set(self, key, value):
        self.requests += 1
        self.bytes += len(value)

    def check(self, keys):
        self.requests += 1
        return False


@pytest.mark.parametrize("world_size", [2, 512])
def test_a_look_of_the_watch_is_two_requests_to_the_store_for_any_number(world_size):
    store = CountingStore()
    set_activity("here")  # or the place of an earlier test, with details after so long a time
    watch = Watch(300, print, store=store, rank=1, world_size=world_size)
    for _ in range(2):
        watch.look()
    assert 0 < store.requests <= 2 * 2
    assert store.bytes < 2 * 500


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 500), nn.ReLU(), nn.Linear(500, 300), nn.Linear(300, 300))


def _gradients():
    """Of a 1.5 MB network on this rank's own data: alone, and summed in several ways."""
    inputs = torch.randn(16, 300, generator=torch.Generator().manual_seed(get_rank()))

    def gradients(network):
        network(inputs).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    alone = gradients(_network())
    both = [torch.empty_like(alone) for _ in range(2)]
    dist.all_gather(both, alone)
    exact = (both[0] + both[1]) / 2
    usual = gradients(DistributedDataParallel(_network()))
    ours = gradients(wrap_models({"model": _network()}, CPU, compile=False)["model"])
    return exact.equal(usual), exact.equal(ours)


@pytest.mark.slow  # processes
def test_gradients_are_summed_exactly():
    assert on_ranks(2, _gradients) == [(True, True)] * 2
