"""Outputs are whole or absent, and no recorded name leaves its folder."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.system import files
from moebius_edge.system.files import (
    atomic_directory,
    atomic_write,
    check_replaceable,
    safe_join,
    scratch_directory,
    sha256_file,
    utf8_path,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_write_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "photo.png"
    with atomic_write(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png" and temporary.name.startswith(".")
        temporary.write_bytes(b"new")
        inode = temporary.stat().st_ino
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert target.stat().st_ino == inode  # renamed; a copy could be cut short
    assert names(tmp_path) == ["photo.png"]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(1)])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


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


def test_write_allows_the_longest_name(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 251 + ".png")
    with atomic_write(target) as temporary:
        temporary.write_text("x")
    assert target.read_text() == "x"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "cannot write .*a.txt: the disk is full: free space in .* or name an output"),
        (errno.EROFS, "cannot write .*a.txt: .* is on a read-only file system: name an output elsewhere"),
        (errno.EDQUOT, "cannot write .*a.txt: the disk quota is used up"),
    ],
)
def test_write_errors_of_the_block_are_named(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(MachineError, match=message), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert names(tmp_path) == []


def test_a_full_device_is_a_machine_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with (
        pytest.raises(MachineError, match="the disk is full"),
        atomic_write(tmp_path / "a.txt"),
        open("/dev/full", "wb", buffering=0) as stream,
    ):
        stream.write(b"x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_unwritable_folder_fails_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: str, *_: object) -> int:
        raise OSError(number, os.strerror(number), os.fspath(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MachineError, match="name an output elsewhere"), atomic_write(tmp_path / "a.txt"):
        pytest.fail("the block must not run")


def test_missing_parent_names_the_command(tmp_path: Path) -> None:
    target = tmp_path / "no" / "a.txt"
    with pytest.raises(MachineError, match=r"does not exist: run `mkdir -p .*no`"), atomic_write(target):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(MachineError, match="is not a folder"), atomic_write(tmp_path / "file" / "a.txt"):
        pytest.fail("the block must not run")


def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc on this system")
    with pytest.raises(MachineError, match="cannot write /proc/a.png"), atomic_write("/proc/a.png"):
        pytest.fail("the block must not run")


def test_a_wrong_name_inside_the_block_is_a_bug_and_stays_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "b") as temporary:
        (temporary / "missing" / "file").write_text("x")
    assert names(tmp_path) == []


def test_errors_about_other_files_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="input.png"), atomic_write(tmp_path / "a.txt"):
        (tmp_path / "input.png").read_bytes()


def test_an_empty_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="nothing was written to"), atomic_write(tmp_path / "a.png"):
        pass
    assert names(tmp_path) == []


def test_folder_or_device_as_output_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder: name a file in it"), atomic_write(tmp_path):
        pytest.fail("the block must not run")
    with pytest.raises(UsageError, match="is not a regular file"), atomic_write(os.devnull):
        pytest.fail("the block must not run")


def test_write_protected_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere, so chmod cannot test it
    with pytest.raises(MachineError, match=r"write-protected: run `chmod u\+w"), atomic_write(target):
        pytest.fail("the block must not run")
    assert target.read_text() == "old"


def test_directory_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target) as temporary:
        assert temporary.parent == tmp_path
        (temporary / "bundle.json").write_text("{}")
        assert not target.exists()
    assert names(tmp_path) == ["bundle"] and names(target) == ["bundle.json"]


def test_directory_is_replaced_only_on_request_and_only_a_bundle(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    with atomic_directory(target) as temporary:  # an empty folder may be there already
        (temporary / "old").write_text("")
    with pytest.raises(UsageError, match="exists and is not empty"), atomic_directory(target):
        pytest.fail("the block must not run")
    with (
        pytest.raises(UsageError, match=r"holds no bundle\.json: name another"),
        atomic_directory(target, overwrite=True),
    ):
        pytest.fail("the block must not run")
    (target / "bundle.json").write_text("{}")
    with atomic_directory(target, overwrite=True) as temporary:
        (temporary / "new").write_text("")
    assert names(target) == ["new"] and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_failed_directory_keeps_the_old_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "bundle.json").write_text("old")
    with pytest.raises(type(error)), atomic_directory(target, overwrite=True) as temporary:
        (temporary / "bundle.json").write_text("new")
        raise error
    assert (target / "bundle.json").read_text() == "old" and names(tmp_path) == ["bundle"]


def test_failed_swap_brings_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "bundle.json").write_text("old")
    rename = os.rename

    def fail_on_new(source: Path, destination: Path) -> None:
        if Path(source).suffix == ".part":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_on_new)
    with (
        pytest.raises(MachineError, match="the disk is full"),
        atomic_directory(target, overwrite=True) as temporary,
    ):
        (temporary / "bundle.json").write_text("new")
    assert (target / "bundle.json").read_text() == "old" and names(tmp_path) == ["bundle"]


def test_directory_refuses_a_file_and_a_missing_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file: name a folder"), atomic_directory(tmp_path / "file"):
        pytest.fail("the block must not run")
    with pytest.raises(MachineError, match="mkdir -p"), atomic_directory(tmp_path / "no" / "bundle"):
        pytest.fail("the block must not run")


def test_what_may_not_be_replaced_is_told_before_the_work(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new")
    (tmp_path / "mine").mkdir()
    check_replaceable(tmp_path / "mine")
    (tmp_path / "mine" / "photo.png").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        check_replaceable(tmp_path / "mine")
    with pytest.raises(UsageError, match=r"it holds no bundle\.json"):
        check_replaceable(tmp_path / "mine", overwrite=True)
    with pytest.raises(UsageError, match=r"photo\.png is a file: name a folder"):
        check_replaceable(tmp_path / "mine" / "photo.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("error", [None, ValueError("boom"), KeyboardInterrupt()])
def test_a_scratch_folder_lies_beside_and_is_gone_afterwards(tmp_path: Path, error: BaseException | None) -> None:
    with suppress(ValueError, KeyboardInterrupt), scratch_directory(tmp_path / "out") as folder:
        assert folder.parent == tmp_path and folder.is_dir() and folder.name.startswith(".moebius-")
        (folder / "file").write_text("x")
        if error is not None:
            raise error
    assert list(tmp_path.iterdir()) == []
    missing = tmp_path / "missing" / "out"
    with pytest.raises(MachineError, match="missing does not exist: run `mkdir -p"), scratch_directory(missing):
        pass


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, (4 << 20) + 7])
def test_sha256_over_the_edges_of_the_buffer(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    (tmp_path / "f").write_bytes(data[:size])
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data[:size]).hexdigest()


def test_safe_join_keeps_inside(tmp_path: Path) -> None:
    assert safe_join(tmp_path, "denoiser.onnx") == Path(os.path.realpath(tmp_path)) / "denoiser.onnx"
    assert safe_join(tmp_path, "engines/a/b.plan").name == "b.plan"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "a/../b",
        "/etc/passwd",
        "C:/x",
        "C:x",
        "..\\x",
        "\\\\host\\x",
        "a\0b",
    ],
)
def test_safe_join_refuses_names_that_leave(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="leaves the folder"):
        safe_join(tmp_path, name)


def test_safe_join_refuses_links_that_leave(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(BundleError, match="leaves the folder"):
        safe_join(tmp_path / "in", "link")


def test_interrupt_signal_leaves_no_partial_file(tmp_path: Path) -> None:
    """A real SIGINT in a real process, in the middle of the block."""
    code = (
        "import os, signal, sys\n"
        "from moebius_edge.system.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    import time; time.sleep(5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.txt")], capture_output=True, text=True
    )
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr
    assert names(tmp_path) == []


# --- what a killed process leaves -------------------------------------------------------------------------

HOLDER = """
import os, signal, sys
from moebius_edge.system.files import atomic_directory, atomic_write
with atomic_write(sys.argv[1] + "/a.txt") as file, atomic_directory(sys.argv[1] + "/b") as folder:
    file.write_text("half")
    (folder / "c").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """But not what a living one holds, nor what is set aside while it is replaced, nor other hidden files."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    killed, living = processes
    assert len(temporaries := names(tmp_path)) == 4
    killed.kill()
    killed.communicate()
    assert names(tmp_path) == temporaries

    others = [".moebius-0123456789ab.old", ".moebius-mine.part", ".moebius-0123456789abc", "photo.png"]
    for name in others:
        (tmp_path / name).write_text("stays")
    (tmp_path / ".moebius-0123456789ab.part").symlink_to("photo.png")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from moebius_edge.system.files import atomic_write\n"
         "with atomic_write(sys.argv[1]) as file: file.write_text('new')", str(tmp_path / "d.txt")]
    )  # fmt: skip
    assert done.returncode == 0
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


@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX file systems")
@pytest.mark.parametrize("name", ["あ" * 90 + ".png", "x" * 300 + "/a.png"])
def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    for enter in (lambda: atomic_write(tmp_path / name), lambda: atomic_directory(tmp_path / name)):
        with pytest.raises(UsageError, match=r"is too long, (274|300) bytes .*: name a shorter one"), enter():
            pytest.fail("the work was begun")
    assert names(tmp_path) == []


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
