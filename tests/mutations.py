"""Damages pictures at random, from a seed, and reads them: for the test of hostile files, and to repeat one by hand.

``python tests/mutations.py FIRST COUNT`` prints a line of JSON for each picture of the seeds FIRST, FIRST + 1, ...;
with ``--keep FOLDER`` it writes the damaged files there and reads none.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from moebius_edge.errors import MoebiusError
from moebius_edge.imaging.mask_files import read_mask
from moebius_edge.imaging.pictures import OUTPUT_FORMATS, Picture, check_output, read_picture, write_picture

MEMORY_LIMIT = 8 << 30  # bytes of address space: what asks for more is ended, and the seed is known
_SIZE = (72, 60)  # of all the pictures, so that where a file gives its size can be found
_NUMBERS = (0, 1, 2, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def share(count: int) -> int:
    """``count``, or the part of it that the environment asks for (MUTATION_SHARE, 1 for all), at least 10."""
    return max(10, round(count * float(os.environ.get("MUTATION_SHARE", "1"))))


def corpus() -> dict[str, bytes]:
    """Valid small pictures, all of one size, in all the modes and formats that are read, by name."""
    y, x = np.mgrid[: _SIZE[1], : _SIZE[0]]
    smooth = np.stack([3 * x, 4 * y, (x * y) % 256], 2)
    rgb = np.clip(smooth + np.random.default_rng(0).integers(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    colour = Image.fromarray(rgb)
    clear = Image.fromarray(np.dstack([rgb, 255 - rgb[..., 0]]))
    frames = [colour.quantize(64), colour.rotate(90).resize(_SIZE).quantize(64)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    described = {"exif": exif.tobytes(), "icc_profile": profile}
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "a comment " * 50, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    grey = Image.fromarray(rgb[..., 0].astype(np.uint16) * 257)
    several = {"save_all": True, "append_images": frames[1:]}
    pictures = {
        "rgb.png": (colour, described | {"pnginfo": text, "dpi": (300, 300)}),
        "rgba.png": (clear, {}),
        "palette.png": (frames[0], {"transparency": 3}),
        "bits.png": (colour.convert("1"), {}),
        "grey16.png": (grey, {}),
        "baseline.jpg": (colour, described | {"dpi": (300, 300)}),
        "progressive.jpg": (colour, {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "raw.tif": (colour, described),
        "lzw.tif": (clear, {"compression": "tiff_lzw"}),
        "deflate16.tif": (grey, {"compression": "tiff_adobe_deflate"}),
        "raw16.tif": (grey, {}),
        "fax.tif": (colour.convert("1"), {"compression": "group4"}),
        "jpeg.tif": (colour, {"compression": "jpeg"}),
        "pages.tif": (frames[0], several),
        "lossy.webp": (clear, described),
        "lossless.webp": (colour, {"lossless": True}),
        "animated.gif": (frames[0], several),
        "rgb.bmp": (colour, {}),
        "rgb.avif": (colour, {"speed": 10}),
        "rgb.jp2": (colour, {}),
    }
    Image.init()
    return {name: _saved(name, image, options) for name, (image, options) in pictures.items()}


def _saved(name: str, image: Image.Image, options: dict) -> bytes:
    stream = io.BytesIO()
    image.save(stream, Image.EXTENSION[Path(name).suffix], **options)
    return stream.getvalue()


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """``data`` with one to four kinds of damage; ``other`` is another file, of which a part may be copied in."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        near_start = rng.random() < 0.6  # where the headers are
        at = rng.randrange(min(len(damaged), 600 if near_start else len(damaged)) or 1)
        length = min(rng.choice((1, 2, 4, 16, 64, 1024)), len(damaged) - at)
        kind = rng.choice(("flip", "number", "number", "size", "size", "cut", "remove", "repeat", "splice", "move"))
        code = rng.choice((">H", "<H", ">I", "<I", "B"))
        if kind == "size":
            at = max(damaged.find(struct.pack(code, rng.choice(_SIZE)), rng.randrange(32)), 0)
        if kind == "flip":
            for place in range(at, at + length):
                damaged[place] ^= rng.randrange(256)
        elif kind in ("number", "size"):
            if at + struct.calcsize(code) <= len(damaged):
                number = rng.choice((*_NUMBERS, rng.randrange(20_000)))
                struct.pack_into(code, damaged, at, number % (1 << 8 * struct.calcsize(code)))
        elif kind == "cut":
            del damaged[max(at, 8) :]
        elif kind == "remove":
            del damaged[at : at + length]
        elif kind == "repeat":
            damaged[at:at] = damaged[at : at + length] * rng.choice((1, 3, 200))
        elif kind == "splice":
            start = rng.randrange(len(other))
            damaged[at : at + length] = other[start : start + length]
        else:
            part = damaged[at : at + length]
            del damaged[at : at + length]
            place = rng.randrange(len(damaged) + 1)
            damaged[place:place] = part
    return _with_checksums(bytes(damaged)) if rng.random() < 0.7 else bytes(damaged)


def _with_checksums(data: bytes) -> bytes:
    """A damaged PNG with right checksums, or damage would never get further than to them; others as they are."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    fixed, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def mutated(seed: int, pictures: dict[str, bytes]) -> tuple[str, bytes]:
    """The picture of ``seed``: the name of the one that it was, and the damaged file."""
    rng = random.Random(seed)
    name = list(pictures)[seed % len(pictures)]
    return name, mutate(pictures[name], pictures[rng.choice(list(pictures))], rng)


@dataclass(frozen=True)
class Figures:
    """What became of a file: ``read`` or the error, the processor's time, and the memory above the samples'."""

    outcome: str
    seconds: float
    bytes: int


def measure(read: Callable[[], int]) -> Figures:
    """Figures of ``read``, which returns the bytes of the samples that it has read."""
    _forget_peak()
    before, start = _peak_bytes(), time.process_time()
    outcome, needed = "read", 0
    try:
        needed = read()
    except MoebiusError as error:
        outcome = f"{type(error).__name__}: {error}"
    return Figures(outcome, time.process_time() - start, _peak_bytes() - before - needed)


def sample_bytes(picture: Picture) -> int:
    """The memory that the samples of ``picture`` take."""
    return picture.pixels.nbytes + (0 if picture.alpha is None else picture.alpha.nbytes)


def use(path: Path, folder: Path) -> int:
    """Read a file as picture and as mask and write it in every format; return the bytes of its samples."""
    picture = read_picture(path)
    with suppress(MoebiusError):
        read_mask(path, picture)
    for suffix in OUTPUT_FORMATS if picture.pixels.size < 1 << 18 else ():
        with suppress(MoebiusError):
            form = check_output(folder / f"out{suffix}", picture)
            write_picture(folder / f"out{suffix}", picture)
            again = read_picture(folder / f"out{suffix}")
            assert form not in ("PNG", "TIFF") or np.array_equal(again.samples, picture.samples)
    return sample_bytes(picture)


def _peak_bytes() -> int:
    """The most memory that this process held since ``_forget_peak``."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    pictures = corpus()
    with tempfile.TemporaryDirectory() as folder:
        for name, data in pictures.items():  # what is imported or allocated once does not count
            (Path(folder) / name).write_bytes(data)
            use(Path(folder) / name, Path(folder))
        for seed in itertools.islice(itertools.count(options.first), options.count):
            name, data = mutated(seed, pictures)
            if options.keep:
                (options.keep / f"{seed}-{name}").write_bytes(data)
                continue
            path = Path(folder) / name
            path.write_bytes(data)
            print(json.dumps({"seed": seed, "name": name}), flush=True)
            figures = measure(partial(use, path, Path(folder)))
            print(json.dumps({"seed": seed, "name": name, **asdict(figures)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
