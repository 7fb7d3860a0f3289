"""In which precision a run computes."""

import pytest
import torch

import train
from train_utils.device import describe_precision, tf32
from train_utils.errors import UserError
from train_utils.settings import EvalConfig, TrainConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def flags():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def _as_it_was():
    with tf32(True):
        yield


def test_tf32_is_of_convolutions_and_matrix_products_alike():
    with tf32(False):
        assert flags() == (False, False)
        with tf32(True):
            assert flags() == (True, True)
        assert flags() == (False, False)
    assert flags() == (True, True)
    assert TrainConfig().tf32 and EvalConfig().tf32  # torch's own default, of convolutions


def test_a_training_sets_it_before_anything_is_computed():
    arguments = ["--set", "train.tf32=off", "--images", "nowhere", "--masks", "nowhere"]
    args = train.parse_args([*arguments, "--device", "cpu"])
    args.rank, args.world_size, args.local_world_size = 0, 1, 1
    with pytest.raises(UserError, match="nowhere"):
        train.main(args)
    assert flags() == (False, False)


def test_the_first_line_names_the_precision_in_full():
    assert describe_precision(None, CPU, True) == "float32"
    assert describe_precision(None, GPU, True) == "float32, TF32 on"
    assert describe_precision(torch.bfloat16, GPU, False) == "bfloat16, TF32 off"
