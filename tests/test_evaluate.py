"""Evaluation: the same bits however the samples are shared out over threads and batches."""

import pytest
import torch
from torch import nn

from my_dataset import ShapesDataset
from src import u2net_lite
from train_utils import evaluate
from train_utils.data import eval_loader
from train_utils.inference import chunk_size, forward_chunk, in_order
from transforms import SaliencyEval

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    """Set the number of threads for a test and put it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def states(model, dataset, batch_size):
    loader = eval_loader(dataset, batch_size, 0, CPU)
    return [metric.state.tolist() for metric in evaluate(model, loader, CPU)]


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


def test_gpu_chunks_depend_on_the_size_of_the_images_only():
    gpu = torch.device("cuda")
    for side, expected in ((64, 8), (362, 8), (512, 4), (1024, 1), (3000, 1)):
        assert chunk_size(gpu, torch.empty(4, side, side, device="meta")) == expected
    assert chunk_size(CPU, torch.empty(3, 8, 8)) == 1
    seen = []
    for image in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 1024, 1024)):
        output = forward_chunk(lambda x: seen.append(len(x)) or x, image, gpu)
        assert len(output) == 1
    assert seen == [8, 1]  # one large image goes alone
