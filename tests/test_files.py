"""Files that are there whole or not at all; kills in the middle are in test_checkpoint."""

import os

import pytest

from train_utils.files import hash_of_files, remove_temporaries, write_text, written_whole


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    write_text(tmp_path / "a", "old")
    with pytest.raises(error), written_whole(tmp_path / "a", (tmp_path / "b",)) as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("has_links", [True, False])
def test_links_hold_the_same(tmp_path, monkeypatch, has_links):
    def refuse(*_):
        raise OSError

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "b").write_text("old")
    for text in ("one", "two"):
        with written_whole(tmp_path / "a", (tmp_path / "b", tmp_path / "c")) as file:
            file.write(text.encode())
        assert [(tmp_path / name).read_text() for name in "abc"] == [text] * 3
    assert names(tmp_path) == ["a", "b", "c"]
    assert (tmp_path / "a").samefile(tmp_path / "b") == has_links


def test_text_that_names_a_file_of_any_bytes_can_be_written(tmp_path):
    write_text(tmp_path / "a", "é\udcff")
    assert (tmp_path / "a").read_text() == "é\\udcff"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with written_whole(tmp_path / "a") as first:
        first.write(b"first")
        with written_whole(tmp_path / "a") as second:
            second.write(b"second")
    assert (tmp_path / "a").read_text() == "first"


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    writer = written_whole(tmp_path / "a")
    writer.__enter__()  # and never left, as by a kill
    (tmp_path / ".mine.tmp").touch()
    assert len(names(tmp_path)) == 2
    remove_temporaries(tmp_path)
    assert names(tmp_path) == [".mine.tmp"]


def test_a_hash_tells_files_apart(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for path in (first, second):
        path.write_text("text")
    kept = hash_of_files([first, second], "")
    assert hash_of_files([first, second], "") == kept
    others = [hash_of_files([second, first], ""), hash_of_files([first, second], "more")]
    os.utime(first, ns=(1, 1))
    others.append(hash_of_files([first, second], ""))
    assert len({kept, *others}) == 4
    with pytest.raises(FileNotFoundError):
        hash_of_files([tmp_path / "missing"], "")
