"""The benchmarks run, at a size that shows nothing but that."""

import json

import pytest
import torch

from benchmarks import checkpoint_cost, common, evaluation, training_step
from train_utils.metrics import all_scores


@pytest.mark.slow
def test_checkpoint_cost(tmp_path, capsys):
    target = tmp_path / "cost.json"
    tiny = ["--size", "32", "-b", "2", "--every", "1", "--rounds", "1", "--epoch-steps", "50"]
    checkpoint_cost.main([*tiny, "--device", "cpu", "--json", str(target)])
    rows = json.loads(target.read_text())["saving"]
    assert list(rows) == ["none", "sync", "async"]
    assert rows["sync"]["file_mb"] > 10  # weights and two moments of 1.1 million parameters
    assert rows["none"]["written_s"] == 0 < rows["async"]["call_s"] < rows["async"]["written_s"]
    assert rows["sync"]["call_s"] >= rows["sync"]["written_s"] > 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[-3:]] == ["none", "sync", "async"]


def test_what_a_save_costs_by_hand():
    # The file is there after 5 s: of the steps, from 1 s on, those begun at 1 and 4 s are longer.
    block = checkpoint_cost.Block(call=1.0, written=5.0, steps=[3.0, 2.5, 9.0])
    assert block.lost(step=2.0) == 1.0 + 1.0 + 0.5
    none = checkpoint_cost.Block(call=0.0, written=0.0, steps=[2.0, 2.0, 9.0])
    blocks = {"none": [none], "async": [block]}
    row = checkpoint_cost.summarise(blocks, 3_000_000, epoch_steps=10)["async"]
    assert (row["step_s"], row["file_mb"], row["lost_s"]) == (3.0, 3.0, 2.5)
    assert row["share"] == 2.5 / 20


def test_ways_take_turns_and_the_first_round_does_not_count():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in ("plain", "ours")}
    times = common.take_turns(ways, rounds=3, warmup=1)
    assert calls == ["plain", "ours", "ours", "plain"] * 2  # each goes first equally often
    assert [len(each) for each in times.values()] == [3, 3]
    assert common.ratio({"plain": [3.0, 9.0, 8.0], "ours": [2.0, 1.0, 9.0]}, "ours") == 4


def test_flops_are_those_of_the_convolution():
    conv = torch.nn.Conv2d(2, 3, 3, padding=1)
    assert common.flops(lambda: conv(torch.zeros(1, 2, 5, 7))) == 2 * 3 * 2 * 9 * 5 * 7


def test_table_and_json_hold_the_rows(tmp_path, capsys):
    target = tmp_path / "figures.json"
    args = common.make_parser("what").parse_args(["--json", str(target), "--device", "cpu"])
    rows = [{"work": "a", "plain ms": 12345.6}, {"work": "bb", "ours ms": 0.012345}]
    common.report(args, rows, {"copy": 12.0})
    *_, header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["work", "plain", "ms", "ours", "ms"]
    assert (first.split(), second.split()) == (["a", "12346", "–"], ["bb", "–", "0.01235"])
    result = json.loads(target.read_text())
    assert result["rows"] == rows and result["ceilings"] == {"copy": 12.0}
    assert result["machine"]["torch"] == torch.__version__


@pytest.mark.slow
def test_training_step(tmp_path):
    target = tmp_path / "step.json"
    tiny = ["--size", "64", "--batches", "2", "--rounds", "1", "--device", "cpu", "--amp", "off"]
    training_step.main([*tiny, "--systems", "u2net_lite", "--memory", "--json", str(target)])
    (row,) = json.loads(target.read_text())["rows"]
    assert row["plain ms"] > 0 and row["ours ms"] > 0 and 0 < row["share"] < 1
    assert row["× plain"] == pytest.approx(row["plain ms"] / row["ours ms"])
    assert 10 < row["ours MB"] < 1000


def test_the_plain_step_has_the_loss_of_ours():
    args = training_step.parse_args(["--size", "64", "--device", "cpu", "--amp", "off"])
    for system in ("u2net_lite", "fcn", "matting"):  # pix2pix drops out at random
        ways = training_step.make_ways(args, system, batch_size=2)  # the same weights and batch
        assert ways["ours"]() == pytest.approx(ways["plain"](), rel=1e-4), system


@pytest.mark.slow
def test_evaluation(tmp_path):
    target = tmp_path / "evaluation.json"
    tiny = ["--size", "40", "--images", "2", "--rounds", "1", "--device", "cpu"]
    models = ["--models", "u2net_lite", "unet"]
    evaluation.main([*tiny, *models, "--json", str(target)])
    rows = json.loads(target.read_text())["rows"]
    assert [row["model"] for row in rows] == ["u2net_lite", "unet"]
    assert all(row["plain img/s"] > 0 < row["ours img/s"] for row in rows)
    assert all(row["× plain"] == row["ours img/s"] / row["plain img/s"] for row in rows)


@pytest.mark.parametrize("system", ["u2net_lite", "fcn"])
def test_both_ways_of_evaluation_score_alike(system):
    args = evaluation.parse_args(["--size", "40", "--images", "2", "--device", "cpu", "--amp=off"])
    ways = evaluation.make_ways(args, system)
    scores = all_scores(ways["ours"]())
    names = ("MAE", "maxF1") if "MAE" in scores else ("mIoU",)
    expected = [scores[name] for name in names]
    assert ways["plain"]() == pytest.approx(expected, abs=1e-3)
