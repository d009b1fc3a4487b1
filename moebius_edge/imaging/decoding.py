"""From a picture file to upright samples in the file's own depth, without loss and without surprises.

Pillow decodes pictures of 8 bits and OpenCV those of 16. Before they do, the file's header is checked against limits
of memory and time. Whatever is wrong with a file becomes an error of one line.
"""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

from ..errors import MachineError, MoebiusError, UsageError
from .metadata import Metadata, is_profile, plausible_dpi, read_exif
from .picture import Picture
from .png import PNG_SIGNATURE, read_png
from .tiff import check_tiff, has_xmp

_SUFFIXES = {  # by format; none of these starts another program
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpx"),
}
FORMATS = tuple(_SUFFIXES)
SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)  # what a folder is searched for
MAX_PIXELS = 250_000_000  # above the largest camera sensors (200 MP), below what a hostile header would claim
# What these decoders take in memory and time for a pixel is a multiple of the others'.
_MAX_PIXELS = {"WEBP": 70_000_000, "AVIF": 70_000_000, "JPEG2000": 60_000_000}
_MAX_BYTES_AT_16_BITS = 1_000_000_000  # OpenCV takes as much again
_MAX_FILE_BYTES = 1_100_000_000
_COPIED_PIXELS = 1 << 20  # at a time
# Of a JPEG in several scans all numbers are kept in memory, and each scan takes as long as a picture.
_MAX_PIXELS_IN_SCANS = 140_000_000
_MAX_SCANS = 20  # of a JPEG of any size; the usual script for progressive CMYK has 18
_MAX_SCANNED_PIXELS = 1_500_000_000  # pixels times scans, where there are more scans; two or three seconds of work
_MAX_SEGMENTS = 10_000  # of a JPEG
# A marker of a JPEG: none of the bytes that stand in coded data, which are stuffing (0) and restarts (D0 to D7).
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_JPEG_END = b"\xff\xd9"
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # the frames whose pixels are spread over scans
_NOISE = bytes((73 * i + i // 7) % 251 for i in range(4096))  # decodes to anything but a blank
_MAX_JUNK = 256  # bytes between two segments of a JPEG's header
_PLAIN_MODES = {
    **dict.fromkeys(("1", "L", "LA", "La"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "YCbCr", "CMYK"), "RGB"),
}
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # lengths of the second header, one for each version of the format
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of damage would go to stderr
Convert = Callable[[Image.Image], Image.Image]
_process_state = threading.Lock()  # held while Pillow's limit or stderr is changed


def picture_format(head: bytes) -> str | None:
    """The member of ``FORMATS`` that a file with these first bytes (32 are enough) is in, whatever its name."""
    signatures = {
        "PNG": head.startswith(b"\x89PNG\r\n\x1a\n"),
        "JPEG": head.startswith(b"\xff\xd8\xff"),
        "TIFF": head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
        "WEBP": head[:4] == b"RIFF" and head[8:12] == b"WEBP",
        "BMP": head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS,
        "GIF": head.startswith((b"GIF87a", b"GIF89a")),
        "AVIF": head[4:8] == b"ftyp" and (head[8:12] in (b"avif", b"avis") or b"avif" in head[16:32]),
        "JPEG2000": head.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")),
    }
    return next((form for form, matches in signatures.items() if matches), None)


def read_picture(
    path: str | os.PathLike[str], contents: BinaryIO | None = None, max_pixels: int = MAX_PIXELS
) -> Picture:
    """Read a PNG, JPEG, TIFF, WebP, BMP or GIF file, turned upright by its EXIF orientation.

    Grey stays grey and 16 bits stay 16, but AVIF, and JPEG 2000 in colour, are read at 8 bits. Palettes become RGB, a
    transparent colour becomes alpha, 1 bit becomes 8. CMYK becomes sRGB by its profile, and of several frames the
    first is read: these two leave a note. With ``contents`` they are read in place of a file, as from a
    member of an archive, and ``path`` is their name in errors.

    Raises:
        MachineError: the file is missing or may not be read.
        UsageError: it is no picture, damaged, larger than ``max_pixels``, or of a kind that would lose depth.
    """
    with _opened(Path(path), contents) as (stream, form):
        png = read_png(stream) if form == "PNG" else None
        jpeg = _scan_jpeg(stream) if form == "JPEG" else None
        scans = jpeg.scans if jpeg else 1
        file = png.file if png else stream
        if jpeg is not None and not jpeg.marked:
            file = io.BytesIO(b"".join((jpeg.coded, _JPEG_END)))
        image = _header(file, form)
        bits = png.bits if png else check_tiff(image, stream) if form == "TIFF" else 8
        _check_size(path, image, form, bits, scans, max_pixels)
        # A Huffman code takes a bit or more for a block of the finest component: 8x8 pixels, of a quarter of them.
        if jpeg is not None and image.width * image.height > 8 * 256 * len(jpeg.coded) + (1 << 16):
            raise ValueError("it is truncated")
        exif, orientation, exif_dpi, sound = read_exif(image, png.chunks.get(b"eXIf") if png else None)
        icc = png.icc() if png else image.info.get("icc_profile")
        several = png.animated if png else form != "JPEG" and getattr(image, "is_animated", False)
        xmp = png.xmp if png else has_xmp(image)
        sentences = {
            "has more frames or pages than one: only the first is used": several,
            "lacks the mark that ends a JPEG file: its pixels are all there": jpeg is not None and not jpeg.marked,
            "has damaged EXIF metadata: what could not be read of them is left out": not sound,
            "has XMP or IPTC metadata, which may hold a small copy of the picture: left out": xmp,
        }
        notes = [sentence for sentence, applies in sentences.items() if applies]
        cmyk, how = _cmyk_to_srgb(image) if image.mode == "CMYK" else (None, "")
        notes += [f"is CMYK: converted to sRGB {how}"] if how else []
        samples = _decode16(file, len(image.getbands())) if bits == 16 else _decode8(image, form, cmyk)
        if jpeg is not None and not _is_complete(jpeg, image):
            raise ValueError("it is truncated")
        turn = 1 if form == "TIFF" else orientation  # both decoders turn a TIFF upright
        samples = upright(samples, turn)
        indices = upright(np.asarray(image), turn) if image.mode == "P" else None
    if image.mode == "CMYK":
        icc = None
    elif icc is not None and not is_profile(icc, b"GRAY" if samples.shape[2] < 3 else b"RGB "):
        notes.append("has an ICC profile that is damaged or does not fit its pixels: left out")
        icc = None
    dpi = _resolution(image, form, exif_dpi, orientation)
    metadata = Metadata(icc, dpi, png.colour() if png else (), exif)
    picture = Picture.from_array(samples, metadata, tuple(f"{path} {note}" for note in notes))
    return replace(picture, orientation=orientation, indices=indices)


def _resolution(
    image: Image.Image, form: str, from_exif: tuple[float, float] | None, orientation: int
) -> tuple[float, float] | None:
    """Pixels per inch across and down of the upright picture, None where they are not known."""
    # Pillow makes up a resolution where a JPEG's EXIF has none.
    declared = form not in ("TIFF", "WEBP") and (form != "JPEG" or image.info.get("jfif_unit"))
    dpi = plausible_dpi(*map(float, image.info["dpi"])) if declared and "dpi" in image.info else from_exif
    return dpi[::-1] if dpi is not None and orientation > 4 else dpi


def _open(path: Path) -> BinaryIO:
    try:
        if path.exists() and not path.is_file():
            kind = "a folder: name a picture in it" if path.is_dir() else "not a regular file: name a picture"
            raise UsageError(f"{path} is {kind}")
        return path.open("rb")
    except FileNotFoundError:
        raise MachineError(f"there is no picture {path}", f"check the name with `ls {path.parent}`") from None
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}", f"check it with `ls -l {path}`") from None


@contextmanager
def _opened(path: Path, contents: BinaryIO | None) -> Iterator[tuple[BinaryIO, str]]:
    """The file and its format; what goes wrong with the contents in the block becomes a ``UsageError``."""
    with _open(path) if contents is None else contents as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's: on sizes, which are checked here, and on odd metadata
        head = stream.read(32)
        if not head:
            raise UsageError(f"picture {path} is empty (0 bytes)", "copy it again")
        form = picture_format(head)
        if form is None:
            raise UsageError(
                f"{path} is not a picture of a known kind, or its header is damaged (it begins with {head[:16]!r})",
                "convert it to PNG, JPEG, TIFF, WebP, BMP or GIF",
            )
        if form == "AVIF" and not features.check("avif"):
            command = "pip install 'pillow>=11.3'"
            raise MachineError(f"picture {path} is AVIF, which this Pillow cannot read", f"run `{command}`")
        if stream.seek(0, io.SEEK_END) > _MAX_FILE_BYTES:
            raise UsageError(f"picture {path} has more than {_MAX_FILE_BYTES / 1e9:g} GB", "scale it down first")
        try:
            yield stream, form
        except MoebiusError:
            raise
        except UnidentifiedImageError:
            raise UsageError(f"{form} picture {path} is truncated, or its header is damaged", "copy it again") from None
        except MemoryError:
            raise MachineError(f"not enough memory to read picture {path}", "scale it down first") from None
        except Exception as error:  # a decoder meets damage with any exception at all
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"cannot read picture {path}: {reason}", "copy or save it again") from None


def _header(stream: BinaryIO, form: str) -> Image.Image:
    """Open without Pillow's own limit on the size, which is lower than some cameras' and names no size."""
    stream.seek(0)
    with _process_state:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=[form])
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(path: object, image: Image.Image, form: str, bits: int, scans: int, max_pixels: int) -> None:
    """Raise ``UsageError`` where decoding would take gigabytes above the samples, or many seconds."""
    channels, (width, height) = len(image.getbands()), image.size
    limits = {
        "": max_pixels,
        f" of {form}": _MAX_PIXELS.get(form, MAX_PIXELS),
        f" with {channels} channels of 16 bits": _MAX_BYTES_AT_16_BITS // (2 * channels) if bits == 16 else MAX_PIXELS,
        f" of JPEG in {scans} scans": _MAX_PIXELS_IN_SCANS if scans > 1 else MAX_PIXELS,
        f" of JPEG in so many scans, {scans},": _MAX_SCANNED_PIXELS // scans if scans > _MAX_SCANS else MAX_PIXELS,
    }
    of_what, most = min(limits.items(), key=lambda limit: limit[1])
    if width * height > most:
        size = f"{width}x{height}, {width * height / 1e6:.0f} megapixels"
        raise UsageError(f"picture {path} is {size}: at most {most / 1e6:.0f}{of_what} are read", "scale it down first")


class _Jpeg(NamedTuple):
    """The first picture of a JPEG file up to the mark of its end, and whether that is there."""

    scans: int
    coded: memoryview
    marked: bool


def _scan_jpeg(stream: BinaryIO) -> _Jpeg:
    """The first picture in a JPEG file; those that cameras append are previews and depth maps.

    Raises ``ValueError`` for a header whose reading would not end, and for scans of which the last may be missing.
    """
    stream.seek(0)
    data, at, scans, progressive = stream.read(), 2, 0, False
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(data, at, len(data) if scans else at + _MAX_JUNK)
        if marker is None and scans == 0:
            raise ValueError("its header is damaged")
        if marker is None and progressive:
            raise ValueError("it is truncated")
        if marker is None or (code := data[marker.end() - 1]) == 0xD9:  # the end of the picture
            return _Jpeg(scans, memoryview(data)[: marker.start() if marker else len(data)], marker is not None)
        scans, progressive = scans + (code == 0xDA), progressive or code in _PROGRESSIVE
        at = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    raise ValueError(f"it has more than {_MAX_SEGMENTS} segments")


def _is_complete(jpeg: _Jpeg, image: Image.Image) -> bool:
    """Whether a JPEG, decoded in ``image``, has all of its pixels: libjpeg makes up those that are missing.

    If none is missing, what follows the coded data makes no difference. Where the end is marked, this is tried only if
    the last block of pixels is blank, as made up ones are, and not in a progressive file, which lacks mere detail.
    """
    width, height = image.size
    # The last block is up to 16 pixels wide, but for an edge that its neighbours' colours may run into.
    left, top = (min(side - 1, (side - 1) // 16 * 16 + 2) for side in (width, height))
    corner = np.asarray(image.crop((left, top, width, height)))
    if jpeg.marked and ((corner != corner[-1, -1]).any() or "progressive" in image.info):
        return True
    other = _header(io.BytesIO(b"".join((jpeg.coded, _NOISE, _JPEG_END))), "JPEG")
    areas = [(0, top, width, end) for top, end in _bands(width, height)]
    return all(np.array_equal(np.asarray(image.crop(area)), np.asarray(other.crop(area))) for area in areas)


def _bands(width: int, height: int) -> list[tuple[int, int]]:
    """(first row, row after the last) of parts of a picture: Pillow makes two copies of what is asked of it."""
    step = max(1, _COPIED_PIXELS // width)
    return [(top, min(top + step, height)) for top in range(0, height, step)]


def _cmyk_to_srgb(image: Image.Image) -> tuple[Convert, str]:
    """A conversion of parts of a CMYK picture by its profile, if that can be used, and the words for a note."""
    profile = image.info.get("icc_profile")
    if profile and is_profile(profile, b"CMYK"):
        with suppress(ImageCms.PyCMSError):
            srgb = ImageCms.createProfile("sRGB")
            transform = ImageCms.buildTransform(io.BytesIO(profile), srgb, "CMYK", "RGB")
            return transform.apply, "by its profile"
    how = "without a profile" if not profile else "without its profile, which is damaged or not for CMYK"
    return lambda part: part.convert("RGB"), how


@contextmanager
def _silent_decoders() -> Iterator[None]:
    """Keep stderr from what libtiff and libpng write there on damaged files: there is no other way to silence them."""
    set_log_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel  # 4.8, 5.0
    with _process_state, ExitStack() as restoring:
        restoring.callback(set_log_level, set_log_level(0))
        with suppress(OSError):  # there is no stderr
            saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            restoring.callback(os.close, saved)
            restoring.callback(os.close, nowhere)
            restoring.callback(os.dup2, saved, 2)
            os.dup2(nowhere, 2)
        yield


def _decode16(stream: BinaryIO, channels: int) -> np.ndarray:
    """The samples of a PNG or TIFF, (H, W, 1 to 4) uint16 as stored: Pillow cannot hold colours so deep."""
    stream.seek(0)
    data, decoded = stream.read(), None
    with _silent_decoders(), suppress(cv2.error):
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise ValueError("it is truncated or damaged")
    if decoded.dtype != np.uint16:
        raise ValueError("its kind of 16-bit samples is not supported")
    samples = np.atleast_3d(decoded)
    if samples.shape[2] > 2:
        order = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}[samples.shape[2]]
        for part in np.array_split(samples, max(1, samples.nbytes >> 20)):  # a second array might be gigabytes
            part[...] = cv2.cvtColor(part, order)
    if data.startswith(PNG_SIGNATURE) and data[25] == 4:  # grey and alpha, which OpenCV spreads over four channels
        return np.ascontiguousarray(samples[..., [0, 3]])
    return np.ascontiguousarray(samples[..., :channels])


def _decode8(image: Image.Image, form: str, cmyk: Convert | None) -> np.ndarray:
    """Samples (H, W, 1 to 4) as stored, uint8; of grey JPEG 2000 as deep as the file's; of CMYK as ``cmyk`` has it."""
    with _silent_decoders() if form == "TIFF" else nullcontext():
        image.load()
    if image.mode == "I;16":
        return np.asarray(image)[..., None]
    if image.mode not in _PLAIN_MODES:
        raise ValueError(f"its colour mode {image.mode} is not supported, RGB and grey of 8 or 16 bits are")
    mode = _PLAIN_MODES[image.mode] + ("A" if image.has_transparency_data else "")
    width, height = image.size
    samples = np.empty((height, width, len(mode)), np.uint8)
    for top, end in _bands(width, height):
        rows = image.crop((0, top, width, end))
        rows = cmyk(rows) if cmyk else rows if rows.mode == mode else rows.convert(mode)
        samples[top:end] = np.asarray(rows).reshape(end - top, width, -1)
    return samples


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return np.ascontiguousarray(samples)
