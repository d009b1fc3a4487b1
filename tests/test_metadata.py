"""What a picture file says besides its samples: kept in each format that can hold it, but no copy of the picture."""

from __future__ import annotations

import io
import itertools
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from moebius_edge.errors import UsageError
from moebius_edge.imaging.pictures import Picture, check_output, read_picture, write_picture
from moebius_edge.imaging.png import PNG_SIGNATURE, png_chunk, write_png

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GAMMA_1 = struct.pack(">I", 100_000)
WIDE_PRIMARIES = struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600)  # BT.2020
PQ = bytes([9, 16, 0, 1])


def png_with(*chunks: tuple[bytes, bytes], dtype: type = np.uint8) -> bytes:
    stream = io.BytesIO()
    write_png(stream, PIXELS.astype(dtype), chunks)
    return stream.getvalue()


def chunks_of(path: Path) -> dict[bytes, bytes]:
    data, at, chunks = path.read_bytes(), len(PNG_SIGNATURE), {}
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks[data[at + 4 : at + 8]] = data[at + 8 : at + 8 + length]
        at += 12 + length
    return chunks


def read(folder: Path, contents: bytes, name: str = "source") -> Picture:
    (folder / name).write_bytes(contents)
    return read_picture(folder / name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_keeps_what_says_colour_and_size(tmp_path: Path, dtype: type) -> None:
    chunks = {
        b"gAMA": GAMMA_1,
        b"cHRM": WIDE_PRIMARIES,
        b"cICP": PQ,
        b"sRGB": b"\1",
        b"pHYs": struct.pack(">IIB", 11811, 5906, 1),
    }
    profile = (b"iCCP", b"any name\0\0" + zlib.compress(PROFILE))
    picture = read(tmp_path, png_with(*chunks.items(), profile, dtype=dtype))
    assert picture.notes == () and picture.metadata.icc == PROFILE
    assert write_picture(tmp_path / "out.png", picture) == ()
    written = chunks_of(tmp_path / "out.png")
    assert {name: written[name] for name in chunks} == chunks
    np.testing.assert_array_equal(read_picture(tmp_path / "out.png").pixels, PIXELS)


@pytest.mark.parametrize(
    ("chunks", "lost"),
    [
        ([(b"gAMA", GAMMA_1)], "gAMA"),
        ([(b"cHRM", WIDE_PRIMARIES), (b"gAMA", GAMMA_1)], "gAMA"),
        ([(b"cICP", PQ), (b"gAMA", GAMMA_1)], "cICP"),
        ([(b"gAMA", struct.pack(">I", 45455))], ""),  # these say no more than that it is sRGB
        ([(b"sRGB", b"\0"), (b"gAMA", GAMMA_1)], ""),
        ([(b"cICP", bytes([1, 13, 0, 1]))], ""),
    ],
)
def test_other_formats_say_which_colours_they_cannot_hold(
    tmp_path: Path, chunks: list[tuple[bytes, bytes]], lost: str
) -> None:
    for name, form in (("out.jpg", "JPEG"), ("out.tif", "TIFF"), ("out.webp", "WEBP"), ("out.bmp", "BMP")):
        notes = write_picture(tmp_path / name, read(tmp_path, png_with(*chunks)))
        expected = f"{tmp_path / name} is {form}, which holds no {lost}: colours may look different; .png keeps it"
        assert [note for note in notes if "lossy" not in note] == ([expected] if lost else [])


def test_resolution_from_any_format_to_any(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[282], exif[283], exif[296] = 300.0, 150.0, 2  # WebP has no other place
    names = [f"a{suffix}" for suffix in (".png", ".jpg", ".tif", ".bmp", ".webp")]
    for name in names:
        Image.fromarray(PIXELS).save(tmp_path / name, **({"exif": exif} if name == "a.webp" else {"dpi": (300, 150)}))
    for source, target in itertools.product(names, names):
        write_picture(tmp_path / f"b{target}", read_picture(tmp_path / source))
        assert read_picture(tmp_path / f"b{target}").metadata.dpi == pytest.approx((300, 150), abs=0.02)
        if target != "a.webp":
            with Image.open(tmp_path / f"b{target}") as opened:
                assert opened.info["dpi"] == pytest.approx((300, 150), abs=0.02)


def test_resolution_turns_with_the_picture_and_none_is_made_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.png", dpi=(300, 150), exif=exif)
    assert read_picture(tmp_path / "a.png").metadata.dpi == pytest.approx((150, 300), abs=0.02)
    for name in ("a.png", "a.jpg", "a.tif", "a.webp"):
        Image.fromarray(PIXELS).save(tmp_path / name)
        assert read_picture(tmp_path / name).metadata.dpi is None, name
    Image.fromarray(PIXELS).save(tmp_path / "b.jpg", exif=exif)  # where Pillow makes up 72
    assert read_picture(tmp_path / "b.jpg").metadata.dpi is None
    aspect = read(tmp_path, png_with((b"pHYs", struct.pack(">IIB", 2, 1, 0))))
    assert aspect.metadata.dpi is None and aspect.notes == ()


def photographed(folder: Path, suffix: str, order: str = "<") -> Path:
    """A photograph on its side with all that cameras write: a thumbnail, a maker note with another, a place."""
    stream = io.BytesIO()
    Image.fromarray(PIXELS).resize((16, 10)).save(stream, "JPEG")
    thumbnail, exif = stream.getvalue(), Image.Exif()
    exif.endian = order
    exif.update({0x0112: 6, 0x010F: "Maker", 0x8298: "the owner", 0x013B: "José Müller".encode()})
    exif[0x00FE + 0xC000] = thumbnail  # a private tag
    inner = {0x9003: "2026:01:02 03:04:05", 0x829A: 0.01, 0xA002: 34, 0xA003: 21}
    exif.get_ifd(0x8769).update(inner | {0x927C: b"MAKER NOTE" + thumbnail, 0x9286: b"ASCII\0\0\0" + thumbnail})
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 30.0, 15.0)})
    block = exif.tobytes()
    if suffix != ".tif":  # the directory of the thumbnail, which Pillow does not write
        tiff = bytearray(block.removeprefix(b"Exif\0\0"))
        (count,) = struct.unpack_from(order + "H", tiff, 8)
        struct.pack_into(order + "I", tiff, 10 + 12 * count, len(tiff))
        entries = [(513, 4, 1, len(tiff) + 2 + 24 + 4), (514, 4, 1, len(thumbnail))]
        tiff += struct.pack(order + "H", 2) + b"".join(struct.pack(order + "HHII", *e) for e in entries) + bytes(4)
        block = b"Exif\0\0" + bytes(tiff) + thumbnail
    path = folder / f"photo{suffix}"
    Image.fromarray(PIXELS).save(path, exif=block)
    assert b"MAKER NOTE\xff\xd8\xff" in path.read_bytes()
    return path


@pytest.mark.parametrize("target", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize(
    ("source", "order"), [(".png", "<"), (".png", ">"), (".jpg", "<"), (".tif", ">"), (".webp", "<")]
)
def test_exif_is_kept_without_any_copy_of_the_picture(tmp_path: Path, source: str, order: str, target: str) -> None:
    picture = read_picture(photographed(tmp_path, source, order))
    assert picture.size == (21, 34) and picture.notes == ()
    assert "which holds no EXIF metadata" in write_picture(tmp_path / "out.bmp", picture)[0]
    assert not [note for note in write_picture(tmp_path / f"out{target}", picture) if "EXIF" in note]
    data = (tmp_path / f"out{target}").read_bytes()
    assert b"MAKER NOTE" not in data and data.count(b"\xff\xd8\xff") == (target == ".jpg")
    with Image.open(tmp_path / f"out{target}") as image:
        assert image.size == (21, 34)
        exif = image.getexif()
        inner, place = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
        assert 0x0112 not in exif and exif[0x010F] == "Maker" and exif[0x8298] == "the owner"
        assert exif.get_ifd(1) == {}, "there is no directory of a thumbnail"
    assert "José Müller".encode() in data or source == ".tif", "there Pillow has written it as question marks"
    assert inner[0x9003] == "2026:01:02 03:04:05" and inner[0x829A] == pytest.approx(0.01)
    assert not {0xA002, 0xA003} & inner.keys(), "the size before it was turned"
    assert place[1] == "N" and place[2] == (52.0, 30.0, 15.0)


def test_damaged_exif_is_left_out_with_a_note_and_what_is_sound_of_it_counts(tmp_path: Path) -> None:
    path = photographed(tmp_path, ".png")
    whole = path.read_bytes()
    body = chunks_of(path)[b"eXIf"]
    for cut, turned in ((len(body) // 2, True), (9, False), (3, False)):
        picture = read(tmp_path, whole.replace(png_chunk(b"eXIf", body), png_chunk(b"eXIf", body[:cut])))
        assert picture.size == ((21, 34) if turned else (34, 21))
        assert turned or "has damaged EXIF metadata: what could not be read of them is left out" in picture.notes[0]
        write_picture(tmp_path / "out.png", picture)


def test_an_exif_field_of_another_type_is_left_out_with_a_note(tmp_path: Path) -> None:
    artist = struct.pack("<HHHII", 1, 0x013B, 5, 1, 26) + bytes(4) + struct.pack("<II", 1, 2)  # a fraction, no text
    picture = read(tmp_path, png_with((b"eXIf", b"II*\0\x08\0\0\0" + artist)))
    assert picture.metadata.exif == {} and "has damaged EXIF metadata" in picture.notes[0]
    write_picture(tmp_path / "out.png", picture)


def test_xmp_is_left_out_with_a_note(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=text)
    for name in ("a.jpg", "a.webp"):
        Image.fromarray(PIXELS).save(tmp_path / name, xmp=b"<x:xmpmeta/>")
    for name in ("a.png", "a.jpg", "a.webp"):
        assert "has XMP or IPTC metadata, which may hold a small copy" in read_picture(tmp_path / name).notes[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_long_text_and_profiles_are_no_damage(tmp_path: Path, dtype: type) -> None:
    long = os.urandom(1 << 20) + bytes(2 << 20)
    profile = struct.pack(">I", len(PROFILE) + len(long)) + PROFILE[4:] + long
    texts = [(b"zTXt", b"Comment\0\0" + zlib.compress(long)), (b"tEXt", b"Comment\0" + bytes(4 << 20))]
    picture = read(tmp_path, png_with(*texts, (b"iCCP", b"x\0\0" + zlib.compress(profile)), dtype=dtype))
    np.testing.assert_array_equal(picture.pixels, PIXELS)
    assert picture.metadata.icc == profile and picture.notes == ()
    for name in ("out.png", "out.tif", "out.jpg"):
        write_picture(tmp_path / name, Picture(PIXELS, None, picture.metadata))
        assert read_picture(tmp_path / name).metadata.icc == profile


def test_filled_pixels_become_opaque_and_an_opaque_alpha_does_not_matter(tmp_path: Path) -> None:
    alpha = np.full(PIXELS.shape[:2], 255, np.uint8)
    alpha[5:9, 5:9], alpha[0, 0] = 0, 7
    picture = Picture(PIXELS, alpha)
    hole = np.zeros(alpha.shape, bool)
    hole[4:10, 4:10] = True
    filled = picture.opaque_in(hole)
    assert filled.alpha is not None and (filled.alpha[hole] == 255).all()
    np.testing.assert_array_equal(filled.alpha[~hole], alpha[~hole])
    assert filled.notes == ("transparent pixels to fill, 16, become opaque",)
    hole[:] = True
    assert picture.opaque_in(hole).opaque and not filled.opaque
    for name in ("a.jpg", "a.bmp"):
        with pytest.raises(UsageError, match="cannot hold an alpha channel"):
            check_output(tmp_path / name, filled)
        write_picture(tmp_path / name, picture.opaque_in(hole))
        assert read_picture(tmp_path / name).alpha is None
