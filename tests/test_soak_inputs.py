"""Random folders and lists: tests/soak_inputs.py says what is tried."""

import sys

import pytest
import soak_inputs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes any bytes for names")


def test_every_file_is_in_a_pair_or_counted_or_refused_by_name(capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # restored behind what the soak sets
    wrong = soak_inputs.main(soak_inputs.parsed(["--count", "25"]))
    assert not wrong, capsys.readouterr().out
