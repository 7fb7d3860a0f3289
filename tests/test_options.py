"""Flags that say how to compute, and what they change."""

import os

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.deep_matting import DeepMatting
from train_utils import train_one_epoch
from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.arguments import parse_args
from train_utils.data import GlobalBatchSampler, train_loader
from train_utils.setup import seed_everything, wrap_models

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "units", "expected"),
    [
        ("cpu", "none", None),
        ("cpu", "avx512_bf16", torch.bfloat16),
        ("cpu", "amx_tile", torch.bfloat16),
        ("cuda", "none", torch.float16),
        ("cuda", "native", torch.bfloat16),
    ],
)
def test_auto_takes_bf16_where_the_hardware_multiplies_it(device, units, expected, monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(
            torch.cpu, f"_is_{name}_supported", lambda name=name: name == units, raising=False
        )
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or units == "native",
    )
    dtype = choose_amp_dtype("auto", torch.device(device))
    assert dtype is expected
    scaler = make_scaler(dtype, torch.device("cpu"))
    assert (scaler is not None) == (expected is torch.float16)


@pytest.fixture
def settings_kept():
    """Put back what --deterministic sets for the whole process."""
    before = torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before[0]
    if before[1] is None:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_deterministic_names_what_is_not(settings_kept):
    """Kernels of GPUs are chosen by what it sets; unpooling has none anywhere, and says so."""
    network, image = DeepMatting(4).eval(), torch.rand(1, 4, 64, 64)
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    with pytest.warns(UserWarning, match="max_unpool.* does not have a deterministic"):
        network(image)


def test_without_it_nothing_is_forbidden(settings_kept):
    seed_everything(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, x):
        return self.norm(torch.relu(self.conv(x)))


def _train(compiled, monkeypatch):
    """Weights after two steps, and how many networks were compiled."""
    made = []

    def backend(graph, _inputs):
        made.append(graph)
        return graph.forward

    compile_as_usual = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_as_usual(model, backend=backend))
    torch.manual_seed(0)
    net = Net()
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.rand(4, 1, 8, 8))
    loader = train_loader(data, GlobalBatchSampler(4, 2), 0, CPU)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    models = wrap_models({"model": net}, CPU, compile=compiled)
    train_one_epoch(models, {"model": optimizer}, loader, CPU, 0, None)
    monkeypatch.undo()
    return net.state_dict(), len(made)


@pytest.mark.slow
def test_compiled_networks_train_as_others_do(monkeypatch):
    plain, none = _train(False, monkeypatch)
    compiled, graphs = _train(True, monkeypatch)
    assert none == 0 and graphs >= 1
    assert plain.keys() == compiled.keys()  # checkpoints do not tell
    for name, value in plain.items():
        assert torch.equal(value, compiled[name]), name


def test_a_flag_of_a_task_takes_values_as_set_does():
    flags = {"data.max_depth": "in metres", "data.direction": "which way"}
    args = parse_args(["--max-depth", "10", "--direction", "AtoB"], flags=flags)
    assert vars(args)["data.max_depth"] == 10 and vars(args)["data.direction"] == "AtoB"
