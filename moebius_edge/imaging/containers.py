"""Takes out of a picture file what its first picture needs, so that decoders see nothing else.

The parts of a file that describe it are a decoder's most fragile ones: text that inflates to gigabytes, a hundred
thousand directories, a profile of the wrong type. Here PNG and GIF files (JPEG: ``jpeg_file``, TIFF: ``tiff_page``) are
read part by part, within limits, into a file of the same format that holds the coded pixels of the first picture
alone, and its metadata beside it. Work that no picture needs is refused before it is done.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO

from . import metadata as meta
from .png_tiff import MAX_ICC_BYTES, PNG_SIGNATURE, Buffer, Directory, Unreadable, png_chunk

MAX_PIXELS = 250_000_000  # above the largest camera sensors (200 MP), below what a hostile header would claim
MAX_PARTS = 1_000_000  # chunks of a PNG, segments of a JPEG, blocks of a GIF: reading so many takes a second or two
SLACK = 1 << 16  # bytes that the estimates of a compressed size may be off by
DEFLATE_RATIO = 1032  # deflate cannot compress better
_PNG_METADATA = (b"iCCP", b"pHYs", b"eXIf", *meta.PNG_COLOUR_CHUNKS)
_MAX_TEXT = 1 << 20  # bytes of a text chunk that holds EXIF


class TooLarge(Unreadable):
    """The picture has too many pixels; the text gives its size and the limit."""


def check_size(width: int, height: int, most: int = MAX_PIXELS, of_what: str = "") -> None:
    """Raise ``TooLarge`` where a picture of this size has more pixels than ``most``."""
    if width * height > most:
        size = f"{width}x{height}, {width * height / 1e6:.0f} megapixels"
        raise TooLarge(f"{size}: at most {most / 1e6:.0f}{of_what} are read")


@dataclass
class FirstPicture:
    """The first picture of a file.

    Attributes:
        file: a file of the same format that holds that picture alone, in memory; of a format that is not taken
            apart, the file itself.
        bits: of one sample in the file, 8 for less.
        ended: the end of the picture is marked, or its length is checked.
        several: the file holds further pictures (frames or pages).
        transparent_colour: body of a PNG's tRNS chunk.
        icc, dpi, png_colour: as of ``Metadata``; the profile unchecked.
        exif, exif_sound: as ``metadata.read_exif`` returns them.
        has_exif: an EXIF block was met; of several the first counts.
        xmp: the file has XMP or IPTC metadata, which are not kept.
        notes: what was left out, each the end of a sentence that begins with the file's name.
    """

    file: BinaryIO
    bits: int = 8
    ended: bool = True
    several: bool = False
    transparent_colour: bytes | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    png_colour: list[tuple[bytes, bytes]] = field(default_factory=list)
    exif: Directory = field(default_factory=dict)
    exif_sound: bool = True
    has_exif: bool = False
    xmp: bool = False
    notes: list[str] = field(default_factory=list)

    def contents(self) -> Buffer:
        """All of ``file``."""
        if isinstance(self.file, io.BytesIO):
            return self.file.getbuffer()
        self.file.seek(0)
        return self.file.read()

    def take_exif(self, block: bytes) -> None:
        """Read an EXIF block into ``exif``, unless there was one before."""
        if not self.has_exif:
            self.has_exif = True
            self.exif, self.exif_sound = meta.read_exif(block)


def first_picture(form: str, stream: BinaryIO) -> FirstPicture:
    """The first picture of the file in ``stream``, which is in the format ``form``: neither JPEG nor TIFF.

    Raises:
        Unreadable: the file is damaged, of a kind that would lose depth, or asks for far too much work.
    """
    formats = {"PNG": _png, "GIF": _gif, "BMP": _bmp, "AVIF": _avif, "JPEG2000": _jpeg2000}
    return formats.get(form, FirstPicture)(stream)


def _png(stream: BinaryIO) -> FirstPicture:
    found = FirstPicture(io.BytesIO(), ended=False)
    found.file.write(PNG_SIGNATURE)
    header, coded_bytes = b"", 0
    taken = set()  # of the other chunks, the first of each kind counts
    stream.seek(len(PNG_SIGNATURE))
    for _ in range(MAX_PARTS):
        head = stream.read(8)
        name = head[4:]
        if len(head) < 8 or name == b"IEND":
            found.ended = name == b"IEND"
            break
        length = int.from_bytes(head[:4], "big")
        critical = name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
        if name in (b"tEXt", b"zTXt", b"iTXt"):
            _png_text(found, stream, length, name == b"zTXt")
            continue
        if not critical and (name not in _PNG_METADATA or name in taken or length > MAX_ICC_BYTES):
            found.several |= name == b"fdAT"
            found.icc = b"" if name == b"iCCP" and name not in taken else found.icc  # too long: it counts as damaged
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        if name == b"IDAT":
            coded_bytes += length
            if len(header) != 13:
                raise Unreadable("its header is damaged")
            if coded_bytes > 2 * png_bytes(header) + SLACK:
                raise Unreadable("it has more coded data than its pixels can take")
        body, checksum = stream.read(length), stream.read(4)
        if len(checksum) < 4:
            found.file.write(png_chunk(name, body) if name == b"IDAT" else b"")
            break
        if zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(checksum, "big"):
            if critical:
                raise Unreadable(f"its {name.decode('latin-1')} chunk is damaged")
            taken.add(name)
            found.notes.append(f"has a damaged {name.decode('latin-1')} chunk: left out")
            continue
        if critical:
            for part in (head, body, checksum):
                found.file.write(part)
            header = body if name == b"IHDR" else header
            found.transparent_colour = body if name == b"tRNS" else found.transparent_colour
        else:
            taken.add(name)
            _png_metadata(found, name, body)
    else:
        raise Unreadable(f"it has more than {MAX_PARTS} chunks")
    if len(header) != 13 or not coded_bytes:
        raise Unreadable("it is truncated")
    found.bits = 16 if header[8] == 16 else 8
    check_size(*struct.unpack(">II", header[:8]))
    if png_bytes(header) > DEFLATE_RATIO * coded_bytes + SLACK:
        raise Unreadable(f"it is truncated: {coded_bytes} bytes cannot hold its pixels")
    found.file.write(png_chunk(b"IEND", b""))
    return found


def _png_metadata(found: FirstPicture, name: bytes, body: bytes) -> None:
    if name == b"iCCP":
        start = body.find(b"\0") + 2  # after the profile's name and the method of compression
        try:
            found.icc = zlib.decompressobj().decompress(body[start:], MAX_ICC_BYTES)
        except zlib.error:
            found.icc = b""  # it will not fit the pixels
    elif name == b"pHYs":
        found.dpi = meta.png_resolution(body)
        if found.dpi is None and body[:4] != body[4:8]:
            found.notes.append("gives the shape of its pixels without a unit: left out")
    elif name == b"eXIf":
        found.take_exif(body)
    elif meta.check_png_colour(name, body):
        found.png_colour.append((name, body))
    else:
        found.notes.append(f"has a damaged {name.decode('latin-1')} chunk: left out")


def _png_text(found: FirstPicture, stream: BinaryIO, length: int, compressed: bool) -> None:
    """Look at the keyword of a text chunk; only EXIF in hexadecimal digits, as ImageMagick writes it, is read."""
    body = stream.read(min(length, 32))
    keyword = body.partition(b"\0")[0]
    rest = length - len(body)
    if keyword in (b"Raw profile type exif", b"Raw profile type APP1") and length <= _MAX_TEXT and not found.has_exif:
        body, rest = body + stream.read(rest), 0
        text = body[len(keyword) + 1 :]
        try:
            text = zlib.decompressobj().decompress(text[1:], _MAX_TEXT) if compressed else text
            found.take_exif(bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("latin-1")))
        except (zlib.error, ValueError):
            found.take_exif(b"")  # damaged
    found.xmp |= keyword == b"XML:com.adobe.xmp"
    stream.seek(rest + 4, io.SEEK_CUR)


def png_bytes(header: bytes) -> int:
    """The length of a PNG's pixels before compression, by the body of its IHDR chunk."""
    width, height, bits, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits *= {2: 3, 4: 2, 6: 4}.get(colour_type, 1)
    passes = [(0, 0, 1, 1)]  # first column and row, steps
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    total = 0
    for x, y, step_x, step_y in passes:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return total


def png_is_complete(file: BinaryIO) -> bool:
    """Whether the coded data of a PNG, which ``first_picture`` has made, holds all of its pixels."""
    file.seek(len(PNG_SIGNATURE))
    inflate, missing = zlib.decompressobj(), 1
    while len(head := file.read(8)) == 8:
        body = file.read(int.from_bytes(head[:4], "big"))
        file.seek(4, io.SEEK_CUR)
        if head[4:] == b"IHDR":
            missing = png_bytes(body)
        for start in range(0, len(body) if head[4:] == b"IDAT" else 0, SLACK):
            part = body[start : start + SLACK]
            try:
                while part and missing > 0:
                    missing -= len(inflate.decompress(part, SLACK))
                    part = inflate.unconsumed_tail
            except zlib.error:
                return False
    return missing <= 0


def _gif(stream: BinaryIO) -> FirstPicture:
    """Keeps the first frame and what gives it a transparent colour."""
    found = FirstPicture(io.BytesIO())
    stream.seek(0)
    head = stream.read(13)
    kept = [head, stream.read(3 << (head[10] & 7) + 1) if len(head) == 13 and head[10] & 0x80 else b""]
    has_frame, blocks = False, 0
    control = b""
    while (kind := stream.read(1)) in (b"!", b","):
        if kind == b"," and has_frame:
            found.several = True
            break
        lead = kind + (stream.read(1) if kind == b"!" else stream.read(9))
        if kind == b",":
            lead += stream.read(3 << (lead[9] & 7) + 1) if len(lead) == 10 and lead[9] & 0x80 else b""
            lead += stream.read(1)  # bits of the shortest code
        parts = [lead]
        while (size := stream.read(1)) and blocks < MAX_PARTS:
            blocks += 1
            parts += [size, stream.read(size[0])]
            if size == b"\0":
                break
        if blocks >= MAX_PARTS:
            raise Unreadable(f"it has more than {MAX_PARTS} blocks")
        if lead == b"!\xf9":
            control = b"".join(parts)
        if kind == b",":
            kept += [control, *parts]
            has_frame = True
    found.file = io.BytesIO(b"".join([*kept, b";"]))
    return found


def _bmp(stream: BinaryIO) -> FirstPicture:
    """Takes the embedded profile, which Pillow does not read."""
    found = FirstPicture(stream)
    head = stream.read(138)
    if len(head) == 138 and head[70:74] == b"DEBM":
        start, length = struct.unpack_from("<II", head, 126)
        stream.seek(14 + start)
        found.icc = stream.read(min(length, MAX_ICC_BYTES))
    return found


def _avif(stream: BinaryIO) -> FirstPicture:
    """Takes the depth and the colour space, which Pillow does not give."""
    found = FirstPicture(stream)
    head = stream.read(SLACK)
    if (start := head.find(b"av1C")) >= 0 and len(head) > start + 6:
        found.bits = {0: 8, 0x40: 10}.get(head[start + 6] & 0x60, 12)
    if (start := head.find(b"colrnclx")) >= 0 and len(head) > start + 12:
        primaries, curve = struct.unpack_from(">HH", head, start + 8)
        if (primaries not in (1, 2) or curve not in (1, 2, 6, 13)) and max(primaries, curve) < 256:  # not as sRGB
            found.png_colour = [(b"cICP", bytes([primaries, curve, 0, 1]))]
    return found


def _jpeg2000(stream: BinaryIO) -> FirstPicture:
    """Takes the depth, which Pillow does not give."""
    found = FirstPicture(stream)
    head = stream.read(SLACK)
    if (start := head.find(b"\xff\x4f\xff\x51")) >= 0 and len(head) > start + 42:
        found.bits = max(8, (head[start + 42] & 127) + 1)
    return found
