"""From a picture file to upright samples in the file's own depth, without loss and without surprises.

``png``, ``jpeg`` and ``tiff`` take the first picture out of a file, Pillow decodes those of 8 bits and OpenCV those
of 16. Whatever is wrong with a file becomes an error of one line.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import MachineError, MoebiusError, UsageError
from .first_picture import MAX_PIXELS, FirstPicture, TooLarge, Unreadable, check_size
from .jpeg import END as JPEG_END
from .jpeg import first_jpeg
from .metadata import Metadata, is_profile, plausible_dpi, read_exif, set_size
from .picture import Picture
from .png import first_png
from .tiff import check_tiff

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
# What these decoders take in memory and time for a pixel is a multiple of the others'.
_MAX_PIXELS = {"WEBP": 70_000_000, "AVIF": 70_000_000, "JPEG2000": 60_000_000}
_MAX_BYTES_AT_16_BITS = 1_000_000_000  # OpenCV takes as much again
_COPIED_PIXELS = 1 << 20  # at a time
_NOISE = bytes((73 * i + i // 7) % 251 for i in range(4096))  # decodes to anything but a blank
_PLAIN_MODES = {
    **dict.fromkeys(("1", "L", "LA", "La"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "YCbCr"), "RGB"),
}
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # lengths of the second header, one for each version of the format
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of damage would go to stderr
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


def read_picture(path: str | os.PathLike[str], contents: BinaryIO | None = None) -> Picture:
    """Read a PNG, JPEG, TIFF, WebP, BMP or GIF file, turned upright by its EXIF orientation.

    Grey stays grey and 16 bits stay 16, but AVIF, and JPEG 2000 in colour, are read at 8 bits. Palettes become RGB, a
    transparent colour becomes alpha, 1 bit becomes 8. CMYK becomes sRGB, by its profile if it has one, and of several
    frames the first is read: these two leave a note. With ``contents`` they are read in place of a file, as from a
    member of an archive, and ``path`` is their name in errors.

    Raises:
        MachineError: the file is missing or may not be read.
        UsageError: it is no picture, damaged, larger than ``MAX_PIXELS``, or of a kind that would lose depth.
    """
    with _opened(Path(path), contents) as (stream, form):
        first = {"PNG": first_png, "JPEG": first_jpeg}.get(form, FirstPicture)(stream)
        image = _header(first.file, form)
        exif, orientation, exif_dpi, sound = read_exif(image, first.exif)
        if isinstance(image, TiffImageFile):
            check_tiff(first, image)
        elif form != "PNG":
            first.icc, first.xmp = image.info.get("icc_profile"), first.xmp or "xmp" in image.info
            first.several |= form != "JPEG" and getattr(image, "is_animated", False)
        _check_size(image, form, first.bits)
        notes = _notes(first, form, sound)
        if first.bits == 16 and form in ("PNG", "TIFF"):
            samples = _decode16(first, form, len(image.getbands()))
        else:
            samples = _decode8(first, image, form, notes)
        turn = 1 if form == "TIFF" else orientation  # both decoders turn a TIFF upright
        samples = upright(samples, turn)
        indices = upright(np.asarray(image), turn) if image.mode == "P" else None
    icc = None if image.mode == "CMYK" else first.icc
    if icc is not None and not is_profile(icc, b"GRAY" if samples.shape[2] < 3 else b"RGB "):
        notes.append("has an ICC profile that is damaged or does not fit its pixels: left out")
        icc = None
    dpi = image.info.get("dpi") if form not in ("TIFF", "WEBP") else None
    dpi = exif_dpi if dpi is None else plausible_dpi(*map(float, dpi))
    if dpi is not None and orientation > 4:
        dpi = dpi[::-1]
    set_size(exif, samples.shape[1], samples.shape[0])
    metadata = Metadata(icc, dpi, tuple(first.png_colour), exif)
    picture = Picture.from_array(samples, metadata, tuple(f"{path} {note}" for note in notes))
    return replace(picture, orientation=orientation, indices=indices)


def _open(path: Path) -> BinaryIO:
    try:
        if path.exists() and not path.is_file():
            kind = "a folder: name a picture in it" if path.is_dir() else "not a regular file: name a picture"
            raise UsageError(f"{path} is {kind}")
        return path.open("rb")
    except FileNotFoundError:
        raise MachineError(f"there is no picture {path}: check the name with `ls {path.parent}`") from None
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}: check it with `ls -l {path}`") from None


@contextmanager
def _opened(path: Path, contents: BinaryIO | None) -> Iterator[tuple[BinaryIO, str]]:
    """The file and its format; what goes wrong with the contents in the block becomes a ``UsageError``."""
    with _open(path) if contents is None else contents as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's: on sizes, which are checked here, and on odd metadata
        head = stream.read(32)
        if not head:
            raise UsageError(f"picture {path} is empty (0 bytes): copy it again")
        stream.seek(0)
        form = picture_format(head)
        if form is None:
            raise UsageError(
                f"{path} is not a picture of a known kind, or its header is damaged (it begins "
                f"with {head[:16]!r}): convert it to PNG, JPEG, TIFF, WebP, BMP or GIF"
            )
        if form == "AVIF" and not features.check("avif"):
            command = "pip install 'pillow>=11.3'"
            raise MachineError(f"picture {path} is AVIF, which this Pillow cannot read: run `{command}`")
        try:
            yield stream, form
        except MoebiusError:
            raise
        except UnidentifiedImageError:
            raise UsageError(f"{form} picture {path} is truncated, or its header is damaged: copy it again") from None
        except TooLarge as error:
            raise UsageError(f"picture {path} is {error}; scale it down or cut it first") from None
        except Unreadable as error:
            raise UsageError(f"cannot read picture {path}: {error}: copy or save it again") from None
        except MemoryError:
            raise MachineError(f"not enough memory to read picture {path}: scale it down first") from None
        except Exception as error:  # a decoder meets damage with any exception at all
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"picture {path} is truncated or damaged ({reason}): copy it again") from None


def _header(stream: BinaryIO, form: str) -> Image.Image:
    """Open without Pillow's own limit on the size, which is lower than some cameras' and names no size."""
    stream.seek(0)
    with _process_state:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=[form])
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, form: str, bits: int) -> None:
    """Raise ``TooLarge`` where decoding would take gigabytes above the samples, or many seconds."""
    most, of_what = _MAX_PIXELS.get(form, MAX_PIXELS), f" of {form}" if form in _MAX_PIXELS else ""
    channels = len(image.getbands())
    if bits == 16 and most > (deepest := _MAX_BYTES_AT_16_BITS // (2 * channels)):
        most, of_what = deepest, f" with {channels} channels of 16 bits"
    check_size(*image.size, most, of_what)


def _notes(first: FirstPicture, form: str, exif_sound: bool) -> list[str]:
    sentences = {
        "has more frames or pages than one: only the first is used": first.several,
        f"lacks the mark that ends a {form} file: its pixels are all there": not first.ended,
        "has damaged EXIF metadata: what could not be read of them is left out": not exif_sound,
        "has XMP or IPTC metadata, which may hold a small copy of the picture: left out": first.xmp,
    }
    return [*first.notes, *(sentence for sentence, applies in sentences.items() if applies)]


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


def _decode16(first: FirstPicture, form: str, channels: int) -> np.ndarray:
    """The samples of a PNG or TIFF, (H, W, 1 to 4) uint16 as stored: Pillow cannot hold colours so deep."""
    data, decoded = first.contents(), None
    with _silent_decoders(), suppress(cv2.error):
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None:
        raise Unreadable("it is truncated or damaged")
    if decoded.dtype != np.uint16:
        raise Unreadable("its kind of 16-bit samples is not supported")
    samples = np.atleast_3d(decoded)
    if samples.shape[2] > 2:
        order = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}[samples.shape[2]]
        for part in np.array_split(samples, max(1, samples.nbytes >> 20)):  # a second array might be gigabytes
            part[...] = cv2.cvtColor(part, order)
    if form == "PNG" and data[25] == 4:  # grey and alpha, which OpenCV spreads over four channels
        return np.ascontiguousarray(samples[..., [0, 3]])
    return np.ascontiguousarray(samples[..., :channels])


def _decode8(first: FirstPicture, image: Image.Image, form: str, notes: list[str]) -> np.ndarray:
    """Samples (H, W, 1 to 4) as stored, uint8; of grey JPEG 2000 as deep as the file's."""
    with _silent_decoders() if form == "TIFF" else nullcontext():
        image.load()
    if form == "JPEG" and not _jpeg_is_complete(first, image):
        raise Unreadable("it is truncated")
    if image.mode == "I;16":
        return np.asarray(image)[..., None]
    if image.mode == "CMYK":
        return _samples(image, "RGB", _cmyk_to_srgb(first.icc, notes))
    if image.mode not in _PLAIN_MODES:
        raise Unreadable(f"its colour mode {image.mode} is not supported, RGB and grey of 8 or 16 bits are")
    mode = _PLAIN_MODES[image.mode] + ("A" if image.has_transparency_data else "")
    return _samples(image, mode, lambda part: part if part.mode == mode else part.convert(mode))


def _samples(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """The pixels as an array (H, W, C) in ``mode``, converted part by part to save memory."""
    width, height = image.size
    samples = np.empty((height, width, len(mode)), np.uint8)
    for top, rows in _rows(image):
        samples[top : top + rows.height] = np.asarray(convert(rows)).reshape(rows.height, width, -1)
    return samples


def _rows(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, some rows) from top to bottom: Pillow makes two copies of what is asked of it in one piece."""
    width, height = image.size
    step = max(1, _COPIED_PIXELS // width)
    for top in range(0, height, step):
        yield top, image.crop((0, top, width, min(top + step, height)))


def _jpeg_is_complete(first: FirstPicture, image: Image.Image) -> bool:
    """Whether a JPEG, decoded in ``image``, has all of its pixels: libjpeg makes up those that are missing.

    If none is missing, what follows the coded data makes no difference. Where the end is marked, this is tried only if
    the last pixels are blank, as made up ones are.
    """
    width, height = image.size
    # The last block, up to 16 pixels wide, but for an edge that its neighbours' colours may run into.
    left, top = (min(side - 1, (side - 1) // 16 * 16 + 2) for side in (width, height))
    corner = np.asarray(image.crop((left, top, width, height)))
    # What a progressive file lacks at its end is mere detail, and it would be slow to decode.
    if first.ended and ((corner != corner[-1, -1]).any() or "progressive" in image.info):
        return True
    coded = first.contents().removesuffix(JPEG_END)
    other = _header(io.BytesIO(coded + _NOISE + JPEG_END), "JPEG")
    pairs = zip(_rows(image), _rows(other), strict=True)
    return all(np.array_equal(np.asarray(one), np.asarray(two)) for (_, one), (_, two) in pairs)


def _cmyk_to_srgb(profile: bytes | None, notes: list[str]) -> Callable[[Image.Image], Image.Image]:
    """A conversion of images, by ``profile`` if it can be used; a note says whether it was."""
    how = "without a profile" if profile is None else "without its profile, which is damaged or not for CMYK"
    transform = None
    if profile is not None and is_profile(profile, b"CMYK"):
        with suppress(ImageCms.PyCMSError):
            srgb = ImageCms.createProfile("sRGB")
            transform = ImageCms.buildTransform(io.BytesIO(profile), srgb, "CMYK", "RGB")
            how = "by its profile"
    notes.append(f"is CMYK: converted to sRGB {how}")
    return lambda image: image.convert("RGB") if transform is None else transform.apply(image)


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return np.ascontiguousarray(samples)
