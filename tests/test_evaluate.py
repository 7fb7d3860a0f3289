"""Evaluation: the same bits however the samples are shared out over threads and batches."""

import copy
import json
import sys
import threading

import pytest
import torch
from test_folding import with_random_statistics
from test_parity import narrow_u2net
from torch import nn

import src
import tasks
import train
import train_utils.run
import validation
from my_dataset import ShapesDataset
from src import u2net_lite
from train_utils import evaluate, init_distributed_mode
from train_utils.config import dump_yaml, to_dict
from train_utils.data import eval_loader
from train_utils.device import tf32
from train_utils.folding import folded
from train_utils.inference import chunk_size, forward_chunk, in_order, prepare
from train_utils.metrics import all_scores
from train_utils.train_and_eval import predict_samples
from transforms import SaliencyEval

CPU = torch.device("cpu")
GPU = torch.device("cuda")  # as a name only: no test here needs one
BF16 = torch.bfloat16


@pytest.fixture
def threads():
    """Set the number of threads for a test and put it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def states(model, dataset, batch_size, amp_dtype=None):
    loader = eval_loader(dataset, batch_size, 0, CPU)
    metrics = evaluate(model, loader, CPU, amp_dtype=amp_dtype)
    return [metric.state.tolist() for metric in metrics]


@pytest.mark.slow
def test_threads_and_batch_sizes_change_no_bit(threads):
    torch.manual_seed(0)
    model = u2net_lite()
    dataset = ShapesDataset(80, 0, 7, transforms=SaliencyEval(64))
    threads(1)
    expected = states(model, dataset, 1)
    assert expected[0][0] == 7
    for count, batch_size in [(1, 3), (2, 1), (3, 7), (2, 100)]:
        threads(count)
        assert states(model, dataset, batch_size) == expected
        assert torch.get_num_threads() == count  # put back after the pool


def test_training_mode_is_left_as_it_was_and_samples_are_kept_in_order():
    model = u2net_lite().train()
    model.encoder["2"].eval()
    dataset = ShapesDataset(48, 0, 5, transforms=SaliencyEval(32))
    kept = []
    evaluate(model, eval_loader(dataset, 2, 0, CPU), CPU, keep=3, samples=kept)
    assert model.training
    assert not model.encoder["2"].training  # frozen by the user
    assert len(kept) == 3
    for sample, (image, mask) in zip(kept, dataset, strict=False):
        assert torch.equal(sample.image, image)
        assert torch.equal(sample.target, mask)
        assert sample.prediction.shape == (1, 32, 32)


def test_no_samples_give_nan_and_no_crash():
    metrics = evaluate(nn.Identity(), [], CPU)
    assert [metric.count for metric in metrics] == [0, 0]
    assert all(metric.compute() != metric.compute() for metric in metrics)


def test_no_algorithms_are_tried_out_for_sizes_that_may_not_come_again(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = list(in_order(lambda _: torch.backends.cudnn.benchmark, range(2), GPU))
    assert found == [False, False]
    assert torch.backends.cudnn.benchmark  # training's fixed size is worth it


def test_jobs_come_back_in_order_and_errors_are_raised(threads):
    threads(3)
    assert list(in_order(lambda x: x * x, range(20), CPU)) == [x * x for x in range(20)]

    def fail(x):
        if x == 7:
            raise OSError("seven")
        return x

    with pytest.raises(OSError, match="seven"):
        list(in_order(fail, range(20), CPU))
    assert torch.get_num_threads() == 3


def test_what_the_host_finishes_leaves_the_device_s_thread(threads):
    threads(1)
    here, others = threading.get_ident(), set()

    def job(x):
        assert threading.get_ident() == here
        assert torch.is_inference_mode_enabled()
        return x * x

    def finish(x):
        others.add(threading.get_ident())
        assert torch.is_inference_mode_enabled()
        return -x

    assert list(in_order(job, range(20), GPU, finish)) == [-x * x for x in range(20)]
    assert here not in others
    job = torch.square  # on CPUs both are done on one of the threads
    assert list(in_order(job, torch.arange(3), CPU, finish)) == [0, -1, -4]


def scene_of(side, number):
    """An image and a mask whose every pixel is `number`."""
    shapes = (3, side, side), (1, 4, 4)
    return tuple(torch.full(shape, number, dtype=torch.uint8) for shape in shapes)


@pytest.fixture
def in_chunks_of(monkeypatch):
    """Set how many images of one size go through a network together, as on a GPU."""

    def set_size(size):
        for module in list(sys.modules.values()):
            if getattr(module, "chunk_size", None) is chunk_size:
                monkeypatch.setattr(module, "chunk_size", lambda device, image: size)

    return set_size


def evaluated(sides, keep=0):
    """The shape of every forward pass over images of these sizes, how many images had been loaded
    by then, and the samples that were kept; checks that all images were scored."""
    forwards, loaded, kept = [], 0, []

    def load():
        nonlocal loaded
        for number, side in enumerate(sides):
            loaded += 1
            yield list(zip(scene_of(side, number)))

    def predict(models, images):
        forwards.append((tuple(images.shape), loaded))
        return images[:, :1].float() / 255

    metrics = evaluate(nn.Identity(), load(), CPU, predict=predict, keep=keep, samples=kept)
    assert [metric.count for metric in metrics] == [len(sides)] * 2
    return forwards, kept


def test_images_of_one_size_go_together_though_others_come_between(in_chunks_of, threads):
    threads(1)
    in_chunks_of(3)
    forwards, _ = evaluated([8, 9] * 5)
    shapes = sorted(shape for shape, _ in forwards)
    assert shapes == [(3, 3, 8, 8)] * 2 + [(3, 3, 9, 9)] * 2  # the last ones are filled up


def test_few_images_wait_for_others_of_their_size(in_chunks_of, threads):
    threads(1)
    in_chunks_of(8)
    forwards, _ = evaluated(list(range(8, 108)))  # 100 images of 100 sizes
    assert [shape[0] for shape, _ in forwards] == [8] * 100
    assert all(loaded - done <= 72 for done, (_, loaded) in enumerate(forwards))


def test_samples_are_kept_in_order_though_chunks_overtake_each_other(in_chunks_of):
    in_chunks_of(3)
    sides = (8, 9, 9, 8, 9, 8, 8)
    _, kept = evaluated(sides, keep=4)
    assert len(kept) == 4
    for number, sample in enumerate(kept):
        image, target = scene_of(sides[number], number)
        assert torch.equal(sample.image, image)
        assert torch.equal(sample.target, target)
        assert torch.equal(sample.prediction, image[:1].float() / 255)


@pytest.mark.parametrize(
    "build",
    [
        narrow_u2net,
        lambda: src.fcn(3, 4, batch_norm=True),
        lambda: src.deep_matting(4),
        lambda: src.UNetGenerator(channels=4, levels=4),
    ],
)
def test_networks_prepared_for_bf16_give_what_autocast_gives(build):
    """Though their weights are cast once, and some layers leave autocast."""
    torch.manual_seed(0)
    model = with_random_statistics(build())
    channels = next(model.parameters()).shape[1]
    images = torch.rand(2, channels, 40, 36).to(memory_format=torch.channels_last)
    usual = folded(model).to(memory_format=torch.channels_last)
    prepared = prepare({"model": model}, CPU, BF16)["model"]
    with torch.inference_mode():
        with torch.autocast("cpu", BF16):
            expected = usual(images)
        (found,) = in_order(prepared, [images], CPU)  # on a thread outside of autocast
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert not torch.equal(found, usual(images))
        assert torch.equal(prepare({"model": model}, CPU, None)["model"](images), usual(images))


def test_bf16_depends_on_threads_and_batches_as_little(threads):
    torch.manual_seed(0)
    model = with_random_statistics(narrow_u2net())
    dataset = ShapesDataset(48, 0, 5, transforms=SaliencyEval(40))
    threads(1)
    expected = states(model, dataset, 1, BF16)
    assert expected != states(model, dataset, 1)
    threads(2)
    assert states(model, dataset, 3, BF16) == expected


def test_every_evaluation_takes_the_present_weights():
    torch.manual_seed(0)
    model = with_random_statistics(narrow_u2net()).train()
    dataset = ShapesDataset(48, 0, 2, transforms=SaliencyEval(40))
    before = states(model, dataset, 1)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.encoder["1"].conv_in.bn.bias += 1
    assert states(model, dataset, 1) != before
    model.load_state_dict(state)
    assert states(model, dataset, 1) == before


def test_the_scripts_evaluate_in_the_precision_asked_for(tmp_path, capsys):
    values = {"task": "segmentation", "model": {"name": "unet", "channels": 4}}
    values["data"] = {"image_size": 40, "val_size": 2}
    task = tasks.read_config(values, "test", {})
    cfg = task.cfg
    torch.manual_seed(0)
    models = task.build_models()
    weights = str(tmp_path / "ours.pth")
    state = models["model"].state_dict()
    torch.save({"model": state, "args": to_dict(cfg), "next_epoch": 1}, weights)
    dump_yaml(to_dict(cfg), tmp_path / "recipe.yaml")
    loader, predict = eval_loader(task.build_val_dataset(), 2, 0, CPU), task.predict
    scores = []
    for mode, dtype in (("bf16", BF16), ("off", None)):
        metrics = task.make_metrics()
        evaluate(models, loader, CPU, metrics=metrics, predict=predict, amp_dtype=dtype)
        expected = all_scores(metrics)
        options = ["--weights", weights, "--device", "cpu", "-j0", "--set", f"eval.amp={mode}"]
        file = tmp_path / f"{mode}.json"
        run(validation, [*options, "--json", str(file)])
        found = json.loads(file.read_text())
        assert {name: found[name] for name in expected} == expected
        capsys.readouterr()
        run(train, [*options, "--config", str(tmp_path / "recipe.yaml"), "--test-only"])
        printed = capsys.readouterr().out
        assert all(f"{name}: {value:.5f}" in printed for name, value in expected.items())
        scores.append(expected)
    assert scores[0] != scores[1]


def run(script, argv):
    """What `python script argv` does, in this process."""
    args = script.parse_args(argv)
    init_distributed_mode(args)
    script.main(args)


def test_the_scripts_evaluate_in_tf32_where_asked_for(monkeypatch):
    asked, backends = [], torch.backends

    def evaluate(*args, amp_dtype, metrics, **rest):
        asked.append((amp_dtype, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32))
        return metrics

    for module in (train_utils.run, validation):
        monkeypatch.setattr(module, "evaluate", evaluate)
    model = {"model": narrow_u2net()}
    for mode, allowed in (("bf16", True), ("off", False)):
        data = {"val_size": 1, "image_size": 40}
        config = {"task": "saliency", "eval": {"amp": mode, "tf32": allowed}, "data": data}
        task = tasks.read_config(config, "test", {})
        monkeypatch.setattr(tasks, "load_models", lambda *a, loaded=(task, model): loaded)
        args = validation.parse_args(["--weights", "any.pth", "-j0", "--device", "cpu"])
        args.rank, args.world_size, args.local_world_size = 0, 1, 1
        with tf32(True):
            train_utils.run.evaluate_task(task, model, [], CPU)
            assert backends.cudnn.allow_tf32 and backends.cuda.matmul.allow_tf32  # as in training
            validation.score_weights(args)
    assert asked == [(BF16, True, True)] * 2 + [(None, False, False)] * 2


def test_pictures_show_what_was_scored():
    torch.manual_seed(0)
    model = {"model": with_random_statistics(narrow_u2net())}
    task = tasks.read_config({"task": "saliency"}, "test", {})
    predict = task.predict
    dataset = ShapesDataset(48, 0, 2, transforms=SaliencyEval(40))
    for amp_dtype in (None, BF16):
        kept = []
        loader = eval_loader(dataset, 2, 0, CPU)
        evaluate(model, loader, CPU, predict=predict, keep=2, samples=kept, amp_dtype=amp_dtype)
        drawn = predict_samples(model, list(dataset), CPU, predict, amp_dtype)
        for scored, shown in zip(kept, drawn, strict=True):
            assert torch.equal(scored.prediction, shown.prediction)


def test_gpu_chunks_depend_on_the_size_of_the_images_only():
    for side, expected in ((64, 16), (362, 16), (512, 8), (1024, 2), (3000, 1)):
        assert chunk_size(GPU, torch.empty(4, side, side, device="meta")) == expected
    assert chunk_size(CPU, torch.empty(3, 8, 8)) == 1
    seen = []
    for image in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 1500, 1500)):
        output = forward_chunk(lambda x: seen.append(len(x)) or x, image, GPU)
        assert len(output) == 1
    assert seen == [16, 1]  # one large image goes alone


class LooksAtItsLayers(nn.Module):
    """Asks its convolutions for what they are, as networks may."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 2, 3, padding=1), nn.ConvTranspose2d(2, 1, 2, stride=2)

    def forward(self, x):
        for layer in (self.conv, self.up):
            assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.stride
            x = layer(x) + 0 * layer.bias.sum()
        return x


def test_convolutions_in_low_precision_stay_what_they_are():
    torch.manual_seed(0)
    network, images = LooksAtItsLayers().eval(), torch.rand(1, 3, 8, 8)
    expected = network(images)
    prepared = prepare({"model": network}, torch.device("cpu"), torch.bfloat16)["model"]
    assert torch.allclose(prepared(images).float(), expected, atol=0.02)
    assert not torch.equal(prepared(images).float(), expected)
    assert network.state_dict().keys() == LooksAtItsLayers().state_dict().keys()
