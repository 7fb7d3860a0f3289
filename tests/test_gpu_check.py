"""The check of a GPU, checked on a CPU: what it runs there, and what it says when a check fails."""

import json
import time

import pytest

from benchmarks import gpu_check, gpu_correctness
from benchmarks.gpu_check import Check, Report


def outcomes(tmp_path, *options):
    """(number of failures, {check: (verdict, what it saw)})."""
    target = tmp_path / "check.json"
    failed = gpu_check.main(["--device", "cpu", "--json", str(target), *options])
    result = json.loads(target.read_text())
    assert result["machine"]["torch"]
    return failed, {row["check"]: (row["verdict"], row["saw"]) for row in result["checks"]}


@pytest.mark.slow
def test_results_are_right_on_a_cpu(tmp_path, capsys):
    only = ("waits", "gradients", "empty", "metrics", "two processes off,", "training fcn")
    failed, found = outcomes(tmp_path, "--seconds", "4000", "--systems", "fcn", "--only", *only)
    assert failed == 0, found
    verdicts = {name: verdict for name, (verdict, _) in found.items()}
    assert verdicts.pop("waits fcn auto") == "SKIP" and found["waits fcn auto"][1] == "needs a GPU"
    for name in (
        *("gradients fcn", "empty share fcn", "metrics", "training fcn"),
        "two processes off, one without images",
    ):
        assert verdicts[name] == "PASS", found[name]
    assert "fp64 0.0e+00" in found["gradients fcn"][1]
    assert found["training fcn"][1].startswith("train/loss ")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"0 of {len(found)} failed"
    assert sum(line.startswith(("PASS  ", "SKIP  ")) for line in lines) == len(found)


def test_one_failure_stops_no_other(tmp_path, monkeypatch, capsys):
    def wrong(device, system):
        raise AssertionError("off by 3")

    def broken(device, system):
        raise ValueError("no such thing")

    monkeypatch.setattr(gpu_correctness, "gradients", wrong)
    monkeypatch.setattr(gpu_correctness, "empty_share", broken)
    only = ("gradients", "empty", "metrics")
    failed, found = outcomes(tmp_path, "--systems", "fcn", "--only", *only)
    assert failed == 2
    assert found["gradients fcn"] == ("FAIL", "off by 3")
    verdict, saw = found["empty share fcn"]
    assert verdict == "FAIL" and "ValueError: no such thing" in saw and "test_gpu_check.py" in saw
    assert found["metrics"][0] == "PASS"
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 3 failed"


def test_time_is_shared_out_and_nothing_is_left_out_in_silence(capsys):
    report = Report(seconds=1000)
    report.run(Check("slow", lambda: time.sleep(60) or "", limit=0.01))
    report.run(Check("quick", lambda: "all of it", limit=10))
    report.seconds = 0
    report.run(Check("late", lambda: "all of it", limit=10))
    verdicts = [(row["check"], row["verdict"]) for row in report.rows]
    assert verdicts == [("slow", "FAIL"), ("quick", "PASS"), ("late", "SKIP")]
    assert "not done after 0 s" in report.rows[0]["saw"]
    assert report.rows[2]["saw"] == "the 0 s are over"
    assert len(capsys.readouterr().out.splitlines()) > 3
