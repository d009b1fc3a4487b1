"""Output that is whole or absent: atomic files and folders, hashes, names that stay in their folder.

Everything is written under a hidden temporary name beside its target and renamed at the end, so that an error, a full
disk or Ctrl-C leaves neither half a file nor the temporary one. A process that is killed outright cannot clean up:
while it lives it holds a lock on each of its temporary files and folders, and the next process that writes into the
same folder removes those that nobody holds. Nothing is flushed to the platter: this guards against errors, not against
power cuts.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import BundleError, MachineError, UsageError

_CHUNK = 4 << 20  # bytes read at a time when hashing; larger is no faster
_NAME_BYTES = 255  # the longest name that most file systems take
_TEMPORARY = re.compile(r"\.moebius-[0-9a-f]{12}(\..*)?")
_SET_ASIDE = ".old"  # the suffix of what is being replaced: if the process dies just then, it is the only copy
_cleaned: set[str] = set()  # the folders in which this process has looked for what dead ones left

# These can only come from writing, so they concern the output wherever in the caller's block they arise.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def refuse_loss(output: str | os.PathLike[str], paths: Iterable[str | os.PathLike[str] | None], what: str) -> None:
    """Raise ``UsageError`` where one of ``paths`` is in the folder ``output``: replacing it would delete that.

    ``what`` ends the message, such as "which is being exported".
    """
    inside = Path(output).resolve()
    for path in paths:
        if path is not None and Path(path).resolve().is_relative_to(inside):
            raise UsageError(f"output folder {output} holds {path}, {what}", "name another output")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path with the suffix of ``path``; on leaving normally it becomes ``path``.

    The temporary file exists (empty) from the start, so an unwritable folder fails before any work is done.
    A symbolic link is followed: the file it points to is replaced, the link stays.

    Raises:
        UsageError: ``path`` is a folder or a device.
        MachineError: the folder is missing, read-only or full, or the block left the file empty.
    """
    shown, target = Path(path), Path(os.path.realpath(path))
    if os.path.isdir(target):
        raise UsageError(f"output {shown} is a folder", f"name a file in it, such as {shown / 'result.png'}")
    if os.path.exists(target):
        if not os.path.isfile(target):  # renaming over /dev/null would destroy it
            raise UsageError(f"output {shown} is not a regular file", "name another output")
        if not os.access(target, os.W_OK):  # renaming would ignore the protection
            raise MachineError(f"output {shown} is write-protected", f"run `chmod u+w {shown}` or name another")
    check_name(shown)
    with _temporary(shown, target, target.suffix) as temporary:
        yield temporary
        if temporary.stat().st_size == 0:  # some encoders report a full disk only by writing nothing
            raise MachineError(f"nothing was written to {shown}", f"free space in {target.parent} and run again")
        os.replace(temporary, target)


@contextmanager
def atomic_directory(
    path: str | os.PathLike[str], overwrite: bool = False, marker: str = "bundle.json"
) -> Iterator[Path]:
    """Yield an empty temporary folder; on leaving normally it becomes ``path``.

    An empty folder at ``path`` is replaced. A folder with contents is replaced only with ``overwrite`` and if
    it holds a file named ``marker``: any other folder is the user's and is never deleted.

    Raises:
        UsageError: ``path`` exists and may not be replaced.
        MachineError: the parent folder is missing, read-only or full.
    """
    check_replaceable(path, overwrite, marker)
    with scratch_directory(path) as temporary:
        yield temporary
        _replace_directory(temporary, Path(os.path.realpath(path)))


def check_replaceable(path: str | os.PathLike[str], overwrite: bool = False, marker: str = "bundle.json") -> None:
    """Raise ``UsageError`` where ``atomic_directory`` would: before long work whose result is to be there."""
    shown, target = Path(path), Path(os.path.realpath(path))
    check_name(shown)
    if os.path.exists(target) and not os.path.isdir(target):
        raise UsageError(f"output {shown} is a file", "name a folder")
    if os.path.isdir(target) and any(target.iterdir()):
        if not overwrite:
            raise UsageError(f"output folder {shown} exists and is not empty", "remove it or name another")
        if not os.path.isfile(target / marker):
            raise UsageError(f"output folder {shown} is not overwritten, it holds no {marker}", "name another")


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise ``UsageError`` where no file system takes a name as long as that of ``path``: before long work."""
    size = max((len(os.fsencode(name)) for name in Path(path).parts), default=0)
    if size > _NAME_BYTES:
        raise UsageError(
            f"the name of the output {path} is too long, {size} bytes where most file systems take {_NAME_BYTES}",
            "name a shorter one",
        )


@contextmanager
def scratch_directory(beside: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside the path ``beside``, which need not exist; it is gone afterwards.

    Raises:
        MachineError: the parent folder is missing, read-only or full.
    """
    with _temporary(Path(beside), Path(os.path.realpath(beside)), ".part", folder=True) as temporary:
        yield temporary


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in lower-case hex, read in pieces so that gigabytes need no memory."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


@contextmanager
def utf8_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a name in valid UTF-8 for the file ``path``, for the C++ libraries that take no other.

    It is ``path`` itself wherever that is valid. Else, on Linux, it leads through the open folder, so that what is
    beside the file is found beside the name too.

    Raises:
        MachineError: ``path`` is not valid UTF-8, and this system offers no other name for it.
    """
    shown = Path(path)
    folder, name = (part.encode("utf-8", "replace") == os.fsencode(part) for part in (str(shown.parent), shown.name))
    if folder and name:
        yield os.fspath(path)
        return
    if not os.path.isdir("/proc/self/fd"):
        raise MachineError(f"the path {shown} is not valid UTF-8, which some libraries need", "rename it")
    descriptor = os.open(shown.parent if name else shown, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{descriptor}" + (f"/{shown.name}" if name else "")
    finally:
        os.close(descriptor)


def safe_join(root: str | os.PathLike[str], name: str) -> Path:
    """``root / name`` for a relative ``name`` with forward slashes that stays inside ``root``.

    Raises:
        BundleError: ``name`` is empty, absolute, climbs out, or reaches the outside through a symbolic link.
    """
    inside = Path(os.path.realpath(root))
    windows = PureWindowsPath(name)  # read with both rules, so that a bundle is safe or unsafe everywhere
    parts = PurePosixPath(name).parts
    if "\0" not in name and "\\" not in name and ".." not in parts and not windows.drive and not windows.root:
        joined = inside.joinpath(*parts)
        resolved = Path(os.path.realpath(joined))
        if resolved != inside and resolved.is_relative_to(inside):
            return joined
    raise BundleError(f"file name {name!r} leaves the folder {root}", "copy the file into it, or export again")


@contextmanager
def _temporary(shown: Path, target: Path, suffix: str, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside ``target``, locked by this process; what is left of it is removed at the end.

    An ``OSError`` that concerns our output becomes a ``MachineError`` that calls it ``shown``.
    """
    _remove_left_overs(target.parent)
    temporary, lock = _temporary_path(target, suffix), None
    try:
        while True:
            if folder:
                temporary.mkdir()
            else:
                os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            with suppress(BlockingIOError):  # before the lock was set, another process took it for a left-over
                lock = _lock(temporary)
                break
            temporary = _temporary_path(target, suffix)
        yield temporary
    except OSError as error:
        named = [os.fsdecode(f) for f in (error.filename, error.filename2) if isinstance(f, (str, bytes, os.PathLike))]
        ours = error.errno in _WRITE_ERRORS or any(os.fspath(temporary) in name for name in named)
        if not ours or (error.errno == errno.ENOENT and temporary.exists()):  # a wrong name in the caller's block
            raise
        raise _write_error(error, shown, target.parent) from error
    finally:  # also on KeyboardInterrupt; after a rename there is nothing left to remove
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _temporary_path(target: Path, suffix: str) -> Path:
    """A hidden, unused name beside ``target``; short, because the target's own name may be at the limit."""
    return target.with_name(f".moebius-{secrets.token_hex(6)}{suffix}")


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock on a temporary file or folder until it is closed, by the kernel at the latest.

    None where the file system has no locks. Raises ``BlockingIOError`` where another process holds the lock, or has
    removed the path.
    """
    if sys.platform == "win32":  # an open file could not be renamed there
        return None
    import fcntl

    # Network file systems lock only what is open for writing; a folder cannot be, and is not locked there.
    how = os.O_RDONLY if path.is_dir() else os.O_RDWR
    descriptor = None
    try:
        descriptor = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.lstat(path)  # fails where the path was removed in between
        return descriptor
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise BlockingIOError(errno.EWOULDBLOCK, "held or removed by another process") from None
        return None


def _remove_left_overs(folder: Path) -> None:
    """Remove, once a process, the temporary files and folders in ``folder`` that no living process holds."""
    if os.fspath(folder) in _cleaned:
        return
    _cleaned.add(os.fspath(folder))
    with suppress(OSError):
        paths = [folder / entry.name for entry in os.scandir(folder) if _TEMPORARY.fullmatch(entry.name)]
        for path in paths:
            if path.suffix == _SET_ASIDE or path.is_symlink():
                continue
            with suppress(BlockingIOError):
                if (lock := _lock(path)) is not None:
                    _remove(path)
                    os.close(lock)


def _remove(path: Path) -> None:
    """Remove a temporary file or folder, if it is there and may be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _replace_directory(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; an old folder there is set aside first and comes back on failure."""
    if not target.is_dir():
        os.rename(new, target)
        return
    old = _temporary_path(target, _SET_ASIDE)
    try:
        os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.is_dir() and not target.exists():
            os.rename(old, target)
        raise
    unneeded = _temporary_path(target, ".part")  # from here on the next run may remove it, if this one is killed
    os.rename(old, unneeded)
    shutil.rmtree(unneeded, ignore_errors=True)


def _write_error(error: OSError, shown: Path, folder: Path) -> MachineError:
    """The one-line message for an ``OSError`` about our output."""
    elsewhere, right = "name an output elsewhere", f"run `chmod u+w {folder}` or name an output elsewhere"
    space = f"free space in {folder} or name an output on another disk"
    reasons = {
        errno.ENOSPC: ("the disk is full", space),
        errno.EDQUOT: ("the disk quota is used up", space),
        errno.EROFS: (f"{folder} is on a read-only file system", elsewhere),
        errno.EACCES: (f"no right to write in {folder}", right),
        errno.EPERM: (f"no right to write in {folder}", right),
    }
    reason, remedy = reasons.get(error.errno or 0, (error.strerror or str(error), elsewhere))
    if not folder.exists():
        reason, remedy = f"the folder {folder} does not exist", f"run `mkdir -p {folder}`"
    elif not folder.is_dir():
        reason = f"{folder} is not a folder"
    return MachineError(f"cannot write {shown}: {reason}", remedy)
