"""The matting task: its config, its step, and that files are predicted as they are scored."""

from pathlib import Path

import numpy as np
import pytest
import steps
import torch
from PIL import Image
from steps import Noting
from torch import nn

import tasks
from my_dataset import PairFolderDataset, ShapesDataset
from tasks import matting
from tasks.matting.data import CompositionDataset
from tasks.matting.metrics import MattingMetrics, finish_alpha
from train_utils import shapes
from train_utils.config import load_yaml
from train_utils.data import collate, eval_loader
from train_utils.errors import UserError
from train_utils.settings import FIRST_VAL_SCENE, deciding_metric
from train_utils.train_and_eval import Sample, StepOptions, evaluate, train_one_epoch
from transforms import composite

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TINY = {"train_size": 4, "val_size": 2, "image_size": 40, "crop_sizes": [32, 40], "max_radius": 3}


def config(model: dict | None = None, **data) -> matting.Config:
    values = {"task": "matting", "data": data, "model": {"channels": 4, **(model or {})}}
    return tasks.read_config(values, "", {}).cfg


def recipe(name: str, overrides: dict | None = None) -> matting.Config:
    path = CONFIGS / f"{name}.yaml"
    return tasks.read_config(load_yaml(path), str(path), overrides or {}).cfg


def folders_of(root: Path, **colours: int) -> None:
    """Folders fg, alpha and bg of four files each, of these grey values."""
    for part, value in colours.items():
        (root / part).mkdir()
        for stem in "abcd":
            mode, pixel = ("L", value) if part == "alpha" else ("RGB", (value,) * 3)
            Image.new(mode, (50, 40), pixel).save(root / part / f"{stem}.png")


# --- config and data -----------------------------------------------------------------------------


def test_the_published_recipe():
    cfg = recipe("matting_composed", {"data": {"root": "dir"}})
    assert cfg.data.name == "composed"
    assert cfg.data.composed_folders() == ("dir/fg", "dir/alpha", "dir/bg")
    assert (cfg.data.crop_sizes, cfg.data.image_size) == ((320, 480, 640), 320)
    assert (cfg.optim.name, cfg.optim.lr, cfg.optim.schedule) == ("sgd", 1e-2, "constant")
    assert (cfg.train.plateau_factor, cfg.train.plateau_patience) == (0.6, 2)
    assert (cfg.train.early_stop, cfg.train.clip_value) == (10, 5.0)
    assert (cfg.model.channels, cfg.model.weights, cfg.data.per_foreground) == (64, "DEFAULT", 20)
    assert deciding_metric(cfg, matting.Task.METRICS) == ("loss", "min")


def test_the_embedded_recipe():
    cfg = recipe("matting")
    assert cfg.data.name == "shapes"
    assert (cfg.train.plateau_factor, cfg.train.plateau_patience) == (0.6, 2)
    assert (cfg.train.early_stop, cfg.train.clip_value) == (10, 5.0)
    assert matting.Task(cfg).trimap_policy() == f"made from alpha, radius {cfg.data.eval_radius}"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({}, "shapes"),
        ({"root": "r"}, "composed"),
        ({"foregrounds": "f", "alphas": "a", "backgrounds": "b"}, "composed"),
        ({"images": "i", "masks": "m"}, "folders"),
        ({"images": "i", "masks": "m", "trimaps": "t"}, "folders"),
    ],
)
def test_folders_say_which_data_is_meant(data, name):
    assert config(**data).data.name == name


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"foregrounds": "f"}, "need each other. Give all three"),
        ({"root": "r", "foregrounds": "f", "alphas": "a", "backgrounds": "b"}, "go without root"),
        ({"trimaps": "t"}, "held out of `images`"),
        (
            {"images": "i", "masks": "m", "val_images": "v", "val_masks": "w", "trimaps": "t"},
            "give val_trimaps",
        ),
        ({"images": "i", "masks": "m", "val_trimaps": "t"}, "go with val_images"),
        ({"crop_sizes": []}, "one size or more"),
        ({"crop_sizes": [320, 0]}, "one size or more"),
        ({"max_radius": 0}, "max_radius: must be 1 to 16384"),
        ({"eval_radius": -1}, "eval_radius: must be 0 to 16384"),
        ({"eval_size": 0}, "eval_size: must be 1 to 16384"),
        ({"val_per_foreground": 0}, "val_per_foreground: must be 1 to 16384"),
        ({"jitter": [0.1, 0.1, 0.1, 0.6]}, "a hue from 0 to 0.5"),
        ({"jitter": [0.1, -0.1, 0.1, 0.1]}, "three values from 0 to 1"),
        ({"std": [0.2, 0.0, 0.2]}, "std: every value must be positive"),
        ({"hflip": 2}, "hflip: must lie between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data, problem):
    with pytest.raises(UserError, match=problem):
        config(**data)


def test_embedded_scenes_are_as_large_as_the_largest_crop():
    train, val = matting.Task(config(**TINY, eval_radius=2)).build_datasets()
    assert isinstance(train, ShapesDataset)
    assert (len(train), len(val)) == (4, 2)
    assert [x.shape for x in train[0]] == [(4, 40, 40), (2, 40, 40), (3, 40, 40), (3, 40, 40)]
    assert [x.shape for x in val[0]] == [(4, 40, 40), (2, 40, 40)]
    assert not set(train.scenes) & set(val.scenes)
    assert matting.Task(config(**TINY)).prepare_data(train, val) == {}


def test_composites_of_given_folders(tmp_path):
    folders_of(tmp_path, fg=200, alpha=51, bg=100)
    cfg = config(root=str(tmp_path), per_foreground=3, val_per_foreground=2)
    train, val = matting.Task(cfg).build_datasets()
    assert isinstance(train.dataset, CompositionDataset)
    assert (len(train), len(val)) == (9, 2)
    inputs, target = val[0]
    assert (inputs[:3] == 120).all()  # 200/5 + 100·4/5
    assert (target[0] == 51).all()
    alpha = train.dataset.pairs[train.indices[0]][1]
    with Image.open(alpha) as image:
        half = Image.new("L", image.size)
        half.paste(255, (0, 0, image.width // 2, image.height))
    half.save(alpha)  # so that there is an object to learn
    assert matting.Task(cfg).prepare_data(train, val) == {}
    folders = {"foregrounds": "fg", "alphas": "alpha", "backgrounds": "bg"}
    cfg = config(**{name: str(tmp_path / folder) for name, folder in folders.items()})
    assert len(matting.Task(cfg).build_val_dataset(all_pairs=True)) == 4 * 5


def test_a_recipe_of_composites_asks_for_folders():
    with pytest.raises(UserError, match=r"data\.root: this recipe composes .* --data-path DIR"):
        matting.Task(recipe("matting_composed")).build_datasets()


def test_ready_images_have_no_compositional_loss(tmp_path):
    folders_of(tmp_path, fg=200, alpha=51)
    cfg = config(images=str(tmp_path / "fg"), masks=str(tmp_path / "alpha"))
    train, val = matting.Task(cfg).build_datasets()
    assert isinstance(train.dataset, PairFolderDataset)
    assert len(train[0]) == len(val[0]) == 2
    cfg.loss.alpha_weight = 0.5
    with pytest.raises(UserError, match=r"loss\.alpha_weight 0\.5: .* Set it to null"):
        matting.Task(cfg).build_datasets()
    assert (
        len(matting.Task(cfg).build_val_dataset()) == 1
    )  # to be scored they may come all the same


def test_damaged_files_are_found_before_the_first_step(tmp_path):
    folders_of(tmp_path, fg=200, alpha=51, bg=100)
    cfg = config(root=str(tmp_path))
    (tmp_path / "bg" / "c.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.png: the file is empty"):
        matting.Task(cfg).prepare_data(None, matting.Task(cfg).build_val_dataset())


# --- networks ------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "file.pth")
    cfg = config(model={"weights": str(tmp_path / "file.pth")})
    with pytest.raises(UserError, match=r"model\.weights .*file\.pth: .*do not fit.*or null"):
        matting.Task(cfg).initialise(matting.Task(cfg).build_models())
    cfg = config()
    before = matting.Task(cfg).build_models()
    copies = {name: value.clone() for name, value in before["model"].state_dict().items()}
    matting.Task(cfg).initialise(before)
    after = before["model"].state_dict()
    assert all(torch.equal(after[name], value) for name, value in copies.items())


def test_single_small_images_are_refused():
    matting.Task(config(image_size=32)).check_batches(2)
    matting.Task(config(image_size=33)).check_batches(1)
    with pytest.raises(UserError, match=r"data\.image_size: .* Use 33 pixels or more"):
        matting.Task(config(image_size=32)).check_batches(1)


# --- the step ------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Answers one logit everywhere, and keeps what it was given."""

    def __init__(self, logit: float = 0.0) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        logits = self.logit.expand(len(x), 1, *x.shape[-2:])
        return logits if self.training else torch.sigmoid(logits)


def codes(*values: int) -> torch.Tensor:
    """One picture of one row, uint8 [1, channels, 1, 1], of a value per channel."""
    return torch.tensor(values, dtype=torch.uint8)[None, :, None, None]


# α̂ = ½. alpha 51 = 0.2: L_α = 0.3. F = 1, B = 0.2, image 0.36 (code 92): L_c = |0.6 − 92/255|.
COMPOSITE = (codes(92, 92, 92, 128), codes(51, 128), codes(255, 255, 255), codes(51, 51, 51))
ALPHA, COMPOSITIONAL = 0.3, 0.6 - 92 / 255


def take_step(batch, weight=None, model=None):
    """Losses, and gradients by parameter."""
    cfg = config()
    cfg.loss.alpha_weight = weight
    return steps.take_step(matting.Task(cfg), {"model": model or Constant()}, batch)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(None, (ALPHA + COMPOSITIONAL) / 2), (1.0, ALPHA), (0.0, COMPOSITIONAL), (0.25, None)],
)
def test_losses_by_hand(weight, expected):
    losses, gradients = take_step(COMPOSITE, weight)
    assert list(losses) == ["loss", "alpha", "compositional"]
    assert losses["alpha"] == pytest.approx(ALPHA, abs=1e-5)
    assert losses["compositional"] == pytest.approx(COMPOSITIONAL, abs=1e-5)
    if expected is None:
        expected = 0.25 * ALPHA + 0.75 * COMPOSITIONAL
    assert losses["loss"] == pytest.approx(expected, abs=1e-5)
    assert gradients["model.logit"] != 0


def test_without_parts_alpha_alone_counts():
    losses, _ = take_step(COMPOSITE[:2])
    assert list(losses) == ["loss", "alpha"]
    assert losses["loss"] == pytest.approx(ALPHA, abs=1e-5)


def test_known_pixels_do_not_count():
    known = (codes(92, 92, 92, 255), codes(51, 255), *COMPOSITE[2:])
    weight = matting.Task(config()).weight
    assert weight(known) == 0
    losses, gradients = take_step(known)
    assert list(losses.values()) == [0, 0, 0]
    assert gradients["model.logit"] == 0
    both = tuple(torch.cat(parts) for parts in zip(COMPOSITE, known, strict=True))
    assert weight(both) == 1
    assert take_step(both)[0]["alpha"] == pytest.approx(ALPHA, abs=1e-5)


def test_an_empty_batch_costs_nothing():
    cfg = config(**TINY)
    batch = tuple(part[:0] for part in collate([matting.Task(cfg).build_datasets()[0][0]]))
    assert batch[0].shape == (0, 4, 40, 40)
    losses, gradients = take_step(batch, model=matting.Task(cfg).build_models()["model"])
    assert list(losses.values()) == [0, 0, 0]
    assert gradients and not any(gradient.any() for gradient in gradients.values())


def test_a_batch_can_be_learned():
    cfg = config(model={"channels": 8}, **TINY)
    train = matting.Task(cfg).build_datasets()[0]
    torch.manual_seed(0)
    task, batch = matting.Task(cfg), collate([train[index] for index in range(4)])
    model, seen = task.build_models()["model"], []
    optimizer, options = torch.optim.Adam(model.parameters(), 0.01), StepOptions(clip_value=5.0)
    run = Noting(lambda progress: seen.append(progress.logger.alpha.value))
    common = {"losses": task.losses, "weight": task.weight, "options": options, "run": run}
    train_one_epoch(model, optimizer, [batch] * 25, "cpu", 0, None, **common)
    assert seen[-1] < seen[0] / 2


@pytest.mark.parametrize("training", [True, False])
def test_the_network_sees_normalised_colours_and_the_trimap(training):
    cfg = config(mean=(0.2, 0.4, 0.6), std=(0.5, 0.25, 0.1))
    model = Constant().train(training)
    inputs = codes(51, 102, 255, 128)
    if training:
        matting.Task(cfg).losses({"model": model}, (inputs, codes(51, 128)))
    else:
        matting.Task(cfg).predict({"model": model}, inputs)
    expected = [0, 0, 4, 128 / 255]  # (0.2 − 0.2)/0.5, (0.4 − 0.4)/0.25, (1 − 0.6)/0.1
    assert model.seen.flatten().tolist() == pytest.approx(expected, abs=1e-5)


# --- evaluation and prediction -------------------------------------------------------------------


def test_predictions_agree_with_the_trimap():
    inputs = torch.zeros(1, 4, 1, 3, dtype=torch.uint8)
    inputs[0, 3] = torch.tensor([[0, 128, 255]])
    alpha = matting.Task(config()).predict({"model": Constant(np.log(3)).eval()}, inputs)
    assert alpha.flatten().tolist() == pytest.approx([0, 0.75, 1])


def test_a_file_is_written_as_it_is_scored():
    cfg = config(**TINY, eval_size=24)  # the network sees less than is scored
    val = matting.Task(cfg).build_val_dataset()
    samples: list[Sample] = []
    (metric,) = evaluate(
        matting.Task(cfg).build_models(),
        eval_loader(val, 2, 0, torch.device("cpu")),
        "cpu",
        metrics=matting.Task(cfg).make_metrics(),
        predict=matting.Task(cfg).predict,
        keep=2,
        samples=samples,
    )
    assert set(metric.compute()) == set(matting.Task.METRICS)
    assert metric.remarks() == ["trimap policy: made from alpha, radius 10"]
    again = MattingMetrics()
    for number, sample in enumerate(samples, FIRST_VAL_SCENE):
        image, trimap = shapes.render_scene(0, number, 40, familiar=True).image, sample.target[1:]
        assert torch.equal(matting.Task(cfg).network_input(image, trimap=trimap), sample.image)
        pictures = matting.Task(cfg).render(image, sample.prediction, ["map"], None, trimap)
        codes = (finish_alpha(sample.prediction, trimap) * 255).round()
        assert (np.array(pictures["map"]) == codes.numpy()).all()
        again.update([sample.prediction], [sample.target])
    assert again.compute() == metric.compute()


def test_pictures_have_the_images_size_and_its_known_pixels():
    cfg, image = config(), torch.full((3, 8, 12), 90, dtype=torch.uint8)
    trimap = torch.full((1, 8, 12), 128, dtype=torch.uint8)
    trimap[..., :4], trimap[..., 8:] = 0, 255
    prediction = torch.full((1, 2, 3), 0.2)
    pictures = matting.Task(cfg).render(image, prediction, ["map", "cutout"], None, trimap)
    assert {kind: picture.mode for kind, picture in pictures.items()} == {
        "map": "L",
        "cutout": "RGBA",
    }
    alpha = np.array(pictures["map"])
    assert alpha.shape == (8, 12)
    assert [set(alpha[:, part].flat) for part in np.split(np.arange(12), 3)] == [{0}, {51}, {255}]
    cutout = np.array(pictures["cutout"])
    assert (cutout[..., 3] == alpha).all()
    assert (cutout[:, 8:, :3] == 90).all()
    plain = matting.Task(cfg).render(image, prediction, ["map"], None)
    assert list(plain) == ["map"]
    assert (np.array(plain["map"]) == 51).all()


def test_cutouts_leave_the_old_background_behind():
    scene = shapes.render_scene(4, 2, 64)
    background = torch.zeros_like(scene.image)
    background[1] = 255
    image = composite(scene.foreground, background, scene.alpha)
    picture = matting.Task(config()).render(image, scene.alpha / 255, ["cutout"], None)["cutout"]
    colours = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:3].int()
    soft = ((scene.alpha[0] > 60) & (scene.alpha[0] < 200)).expand(3, -1, -1)
    assert soft.sum() > 300

    def error(candidate):
        return (candidate.int() - scene.foreground.int())[soft].abs().float().mean()

    assert error(colours) < error(image) / 3


def test_a_row_of_the_sheet():
    trimap = torch.tensor([[[0, 128, 255, 128]]], dtype=torch.uint8)
    sample = Sample(
        torch.zeros(4, 1, 2, dtype=torch.uint8),
        torch.cat([trimap // 2, trimap]),
        torch.full((1, 1, 2), 0.5),
    )
    image, shown, truth, prediction = matting.Task(config()).sheet_row(sample)
    assert image.shape == (3, 1, 2)
    assert torch.equal(shown, trimap)
    assert torch.equal(truth, trimap // 2)
    assert (prediction * 255).round().tolist() == [[[0, 128, 255, 128]]]


@pytest.mark.parametrize(
    ("data", "policy"),
    [
        ({"eval_radius": 7}, "made from alpha, radius 7"),
        ({"images": "i", "masks": "m"}, "made from alpha, radius 10"),
        ({"images": "i", "masks": "m", "trimaps": "t"}, "given with the images"),
        (
            {"images": "i", "masks": "m", "val_images": "v", "val_masks": "w", "val_trimaps": "t"},
            "given with the images",
        ),
    ],
)
def test_scores_say_where_their_trimaps_come_from(data, policy):
    (metric,) = matting.Task(config(**data)).make_metrics()
    assert metric.remarks() == [f"trimap policy: {policy}"]


def test_images_without_unknown_pixels_are_left_out_and_named(tmp_path):
    folders_of(tmp_path, fg=200, alpha=255, bg=100)
    cfg = config(root=str(tmp_path), val_per_foreground=2)
    (metric,) = evaluate(
        matting.Task(cfg).build_models(),
        eval_loader(matting.Task(cfg).build_val_dataset(), 2, 0, torch.device("cpu")),
        "cpu",
        metrics=matting.Task(cfg).make_metrics(),
        predict=matting.Task(cfg).predict,
    )
    assert np.isnan(metric.compute()["SAD"])
    assert "2 of 2 images have no unknown pixels" in metric.remarks()[1]


def test_real_photographs_are_scored_with_their_own_trimaps(shared_data):
    root = shared_data / "matting"
    cfg = config(
        images=str(root / "image"),
        masks=str(root / "alpha"),
        trimaps=str(root / "trimap"),
        eval_size=96,
    )
    train, val = matting.Task(cfg).build_datasets()
    assert (len(train), len(val)) == (7, 1)
    assert matting.Task(cfg).prepare_data(train, val) == {}
    (metric,) = evaluate(
        matting.Task(cfg).build_models(),
        eval_loader(val, 1, 0, torch.device("cpu")),
        "cpu",
        metrics=matting.Task(cfg).make_metrics(),
        predict=matting.Task(cfg).predict,
    )
    assert all(np.isfinite(score) for score in metric.compute().values())
    assert metric.remarks() == ["trimap policy: given with the images"]


def test_folders_on_the_command_line_replace_every_source_of_a_checkpoint():
    trained = {"name": "folders", "images": "a", "masks": "b", "trimaps": "c"}
    values = {"task": "matting", "data": trained}
    cfg = tasks.read_config(values, "file", {"data": {"images": "x", "masks": "y"}}).cfg
    assert (cfg.data.images, cfg.data.masks, cfg.data.trimaps) == ("x", "y", None)
    cfg = tasks.read_config(values, "file", {"data": {"trimaps": "z"}}).cfg
    assert (cfg.data.images, cfg.data.trimaps) == ("a", "z")
    cfg = tasks.read_config(values, "file", {"data": {"root": "r"}}).cfg
    assert (cfg.data.name, cfg.data.images, cfg.data.trimaps) == ("composed", None, None)


def test_a_root_of_ready_images(tmp_path):
    for folder in ("image", "alpha", "trimap"):
        (tmp_path / folder).mkdir()
    cfg = tasks.read_config({"task": "matting"}, "file", {"data": {"root": str(tmp_path)}}).cfg
    data = cfg.data
    assert (data.name, data.root) == ("folders", None)
    found = [Path(folder).name for folder in (data.images, data.masks, data.trimaps)]
    assert found == ["image", "alpha", "trimap"]
    assert matting.Task(cfg).trimap_policy() == "given with the images"
    (tmp_path / "trimap").rmdir()
    cfg = tasks.read_config({"task": "matting"}, "file", {"data": {"root": str(tmp_path)}}).cfg
    assert cfg.data.trimaps is None


def test_ready_photographs_by_their_root(shared_data):
    cfg = tasks.read_config(
        {"task": "matting"}, "file", {"data": {"root": str(shared_data / "matting")}}
    ).cfg
    train, val = matting.Task(cfg).build_datasets()
    assert (len(train), len(val)) == (7, 1)
    inputs, target = val[0]
    assert inputs.shape[0] == 4 and target.shape == (2, *inputs.shape[1:])
    assert set(target[1].unique().tolist()) == {0, 128, 255}
