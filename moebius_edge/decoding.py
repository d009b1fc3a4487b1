"""From a picture file to upright samples in the file's own depth, without loss and without surprises.

Pillow reads headers and 8-bit files, ``png_tiff`` the 16-bit ones. Whatever is wrong with a file becomes an
error of one line. What the samples mean to the program (``Picture``, masks) is ``imaging``'s business.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

from .errors import MachineError, UsageError
from .png_tiff import Unreadable, decode_png16, decode_tiff16, png_chunks

MAX_PIXELS = 250_000_000  # above the largest camera sensors (200 MP), below what a hostile header would claim
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "JPEG2000")  # none of these starts another program
_SUFFIXES = {  # by format
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpx"),
}
SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)  # what a folder is searched for
_ORIENTATION = 0x0112  # EXIF tag
_PLAIN_MODES = {
    **dict.fromkeys(("1", "L", "LA", "La"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "YCbCr"), "RGB"),
}
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # lengths of the second header, one for each version of the format
_pillow_limit = threading.Lock()


def picture_format(head: bytes) -> str | None:
    """The member of ``FORMATS`` that a file with these first bytes (32 are enough) is in, whatever its name."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head[4:8] == b"ftyp" and (head[8:12] in (b"avif", b"avis") or b"avif" in head[16:32]):
        return "AVIF"
    if head.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):
        return "JPEG2000"
    return None


@dataclass(frozen=True, eq=False)
class Decoded:
    """Samples (H, W, C), uint8 or uint16, upright: C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.

    ``notes`` says what was changed or left out, a sentence each.
    """

    samples: np.ndarray
    icc: bytes | None
    notes: tuple[str, ...]


def decode(path: Path, contents: BinaryIO | None = None) -> Decoded:
    """Read the picture at ``path``, or the file in ``contents`` that ``path`` is then only the name of.

    ``imaging.read_picture`` says what becomes of each kind.
    """
    notes = []
    with _opened(path, contents) as (stream, image):
        icc: bytes | None = image.info.get("icc_profile")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # in MPO the others are previews and depth maps
            notes.append(f"{path} has {frames} frames or pages: only the first is used")
        if _sample_bits(stream, image) == 16:
            samples = _decode16(stream, image)
        elif image.mode == "CMYK":
            how = "without a profile" if icc is None else "by its profile"
            notes.append(f"{path} is CMYK: converted to sRGB {how}")
            samples, icc = _decode8(image), None
        else:
            samples = _decode8(image)
    if icc is not None and icc[16:20] != (b"GRAY" if samples.shape[2] < 3 else b"RGB "):
        notes.append(f"the ICC profile of {path} does not fit its pixels: left out")
        icc = None
    return Decoded(samples, icc, tuple(notes))


def _open(path: Path) -> BinaryIO:
    try:
        if path.exists() and not path.is_file():
            kind = "a folder: name a picture in it" if path.is_dir() else "not a regular file: name a picture"
            raise UsageError(f"{path} is {kind}")
        return path.open("rb")
    except FileNotFoundError:
        raise MachineError(f"there is no picture {path}: check the name with `ls {path.parent}`") from None
    except PermissionError:
        raise MachineError(f"no right to read {path}: run `chmod u+r {path}`") from None
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}: check it with `ls -l {path}`") from None


@contextmanager
def _opened(path: Path, contents: BinaryIO | None) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """The file and its header; what goes wrong with the contents in the block becomes a ``UsageError``."""
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
            raise MachineError(f"picture {path} is AVIF, which this Pillow cannot read: run `pip install 'pillow>=11.3'`")
        try:
            image = _header(stream, form)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UsageError(
                    f"picture {path} is {width}x{height}, {width * height / 1e6:.0f} megapixels: at most "
                    f"{MAX_PIXELS / 1e6:.0f} are read; scale it down or cut it first"
                )
            yield stream, image
        except UsageError:
            raise
        except UnidentifiedImageError:
            raise UsageError(f"the header of {form} picture {path} is damaged: copy it again") from None
        except Unreadable as error:
            raise UsageError(f"cannot read picture {path}: {error}: copy or save it again") from None
        except MemoryError:
            raise MachineError(f"not enough memory to read picture {path}: scale it down first") from None
        except Exception as error:  # a decoder meets damage with any exception at all
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"picture {path} is truncated or damaged ({reason}): copy it again") from None


def _header(stream: BinaryIO, form: str) -> Image.Image:
    """Open without Pillow's own limit on the size, which is lower than some cameras' and names no size."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(stream, formats=[form])
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _sample_bits(stream: BinaryIO, image: Image.Image) -> int:
    """8 or 16: how the samples are to be read. Kinds that would silently lose depth are refused."""
    bits: set[int] = {8}
    if image.format == "PNG":
        place = stream.tell()  # Pillow goes on reading from here
        stream.seek(24)
        bits = set(stream.read(1))
        stream.seek(place)
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = set(tags.get(258, (1,)))
        integer, interleaved = set(tags.get(339, (1,))) == {1}, tags.get(284, 1) == 1
        plain = tags.get(262) in (1, 2) and 1 not in tags.get(338, ())  # grey or RGB, alpha not multiplied in
        if not integer or (bits == {16} and not (interleaved and plain)) or not bits <= {1, 2, 4, 8, 16}:
            kind = f"TIFF with {max(bits)}-bit samples of this kind"
            raise Unreadable(f"{kind} is not supported, grey and RGB of 8 or 16 bits are")
    return max(bits)


def _decode16(stream: BinaryIO, image: Image.Image) -> np.ndarray:
    """Samples (H, W, 1 to 4), uint16, upright."""
    stream.seek(0)
    data = stream.read()
    if image.format == "PNG":
        # Asking Pillow for EXIF decodes a PNG that has none, so look first.
        has_exif = b"eXIf" in png_chunks(data) or "Raw profile type exif" in image.info
        return _upright(decode_png16(data), image if has_exif else None)
    return _upright(decode_tiff16(data), image)


def _upright(samples: np.ndarray, image: Image.Image | None) -> np.ndarray:
    """Undo the EXIF orientation (1..8) of ``image``."""
    orientation = 1
    if image is not None:
        with suppress(Exception):  # a damaged EXIF block says nothing on the orientation
            orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return np.ascontiguousarray(samples)


def _decode8(image: Image.Image) -> np.ndarray:
    """Samples (H, W, 1 to 4), uint8, upright."""
    image.load()
    with suppress(Exception):  # as in _upright
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "CMYK":
        image = _cmyk_to_srgb(image)
    if image.mode not in _PLAIN_MODES:
        raise Unreadable(f"its colour mode {image.mode} is not supported, RGB and grey of 8 or 16 bits are")
    mode = _PLAIN_MODES[image.mode] + ("A" if image.has_transparency_data else "")
    samples = np.asarray(image if image.mode == mode else image.convert(mode))
    return samples[..., None] if samples.ndim == 2 else samples


def _cmyk_to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.pop("icc_profile", None)
    if profile is None:
        return image.convert("RGB")
    srgb = ImageCms.createProfile("sRGB")
    try:
        converted = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    except ImageCms.PyCMSError as error:
        raise Unreadable(f"its CMYK profile cannot be used ({error})") from None
    assert converted is not None  # it is, unless asked to convert in place
    return converted
