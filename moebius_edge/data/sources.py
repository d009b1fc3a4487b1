"""Finds the training pictures: in a folder, by a JSON-lines list, or in WebDataset shards.

It looks at names only; whether a file is a picture is found out when it is read, and ``samples`` passes over those that
are not. Shards are plain tar files whose headers are read once by ``tarfile``; nothing is ever extracted. The
webdataset package reads shards as streams, while a run that resumes bit for bit needs sample i without those before it.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path

from ..errors import BundleError, MachineError, UsageError
from ..imaging.decoding import SUFFIXES
from ..system.files import safe_join
from .pictures import BACKGROUND, FOREGROUND, Pictures, Place

Pair = tuple[Place, Place | None]
_BRANCHES = {None: None, "background": BACKGROUND, "foreground": FOREGROUND}  # as upstream's lists name them
SHARD_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
SHARD_MASK = ".mask.png"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_pictures(source: str | os.PathLike[str], masks: str | os.PathLike[str] | None = None) -> Pictures:
    """The pictures of ``source`` in an order that depends on the names alone.

    Args:
        source: a folder, searched with its sub-folders, hidden ones left out; a ``.jsonl`` list; a ``.tar`` shard, a
            pattern of shards such as ``shards-{000..009}.tar``, or a folder whose only pictures are in shards.
        masks: a folder with masks for a folder of pictures: ``a/b.png`` there belongs to ``a/b.jpg`` here.

    Raises:
        UsageError: the source is of none of these kinds, holds no picture, or is wrong in itself (a line of the list
            that is no JSON or leaves the list's folder, a damaged shard); ``masks`` does not go with it.
        MachineError: something is missing, or may not be read.
    """
    source, path, branches = os.fspath(source), Path(source), None
    files = expand(source) if source.endswith(".tar") and not path.exists() else [source]
    if masks is not None and not path.is_dir():
        raise UsageError(f"a folder of masks goes with a folder of pictures only: {source} names its masks itself")
    if path.is_dir():
        pairs = _folder(path, None if masks is None else Path(masks))
    elif len(files) == 1 and not path.exists():
        raise MachineError(f"there is no {source}: name a folder, a .jsonl list or .tar shards")
    elif source.endswith(".jsonl"):
        pairs, branches = _list(path)
    elif source.endswith(".tar"):
        pairs = [pair for file in files for pair in index_shard(file)]
    else:
        raise UsageError(f"{source} is neither a folder, a .jsonl list nor .tar shards: name one of these")
    if not pairs:
        raise UsageError(f"{source} holds no picture: they end in {', '.join(SUFFIXES)}")
    return Pictures(source, [picture for picture, _ in pairs], [mask for _, mask in pairs], branches)


def _folder(root: Path, masks: Path | None) -> list[Pair]:
    if masks is not None and not masks.is_dir():
        raise MachineError(f"there is no folder of masks {masks}: check the path")
    if masks is not None and masks.samefile(root):
        raise UsageError(f"{masks} holds the pictures themselves: put the masks into a folder of their own")
    names = _search(root, (*SUFFIXES, ".tar"), masks)
    shards = [name for name in names if name.lower().endswith(".tar")]
    if shards and (len(shards) < len(names) or masks is not None):
        raise UsageError(f"{root} holds .tar shards, which hold their masks: name these alone, as {root / shards[0]}")
    if shards:
        return [pair for name in shards for pair in index_shard(os.path.join(root, name))]
    if masks is None:
        return [(_file(root, name), None) for name in names]
    by_stem: dict[str, str] = {}
    for name in _search(masks, SUFFIXES, None):
        stem = os.path.splitext(name)[0]
        if stem in by_stem:
            raise UsageError(f"{masks} holds {by_stem[stem]} and {name}, two masks of one name: remove one")
        by_stem[stem] = name
    found = [by_stem.get(os.path.splitext(name)[0]) for name in names]
    if names and not any(found):
        raise UsageError(f"no mask in {masks} has the name of a picture in {root}: a/b.png belongs to a/b.jpg")
    pairs = zip(names, found, strict=True)
    return [(_file(root, name), None if mask is None else _file(masks, mask)) for name, mask in pairs]


def _search(root: Path, suffixes: tuple[str, ...], left_out: Path | None) -> list[str]:
    """Files below ``root`` by their ending, relative to it, sorted; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        raise MachineError(f"cannot read folder {error.filename} ({error.strerror}): check its rights") from error

    skipped = None if left_out is None else os.path.realpath(left_out)
    names = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        inner = [f for f in folders if not f.startswith(".")]
        folders[:] = [f for f in inner if os.path.realpath(os.path.join(folder, f)) != skipped]
        for file in files:
            if os.path.splitext(file)[1].lower() in suffixes and not file.startswith("."):
                names.append(os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/"))
    return sorted(names)


def _list(path: Path) -> tuple[list[Pair], list[int | None]]:
    """Lines of JSON, each with "image" and maybe "mask" and "prompt", the branch; other keys are ignored."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}: check it with `ls -l {path}`") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}): write one JSON object a line") from error
    read = [_line(line, path.parent, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    return [pair for pair, _ in read], [branch for _, branch in read]


def _line(line: str, root: Path, where: str) -> tuple[Pair, int | None]:
    example = '{"image": "a.jpg", "mask": "a.png"}'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no JSON ({error}): write a line as {example}") from None
    image, mask, prompt = map(entry.get, ("image", "mask", "prompt")) if isinstance(entry, dict) else (None,) * 3
    if not isinstance(image, str) or not isinstance(mask, str | None):
        raise UsageError(f'{where}: "image" must be a path, and "mask" one or left out: write a line as {example}')
    if not isinstance(prompt, str | None) or prompt not in _BRANCHES:
        raise UsageError(f'{where}: "prompt" is {prompt!r:.80}: write "background" or "foreground", or leave it out')
    if prompt == "foreground" and mask is None:
        raise UsageError(f'{where}: a "foreground" sample needs its object\'s mask: add "mask", or leave "prompt" out')
    try:
        for name in (image, mask):
            if name is not None:
                safe_join(root, name)
    except BundleError:
        raise UsageError(
            f"{where}: {name!r} leaves the list's folder {root}: give paths relative to it, of files inside it"
        ) from None
    return (_file(root, image), None if mask is None else _file(root, mask)), _BRANCHES[prompt]


def _file(root: Path, name: str) -> Place:
    return Place(name, os.path.join(root, name))


def expand(pattern: str) -> list[str]:
    """``a-{008..010}.tar`` to a-008.tar, a-009.tar, a-010.tar; several ranges multiply, no range is one file."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(last) < int(first):
        raise UsageError(f"{pattern}: the range {first}..{last} goes backwards: write {{{last}..{first}}}")
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [file for n in numbers for file in expand(pattern[: match.start()] + n + pattern[match.end() :])]


def index_shard(file: str) -> list[Pair]:
    """The pictures of a shard with their masks, in its order: the places of KEY.jpg and of KEY.mask.png.

    The key is the member's name up to the first dot of its last part, as WebDataset has it. Other members are ignored.

    Raises:
        MachineError: the file is missing or may not be read.
        UsageError: it is no plain tar file, is cut short, or has two pictures or masks of one key.
    """
    pictures: dict[str, Place] = {}
    masks: dict[str, Place] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                _add_member(file, member, pictures, masks)
            # After the first member tarfile takes damage for the end of the archive; that is a block of zeros.
            end: int = tar.offset
        with open(file, "rb") as stream:
            stream.seek(end)
            whole = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except FileNotFoundError:
        raise MachineError(f"there is no shard {file}: check the name with `ls {Path(file).parent}`") from None
    except tarfile.TarError as error:
        raise UsageError(f"{file} is no plain .tar file or is damaged ({error}): unpack a compressed one") from None
    except OSError as error:
        raise MachineError(f"cannot read {file}: {error.strerror}: check it with `ls -l {file}`") from None
    if not whole:
        raise UsageError(f"{file} is cut short or damaged {end} bytes from its beginning: copy it again")
    return [(place, masks.get(key)) for key, place in pictures.items()]


def _add_member(file: str, member: tarfile.TarInfo, pictures: dict[str, Place], masks: dict[str, Place]) -> None:
    folder, slash, last = member.name.rpartition("/")
    stem, dot, ending = last.partition(".")
    suffix = dot + ending.lower()
    if not member.isreg() or member.issparse() or not stem or suffix not in (*SHARD_PICTURES, SHARD_MASK):
        return
    places, key = masks if suffix == SHARD_MASK else pictures, folder + slash + stem
    if key in places:
        names = f"{places[key].name.partition(':')[2]!r} and {member.name!r}"
        raise UsageError(f"{file} has {names} of one key, {key!r}: make the keys of a shard unique")
    places[key] = Place(f"{Path(file).name}:{member.name}", file, member.offset_data, member.size)
