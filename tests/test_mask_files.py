"""Mask files as people have them: whatever marks the hole is filled, or one line names the option which decides."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from moebius_edge.errors import UsageError
from moebius_edge.imaging.mask_files import MaskFile, read_hole, read_mask
from moebius_edge.imaging.pictures import Picture

HOLE = np.zeros((21, 34), bool)
HOLE[4:12, 5:20] = True
PHOTOGRAPH = np.asarray(Image.open(Path(__file__).parents[1] / "examples" / "coffee.png").convert("RGB"))
Generator = np.random.Generator


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)
    return path


def read(path: Path, size: tuple[int, int] | None = None, orientation: int = 1, **options: object) -> MaskFile:
    """The mask of a black picture of ``size``, by default the mask file's own."""
    if size is None:
        with Image.open(path) as image:
            size = image.size
    return read_mask(path, Picture(np.zeros((size[1], size[0], 1), np.uint8), orientation=orientation), **options)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & other).sum() / (one | other).sum())


# Plain masks


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_white_on_black_of_any_mode(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("mask.jpg" if mode == "CMYK" else "mask.png")
    if mode == "I;16":
        Image.fromarray(HOLE * np.uint16(65535)).save(path)
    else:
        Image.fromarray(HOLE * np.uint8(255)).convert("RGB").convert(mode).save(path)
    hole, notes = read(path)
    np.testing.assert_array_equal(hole, HOLE)
    assert notes == ()
    np.testing.assert_array_equal(read(path, invert=True).hole, ~HOLE)


def test_the_threshold_is_at_half(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :64] - 31.5
    soft = np.clip(20.5 - np.hypot(x, y), 0, 1) * 255
    save(tmp_path / "m.png", soft.round().astype(np.uint8))
    np.testing.assert_array_equal(read(tmp_path / "m.png").hole, np.hypot(x, y) < 20)
    for dtype, half in ((np.uint8, 128), (np.uint16, 32768)):
        save(tmp_path / "m.png", np.array([[0, half - 1, half, np.iinfo(dtype).max]], dtype))
        assert read(tmp_path / "m.png").hole.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("dtype", "value"), [(np.uint8, 1), (np.uint8, 37), (np.uint8, 255), (np.uint16, 2), (np.uint16, 300)]
)
def test_one_value_besides_zero_fills_whatever_it_is(tmp_path: Path, dtype: type, value: int) -> None:
    hole, notes = read(save(tmp_path / "m.png", HOLE * dtype(value)))
    np.testing.assert_array_equal(hole, HOLE)
    note = f"mask {tmp_path}/m.png has the values 0 and {value}: the brighter is filled"
    assert notes == (() if value == 255 else (note,))


def test_black_is_empty(tmp_path: Path) -> None:
    for array in (np.zeros((21, 34), np.uint8), np.zeros((21, 34), np.uint16), np.zeros((21, 34, 4), np.uint8)):
        assert read(save(tmp_path / "m.png", array)) == (pytest.approx(np.zeros((21, 34), bool)), ())


def test_dilate_grows_by_a_disc_after_inverting(tmp_path: Path) -> None:
    mask = np.zeros((41, 41), np.uint8)
    mask[20, 20] = 255
    path, inverse = save(tmp_path / "m.png", mask), save(tmp_path / "inverse.png", 255 - mask)
    y, x = np.mgrid[:41, :41] - 20
    np.testing.assert_array_equal(read(path, dilate=7).hole, np.hypot(x, y) <= 7)
    np.testing.assert_array_equal(read(inverse, invert=True, dilate=7).hole, np.hypot(x, y) <= 7)
    assert read(path, dilate=1000).hole.all()
    with pytest.raises(UsageError, match="mask-dilate is -1: give 0 or more pixels"):
        read(path, dilate=-1)


def test_a_mask_that_is_mostly_white_names_the_option(tmp_path: Path) -> None:
    """Strokes are black in the sample masks of the network's authors."""
    path, says = tmp_path / "m.png", f"mask {tmp_path}/m.png fills 83% of the picture: "
    for white, invert, advice in (
        (~HOLE, False, "add --invert-mask if black marks the hole"),
        (HOLE, True, "leave out --invert-mask if white marks the hole"),
    ):
        save(path, white * np.uint8(255))
        assert read(path, invert=invert).notes == (says + advice,) and read(path, invert=not invert).notes == ()


# Masks of every kind, drawn by seed


def strokes(rng: Generator, height: int, width: int, count: int = 2) -> np.ndarray:
    """Antialiased strokes, 10 to 35 pixels wide: the share of each pixel that they cover."""
    canvas = np.zeros((4 * height, 4 * width), np.uint8)
    for _ in range(count):
        points = [rng.uniform(0.15, 0.85, 2) * (width, height)]
        for _ in range(4):
            points.append(np.clip(points[-1] + rng.uniform(-50, 50, 2), 0, (width, height)))
        cv2.polylines(canvas, [np.int32(np.multiply(points, 4))], False, 255, int(rng.uniform(40, 140)))
    return canvas.reshape(height, 4, width, 4).mean(axis=(1, 3)) / 255


def brush(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Strokes with hard, antialiased or soft edges, and where they cover half."""
    cover = strokes(rng, *rng.integers(200, 360, 2))
    softness = float(rng.choice([0, 0, 1, 2.5, 4]))
    cover = cv2.GaussianBlur(cover, (0, 0), softness) if softness else cover
    hole = cover > cover.max() / 2
    return (hole.astype(float) if rng.random() < 0.3 else cover), hole


def mixed(background: object, colour: object, amount: np.ndarray) -> np.ndarray:
    share = amount[..., None]
    return np.round(np.multiply(background, 1 - share) + np.multiply(colour, share)).astype(np.uint8)


def strong_colour(rng: Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)][rng.integers(5)])
    while np.ptp(colour := rng.integers(0, 256, 3)) <= 100:
        pass
    return colour


def on_layer(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """RGBA as a browser's canvas gives it: it keeps colours multiplied by alpha, and divides them in 8 bits."""
    alpha = np.round(alpha * 255)[..., None]
    kept = np.round(colour * alpha / 255)
    straight = np.where(alpha > 0, np.round(kept * 255 / np.maximum(alpha, 1)), 0)
    return np.dstack([np.clip(straight, 0, 255), alpha]).astype(np.uint8)


OPAQUE = {  # from the share of each pixel that strokes cover
    "white": lambda rng, cover: np.round(cover * 255).astype(np.uint8),
    "translucent white": lambda rng, cover: np.round(cover * rng.uniform(0.3, 1) * 255).astype(np.uint8),
    "white in colour mode": lambda rng, cover: mixed((0, 0, 0), (255, 255, 255), cover),
    "white on blue": lambda rng, cover: mixed((20, 40, 160), (255, 255, 255), cover),
}
COLOURED = {"colour on black": 0, "colour on grey": 128, "colour on white": 255}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("kind", [*OPAQUE, *COLOURED])
def test_strokes_on_an_opaque_background(tmp_path: Path, kind: str, suffix: str) -> None:
    for seed in range(6):
        rng = np.random.default_rng([seed, len(kind), len(suffix)])
        cover, hole = brush(rng)
        if kind in OPAQUE:
            array = OPAQUE[kind](rng, cover)
        else:
            opacity = rng.uniform(0.3, 1)
            array = mixed([COLOURED[kind]] * 3, strong_colour(rng), cover * opacity)
        options = {} if suffix == "png" else {"quality": int(rng.integers(60, 96))}  # and chroma at half the size
        marked, notes = read(save(tmp_path / f"m.{suffix}", array, **options))
        # Chroma of half the size blurs the edges of faint colours by a pixel or two, of strokes from 10 pixels on.
        assert overlap(marked, hole) >= (0.9 if suffix == "jpg" and kind in COLOURED else 0.95), seed
        assert kind not in COLOURED or "strokes are filled" in notes[-1]


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_strokes_on_a_transparent_layer(tmp_path: Path, suffix: str) -> None:
    for seed in range(10):
        rng = np.random.default_rng([seed, 1])
        cover, hole = brush(rng)
        colour = strong_colour(rng) if seed % 3 else np.full(3, rng.integers(256))
        options = {"lossless": True} if suffix == "webp" else {}
        path = save(tmp_path / f"m.{suffix}", on_layer(colour, cover * rng.uniform(0.3, 1)), **options)
        marked, notes = read(path)
        assert overlap(marked, hole) >= 0.95, seed
        assert notes == (f"mask {path} has a transparent background: what is painted on it is filled",)


def test_a_translucent_brush_laid_over_itself_on_a_layer(tmp_path: Path) -> None:
    for seed in range(6):
        rng = np.random.default_rng([seed, 2])
        opacity, alpha, hole = rng.uniform(0.3, 0.6), np.zeros((240, 320)), np.zeros((240, 320), bool)
        for _ in range(3):
            cover = strokes(rng, 240, 320, 1)
            alpha, hole = 1 - (1 - alpha) * (1 - cover * opacity), hole | (cover > 0.5)
        assert overlap(read(save(tmp_path / "m.png", on_layer(strong_colour(rng), alpha))).hole, hole) >= 0.95, seed


@pytest.mark.parametrize("suffix", ["png", "gif", "tif"])
def test_one_label_of_a_palette(tmp_path: Path, suffix: str) -> None:
    """Whatever its colour is; and where all colours of the palette are black, a note says so."""
    for seed in range(8):
        rng = np.random.default_rng([seed, 4])
        _, hole = brush(rng)
        image = Image.fromarray(hole * np.uint8(rng.integers(1, 256)), "P")
        image.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
        image.save(tmp_path / f"m.{suffix}")
        np.testing.assert_array_equal(read(tmp_path / f"m.{suffix}").hole, hole)
    image = Image.fromarray(HOLE.astype(np.uint8), "P")
    image.putpalette([0, 0, 0] * 256)
    image.save(tmp_path / "m.png")
    hole, notes = read(tmp_path / "m.png")
    np.testing.assert_array_equal(hole, HOLE)
    assert notes == (f"mask {tmp_path}/m.png tells its parts apart by palette index: 1 is filled",)


def test_strokes_reduced_to_a_palette(tmp_path: Path) -> None:
    for seed in range(4):
        rng = np.random.default_rng([seed, 5])
        cover, hole = brush(rng)
        Image.fromarray(mixed((0, 0, 0), strong_colour(rng), cover)).quantize(64).save(tmp_path / "m.png")
        assert overlap(read(tmp_path / "m.png").hole, hole) >= 0.95, seed


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("value", [1, 255])
def test_grey_or_alpha_of_two_values_in_any_mode(tmp_path: Path, channels: int, value: int) -> None:
    marked, clear = HOLE * np.uint8(value), np.zeros(HOLE.shape, np.uint8)
    planes = {2: [clear, marked], 3: [marked] * 3, 4: [marked] * 3 + [clear + np.uint8(255)]}
    np.testing.assert_array_equal(read(save(tmp_path / "m.png", np.dstack(planes[channels]))).hole, HOLE)


def test_black_and_white_on_a_transparent_layer(tmp_path: Path) -> None:
    """What is transparent counts as black."""
    painted = np.dstack([HOLE * np.uint8(255)] * 3 + [np.full(HOLE.shape, 255, np.uint8)])
    painted[:8, :, 3] = 0
    visible = HOLE & (np.arange(21) >= 8)[:, None]
    np.testing.assert_array_equal(read(save(tmp_path / "cut.png", painted)).hole, visible)


def test_levels_above_half_are_all_filled(tmp_path: Path) -> None:
    levels = np.zeros((60, 60), np.uint8)
    levels[10:30], levels[30:50] = 140, 255
    hole, notes = read(save(tmp_path / "m.png", levels))
    np.testing.assert_array_equal(hole, levels > 0)
    assert notes[0].endswith("has the levels 0, 140 and 255: all above half are filled")


# What is refused


def labelled(*values: int) -> np.ndarray:
    """Grey stripes of these values on black."""
    array = np.zeros((80, 20 * len(values)), np.uint8)
    for number, value in enumerate(values):
        array[10:70, 20 * number + 4 : 20 * number + 16] = value
    return array


def cut(background: np.ndarray, clear: np.ndarray) -> np.ndarray:
    return np.dstack([background, np.where(clear, 0, 255).astype(np.uint8)])


def spot(array: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[: array.shape[0], : array.shape[1]]
    return (abs(y - array.shape[0] // 2) < 60) & (abs(x - array.shape[1] // 3) < 70)


def scribbled() -> np.ndarray:
    array = PHOTOGRAPH.copy()
    array[spot(array)] = 255
    return array


TWO_COLOURS = np.dstack([labelled(255, 0), labelled(0, 255), labelled(0, 0)])  # red and green on black
ON_WHITE = np.where(TWO_COLOURS.max(axis=2, keepdims=True) == 0, np.uint8(255), TWO_COLOURS)
SWAPPED = r"looks like a photograph, perhaps one that was drawn on: are IMAGE and MASK swapped\? --mask-from luma"
REFUSED = [
    (PHOTOGRAPH, SWAPPED),
    (PHOTOGRAPH[..., 1], SWAPPED),
    (scribbled(), SWAPPED),
    (np.asarray(Image.fromarray(PHOTOGRAPH).convert("1")), SWAPPED),
    (np.asarray(Image.fromarray(PHOTOGRAPH).quantize(32).convert("RGB")), SWAPPED),
    (cut(PHOTOGRAPH, spot(PHOTOGRAPH)), "is a photograph of which 7% is transparent: --mask-from alpha --in"),
    (cut(PHOTOGRAPH, ~spot(PHOTOGRAPH)), "is a photograph of which 93% is transparent: --mask-from alpha --inv"),
    (
        cut(np.zeros((60, 60, 3), np.uint8), spot(np.zeros((60, 60))) & (np.arange(60) < 12)),
        "has one part of 80% that is opaque and one of 20% that is transparent: --mask-from alpha fills the opaque one",
    ),
    (cut(PHOTOGRAPH, np.ones(PHOTOGRAPH.shape[:2], bool)), "is transparent everywhere, but has colours: .*from luma"),
    (TWO_COLOURS, r"has more than one colour besides black \(#000000\): take one with --mask-from red, green"),
    (mixed((255, 0, 0), (0, 0, 255), np.linspace(0, 1, 40).round() * np.ones((40, 1))), "is .* on 50% of it and"),
    (mixed((255, 0, 0), (0, 0, 0), labelled(1) / 1.0), r"is red \(#ff0000\) on 55% .*--mask-from red fills the red"),
    (labelled(1, 2, 3), "has 4 grey levels, 0, 1, 2 and 3: --mask-from index:N fills one, --mask-from luma those "),
    (labelled(60, 255), "has 3 grey levels, 0, 60 and 255: --mask-from index:N fills one"),
    (np.full((30, 30), 128, np.uint8), r"is one grey \(128 of 255\) everywhere and marks nothing: save the hole"),
    (np.full((30, 30, 3), (255, 0, 0), np.uint8), r"is red \(#ff0000\) everywhere and marks nothing"),
    (np.full((30, 30), 1, np.uint8), r"is one grey \(1 of 255\) everywhere"),
]


@pytest.mark.parametrize(("array", "message"), REFUSED, ids=[text[:30] for _, text in REFUSED])
def test_what_is_not_certain_is_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=rf"mask .*m\.png {message}") as refusal:
        read(save(tmp_path / "m.png", array))
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith("save the hole as white on black")


def test_photographs_are_recognised_as_jpeg_too(tmp_path: Path) -> None:
    arrays = (PHOTOGRAPH, PHOTOGRAPH[::2, ::2], PHOTOGRAPH[100:250, 200:400], scribbled())
    for array, quality in itertools.product(arrays, (60, 95)):
        with pytest.raises(UsageError, match=SWAPPED):
            read(save(tmp_path / "m.jpg", array, quality=quality))


def test_several_labels_of_a_palette_are_refused(tmp_path: Path) -> None:
    path, labels = tmp_path / "m.png", labelled(1, 7, 200)
    image = Image.fromarray(labels, "P")
    for palette, message in (
        (np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8), "has more than one colour besides"),
        (np.zeros(768, np.uint8), "has the palette labels 0, 1, 7 and 200 in one colour: fill one with --mask-from in"),
    ):
        image.putpalette(palette.tobytes())
        image.save(path)
        with pytest.raises(UsageError, match=message):
            read(path)
    np.testing.assert_array_equal(read(path, source="index:7").hole, labels == 7)
    with pytest.raises(UsageError, match="has no pixel of index 3: it holds 0, 1, 7 and 200"):
        read(path, source="index:3")


# The option


@pytest.mark.parametrize(
    ("array", "source", "expected"),
    [
        (cut(PHOTOGRAPH, spot(PHOTOGRAPH)), "alpha", ~spot(PHOTOGRAPH)),
        (scribbled(), "luma", cv2.cvtColor(scribbled(), cv2.COLOR_RGB2GRAY) > 127),
        (TWO_COLOURS, "red", labelled(1, 0) > 0),
        (TWO_COLOURS, "green", labelled(0, 1) > 0),
        (255 - TWO_COLOURS, "blue", labelled(1, 1) > 0),
        (ON_WHITE, "red", labelled(1, 0) > 0),
        (labelled(1, 2, 3), "index:2", labelled(0, 1, 0) > 0),
        (labelled(60, 255), "luma", labelled(0, 1) > 0),
        (np.dstack([labelled(60, 255)] * 3), "index:60", labelled(1, 0) > 0),
    ],
)
def test_the_user_decides(tmp_path: Path, array: np.ndarray, source: str, expected: np.ndarray) -> None:
    path = save(tmp_path / "m.png", array)
    np.testing.assert_array_equal(read(path, source=source).hole, expected)
    np.testing.assert_array_equal(read(path, source=source, invert=True).hole, ~expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("alpha", "has no alpha channel: leave out --mask-from alpha"),
        ("index:1", "has colours and no palette"),
        ("index:", "--mask-from index: is unknown: choose alpha, luma, red, green, blue, or index:N such as index:1"),
        ("purple", "--mask-from purple is unknown"),
        ("index:-1", "is unknown"),
    ],
)
def test_what_the_file_does_not_have_is_named(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(save(tmp_path / "m.png", TWO_COLOURS), source=source)


# Sizes and orientations


def test_a_mask_of_another_size_names_both(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", HOLE * np.uint8(255))
    for size, orientation in (((21, 34), 1), ((21, 34), 3), ((34, 22), 6)):
        shown = f"{size[0]}x{size[1]}"
        with pytest.raises(UsageError, match=rf"mask .*m\.png is 34x21 and the picture is {shown}: .* to {shown}"):
            read(path, size, orientation)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_mask_of_the_stored_picture_is_turned_with_it(tmp_path: Path, mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "upright.png", HOLE * np.uint8(255), exif=exif)
    upright, notes = read(path, (21, 34), orientation)
    assert notes == () and (orientation != 6 or np.array_equal(upright, np.rot90(HOLE, -1)))
    with pytest.raises(UsageError, match="resize the mask"):
        read(path, (34, 21), orientation)  # it says itself how it stands
    Image.fromarray(HOLE * np.uint8(255)).convert(mode).save(tmp_path / "m.png")
    found, notes = read(tmp_path / "m.png", (21, 34), orientation)
    np.testing.assert_array_equal(found, upright)
    assert notes == (f"mask {tmp_path}/m.png has the sides of the picture before its EXIF rotation: turned with it",)


# Anything at all


@pytest.mark.parametrize("source", [None, "alpha", "luma", "green", "index:0"])
def test_odd_contents_are_a_mask_or_one_line(source: str | None) -> None:
    rng, masks, refused = np.random.default_rng(0), 0, 0
    sizes = itertools.product([(1, 1), (1, 7), (7, 1), (40, 50)], (1, 2, 3, 4), (np.uint8, np.uint16), (1, 2, 3, 256))
    for shape, channels, dtype, values in sizes:
        few = rng.integers(0, values, (*shape, channels)) * (np.iinfo(dtype).max // max(1, values - 1))
        samples = few.astype(dtype)
        indices = samples[..., 0] if dtype is np.uint8 else None
        try:
            hole, note = read_hole(samples, "mask m.png", source, indices)
        except UsageError as error:
            assert "\n" not in str(error) and "nan" not in str(error)
            refused += 1
            continue
        masks += 1
        assert hole.dtype == np.bool_ and hole.shape == shape and "nan" not in note
        assert source is not None or hole.any() or samples.min(axis=2).max() == 0, "something to fill is filled"
    assert masks > 0 and (refused > 0 or source in ("luma", "green"))
