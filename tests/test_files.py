"""Outputs are whole or absent, and no recorded name leaves its folder."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from moebius_edge.errors import BundleError, MachineError, MoebiusError, UsageError
from moebius_edge.system import files
from moebius_edge.system.files import (
    atomic_directory,
    atomic_write,
    check_replaceable,
    refuse_loss,
    safe_join,
    scratch_directory,
    sha256_file,
    utf8_path,
)
from moebius_edge.system.fingerprint import ResultCache, fingerprint, first_difference


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def refused(enter: Callable[[], AbstractContextManager[Path]], kind: type[MoebiusError], text: str) -> None:
    with pytest.raises(kind, match=text), enter():
        pytest.fail("the block must not run")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("old")
    return tmp_path / "bundle"


def test_write_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 251 + ".png")  # the longest name
    with atomic_write(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png" and temporary.name.startswith(".")
        temporary.write_bytes(b"new")
        inode = temporary.stat().st_ino
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert target.stat().st_ino == inode  # renamed; a copy could be cut short
    assert names(tmp_path) == [target.name]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(1)])
def test_failure_leaves_the_old_output_and_nothing_else(tmp_path: Path, bundle: Path, error: BaseException) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise error
    for folder in (atomic_directory(bundle, overwrite=True), scratch_directory(bundle)):
        with pytest.raises(type(error)), folder as temporary:
            assert temporary.parent == tmp_path and temporary.is_dir() and temporary.name.startswith(".moebius-")
            (temporary / "bundle.json").write_text("half")
            raise error
    assert (tmp_path / "a.json").read_text() == (bundle / "bundle.json").read_text() == "old"
    assert names(tmp_path) == ["a.json", "bundle"]


def test_write_follows_a_link_and_honours_the_umask(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "link.txt") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(mask)
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o640


def test_what_takes_no_output_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    refused(lambda: atomic_write(tmp_path / "no" / "a"), MachineError, r"does not exist: run `mkdir -p .*no`")
    refused(lambda: atomic_directory(tmp_path / "no" / "b"), MachineError, "mkdir -p")
    refused(lambda: scratch_directory(tmp_path / "no" / "b"), MachineError, "no does not exist: run `mkdir -p")
    refused(lambda: atomic_write(tmp_path / "file" / "a.txt"), MachineError, "is not a folder")
    refused(lambda: atomic_directory(tmp_path / "file"), UsageError, "is a file: name a folder")
    refused(lambda: atomic_write(tmp_path), UsageError, "is a folder: name a file in it")
    refused(lambda: atomic_write(os.devnull), UsageError, "is not a regular file")
    refused(lambda: atomic_write("/proc/a.png"), MachineError, "cannot write /proc/a.png")
    for name, size in (("あ" * 90 + ".png", 274), ("x" * 300 + "/a.png", 300)):
        for write in (atomic_write, atomic_directory):
            text = f"is too long, {size} bytes .*: name a shorter one"
            refused(lambda write=write, name=name: write(tmp_path / name), UsageError, text)  # type: ignore[misc]
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere, so chmod cannot test it
    refused(lambda: atomic_write(tmp_path / "file"), MachineError, r"write-protected: run `chmod u\+w")

    def refuse(path: str, *_: object) -> int:
        raise OSError(errno.EACCES, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "open", refuse)
    refused(lambda: atomic_write(tmp_path / "a.txt"), MachineError, "no right to write in .* name an output elsewhere")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "x"


def test_write_errors_of_the_block_are_named_and_others_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "b") as temporary:
        (temporary / "missing" / "file").write_text("x")  # a bug
    with pytest.raises(FileNotFoundError, match="input.png"), atomic_write(tmp_path / "a.txt"):
        (tmp_path / "input.png").read_bytes()
    with pytest.raises(MachineError, match="nothing was written to"), atomic_write(tmp_path / "a.png"):
        pass
    for number, message in (
        (errno.ENOSPC, "cannot write .*a.txt: the disk is full: free space in .* or name an output"),
        (errno.EROFS, "cannot write .*a.txt: .* is on a read-only file system: name an output elsewhere"),
        (errno.EDQUOT, "cannot write .*a.txt: the disk quota is used up"),
    ):
        with pytest.raises(MachineError, match=message), atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_directory_is_replaced_only_on_request_and_only_a_bundle(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with atomic_directory(target) as temporary:  # an empty folder may be there already
        assert temporary.parent == tmp_path and names(target) == []
        (temporary / "old").write_text("")
    assert names(target) == ["old"]
    for overwrite, text in ((False, "exists and is not empty"), (True, r"holds no bundle\.json: name another")):
        refused(lambda overwrite=overwrite: atomic_directory(target, overwrite), UsageError, text)  # type: ignore[misc]
        with pytest.raises(UsageError, match=text):
            check_replaceable(target, overwrite)
    (target / "bundle.json").write_text("{}")
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "new").write_text("")
    assert names(target) == ["new"] and names(tmp_path) == ["bundle"]


def test_failed_swap_brings_the_old_directory_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def fail_on_new(source: Path, destination: Path) -> None:
        if Path(source).suffix == ".part":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_on_new)
    with pytest.raises(MachineError, match="the disk is full"), atomic_directory(bundle, overwrite=True) as temporary:
        (temporary / "bundle.json").write_text("new")
    assert (bundle / "bundle.json").read_text() == "old" and names(bundle.parent) == ["bundle"]


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    refuse_loss(tmp_path / "out", [None, tmp_path / "weights.bin"], "which is exported")
    with pytest.raises(UsageError, match=r"holds .*weights\.bin, which is exported: name another output"):
        refuse_loss(tmp_path, [tmp_path / "weights.bin"], "which is exported")


def test_sha256_over_the_edges_of_the_buffer(tmp_path: Path) -> None:
    for size in (0, 1, (4 << 20) - 1, (4 << 20) + 7):
        data = bytes(range(251)) * (size // 251) + bytes(size % 251)
        (tmp_path / "f").write_bytes(data)
        assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_safe_join_keeps_inside(tmp_path: Path) -> None:
    assert safe_join(tmp_path, "engines/a/b.plan") == Path(os.path.realpath(tmp_path)) / "engines/a/b.plan"
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    outside = ("", ".", "..", "../x", "a/../../x", "a/../b", "/etc/passwd", "C:/x", "C:x", "..\\x", "\\\\h\\x", "a\0b")
    for name in (*outside, "link"):
        with pytest.raises(BundleError, match="leaves the folder"):
            safe_join(tmp_path / "in", name)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names, or no other way to a file")
@pytest.mark.parametrize("path", [b"plain/a.bin", b"b\xe9/a.bin", b"plain/b\xe9.bin", b"b\xe9/b\xe9.bin"])
def test_every_file_has_a_name_in_utf8(tmp_path: Path, path: bytes) -> None:
    file = tmp_path / os.fsdecode(path)
    file.parent.mkdir()
    file.write_text("contents")
    (file.parent / "beside").write_text("beside")
    with utf8_path(file) as name:
        assert Path(name).read_text() == "contents" and name.encode("utf-8")
        assert (name == str(file)) == (b"\xe9" not in path)
        if b"\xe9.bin" not in path:
            assert (Path(name).parent / "beside").read_text() == "beside"


HOLDER = """
import sys
from moebius_edge.system.files import atomic_directory, atomic_write
with atomic_write(sys.argv[1] + "/a.txt") as file, atomic_directory(sys.argv[1] + "/b") as folder:
    file.write_text("half")
    (folder / "c").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""
WRITER = """
import sys; from moebius_edge.system.files import atomic_write
with atomic_write(sys.argv[1]) as file: file.write_text('new')
"""


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """But not what a living one holds, nor what is set aside while it is replaced, nor other hidden files."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in holders:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    killed, living = holders
    assert len(temporaries := names(tmp_path)) == 4
    killed.kill()
    killed.communicate()
    assert names(tmp_path) == temporaries

    others = [".moebius-0123456789ab.old", ".moebius-mine.part", ".moebius-0123456789abc", "photo.png"]
    for name in others:
        (tmp_path / name).write_text("stays")
    (tmp_path / ".moebius-0123456789ab.part").symlink_to("photo.png")
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "d.txt")], check=True)
    left = set(names(tmp_path)) - {*others, "d.txt", ".moebius-0123456789ab.part"}
    assert len(left) == 2 and left < set(temporaries)
    living.communicate("")
    assert living.returncode == 0 and (tmp_path / "b" / "c").read_text() == (tmp_path / "a.txt").read_text() == "half"
    assert left.isdisjoint(names(tmp_path))


def test_a_temporary_that_is_taken_for_a_left_over_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove a folder between its making and its locking."""
    lock, calls = files._lock, []

    def late(path: Path) -> int | None:
        calls.append(path)
        if len(calls) == 1:
            path.rmdir()
        return lock(path)

    monkeypatch.setattr(files, "_lock", late)
    with scratch_directory(tmp_path / "out") as folder:
        assert folder.is_dir() and folder == calls[1]
    assert names(tmp_path) == []


def test_results_are_found_under_the_same_facts_alone(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "cache")
    cache.put("a", {"seed": 1, "steps": 20}, [1.5, "x"])
    assert ResultCache(tmp_path / "cache").get("a", {"steps": 20, "seed": 1}) == [1.5, "x"]
    assert cache.get("a", {"seed": 2, "steps": 20}) is None
    assert cache.get("b", {"seed": 1, "steps": 20}) is None
    (tmp_path / "cache" / "a.json").write_text('{"fingerprint": ')
    assert cache.get("a", {"seed": 1, "steps": 20}) is None
    with pytest.raises(MachineError, match="cannot make .*cache .*: name another output") as caught:
        ResultCache(tmp_path / "cache" / "a.json" / "cache")
    assert caught.value.remedy == "name another output"


def test_the_first_difference_is_named_by_its_path() -> None:
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 there, 2 here"
    assert first_difference({"a": 1, "c": 3}, {"a": 1}) == "c is 3 there, None here"
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
