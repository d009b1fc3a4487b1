"""Pictures as people have them: any depth, mode, orientation and profile, and any damage."""

from __future__ import annotations

import io
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
from moebius_edge.imaging.png import png_chunk, write_png
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


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", np.uint8), (".png", np.uint16), (".tiff", np.uint8), (".TIF", np.uint16)]
)
def test_lossless_round_trip(tmp_path: Path, suffix: str, dtype: type, channels: int) -> None:
    icc = RGB_PROFILE if channels > 2 else GREY_PROFILE
    path = tmp_path / f"picture{suffix}"
    for size in ((21, 34), (1, 1), (1, 9), (9, 1)) if (suffix, channels) != (".TIF", 2) else ():  # see CANNOT_HOLD
        array = samples(channels, dtype, *size)
        assert write_picture(path, Picture.from_array(array, Metadata(icc))) == ()
        picture = read_picture(path)
        assert picture.pixels.dtype == dtype and picture.metadata.icc == icc and picture.notes == ()
        assert (picture.alpha is None) == (channels in (1, 3))
        np.testing.assert_array_equal(picture.samples, array)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_other_programs_read_what_is_written(tmp_path: Path, suffix: str, channels: int) -> None:
    """Pillow for 8 bits; OpenCV, where it can, for 16. More rows than one block of the writers."""
    path, array = tmp_path / f"a{suffix}", samples(channels, height=700, width=900)
    write_picture(path, Picture.from_array(array))
    with Image.open(path) as image:
        assert image.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
        np.testing.assert_array_equal(np.asarray(image).reshape(array.shape), array)
    if channels != 2:
        deep = samples(channels, np.uint16, height=300, width=900)
        write_picture(path, Picture.from_array(deep))
        read = cv2.imread(os.fspath(path), cv2.IMREAD_UNCHANGED).reshape(deep.shape)
        np.testing.assert_array_equal(read[..., {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]], deep)


def test_webp_is_lossless_and_bmp_drops_the_profile(tmp_path: Path) -> None:
    """WebP also under full transparency; the RGB that it has in place of grey does not fit a profile for grey."""
    write_picture(tmp_path / "a.webp", Picture.from_array(samples(4), Metadata(RGB_PROFILE)))
    picture = read_picture(tmp_path / "a.webp")
    np.testing.assert_array_equal(picture.samples, samples(4))
    assert picture.metadata.icc == RGB_PROFILE
    write_picture(tmp_path / "grey.webp", Picture.from_array(samples(1), Metadata(GREY_PROFILE)))
    grey = read_picture(tmp_path / "grey.webp")
    np.testing.assert_array_equal(grey.pixels, samples(1).repeat(3, axis=2))
    assert grey.metadata.icc is None
    (note,) = write_picture(tmp_path / "a.bmp", Picture.from_array(samples(3), Metadata(RGB_PROFILE)))
    assert "holds no ICC profile" in note
    np.testing.assert_array_equal(read_picture(tmp_path / "a.bmp").pixels, samples(3))


@pytest.mark.parametrize(("channels", "icc"), [(1, GREY_PROFILE), (3, RGB_PROFILE)])
def test_jpeg_is_written_well_and_called_lossy(tmp_path: Path, channels: int, icc: bytes) -> None:
    smooth = cv2.GaussianBlur(samples(channels, height=64, width=64), (0, 0), 3).reshape(64, 64, channels)
    (note,) = write_picture(tmp_path / "a.jpg", Picture.from_array(smooth, Metadata(icc)))
    assert "lossy" in note and ".png keeps them" in note
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.pixels.shape == smooth.shape and picture.metadata.icc == icc
    assert np.abs(picture.pixels.astype(int) - smooth).mean() < 1.5


def with_chunk(png: bytes, name: bytes, body: bytes) -> bytes:
    """A PNG file with one more chunk before its pixels."""
    at = png.index(b"IDAT") - 4
    return png[:at] + png_chunk(name, body) + png[at:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "deep.png", "deep.tif"])
def test_orientation(tmp_path: Path, name: str, orientation: int) -> None:
    """Against Pillow's own turning, at 16 bits of the upper bytes; the result is written upright, without the tag."""
    path, exif = tmp_path / name, Image.Exif()
    exif[0x0112] = orientation
    array = samples(3)
    if name == "deep.png":
        write_picture(path, Picture.from_array(array.astype(np.uint16) * 257))
        path.write_bytes(with_chunk(path.read_bytes(), b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    elif name == "deep.tif":
        with path.open("wb") as stream:
            write_tiff(stream, array.astype(np.uint16) * 257, {0x0112: orientation})
    else:
        save(path, array, exif=exif)
    if name in ("a.jpg", "a.webp"):  # which have changed them
        array = np.asarray(Image.open(path))
    image = Image.fromarray(array)
    image.getexif()[0x0112] = orientation
    picture = read_picture(path)
    assert picture.size == ((34, 21) if orientation < 5 else (21, 34)) and picture.orientation == orientation
    pixels = picture.pixels >> 8 if "deep" in name else picture.pixels
    np.testing.assert_array_equal(pixels, np.asarray(ImageOps.exif_transpose(image)))
    write_picture(tmp_path / "upright.png", picture)
    with Image.open(tmp_path / "upright.png") as upright:
        assert 0x0112 not in upright.getexif()


def test_16_bit_grey_tiff_of_another_program(tmp_path: Path) -> None:
    array = samples(1, np.uint16)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate"):
        path = save(tmp_path / "a.tif", array, compression=compression)
        np.testing.assert_array_equal(read_picture(path).pixels, array)


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.moveaxis(samples(3, np.uint16), -1, 0), {"photometric": "rgb", "planarconfig": "separate"}),
        (samples(4, np.uint16), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
        (samples(4, np.uint16), {"photometric": "separated"}),
        (samples(1)[..., 0].astype(np.int16), {"photometric": "minisblack"}),
        (samples(1)[..., 0].astype(np.float32), {"photometric": "minisblack"}),
        (samples(1)[..., 0].astype(np.uint32), {"photometric": "minisblack"}),
    ],
    ids=["planar", "premultiplied", "CMYK", "signed", "float", "32-bit"],
)
def test_tiff_that_would_be_misread_is_refused(tmp_path: Path, array: np.ndarray, options: dict) -> None:
    tifffile = pytest.importorskip("tifffile", reason="comes with scikit-image")
    tifffile.imwrite(tmp_path / "a.tif", array, metadata=None, **options)
    with pytest.raises(UsageError, match=r"a\.tif.*grey and RGB of 8 or 16 bits are: copy or save it again$"):
        read_picture(tmp_path / "a.tif")


def test_modes_become_what_they_mean(tmp_path: Path) -> None:
    rgb, path = samples(3), tmp_path / "a.png"
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(path)
    np.testing.assert_array_equal(read_picture(path).samples, palette.convert("RGB"))
    palette.save(path, transparency=3)
    np.testing.assert_array_equal(read_picture(path).samples[..., 3] == 0, np.asarray(palette) == 3)
    bits = samples(1)[..., 0] > 127
    Image.fromarray(bits).save(path)
    np.testing.assert_array_equal(read_picture(path).pixels, bits[..., None] * np.uint8(255))
    Image.fromarray(rgb).save(path, transparency=tuple(rgb[5, 5].tolist()))
    keyed = read_picture(path)
    np.testing.assert_array_equal(keyed.pixels, rgb)
    np.testing.assert_array_equal(keyed.samples[..., 3] == 0, (rgb == rgb[5, 5]).all(axis=2))


def test_a_transparent_colour_at_16_bits_is_refused(tmp_path: Path) -> None:
    plain = io.BytesIO()
    write_png(plain, samples(3, np.uint16))
    (tmp_path / "a.png").write_bytes(with_chunk(plain.getvalue(), b"tRNS", bytes(6)))
    with pytest.raises(UsageError, match="a transparent colour at 16 bits is not supported, an alpha channel is"):
        read_picture(tmp_path / "a.png")


def test_cmyk_is_converted_with_a_note(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 6), (0, 255, 255, 0))  # red
    image.save(tmp_path / "a.jpg", quality=95, icc_profile=RGB_PROFILE)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.pixels.shape == (6, 8, 3) and picture.metadata.icc is None
    assert picture.pixels[3, 3, 0] > 240 and picture.pixels[3, 3, 1:].max() < 15
    assert picture.notes == (
        f"{tmp_path}/a.jpg is CMYK: converted to sRGB without its profile, which is damaged or not for CMYK",
    )


def test_a_profile_that_does_not_fit_is_left_out_with_a_note(tmp_path: Path) -> None:
    picture = read_picture(save(tmp_path / "a.png", samples(1), icc_profile=RGB_PROFILE))
    assert picture.metadata.icc is None and "does not fit its pixels: left out" in picture.notes[0]


def test_the_first_of_several_frames_is_read(tmp_path: Path) -> None:
    """With a note, but for a phone's JPEG, whose second picture is a preview."""
    frames = [Image.new("L", (9, 7), v) for v in (10, 200)]
    for name, form in (("a.gif", "GIF"), ("a.tif", "TIFF"), ("a.jpg", "MPO")):
        frames[0].save(tmp_path / name, form, save_all=True, append_images=frames[1:])
        picture = read_picture(tmp_path / name)
        assert picture.size == (9, 7) and picture.pixels.max() == 10
        note = f"{tmp_path / name} has more frames or pages than one: only the first is used"
        assert picture.notes == (() if form == "MPO" else (note,))


def huge_png(width: int, height: int) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in [*parts, (b"IEND", b"")])


def test_a_huge_header_is_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(huge_png(30_000, 30_000))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UsageError, match=r"30000x30000, 900 megapixels: at most 250 are read: scale it down"):
        read_picture(tmp_path / "a.png")
    assert limit == Image.MAX_IMAGE_PIXELS, "Pillow's own limit is left as it was"
    assert MAX_PIXELS > 200_000_000, "some phones make pictures as large as that"


def test_damage_is_one_line_that_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    contents = [huge_png(300, 300), b"\x89PNG\r\n\x1a\n", b"no pixels at all"]
    for suffix, dtype in ((".png", np.uint8), (".jpg", np.uint8), (".png", np.uint16), (".tif", np.uint16)):
        write_picture(tmp_path / f"whole{suffix}", Picture.from_array(samples(3, dtype, height=80, width=90)))
        data = bytearray((tmp_path / f"whole{suffix}").read_bytes())
        contents.append(bytes(data[: len(data) // 2]))
        data[len(data) // 2] ^= 0xFF
        contents += [bytes(data)] if suffix == ".png" else []
    for content in contents:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UsageError) as caught:
            read_picture(tmp_path / "a.png")
        message = str(caught.value)
        assert f"{tmp_path}/a.png" in message and "\n" not in message and len(message) < 400
        assert message.endswith(("copy it again", "copy or save it again", "GIF"))
    assert capfd.readouterr() == ("", ""), "the libraries beneath print nothing of their own"


def test_what_is_no_picture_file(tmp_path: Path) -> None:
    for content, message in (
        (b"hello, world, hello", r"known kind, or its header is damaged \(it begins with b'hello, world, he'"),
        (b"", r"a\.png is empty \(0 bytes\): copy it again"),
    ):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_picture(tmp_path / "a.png")
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
        with pytest.raises(MachineError, match="cannot read .*: Permission denied"):
            read_picture(path)


CANNOT_HOLD = [
    ("a.gif", samples(3), r"extension \.gif: use one of \.png, \.jpg, \.jpeg, \.tif, \.tiff, \.webp"),
    ("a", samples(3), "has no extension: use one of"),
    ("a.jpg", samples(4), r"JPEG cannot hold an alpha channel: use \.png"),
    ("a.jpg", samples(3, np.uint16), r"JPEG cannot hold 16-bit samples: use \.png"),
    ("a.webp", samples(3, np.uint16), "WEBP cannot hold 16-bit samples"),
    ("a.bmp", samples(2), "BMP cannot hold an alpha channel"),
    ("a.tif", samples(2, np.uint16), "TIFF cannot hold 16-bit grey with alpha"),
    ("a.webp", samples(1, height=1, width=16384), "WEBP cannot hold a side of 16384 pixels"),
    ("a.jpg", samples(1, height=65501, width=1), "JPEG cannot hold a side of 65501 pixels"),
]


@pytest.mark.parametrize(("name", "picture", "message"), CANNOT_HOLD)
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
