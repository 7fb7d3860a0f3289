"""The benchmarks run, at a size that shows nothing but that."""

import json

import pytest

from benchmarks import checkpoint_cost


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
