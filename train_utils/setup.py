"""What a run sets up once, before its first step."""

import errno
import inspect
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.nn.parallel import DistributedDataParallel

from train_utils.data import loader_errors
from train_utils.device import Feature, choose_kernels, fast_layout, has
from train_utils.distributed_utils import (
    cpu_cores,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    lost_peers,
    shutdown_distributed,
)
from train_utils.errors import UserError, is_out_of_memory, plain_message
from train_utils.sync_batchnorm import convert_sync_batchnorm
from train_utils.watch import doing, waiting

# The option's name until torch 2.14, and since.
_BUFFER_SYNC = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
Compression = Literal["none", "bf16", "fp16"]
_HOOKS = {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed weight initialisation; with `deterministic`, use reproducible kernels where torch can.

    Where it cannot, torch warns and names the operation. Data order and augmentation need no global
    seed: they are keyed.
    """
    torch.manual_seed(seed)
    choose_kernels(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def wrap_models(
    models: dict[str, nn.Module],
    device: torch.device,
    compile: bool,
    bucket_mb: int | None = None,
    compress_gradients: Compression = "none",
) -> dict[str, nn.Module]:
    """Networks as they are trained: compiled if asked for, and data-parallel in a process group.

    bucket_mb: size in MiB of the buckets in which gradients are summed over processes, each as soon
    as the backward pass has filled it; None: torch's own sizes. compress_gradients: round gradients
    to 16 bits on the way, which halves the bytes; all processes still get the same sums.

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
                model = DistributedDataParallel(model, bucket_cap_mb=bucket_mb, **options)
            if compress_gradients != "none":
                model.register_comm_hook(None, _HOOKS[compress_gradients])
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


def default_workers(device: torch.device, local_world_size: int) -> int:
    """Loader processes per training process: a CPU's cores are busy training, a GPU's are free."""
    cores = cpu_cores(local_world_size)
    return min(8, cores) if device.type != "cpu" else int(cores > 1)


def worker_count(asked: int | None, device: torch.device, local_world_size: int) -> int:
    """The loader processes that were asked for, or the default."""
    return default_workers(device, local_world_size) if asked is None else asked


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
        traceback.print_exception(error)
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
                f"out of memory ({doing().place}). Use a smaller network or smaller images, or a "
                f"device that no other program uses. It said: {str(error)[:200]}"
            )
        if not lost_peers(error):
            raise
        _exit_with(f"lost the other processes; their errors tell why ({str(error)[:200]})")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _exit_with(
            f"{error.filename or 'disk'}: {error.strerror}. Files are as last saved: free disk "
            "space, then continue with --resume auto."
        )
    except KeyboardInterrupt:
        print("interrupted: stopped at once; checkpoints are as last saved", file=sys.stderr)
        sys.exit(130)


def _exit_with(message: str) -> NoReturn:
    rank = int(os.environ.get("RANK", 0))
    print(f"error{f' (rank {rank})' if rank else ''}: {message}", file=sys.stderr, flush=True)
    sys.exit(1)
