"""What becomes of a lack of memory: one line that says what to do, wherever it happens."""

import pytest
import torch
import torch.distributed as dist
from test_fake_cuda import predicted, system
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.fake_cuda import CUDA, fake_gpu
from train_utils import evaluate
from train_utils.errors import UserError, is_out_of_memory
from train_utils.setup import clean_errors, place_models


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("NCCL Error 1: Failed to CUDA calloc 12 bytes"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=str,
)
def test_a_lack_of_memory_has_many_names(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: invalid argument"), ValueError("out")])
def test_other_errors_have_not(error):
    assert not is_out_of_memory(error)


def full(at, nbytes=0):
    """A device that has no room for results of an operation, for inputs of so many bytes."""

    def before(name, inputs):
        if name == at and any(tensor.nbytes > nbytes for tensor in inputs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    return before


@pytest.mark.parametrize(
    ("at", "place"),
    [
        ("convolution", "in a forward pass of 4 images"),
        ("convolution_backward", "in a forward pass of 4 images"),
        ("_fused_adamw_", "in an optimizer's step"),
    ],
)
def test_a_training_step_says_which_batch_to_try(at, place):
    message = rf"out of memory {place}: .*-b 2 and twice train.accumulate"
    with fake_gpu(before=full(at)), pytest.raises(UserError, match=message):
        system("unet").train(CUDA, images=4, steps=1)


@pytest.mark.parametrize(
    ("at", "place"), [("convolution", "evaluating 2 images of 40×40"), ("clone", "for a copy")]
)
def test_an_evaluation_says_what_was_too_large(at, place):
    images, targets = ([torch.empty(n, 40, 40, dtype=torch.uint8)] * 2 for n in (3, 1))
    with fake_gpu(before=full(at)), pytest.raises(UserError, match=f"out of memory {place}"):
        scored = system("unet")
        metrics, predict = scored.task.make_metrics(), scored.task.predict
        evaluate(scored.networks, [(images, targets)], CUDA, metrics=metrics, predict=predict)


def _moving():
    place_models({"model": torch.nn.Conv2d(3, 4, 3)}, CUDA, sync_bn=False)


def _gathering():
    dist.broadcast(torch.empty(9, device=CUDA), src=0)  # as DistributedDataParallel does


@pytest.mark.parametrize(("at", "work"), [("_to_copy", _moving), ("broadcast_", _gathering)])
def test_everywhere_else_it_is_one_line_too(at, work, capsys):
    dist.init_process_group("cuda:fake", rank=0, world_size=2, store=FakeStore())
    try:
        with fake_gpu(before=full(at)), pytest.raises(SystemExit), clean_errors():
            work()
    finally:
        dist.destroy_process_group()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")


def test_prediction_takes_smaller_tiles_or_says_what_to_do(tmp_path):
    whole = 1100 * 1100 * 4 * 2  # bytes of the network's input in bf16
    no_room = full("convolution", whole - 1)
    (picture,), _ = predicted(tmp_path, "matting", {}, ["map"], [(1100, 1100)], no_room)
    assert picture.error == ""
    assert "in tiles of 605,000" in picture.warning
    (picture,), _ = predicted(tmp_path, "unet", {}, ["map"], [(50, 40)], full("convolution"))
    assert picture.error.startswith(
        f"{tmp_path / '0_image.png'}: out of memory: use smaller images"
    )
