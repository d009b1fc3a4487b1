"""The list of pictures that could not be read, shared by processes and kept over runs."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from moebius_edge.data.unreadable import Unreadable
from moebius_edge.errors import MachineError


def test_what_several_processes_note_is_listed_once() -> None:
    listed = Unreadable()
    listed.add("a", "first")

    def note(number: int) -> None:
        for i in range(200):
            listed.add(f"{i}", f"by {number}" * 50)

    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=note, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(listed) == 201 and list(listed.entries())[0] == "a"
    listed.add("a", "again")
    assert len(listed) == 201 and listed.entries()["a"] == "first"


def test_a_later_run_adds_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "unreadable.txt"
    assert Unreadable().write(path) == 0 and not path.exists()
    for names, total in ((("b", "a"), 2), (("a", "c"), 3)):
        listed = Unreadable()
        for name in names:
            listed.add(name, f"is damaged\nin {len(names)} places")
        assert listed.write(path) == total
    reason = r"is damaged\nin 2 places"
    assert path.read_text() == f"b\t{reason}\na\t{reason}\nc\t{reason}\n"


def test_any_name_of_a_file_takes_one_line(tmp_path: Path) -> None:
    listed = Unreadable()
    for name in ("tab\tline\nend", "\udcff.png", "ä 日.png"):
        listed.add(name, "x")
    assert listed.write(tmp_path / "u.txt") == 3 == listed.write(tmp_path / "u.txt")
    assert (tmp_path / "u.txt").read_bytes() == b"tab\\tline\\nend\tx\n\xff.png\tx\n" + "ä 日.png\tx\n".encode()


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "u.txt").mkdir()
    with pytest.raises(MachineError, match=r"cannot read .*u.txt: Is a directory"):
        Unreadable().write(tmp_path / "u.txt")
