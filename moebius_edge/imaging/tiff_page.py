"""Takes the first page out of a TIFF file: its coded pixels and its metadata, as ``containers`` does for others.

A TIFF file is a chain of directories of tags. Only tags that are needed are read, each within a limit, and written
with the strips or tiles of the first page into a small file that holds nothing else.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from .containers import DEFLATE_RATIO, FirstPicture, check_size
from .jpeg_file import check_scans
from .metadata import EXIF_TAGS, ICC_TAG, read_inner_directories
from .png_tiff import Directory, Unreadable, integers, longs, read_directory, write_directory

# Tags by the names of TIFF 6.0 and its supplements.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 257, 258, 259, 262, 277, 284
_STRIP_PLACES, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_PLACES, _TILE_BYTES = 322, 323, 324, 325
_EXTRA_SAMPLES, _SAMPLE_FORMAT = 338, 339
_DECODING_TAGS = frozenset(
    [_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA_SAMPLES, _SAMPLE_FORMAT]
    + [266, 292, 293, 317, 320, 332, 347, 529, 530, 531, 532]  # bit order, fax, predictor, palette, JPEG, YCbCr
)
_PART_TAGS = frozenset(
    [_STRIP_PLACES, _ROWS_PER_STRIP, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILE_PLACES, _TILE_BYTES]
)
_XMP_AND_IPTC = frozenset([700, 33723, 34377])

_NO_COMPRESSION, _FAX, _JPEG = 1, (2, 3, 4), 7
_UNKNOWN = 1 << 40
_RATIOS = {  # compression -> how many times larger the pixels can be
    **{1: 1, 2: _UNKNOWN, 3: _UNKNOWN, 4: _UNKNOWN, 5: 4096, 7: 8 * 256 * 4, 8: DEFLATE_RATIO},
    **{32946: DEFLATE_RATIO, 32773: 64, 50000: _UNKNOWN, 50001: _UNKNOWN},
}
_SLACK = 1 << 16  # bytes that these may be off by
_MAX_PARTS = 1 << 17
_MAX_FAX_ROWS = 1_000_000  # libtiff reports each damaged one, which takes time


def first_page(stream: BinaryIO) -> FirstPicture:
    """The first page of the TIFF or BigTIFF in ``stream``.

    Raises:
        Unreadable: the file is damaged, of a kind that would lose depth, or asks for far too much work.
    """
    stream.seek(0)
    head = stream.read(16).ljust(16, b"\0")
    order, big = ("<" if head[:2] == b"II" else ">"), b"+" in head[2:4]
    (place,) = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)
    wanted = _DECODING_TAGS | _PART_TAGS | _XMP_AND_IPTC | EXIF_TAGS | {ICC_TAG}
    tags, following = read_directory(stream, place, order, wanted, big)
    layout = _layout(tags)
    found = FirstPicture(io.BytesIO(), bits=_bits(tags), several=following != 0)
    found.xmp = not _XMP_AND_IPTC.isdisjoint(tags)
    if isinstance(profile := tags.get(ICC_TAG), tuple):
        found.icc = profile[1]
    described = {tag: value for tag, value in tags.items() if tag in EXIF_TAGS}
    found.exif, found.exif_sound = read_inner_directories(stream, described, order, big)
    kept = {tag: value for tag, value in tags.items() if tag in _DECODING_TAGS}
    found.file = _write(kept, layout, _parts(stream, tags, layout), order)
    return found


@dataclass(frozen=True)
class _Layout:
    """How the pixels are divided: into strips, which are as wide as the picture, or into tiles."""

    compression: int
    tiled: bool
    width: int
    height: int
    across: int
    down: int
    planes: int
    row_bytes: int  # of a strip or tile before compression; at least, where colours have a lower resolution
    exact: bool  # ``row_bytes`` is exact
    last_rows: int  # of the strips at the bottom

    @property
    def count(self) -> int:
        return self.across * self.down * self.planes


def _bits(tags: Directory) -> int:
    """Bits of a sample. Kinds that would silently lose depth are refused."""
    bits = set(integers(tags, _BITS, (1,)))
    integer, interleaved = set(integers(tags, _SAMPLE_FORMAT, (1,))) == {1}, integers(tags, _PLANAR, (1,))[0] == 1
    # Grey or RGB, alpha not multiplied in.
    plain = integers(tags, _PHOTOMETRIC, (-1,))[0] in (1, 2) and 1 not in integers(tags, _EXTRA_SAMPLES)
    if not integer or (bits == {16} and not (interleaved and plain)) or not bits <= {1, 2, 4, 8, 16}:
        kind = f"TIFF with {max(bits)}-bit samples of this kind"
        raise Unreadable(f"{kind} is not supported, grey and RGB of 8 or 16 bits are")
    return max(8, *bits)


def _layout(tags: Directory) -> _Layout:
    width, height, photometric = (integers(tags, tag, (0,))[0] for tag in (_WIDTH, _HEIGHT, _PHOTOMETRIC))
    samples, planar, compression = (integers(tags, tag, (1,))[0] for tag in (_SAMPLES, _PLANAR, _COMPRESSION))
    if compression not in _RATIOS:
        raise Unreadable(f"TIFF with compression {compression} is not supported, LZW, deflate and JPEG are")
    if not (width > 0 and height > 0 and 0 < samples <= 16):
        raise Unreadable(f"its size is {width}x{height} with {samples} samples a pixel")
    check_size(width, height)
    if compression in _FAX and height > _MAX_FAX_ROWS:
        raise Unreadable(f"it has {height} rows in a code for faxes: at most {_MAX_FAX_ROWS} are read")
    tiled = _TILE_PLACES in tags
    part_width, part_height = width, min(integers(tags, _ROWS_PER_STRIP, (height,))[0], height)
    if tiled:
        part_width, part_height = (integers(tags, tag, (0,))[0] for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if min(part_width, part_height) <= 0 or part_width * part_height > max(1 << 24, 4 * width * height):
        raise Unreadable(f"its strips or tiles are {part_width}x{part_height}")
    across, down = -(-width // part_width), -(-height // part_height)
    planes = samples if planar == 2 else 1
    exact = photometric != 6  # YCbCr
    row_bits = part_width * (max(integers(tags, _BITS, (1,))) * samples // planes if exact else 8)
    last_rows = part_height if tiled else height - (down - 1) * part_height
    layout = _Layout(
        compression, tiled, part_width, part_height, across, down, planes, (row_bits + 7) // 8, exact, last_rows
    )
    if layout.count > _MAX_PARTS:
        raise Unreadable(f"it has {layout.count} strips or tiles: at most {_MAX_PARTS} are read")
    return layout


def _parts(stream: BinaryIO, tags: Directory, layout: _Layout) -> Iterator[bytes]:
    """The coded strips or tiles, one by one.

    Raises:
        Unreadable: some are missing, or too short for the pixels that they should hold.
    """
    places = integers(tags, _TILE_PLACES if layout.tiled else _STRIP_PLACES)
    whole = [layout.row_bytes * layout.height] if layout.count == 1 and layout.compression == _NO_COMPRESSION else ()
    sizes = integers(tags, _TILE_BYTES if layout.tiled else _STRIP_BYTES, whole)
    there = min(len(places), len(sizes))
    if there < layout.count:
        raise Unreadable(f"it is truncated: {there} of {layout.count} strips or tiles are there")
    for number, (place, size) in enumerate(zip(places[: layout.count], sizes, strict=False)):
        rows = layout.last_rows if number % layout.down == layout.down - 1 else layout.height
        raw = layout.row_bytes * rows
        stream.seek(place)
        part = stream.read(size := min(size, 2 * raw + _SLACK))
        slack = 0 if layout.compression == _NO_COMPRESSION else _SLACK
        truncated = raw > _RATIOS[layout.compression] * len(part) + slack
        if layout.compression in (*_FAX, _JPEG):  # their decoders make up what is missing
            truncated |= len(part) < size
        if layout.compression in _FAX:  # a row takes a bit or more
            truncated |= rows > 8 * len(part)
        if truncated:
            raise Unreadable(f"it is truncated: {len(part)} bytes cannot hold {layout.width}x{rows} pixels")
        if layout.compression == _JPEG:
            check_scans(layout.count * part.count(b"\xff\xda"), layout.width * layout.height)
        yield part[:raw] if layout.compression == _NO_COMPRESSION and layout.exact else part


def _write(tags: Directory, layout: _Layout, parts: Iterator[bytes], order: str) -> io.BytesIO:
    """A TIFF file of these tags and strips or tiles; its numbers in the byte order that the samples have."""
    stream = io.BytesIO()
    stream.write((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    places, sizes, height = [], [], layout.height
    for part in parts:
        places.append(stream.tell())
        sizes.append(len(part))
        stream.write(part)
    if layout.compression == _NO_COMPRESSION and layout.exact and not layout.tiled and layout.planes == 1:
        # They follow each other: one strip is quicker to decode than a hundred thousand.
        places, sizes, height = places[:1], [sum(sizes)], (layout.down - 1) * height + layout.last_rows
    if layout.tiled:
        shape: Directory = {_TILE_WIDTH: longs(layout.width), _TILE_HEIGHT: longs(height)}
        shape |= {_TILE_PLACES: longs(*places), _TILE_BYTES: longs(*sizes)}
    else:
        shape = {_ROWS_PER_STRIP: longs(height)}
        shape |= {_STRIP_PLACES: longs(*places), _STRIP_BYTES: longs(*sizes)}
    stream.write(bytes(stream.tell() % 2))  # a directory begins at an even place
    place = write_directory(stream, tags | shape, order)
    stream.seek(4)
    stream.write(struct.pack(order + "I", place))
    return stream
