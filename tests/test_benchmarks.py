"""The benchmarks run, at a size that shows nothing but that."""

import io
import json
import os
import re
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from conftest import REPO

from benchmarks import (
    checkpoint_cost,
    common,
    evaluation,
    headline,
    loading,
    prediction,
    quality,
    reduction,
    scaling,
    scaling_model,
    startup,
    training_step,
)
from my_dataset import DUTSDataset
from src import UNetGenerator, u2net_full, u2net_lite
from train_utils.errors import UserError
from train_utils.metrics import all_scores
from train_utils.normalize import IMAGENET_MEAN, IMAGENET_STD
from transforms import SaliencyTrain


@contextmanager
def in_this_process(device, make, ways, set_up=()):
    """Stands for `processes_of` where the processes are not what is tested."""
    works = {name: make(torch.device(device), *args) for name, args in ways.items()}
    yield {name: lambda what, work=work: work[what]() for name, work in works.items()}


@pytest.fixture
def one_process(monkeypatch):
    """Benchmarks of ways in this process; ceilings take seconds."""
    for module in (training_step, evaluation, prediction):
        monkeypatch.setattr(module, "processes_of", in_this_process)
    found = {"conv float32": 50.0, "conv bfloat16": 80.0}
    monkeypatch.setattr(common, "ceilings", lambda *of: found)


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


def test_a_wait_for_the_device_is_not_in_a_ceiling(monkeypatch):
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(common.time, "perf_counter", lambda: now)
    monkeypatch.setattr(common, "synchronize", lambda device: passes(3e-3))
    assert common.shortest(lambda: passes(1e-3), "cpu") == pytest.approx(1e-3, rel=0.05)


def test_flops_are_those_of_the_convolution():
    conv = torch.nn.Conv2d(2, 3, 3, padding=1)
    assert common.convolution_flops(lambda: conv(torch.zeros(1, 2, 5, 7))) == 2 * 3 * 2 * 9 * 5 * 7


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


def make_work_and_tell(device, args, system, batch_size, way):
    """A way's work; what its process has in the environment goes into a file of the way's name."""
    args.json.with_name(way).write_text(os.environ.get("GLIBC_TUNABLES", ""))
    return training_step.make_work(device, args, system, batch_size, way)


@pytest.mark.slow
def test_training_step(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(training_step, "make_work", make_work_and_tell)
    target = tmp_path / "step.json"
    tiny = ["--size", "64", "--batches", "2", "--rounds", "1", "--device", "cpu", "--amp", "off"]
    training_step.main([*tiny, "--systems", "u2net_lite", "--json", str(target)])
    for way, is_set_up in (("plain", False), ("plain same env", True), ("ours", True)):
        assert ("malloc" in (tmp_path / way).read_text()) == is_set_up, way
    (row,) = json.loads(target.read_text())["rows"]
    assert row["plain ms"] > 0 and row["ours ms"] > 0 and 0 < row["share"] < 1
    assert row["× plain"] == pytest.approx(row["plain ms"] / row["ours ms"])
    assert row["limit"] == pytest.approx(row["× plain"] / row["share"])
    assert row["plain MB"] > 20 < row["ours MB"]  # weights, gradients and moments alone are 18


@pytest.mark.slow
@pytest.mark.parametrize("system", training_step.SYSTEMS)
def test_the_plain_step_has_the_losses_and_the_flops_of_ours(system, monkeypatch):
    if system == "pix2pix":  # which drops out at random, and halves images of 64 six times at most
        same = training_step.SYSTEMS[system]._replace(values={"model": {"dropout": 0, "levels": 5}})
        monkeypatch.setitem(training_step.SYSTEMS, system, same)
    args = training_step.parse_args(["--size", "64", "--device", "cpu", "--amp", "off"])
    losses, flops = {}, {}
    for way in ("plain", "ours"):
        train = training_step.make_way(args, system, 2, way)
        flops[way] = common.convolution_flops(
            lambda way=way, train=train: losses.update({way: train()})
        )
    assert {"loss", "D"} & losses["ours"].keys() == losses["plain"].keys()
    for name, loss in losses["plain"].items():
        assert losses["ours"][name] == pytest.approx(loss, rel=1e-4), name
    assert flops["ours"] == flops["plain"] > 1e9


@pytest.mark.slow
def test_where_ours_is_in_16_bits_it_is_compared_with_autocast_too(
    one_process, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    target = tmp_path / "rows.json"
    tiny = ["--rounds", "1", "--device", "cpu", "--json", str(target)]
    plain = ["plain", "plain amp", "plain same env", "plain amp same env"]
    for benchmark, unit, options in (
        (training_step, "ms", "--size 32 --batches 2 --systems u2net_lite"),
        (evaluation, "img/s", "--size 32 --images 1 --models u2net_lite"),
        (prediction, "img/s", "--count 1 --set data.image_size=32"),
    ):
        benchmark.main([*options.split(), *tiny])
        row = json.loads(target.read_text())["rows"][0]
        assert [key[2:] for key in row if key.startswith("× ")] == plain
        for way in plain:
            ratio = row[f"ours {unit}"] / row[f"{way} {unit}"]
            assert row[f"× {way}"] == pytest.approx(1 / ratio if unit == "ms" else ratio)
        assert "× plain amp same env" in capsys.readouterr().out
    args = training_step.parse_args(["--size", "32", "--device", "cpu"])
    full, half = (training_step.make_way(args, "u2net_lite", 2, way)() for way in plain[:2])
    assert half["loss"] != full["loss"] == pytest.approx(half["loss"], rel=0.02)


def test_evaluation(one_process, tmp_path):
    target = tmp_path / "evaluation.json"
    tiny = ["--size", "40", "--images", "2", "--rounds", "1", "--device", "cpu", "--amp", "off"]
    evaluation.main([*tiny, "--models", "u2net_lite", "--json", str(target)])
    rows = json.loads(target.read_text())["rows"]
    assert [row["model"] for row in rows] == ["u2net_lite"]
    for row in rows:
        assert row["plain img/s"] > 0 < row["ours img/s"]
        assert row["× plain"] == row["ours img/s"] / row["plain img/s"]
        assert row["share"] == row["GFLOP/img"] * row["ours img/s"] / 50


@pytest.mark.parametrize("system", ["u2net_lite", "fcn"])
def test_both_ways_of_evaluation_score_alike(system):
    args = evaluation.parse_args(["--size", "40", "--images", "2", "--device", "cpu", "--amp=off"])
    scores = all_scores(evaluation.make_way(args, system, "ours")())
    names = ("MAE", "maxF1") if "MAE" in scores else ("mIoU",)
    expected = [scores[name] for name in names]
    plain = evaluation.make_way(args, system, "plain")()
    assert plain == pytest.approx(expected, abs=1e-3)


def test_what_a_sum_over_processes_takes_on_paper():
    assert scaling_model.ring(1000, 4, hop=1, bandwidth=100) == 6 * 1 + 6 / 4 * 10
    cluster = scaling_model.Cluster(
        node_gpus=4, intra_bandwidth=100, inter_bandwidth=10, intra_hop=1, inter_hop=5
    )
    # In a node as above; three nodes add up quarters, by trees of two levels up and two down.
    between = 2 * 2 / 3 * 250 / 10 + 2 * 2 * 5
    assert scaling_model.hierarchical(1000, 12, cluster) == pytest.approx(21 + between)
    assert scaling_model.hierarchical(1000, 4, cluster) == 21
    cluster = scaling_model.Cluster(host_hop=10, host_message=1)
    assert scaling_model.agree_ring(512, cluster) == 2 * 511 * 10
    assert scaling_model.agree(512, cluster) == 10 + 511 * 1 + 9 * 10
    assert scaling_model.agree(2, cluster) == 2 * 10
    link = scaling.fit_link({n: scaling_model.ring(n, 3, 1e-3, 1e9) for n in (0, 10**8)}, 3)
    assert link == pytest.approx((1e-3, 1e9))


def test_which_buckets_the_backward_pass_hides():
    mib = scaling_model.MIB
    assert scaling_model.buckets(60 * mib) == [mib, 25 * mib, 25 * mib, 9 * mib]
    assert scaling_model.buckets(60 * mib, 40) == [40 * mib, 20 * mib]
    # Full at 1, 6 and 10 s. The sums take 2 s each: done at 3, 8 and 12; slower: at 7, 13 and 19.
    assert scaling_model.exposed([1, 5, 4], [2, 2, 2], backward=10) == 2
    assert scaling_model.exposed([1, 5, 4], [6, 6, 6], backward=10) == 9


def test_the_page_holds_the_tables_on_paper(capsys):
    scaling_model.main([])
    tables = capsys.readouterr().out.strip()
    assert tables in (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")
    full, lite, _ = scaling_model.systems()
    assert (full.parameters, lite.parameters) == (43_995_469, 1_128_333)
    other = scaling_model.with_values(scaling_model.Cluster(), ["disk=5e8", "print_freq=20"])
    assert other == scaling_model.Cluster(disk=5e8, print_freq=20)
    with pytest.raises(UserError, match=r"dsk: not an assumption\. They are node_gpus, "):
        scaling_model.with_values(scaling_model.Cluster(), ["dsk=1"])


@pytest.mark.slow
def test_the_model_on_paper_has_the_flops_of_torch_s_counter():
    sides = {u2net_full: 288, u2net_lite: 288, UNetGenerator: 256}
    for (network, side), system in zip(sides.items(), scaling_model.systems(), strict=True):
        with torch.device("meta"):
            model, images = network(), torch.empty(1, 3, side, side)
        work = common.convolution_flops(
            lambda m=model, x=images: sum(y.sum() for y in m(x)).backward()
        )
        assert work / 1e9 == pytest.approx(system.gflop, abs=0.05)


def test_a_console_that_cannot_show_a_table_gets_escapes(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    scaling_model.main([])
    console.flush()
    assert rb"\xb5s" in console.buffer.getvalue()  # µs


@pytest.mark.slow
def test_reduction_and_scaling(tmp_path):
    target = tmp_path / "rows.json"
    tiny = ["--size", "32", "-b", "2", "--steps", "1", "--rounds", "1", "--device", "cpu"]
    reduction.main([*tiny, "--meters", "2", "--lines", "1", "--json", str(target)])
    (row,) = json.loads(target.read_text())["rows"]
    assert row["meters"] == 2 and row["ours µs"] > 0
    assert row["plain share"] == pytest.approx(row["plain µs"] / row["step ms"] / 1000)
    scaling.main([*tiny, "--json", str(target)])
    single, double = json.loads(target.read_text())["rows"]
    assert (single["processes"], double["processes"]) == (1, 2)
    assert double["efficiency"] == pytest.approx(double["img/s"] / single["img/s"] / 2)


@pytest.mark.slow
def test_loading(tmp_path):
    target = tmp_path / "rows.json"
    tiny = ["--count", "2", "--size", "32", "--crop", "28", "--rounds", "1", "--workers", "0", "1"]
    loading.main([*tiny, "--cache", "disk", "--json", str(target)])
    rows = {row["work"]: row for row in json.loads(target.read_text())["rows"]}
    names = ["one process", "1 workers", "disk cache, first", "disk cache, second", "a worker"]
    assert list(rows) == names
    one = rows["one process"]
    assert one["ratio"] == pytest.approx(one["ours /s"] / one["plain /s"])
    assert one["share"] == pytest.approx(one["ours /s"] / one["decode /s"])


def test_both_ways_load_the_same_pictures(tmp_path):
    loading.write_scenes(tmp_path, 1)
    ours = DUTSDataset(tmp_path, transforms=SaliencyTrain(64, 64, hflip=0.0))[0]
    plain = loading.PlainDataset(DUTSDataset(tmp_path).pairs, 64, 64)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for a, b in ((ours[0], plain[0] * std + mean), (ours[1], plain[1])):
        assert min((a / 255 - x).abs().max() for x in (b, b.flip(-1))) < 1.5 / 255


@pytest.mark.slow
def test_headline(tmp_path, monkeypatch, capfd):
    launch, commands, tiny = (
        headline.launch,
        headline.COMMANDS,
        "--count 2 --size 32 --crop 28 --rounds 1 --workers 0",
    )
    monkeypatch.setattr(headline, "COMMANDS", [f"loading {tiny} --cache"])

    def launch_training_only(*command):
        if command[0] == "-m":
            sys.modules[command[1]].main(command[2:])
        else:
            launch(*command)

    monkeypatch.setattr(headline, "launch", launch_training_only)
    few = ["data.image_size=32", "data.train_size=2", "data.val_size=1", "train.epochs=1"]
    training = partial(headline.run_training, "-b2", "-j0", *(f"--set={each}" for each in few))
    monkeypatch.setattr(headline, "run_training", training)
    headline.main(["--json", str(target := tmp_path / "headline.json")])
    found = json.loads(target.read_text())
    (row,) = found["loading"][0]["rows"]
    (trained,) = found["train.py"][0]["rows"]
    assert re.fullmatch(r"\d+ min \d+ s", trained["time"]) and 0 <= trained["MAE"] <= 1
    rate, page = common.shown(row["ours /s"]), capfd.readouterr().out
    assert re.search(rf"\| work \| .*\n\| --- .*\n\| one process \| .* {rate} \|", page)
    for command in commands:  # the options are there
        name, *options = command.split()
        sys.modules[f"benchmarks.{name}"].parse_args(options)
    with pytest.raises(UserError, match=r"train\.py --sed=1: failed"):
        launch("train.py", "--sed=1")


@pytest.mark.slow
def test_prediction_and_startup(one_process, tmp_path, monkeypatch):
    target = tmp_path / "rows.json"
    tiny = ["--rounds", "1", "--device", "cpu", "--json", str(target)]
    prediction.main(["--count", "2", "--set", "data.image_size=32", *tiny])
    folder, *stages = json.loads(target.read_text())["rows"]
    assert folder["× plain"] == pytest.approx(folder["ours img/s"] / folder["plain img/s"])
    assert [row["work"] for row in stages] == ["read", "forward", "render", "write"]
    assert sum(row["share"] for row in stages) == pytest.approx(1)
    work = startup.make_work(tmp_path, "cpu")
    monkeypatch.setattr(common, "take_turns", lambda ways, rounds: {way: [2.0] for way in ways})
    startup.main(tiny)
    rows = {row["work"]: row for row in json.loads(target.read_text())["rows"]}
    assert rows.keys() == work.keys()
    assert rows["predict.py --help"] == {"work": "predict.py --help", "ours s": 2.0}
    assert rows["one photograph"]["ratio"] == 1
    work["predict.py --help"]["ours"]()
    work["first training step"]["plain"]()
    with pytest.raises(UserError, match="no such script"):
        startup.launch(["-c", "raise SystemExit('no such script')"], tmp_path)()


def test_a_board_of_recipes(tmp_path):
    """Half the pixels, and after its second epoch level with the published recipe's best."""
    runs = {"published": (100, [0.5, 0.7, 0.6]), "half": (70, [0.4, 0.71])}
    for row, (size, scores) in runs.items():
        folder = quality.run_folder(tmp_path, row, 0, 0)
        folder.mkdir()
        config = {"data": {"image_size": size}, "train": {"batch_size": 4}}
        (folder / "config.yaml").write_text(json.dumps(config))
        lines = [
            {"epoch": n, "step": 10 * (n + 1), "img_per_s": 2, "val/MAE": 0.1, "val/maxF1": score}
            for n, score in enumerate(scores)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    published, half = quality.board(tmp_path, ["published", "half", "iou"], [0, 1])
    assert published["images"] == 3 * 40 and published["maxF1"] == 0.6
    assert (published["best maxF1"], published["images to level"]) == (0.7, 80)
    assert published["Mpx to level"] == pytest.approx(80 * 90**2 / 1e6)
    assert half["images to level"] == 80 and half["min to level"] == pytest.approx(80 / 2 / 60)
    assert half["Mpx to level"] == pytest.approx(80 * 63**2 / 1e6)
