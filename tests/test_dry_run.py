"""Mistakes in what a user edits are named before the first step, and no run folder is left."""

import copy
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset

import src
import train
from tasks import saliency, segmentation
from train_utils import init_distributed_mode
from train_utils.config import build
from train_utils.data import KeyedDataset, SampleKey, collate, eval_loader
from train_utils.dry_run import check_optimizers, copies_to_try, dry_run
from train_utils.errors import UserError
from train_utils.log import get_logger
from train_utils.metrics import ImageMean, MeanAbsoluteError, all_remarks
from train_utils.prepare_data import wrap_dataset
from train_utils.schedule import describe_schedules
from train_utils.task import BaseTask
from transforms import SaliencyTrain

TINY = [
    *("--set", "data.image_size=32", "--set", "data.train_size=4", "--set", "data.val_size=2"),
    *("--set", "model.name=tiny", "-j", "0", "-b", "2", "--device", "cpu"),
]
UNET = ["--config", str(Path(train.__file__).parent / "configs" / "unet.yaml")]
CPU = torch.device("cpu")
CLASSES = {"name": "folders", "images": "i", "masks": "m", "class_names": ["a", "b"]}


def build_task(module, values):
    return module.Task(build(module.Config, values, "test"))


class Tiny(nn.Module):
    """A network with all layers that behave otherwise in training; `ends` makes the output."""

    def __init__(self, out_ch=1, ends=lambda network, logits: logits):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head, self.ends = nn.Conv2d(4, out_ch, 1), ends

    def forward(self, x):
        return self.ends(self, self.head(self.body(x)))


def sound(network, logits):
    return logits if network.training else logits.sigmoid()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    handlers = get_logger().handlers[:]
    yield
    get_logger().handlers[:] = handlers  # without the log files of runs


@pytest.fixture
def network(monkeypatch):
    """Have `src` export a network `tiny`, whose outputs are those that a function makes."""

    def export(ends=sound, make=None):
        monkeypatch.setattr(src, "__all__", [*src.__all__, "tiny"])
        made = make or (lambda out_ch=1: Tiny(out_ch, ends))
        monkeypatch.setattr(src, "tiny", made, raising=False)

    export()
    return export


def start(*options):
    args = train.parse_args([*TINY, *options])
    init_distributed_mode(args)
    train.main(args)


def refused(*options, error=UserError):
    """The message with which a training is refused; no run folder may be left."""
    with pytest.raises(error) as caught:
        start(*options)
    assert not Path("runs").exists()
    return str(caught.value)


def test_nothing_changes_by_it(network):
    """Batch norm's statistics, modes, gradients, hooks and random generators are as before."""
    task = build_task(saliency, {"data": {"image_size": 32, "train_size": 1, "val_size": 1}})
    model = Tiny(ends=sound)
    model.body.eval()
    loaders = [eval_loader(data, 1, 0, CPU) for data in task.build_datasets()]
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    drawn = torch.get_rng_state(), random.getstate()
    optimizers = {"model": torch.optim.AdamW(model.parameters())}
    dry_run(task, {"model": model}, optimizers, *loaders, CPU)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and not model._forward_hooks
    assert all(p.grad is None for p in model.parameters()) and not optimizers["model"].state
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]


def test_parameters_that_no_loss_depends_on_are_warned_of(network, logged):
    """On one process they would never be trained, without a word."""

    def make(out_ch=1):
        model = Tiny(out_ch, sound)
        model.forgotten = nn.Conv2d(4, 1, 1)
        return model

    network(make=make)
    start("--epochs", "1")
    (warning,) = [line for line in logged if line.startswith("warning: ")]
    assert "model.forgotten.weight, model.forgotten.bias: no loss depends on these" in warning
    assert "5 parameters are never trained" in warning


# -- networks -------------------------------------------------------------------------------------


def test_probabilities_in_training_are_refused(network):
    network(lambda network, logits: logits.sigmoid())
    message = refused()
    assert "tiny returns the same in training as in evaluation" in message
    assert "logits [B, 1, H, W], or a list of them, in training" in message


def test_logits_in_evaluation_are_refused_also_where_they_look_like_probabilities(network):
    network(lambda network, logits: 0.5 + 1e-3 * logits)
    assert "tiny returns the same in training as in evaluation" in refused()


def test_softmax_in_training_is_refused(network):
    network(lambda network, logits: logits.softmax(1))
    message = refused(*UNET)
    assert "tiny returns probabilities" in message and "logits [B, 6, h, w]" in message


@pytest.mark.parametrize("start_from", [None, nn.init.zeros_, lambda p: nn.init.constant_(p, 0.1)])
def test_untrained_networks_are_taken_whatever_their_logits(start_from):
    """Also where all lie in [0, 1]: with weights of 0, logits are 0 and probabilities a half."""
    batch = torch.zeros(1, 3, 40, 40), torch.zeros(1, 1, 40, 40)
    tasks = [build_task(saliency, {})]
    for name in ("unet", "unet_vgg16", "fcn", "fcn32s"):
        model = {"name": name, "channels": 2}
        tasks.append(build_task(segmentation, {"data": CLASSES, "model": model}))
    for task in tasks:
        models = task.build_models()
        for parameter in models["model"].parameters() if start_from else []:
            start_from(parameter)
        task.check_models(copies_to_try(models), batch)


def test_outputs_of_another_form_are_taken_where_losses_and_predict_take_them(network, monkeypatch):
    network(lambda net, logits: {"out": logits[..., ::2, ::2] if net.training else logits})
    loss = lambda task, models, batch: {  # noqa: E731
        "mine": models["model"](task.normalize(batch[0]))["out"].square().mean()
    }
    predict = lambda task, models, x: models["model"](task.normalize(x))["out"].sigmoid()  # noqa: E731
    monkeypatch.setattr(saliency.Task, "losses", loss)
    monkeypatch.setattr(saliency.Task, "predict", predict)
    start("--epochs", "1", "--set", "data.train_size=2", "--set", "data.val_size=1")


@pytest.mark.parametrize(
    ("output", "described"),
    [
        (lambda logits: [logits, logits], "a list of 2 (float32 [1, 1, 32, 32], …) in evaluation"),
        (lambda logits: {"out": logits}, "a dict of 1 (out: float32 [1, 1, 32, 32]) in evaluation"),
    ],
)
def test_what_is_no_tensor_in_evaluation_is_named(output, described, network):
    network(lambda network, logits: logits if network.training else output(logits.sigmoid()))
    message = refused()
    assert f"model (Tiny) returns {described}" in message
    assert "probabilities [B, 1, h, w]" in message


def test_a_dict_in_training_is_named(network):
    network(lambda net, logits: {"out": logits} if net.training else logits.sigmoid())
    assert "model (Tiny) returns a dict of 1 (out: float32 [1, 1, 29, 29]) in training" in refused()


def test_other_errors_keep_their_trace_and_what_was_tried_is_logged(network, monkeypatch, logged):
    monkeypatch.setattr(saliency.Task, "losses", lambda task, models, batch: batch.images)
    assert "no attribute 'images'" in refused(error=AttributeError)
    assert any("saliency: trying losses on scene 0" in line for line in logged)


def test_channels_and_ranges_that_metrics_do_not_take_are_named(network):
    network(lambda net, logits: logits if net.training else logits.sigmoid().expand(-1, 3, -1, -1))
    message = refused()
    assert "MAE" in message and "[3, 32, 32]" in message and "probabilities" in message
    network(lambda net, logits: logits.sigmoid() if net.training else logits * 0 + 5)
    message = refused()
    assert "MAE" in message and "from 5 to 5" in message and "outside [0, 1]" in message


@pytest.mark.parametrize("config", [[], UNET])
def test_networks_that_take_other_arguments_are_named(config, network):
    network(make=lambda: Tiny())
    message = refused(*config)
    assert "src.tiny() cannot be called with" in message and "Have it take" in message
    network(make=lambda *args, **options: None)
    assert "src.tiny() returns None" in refused(*config)


def test_a_network_that_cannot_freeze_is_named(network):
    torch.save({"weight": torch.zeros(1)}, "some.pth")
    options = ("--set", "model.freeze_backbone=true", "--weights", "some.pth")
    assert "tiny has no freeze_backbone()" in refused(*UNET, *options)


# -- losses and metrics ---------------------------------------------------------------------------


def with_losses(monkeypatch, function):
    """Saliency's losses with what `function` makes of them."""
    losses = saliency.Task.losses
    changed = lambda task, models, batch: function(losses(task, models, batch))  # noqa: E731
    monkeypatch.setattr(saliency.Task, "losses", changed)


def test_a_line_names_what_is_trained_and_what_is_only_logged(network, monkeypatch, logged):
    with_losses(
        monkeypatch,
        lambda given: given | {"mine": 2 * given["bce"], "shown": given["bce"].detach(), "n": 3},
    )
    start("--epochs", "1")
    line = "losses: model is trained on bce + mine; only logged: shown, n"
    assert line in logged


def test_losses_of_which_none_is_trained_are_refused(network, monkeypatch):
    with_losses(monkeypatch, lambda given: {"bce": given["bce"].detach()})
    assert "no loss has a gradient (bce)" in refused()


def test_weights_of_losses_that_there_are_not_are_refused(network, monkeypatch):
    monkeypatch.setattr(saliency.Task, "weight", lambda task, batch: {"bec": 3.0}, raising=False)
    message = refused()
    assert "weight: 'bec'" in message and "none of the losses, bce" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda given: [given["bce"]], "losses: yields float32 []"),
        (lambda given: given["bce"], "losses: float32 []"),
        (lambda given: iter([("net", given)]), "losses: yields ('net', a dict of 1"),
        (lambda given: iter([given]), "losses: yields a dict"),
    ],
)
def test_losses_of_another_form_are_refused(given, message, network, monkeypatch):
    with_losses(monkeypatch, given)
    assert message in refused()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, t: (p - t).abs(), "returned float64 [32, 32]"),
        (lambda p, t: (p - t).mean(0), "returned float64 [32]"),
        (lambda p, t: None, "returned None"),
        (lambda p, t: (p - p).sum() / 0, "scene 1000000 (seed 0) has values not"),
        (lambda p, t: p.sum() * 1e9, "a function's number not finite or beyond ±10⁶"),
    ],
)
def test_functions_that_give_no_number_are_named(function, message, network, monkeypatch):
    metrics = lambda task: (MeanAbsoluteError(), ImageMean("Mine", function))  # noqa: E731
    monkeypatch.setattr(saliency.Task, "make_metrics", metrics)
    found = refused("--set", "train.best=MAE")
    assert "Mine" in found and message in found


@pytest.mark.parametrize("given", [MeanAbsoluteError(), [MeanAbsoluteError], None])
def test_what_is_no_tuple_of_metrics_is_refused(given, network, monkeypatch):
    monkeypatch.setattr(saliency.Task, "make_metrics", lambda task: given)
    message = refused()
    assert message.startswith("make_metrics: ") and "Return a tuple of metrics" in message


def test_pictures_are_tried(network, monkeypatch):
    row = lambda task, sample: [sample.image.expand(2, -1, -1, -1)]  # noqa: E731
    monkeypatch.setattr(saliency.Task, "sheet_row", row)
    refused(error=(RuntimeError, ValueError))


def test_images_without_a_score_are_counted():
    metric = ImageMean("Mine", lambda p, t: t.sum() / t.sum())
    metric.update(torch.zeros(2, 4, 4), torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]))
    (remark,) = all_remarks([metric])
    assert remark.startswith("Mine: 1 of 2 images have values not finite")


def test_saliency_without_maxf1_has_no_curves(network, monkeypatch):
    monkeypatch.setattr(saliency.Task, "make_metrics", lambda task: (MeanAbsoluteError(),))
    start("--set", "train.best=MAE", "--epochs", "1")


# -- tasks ----------------------------------------------------------------------------------------


def test_what_a_task_does_not_define_is_named(network, monkeypatch):
    for name in ("build_models", "losses", "predict", "make_metrics", "build_datasets"):
        with monkeypatch.context() as patch:
            patch.setattr(saliency.Task, name, getattr(BaseTask, name))
            message = refused()
        assert f"tasks/saliency: Task defines no {name}()" in message
        assert "docs/architecture.md" in message
    monkeypatch.setattr(saliency.Task, "METRICS", {})
    assert "tasks/saliency: Task defines no METRICS" in refused()


# -- optimizers and schedules ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda model: torch.optim.SGD(model.parameters(), 0.1), "optimizers: a SGD"),
        (lambda model: {}, "optimizers: an empty dict"),
        (
            lambda model: {"net": torch.optim.SGD(model.parameters(), 0.1)},
            "optimizers: 'net' is none of the networks, model",
        ),
        (lambda model: {"model": model}, "optimizers: 'model' is a Tiny"),
        (
            lambda model: {"model": torch.optim.LBFGS(model.parameters())},
            "LBFGS.step() needs a closure",
        ),
    ],
)
def test_optimizers_of_another_form_are_refused(made, message, network, monkeypatch):
    build = lambda task, models: made(models["model"])  # noqa: E731
    monkeypatch.setattr(saliency.Task, "build_optimizers", build)
    assert message in refused()


def test_optimizers_of_torch_are_taken():
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    for name in ("SGD", "AdamW", "Adafactor", "RMSprop", "Rprop", "NAdam"):
        check_optimizers({"model": getattr(torch.optim, name)(parameters)}, ["model"])


def test_schedules_of_another_kind_are_named():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(UserError, match="'model' is a StepLR"):
        describe_schedules({"model": schedule}, 3)


# -- datasets -------------------------------------------------------------------------------------


class Own(Dataset):
    """Items of one's own, the first ones sound."""

    def __init__(self, *items, sound=0):
        self.items = [(zeros(3), zeros(1) + 255)] * sound + list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def zeros(channels, side=8, dtype=torch.uint8):
    return torch.zeros(channels, side, side, dtype=dtype)


def task_of(labels):
    return build_task(segmentation, {"data": CLASSES}) if labels else build_task(saliency, {})


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    ("item", "message"),
    [
        (zeros(3), "is uint8 [3, 8, 8]"),
        (Image.new("RGB", (8, 8)), "is an Image. "),
        ({"image": zeros(3), "mask": zeros(1)}, "is a dict of 2 (image: uint8 [3, 8, 8], …)"),
        ((zeros(3),), "is a tuple of 1"),
        ((zeros(3), zeros(1), "a name"), "part 3"),
        ((zeros(3), zeros(1), {"a": 1}), "part 3"),
        (("a.jpg", zeros(1)), "part 1"),
        ((zeros(3), None), "part 2"),
    ],
)
def test_items_that_are_no_pair_are_named(labels, item, message):
    with pytest.raises(UserError) as caught:
        wrap_dataset(Own(item, sound=2), task_of(labels), training=True)
    assert "Own, sample 2" in str(caught.value) and message in str(caught.value)


FLOATS = {"dtype": torch.float32}


@pytest.mark.parametrize(
    ("labels", "target", "message"),
    [
        (False, zeros(1, **FLOATS) + 7.5, "from 7.5 to 7.5"),
        (False, zeros(1, **FLOATS) + 255, "from 255 to 255"),
        (False, zeros(1, **FLOATS) - 1, "from -1 to -1"),
        (False, zeros(1, **FLOATS) / 0, "from nan to nan"),
        (False, zeros(1, side=4), "4×4 pixels, and its image 8×8"),
        (True, zeros(1) + 2, "label 2: classes are 0 to 1"),
        (True, np.full((8, 8), 254), "label 254"),
        (True, np.zeros((4, 4), dtype=np.int64), "4×4 pixels, and its image 8×8"),
    ],
)
def test_targets_that_a_task_does_not_take_are_named(labels, target, message):
    with pytest.raises(UserError) as caught:
        wrap_dataset(Own((zeros(3), target), sound=1), task_of(labels), training=True)
    assert "Own, sample 1: " in str(caught.value) and message in str(caught.value)


def test_labels_of_16_bits_are_taken():
    labels = np.eye(8, dtype=np.uint16)
    wrapped = wrap_dataset(Own((zeros(3), labels)), task_of(True), training=True)
    assert torch.equal(wrapped[0][1], torch.eye(8, dtype=torch.uint8)[None])


def test_float_images_are_taken_as_they_are_and_a_line_says_so(logged):
    wrap_dataset(Own((zeros(3) + 200.0, zeros(1) + 255)), task_of(False), training=True)
    assert any("float images are taken as they are" in x and "200 to 200" in x for x in logged)


def test_targets_of_validation_keep_their_own_size():
    wrapped = wrap_dataset(Own((zeros(3), zeros(1, side=16) + 255)), task_of(False), training=False)
    assert wrapped[0][1].shape == (1, 16, 16)


def test_an_own_dataset_goes_to_workers_and_may_have_a_name_that_is_text():
    own = Own((zeros(3), None), sound=1)
    wrapped = pickle.loads(pickle.dumps(wrap_dataset(Subset(own, [0]), task_of(False), True)))
    wrapped.dataset.dataset.name = "Own"
    wrapped.dataset.indices = [1]
    with pytest.raises(UserError, match="sample 1, part 2"):
        wrapped[0]


def test_a_notice_about_own_datasets_comes_once(network, monkeypatch, logged):
    pair = Own(*[(zeros(3, 48), zeros(1, 48) + 255)] * 4)
    monkeypatch.setattr(saliency.Task, "build_datasets", lambda task: (pair, pair))
    start("--epochs", "1")
    assert sum("a dataset of your own" in line for line in logged) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.long(), "part 1 of the item is int64 [3, 29, 29]"),
        (lambda image: Image.new("RGB", (28, 28)), "part 1 of the item is an Image"),
        (lambda image: image.numpy(), "part 1 of the item is a numpy array, uint8 [3, 29, 29]"),
    ],
)
def test_what_an_augmentation_may_not_return_is_named(change, message, network, monkeypatch):
    augment = SaliencyTrain.augment

    def changed(transform, image, mask):
        image, mask = augment(transform, image, mask)
        return change(image), mask

    monkeypatch.setattr(SaliencyTrain, "augment", changed)
    message_found = refused()
    assert "scene 0 (seed 0): " in message_found and message in message_found


def test_batches_of_two_types_are_refused():
    """An augmentation that returns floats now and then: torch would make floats of all."""
    items = [(zeros(3), zeros(1)), (zeros(3).float(), zeros(1))]
    with pytest.raises(UserError, match=r"torch\.float32 and torch\.uint8"):
        collate([KeyedDataset(Own(*items), 0)[SampleKey(0, index)] for index in range(2)])
