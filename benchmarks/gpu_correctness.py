"""What only a GPU can tell about results: the checks of `gpu_check` that run inside its process.

Each returns what it saw, and raises AssertionError where that is wrong, or `Skipped`.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import tasks
from src.u2net import u2net_full
from tasks.saliency.metrics import ToolboxMetrics
from tasks.translation.metrics import TranslationMetrics
from train_utils import evaluate, train_one_epoch
from train_utils.amp import choose_amp_dtype, make_scaler
from train_utils.device import tf32
from train_utils.errors import UserError
from train_utils.inference import prepare
from train_utils.metrics import F1Score, MeanAbsoluteError
from train_utils.prediction import Predictor
from train_utils.setup import place_models, seed_everything, wrap_models
from train_utils.train_and_eval import EpochRun, Progress, StepOptions

SYSTEMS: dict[str, dict[str, Any]] = {
    "u2net_lite": {"task": "saliency"},
    "fcn": {
        "task": "segmentation",
        "model": {"name": "fcn", "channels": 16, "batch_norm": True},
        "optim": {"name": "sgd", "lr": 0.01},
    },
    "unet": {"task": "segmentation", "model": {"name": "unet", "channels": 16}},
    "unet_resnet50": {"task": "segmentation", "model": {"name": "unet_resnet50"}},
    "matting": {"task": "matting", "model": {"channels": 16}},
    # Without dropout, which draws other numbers on every device.
    "pix2pix": {"task": "translation", "model": {"channels": 16, "levels": 6, "dropout": 0.0}},
}
SIDE = 64
# One update by it is the gradient itself.
PLAIN = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


class Skipped(Exception):
    """A check that this device, or the time that is left, does not allow."""


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skipped("needs a GPU")


class Double(nn.Module):
    """A network in fp64; in fp32 the gradients of untrained ones agree to a few per cent only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, *inputs: Tensor) -> Any:
        return self.inner(*(x.double() for x in inputs))


def configured(system: str, size: int = SIDE, plain: bool = False, **train: Any) -> tuple[Any, Any]:
    """Task and config; `plain`: with the optimizer whose update is the gradient."""
    task_name = SYSTEMS[system]["task"]
    data = {"image_size": size} | ({"crop_sizes": [size]} if task_name == "matting" else {})
    values = {**SYSTEMS[system], "data": data, "train": train}
    if plain:
        values |= {"optim": PLAIN} | ({"optim_d": PLAIN} if task_name == "translation" else {})
    task = tasks.read_config(values, "check", {})
    return task, task.cfg


def batch_of(task: str, images: int, size: int, device: torch.device, seed: int = 0) -> list:
    """A random batch as a loader gives it: uint8 in the host's memory, page-locked for a GPU."""
    generator = torch.Generator().manual_seed(seed)

    def codes(channels: int, values: int = 256) -> Tensor:
        shape = (images, size, size, channels)
        x = torch.randint(0, values, shape, generator=generator, dtype=torch.uint8)
        return x.permute(0, 3, 1, 2)

    def trimap() -> Tensor:
        return torch.tensor([0, 128, 255], dtype=torch.uint8)[codes(1, 3).long()]

    if task == "matting":
        maps = [torch.cat([codes(3), trimap()], 1), torch.cat([codes(1), trimap()], 1)]
        maps += [codes(3), codes(3)]
    else:
        maps = [codes(3), {"saliency": codes(1), "translation": codes(3)}.get(task, codes(1, 6))]
    return [x.pin_memory() if device.type == "cuda" else x for x in maps]


def started(system: str, **options: Any) -> tuple[Any, Any, dict[str, nn.Module]]:
    """Task, config and networks that begin as those of every other call."""
    task, cfg = configured(system, **options)
    torch.manual_seed(0)
    networks = task.build_models()
    task.initialise(networks)
    return task, cfg, networks


class Hooked(EpochRun):
    """Calls a function after every step."""

    def __init__(self, hook: Callable[[Progress], None] | None) -> None:
        super().__init__()
        self.hook = hook

    def after_step(self, progress: Progress) -> None:
        if self.hook:
            self.hook(progress)


def train(
    system: str,
    device: torch.device,
    amp: str = "auto",
    images: int = 4,
    size: int = SIDE,
    steps: int = 6,
    batches: Any = None,
    after_step: Callable[[Progress], None] | None = None,
    plain: bool = False,
    double: bool = False,
    sync_bn: bool = False,
    scaler: Callable = make_scaler,
    wrap: Callable = dict,
) -> dict[str, nn.Module]:
    """The networks after a few steps of `train_one_epoch`."""
    task, cfg, networks = started(system, size=size, plain=plain, amp=amp)
    networks = place_models(networks, device, sync_bn)
    if double:
        networks = {name: Double(network) for name, network in networks.items()}
    optimizers = task.build_optimizers(networks)
    schedules = task.build_schedulers(optimizers, 100)
    dtype = choose_amp_dtype(amp, device)
    batches = batches or [batch_of(cfg.task, images, size, device, i) for i in range(steps)]
    train_one_epoch(
        wrap(wrap_models(networks, device, compile=False)),
        optimizers,
        batches,
        device,
        0,
        schedules,
        10**6,
        {name: scaler(dtype, device) for name in optimizers},
        losses=task.losses,
        weight=task.weight,
        options=StepOptions(dtype, seed=0, clip_value=cfg.train.clip_value),
        run=Hooked(after_step),
    )
    return networks


def weights(networks: Mapping[str, nn.Module]) -> Tensor:
    """All weights as one fp64 vector on the CPU."""
    parameters = [p for network in networks.values() for p in network.parameters()]
    return torch.cat([p.detach().double().cpu().flatten() for p in parameters])


def update(system: str, device: torch.device, amp: str, **options: Any) -> Tensor:
    """By how much training with the plain optimizer moves the weights."""
    *_, networks = started(system)
    before = weights(networks)
    return weights(train(system, device, amp, plain=True, **options)) - before


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@contextmanager
def memory_limit(nbytes: float, device: torch.device) -> Iterator[None]:
    """A GPU of so many bytes."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


# -- training -------------------------------------------------------------------------------------


def no_wait(device: torch.device, system: str, amp: str) -> str:
    """torch itself raises where the host waits for the device in a step; not in the first two."""
    need_gpu(device)

    def after_step(progress: Progress) -> None:
        torch.cuda.set_sync_debug_mode("error" if 2 <= progress.step < 6 else "default")

    try:
        train(system, device, amp, after_step=after_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no wait in steps 3 to 6"


def gradients(device: torch.device, system: str) -> str:
    """All gradients of a step in fp64 are the CPU's; how far those of other precisions are."""
    expected = update(system, torch.device("cpu"), "off", steps=1, double=True)
    found = {"fp64": distance(update(system, device, "off", steps=1, double=True), expected)}
    for name, allowed, amp in (
        ("fp32", False, "off"),
        ("tf32", True, "off"),
        ("amp", True, "auto"),
    ):
        with tf32(allowed):
            found[name] = distance(update(system, device, amp, steps=1), expected)
    text = "from the CPU's fp64: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items())
    # In 16 bits the gradient of an untrained network is right in its direction, not in digits.
    assert found["fp64"] < 1e-8 and found["fp32"] < 0.2, text
    return text


def empty_share(device: torch.device, system: str) -> str:
    """A step of a process without an image, in the precision of the device."""
    _, cfg = configured(system)
    full = [batch_of(cfg.task, 2, SIDE, device, seed) for seed in range(2)]
    networks = train(system, device, batches=[full[0], [x[:0] for x in full[0]], full[1]])
    assert weights(networks).isfinite().all(), "the weights are not finite"
    return "finite weights"


def overflow(device: torch.device) -> str:
    """fp16 and SGD, whose GradScaler skips the first steps."""
    need_gpu(device)

    def scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, init_scale=2.0**40)

    _, _, networks = started("fcn")
    trained = train("fcn", device, "fp16", steps=40, scaler=scaler)
    moved = distance(weights(trained), weights(networks))
    assert 0 < moved < float("inf"), f"the weights moved by {moved}"
    return f"the weights are finite and moved by {moved:.1e}"


def determinism(device: torch.device, system: str) -> str:
    """Two runs are equal to the bit in torch's deterministic mode; whether they are without it."""
    said, alike = {}, {}
    for deterministic in (True, False):
        seed_everything(0, deterministic)
        try:
            start = time.perf_counter()
            one, two = (weights(train(system, device)) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        alike[deterministic] = torch.equal(one, two)
        bits = "equal" if alike[deterministic] else "different"
        said[deterministic] = f"{bits} bits, {time.perf_counter() - start:.1f} s"
    text = f"deterministic: {said[True]}; default: {said[False]}"
    assert alike[True], text
    return text


# -- memory ---------------------------------------------------------------------------------------


def out_of_memory(device: torch.device) -> str:
    """What does not fit is refused in a sentence, in training and evaluation; then all goes on."""
    need_gpu(device)
    said = []
    for images in (64, 48, 40):  # more than one way to run out
        with memory_limit(2e9, device):
            said.append(_refusal(partial(train, "u2net_lite", device, images=images, size=288)))
    with memory_limit(4e8, device):
        data = [(torch.zeros(16, 3, 320, 320, dtype=torch.uint8), [torch.zeros(1, 9, 9)] * 16)]
        said.append(_refusal(lambda: evaluate(u2net_full(), data, device)))  # type: ignore[arg-type]
    train("u2net_lite", device, steps=2)
    assert all("out of memory" in text for text in said), said
    return f"{len(said)} of {len(said)} refused: {said[-1]}"


def _refusal(work: Callable[[], Any]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)[:60]
    return "it fitted"


def tiles(device: torch.device) -> str:
    """predict.py halves its tiles until they fit, with the same result."""
    need_gpu(device)
    task, _, networks = started("matting")
    models = prepare(networks, device, None)
    predictor = Predictor(task, models, device)
    image = torch.randint(0, 256, (1, 4, 1536, 2048), dtype=torch.uint8)
    image[:, 3] = 128
    with torch.inference_mode(), tf32(False):
        torch.cuda.reset_peak_memory_stats(device)
        whole, _ = predictor.forward(image)
        need, whole = torch.cuda.max_memory_allocated(device), whole.cpu()
        with memory_limit(need * 0.6, device):
            parts, warning = predictor.forward(image)
    off = (parts.cpu() - whole).abs().max().item()
    assert warning, "it fitted into 0.6 of the memory that it takes"
    assert off < 1e-3, f"tiles are off by {off:.1e}"
    return f"off by {off:.1e}; {warning[:60]}"


# -- scores ---------------------------------------------------------------------------------------


def metrics(device: torch.device) -> str:
    """Every metric's state of one pair is the CPU's, to the bit."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    saliency, mask = torch.rand(1, 300, 400, generator=generator), codes(1, 300, 400)
    pairs: list[tuple[Any, Tensor, Tensor]] = [
        (metric, saliency, mask) for metric in (MeanAbsoluteError(), F1Score(), ToolboxMetrics())
    ]
    picture = torch.rand(3, 90, 100, generator=generator) * 2 - 1
    pairs.append((TranslationMetrics(), picture, codes(3, 90, 100)))
    different = [
        metric.name
        for metric, pred, truth in pairs
        if not torch.equal(
            metric.sample_state(pred.to(device), truth.to(device)).cpu(),
            metric.sample_state(pred, truth),
        )
    ]
    assert not different, f"different bits: {', '.join(different)}"
    return f"{len(pairs)} metrics"


# -- two processes on one device ------------------------------------------------------------------


def two_processes(device: torch.device, amp: str, shares: Sequence[tuple[int, int]]) -> str:
    """Two processes on this device, over gloo, with SyncBN, train as one does.

    shares: the images of each process in each step. In fp64 they agree to rounding, in 16 bits to
    what an untrained network makes of it.
    """
    context = mp.get_context("spawn")
    with TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(rank, folder, str(device), amp, shares))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join()
            codes = [process.exitcode for process in ranks]
            assert codes == [0, 0], f"exit codes {codes}: see the errors above"
            several = torch.load(folder / "weights.pt")
        finally:
            for process in ranks:
                process.kill()
    *_, networks = started("unet")
    _, cfg = configured("unet")
    whole = [batch_of(cfg.task, sum(split), SIDE, device, i) for i, split in enumerate(shares)]
    options = {"batches": whole, "double": amp == "off"}
    alone = update("unet", device, amp, **options)
    off = distance(several - weights(networks), alone)
    assert off < (1e-8 if amp == "off" else 1.0), f"off by {off:.1e}"
    return f"off by {off:.1e}"


def _rank(rank: int, folder: Path, name: str, amp: str, shares: Sequence[tuple[int, int]]) -> None:
    logging.disable(logging.INFO)
    device = torch.device(name)
    store, limit = f"file://{folder / 'store'}", timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    _, cfg = configured("unet")
    batches = []
    for step, split in enumerate(shares):
        whole = batch_of(cfg.task, sum(split), SIDE, torch.device("cpu"), step)
        first = sum(split[:rank])
        batches.append([x[first : first + split[rank]] for x in whole])
    double = amp == "off"
    networks = train("unet", device, amp, batches=batches, double=double, plain=True, sync_bn=True)
    if rank == 0:
        torch.save(weights(networks), folder / "weights.pt")
    dist.destroy_process_group()
