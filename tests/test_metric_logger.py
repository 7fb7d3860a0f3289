"""Meters and progress lines."""

import math

import pytest
import torch

from train_utils.distributed_utils import MetricLogger, SmoothedValue, all_gather


def test_smoothed_value_by_hand():
    meter = SmoothedValue(window_size=3, fmt="{median} {avg} {max} {value} {global_avg}")
    for value, n in [(10.0, 1), (1.0, 1), (5.0, 1), (3.0, 2)]:
        meter.update(value, n)
    assert (meter.median, meter.avg, meter.max, meter.value) == (3.0, 3.0, 5.0, 3.0)
    assert meter.global_avg == (10 + 1 + 5 + 2 * 3) / 5
    assert str(meter) == "3.0 3.0 5.0 3.0 4.4"


def test_meter_without_values_is_nan():
    assert math.isnan(SmoothedValue().global_avg)
    assert math.isnan(SmoothedValue().median)


def test_progress_lines_say_what_a_user_looks_for(capsys):
    logger = MetricLogger()
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    for _ in logger.log_every(range(5), 2, "Epoch: [7]"):
        logger.images += 4
        logger.update(loss=torch.tensor(0.5), lr=0.01)
    lines = capsys.readouterr().out.splitlines()
    steps = [line.split("[")[2].split("/")[0].strip() for line in lines[:-1]]
    assert steps == ["1", "2", "4", "5"]
    parts = ("Epoch: [7]", "eta: ", "lr: 0.010000", "loss: 0.5000", "time: ", "data: ", "img/s: ")
    for part in (*parts, "max mem: "):
        assert part in lines[1]
    assert "total time" in lines[-1]


def test_tensors_are_read_only_when_a_line_is_due():
    logger, rows = MetricLogger(on_values=lambda step, row: rows.append((step, row))), []
    steps = iter(logger.log_every(range(4), 3))
    for _ in range(2):
        next(steps)
        logger.update(loss=torch.tensor(1.0))
    assert rows == [(0, {"loss": 1.0})]  # the first step has a line, the second has not
    next(steps)
    logger.update(loss=torch.tensor(4.0))
    next(steps)
    assert [step for step, _ in rows] == [0, 1, 2]
    assert logger.loss.global_avg == 2.0


def test_weights_and_state_survive_a_restart():
    whole, first = MetricLogger(), MetricLogger()
    for n, loss in [(8, 1.0), (8, 2.0), (3, 5.0)]:
        whole.update(n, loss=torch.tensor(loss))
    first.update(8, loss=1.0)
    second = MetricLogger()
    second.load_state_dict(first.state_dict())
    second.update(8, loss=2.0)
    second.update(3, loss=5.0)
    assert second.loss.global_avg == whole.loss.global_avg == (8 * 1 + 8 * 2 + 3 * 5) / 19


def test_unknown_meter_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute or meter 'loss'"):
        _ = MetricLogger().loss


def test_all_gather_of_one_process():
    assert all_gather({"a": 1}) == [{"a": 1}]
