"""The segmentation task: its recipes, data, step, scores and pictures."""

import math
import shlex
from pathlib import Path

import numpy as np
import pytest
import steps
import torch
from PIL import Image

from tasks import load_models, read_config, segmentation, start_models
from tasks.segmentation import voc_palette
from train_utils import shapes
from train_utils.config import build, dump_yaml, load_yaml, merge, parse_assignments, to_dict
from train_utils.data import collate
from train_utils.errors import UserError
from train_utils.train_and_eval import Sample, evaluate
from transforms import IGNORE

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def config(**sections):
    """A small recipe for the embedded data, with some values replaced."""
    values = {
        "task": "segmentation",
        "data": {"name": "shapes", "train_size": 6, "val_size": 3, "image_size": 32},
        "model": {"name": "unet", "channels": 4},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build(segmentation.Config, values, "test")


def folder_config(folder, classes, **data):
    """A recipe for the pairs in folder/images and folder/masks."""
    folders = {"images": str(folder / "images"), "masks": str(folder / "masks")}
    return config(data={"name": "folders", "class_names": classes, **folders, **data})


def write_pairs(folder, masks, size=(20, 16)):
    """Images of noise beside masks (uint8 [H, W] arrays), as PNG."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number, mask in enumerate(masks):
        noise = rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def half_and_half(low=0, high=1, size=(16, 20)):
    mask = np.full(size, low, dtype=np.uint8)
    mask[:, size[1] // 2 :] = high
    return mask


def batch_of(dataset, count):
    return collate([dataset[index] for index in range(count)])


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fcn", "unet", "unet_voc", "unet_camvid", "fcn_bag"])
def test_recipes_are_read_and_survive_a_round_trip(name):
    task = read_config(load_yaml(CONFIGS / f"{name}.yaml"), name, {})
    cfg = task.cfg
    assert type(task) is segmentation.Task
    assert build(segmentation.Config, to_dict(cfg), "again") == cfg


def test_the_shapes_have_classes_of_their_own():
    """Other names are for data of one's own, whichever way it comes."""
    task = segmentation.Task(config(data={"class_names": ["a", "b"]}))
    assert task.cfg.data.palette == [(0, 0, 0), (128, 0, 0)]
    with pytest.raises(UserError, match=r"data\.class_names: the shapes have 6 classes"):
        task.build_datasets()


def test_defaults_are_the_embedded_classes():
    data = config().data
    assert data.class_names == list(shapes.CLASS_NAMES)
    assert data.palette == [tuple(colour) for colour in shapes.class_palette().tolist()]
    assert data.mask_values == "index"


def test_voc_palette():
    palette = voc_palette(256)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {index: palette[index] for index in known} == known
    assert palette[255] == (224, 224, 192)
    assert len(set(palette)) == 256


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"name": "voc"}}, "data.class_names: name the classes"),
        ({"data": {"name": "voc", "class_names": ["a"]}}, "data.class_names: one class alone"),
        ({"data": {"name": "voc", "class_names": ["a", "a"]}}, "class_names: each must be another"),
        ({"data": {"palette": [[0, 0, 0]]}}, "data.palette: 1 colours for 6 classes"),
        ({"data": {"scale": [2.0, 1.0]}}, "data.scale"),
        ({"data": {"mask_values": "threshold"}}, "class_names: must be two"),
        ({"loss": {"terms": []}}, "loss.terms"),
        ({"loss": {"terms": ["ce", "ce"]}}, "loss.terms"),
        ({"loss": {"terms": ["lovasz"]}}, "loss.terms"),
        ({"loss": {"class_weights": [1.0, 2.0]}}, "loss.class_weights: 2 for 6 classes"),
        ({"loss": {"class_weights": [0.0] * 6}}, "loss.class_weights"),
        ({"model": {"weights": "DEFAULT"}}, "model.weights: unet has no pretrained encoder"),
        ({"model": {"name": "unet_resnet50"}}, "model.channels"),
        ({"model": {"batch_norm": True}}, "model.batch_norm"),
        ({"model": {"name": "fcn", "weights": "DEFAULT"}}, "model.weights: .*Set channels to 64"),
        ({"model": {"freeze_backbone": True}}, "model.freeze_backbone: would hold random"),
    ],
)
def test_settings_that_make_no_sense_are_refused(sections, message):
    with pytest.raises(UserError, match=message):
        config(**sections)


@pytest.mark.parametrize("name", ["car", "it's 1", "no"])
def test_one_class_alone_is_refused_with_the_line_that_names_two(name):
    folders = {"name": "folders", "images": "a", "masks": "b"}
    with pytest.raises(UserError, match=r"class_names: one class alone .* --set ") as caught:
        config(data={**folders, "class_names": [name]})
    (assignment,) = shlex.split(str(caught.value).partition(" --set ")[2])
    values = merge({"data": folders}, parse_assignments([assignment]))
    assert build(segmentation.Config, values, "f").data.class_names == ["background", name]


def test_a_root_decides_its_layout(tmp_path):
    for name in ("image", "mask"):
        (tmp_path / name).mkdir()
    data = {"name": None, "root": str(tmp_path), "class_names": ["ground", "bag"]}
    found = config(data=data).data
    assert (found.name, found.mask_values) == ("bag", "threshold")


# -- data ------------------------------------------------------------------------------------------


def test_embedded_scenes_come_as_classes():
    cfg = config()
    train, val = segmentation.Task(cfg).build_datasets()
    assert (len(train), len(val)) == (6, 3)
    image, target = val[0]
    scene = shapes.render_scene(0, segmentation.FIRST_VAL_SCENE, 32, familiar=True)
    assert torch.equal(target, scene.classes)
    assert torch.equal(image, scene.image)


def test_auto_class_weights_of_the_embedded_scenes():
    cfg = config(loss={"class_weights": "auto"})
    train, val = segmentation.Task(cfg).build_datasets()
    found = segmentation.Task(cfg).prepare_data(train, val)
    weights = segmentation.Task(cfg).with_values(found).cfg.loss.class_weights
    # median-frequency balancing by hand: share of a class in the scenes that show it
    maps = [shapes.render_scene(0, index, 32).classes for index in range(6)]
    shares = [
        sum((m == c).sum().item() for m in maps) / sum(m.numel() for m in maps if (m == c).any())
        if any((m == c).any() for m in maps)
        else 0
        for c in range(6)
    ]
    median = np.median([share for share in shares if share])
    assert weights == pytest.approx([median / share if share else 0 for share in shares])


def test_auto_class_weights_need_a_training():
    cfg = config(loss={"class_weights": "auto"})
    _, val = segmentation.Task(cfg).build_datasets()
    assert segmentation.Task(cfg).prepare_data(None, val) == {}
    with pytest.raises(UserError, match=r"loss\.class_weights: auto"):
        segmentation.Task(cfg).weight(batch_of(val, 1))
    (metric,) = segmentation.Task(cfg).make_metrics()
    assert "loss" not in metric.compute()


def test_folders_are_scanned_and_absent_classes_named(tmp_path, capsys):
    write_pairs(tmp_path, [half_and_half(), half_and_half(0, 2), half_and_half(1, 255)])
    cfg = folder_config(tmp_path, list("abcd"), val_fraction=0.3)
    train, val = segmentation.Task(cfg).build_datasets()
    assert (len(train), len(val)) == (2, 1)
    assert segmentation.Task(cfg).prepare_data(train, val) == {}
    printed = capsys.readouterr().out
    assert "training masks: 2 files, 640 pixels" in printed
    assert "validation masks: 1 files, 320 pixels" in printed
    (warning,) = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert "d: in no training mask" in warning


def test_masks_that_do_not_fit_are_refused_by_name(tmp_path):
    write_pairs(tmp_path, [half_and_half(), half_and_half(0, 7)])
    cfg = folder_config(tmp_path, ["a", "b"])
    with pytest.raises(UserError, match=r"masks.*1\.png.*label 7"):
        segmentation.Task(cfg).prepare_data(*segmentation.Task(cfg).build_datasets())


def test_layouts_without_a_root_say_what_is_missing():
    cfg = config(data={"name": "voc", "class_names": ["a", "b"]})
    with pytest.raises(UserError, match="--data-path DIR"):
        segmentation.Task(cfg).build_datasets()


@pytest.mark.parametrize(
    ("data", "sizes", "classes"),
    [
        ({"root": "voc", "class_names": list("abcd")}, (100, 12), {0, 1, 2, 3}),
        ({"root": "camvid", "class_names": list("abcdefghijk"), "ignore_index": 11}, (20, 6), None),
        ({"root": "bag", "class_names": ["ground", "bag"]}, (36, 4), {0, 1}),
    ],
    ids=lambda value: value["root"] if isinstance(value, dict) else None,
)
def test_real_layouts(data, sizes, classes, shared_data):
    data = {"name": None, **data, "root": str(shared_data / data["root"])}
    cfg = config(data={**data, "image_size": 48})
    train, val = segmentation.Task(cfg).build_datasets()
    assert (len(train), len(val)) == sizes
    assert segmentation.Task(cfg).prepare_data(train, val) == {}
    image, target = train[0]
    assert (image.shape, target.shape) == ((3, 48, 48), (1, 48, 48))
    seen = {int(label) for index in range(4) for label in val[index][1].unique()} - {IGNORE}
    assert seen <= (classes or set(range(11)))
    assert len(seen) > 1


# -- networks and steps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {"name": "fcn32s", "channels": 4},
        {"name": "fcn16s", "channels": 4},
        {"name": "fcn8s", "channels": 4, "batch_norm": True},
        {"name": "fcn", "channels": 4},
        {"name": "unet", "channels": 4},
        {"name": "unet_vgg16", "channels": 4, "batch_norm": True},
        {"name": "unet_resnet50", "channels": 64},
    ],
    ids=lambda model: model["name"],
)
def test_every_network_gives_logits_of_the_input_size(model):
    cfg = config(model=model)
    models = segmentation.Task(cfg).build_models()
    models["model"].eval()
    logits = segmentation.Task(cfg).predict(models, torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert (logits.shape, logits.dtype) == ((2, 6, 32, 32), torch.float32)


def test_initialise_loads_and_freezes_the_encoder(tmp_path):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    source = vgg16(weights=None).features.state_dict()
    state = {f"features.{name}": value for name, value in source.items()}
    torch.save(state, tmp_path / "vgg16.pth")
    options = {"name": "fcn", "channels": 64, "freeze_backbone": True}
    cfg = config(model={**options, "weights": str(tmp_path / "vgg16.pth")})
    models = segmentation.Task(cfg).build_models()
    segmentation.Task(cfg).initialise(models)
    encoder = models["model"].backbone
    assert torch.equal(encoder[0][0].weight, source["0.weight"])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    optimizers = segmentation.Task(cfg).build_optimizers(models)
    trained = {id(p) for group in optimizers["model"].param_groups for p in group["params"]}
    assert trained == {id(p) for p in models["model"].parameters() if p.requires_grad} != set()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    weights = str(tmp_path / "other.pth")
    cfg = config(model={"name": "unet_vgg16", "channels": 64, "weights": weights})
    with pytest.raises(UserError, match=r"other\.pth: .*Use weights of torchvision's vgg16"):
        segmentation.Task(cfg).initialise(segmentation.Task(cfg).build_models())


@pytest.mark.parametrize("name", ["unet", "fcn8s", "u2net_lite"])
def test_a_training_may_start_from_weights_for_other_classes(name, tmp_path, capsys):
    """What fits is kept and the head starts anew, which a line says; scoring stays strict."""
    of_six = segmentation.Task(config(model={"name": name}))
    network = of_six.build_models()["model"]
    before = {f"model.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": before}, tmp_path / "w.pth")
    names = {"class_names": ["bg", "object"], "name": "folders", "images": "a", "masks": "b"}
    weights = {"train": {"weights": str(tmp_path / "w.pth")}}
    of_two = segmentation.Task(config(model={"name": name}, data=names, **weights))
    started = start_models(of_two, None)["model"].state_dict()
    changed = {key for key, value in started.items() if value.shape != before[f"model.{key}"].shape}
    assert {key: len(started[key]) for key in changed} == dict.fromkeys(changed, 2)
    assert all(key.startswith(("classifier.", "side.", "out_conv.")) for key in changed)
    kept = started.keys() - changed
    assert len(kept) > 20
    assert all(torch.equal(started[key], before[f"model.{key}"]) for key in kept)
    said = f"is for another number of classes: {len(changed)} tensors start anew, "
    assert said in capsys.readouterr().out
    recipe = tmp_path / "two.yaml"
    dump_yaml(of_two.cfg, recipe)
    with pytest.raises(UserError, match=f"{len(changed)} tensors do not fit, .*data.class_names"):
        load_models(tmp_path / "w.pth", {}, str(recipe))


@pytest.mark.parametrize("change", ["a layer", "a missing tensor", "a width", "an odd head"])
def test_only_the_head_may_differ_at_the_start_of_a_training(change, tmp_path):
    weights = segmentation.Task(config()).build_models()["model"].state_dict()
    model = {"channels": 6} if change == "a width" else {}
    if change == "a layer":
        weights["backbone.0.0.conv.weight"] = torch.zeros(4, 4, 3, 3)
    elif change == "a missing tensor":
        del weights["classifier.bias"]
    elif change == "an odd head":
        weights["classifier.bias"] = torch.zeros(5)
    torch.save(weights, tmp_path / "w.pth")
    names = {"class_names": ["bg", "object"], "name": "folders", "images": "a", "masks": "b"}
    cfg = config(data=names, model=model, train={"weights": str(tmp_path / "w.pth")})
    with pytest.raises(UserError, match="these weights do not fit UNet"):
        start_models(segmentation.Task(cfg), None)


def test_batches_on_which_batch_norm_cannot_train_are_refused():
    small = config(data={"image_size": 16})
    segmentation.Task(small).check_batches(smallest=2)
    with pytest.raises(UserError, match=r"Use 17 pixels or more, or another --batch-size"):
        segmentation.Task(small).check_batches(smallest=1)
    segmentation.Task(config(data={"image_size": 17})).check_batches(smallest=1)


def test_weights_are_those_of_pixels_and_leave_out_what_is_ignored():
    target = torch.full((3, 1, 2, 2), IGNORE, dtype=torch.uint8)
    target[0, 0] = torch.tensor([[0, 1], [1, 5]])
    target[2, 0, 0, 0] = 0
    batch = (torch.zeros(3, 3, 2, 2, dtype=torch.uint8), target)
    terms = ["ce", "dice"]
    plain = segmentation.Task(config(loss={"terms": terms}))
    assert plain.weight(batch) == {"ce": 5, "dice": 2}
    weights = [0.5, 2.0, 1.0, 1.0, 1.0, 4.0]
    weighted = segmentation.Task(config(loss={"terms": terms, "class_weights": weights}))
    assert weighted.weight(batch) == {"ce": 9, "dice": 2}
    assert plain.weight(tuple(x[:0] for x in batch)) == {"ce": 0, "dice": 0}


def take_step(cfg, batch):
    """Named losses and gradients of one step on one process."""
    torch.manual_seed(0)
    task = segmentation.Task(cfg)
    losses, gradients = steps.take_step(task, task.build_models(), batch)
    return losses, list(gradients.values())


def test_step_sums_the_terms():
    cfg = config(loss={"terms": ["ce", "bce", "focal", "dice"], "class_weights": [1.0] * 6})
    losses, gradients = take_step(cfg, batch_of(segmentation.Task(cfg).build_datasets()[0], 3))
    assert list(losses) == ["loss", "ce", "bce", "focal", "dice"]
    parts = [losses[name] for name in cfg.loss.terms]
    assert losses["loss"] == pytest.approx(sum(parts), rel=1e-6)
    assert all(part > 0 for part in parts)
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["all ignored", "empty"])
def test_step_without_anything_to_learn(kind):
    cfg = config(loss={"terms": ["ce", "dice"]})
    images, target = batch_of(segmentation.Task(cfg).build_datasets()[0], 2)
    batch = (images[:0], target[:0]) if kind == "empty" else (images, target.fill_(IGNORE))
    losses, gradients = take_step(cfg, batch)
    assert list(losses.values()) == [0, 0, 0]
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


# -- scores and pictures ---------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_the_written_map_is_what_evaluation_scores(fit, tmp_path):
    write_pairs(tmp_path, [half_and_half(size=(24, 41)), half_and_half(size=(37, 18))])
    cfg = folder_config(tmp_path, ["a", "b"], fit=fit, val_fraction=0.5)
    dataset = segmentation.Task(cfg).build_val_dataset(all_pairs=True)
    torch.manual_seed(0)
    models = segmentation.Task(cfg).build_models()
    predict, metrics = segmentation.Task(cfg).predict, segmentation.Task(cfg).make_metrics()
    loader = [collate([dataset[0]]), collate([dataset[1]])]
    (metric,) = evaluate(models, loader, "cpu", metrics=metrics, predict=predict)
    expected = torch.zeros(2, 2, dtype=torch.int64)
    models["model"].eval()
    for index in range(2):
        picture, target = dataset[index]
        image = torch.zeros(3, *target.shape[-2:], dtype=torch.uint8)
        with torch.no_grad():
            logits = predict(models, picture[None])[0]
        written = segmentation.Task(cfg).render(image, logits, ["map"], None)["map"]
        pixels = np.array(written).astype(np.int64) + 2 * target[0].numpy()
        expected += torch.bincount(torch.from_numpy(pixels.ravel()), minlength=4).view(2, 2)
    assert torch.equal(metric.matrix(), expected)
    assert math.isfinite(metric.compute()["loss"])


def test_validation_loss_is_that_of_the_training_terms():
    cfg = config(loss={"terms": ["ce", "dice"], "class_weights": [1.0, 5.0, 5.0, 5.0, 5.0, 2.0]})
    (metric,) = segmentation.Task(cfg).make_metrics()
    _, val = segmentation.Task(cfg).build_datasets()
    image, target = batch_of(val, 1)
    torch.manual_seed(0)
    models = segmentation.Task(cfg).build_models()
    models["model"].eval()
    metric.update(segmentation.Task(cfg).predict(models, image).detach(), target)
    losses = segmentation.Task(cfg).losses(models, (image, target))
    assert metric.compute()["loss"] == pytest.approx(sum(losses.values()).item(), abs=1e-5)


def checkerboard_prediction():
    """Logits [6, 32, 32] for class 0 left and class 3 right."""
    logits = torch.zeros(6, 32, 32)
    logits[0, :, :16] = logits[3, :, 16:] = 9.0
    return logits


def test_pictures():
    cfg = config()
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    kinds = ["map", "cutout", "overlay"]
    pictures = segmentation.Task(cfg).render(image, checkerboard_prediction(), kinds, None)
    label_map, colour = pictures["map"], cfg.data.palette[3]
    assert label_map.mode == "P"
    assert (label_map.getpixel((0, 5)), label_map.getpixel((31, 5))) == (0, 3)
    assert label_map.convert("RGB").getpixel((31, 5)) == colour
    cutout = pictures["cutout"]
    assert cutout.getpixel((0, 5)) == (100, 100, 100, 0)
    assert cutout.getpixel((31, 5)) == (100, 100, 100, 255)
    overlay = pictures["overlay"]
    assert overlay.getpixel((0, 5)) == (100, 100, 100)
    tinted = tuple(round(0.4 * 100 + 0.6 * level) for level in colour)
    assert overlay.getpixel((31, 5)) == tinted


def test_pictures_of_classes_without_a_background():
    cfg = config(data={"background": None})
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    overlay = segmentation.Task(cfg).render(image, checkerboard_prediction(), ["overlay"], None)
    tinted = tuple(round(0.4 * 100 + 0.6 * level) for level in cfg.data.palette[0])
    assert overlay["overlay"].getpixel((0, 5)) == tinted
    with pytest.raises(UserError, match=r"data\.background"):
        segmentation.Task(cfg).render(image, checkerboard_prediction(), ["cutout"], None)


def test_sheet_row_shows_classes_in_their_colours():
    cfg = config()
    target = torch.full((1, 64, 48), 2, dtype=torch.uint8)
    target[0, 0, 0] = IGNORE
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    sample = Sample(image, target, checkerboard_prediction())
    shown, truth, predicted = segmentation.Task(cfg).sheet_row(sample)
    assert shown is image
    assert truth.shape == predicted.shape == (3, 64, 48)
    assert tuple(truth[:, 5, 5].tolist()) == cfg.data.palette[2]
    assert tuple(truth[:, 0, 0].tolist()) == (224, 224, 192)
    assert tuple(predicted[:, 5, 47].tolist()) == cfg.data.palette[3]


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_classes_one_by_one_are_those_that_are_scored(fit, layout):
    """Written maps take a class at a time, the metric all of them, to the same bits."""
    cfg = build(segmentation.Config, {"data": {"fit": fit}}, "test")
    logits = torch.randn(1, cfg.data.num_classes, 33, 33).to(memory_format=layout)[0]
    (metric,) = segmentation.Task(cfg).make_metrics()
    whole = metric.finish(logits, (70, 120))
    for number, plane in enumerate(whole):
        assert torch.equal(metric.finish(logits[number : number + 1], (70, 120))[0], plane)
    assert torch.equal(segmentation.Task(cfg)._class_map(logits, (70, 120)).long(), whole.argmax(0))
