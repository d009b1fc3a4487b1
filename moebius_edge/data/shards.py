"""WebDataset shards with random access: plain tar files, of which the places of the members are noted once.

The webdataset package reads shards as a stream, from the beginning. A run that is to resume bit for bit, and an
order that is drawn anew every epoch, need sample i without those before it; so here the standard library's
``tarfile`` reads the headers, and nothing is ever extracted.
"""

from __future__ import annotations

import itertools
import re
import tarfile
from pathlib import Path

from ..errors import MachineError, UsageError
from .pictures import Place

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
MASK = ".mask.png"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(pattern: str) -> list[str]:
    """``a-{008..010}.tar`` to a-008.tar, a-009.tar, a-010.tar; several ranges multiply, no range is one file.

    Raises:
        UsageError: a range that goes backwards.
    """
    parts = _RANGE.split(pattern)  # text, first, last, text, first, last, text
    choices = [[text] for text in parts[::3]]
    for place, (first, last) in enumerate(zip(parts[1::3], parts[2::3], strict=True)):
        if int(last) < int(first):
            raise UsageError(f"{pattern}: the range {first}..{last} goes backwards: write {{{last}..{first}}}")
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        choices.insert(2 * place + 1, numbers)
    return ["".join(choice) for choice in itertools.product(*choices)]


def index_shard(file: str) -> list[tuple[Place, Place | None]]:
    """The pictures of a shard with their masks, in its order: the places of KEY.jpg and of KEY.mask.png.

    The key is the member's name up to the first dot of its last part, as WebDataset has it. Pictures are
    ``PICTURES``; other members belong to somebody else's fields and are left alone.

    Raises:
        MachineError: the file is missing or may not be read.
        UsageError: it is no plain tar file, is cut short, or has two pictures or masks of one key.
    """
    pictures: dict[str, Place] = {}
    masks: dict[str, Place] = {}
    shard = Path(file).name
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, slash, last = member.name.rpartition("/")
                stem, dot, ending = last.partition(".")
                if not member.isreg() or member.issparse() or not stem:
                    continue
                suffix = dot + ending.lower()
                found = masks if suffix == MASK else pictures if suffix in PICTURES else None
                if found is None:
                    continue
                key = folder + slash + stem
                if key in found:
                    raise UsageError(
                        f"{file} has {found[key].name.partition(':')[2]!r} and {member.name!r} of one key, {key!r}: "
                        "make the keys of a shard unique"
                    )
                found[key] = Place(f"{shard}:{member.name}", file, member.offset_data, member.size)
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
