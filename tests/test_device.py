"""What differs by device, on pretended devices: which is chosen, what falls away, what is refused.

Nothing here has a GPU. Tensors on other devices are torch's fake ones, which have no values.
"""

import re
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import REPO
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_utils.device
from src.layers import resize
from train_utils import evaluate, init_distributed_mode
from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.data import eval_loader
from train_utils.device import Feature, fp64_device, refuse_shared_device, resolve_device
from train_utils.errors import UserError
from train_utils.folding import folded
from train_utils.inference import prepare
from train_utils.metric_logger import MetricLogger, peak_memory_mb
from train_utils.metrics import F1Score, MeanAbsoluteError
from train_utils.normalize import normalize_images
from train_utils.setup import place_models, worker_count, wrap_models

MPS, XPU, CUDA = (torch.device(kind, 0) for kind in ("mps", "xpu", "cuda"))
LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
)
BINDINGS = ("SLURM_GPUS_PER_TASK", "CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*LAUNCHERS, *BINDINGS, "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def intel(monkeypatch, **properties):
    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda device=None: SimpleNamespace(**properties)
    )
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)


# -- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "asked", "expected"),
    [
        (("mps", 1), ("auto", 0, 1), "mps:0"),
        (("mps", 1), ("mps", 0, 1), "mps:0"),
        (("mps", 1), ("cpu", 1, 4), "cpu"),
        (("xpu", 2), ("auto", 1, 2), "xpu:1"),
        (("xpu", 2), ("xpu:1", 0, 1), "xpu:1"),
        (("cuda", 8), ("cuda", 7, 8), "cuda:7"),
        (("mtia", 2), ("auto", 1, 2), "mtia:1"),
        ((None, 0), ("auto", 3, 4), "cpu"),
    ],
)
def test_a_device_for_each_process(accelerator, monkeypatch, there, asked, expected):
    if there[0] == "mtia":  # torch gives it no backend; a package of the maker's does
        monkeypatch.setitem(dist.Backend.default_device_backend_map, "mtia", "hccl")
    accelerator(*there)
    assert str(resolve_device(*asked)) == expected


@pytest.mark.parametrize(
    ("there", "asked", "message"),
    [
        ((None, 0), ("mps", 0, 1), "--device mps: torch sees no GPU. Use --device cpu"),
        (
            ("cuda", 2),
            ("xpu", 0, 1),
            "--device xpu: torch sees cuda. Use --device cuda, or install",
        ),
        (("xpu", 2), ("xpu:2", 0, 1), r"this node has 2 GPU\(s\), numbered from 0"),
        (("xpu", 2), ("auto", 3, 4), r"4 processes on this node but 2 GPU\(s\).*nproc_per_node=2"),
        (("mps", 1), ("auto", 1, 2), "--device mps: torch has no collectives for it.*--device cpu"),
        (("mps", 1), ("gpu", 0, 1), "--device gpu: no such device. Use auto, cpu"),
        (("mps", 1), ("cpu:1", 0, 1), "--device cpu:1: no such device"),
    ],
)
def test_what_is_not_there_is_refused(accelerator, there, asked, message):
    accelerator(*there)
    with pytest.raises(UserError, match=message):
        resolve_device(*asked)


def test_a_single_process_on_a_mac(accelerator, capsys):
    chosen, args = accelerator("mps"), Namespace(device="auto")
    init_distributed_mode(args)
    assert (args.device, args.distributed, args.dist_backend) == ("mps:0", False, None)
    assert chosen == [0]
    assert capsys.readouterr().out == ""  # what nobody asked for is not missed


def test_processes_on_several_macs_are_refused(accelerator, monkeypatch):
    accelerator("mps")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():  # one on each machine
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--device mps: torch has no collectives for it"):
        init_distributed_mode(Namespace(device="mps"))


# -- launchers that show each process a device of its own -----------------------------------------


@pytest.mark.parametrize(
    ("environment", "count", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": "3"}, 1, 0),  # by hand, mpirun, jsrun, torchrun's virtual ranks
        ({"ROCR_VISIBLE_DEVICES": "3"}, 1, 0),
        ({"SLURM_GPUS_PER_TASK": "1"}, 1, 0),
        ({"SLURM_GPUS_PER_TASK": "2"}, 2, 0),
        ({"SLURM_GPUS_PER_TASK": "1"}, 4, 3),  # with --gpu-bind=none all tasks see all of them
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 4, 3),
        ({}, 1, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2, None),
        ({"SLURM_GPUS_PER_TASK": "2", "LOCAL_RANK": "3"}, 2, None),  # torchrun within a task
    ],
)
def test_four_processes_with_devices_of_their_own(
    accelerator, monkeypatch, environment, count, expected
):
    accelerator("cuda", count)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(UserError, match=rf"4 processes on this node but {count} GPU"):
            resolve_device("auto", 3, 4)
    else:
        assert resolve_device("auto", 3, 4) == torch.device("cuda", expected)


class Ranks:
    """Threads that meet at a store as processes do, each seeing a GPU with an id of its own."""

    def __init__(self, monkeypatch, ids):
        self.ids, self.own = ids, threading.local()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        monkeypatch.setattr(torch.cuda, "get_device_properties", self.properties)

    def properties(self, device):
        return SimpleNamespace(uuid=self.ids[self.own.rank])

    def meet(self, rank, on_node=None):
        """What a rank with so many ranks on its node (by default all) is told."""
        self.own.rank = rank
        store = self.store.clone()
        try:
            refuse_shared_device(CUDA, store, rank, len(self.ids), on_node or len(self.ids))
        except UserError as error:
            return str(error)


def test_processes_that_see_the_same_device_are_refused_together(accelerator, monkeypatch):
    """CUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node=2: each has a number 0, of one GPU."""
    accelerator("cuda", 1)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(Ranks(monkeypatch, ["GPU-a", "GPU-b", "GPU-a"]).meet, range(3)))
        assert answers[0] == answers[2]
        assert answers[0].startswith("--device cuda: ranks 0, 2 see one and the same GPU")
        assert answers[1] is None  # ended by its launcher
        for ids in (["GPU-a", "GPU-b", "GPU-c"], ["", "", ""]):  # "": torch does not know
            assert list(pool.map(Ranks(monkeypatch, ids).meet, range(3))) == [None] * 3
        # Two ranks on one node and one on another.
        apart = Ranks(monkeypatch, ["GPU-a", "GPU-b", "GPU-c"])
        assert list(pool.map(apart.meet, range(3), (2, 2, 1))) == [None] * 3
        accelerator("cuda", 3)  # all are seen by all, and each takes another number
        assert list(pool.map(Ranks(monkeypatch, ["GPU-a"] * 3).meet, range(3))) == [None] * 3


@pytest.mark.parametrize("ids", [["GPU-a", "GPU-b"], ["GPU-a", "GPU-a"]])
def test_a_launch_meets_before_the_gpus_do(accelerator, monkeypatch, ids):
    chosen, ranks, joined = accelerator("cuda", 1), Ranks(monkeypatch, ids), {}
    ranks.own.rank = 0
    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**launch, "CUDA_VISIBLE_DEVICES": "5", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    shared = dist.PrefixStore("restart0", ranks.store.clone())
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(ranks.store, 0, 2)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **how: joined.update(how, backend=backend)
    )

    def other():
        ranks.own.rank = 1
        refuse_shared_device(CUDA, shared, 1, 2, 2)

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(other)
        if ids[0] == ids[1]:
            with pytest.raises(UserError, match="ranks 0, 1 see one and the same GPU"):
                init_distributed_mode(Namespace(device="auto"))
            assert isinstance(second.exception(), UserError)
            assert not joined
        else:
            init_distributed_mode(Namespace(device="auto"))
            assert second.exception() is None
            assert (joined["backend"], joined["device_id"]) == ("cpu:gloo,cuda:nccl", CUDA)
    assert chosen == [0]


# -- what falls away ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "backend"), [("xpu", "cpu:gloo,xpu:xccl"), ("cuda", "cpu:gloo,cuda:nccl")]
)
def test_accelerators_have_a_backend_of_their_own(accelerator, kind, backend):
    chosen, args = accelerator(kind, 2), Namespace(device=f"{kind}:1")
    init_distributed_mode(args)
    assert (args.device, args.dist_backend, chosen) == (f"{kind}:1", backend, [1])


def test_precision_by_device(accelerator, monkeypatch, capsys):
    accelerator("xpu")
    intel(monkeypatch, has_fp64=True, has_bfloat16_conversions=True)
    assert choose_amp_dtype("auto", XPU) is torch.bfloat16
    assert choose_amp_dtype("fp16", XPU) is torch.float16
    assert make_scaler(torch.float16, XPU).is_enabled()
    accelerator("mps")
    assert choose_amp_dtype("auto", MPS) is None
    assert choose_amp_dtype("fp16", MPS) is torch.float16
    assert choose_amp_dtype("bf16", MPS) is torch.bfloat16
    assert capsys.readouterr().out == ""
    # GradScaler computes in fp64.
    intel(monkeypatch, has_fp64=False, has_bfloat16_conversions=True)
    for _ in range(2):
        assert choose_amp_dtype("fp16", XPU) is torch.bfloat16
    intel(monkeypatch, has_fp64=False, has_bfloat16_conversions=False)
    assert choose_amp_dtype("fp16", XPU) is None
    line = "xpu has no gradient scaling, which fp16 needs: precision is chosen as by auto\n"
    assert capsys.readouterr().out == line  # once


def test_compilation_and_page_locked_memory_fall_away_on_mps(accelerator, monkeypatch, capsys):
    accelerator("mps")
    network = nn.Linear(1, 1)
    assert wrap_models({"model": network}, MPS, compile=False)["model"] is network
    assert capsys.readouterr().out == ""
    assert wrap_models({"model": network}, MPS, compile=True)["model"] is network
    assert not eval_loader([], 1, 0, MPS).pin_memory
    assert capsys.readouterr().out.splitlines() == [
        "mps has no torch.compile to rely on: the networks run as they are",
        "mps has no page-locked memory: the host waits for copies to and from the device",
    ]
    accelerator("xpu")
    intel(monkeypatch, has_fp64=False)
    assert eval_loader([], 1, 0, XPU).pin_memory
    assert not eval_loader([], 1, 0, torch.device("cpu")).pin_memory
    assert worker_count(None, XPU, 1) == worker_count(None, CUDA, 1) >= 1
    assert capsys.readouterr().out == ""


class NoFp64(TorchDispatchMode):
    """Refuses what mps refuses, and answers 0 where the host reads a fake tensor's value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in function.name():
            return 0.0
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            wide = isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float64
            if wide and tensor.device.type != "cpu":
                raise TypeError(f"{function} in fp64")
        return out


def on(device, module):
    """Its parameters and buffers anew, as fake tensors on a device."""
    for layer in module.modules():
        for name, value in list(layer._parameters.items()):
            layer._parameters[name] = nn.Parameter(torch.ones(value.shape, device=device))
        for name, value in list(layer._buffers.items()):
            layer._buffers[name] = torch.ones(value.shape, device=device)
    return module


def evaluated():
    metrics = (MeanAbsoluteError(), F1Score())
    batch = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 9, 9)

    def predict(models, images):
        return models["model"](images)[:, :1] / 255

    evaluate(nn.Identity(), [batch], CUDA, metrics=metrics, predict=predict)
    return [metric.state for metric in metrics]


def logged():
    logger = MetricLogger()
    logger.update(loss=torch.ones((), device=CUDA))
    logger.flush()
    return []


def folded_on_the_device():
    network = folded(on(CUDA, nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1))))
    assert {(p.device, p.dtype) for p in network.parameters()} == {(CUDA, torch.float32)}
    return []


@pytest.mark.parametrize("work", [evaluated, logged, folded_on_the_device])
def test_nothing_is_computed_in_fp64_where_the_device_has_none(monkeypatch, work):
    """torch fakes tensors with all operations on cuda only, so here that has no fp64."""
    # Fake tensors cannot be copied, as `folded` would.
    monkeypatch.setattr("train_utils.folding.copy", SimpleNamespace(deepcopy=lambda model: model))
    with FakeTensorMode(), NoFp64():
        with pytest.raises(TypeError, match="in fp64"):
            work()
        monkeypatch.setattr(train_utils.device, "has", lambda device, what: what != Feature.FP64)
        assert {state.device.type for state in work()} <= {"cpu"}


def test_networks_train_where_the_device_has_no_fp64():
    """Maps are resized without it; meta goes the ways that are for GPUs."""
    x = torch.zeros(1, 2, 4, 4, device="meta", requires_grad=True)
    with NoFp64():
        resize(x, torch.Size((8, 7))).sum().backward()
    assert x.grad.dtype == torch.float32


def test_the_lack_of_fp64_is_told(accelerator, capsys):
    accelerator("mps")
    assert fp64_device(MPS) == fp64_device(MPS) == torch.device("cpu") != fp64_device(CUDA)
    assert capsys.readouterr().out == (
        "mps has no fp64: what needs it, such as scores, is computed on the CPU\n"
    )


def test_peak_memory_is_the_allocators_where_one_counts(accelerator, monkeypatch):
    accelerator("xpu")
    monkeypatch.setattr(torch.xpu, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    assert peak_memory_mb() == 3
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: False)  # training on the CPU
    assert peak_memory_mb() > 3
    accelerator("mps")
    assert peak_memory_mb() > 3


def test_devices_are_named_in_one_place_only():
    """Design rule: what differs by device is asked of train_utils/device.py."""
    naming = re.compile(
        r"""torch\.(cuda|xpu|mps)\b|\bis_cuda\b|\.cuda\(|["'](cuda|xpu|mps|nccl)["':]"""
    )
    files = [
        *REPO.glob("*.py"),
        *(p for d in ("train_utils", "tasks", "src") for p in sorted((REPO / d).rglob("*.py"))),
    ]
    named = {path.name for path in files if naming.search(Path(path).read_text(encoding="utf-8"))}
    assert named == {"device.py"}


@pytest.mark.parametrize(
    ("capability", "trained"), [("AVX2", torch.contiguous_format), ("AVX512", torch.channels_last)]
)
def test_networks_train_in_the_layout_that_the_cpu_is_fast_in(monkeypatch, capability, trained):
    """Their weights and the images that they are given; evaluation is channels-last on both."""
    device = torch.device("cpu")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    (net,) = place_models({"model": nn.Conv2d(3, 8, 3)}, device, sync_bn=False).values()
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    last = images.contiguous(memory_format=torch.channels_last)
    for codes in (images, last):
        for tensor in (net.weight, normalize_images(codes), net(normalize_images(codes))):
            assert tensor.is_contiguous(memory_format=trained)
    (prepared,) = prepare({"model": net.eval()}, device, None).values()
    with torch.inference_mode():
        for tensor in (prepared.weight, normalize_images(images), prepared(normalize_images(last))):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
