"""TIFF files: what Pillow and OpenCV do not tell of them is checked, and files of any depth are written."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from .metadata import Fields
from .png import LEVEL

# Tags by the names of TIFF 6.0 and its supplements.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 257, 258, 259, 262, 277, 284
_PREDICTOR, _ROWS_PER_STRIP = 317, 278
_STRIP_PLACES, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILE_PLACES, _TILE_BYTES = 273, 279, 322, 323, 324, 325
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _ICC = 338, 339, 34675
_XMP_AND_IPTC = (700, 33723, 34377)
_RAW, _DEFLATE = 1, 8
_MAX_PARTS = 1 << 17
_BLOCK_BYTES = 1 << 20  # compressed at a time


def check_tiff(image: Image.Image, stream: BinaryIO) -> int:
    """The bits of one sample in the first page, 8 for less.

    Raises ``ValueError`` where the file lacks pixels, is of a kind that would lose depth, or asks for too much work.
    """
    assert isinstance(image, TiffImageFile)
    tags = image.tag_v2

    def values(tag: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        value = tags.get(tag, default)
        return tuple(value) if isinstance(value, Sequence) else (value,)

    bits, formats = set(values(_BITS, (1,))), set(values(_SAMPLE_FORMAT, (1,)))
    # Grey or RGB, interleaved, alpha not multiplied in.
    plain = tags.get(_PHOTOMETRIC) in (1, 2) and tags.get(_PLANAR, 1) == 1 and 1 not in values(_EXTRA_SAMPLES)
    if formats != {1} or (bits == {16} and not plain) or not bits <= {1, 2, 4, 8, 16}:
        kind = f"TIFF with {max(bits)}-bit samples of this kind"
        raise ValueError(f"{kind} is not supported, grey and RGB of 8 or 16 bits are")
    width, height = tags[_WIDTH], tags[_HEIGHT]
    part_width, part_height = tags.get(_TILE_WIDTH, width), tags.get(_TILE_HEIGHT, tags.get(_ROWS_PER_STRIP, height))
    if part_width * min(part_height, height) > max(1 << 24, 4 * width * height):
        raise ValueError(f"its tiles are {part_width}x{part_height}")
    count = -(-width // part_width) * -(-height // part_height)
    places, sizes = values(_STRIP_PLACES) or values(_TILE_PLACES), values(_STRIP_BYTES) or values(_TILE_BYTES)
    length = stream.seek(0, io.SEEK_END)
    ends = [place + size for place, size in zip(places, sizes, strict=False)]
    # Some of libtiff's decoders make up what is missing; of raw samples Pillow itself tells that they are cut off.
    if tags.get(_COMPRESSION, _RAW) != _RAW and (len(ends) < count or max(ends) > length):
        raise ValueError("it is truncated: some of its strips or tiles are not there")
    if count > _MAX_PARTS or (tags.get(_COMPRESSION, _RAW) != _RAW and sum(sizes) > length):
        raise ValueError(f"its {count} strips or tiles overlap, or are more than {_MAX_PARTS}")
    return max(8, *bits)


def has_xmp(image: Image.Image) -> bool:
    """Whether a file that Pillow has opened has XMP or IPTC metadata."""
    tagged = isinstance(image, TiffImageFile) and any(tag in image.tag_v2 for tag in _XMP_AND_IPTC)
    return tagged or "xmp" in image.info or "photoshop" in image.info


def write_tiff(stream: BinaryIO, samples: np.ndarray, metadata: Fields | None = None, icc: bytes | None = None) -> None:
    """Write a little-endian TIFF file, deflated with horizontal differences.

    Args:
        samples: (H, W, C) uint8 or uint16, with C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        metadata: further tags.
        icc: the ICC profile.
    """
    height, width, channels = samples.shape
    deflate = zlib.compressobj(LEVEL)
    coded = []
    step = max(1, _BLOCK_BYTES // samples[0].nbytes)
    for start in range(0, height, step):
        differences = samples[start : start + step].copy()
        differences[:, 1:] -= samples[start : start + step, :-1]  # wraps around, as the format wants it
        little_endian = differences.astype(samples.dtype.newbyteorder("<"), copy=False)
        coded.append(deflate.compress(little_endian.tobytes()))
    strip = b"".join([*coded, deflate.flush()])
    tags = {_WIDTH: width, _HEIGHT: height, _BITS: (8 * samples.itemsize,) * channels, _COMPRESSION: _DEFLATE}
    tags |= {_PHOTOMETRIC: 1 if channels < 3 else 2, _SAMPLES: channels, _PLANAR: 1}  # black is zero, or RGB
    tags |= {_STRIP_PLACES: 0, _ROWS_PER_STRIP: height, _STRIP_BYTES: len(strip)}  # Pillow counts from its own end
    tags |= {_PREDICTOR: 2}  # horizontal differences
    tags |= {_EXTRA_SAMPLES: 2} if channels in (2, 4) else {}  # alpha, colours not multiplied by it
    tags |= {} if icc is None else {_ICC: icc}
    directory = ImageFileDirectory_v2()
    for tag, value in (tags | (metadata or {})).items():
        directory[tag] = value
    stream.write(b"II*\0\x08\0\0\0" + directory.tobytes(8) + strip)
