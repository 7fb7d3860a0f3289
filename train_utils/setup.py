"""What a run sets up once, before its first step."""

import inspect
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from train_utils.activity import current_activity, waiting
from train_utils.amp import choose_amp_dtype
from train_utils.collectives import is_dist_avail_and_initialized, lost_peers
from train_utils.data import GlobalBatchSampler, eval_loader, loader_errors, train_loader
from train_utils.device import Feature, allow_tf32, fast_layout, has
from train_utils.distributed_utils import (
    cpu_cores,
    init_distributed_mode,
    shutdown_distributed,
)
from train_utils.ema import ExponentialMovingAverage
from train_utils.errors import (
    FREE_DISK,
    FULL_DISK,
    UserError,
    is_out_of_memory,
    plain_message,
    print_trace,
    tell,
)
from train_utils.settings import BaseConfig, TrainConfig
from train_utils.sync_batchnorm import convert_sync_batchnorm
from train_utils.task import BaseTask
from train_utils.train_and_eval import StepOptions
from train_utils.training_state import resumed_forward_batch, resumed_global_batch

# The option's name until torch 2.14, and since.
_BUFFER_SYNC = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed weight initialisation; with `deterministic`, use reproducible kernels where torch can.

    Where it cannot, torch warns and names the operation. Data order and augmentation need no global
    seed: they are keyed.
    """
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic  # it tries out kernels, takes the fastest
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def start_process(args: Namespace, cfg: BaseConfig) -> None:
    """Seeds and kernels of this process; UserError for settings that cannot be."""
    device, train = torch.device(args.device), cfg.train
    choose_amp_dtype(cfg.eval.amp, device, "eval.amp")  # refused now, not after an epoch
    if train.compile and train.sync_bn and args.world_size > 1:
        raise UserError(
            "--compile, --sync-bn: synchronised batch norm waits for other processes in each of "
            "its layers, and would cut what is compiled there. Leave one of them out."
        )
    seed_everything(train.seed, train.deterministic)
    allow_tf32(train.tf32)


def build_loaders(
    args: Namespace, task: BaseTask, train_set: Dataset, val_set: Dataset, saved: Any = None
) -> tuple[DataLoader, DataLoader, GlobalBatchSampler]:
    """Loaders of training and validation data, and the sampler of the first.

    A run that continues (`saved`) keeps its batches.
    """
    device, train, world_size = torch.device(args.device), task.cfg.train, args.world_size
    forward_batch = train.batch_size * world_size
    global_batch = forward_batch * train.accumulate
    if saved:
        global_batch = resumed_global_batch(saved, global_batch, world_size)
        forward_batch = resumed_forward_batch(saved, train, world_size)
    sampler = GlobalBatchSampler(
        len(train_set),  # type: ignore[arg-type]
        global_batch,
        micro_batch=ceil(forward_batch / world_size),
        rank=args.rank,
        world_size=world_size,
        seed=train.seed,
    )
    sampler.forward_batch = forward_batch
    task.check_batches(sampler.smallest_part)
    workers = worker_count(train.workers, device, args.local_world_size)
    loader = train_loader(train_set, sampler, workers, device)
    return loader, build_val_loader(args, task.cfg, val_set), sampler


def build_val_loader(args: Namespace, cfg: BaseConfig, val_set: Dataset) -> DataLoader:
    """This process's share of the validation data."""
    device = torch.device(args.device)
    workers = worker_count(cfg.train.workers, device, args.local_world_size)
    return eval_loader(val_set, cfg.eval.batch_size, workers, device, args.rank, args.world_size)


def wrap_models(
    models: dict[str, nn.Module], device: torch.device, compile: bool
) -> dict[str, nn.Module]:
    """Networks as they are trained: compiled if asked for, and data-parallel in a process group.

    Buffers are not broadcast in every forward pass: it would overwrite batch norm's statistics
    between the two passes of a GAN's discriminator, which autograd refuses, and it is not needed,
    since evaluation gives every rank rank 0's buffers and checkpoints hold those.
    """
    wrapped = {}
    for name, model in models.items():
        if compile and has(device, Feature.COMPILE):
            model = torch.compile(model)  # type: ignore[assignment]
        if is_dist_avail_and_initialized():
            options: dict[str, Any] = {_BUFFER_SYNC: False, "gradient_as_bucket_view": True}
            if device.type != "cpu":
                options["device_ids"] = [device.index]
            with waiting(f"all processes to have {name}"):
                model = DistributedDataParallel(model, **options)
        wrapped[name] = model
    return wrapped


def place_models(
    models: dict[str, nn.Module], device: torch.device, sync_bn: bool
) -> dict[str, nn.Module]:
    """Networks as they train fast on a device, with batch norm synchronised if asked for."""
    if sync_bn:
        models = {name: convert_sync_batchnorm(model) for name, model in models.items()}
    layout = fast_layout(device, training=True)
    return {name: model.to(device).to(memory_format=layout) for name, model in models.items()}


def worker_count(asked: int | None, device: torch.device, local_world_size: int) -> int:
    """Loader processes per training process: as asked for, or as many as there are free cores.

    A CPU's cores are busy training, a GPU's are free.
    """
    cores = cpu_cores(local_world_size)
    default = min(8, cores) if device.type != "cpu" else int(cores > 1)
    return default if asked is None else asked


def step_options(
    train: TrainConfig,
    amp_dtype: torch.dtype | None,
    accumulate: int,
    ema: Mapping[str, ExponentialMovingAverage],
) -> StepOptions:
    """How a recipe has its steps taken."""
    return StepOptions(
        amp_dtype,
        accumulate,
        train.clip_norm,
        train.clip_value,
        train.seed,
        ema,
        train.on_nonfinite,
    )


@contextmanager
def launched(args: Namespace) -> Iterator[None]:
    """Run a block as one of the processes that a launcher starts, with `clean_errors`.

    It is in a process group meanwhile (see `init_distributed_mode`), and in none afterwards,
    whichever way the block ends. What the block called has lost its local variables by then.
    """
    error: BaseException | None = None
    try:
        with clean_errors():
            init_distributed_mode(args)
            yield
    except BaseException as caught:
        error = caught
        raise
    finally:
        if is_dist_avail_and_initialized():
            _clear_frames(error)
            if not shutdown_distributed():
                _end_at_once(error)


def _clear_frames(error: BaseException | None) -> None:
    """Drop the local variables of all calls that an error has ended, networks among them."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _end_at_once(error: BaseException | None) -> NoReturn:
    """End this process as the error would, without the interpreter's own end."""
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if error and not isinstance(error, SystemExit):
        print_trace(type(error), error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


@contextmanager
def clean_errors() -> Iterator[None]:
    """Print what a user can put right as one line and exit with 1; other errors keep a trace."""
    try:
        with loader_errors():
            yield
    except UserError as error:
        _exit_with(plain_message(error))
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            _exit_with(
                f"out of memory ({current_activity().name}). Use a smaller network or smaller "
                f"images, or a device that no other program uses. It said: {str(error)[:200]}"
            )
        if not lost_peers(error):
            raise
        _exit_with(f"lost the other processes; their errors tell why ({str(error)[:200]})")
    except OSError as error:
        remedy = "Check the path and its permissions."
        if error.errno in FULL_DISK:
            remedy = FREE_DISK
        elif error.filename is None:
            raise
        _exit_with(f"{error.filename or 'disk'}: {error.strerror}. {remedy}")
    except KeyboardInterrupt:
        tell("interrupted: stopped at once; checkpoints are as last saved")
        sys.exit(130)


def _exit_with(message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    tell(f"error{f' (rank {rank})' if rank != '0' else ''}: {message}")
    sys.exit(1)
