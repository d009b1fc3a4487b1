"""Pictures as people have them: any depth, mode, orientation and profile, and any damage."""

from __future__ import annotations

import io
import itertools
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from moebius_edge.errors import MachineError, UsageError
from moebius_edge.imaging.metadata import Metadata
from moebius_edge.imaging.pictures import MAX_PIXELS, Picture, check_output, read_picture, write_picture
from moebius_edge.imaging.png import write_png
from moebius_edge.imaging.tiff import write_tiff

RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = RGB_PROFILE[:16] + b"GRAY" + RGB_PROFILE[20:]  # only the header is looked at


def samples(channels: int, dtype: type = np.uint8, height: int = 21, width: int = 34, seed: int = 0) -> np.ndarray:
    """Random samples; with alpha, the first row is fully transparent and the last opaque."""
    top = np.iinfo(dtype).max
    array = np.random.default_rng(seed).integers(0, top, (height, width, channels), dtype=dtype, endpoint=True)
    if channels in (2, 4):
        array[0, :, -1], array[-1, :, -1] = 0, top
    return array


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array).save(path, **options)
    return path


LOSSLESS = [
    (suffix, dtype, channels)
    for suffix, dtype, channels in itertools.product((".png", ".tiff", ".TIF"), (np.uint8, np.uint16), (1, 2, 3, 4))
    if not (suffix != ".png" and dtype is np.uint16 and channels == 2)  # see test_what_a_format_cannot_hold
]


@pytest.mark.parametrize(("suffix", "dtype", "channels"), LOSSLESS)
def test_lossless_round_trip(tmp_path: Path, suffix: str, dtype: type, channels: int) -> None:
    array = samples(channels, dtype)
    icc = RGB_PROFILE if channels > 2 else GREY_PROFILE
    path = tmp_path / f"picture{suffix}"
    assert write_picture(path, Picture.from_array(array, Metadata(icc))) == ()
    picture = read_picture(path)
    assert picture.pixels.dtype == dtype and picture.metadata.icc == icc and picture.notes == ()
    assert (picture.alpha is None) == (channels in (1, 3))
    np.testing.assert_array_equal(picture.samples, array)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_other_programs_read_what_is_written(tmp_path: Path, channels: int) -> None:
    """Pillow for 8 bits; OpenCV, where it can, for 16. More rows than one block of the writers."""
    array = samples(channels, np.uint8, height=700, width=900)
    for write, suffix in ((write_png, ".png"), (write_tiff, ".tif")):
        path = tmp_path / f"eight{suffix}"
        with path.open("wb") as stream:
            write(stream, array)
        with Image.open(path) as image:
            assert image.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
            np.testing.assert_array_equal(np.asarray(image).reshape(array.shape), array)
        deep = samples(channels, np.uint16, height=300, width=900)
        with path.open("wb") as stream:
            write(stream, deep)
        if channels != 2:
            read = cv2.imread(os.fspath(path), cv2.IMREAD_UNCHANGED).reshape(deep.shape)
            order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
            np.testing.assert_array_equal(read[..., order], deep)


def test_webp_is_lossless_also_under_full_transparency(tmp_path: Path) -> None:
    array = samples(4)
    write_picture(tmp_path / "a.webp", Picture.from_array(array, Metadata(RGB_PROFILE)))
    picture = read_picture(tmp_path / "a.webp")
    np.testing.assert_array_equal(picture.samples, array)
    assert picture.metadata.icc == RGB_PROFILE
    write_picture(tmp_path / "grey.webp", Picture.from_array(samples(1), Metadata(GREY_PROFILE)))
    grey = read_picture(tmp_path / "grey.webp")
    np.testing.assert_array_equal(grey.pixels, samples(1).repeat(3, axis=2))
    assert grey.metadata.icc is None, "a profile for grey does not fit the RGB that WebP holds"


def test_bmp_keeps_pixels_and_says_it_drops_the_profile(tmp_path: Path) -> None:
    notes = write_picture(tmp_path / "a.bmp", Picture.from_array(samples(3), Metadata(RGB_PROFILE)))
    assert len(notes) == 1 and "holds no ICC profile" in notes[0]
    np.testing.assert_array_equal(read_picture(tmp_path / "a.bmp").pixels, samples(3))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_written_well_and_called_lossy(tmp_path: Path, channels: int) -> None:
    smooth = cv2.GaussianBlur(samples(channels, height=64, width=64), (0, 0), 3).reshape(64, 64, channels)
    icc = RGB_PROFILE if channels == 3 else GREY_PROFILE
    notes = write_picture(tmp_path / "a.jpg", Picture.from_array(smooth, Metadata(icc)))
    assert len(notes) == 1 and "lossy" in notes[0] and ".png keeps them" in notes[0]
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.pixels.shape == smooth.shape and picture.metadata.icc == icc
    assert np.abs(picture.pixels.astype(int) - smooth).mean() < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation_at_8_bits(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Against Pillow's own turning; the result is written upright, without the tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"turned{suffix}", samples(3), exif=exif)
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image))
    picture = read_picture(path)
    assert picture.size == ((34, 21) if orientation < 5 else (21, 34))
    np.testing.assert_array_equal(picture.pixels, expected)
    write_picture(tmp_path / "upright.png", picture)
    with Image.open(tmp_path / "upright.png") as upright:
        assert 0x0112 not in upright.getexif()
        np.testing.assert_array_equal(np.asarray(upright), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_orientation_at_16_bits(tmp_path: Path, channels: int, orientation: int) -> None:
    """The same turn as Pillow gives the upper bytes at 8 bits, in PNG (eXIf) and TIFF (tag 274)."""
    array = samples(channels, np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    high = Image.fromarray((array >> 8).astype(np.uint8).squeeze())
    high.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(high)).reshape(-1, high.size[0], channels)

    plain = io.BytesIO()
    write_png(plain, array)
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    end = plain.getvalue().index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(plain.getvalue()[:end] + chunk + plain.getvalue()[end:])

    (tmp_path / "a.tif").write_bytes(oriented_tiff(array, orientation))
    for name in ("a.png", "a.tif"):
        picture = read_picture(tmp_path / name)
        found = (picture.samples >> 8).astype(np.uint8)
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def oriented_tiff(array: np.ndarray, orientation: int) -> bytes:
    """``write_tiff`` and an orientation in place of its planar tag, whose value is the default anyway."""
    stream = io.BytesIO()
    write_tiff(stream, array)
    data = bytearray(stream.getvalue())
    (directory,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, directory)
    entries = [bytes(data[directory + 2 + 12 * i :][:12]) for i in range(count)]
    (planar,) = (e for e in entries if e[:2] == struct.pack("<H", 284))
    entries[entries.index(planar)] = struct.pack("<HHII", 274, 3, 1, orientation)
    entries.sort(key=lambda e: struct.unpack_from("<H", e)[0])
    data[directory + 2 : directory + 2 + 12 * count] = b"".join(entries)
    return bytes(data)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_16_bit_grey_tiff_of_another_program(tmp_path: Path, compression: str | None) -> None:
    array = samples(1, np.uint16)
    options = {} if compression is None else {"compression": compression}
    path = save(tmp_path / "a.tif", array, **options)
    picture = read_picture(path)
    assert picture.bits == 16
    np.testing.assert_array_equal(picture.pixels, array)


def test_16_bit_colour_tiff_of_another_program_both_byte_orders(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="comes with scikit-image")
    for order in "<>":
        for channels, extra in ((3, None), (4, ["unassalpha"])):
            array = samples(channels, np.uint16)
            tifffile.imwrite(
                tmp_path / "a.tif",
                array,
                photometric="rgb",
                extrasamples=extra,
                byteorder=order,
                metadata=None,
            )
            np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").samples, array)


@pytest.mark.parametrize("what", ["planar", "premultiplied", "signed", "float", "cmyk", "32-bit"])
def test_tiff_that_would_be_misread_is_refused(tmp_path: Path, what: str) -> None:
    tifffile = pytest.importorskip("tifffile", reason="comes with scikit-image")
    array, options = samples(3, np.uint16), {"photometric": "rgb"}
    if what == "planar":
        array, options = np.moveaxis(array, -1, 0), {"photometric": "rgb", "planarconfig": "separate"}
    elif what == "premultiplied":
        array, options = samples(4, np.uint16), {"photometric": "rgb", "extrasamples": ["assocalpha"]}
    elif what == "signed":
        array, options = samples(1, np.uint16)[..., 0].astype(np.int16), {"photometric": "minisblack"}
    elif what == "float":
        array, options = np.zeros((9, 9), np.float32), {"photometric": "minisblack"}
    elif what == "32-bit":
        array, options = np.zeros((9, 9), np.uint32), {"photometric": "minisblack"}
    elif what == "cmyk":
        array, options = samples(4, np.uint16), {"photometric": "separated"}
    tifffile.imwrite(tmp_path / "a.tif", array, metadata=None, **options)
    with pytest.raises(UsageError, match=r"a\.tif.*grey and RGB of 8 or 16 bits are: copy or save it again$"):
        read_picture(tmp_path / "a.tif")


def test_modes_become_what_they_mean(tmp_path: Path) -> None:
    rgb = samples(3)
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "palette.png").samples, palette.convert("RGB"))
    palette.save(tmp_path / "transparent.png", transparency=3)
    seen = read_picture(tmp_path / "transparent.png")
    assert seen.alpha is not None
    np.testing.assert_array_equal(seen.alpha == 0, np.asarray(palette) == 3)

    bits = samples(1)[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    picture = read_picture(tmp_path / "bits.png")
    assert picture.pixels.shape == (21, 34, 1)
    np.testing.assert_array_equal(picture.pixels[..., 0], bits * np.uint8(255))

    key = tuple(int(v) for v in rgb[5, 5])
    Image.fromarray(rgb).save(tmp_path / "key.png", transparency=key)
    keyed = read_picture(tmp_path / "key.png")
    assert keyed.alpha is not None and keyed.alpha[5, 5] == 0 and keyed.alpha.mean() > 250
    np.testing.assert_array_equal(keyed.pixels, rgb)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_colour_at_16_bits(tmp_path: Path, channels: int) -> None:
    array = samples(channels, np.uint16)
    plain = io.BytesIO()
    write_png(plain, array)
    body = array[5, 5].astype(">u2").tobytes()
    chunk = struct.pack(">I", len(body)) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    at = plain.getvalue().index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(plain.getvalue()[:at] + chunk + plain.getvalue()[at:])
    picture = read_picture(tmp_path / "a.png")
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.pixels, array)
    np.testing.assert_array_equal(picture.alpha, np.where((array == array[5, 5]).all(2), 0, 65535))


def test_cmyk_is_converted_with_a_note(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 6), (0, 255, 255, 0))  # red
    image.save(tmp_path / "a.jpg", quality=95)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.pixels.shape == (6, 8, 3) and picture.metadata.icc is None
    assert picture.pixels[3, 3, 0] > 240 and picture.pixels[3, 3, 1:].max() < 15
    assert picture.notes == (f"{tmp_path}/a.jpg is CMYK: converted to sRGB without a profile",)
    image.save(tmp_path / "bad.jpg", icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108)
    damaged = read_picture(tmp_path / "bad.jpg")
    assert damaged.notes[0].endswith("converted to sRGB without its profile, which is damaged or not for CMYK")
    np.testing.assert_array_equal(damaged.pixels, picture.pixels)


def test_a_profile_that_does_not_fit_is_left_out_with_a_note(tmp_path: Path) -> None:
    save(tmp_path / "a.png", samples(1), icc_profile=RGB_PROFILE)
    picture = read_picture(tmp_path / "a.png")
    assert picture.metadata.icc is None and "does not fit its pixels: left out" in picture.notes[0]


def test_first_of_several_frames_with_a_note(tmp_path: Path) -> None:
    frames = [Image.new("L", (9, 7), v).convert("P") for v in (10, 200)]
    for name in ("a.gif", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        picture = read_picture(tmp_path / name)
        assert picture.pixels.max() == 10
        assert "has more frames or pages than one: only the first is used" in picture.notes[0]


def test_a_phones_jpeg_with_a_second_picture_leaves_no_note(tmp_path: Path) -> None:
    first, second = Image.fromarray(samples(3)), Image.new("RGB", (5, 5))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.size == (34, 21) and picture.notes == ()


def huge_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_huge_header_is_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(huge_png(30_000, 30_000))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UsageError, match=r"30000x30000, 900 megapixels: at most 250 are read; scale it down"):
        read_picture(tmp_path / "a.png")
    assert limit == Image.MAX_IMAGE_PIXELS, "Pillow's own limit is left as it was"
    assert MAX_PIXELS > 200_000_000, "some phones make pictures as large as that"


def test_a_hundred_megapixels_are_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as stream:
        write_png(stream, np.zeros((10_000, 10_000, 1), np.uint8))
    assert read_picture(tmp_path / "a.png").size == (10_000, 10_000)


def damaged_files(folder: Path) -> dict[str, Path]:
    """One file of every kind people end up with."""
    array = samples(3, height=80, width=90)
    deep = io.BytesIO()
    write_png(deep, samples(3, np.uint16, height=80, width=90))
    deep_tiff = io.BytesIO()
    write_tiff(deep_tiff, samples(3, np.uint16, height=80, width=90))
    found = {}
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp"):
        whole = save(folder / f"whole.{suffix}", array).read_bytes()
        found[f"half {suffix}"] = folder / f"half.{suffix}"
        found[f"half {suffix}"].write_bytes(whole[: len(whole) // 2])
    deep_bytes, flipped = deep.getvalue(), bytearray(deep.getvalue())
    flipped[len(flipped) // 2] ^= 0xFF
    contents = {
        "half deep png": deep_bytes[: len(deep_bytes) // 2],
        "flipped deep png": bytes(flipped),
        "half deep tif": deep_tiff.getvalue()[: len(deep_tiff.getvalue()) // 2],
        "text": b"these are not the pixels you are looking for\n",
        "empty": b"",
        "signature only": b"\x89PNG\r\n\x1a\n",
        "short data": huge_png(300, 300),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    for name, content in contents.items():
        found[name] = folder / f"{name.replace(' ', '-')}.png"
        found[name].write_bytes(content)
    return found


def test_damage_is_one_line_that_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, path in damaged_files(tmp_path).items():
        with pytest.raises(UsageError) as caught:
            read_picture(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and len(message) < 400, name
        assert message.endswith(("copy it again", "copy or save it again", "GIF")), name
    assert capfd.readouterr() == ("", ""), "the libraries beneath print nothing of their own"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "notes.png",
            b"hello, world, hello",
            r"not a picture of a known kind, or its header is damaged \(it begins with b'hello, world, he'\)",
        ),
        ("empty.jpg", b"", r"empty\.jpg is empty \(0 bytes\): copy it again"),
    ],
)
def test_messages_for_no_picture(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_picture(tmp_path / name)


def test_missing_folder_pipe_and_forbidden(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"there is no picture .*gone\.png: check the name with `ls "):
        read_picture(tmp_path / "gone.png")
    with pytest.raises(UsageError, match="is a folder: name a picture in it"):
        read_picture(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UsageError, match="is not a regular file"):
        read_picture(tmp_path / "pipe.png")
    path = save(tmp_path / "secret.png", samples(3))
    path.chmod(0)
    if not os.access(path, os.R_OK):
        with pytest.raises(MachineError, match="no right to read .*chmod u\\+r"):
            read_picture(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_smallest_pictures(tmp_path: Path, dtype: type, size: tuple[int, int]) -> None:
    array = samples(3, dtype, *size)
    for name in ("a.png", "a.tif"):
        write_picture(tmp_path / name, Picture.from_array(array))
        np.testing.assert_array_equal(read_picture(tmp_path / name).pixels, array)


@pytest.mark.parametrize(
    ("name", "picture", "message"),
    [
        ("a.gif", samples(3), r"extension \.gif: use one of \.png, \.jpg, \.jpeg, \.tif, \.tiff, \.webp"),
        ("a", samples(3), "has no extension: use one of"),
        ("a.jpg", samples(4), r"JPEG cannot hold an alpha channel: use \.png"),
        ("a.jpg", samples(3, np.uint16), r"JPEG cannot hold 16-bit samples: use \.png"),
        ("a.webp", samples(3, np.uint16), "WEBP cannot hold 16-bit samples"),
        ("a.bmp", samples(2), "BMP cannot hold an alpha channel"),
        ("a.tif", samples(2, np.uint16), "TIFF cannot hold 16-bit grey with alpha"),
        ("a.webp", samples(1, height=1, width=16384), "WEBP cannot hold a side of 16384 pixels"),
        ("a.jpg", samples(1, height=65501, width=1), "JPEG cannot hold a side of 65501 pixels"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, name: str, picture: np.ndarray, message: str) -> None:
    """Refused, rather than converted in silence; nothing is written."""
    for ask in (check_output, write_picture):
        with pytest.raises(UsageError, match=message):
            ask(tmp_path / name, Picture.from_array(picture))
    assert list(tmp_path.iterdir()) == []


def test_the_largest_side_is_written(tmp_path: Path) -> None:
    for name, side in (("a.webp", 16383), ("a.jpg", 65500)):
        write_picture(tmp_path / name, Picture.from_array(samples(1, height=1, width=side)))
        assert read_picture(tmp_path / name).size == (side, 1)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="does not exist: run `mkdir -p"):
        write_picture(tmp_path / "no" / "a.png", Picture.from_array(samples(3)))

    def full(stream: object, *_: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    (tmp_path / "old.png").write_bytes(b"old")
    for module, suffix in (("write_png", ".png"), ("write_tiff", ".tif")):
        monkeypatch.setattr(f"moebius_edge.imaging.pictures.{module}", full)
        with pytest.raises(MachineError, match="the disk is full"):
            write_picture(tmp_path / f"old{suffix}", Picture.from_array(samples(3)))
    assert (tmp_path / "old.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_pictures_from_arrays() -> None:
    grey = Picture.from_array(np.zeros((4, 5), np.uint8))
    assert grey.size == (5, 4) and grey.bits == 8 and grey.pixels.shape == (4, 5, 1)
    with pytest.raises(UsageError, match="type float32: give uint8"):
        Picture.from_array(np.zeros((4, 5, 3), np.float32))
    for shape in ((4,), (4, 5, 5), (0, 5, 3), (2, 4, 5, 3)):
        with pytest.raises(UsageError, match="shape"):
            Picture.from_array(np.zeros(shape, np.uint8))
