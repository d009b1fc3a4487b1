"""TIFF files: the first page's directory is checked and written anew for the decoders, and files are written.

A TIFF file is a chain of directories of tags, with the strips or tiles of the pixels anywhere between them. The
decoders see a directory of the tags alone that they need, and no others that might be odd, huge or endless.
"""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from typing import BinaryIO

import numpy as np

from .containers import FirstPicture, check_scans, check_size
from .metadata import EXIF_TAGS, with_inner_directories
from .png import LEVEL
from .tiff_tags import ICC_TAG, Directory, Tags, Unreadable, integers, longs, read_directory, shorts, write_directory

# Tags by the names of TIFF 6.0 and its supplements.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 257, 258, 259, 262, 277, 284
_STRIP_PLACES, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILE_PLACES, _TILE_BYTES = 322, 323, 324, 325
_PREDICTOR, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 317, 338, 339
_DECODING_TAGS = frozenset(
    [_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _STRIP_PLACES, _ROWS_PER_STRIP]
    + [_STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILE_PLACES, _TILE_BYTES, _PREDICTOR, _EXTRA_SAMPLES, _SAMPLE_FORMAT]
    + [266, 292, 293, 320, 332, 347, 529, 530, 531, 532]  # bit order, fax, palette, JPEG, YCbCr
)
_XMP_AND_IPTC = frozenset([700, 33723, 34377])
_RAW, _LZW, _JPEG, _DEFLATE = 1, 5, 7, 8
_FAX = (2, 3, 4)
_YCBCR = 6  # photometric interpretation, whose rows may be shorter than its width
_COMPRESSIONS = (_RAW, *_FAX, _LZW, _JPEG, _DEFLATE, 32946, 32773, 50000, 50001)  # deflate, PackBits, zstd, WebP
_MAX_PARTS = 1 << 17
_MAX_FAX_ROWS = 1_000_000  # libtiff reports each damaged one, which takes time
_STRIP_BYTES_WRITTEN = 1 << 20  # before compression


def first_page(stream: BinaryIO) -> FirstPicture:
    """The first page of the TIFF or BigTIFF in ``stream``.

    Raises:
        Unreadable: the file is damaged, lacks pixels, is of a kind that would lose depth, or asks for too much work.
    """
    file = io.BytesIO()
    shutil.copyfileobj(stream, file, 1 << 20)
    data = file.getbuffer()
    head = bytes(data[:16]).ljust(16, b"\0")
    order, big = ("<" if head[:2] == b"II" else ">"), b"+" in head[2:4]
    (place,) = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)
    tags, following = read_directory(file, place, order, _DECODING_TAGS | _XMP_AND_IPTC | EXIF_TAGS | {ICC_TAG}, big)
    picture = FirstPicture(file, bits=_bits(tags), several=following != 0, xmp=not _XMP_AND_IPTC.isdisjoint(tags))
    _check_parts(tags, data)
    picture.icc = tags[ICC_TAG][1] if ICC_TAG in tags else None
    described = {tag: value for tag, value in tags.items() if tag in EXIF_TAGS}
    picture.exif, picture.exif_sound = with_inner_directories(file, described, order, big)
    end = len(data) + len(data) % 2  # a directory begins at an even place
    del data  # the file cannot grow while there is a view of it
    file.seek(end)
    place = write_directory(file, {tag: value for tag, value in tags.items() if tag in _DECODING_TAGS}, order)
    file.seek(0)
    file.write((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", place))
    return picture


def _bits(tags: Tags) -> int:
    """Bits of a sample. Kinds that would silently lose depth are refused."""
    bits = set(integers(tags, _BITS, (1,)))
    integer, interleaved = set(integers(tags, _SAMPLE_FORMAT, (1,))) == {1}, integers(tags, _PLANAR, (1,))[0] == 1
    # Grey or RGB, alpha not multiplied in.
    plain = integers(tags, _PHOTOMETRIC, (-1,))[0] in (1, 2) and 1 not in integers(tags, _EXTRA_SAMPLES)
    if not integer or (bits == {16} and not (interleaved and plain)) or not bits <= {1, 2, 4, 8, 16}:
        kind = f"TIFF with {max(bits)}-bit samples of this kind"
        raise Unreadable(f"{kind} is not supported, grey and RGB of 8 or 16 bits are")
    return max(8, *bits)


def _check_parts(tags: Tags, data: memoryview) -> None:
    """Raise ``Unreadable`` where strips or tiles are missing, outside of the file, or take too much work."""
    width, height = (integers(tags, tag, (0,))[0] for tag in (_WIDTH, _HEIGHT))
    samples, planar, compression = (integers(tags, tag, (1,))[0] for tag in (_SAMPLES, _PLANAR, _COMPRESSION))
    if compression not in _COMPRESSIONS:
        raise Unreadable(f"TIFF with compression {compression} is not supported, LZW, deflate and JPEG are")
    if not (width > 0 and height > 0 and 0 < samples <= 16):
        raise Unreadable(f"its size is {width}x{height} with {samples} samples a pixel")
    check_size(width, height)
    if compression in _FAX and height > _MAX_FAX_ROWS:
        raise Unreadable(f"it has {height} rows in a code for faxes: at most {_MAX_FAX_ROWS} are read")
    part_width, part_height = width, min(integers(tags, _ROWS_PER_STRIP, (height,))[0], height)
    if tiled := _TILE_PLACES in tags:
        part_width, part_height = (integers(tags, tag, (0,))[0] for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if min(part_width, part_height) <= 0 or part_width * part_height > max(1 << 24, 4 * width * height):
        raise Unreadable(f"its strips or tiles are {part_width}x{part_height}")
    down, planes = -(-height // part_height), samples if planar == 2 else 1
    count = -(-width // part_width) * down * planes
    if count > _MAX_PARTS:
        raise Unreadable(f"it has {count} strips or tiles: at most {_MAX_PARTS} are read")
    places = integers(tags, _TILE_PLACES if tiled else _STRIP_PLACES)[:count]
    sizes = integers(tags, _TILE_BYTES if tiled else _STRIP_BYTES, [0] if count == 1 else ())[:count]
    if compression == _RAW and integers(tags, _PHOTOMETRIC, (0,))[0] != _YCBCR:  # the decoders do not ask for a size
        row_bytes = (part_width * max(integers(tags, _BITS, (1,))) * samples // planes + 7) // 8
        rows = [part_height if tiled else min(part_height, height - n % down * part_height) for n in range(count)]
        sizes = [row_bytes * number for number in rows]
    elif sum(sizes) > len(data):
        raise Unreadable("its strips or tiles overlap, or it is truncated")
    parts = [(place, size) for place, size in zip(places, sizes, strict=False) if place + size <= len(data)]
    if len(parts) < count:
        raise Unreadable(f"it is truncated: {len(parts)} of {count} strips or tiles are there")
    if compression == _JPEG:
        scans = sum(bytes(data[place : place + size]).count(b"\xff\xda") for place, size in parts)
        check_scans(scans, part_width * part_height)


def write_tiff(stream: BinaryIO, samples: np.ndarray, metadata: Directory | None = None) -> None:
    """Write a little-endian TIFF file, deflated with horizontal differences.

    Args:
        samples: (H, W, C) uint8 or uint16, with C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        metadata: further tags.
    """
    height, width, channels = samples.shape
    stream.write(b"II*\0\0\0\0\0")  # the directory's place is filled in at the end
    rows_per_strip = min(height, max(1, _STRIP_BYTES_WRITTEN // samples[0].nbytes))
    places, sizes = [], []
    for start in range(0, height, rows_per_strip):
        differences = samples[start : start + rows_per_strip].copy()
        differences[:, 1:] -= samples[start : start + rows_per_strip, :-1]  # wraps around, as the format wants it
        strip = zlib.compress(differences.astype(samples.dtype.newbyteorder("<"), copy=False).tobytes(), LEVEL)
        places.append(stream.tell())
        sizes.append(len(strip))
        stream.write(strip + b"\0" * (len(strip) % 2))  # every part begins at an even offset
    directory: Directory = {
        _WIDTH: longs(width),
        _HEIGHT: longs(height),
        _BITS: shorts(*[8 * samples.itemsize] * channels),
        _COMPRESSION: shorts(_DEFLATE),
        _PHOTOMETRIC: shorts(1 if channels < 3 else 2),  # black is zero, or RGB
        _STRIP_PLACES: longs(*places),
        _SAMPLES: shorts(channels),
        _ROWS_PER_STRIP: longs(rows_per_strip),
        _STRIP_BYTES: longs(*sizes),
        _PLANAR: shorts(1),  # interleaved
        _PREDICTOR: shorts(2),  # horizontal differences
    }
    if channels in (2, 4):
        directory[_EXTRA_SAMPLES] = shorts(2)  # alpha, colours not multiplied by it
    place = write_directory(stream, directory | (metadata or {}))
    stream.seek(4)
    stream.write(struct.pack("<I", place))
