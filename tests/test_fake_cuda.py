"""What a GPU would be asked to do, checked on machines without one (see fake_cuda.py)."""

import logging
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from steps import Noting
from test_parity import narrow_u2net
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

import tasks
from benchmarks.fake_cuda import CPU, CUDA, fake_gpu
from train_utils import evaluate, inference
from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.config import to_dict
from train_utils.data import GlobalBatchSampler
from train_utils.ema import ExponentialMovingAverage
from train_utils.inference import prepare
from train_utils.prediction import Job, Predictor
from train_utils.setup import place_models, seed_everything
from train_utils.threads import in_threads
from train_utils.train_and_eval import StepOptions, train_one_epoch
from train_utils.training_state import TrainingState

SIDE = 32
SMALL = {"image_size": SIDE}
RECIPES: dict[str, dict[str, Any]] = {
    "u2net": {"task": "saliency", "data": SMALL},
    "fcn": {
        "task": "segmentation",
        "data": SMALL,
        "model": {"name": "fcn", "channels": 4, "batch_norm": True},
        "optim": {"name": "sgd"},
    },
    "unet": {
        "task": "segmentation",
        "data": SMALL,
        "model": {"name": "unet", "channels": 8},
        "loss": {"terms": ["ce", "bce", "focal", "dice"], "class_weights": [1.0] * 6},
    },
    "matting": {
        "task": "matting",
        "data": {"image_size": SIDE, "crop_sizes": [SIDE]},
        "model": {"channels": 4},
    },
    "pix2pix": {
        "task": "translation",
        "data": SMALL,
        "model": {"channels": 4, "d_channels": 4, "levels": 4, "norm": "batch"},
    },
}
CHANNELS = {"saliency": (3, 1), "segmentation": (3, 1), "matting": (4, 2), "translation": (3, 3)}
# Every system in every precision; two of them, as recent GPUs run them, are the quick ones.
EVERYTHING = [
    pytest.param(name, amp, marks=() if quick else pytest.mark.slow)
    for name in RECIPES
    for amp in ("off", "bf16", "fp16")
    for quick in [amp == "bf16" and name in ("unet", "pix2pix")]
]


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@dataclass
class System:
    """A system with all that trains it, on a device."""

    task: Any
    cfg: Any
    networks: dict
    optimizers: dict
    schedules: dict
    scalers: dict
    ema: dict
    amp_dtype: torch.dtype | None

    def batch(self, images: int) -> list:
        """A batch as a loader gives it: uint8, in the host's memory."""
        maps = CHANNELS[self.cfg.task]
        if self.cfg.task == "matting":
            maps += (3, 3)  # foreground and background
        return [torch.empty(images, count, SIDE, SIDE, dtype=torch.uint8) for count in maps]

    def train(self, device, images, steps, **hooks):
        """One epoch; every option that the config names is in it."""
        train = self.cfg.train
        options = StepOptions(
            self.amp_dtype,
            accumulate=train.accumulate,
            clip_norm=train.clip_norm,
            clip_value=train.clip_value,
            seed=0,
            ema=self.ema,
            on_nonfinite=train.on_nonfinite,
        )
        train_one_epoch(
            self.networks,
            self.optimizers,
            [self.batch(images) for _ in range(steps * train.accumulate)],
            device,
            0,
            self.schedules,
            1000,  # lines after the first and the last step
            self.scalers,
            losses=self.task.losses,
            weight=lambda batch: 5.0,
            options=options,
            run=Noting(**hooks),
        )


def system(name, device=CUDA, amp="bf16", sync_bn=False, model=None, **train) -> System:
    values = {**RECIPES[name], "train": {"amp": amp, **train}}
    if model:
        values["model"] = {**values.get("model", {}), **model}
    task = tasks.read_config(values, "test", {})
    cfg = task.cfg
    narrow = name == "u2net" and not model
    networks = {"model": narrow_u2net()} if narrow else task.build_models()
    networks = place_models(networks, device, sync_bn)
    optimizers = task.build_optimizers(networks)
    schedules = task.build_schedulers(optimizers, 10)
    amp_dtype, decay = choose_amp_dtype(amp, device), cfg.train.ema
    scalers = {key: make_scaler(amp_dtype, device) for key in optimizers}
    ema = {key: ExponentialMovingAverage(m, decay) for key, m in networks.items() if decay}
    return System(task, cfg, networks, optimizers, schedules, scalers, ema, amp_dtype)


@dataclass
class Step:
    """What one optimizer step had the device do."""

    waits: list
    ops: list

    def count(self, *names):
        return sum(op.name in names for op in self.ops)


def steps(name, images=2, number=2, **options) -> list[Step]:
    """Steps of a training.

    A line, for which the host reads the losses, follows the first one; it counts with the second.
    """
    with fake_gpu() as spy:
        trained = system(name, **options)
        marks = [(len(spy.waits), len(spy.ops))]
        trained.train(
            CUDA,
            images,
            number,
            note=lambda progress: marks.append((len(spy.waits), len(spy.ops))),
        )
    return [
        Step(spy.waits[old[0] : new[0]], spy.ops[old[1] : new[1]]) for old, new in pairwise(marks)
    ]


def described(waits):
    return [str(wait) for wait in waits]


# -- no wait inside a step ------------------------------------------------------------------------

OPTIONS = {"ema": 0.9, "clip_norm": 1.0, "clip_value": 0.5, "accumulate": 2}


def assert_reads_the_line_only(step):
    """The losses of the step before, and whether they were finite, once each."""
    files = [wait.where.partition(":")[0] for wait in step.waits]
    expected = ["train_utils/metric_logger.py", "train_utils/nonfinite.py"]
    assert sorted(files) == expected, described(step.waits)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_does_not_wait_for_the_device(name):
    first, second, third = steps(name, number=3)
    assert described(third.waits) == []
    assert_reads_the_line_only(second)
    # Small constants go up once.
    assert all(wait.what == "copy from the host" for wait in first.waits)
    assert len(first.waits) <= 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "amp"), EVERYTHING)
def test_nor_with_accumulation_clipping_and_a_moving_average(name, amp):
    assert_reads_the_line_only(steps(name, amp=amp, **OPTIONS)[1])


@pytest.mark.parametrize(
    ("name", "amp"),
    [
        ("pix2pix", "bf16"),
        *(pytest.param("fcn", amp, marks=pytest.mark.slow) for amp in ("off", "fp16")),
    ],
)
def test_skipping_bad_steps_looks_once_in_each(name, amp):
    first, second = steps(name, amp=amp, on_nonfinite="skip")
    assert [wait.what for wait in first.waits if "nonfinite" in wait.where] == [
        "a value that the host reads"
    ]
    assert_reads_the_line_only(second)  # the verdict, now of this step


@pytest.mark.slow
@pytest.mark.parametrize("model", ["u2net_lite", "u2net_full", "unet_resnet50"])
def test_large_networks_do_not_wait_either(model):
    name = "u2net" if model.startswith("u2net") else "unet"
    channels = {} if name == "u2net" else {"channels": 64}
    found = steps(name, model={"name": model, **channels})
    assert_reads_the_line_only(found[1])


@pytest.mark.slow
def test_deterministic_kernels_do_not_wait():
    seed_everything(0, deterministic=True)
    try:
        for name in ("unet", "matting"):
            assert_reads_the_line_only(steps(name)[1])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_the_spy_names_every_wait():
    with fake_gpu() as spy:
        x = torch.ones(3, device=CUDA)
        for careless in (
            lambda: float(x.sum()),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x[x > 1],
            lambda: torch.ones(3).to(CUDA),
            lambda: x.nonzero(),
            lambda: bool((x > 1).any()),
        ):
            before = len(spy.waits)
            careless()
            assert len(spy.waits) == before + 1
            assert "tests/test_fake_cuda.py" in spy.waits[-1].where
        count = len(spy.waits)
        torch.ones(3).to(CUDA, non_blocking=True)
        (x * 2 + x.mean()).clamp_(0, 1)
        assert len(spy.waits) == count


def test_tensors_of_two_devices_do_not_mix():
    with fake_gpu(), pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=CUDA) + torch.ones(3)


# -- several processes ----------------------------------------------------------------------------


def on_rank(rank, name, images, number=2, **options) -> list[Step]:
    """Steps of one rank of four; nothing is communicated."""
    dist.init_process_group("cpu:fake,cuda:fake", rank=rank, world_size=4, store=FakeStore())

    def of_all(values):
        return [float(value) * 4 for value in values]

    try:
        with (
            mock.patch("train_utils.train_and_eval.sum_over_ranks", of_all),
            mock.patch("train_utils.nonfinite.sum_over_ranks", of_all),
        ):
            return steps(name, images, number, **options)
    finally:
        dist.destroy_process_group()


COLLECTIVES = {"allreduce_", "allgather_", "_allgather_base_", "broadcast_"}


def collectives(step):
    return [
        (op.name, [(seen.device, seen.dtype, seen.shape) for seen in op.inputs])
        for op in step.ops
        if op.name in COLLECTIVES
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "amp"), EVERYTHING)
def test_synchronised_batch_norm_does_not_wait_and_matches_on_all_ranks(name, amp):
    """The last step of an epoch may leave ranks without an image; rank 0 has one even then."""
    ranks = [
        on_rank(rank, name, images, sync_bn=True, amp=amp)[1] for rank, images in ((0, 2), (3, 0))
    ]
    for step in ranks:
        assert_reads_the_line_only(step)
    full, empty = map(collectives, ranks)
    assert full == empty
    assert len(full) > 10
    # Means of many values: half precision would spoil them.
    assert {dtype for _, inputs in full for _, dtype, _ in inputs} <= {torch.float32, torch.float64}


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "skip"}], ids=str)
def test_every_read_behind_a_collective_is_seen_by_the_hang_watch(options):
    """A collective of GPUs is only queued: the host hangs where it reads what comes of it."""
    _, second = on_rank(1, "unet", images=2, sync_bn=True, **options)
    assert [wait.watched for wait in second.waits] == [True, True]


def test_so_are_those_of_an_evaluation():
    dist.init_process_group("cuda:fake", rank=1, world_size=4, store=FakeStore())
    try:
        with fake_gpu(answer=lambda place: 0.0) as spy:  # nobody asks to stop
            scored = system("unet")
            metrics = scored.task.make_metrics()
            spy.waits.clear()
            evaluate(scored.networks, [], CUDA, metrics=metrics)
    finally:
        dist.destroy_process_group()
    reads = [wait for wait in spy.waits if "copy from" not in wait.what]
    assert len(reads) == 3  # buffers of two dtypes; the scores
    assert all(wait.watched for wait in reads), described(reads)


def test_rank_0_has_images_whenever_any_rank_has():
    """What batch norm over several GPUs starts from."""
    for samples, batch, micro in ((9, 4, 1), (5, 12, 2), (13, 8, None), (1, 6, 1)):
        ranks = [list(GlobalBatchSampler(samples, batch, micro, rank, 3)) for rank in range(3)]
        for parts in zip(*ranks, strict=True):
            assert parts[0][0].real


# -- memory formats and precision -----------------------------------------------------------------


def layouts(name, operation, **options):
    (step,) = steps(name, amp="fp16", number=1, **options)
    return Counter(op.inputs[0].layout for op in step.ops if op.name == operation)


@pytest.mark.parametrize(
    ("name", "model", "others"),
    [
        # What fuses its one-channel maps.
        pytest.param("u2net", {"name": "u2net_lite"}, 1, marks=pytest.mark.slow),
        ("unet", {}, 0),
        ("pix2pix", {"norm": "batch"}, 1),  # the image
        ("fcn", {}, 0),
        ("matting", {}, 0),
        ("pix2pix", {"norm": "instance"}, 1),  # the image
    ],
)
def test_convolutions_see_channels_last(name, model, others):
    found = layouts(name, "convolution", model=model)
    assert found["NHWC"] > 5
    assert found["NCHW"] <= others


@pytest.mark.parametrize("name", ["u2net", "unet"])
def test_maps_are_resized_in_the_precision_of_the_network(name):
    (step,) = steps(name, amp="fp16", number=1)
    inner = [
        op for op in step.ops if op.name == "upsample_bilinear2d" and op.inputs[0].shape[1] > 1
    ]
    assert {op.inputs[0].dtype for op in inner} == {torch.float16}


def test_a_moving_average_takes_few_launches():
    plain, averaged = (steps("unet", number=1, **options)[0] for options in ({}, {"ema": 0.9}))
    assert 0 < len(averaged.ops) - len(plain.ops) <= 4


# -- evaluation and prediction --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_evaluation_reads_nothing_but_the_scores(name):
    """And the pictures that it keeps; of matting, which the host scores, the chunks."""
    here = mock.patch.object(inference, "in_threads", lambda job, items, _: map(job, items))
    scored_at_all = float(name != "matting")  # no value of a fake tensor can be scored there
    with fake_gpu(lambda place: scored_at_all) as spy, here:  # which sees this thread only
        scored = system(name)
        maps = CHANNELS[scored.cfg.task]
        sizes = [(40, 48)] * 9 + [(56, 40)] * 9
        images, targets = (
            [torch.empty(count, *size, dtype=torch.uint8) for size in sizes] for count in maps
        )
        metrics = scored.task.make_metrics()
        spy.waits.clear()
        evaluate(
            scored.networks,
            [(images, targets)],
            CUDA,
            metrics=metrics,
            predict=scored.task.predict,
            keep=1,
            samples=[],
            amp_dtype=scored.amp_dtype,
        )
        inside = [wait for wait in spy.waits if "copy from the host" not in wait.what]
        read = 2 if name == "matting" else 1
        assert len(inside) <= read, described(inside)
        assert len(spy.waits) <= read + len(metrics) + 3, described(spy.waits)  # states, constants
        assert all(metric.state.is_cuda != metric.on_host for metric in metrics)


PREDICTED = [
    ("u2net", {"threshold": 0.5}, ["map", "cutout", "overlay"]),
    ("unet", {}, ["map", "cutout", "overlay"]),
    ("matting", {}, ["map", "cutout"]),
    ("pix2pix", {}, ["map"]),
]


PHOTOGRAPHS = [(50, 40), (40, 50), (50, 40)]


def predicted(folder, name, options, kinds, sizes=PHOTOGRAPHS, before=None):
    """What predict.py makes of photographs of these sizes, on a fake GPU."""
    jobs = []
    for number, size in enumerate(sizes):
        paths = [folder / f"{number}_{what}.png" for what in ("image", "trimap")]
        for path, mode, colour in zip(paths, ("RGB", "L"), ("teal", 128), strict=True):
            Image.new(mode, size, colour).save(path)
        outputs = {kind: folder / f"{number}_{kind}.png" for kind in kinds}
        extras = {"trimap": paths[1]} if name == "matting" else {}
        jobs.append(Job(paths[0], outputs, extras))

    def read(function, job):
        picture = function(job)
        plain = {key: image.as_subclass(torch.Tensor) for key, image in picture.images.items()}
        return replace(picture, images=plain)

    def in_this_thread(function, items, threads):
        # The spy sees this one only. What is read from files keeps its values, and so another one.
        if function.__name__ == "read":
            yield from in_threads(partial(read, function), items, threads)
        else:
            yield from map(function, items)

    with (
        fake_gpu(**({"before": before} if before else {})) as spy,
        mock.patch("train_utils.prediction.in_threads", in_this_thread),
    ):
        trained = system(name)
        networks = prepare(trained.networks, CUDA, trained.amp_dtype)
        predictor = Predictor(trained.task, networks, CUDA, **options)
        return list(predictor.run(jobs)), spy


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "kinds"), PREDICTED)
def test_prediction_runs_from_file_to_file(tmp_path, name, options, kinds):
    pictures, spy = predicted(tmp_path, name, options, kinds)
    assert [picture.error for picture in pictures] == [""] * 3
    assert all(path.exists() for picture in pictures for path in picture.job.outputs.values())
    assert any(op.name == "convolution" and op.inputs[0].device == "cuda" for op in spy.ops)


# -- checkpoints change devices -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fcn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("unet", "pix2pix"))]
)
def test_a_run_goes_on_from_cpu_to_gpu_and_back(name):
    saved = None
    with fake_gpu() as spy:
        for device, amp in ((CPU, "off"), (CUDA, "fp16"), (CUDA, "fp16"), (CPU, "off")):
            trained = system(name, device, amp, ema=0.9)
            state = TrainingState(
                trained.networks,
                trained.optimizers,
                trained.schedules,
                trained.scalers,
                trained.ema,
                to_dict(trained.cfg),
                data="",
                sampler=GlobalBatchSampler(10, 2),
            )
            if saved:
                state.restore(saved, "file")
            parts = [
                value
                for optimizer in trained.optimizers.values()
                for parts in optimizer.state.values()
                for value in parts.values()
            ]
            assert bool(parts) or not saved
            assert {part.device.type for part in parts} <= {device.type}
            spy.ops.clear()
            trained.train(device, images=2, steps=1)
            used = {seen.device for op in spy.ops for seen in op.inputs if op.name == "convolution"}
            assert used == {device.type}
            saved = tree_map(
                lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, state.capture()
            )
