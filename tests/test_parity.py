"""The number of processes changes the time, not the training: gradients, weights, averages.

Every task trains on the embedded data by its own step, losses, optimizers and the common loop, on
2, 3 and 4 processes and on one, with the same global batch. A step has four samples, the last one
of an epoch a single one, so that some processes have none. Two processes take their shares in two
parts. Segmentation masks ignore shares of different size, one of them everything; the unknown
regions of matting differ in size.

What is compared, relative and in norm (see `error`):

* Gradients at the same weights, of whole and of short batches: 1e-12 in fp64, 1e-5 in fp32.
* Weights, statistics and averages after 20 clipped steps of SGD with momentum: the same bounds,
  in fp32 on four processes only, which have the most empty shares. Batch norm adds up over gloo
  four times a layer and step, which takes most of the time; so on three and four processes, where
  a sum takes the longest, only two layers of it are left here.
* These under the recipe's own optimizer: 1e-12 in fp64, or ten times as far apart as two runs of
  one process that start from weights whose last bits differ. Adam divides a gradient by its own
  size, so that one which is mere rounding becomes a step like any other.

Batch norm over all processes is compared in fp64, every layer of it in the gradients and, on two
processes, in the weights. It sums in another order, and in fp32 that tips some ReLU or maximum
which stands on the edge: gradients then change by 1e-4 and more, as they do in one process when the
weights' last bits change. So in fp32 each image is normalised by itself.

Not promised: dropout (pix2pix), whose masks are drawn by each process for its own images.
"""

import hashlib
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import on_ranks
from torch import nn
from torch.utils.data import Dataset

import tasks
from src.backbones import vgg_stages
from src.u2net import RSU4, RSU4F, U2Net
from train_utils import train_one_epoch
from train_utils.collectives import get_rank, get_world_size
from train_utils.config import load_yaml
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.ema import ExponentialMovingAverage
from train_utils.setup import place_models, wrap_models
from train_utils.sync_batchnorm import SyncBatchNorm2d, convert_sync_batchnorm
from train_utils.train_and_eval import StepOptions, to_device
from transforms import IGNORE

pytestmark = pytest.mark.xdist_group("parity")  # what the tests share is made once

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
SAMPLES, GLOBAL_BATCH, EPOCHS = 13, 4, 5  # 20 steps: 4, 4, 4 and 1 samples, five times
WORLDS = (2, 3, 4)
# Images of a part of the step, on each of so many processes and on one alone; else all at once.
MICRO_BATCH = {2: 1}
MICRO_BATCH_ALONE = {2: 2}
CLIP_NORM, CLIP_VALUE = 0.1, 0.02
ALL, FEW, NONE = 999, 2, 0  # batch norms that stay, and are synchronised

Tensors = dict[str, np.ndarray]

CASES = {
    "shapes": {"data": {"image_size": 20}},
    "fcn": {"data": {"image_size": 32}, "model": {"channels": 4}},
    "unet": {
        "data": {"image_size": 32},
        "model": {"channels": 4},
        "loss": {"terms": ["ce", "focal", "dice"], "class_weights": [0.5, 1, 2, 1, 1.5, 1]},
    },
    "matting": {"data": {"image_size": 64, "crop_sizes": [64]}, "model": {"channels": 4}},
    "pix2pix": {
        "data": {"image_size": 32},
        "model": {"channels": 8, "levels": 4, "d_channels": 8, "dropout": 0.0, "norm": "batch"},
    },
}


def read_case(name, optim):
    """Task and config of a case; optim: the settings of all optimizers, None for the recipe's."""
    values = {part: dict(settings) for part, settings in CASES[name].items()}
    values["data"]["train_size"] = SAMPLES
    values["train"] = {"epochs": EPOCHS}
    if optim:
        values |= dict.fromkeys(("optim", "optim_d") if name == "pix2pix" else ("optim",), optim)
    task = tasks.read_config(load_yaml(CONFIGS / f"{name}.yaml"), name, values)
    return task, task.cfg


@cache  # drawing the scenes takes as long as training on them
def training_set(name, all_ignored):
    task, cfg = read_case(name, None)
    dataset, _ = task.build_datasets()
    return Ignoring(dataset, all_ignored) if cfg.task == "segmentation" else dataset


class Ignoring(Dataset):
    """Segmentation pairs whose masks ignore rows, none to most of them, and one mask all."""

    def __init__(self, dataset, all_of):
        self.dataset, self.all_of = dataset, all_of

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, mask = self.dataset[index]
        mask = mask.clone()
        rows = mask.shape[-2] if index == self.all_of else 7 * (index % 4)
        mask[..., :rows, :] = IGNORE
        return image, mask


def narrow_u2net():
    """A U²-Net of both kinds of blocks, but narrow, and not too deep for small images."""
    encoder = {1: (RSU4, 3, 4, 8), 2: (RSU4F, 8, 4, 8)}
    return U2Net(encoder, {1: (RSU4, 16, 4, 8)}, 1)


def build_networks(name, task, cfg, dtype, norms, nudge, seed):
    """The case's networks with `norms` batch norms left, the others being norms of each image.

    nudge: a seed by which every weight moves to one of its two neighbours, or None.
    """
    torch.manual_seed(seed)
    networks = task.build_models()
    if name == "shapes":
        networks = {"model": narrow_u2net()}
    task.initialise(networks)
    for network in networks.values():
        keep_norms(network, norms)
        network.to(dtype)
        # Images and targets are made for fp32; what a network computes then is in `dtype`.
        network.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
        if nudge is not None:
            torch.manual_seed(nudge)
            with torch.no_grad():
                for weight in network.parameters():
                    weight.copy_(torch.nextafter(weight, torch.randn_like(weight).sign() * 9e9))
    return networks


def keep_norms(network, left):
    """Replace all batch norms but the first `left` by norms of each image; returns what is left."""
    for name, child in network.named_children():
        if type(child) is not nn.BatchNorm2d:
            left = keep_norms(child, left)
        elif left:
            left -= 1
        else:
            setattr(network, name, nn.GroupNorm(1, child.num_features))
    return left


class Training:
    """A case on the present process group, at its start."""

    def __init__(
        self, name, dtype, norms, optim, micro, nudge=None, seed=0, sync=True, own_counts=False
    ):
        self.task, self.cfg = read_case(name, optim)
        networks = build_networks(name, self.task, self.cfg, dtype, norms, nudge, seed)
        self.networks = place_models(networks, CPU, sync_bn=sync)
        self.models = wrap_models(self.networks, CPU, compile=False)
        sampler = GlobalBatchSampler(
            SAMPLES, GLOBAL_BATCH, micro, get_rank(), get_world_size(), seed=5
        )
        dataset = training_set(name, all_ignored=sampler.order(0)[1])
        self.sampler, self.loader = sampler, train_loader(dataset, sampler, 0, CPU)
        self.optimizers = self.task.build_optimizers(self.networks)
        self.schedules = self.task.build_schedulers(self.optimizers, sampler.steps_per_epoch)
        self.own_counts = own_counts

    def run(self, epochs, **options):
        for epoch in range(epochs):
            self.sampler.set_position(epoch)
            train_one_epoch(
                self.models,
                self.optimizers,
                self.loader,
                CPU,
                epoch,
                self.schedules,
                print_freq=99,
                losses=self.task.losses,
                weight=self.weight,
                options=StepOptions(accumulate=self.sampler.parts_per_step, **options),
            )

    def weight(self, batch):
        # The usual mean over a process's own samples, however many they are: that of their mean.
        return float(len(batch[0]) > 0) if self.own_counts else self.task.weight(batch)


SGD = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "schedule": "constant", "weight_decay": 1e-3}


def gradients(name, dtype, norms, optim, micro, **options) -> Tensors:
    """The gradients of every step of an epoch, none of which moves a weight."""
    training = Training(name, dtype, norms, optim, micro, **options)
    found: Tensors = {}

    def collect(network):
        steps = count()

        def take(*_):
            step = next(steps)
            for name, parameter in training.networks[network].named_parameters():
                found[f"{network} {step} {name}"] = as_array(parameter.grad)
                parameter.grad = None

        return take

    for network, optimizer in training.optimizers.items():
        optimizer.register_step_pre_hook(collect(network))
    training.run(epochs=1)
    return found


def weights(name, dtype, norms, optim, micro, **options) -> Tensors:
    """Weights, statistics and their moving averages after 20 clipped steps."""
    training = Training(name, dtype, norms, optim, micro, **options)
    averages = {n: ExponentialMovingAverage(net, 0.9) for n, net in training.networks.items()}
    training.run(EPOCHS, clip_norm=CLIP_NORM, clip_value=CLIP_VALUE, ema=averages)
    found = {}
    for network, model in training.networks.items():
        for kind, module in (("model", model), ("average", averages[network].module)):
            for key, value in module.state_dict().items():
                found[f"{network} {kind} {key}"] = as_array(value)
    return found


def as_array(tensor):
    return tensor.detach().double().numpy().copy()


def digest(tensors):
    return hashlib.sha256(b"".join(tensors[key].tobytes() for key in sorted(tensors))).hexdigest()


# -- what is compared -----------------------------------------------------------------------------

FP64, FP32 = torch.float64, torch.float32
# what → (function, dtype, batch norms that are left, settings of the optimizer)
QUANTITIES = {
    "gradients, fp64": (gradients, FP64, ALL, SGD),
    "gradients, fp32": (gradients, FP32, NONE, SGD),
    "weights, fp64": (weights, FP64, ALL, SGD),
    "weights, two norms, fp64": (weights, FP64, FEW, SGD),
    "weights, fp32": (weights, FP32, NONE, SGD),
    "recipe's weights, fp64": (weights, FP64, FEW, None),
    "recipe's weights, fp32": (weights, FP32, FEW, None),
}
# First weights of other seeds than 0, with which some ReLU or maximum stands on the edge in fp32:
# where it falls depends on the processor's instructions (see `test_no_gradient_stands_on_an_edge`).
SEEDS = {("unet", "gradients, fp32"): 3, ("matting", "gradients, fp32"): 1}
ADAPTIVE = ("shapes", "matting", "pix2pix")  # whose recipes have AdamW, Adam, and two Adams
DEFECTS = {"sync": False, "own_counts": True}


def jobs(world):
    """The (case, quantity, defect or None) that are computed on so many processes."""
    of_weights = "weights, fp64" if world == 2 else "weights, two norms, fp64"
    common = ["gradients, fp64", "gradients, fp32", of_weights]
    work = [(name, what, None) for name in CASES for what in common]
    if world == 2:
        work += [(name, "recipe's weights, fp64", None) for name in ADAPTIVE]
        work += [("matting", "recipe's weights, fp32", None)]
    if world == 3:
        work += [("unet", "gradients, fp64", defect) for defect in DEFECTS]
    if world == 4:
        work += [(name, "weights, fp32", None) for name in CASES]
    return work


def compute(name, what, micro, **options):
    function, dtype, norms, optim = QUANTITIES[what]
    seed = SEEDS.get((name, what), 0)
    return function(name, dtype, norms, optim, micro, seed=seed, **options)


def all_jobs():
    """The results of all jobs on the present processes: arrays of rank 0, hashes of the others."""
    world, found = get_world_size(), {}
    for name, what, defect in jobs(world):
        options = {defect: DEFECTS[defect]} if defect else {}
        found[name, what, defect] = compute(name, what, MICRO_BATCH.get(world), **options)
    return found if get_rank() == 0 else {job: digest(result) for job, result in found.items()}


@cache
def on_processes(world):
    return on_ranks(world, all_jobs)


@cache
def alone(name, what, micro=None, nudge=None):
    return compute(name, what, micro, nudge=nudge)


def error(found: Tensors, expected: Tensors) -> float:
    """The largest ‖found − expected‖ of a tensor, as a share of ‖expected‖.

    For tensors that are small beside all others together, as a share of a tenth of their norm:
    biases before a batch norm have no gradient but rounding.
    """
    assert found.keys() == expected.keys()
    whole = np.sqrt(sum(np.square(tensor).sum() for tensor in expected.values()))
    return max(
        np.linalg.norm(found[key] - tensor) / max(np.linalg.norm(tensor), whole / 10)
        for key, tensor in expected.items()
    )


def distance(world, name, what, defect=None):
    """How far so many processes are from one."""
    found = on_processes(world)[0][name, what, defect]
    return error(found, alone(name, what, MICRO_BATCH_ALONE.get(world)))


def drift(name, what, micro):
    """How far runs of one process move apart for the last bits of their first weights."""
    straight = alone(name, what, micro)
    return max(error(alone(name, what, micro, nudge), straight) for nudge in (1, 2))


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_stands_on_an_edge(name):
    """What the bound in fp32 takes for granted; other seeds would fail, processes or not."""
    assert drift(name, "gradients, fp32", None) <= BOUNDS[FP32] / 3


def under_sgd(world):
    return [job for job in jobs(world) if "recipe" not in job[1] and not job[2]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "name", "what"),
    [(world, name, what) for world in WORLDS for name, what, _ in under_sgd(world)],
)
def test_any_number_of_processes_trains_the_same(world, name, what):
    assert distance(world, name, what) <= BOUNDS[QUANTITIES[what][1]]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_all_processes_hold_the_same_bits(world):
    first, *others = on_processes(world)
    for job, result in first.items():
        if "sync" not in job:  # processes with statistics of their own differ in these
            assert {other[job] for other in others} == {digest(result)}, job


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_recipes_own_optimizer(name):
    what = "recipe's weights, fp64"
    apart = distance(2, name, what)
    assert apart <= BOUNDS[FP64] or apart <= 10 * drift(name, what, MICRO_BATCH_ALONE[2])


@pytest.mark.slow
def test_processes_part_no_further_than_last_bits_do():
    """Matting with Adam in fp32: 20 steps make percents of a last bit, processes or not."""
    what = "recipe's weights, fp32"
    control = drift("matting", what, MICRO_BATCH_ALONE[2])
    assert control > 1e-3
    assert distance(2, "matting", what) <= 10 * control


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_bounds_would_show(defect):
    """Batch norm of a process's own images; losses averaged over them, then over processes."""
    assert distance(3, "unet", "gradients, fp64", defect) > 0.1


def test_clipping_has_something_to_clip():
    found = alone("shapes", "gradients, fp32")
    first = [gradient for key, gradient in found.items() if key.startswith("model 0 ")]
    assert max(np.abs(gradient).max() for gradient in first) > CLIP_VALUE
    clipped = [gradient.clip(-CLIP_VALUE, CLIP_VALUE) for gradient in first]
    assert sum(np.square(gradient).sum() for gradient in clipped) > CLIP_NORM**2


def test_the_parts_of_a_step_change_nothing_where_images_are_normalised_alone():
    what = "gradients, fp32"
    assert error(alone("unet", what, 1), alone("unet", what)) <= BOUNDS[FP32]


# -- batch norm and averages ----------------------------------------------------------------------


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


@pytest.mark.slow
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
    net = convert_sync_batchnorm(nn.Sequential(stages, nn.BatchNorm2d(3)))
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
    norm = nn.BatchNorm2d(1)
    ema = ExponentialMovingAverage(norm, decay=0.5)
    norm(torch.full((2, 1, 1, 1), 5.0))
    ema.update(norm)
    assert ema.module.running_mean.item() == norm.running_mean.item() == pytest.approx(0.5)


def test_to_device_keeps_the_structure_of_a_batch():
    batch = (torch.zeros(1), {"a": torch.ones(1)}, [torch.ones(2)])
    moved = to_device(batch, CPU)
    assert len(moved) == 3
    assert moved[1]["a"].item() == 1
    assert len(moved[2]) == 1
