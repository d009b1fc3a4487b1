"""Pictures that valid files of every kind hold, and files made to take a decoder's time or memory."""

from __future__ import annotations

import functools
import io
import itertools
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from moebius_edge.errors import UsageError
from moebius_edge.imaging.decoding import FORMATS, picture_format
from moebius_edge.imaging.pictures import read_picture
from moebius_edge.imaging.png import PNG_SIGNATURE, png_chunk, write_png

MAX_SECONDS = 5.0  # of a core that ``slowness`` calls fast
MAX_BYTES = 1 << 30  # above the samples
STATUS = Path("/proc/self/status")


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def flat(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 100 if mode == "L" else (10, 200, 30))


def photo(width: int = 90, height: int = 70) -> np.ndarray:
    """Smooth colours with some noise, (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 30, (height, width, 3))
    return (np.stack([2 * x, 3 * y, x + y], 2) % 220 + noise).astype(np.uint8)


def read(folder: Path, contents: bytes):  # noqa: ANN201
    path = folder / "picture"
    path.write_bytes(contents)
    return read_picture(path)


# Formats


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_is_told_by_its_first_bytes_and_read_whatever_its_name(tmp_path: Path, form: str) -> None:
    contents = encoded(flat(64, 48), form)
    assert picture_format(contents[:32]) == form
    picture = read(tmp_path, contents)
    assert picture.size == (64, 48) and picture.notes == ()
    assert np.abs(picture.pixels.astype(int) - (10, 200, 30)).max() <= 5


@pytest.mark.parametrize(
    "head",
    [b"", b"BM is a text", b"%PDF-1.7", b"<svg", b"PK\3\4", b"\0\0\0\x18ftypheic\0\0\0\0heicmif1", b"RIFF1234WAVEfmt"],
)
def test_what_is_no_picture(head: bytes) -> None:
    assert picture_format(head.ljust(32, b" ") if head else b"") is None


def test_grey_jpeg_2000_keeps_its_16_bits(tmp_path: Path) -> None:
    deep = photo()[..., 0].astype(np.uint16) * 257 + 3
    np.testing.assert_array_equal(read(tmp_path, encoded(Image.fromarray(deep), "JPEG2000")).pixels[..., 0], deep)


TIFFS = {
    "planar": {"planarconfig": "separate"},
    "tiled": {"tile": (32, 16)},
    "tiled and deflated": {"tile": (32, 16), "compression": "zlib"},
    "many strips": {"rowsperstrip": 1},
    "big": {"bigtiff": True},
}


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_of_any_layout(tmp_path: Path, kind: str, dtype: type) -> None:
    tifffile = pytest.importorskip("tifffile", reason="comes with scikit-image")
    array = photo().astype(dtype) * (np.iinfo(dtype).max // 255)
    stored = np.moveaxis(array, -1, 0) if kind == "planar" else array
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", metadata=None, **TIFFS[kind])
    if kind == "planar" and dtype is np.uint16:
        with pytest.raises(UsageError, match="16-bit samples of this kind"):
            read_picture(tmp_path / "a.tif")
    else:
        np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").pixels, array)


# Whole pictures whose end is not marked, and parts of pictures whose end is


@pytest.mark.parametrize(
    ("mode", "options"), [("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"restart_marker_rows": 1})]
)
def test_jpeg_without_an_end(tmp_path: Path, mode: str, options: dict) -> None:
    whole = encoded(Image.fromarray(photo()).convert(mode), "JPEG", **options)
    expected, unmarked = read(tmp_path, whole), read(tmp_path, whole[:-2])
    np.testing.assert_array_equal(unmarked.pixels, expected.pixels)
    assert f"{tmp_path}/picture lacks the mark that ends a JPEG file: its pixels are all there" in unmarked.notes
    for missing in (12, 40, len(whole) // 3, len(whole) // 2):
        with pytest.raises(UsageError, match="truncated"):
            read(tmp_path, whole[:-missing])


def test_a_progressive_jpeg_without_an_end_may_lack_scans(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="truncated"):
        read(tmp_path, encoded(Image.fromarray(photo()), "JPEG", progressive=True)[:-2])


def test_jpeg_with_an_end_but_without_its_last_rows(tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(photo(), "RGB"), "JPEG")
    for share in (0.5, 0.8, 0.95):
        with pytest.raises(UsageError, match="cannot read picture .*: it is truncated: copy or save it again"):
            read(tmp_path, whole[: int(len(whole) * share)] + b"\xff\xd9")


def test_a_flat_jpeg_is_whole(tmp_path: Path) -> None:
    for mode, size, progressive in itertools.product(("RGB", "L"), ((64, 64), (7, 5), (200, 3)), (False, True)):
        assert read(tmp_path, encoded(flat(*size, mode), "JPEG", progressive=progressive)).size == size


CODED = {
    "png": ("PNG", "RGB", {}),
    "jpeg": ("JPEG", "RGB", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff, deflate": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    "tiff, JPEG": ("TIFF", "RGB", {"compression": "jpeg"}),
    "tiff, PackBits": ("TIFF", "RGB", {"compression": "packbits"}),
    "tiff, fax": ("TIFF", "1", {"compression": "group4"}),
    "webp": ("WEBP", "RGB", {}),
    "bmp": ("BMP", "RGB", {}),
    "gif": ("GIF", "P", {}),
    "avif": ("AVIF", "RGB", {}),
    "jpeg 2000": ("JPEG2000", "RGB", {"irreversible": True, "quality_layers": [20]}),
}


@pytest.mark.parametrize("kind", CODED)
def test_a_part_of_a_picture_is_never_taken_for_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    form, mode, options = CODED[kind]
    whole = encoded(Image.fromarray(photo(300, 200)).convert(mode), form, **options)
    assert read(tmp_path, whole).size == (300, 200)
    for share in (0.3, 0.9, 0.97):
        with pytest.raises(UsageError):
            read(tmp_path, whole[: int(len(whole) * share)])
    if form == "TIFF":  # the directory is there, the pixels are not all
        place = int.from_bytes(whole[4:8], "little")
        with pytest.raises(UsageError):
            read(tmp_path, whole[: place // 2] if place < 50 else whole[: len(whole) - 500])
    assert capfd.readouterr() == ("", ""), "the libraries beneath print nothing of their own"


def test_every_byte_of_a_png_counts(tmp_path: Path) -> None:
    """Its end, and the checksum of each chunk that is read, at both depths."""
    for dtype in (np.uint8, np.uint16):
        write_png(stream := io.BytesIO(), photo().astype(dtype))
        whole = stream.getvalue()
        for missing in (12, 60, len(whole) // 2):
            with pytest.raises(UsageError, match="it is truncated: copy or save it again"):
                read(tmp_path, whole[:-missing])
    for name, before, after in ((b"gAMA", b"\x8f", b"\x90"), (b"IDAT", zlib.compress(b"\0\1\2\3"), bytes(12))):
        contents = small_png((b"gAMA", b"\0\0\xb1\x8f"))
        with pytest.raises(UsageError, match=f"its {name.decode()} chunk is damaged"):
            read(tmp_path, contents.replace(before, after))


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("kind", [1, 2, 3, 5, 7, 12])
def test_a_profile_of_any_type_in_a_tiff(tmp_path: Path, kind: int) -> None:
    picture = read(tmp_path, tiff_of({34675: (kind, bytes(240))}))
    note = "has an ICC profile that is damaged or does not fit its pixels: left out"
    assert picture.size == (8, 8) and picture.metadata.icc is None and picture.notes == (f"{tmp_path}/picture {note}",)
    grey = PROFILE[:16] + b"GRAY" + PROFILE[20:]
    assert read(tmp_path, tiff_of({34675: (1, grey)})).metadata.icc == grey


# Files that ask for too much


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(*part) for part in parts)


def small_png(*chunks: tuple[bytes, bytes]) -> bytes:
    return png_of(1, 1, *chunks, pixels=zlib.compress(b"\0\1\2\3"))


@functools.cache
def bomb(length: int) -> bytes:
    """Zeros of so many bytes, deflated."""
    deflate = zlib.compressobj(1)
    blocks = [deflate.compress(bytes(1 << 20)) for _ in range(length >> 20)]
    return b"".join([*blocks, deflate.flush()])


def shorts(*values: int) -> tuple[int, bytes]:
    return 3, struct.pack(f"<{len(values)}H", *values)


def longs(*values: int) -> tuple[int, bytes]:
    return 4, struct.pack(f"<{len(values)}I", *values)


def tiff_of(tags: dict, data: bytes = b"", directories: int = 1) -> bytes:
    """A grey TIFF of 8x8 pixels but for ``tags``, each a type and values; its directory may come many times."""
    base = {256: longs(8), 257: longs(8), 258: shorts(8), 259: shorts(1), 262: shorts(1), 273: longs(8)}
    body, entries = bytes(64) + data, b""
    for tag, (kind, values) in sorted((base | {278: longs(8), 279: longs(64)} | tags).items()):
        number = len(values) // {3: 2, 4: 4, 5: 8, 12: 8}.get(kind, 1)
        if len(values) > 4:
            values, body = struct.pack("<I", 8 + len(body)), body + values
        entries += struct.pack("<HHI", tag, kind, number) + values.ljust(4, b"\0")
    entries = struct.pack("<H", len(entries) // 12) + entries
    start = 8 + len(body)
    following = [start + n * (len(entries) + 4) for n in range(1, directories)] + [0]
    chain = b"".join(entries + struct.pack("<I", place) for place in following)
    return b"II*\0" + struct.pack("<I", start) + body + chain


def jpeg_scans(scans: int, side: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(flat(side, side, "L"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def gif_frames(frames: int) -> bytes:
    data = encoded(flat(1, 1, "L"), "GIF")
    start = data.index(b",")
    return data[:start] + data[start:-1] * frames + b";"


def jp2_size(width: int, height: int, tile: int) -> bytes:
    """A JPEG 2000 file that claims another size, cut into tiles of another size."""
    data = bytearray(encoded(flat(64, 64), "JPEG2000", no_jp2=True))
    struct.pack_into(">8I", data, 8, width, height, 0, 0, tile, tile, 0, 0)
    return bytes(data)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "png: a million chunks": lambda: small_png(*[(b"teSt", b"")] * 1_000_001),
    "png: text of a gigabyte": lambda: small_png((b"zTXt", b"Comment\0\0" + bomb(1 << 30))),
    "png: a profile of a gigabyte": lambda: small_png((b"iCCP", b"x\0\0" + bomb(1 << 30))),
    "png: pixels of a gigabyte": lambda: png_of(1, 1, pixels=bomb(1 << 30)),
    "png: a thousand long profiles": lambda: small_png(*[(b"iCCP", b"x\0\0" + bomb(32 << 20))] * 1000),
    "png: half of the pixels": lambda: png_of(15_000, 15_000, pixels=bomb(15_000 * 15_000 * 3 // 2)),
    "png: black": lambda: png_of(15_000, 15_000, pixels=bomb(15_001 * 15_001 * 3 + (1 << 20))),
    "tiff: a hundred thousand directories": lambda: tiff_of({}, directories=100_000),
    "tiff: a tile of 65535x65535": lambda: tiff_of(
        {322: longs(65535), 323: longs(65535), 324: longs(8), 325: longs(64)}
    ),
    "tiff: two hundred million strips": lambda: tiff_of({256: longs(1), 257: longs(200_000_000), 278: longs(1)}),
    "tiff: one strip many times": lambda: tiff_of(
        {256: longs(999), 257: longs(99_999), 278: longs(1), 273: longs(*[8] * 99_999), 279: longs(*[999] * 99_999)},
        bytes(999),
    ),
    "tiff: a JPEG of a thousand scans": lambda: tiff_of(
        {256: longs(3000), 257: longs(3000), 259: shorts(7), 273: longs(72), 278: longs(3000), 279: longs(1 << 28)},
        jpeg_scans(1000, 3000),
    ),
    "jpeg: two thousand scans": lambda: jpeg_scans(2000, 2000),
    "jpeg: twenty large scans": lambda: jpeg_scans(10, 15_000),
    "jpeg: a header of marker bytes": lambda: b"\xff\xd8" + b"\xff" * (50 << 20) + encoded(flat(8, 8), "JPEG")[2:],
    "jpeg: a million segments": lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 1_000_001 + encoded(flat(8, 8), "JPEG")[2:],
    "jpeg: marker bytes alone": lambda: encoded(flat(8, 8), "JPEG")[:-2] + b"\xff" * (50 << 20),
    "jpeg: a size without data": lambda: encoded(flat(8, 8), "JPEG").replace(b"\0\x08\0\x08\3", b"\x3a\x98\x3a\x98\3"),
    "gif: half a million frames": lambda: gif_frames(500_000),
    "webp: flat, at the limit": lambda: encoded(flat(8000, 8700), "WEBP", lossless=True, quality=0, method=0),
    "avif: flat": lambda: encoded(flat(8300, 8300), "AVIF", speed=10),
    "jpeg 2000: a large size": lambda: jp2_size(7700, 7700, 7700),
    "jpeg 2000: small tiles": lambda: jp2_size(7700, 7700, 33),
}


def peak_bytes() -> int:
    """The most memory that this process has held since the mark was last reset."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")) * 1024


def slowness() -> float:
    """How much longer this core takes now than one that inflates and copies 256 MiB of zeros in half a second."""
    packed, start = bomb(1 << 28), time.process_time()
    np.frombuffer(zlib.decompress(packed), np.uint8).copy()
    return max(1.0, (time.process_time() - start) / 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_no_file_takes_long_or_much_memory(tmp_path: Path, name: str) -> None:
    path, needed, outcome = tmp_path / "hostile", 0, "read"
    path.write_bytes(HOSTILE[name]())
    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak_bytes(), time.process_time()
    try:
        needed = read_picture(path).samples.nbytes
    except UsageError as error:
        outcome = str(error)
    seconds, used = time.process_time() - start, peak_bytes() - before - needed
    slow = slowness() if seconds >= MAX_SECONDS else 1.0
    print(f"{name}: {seconds:.1f} s on a core {slow:.1f} times slow, {used / 1e6:.0f} MB, {outcome}")
    assert seconds < MAX_SECONDS * slow and used < MAX_BYTES
