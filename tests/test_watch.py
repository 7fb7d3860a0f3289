"""Who is named as hanging, and who is not."""

import json
import time

import pytest

from train_utils import watch
from train_utils.watch import LOADING, Doing, Report, Watch, mark, waiting


class Store(dict):
    """As much of torch's store as a watch needs."""

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(watch, "_doing", watch._doing)


def looks(mine, others=(), patience=8.0, times=1):
    """What the watch of rank 0 gives up with, if it looks while `mine` and `others` last."""
    reasons, store = [], Store()
    peers = Watch(patience, reasons.append, lambda: False, store if others else None, 0, 3)
    place, waits, seconds = mine
    watch._doing = Doing(place, waits, time.monotonic() - seconds, lambda: "a.png")
    for number in range(times):
        for rank, (place, waits, seconds, moves) in enumerate(others, 1):
            new = Report(rank, "node", place, waits, seconds, "", number if moves else 0)
            store.set(f"watch/{rank}", json.dumps(new))
        peers._look()
    return reasons


STEP = ("epoch 0, step 3 of 9", False)
ADDING = ("epoch 0, step 3 of 9: adding up numbers", True)


def test_a_process_that_others_wait_for_is_named_in_time(capsys):
    late = ("loading: images of epoch 0, step 3", False)
    others = [(*late, 3, True), (*ADDING, 2.5, True)]
    assert looks((*ADDING, 2.5), others) == []
    assert "waiting for 3 s: rank 1 (node) has been at 'loading: images" in capsys.readouterr().out
    (reason,) = looks((*ADDING, 9), [(*late, 9, True), (*ADDING, 9, True)])
    assert reason.startswith("hang: rank 1 (node) has been at 'loading: images of epoch 0, step 3'")
    assert "rank 2" not in reason and "train.hang_timeout" in reason


def test_a_process_that_hangs_finds_it_out_itself_and_shows_where(capsys):
    (reason,) = looks((*STEP, 9), [(*ADDING, 9, True), (*ADDING, 9, True)])
    assert reason.startswith("hang: rank 0 ") and reason.count("rank") == 1 and "(a.png)" in reason
    printed = capsys.readouterr().err
    assert "rank 0 hangs here:" in printed and "test_watch.py" in printed


def test_processes_that_move_are_late_but_do_not_hang():
    busy = ("evaluating, 70 images done", False)
    assert looks((*ADDING, 9), [(*busy, 0.1, True), (*ADDING, 9, True)]) == []
    assert looks((*STEP, 60), [(*STEP, 60, True), (*STEP, 60, True)]) == []  # nobody waits


def test_a_process_without_a_sign_of_life_is_named():
    silent = (*STEP, 0.1, False)
    assert looks((*ADDING, 9), [silent, (*ADDING, 9, True)]) == []
    reasons = looks((*ADDING, 9), [silent, (*ADDING, 9, True)], times=12)
    assert "rank 1 (node) gives no sign of life; its last was 'epoch 0, step 3" in reasons[-1]


def test_if_all_wait_for_each_other_all_are_named():
    (reason,) = looks((*ADDING, 9), [(*ADDING, 9, True), (*ADDING, 9, True)])
    assert all(f"rank {rank} " in reason for rank in range(3))


def test_a_single_process_gives_up_on_its_loader_only():
    place = f"{LOADING}: images of epoch 0, step 1"
    (reason,) = looks((place, False, 9))
    assert f"at '{place}' for 9 s (a.png)" in reason
    assert looks((place, False, 9), patience=0) == []
    assert looks(("loading: images of epoch 0, step 1", False, 9)) == []  # a debugger, perhaps
    assert looks((*STEP, 9)) == []


def test_a_request_to_stop_reaches_all_through_the_store():
    store, asked = Store(), []
    first = Watch(0, print, lambda: bool(asked), store, 0, 2)
    second = Watch(0, print, lambda: False, store, 1, 2)
    for peer in (first, second):
        peer._look()
    assert (first.stop_anywhere, second.stop_anywhere) == (False, False)
    asked.append("SIGTERM")
    for peer in (first, second):
        peer._look()
    assert (first.stop_anywhere, second.stop_anywhere) == (True, True)


def test_marks_come_back_after_waiting():
    mark("a step")
    with waiting("adding up"):
        assert watch._doing[:2] == ("a step: adding up", True)
    assert watch._doing[:2] == ("a step", False)
