"""What one rank does for all, on real processes."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from distributed import on_ranks

from train_utils.distributed_utils import broadcast_tensors, call_on_main, get_rank
from train_utils.errors import UserError

pytestmark = pytest.mark.slow  # processes


def _wait_for_a_slow_rank():
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)

    def slowly():
        time.sleep(5)
        return "done"

    return call_on_main(slowly)


def test_ranks_wait_for_the_main_one_beyond_the_collective_timeout():
    assert on_ranks(2, _wait_for_a_slow_rank) == ["done", "done"]


def _refused_everywhere():
    def check():
        raise UserError("file: broken. Mend it.")

    try:
        call_on_main(check)
    except UserError as error:
        return str(error)
    return "not raised"


def test_a_refusal_on_the_main_rank_reaches_all():
    assert on_ranks(2, _refused_everywhere) == ["file: broken. Mend it."] * 2


def _broadcast():
    import torch

    mine = [torch.full((2, 2), float(get_rank() + 1)), torch.tensor([get_rank() + 7])]
    mine.append(mine[0].t()[:1])  # not contiguous
    broadcast_tensors(mine)
    return [tensor.tolist() for tensor in mine]


def test_tensors_of_all_kinds_become_those_of_rank_0():
    expected = [[[1.0, 1.0], [1.0, 1.0]], [7], [[1.0, 1.0]]]
    assert on_ranks(2, _broadcast) == [expected] * 2
