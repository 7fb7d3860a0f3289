"""The translation task: config, the two losses of a step, data-parallel training, rendering."""

import math
from pathlib import Path

import pytest
import torch
from distributed import on_ranks
from PIL import Image
from steps import take_step
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import tasks
from src import PatchDiscriminator, UNetGenerator
from tasks import translation
from tasks.translation.losses import l1_term, least_squares_gan
from tasks.translation.metrics import TranslationMetrics
from train_utils import train_one_epoch
from train_utils.collectives import get_rank, get_world_size
from train_utils.config import load_yaml
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.distributed_utils import unwrap
from train_utils.errors import UserError
from train_utils.settings import deciding_metric
from train_utils.sync_batchnorm import convert_sync_batchnorm
from train_utils.train_and_eval import Sample

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = {"channels": 4, "levels": 3, "d_channels": 4, "d_layers": 1}


def config(**sections):
    values = {"task": "translation", "data": {"image_size": 16}, "model": SMALL}
    return tasks.read_config(values, "test", sections).cfg


def shapes_config(**data):
    return config(data={"train_size": 3, "val_size": 2, **data})


# --- config -------------------------------------------------------------------------------------


def test_defaults_are_the_published_recipe():
    cfg = tasks.read_config({"task": "translation"}, "", {}).cfg
    assert (cfg.data.image_size, cfg.data.loaded, cfg.data.direction) == (256, 286, "AtoB")
    assert (cfg.model.channels, cfg.model.levels, cfg.model.d_layers) == (64, 8, 3)
    assert (cfg.model.norm, cfg.model.dropout, cfg.loss.l1_weight) == ("instance", 0.5, 100)
    for optim, schedule in ((cfg.optim, "halving"), (cfg.optim_d, "constant")):
        assert (optim.name, optim.lr, optim.betas) == ("adam", 1e-4, (0.5, 0.999))
        assert (optim.weight_decay, optim.schedule) == (0, schedule)
    assert cfg.optim.halve_epochs == 90


def test_the_facades_recipe():
    path = CONFIGS / "pix2pix_facades.yaml"
    task = tasks.read_config(load_yaml(path), str(path), {"data": {"root": "DIR"}})
    cfg = task.cfg
    assert type(task) is translation.Task
    assert (cfg.data.name, cfg.data.direction, cfg.data.loaded) == ("aligned", "BtoA", 286)
    assert (cfg.train.epochs, cfg.train.batch_size) == (200, 1)
    assert (cfg.train.keep_every, cfg.train.sample_interval, cfg.optim.halve_epochs) == (
        50,
        500,
        90,
    )
    assert deciding_metric(cfg, translation.Task.METRICS) == ("L1", "min")


def test_the_embedded_recipe_needs_no_data():
    path = CONFIGS / "pix2pix.yaml"
    cfg = tasks.read_config(load_yaml(path), str(path), {}).cfg
    assert (cfg.data.name, cfg.train.sample_interval) == ("shapes", 200)
    assert 2**cfg.model.levels == cfg.data.image_size == 64


def test_a_recipe_without_its_data_says_what_to_give():
    cfg = config(data={"name": "aligned"})
    with pytest.raises(UserError, match=r"data\.root: .*--data-path DIR.*--images A --masks B"):
        translation.Task(cfg).build_datasets()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"d_layers": 3}}, r"data\.image_size: must be at least 24 for 3"),
        ({"model": {"levels": 0}}, r"model\.levels: must be 1 to 14"),
        ({"model": {"dropout": 1.0}}, r"model\.dropout"),
        ({"data": {"load_size": 15}}, r"data\.load_size: must not be smaller than image_size"),
        ({"data": {"direction": "BtoC"}}, r"data\.direction"),
        ({"data": {"hflip": 1.5}}, r"data\.hflip"),
        ({"loss": {"l1_weight": -1.0}}, r"loss\.l1_weight: must not be negative"),
    ],
)
def test_bad_settings_are_refused(sections, message):
    with pytest.raises(UserError, match=message):
        config(**sections)


# --- losses -------------------------------------------------------------------------------------


def test_losses_by_hand():
    logits = torch.tensor([[0.0, 2.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    # Label 1: first image (1 + 1)/2, second 0; label 0: (0 + 4)/2 and 1.
    assert least_squares_gan(logits, 1.0).item() == 0.5
    assert least_squares_gan(logits, 0.0).item() == 1.5
    prediction, target = torch.zeros(2, 3, 1, 2), torch.ones(2, 3, 1, 2)
    target[1] = 0.5
    assert l1_term(prediction, target).item() == 0.75
    assert l1_term(prediction.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_l1_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="differ in shape"):
        l1_term(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 1, 1))


# --- step ---------------------------------------------------------------------------------------


class Scale(nn.Module):
    """Generator x → g·x."""

    def __init__(self, value):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x):
        return self.g * x


class Judge(nn.Module):
    """Discriminator (y, x) → d·y, a map of one channel."""

    def __init__(self, value):
        super().__init__()
        self.d = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, image, source):
        return self.d * image[:, :1]


def task(l1_weight=100.0):
    return translation.Task(config(loss={"l1_weight": l1_weight}))


def test_step_by_hand():
    """x = 1, y = −1, g = ½, d = 2, λ = 10: fake ½, judged 1; real judged −2."""
    models = {"generator": Scale(0.5), "discriminator": Judge(2.0)}
    source = torch.ones(1, 3, 2, 2, dtype=torch.float64)
    losses, gradients = take_step(task(10.0), models, (source, -source))
    assert list(losses) == ["loss", "GAN", "pixel", "D"]
    assert losses["GAN"] == 0  # (1 − 1)²
    assert losses["pixel"] == 1.5
    assert losses["loss"] == 15
    assert losses["D"] == 0.5 * (-2 - 1) ** 2 + 0.5 * 1**2
    # ∂/∂g: 2·(d·g − 1)·d + λ = 10; ∂/∂d: (−d − 1)·(−1) + d·g·g = 3 + 0.5
    assert gradients == {"generator.g": 10, "discriminator.d": 3.5}
    assert models["discriminator"].d.requires_grad


def test_images_travel_as_codes_and_are_scaled_to_tanh_range():
    seen = []

    class Spy(Scale):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    models = {"generator": Spy(1.0), "discriminator": Judge(0.0)}
    source = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    losses, _ = take_step(task(), models, (source, source))
    assert torch.allclose(seen[0].flatten(), torch.tensor([-1, -0.6, 1]))
    assert losses["pixel"] == 0


def networks(norm="instance"):
    torch.manual_seed(0)
    models = {
        "generator": UNetGenerator(channels=4, levels=3, norm=norm, dropout=0.0).double(),
        "discriminator": PatchDiscriminator(channels=4, layers=1, norm=norm).double(),
    }
    translation.Task(None).initialise(models)
    return models


def sgd(models):
    return {name: torch.optim.SGD(model.parameters(), lr=0.02) for name, model in models.items()}


def pairs(count):
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, 16, 16)
    return [torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1 for _ in "xy"]


def test_the_step_equals_the_usual_order():
    """G steps first, on D's old weights; then D, on the fake that G made before."""
    source, target = pairs(2)
    ours, usual = networks(), networks()
    batch = [(source, target)]
    train_one_epoch(ours, sgd(ours), batch, CPU, 0, None, losses=task().losses)

    g, d = usual["generator"], usual["discriminator"]
    optimizers = sgd(usual)
    fake = g(source)
    loss = (d(fake, source) - 1).square().mean() + 100 * (fake - target).abs().mean()
    loss.backward()
    optimizers["generator"].step()
    optimizers["discriminator"].zero_grad()  # G's loss left gradients in D
    judged = d(target, source), d(fake.detach(), source)
    ((judged[0] - 1).square().mean() / 2 + judged[1].square().mean() / 2).backward()
    optimizers["discriminator"].step()
    for name, network in ours.items():
        for mine, theirs in zip(network.parameters(), usual[name].parameters(), strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_an_empty_batch_trains_nothing(norm):
    models = networks(norm)
    batch = [images[:0] for images in pairs(1)]
    losses, gradients = take_step(task(), models, batch)
    assert all(value == 0 for value in losses.values())
    for name, gradient in gradients.items():
        assert gradient is not None and not gradient.any(), name


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_single_image_of_the_smallest_size_trains(norm):
    """`check_batches` has nothing to refuse: the 1×1 map is not normalised."""
    cfg = config(model={"levels": 4, "d_layers": 2, "norm": norm}, data={"image_size": 12})
    translation.Task(cfg).check_batches(1)
    models = translation.Task(cfg).build_models()
    batch = [torch.randint(256, (1, 3, 12, 12), dtype=torch.uint8) for _ in "xy"]
    losses, _ = take_step(translation.Task(cfg), models, batch)
    assert all(map(math.isfinite, losses.values()))


# --- several processes --------------------------------------------------------------------------

SAMPLES, GLOBAL_BATCH, EPOCHS = 7, 3, 2  # three steps an epoch: 2 + 1, 2 + 1 and 1 + 0 images


def train(norm, sync=False):
    """Weights of both networks after two epochs on the present process group, and the losses."""
    world = get_world_size()
    models = networks(norm)
    if sync:
        models = {name: convert_sync_batchnorm(model) for name, model in models.items()}
    optimizers = sgd(models)
    if world > 1:
        models = {
            name: DistributedDataParallel(model, broadcast_buffers=False)
            for name, model in models.items()
        }
    sampler = GlobalBatchSampler(SAMPLES, GLOBAL_BATCH, None, get_rank(), world, seed=5)
    loader = train_loader(TensorDataset(*pairs(SAMPLES)), sampler, 0, CPU)
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_position(epoch)
        loss, _ = train_one_epoch(
            models, optimizers, loader, CPU, epoch, None, 99, losses=task().losses
        )
        losses.append(loss)
    weights = [
        parameter.detach().flatten().tolist()
        for name in sorted(models)
        for parameter in unwrap(models[name]).parameters()
    ]
    return [value for values in weights for value in values], losses


def train_all():
    return [train("instance"), train("batch"), train("batch", sync=True)]


def difference(weights, others):
    return max(abs(a - b) for a, b in zip(weights, others, strict=True))


@pytest.mark.slow
def test_two_processes_train_both_networks_as_one_does():
    """Uneven shares and an empty one; batch norm meets two forward passes before one backward."""
    alone = train_all()
    first, second = on_ranks(2, train_all)
    for rank in (first, second):
        for case in (0, 2):  # instance norm, synchronised batch norm
            assert difference(rank[case][0], alone[case][0]) < 1e-12
            assert rank[case][1] == pytest.approx(alone[case][1], rel=1e-6)
    # Statistics of each process's own images make another training, the same on all processes.
    weights, losses = first[1]
    assert weights == second[1][0]
    assert difference(weights, alone[1][0]) > 1e-6
    assert all(math.isfinite(value) for value in weights + losses)


# --- data, evaluation, prediction ---------------------------------------------------------------


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_embedded_pairs(direction):
    cfg = shapes_config(direction=direction)
    train_set, val_set = translation.Task(cfg).build_datasets()
    assert (len(train_set), len(val_set)) == (3, 2)
    assert translation.Task(cfg).prepare_data(train_set, val_set) == {}
    assert translation.Task(cfg).prepare_data(None, val_set) == {}
    for source, target in (train_set[0], val_set[0]):
        assert source.shape == target.shape == (3, 16, 16)
    flat = val_set[0][1 if direction == "AtoB" else 0]
    assert len(flat.flatten(1).unique(dim=1).T) <= 9  # the colours of the label map


def test_prepare_data_refuses_what_cannot_be_halved(tmp_path):
    for part, width in (("train", 8), ("val", 9)):
        (tmp_path / part).mkdir()
        Image.new("RGB", (width, 4)).save(tmp_path / part / "x.png")
    cfg = config(data={"root": str(tmp_path)})
    train_set, val_set = translation.Task(cfg).build_datasets()
    with pytest.raises(UserError, match=r"x\.png: 9 pixels wide"):
        translation.Task(cfg).prepare_data(train_set, val_set)


def test_optimizers_of_both_networks():
    cfg = config(optim={"lr": 0.5, "halve_epochs": 2}, optim_d={"lr": 0.25})
    models = translation.Task(cfg).build_models()
    optimizers = translation.Task(cfg).build_optimizers(models)
    schedules = translation.Task(cfg).build_schedulers(optimizers, 3)
    assert set(optimizers) == set(schedules) == set(models) == {"generator", "discriminator"}
    rates = []
    for _ in range(13):
        rates.append([optimizers[name].param_groups[0]["lr"] for name in models])
        for name in models:
            optimizers[name].step()
            schedules[name].step()
    assert [rate for rate, _ in rates] == [0.5] * 6 + [0.25] * 6 + [0.125]
    assert {rate for _, rate in rates} == {0.25}


def test_predicted_files_score_as_the_evaluation_does():
    """predict.py's picture, compared code by code, has exactly the metric's L1."""
    cfg = shapes_config()
    torch.manual_seed(0)
    models = translation.Task(cfg).build_models()
    for model in models.values():
        model.eval()
    image = torch.randint(256, (3, 21, 30), dtype=torch.uint8)
    target = torch.randint(256, (3, 21, 30), dtype=torch.uint8)
    small = translation.Task(cfg).network_input(image)
    assert small.shape == (3, 16, 16)
    with torch.inference_mode():
        prediction = translation.Task(cfg).predict(models, small[None])[0]
    picture = translation.Task(cfg).render(image, prediction, ["map"], None)["map"]
    assert (picture.mode, picture.size) == ("RGB", (30, 21))
    metric = TranslationMetrics()
    metric.update([prediction], [target])
    pixels = torch.tensor(list(picture.tobytes())).view(21, 30, 3).permute(2, 0, 1)
    expected = (pixels - target.long()).abs().double().mean().item() / 255
    assert metric.compute()["L1"] == pytest.approx(expected, abs=1e-12)


def test_sheet_row():
    cfg = shapes_config()
    source = torch.zeros(3, 16, 16, dtype=torch.uint8)
    target = torch.zeros(3, 20, 30, dtype=torch.uint8)
    row = translation.Task(cfg).sheet_row(Sample(source, target, torch.ones(3, 16, 16)))
    assert row[0] is source
    assert row[2] is target
    assert row[1].unique().tolist() == [1.0]


def test_best_metrics():
    assert translation.Task.METRICS == {"L1": "min", "PSNR": "max", "SSIM": "max"}
    (metric,) = translation.Task(shapes_config()).make_metrics()
    assert set(metric.scores()) == set(translation.Task.METRICS)
    with pytest.raises(UserError, match=r"train\.best: 'MAE'"):
        deciding_metric(config(train={"best": "MAE"}), translation.Task.METRICS)
