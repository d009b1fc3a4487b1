"""The pictures in a folder, recognised by their contents, and the names by which two folders are compared."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MachineError
from . import console

_HEAD_BYTES = 256  # of a file, by which its format is recognised

# A picture's place below its folder and its name without the suffix, both in Unicode's composed form: the same name
# may be written with other code points on another system.
Key = tuple[str, str]


@dataclass(frozen=True)
class Found:
    """What was found in ``folder``: its pictures in order, and the names of other files and of folders left out."""

    folder: Path
    pictures: list[Path]
    others: list[str]
    folders: list[str]

    def by_key(self) -> dict[Key, list[Path]]:
        keys: dict[Key, list[Path]] = {}
        for path in self.pictures:
            keys.setdefault(self.key(path), []).append(path)
        return dict(sorted(keys.items()))

    def key(self, path: Path) -> Key:
        return name_key(path.relative_to(self.folder))

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def notes(self, hint: str = "") -> list[str]:
        """A sentence each on the files and on the folders that were left out; ``hint`` says how to have the folders."""
        notes = []
        if self.others:
            what = console.counted(len(self.others), "file")
            notes.append(f"{what} of {self.folder} skipped, no readable pictures: {console.listed(self.others)}")
        if self.folders:
            what = console.counted(len(self.folders), "sub-folder")
            notes.append(f"{what} of {self.folder} skipped: {console.listed(self.folders)}{hint}")
        return notes


def name_key(path: Path) -> Key:
    """The key of a picture by its path below its folder."""
    return unicodedata.normalize("NFC", path.parent.as_posix()), unicodedata.normalize("NFC", path.stem)


def find_pictures(folder: Path, recursive: bool = False, leave_out: Sequence[Path] = ()) -> Found:
    """The pictures in ``folder``, recognised by their suffix or their first bytes; hidden ones do not count.

    Links are followed, each folder once; those in ``leave_out`` are neither searched nor named.
    """
    found = Found(folder, [], [], [])
    seen = {os.path.realpath(path) for path in leave_out}
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        seen.add(os.path.realpath(current))
        try:
            names = sorted(os.listdir(current))
        except OSError as error:
            raise MachineError(f"cannot read folder {current} ({error.strerror}): check its rights") from error
        for path in (current / name for name in names if not name.startswith(".")):
            if path.is_dir():
                if os.path.realpath(path) in seen:
                    continue
                if recursive:
                    seen.add(os.path.realpath(path))
                    waiting.append(path)
                else:
                    found.folders.append(path.name)
            elif _is_picture(path):
                found.pictures.append(path)
            else:
                found.others.append(found.name(path))
    found.pictures.sort(key=lambda path: path.relative_to(folder).parts)
    return found


def _is_picture(path: Path) -> bool:
    from ..imaging.decoding import SUFFIXES, picture_format

    if path.name.endswith("~") or not path.is_file():  # an editor's backup; a broken link, a pipe, a device
        return False
    if path.suffix.lower() in SUFFIXES:  # if it is damaged, reading it says so
        return True
    try:
        with path.open("rb") as stream:
            return picture_format(stream.read(_HEAD_BYTES)) is not None
    except OSError:
        return False
