"""Who is named as hanging, and who is not."""

import json
import time
from contextlib import nullcontext

import pytest

from train_utils.activity import LOADING, set_activity, waiting
from train_utils.watch import Watch

NOW = 1000.0


class Store(dict):
    """As much of torch's store as a watch needs."""

    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time stands still, unless a test sets it; what this process does is new at its end."""
    now = [NOW]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now
    monkeypatch.undo()
    set_activity("between two tests")


@pytest.fixture
def looks(clock):
    """What rank 0 gives up with, if it looks while it and others are where they are.

    Each is given as (place, what it waits for there, for how long), and others with whether they
    still give signs of life after their first look. All share this process: each in its turn.
    """

    def look(watch, place, waits, seconds):
        clock[0] = NOW - seconds
        set_activity(place, lambda: "a.png")
        with waiting(waits) if waits else nullcontext():
            clock[0] = NOW
            watch.look()

    def after_looks(mine, others=(), patience=8.0, times=1):
        reasons, store = [], Store() if others else None
        world = 1 + len(others)
        watch = Watch(patience, reasons.append, store=store, rank=0, world_size=world)
        peers = [
            Watch(0, print, store=store, rank=1 + i, world_size=world) for i in range(len(others))
        ]
        for number in range(times):
            for peer, (*where, alive) in zip(peers, others, strict=True):
                if alive or number == 0:
                    look(peer, *where)
            look(watch, *mine)
        return reasons

    return after_looks


STEP = ("epoch 0, step 3 of 9", None)
ADDING = ("epoch 0, step 3 of 9", "adding up numbers")


def test_a_process_that_others_wait_for_is_named_in_time(looks, capsys):
    late = ("loading: images of epoch 0, step 3", None)
    others = [(*late, 3, True), (*ADDING, 2.7, True)]
    assert looks((*ADDING, 2.7), others) == []
    said = capsys.readouterr().out
    assert "waiting for 3 s: rank 1 (" in said and ") has been at 'loading: images" in said
    (reason,) = looks((*ADDING, 9), [(*late, 9, True), (*ADDING, 9, True)])
    assert reason.startswith("hang: rank 1 (")
    assert "has been at 'loading: images of epoch 0, step 3'" in reason
    assert "rank 2" not in reason and "train.hang_timeout" in reason


def test_a_process_that_hangs_finds_it_out_itself_and_shows_where(looks, capsys):
    (reason,) = looks((*STEP, 9), [(*ADDING, 9, True), (*ADDING, 9, True)])
    assert reason.startswith("hang: rank 0 ") and reason.count("rank") == 1 and "(a.png)" in reason
    printed = capsys.readouterr().err
    assert "rank 0 hangs here:" in printed and "test_watch.py" in printed


def test_processes_that_move_are_late_but_do_not_hang(looks):
    busy = ("evaluating, 70 images done", None)
    assert looks((*ADDING, 9), [(*busy, 0.1, True), (*ADDING, 9, True)]) == []
    assert looks((*STEP, 60), [(*STEP, 60, True), (*STEP, 60, True)]) == []  # nobody waits


def test_a_process_without_a_sign_of_life_is_named(looks):
    silent = (*STEP, 0.1, False)
    assert looks((*ADDING, 9), [silent, (*ADDING, 9, True)]) == []
    reasons = looks((*ADDING, 9), [silent, (*ADDING, 9, True)], times=12)
    assert "rank 1 (" in reasons[-1]
    assert "gives no sign of life; its last was 'epoch 0, step 3" in reasons[-1]


def test_if_all_wait_for_each_other_all_are_named(looks):
    (reason,) = looks((*ADDING, 9), [(*ADDING, 9, True), (*ADDING, 9, True)])
    assert all(f"rank {rank} " in reason for rank in range(3))


def test_a_single_process_gives_up_on_its_loader_only(looks):
    place = f"{LOADING}: images of epoch 0, step 1"
    (reason,) = looks((place, None, 9))
    assert f"at '{place}' for 9 s (a.png)" in reason
    assert looks((place, None, 9), patience=0) == []
    assert looks(("loading: images of epoch 0, step 1", None, 9)) == []  # a debugger, perhaps
    assert looks((*STEP, 9)) == []


def test_a_request_to_stop_reaches_all_through_the_store():
    store, asked = Store(), []
    first = Watch(0, print, lambda: bool(asked), store, 0, 2)
    second = Watch(0, print, lambda: False, store, 1, 2)
    for peer in (first, second):
        peer.look()
    assert (first.stop_anywhere, second.stop_anywhere) == (False, False)
    asked.append("SIGTERM")
    for peer in (first, second):
        peer.look()
    assert (first.stop_anywhere, second.stop_anywhere) == (True, True)


def test_after_waiting_a_process_is_where_it_was_before_and_anew(clock):
    reasons, store = [], Store()
    watch = Watch(8, reasons.append, store=store, rank=0, world_size=2)
    other = Watch(0, print, store=store, rank=1, world_size=2)
    with waiting("adding up"):
        other.look()
    set_activity("a step")
    clock[0] += 20
    with waiting("adding up"):
        clock[0] += 20
    watch.look()
    assert reasons == []  # what it does now has just begun
    clock[0] += 9
    with waiting("adding up"):
        clock[0] += 9
        other.look()
    clock[0] += 9
    watch.look()
    (reason,) = reasons
    assert "rank 0 " in reason and "has been at 'a step' for 9 s" in reason


def _report(**changes):
    fields = {"rank": 1, "host": "h, process 3", "activity": "a step", "waits": False}
    fields |= {"seconds": 9.0, "details": "", "number": 3}
    return json.dumps([*(fields | changes).values()])


@pytest.mark.parametrize(
    "forged",
    [
        "not json",
        b"\xff\xfe",
        "[" * 100_000,  # json's own limit of depth
        "null",
        "{}",
        "[]",
        "[1, 2]",
        _report(rank=0),
        _report(rank=True),
        _report(host=None),
        _report(activity=["x"]),
        _report(waits=1),
        _report(seconds=5),
        _report(seconds=float("nan")),
        _report(seconds=float("inf")),
        _report(seconds=-1e9),
        _report(number="3"),
        _report(more=0),
        _report(details="x" * 100_000),
        "9" * 5000,
    ],
    ids=lambda forged: repr(forged[:60]),
)
def test_a_malformed_report_is_ignored_and_named_once(forged, capsys):
    reasons, store = [], Store()
    watch = Watch(8, reasons.append, store=store, rank=0, world_size=2)
    for _ in range(3):
        store["watch/1"] = forged
        watch._late(watch._report()._replace(seconds=9.0, waits=True))
    assert reasons == []
    assert capsys.readouterr().out.count("watch/1: no report of rank 1") == 1
    store["watch/1"] = _report(seconds=3.0)
    (late,), _ = watch._late(watch._report()._replace(seconds=9.0, waits=True))
    assert late.activity == "a step"


def test_what_a_report_says_is_printed_safely(looks, capsys):
    store, reasons = Store(), []
    store["watch/1"] = _report(activity="\x1b[2J\nforged line", host="\x07", details="\u202e")
    watch = Watch(8, reasons.append, store=store, rank=0, world_size=2)
    late, _ = watch._late(watch._report()._replace(seconds=9.0, waits=True))
    watch._warn_or_give_up(late, 3.0)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable() and r"\x1b[2J\nforged line" in line


def test_a_report_of_ones_own_is_never_malformed(looks, capsys):
    """However long the names of files are."""
    store = Store()
    peer = Watch(8, print, store=store, rank=1, world_size=2)
    set_activity("é" * 100_000, lambda: "\n" * 100_000)
    peer._report()
    watch = Watch(8, print, store=store, rank=0, world_size=2)
    watch._late(watch._report()._replace(seconds=9.0, waits=True))
    assert watch._peers[1].activity.startswith("ééé")
    assert "no report" not in capsys.readouterr().out
