"""The page of ``moebius-edge serve`` in a real Chromium: painting, filling, undoing, by mouse, touch and keyboard.

Skipped where there is no Chromium: `apt-get install chromium` brings it, and CHROMIUM names another program.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import NO_CHROMIUM, Pages, chromium, find_chromium
from page_service import COLOUR, PageService
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

if find_chromium() is None:
    pytest.skip(NO_CHROMIUM, allow_module_level=True)

WIDTH, HEIGHT = 240, 160  # of the picture that most tests open
DESKTOP = {"viewport": {"width": 1000, "height": 760}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
expect.set_options(timeout=60_000)
SEAM = 24  # pixels beyond the mask that a real network's fill may be blended into
Opener = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def stand_in() -> Iterator[PageService]:
    with PageService() as service:
        yield service


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The address of the real service with the bundled model, or of the stand-in where that is not to be had."""
    if find_spec("moebius_edge.serve.app") is None or find_spec("fastapi") is None:
        with PageService() as stand_in:
            yield stand_in.url
        return
    command = [sys.executable, "-m", "moebius_edge", "serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        yield "http" + process.stdout.readline().strip().partition("http")[2]
        process.send_signal(signal.SIGTERM)


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opener]:
    """Opens the page of a service, by default as on a desktop."""
    with Pages(browser) as pages:
        yield lambda url, expected="", **options: pages(url, expected, **(options or DESKTOP))


# --- what a person does -----------------------------------------------------------------------------------------------


def photograph(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Smooth colours with some noise, and without the stand-in's colour."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([90 + 100 * x / width, 60 + 60 * y / height, 140 - 60 * x / width], axis=-1)
    return (smooth + np.random.default_rng(3).integers(0, 20, (height, width, 1))).astype(np.uint8)


def coded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def choose(page: Page, data: bytes, name: str = "photo.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "", "buffer": data})
    expect(page.locator("#status")).to_contain_text(name)


def downloaded(page: Page, action: Callable[[], Any]) -> tuple[str, bytes]:
    with page.expect_download() as download:
        action()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def mask_of(page: Page) -> np.ndarray:
    """The mask as the page saves it, bool (H, W)."""
    name, data = downloaded(page, page.locator("#mask-save").click)
    assert name.endswith("_mask.png")
    return np.asarray(Image.open(io.BytesIO(data)))


def saved(page: Page) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(downloaded(page, page.locator("#save").click)[1])))


def on_stage(page: Page, x: float, y: float, width: int = WIDTH, height: int = HEIGHT) -> tuple[float, float]:
    """Where a point of the picture, which is shown whole, lies in the window."""
    box = page.locator("#stage").bounding_box()
    assert box is not None
    scale = min((box["width"] - 32) / width, (box["height"] - 32) / height, 4)
    left, top = (box["width"] - width * scale) / 2, (box["height"] - height * scale) / 2
    return box["x"] + left + x * scale, box["y"] + top + y * scale


def drag(page: Page, *points: tuple[float, float], button: Any = "left", **size: int) -> None:
    """With the mouse through points of the picture."""
    page.mouse.move(*on_stage(page, *points[0], **size))
    page.mouse.down(button=button)
    for point in points[1:]:
        page.mouse.move(*on_stage(page, *point, **size), steps=4)
    page.mouse.up(button=button)


def touch(page: Page, *moments: list[tuple[float, float]]) -> None:
    """Fingers at points of the picture, moment after moment, and up."""
    session = page.context.new_cdp_session(page)
    for number, points in enumerate([*moments, []]):
        kind = (
            "touchEnd"
            if not points
            else "touchMove"
            if number and len(points) == len(moments[number - 1])
            else "touchStart"
        )
        fingers = [dict(zip("xy", on_stage(page, *point), strict=True), id=n) for n, point in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})


def fill(page: Page, results: int = 1) -> None:
    page.locator("#stage canvas").last.press("Enter")
    expect(page.locator("#history button")).to_have_count(results + 1)
    expect(page.locator("#status")).to_contain_text("Done")


def current(page: Page) -> Locator:
    return page.locator("#history [aria-current=true]")


# --- the whole way, on the real service where there is one ------------------------------------------------------------


def test_what_is_painted_is_filled_and_nothing_else(opened: Opener, service: str) -> None:
    page, picture = opened(service), photograph()
    choose(page, coded(picture))
    drag(page, (90, 80), (130, 80))
    mask = mask_of(page)
    assert mask[80, 110] and 500 < mask.sum() < 3000
    fill(page)
    result = saved(page)
    assert result.shape == picture.shape
    assert (result[mask] != picture[mask]).any(axis=-1).mean() > 0.5
    far = np.asarray(Image.fromarray(mask).resize((WIDTH, HEIGHT)))
    rows, columns = np.flatnonzero(far.any(axis=1)), np.flatnonzero(far.any(axis=0))
    outside = np.ones(mask.shape, bool)
    outside[rows[0] - SEAM : rows[-1] + SEAM, columns[0] - SEAM : columns[-1] + SEAM] = False
    assert outside.any() and (result[outside] == picture[outside]).all()

    assert not mask_of(page).any(), "the result is there to be painted on"
    drag(page, (200, 30), (210, 30))
    fill(page, results=2)
    assert (saved(page)[60:100, 80:140] == result[60:100, 80:140]).all(), "the first fill is part of the second"
    for shown in ("Result 1", "Result 1", "Original"):
        page.keyboard.press("Control+z")
        expect(current(page)).to_contain_text(shown)
    assert (mask_of(page) == mask).all(), "undo brings back what the result was made from"
    page.keyboard.press("Control+z")
    assert not mask_of(page).any()
    for _ in range(2):
        page.keyboard.press("Control+y")
    expect(current(page)).to_contain_text("Result 1")


def test_before_and_after(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url)
    choose(page, coded(photograph()))
    drag(page, (100, 80), (140, 80))
    slider = page.locator("#compare")
    expect(slider).to_be_hidden()
    fill(page)
    expect(slider).to_be_visible()

    def middle() -> list[int]:
        x, y = on_stage(page, 120, 80)
        picture = Image.open(io.BytesIO(page.screenshot()))
        return list(picture.convert("RGB").getpixel((int(x), int(y) + 8)))

    assert middle() == list(COLOUR)
    slider.fill("800")
    assert middle() != list(COLOUR)
    slider.fill("100")
    assert middle() == list(COLOUR)


def test_on_a_phone_by_touch(opened: Opener, service: str) -> None:
    page = opened(service, **PHONE)
    expect(page.locator("#camera-first")).to_be_visible()
    assert page.locator("#camera-file").get_attribute("capture") == "environment"
    choose(page, coded(photograph()))
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["viewport"]["width"]
    for name in ("#run", "#undo", "#invert", "#stage", "#tools input", "#size", "#panel-toggle"):
        expect(page.locator(name).first).to_be_in_viewport(ratio=0.99)
    zoom = page.locator("#zoom-text").text_content()
    touch(page, [(60, 80)], [(60, 80), (180, 80)], [(90, 80), (150, 80)], [(100, 80), (140, 80)])
    assert not mask_of(page).any(), "two fingers do not paint"
    assert page.locator("#zoom-text").text_content() != zoom
    page.locator("#zoom-fit").click()
    touch(page, [(90, 80)], [(110, 80)], [(130, 80)])
    assert mask_of(page)[80, 110]
    page.locator("#run").click()
    expect(page.locator("#status")).to_contain_text("Done")
    page.get_by_role("button", name="Settings and history", exact=True).click()
    expect(current(page)).to_contain_text("Result 1")
    expect(current(page)).to_be_in_viewport(ratio=0.99)


def test_by_keyboard_alone(opened: Opener, stand_in: PageService) -> None:
    page, picture = opened(stand_in.url), photograph()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Tab")
        expect(page.locator("#open")).to_be_focused()
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "photo.png", "mimeType": "image/png", "buffer": coded(picture)})
    expect(page.locator("#stage canvas").last).to_be_focused()
    page.keyboard.down("Space")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.up("Space")
    expect(page.locator("#cursor")).to_contain_text("in the mask")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Done")
    _, data = downloaded(page, lambda: page.keyboard.press("Control+s"))
    changed = (np.asarray(Image.open(io.BytesIO(data))) == COLOUR).all(axis=-1)
    assert changed[80, 120] and not changed[80, 60] and 100 < changed.sum() < 3000
    for _ in range(2):
        page.keyboard.press("Control+z")
    page.keyboard.press("r")
    page.keyboard.down("Space")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.up("Space")
    mask = mask_of(page)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and mask.sum() > 100


# --- tools ------------------------------------------------------------------------------------------------------------


def test_a_stroke_is_every_pixel_within_its_radius(opened: Opener, stand_in: PageService) -> None:
    """Against the distance of each pixel's centre from the line; patches go there and back."""
    page, rng, size = opened(stand_in.url), np.random.default_rng(7), 48
    strokes = np.hstack([rng.uniform(-10, size + 10, (40, 4)), rng.uniform(1, 15, (40, 1))])
    draw = """async ([strokes, size]) => {
      const {Mask} = await import('/page/mask.js');
      return strokes.map(([x0, y0, x1, y1, radius]) => {
        const mask = new Mask(size, size);
        mask.stroke({x: x0, y: y0}, {x: x1, y: y1}, radius, 1);
        const drawn = mask.data.join('');
        const patch = mask.commit();
        const copy = new Mask(size, size);
        copy.apply(mask.toPatch());
        mask.apply(patch);
        return [drawn, copy.data.join(''), mask.filled, copy.filled];
      });
    }"""
    centres = np.stack(np.meshgrid(*[np.arange(size) + 0.5] * 2), axis=-1)
    for (x0, y0, x1, y1, radius), (drawn, copy, none, filled) in zip(
        strokes, page.evaluate(draw, [strokes.tolist(), size]), strict=True
    ):
        start, along = np.array([x0, y0]), np.array([x1 - x0, y1 - y0])
        share = np.clip((centres - start) @ along / (along @ along), 0, 1)
        within = np.linalg.norm(centres - start - share[..., None] * along, axis=-1) <= radius
        if 0 <= x1 < size and 0 <= y1 < size:
            within[int(y1), int(x1)] = True
        assert drawn == "".join(map(str, within.ravel().astype(int)))
        assert copy == drawn and (none, filled) == (0, within.sum())


def test_tools_draw_what_they_say(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url)
    choose(page, coded(photograph()))
    page.keyboard.press("r")
    drag(page, (40, 30), (100, 70))
    box = np.zeros((HEIGHT, WIDTH), bool)
    box[30:70, 40:100] = True
    assert (mask_of(page) != box).sum() <= 2 * (60 + 40), (
        "a pixel along the edges, for a stage pixel is a fourth of one"
    )
    page.get_by_text("Lasso", exact=True).click()
    drag(page, (150, 30), (230, 30), (230, 110), (150, 30))
    mask = mask_of(page)
    assert mask[40, 210] and not mask[90, 170] and abs(int(mask[:, 120:].sum()) - 80 * 80 / 2) < 250
    drag(page, (60, 40), (80, 40), (80, 60), (60, 60), button="right")  # erases with any tool
    assert not mask_of(page)[50, 70] and mask_of(page)[50, 50]
    page.keyboard.press("e")
    before = mask_of(page).sum()
    drag(page, (50, 35), (50, 65))
    assert not mask_of(page)[50, 50]
    page.keyboard.press("i")
    inverted = mask_of(page)
    assert inverted[0, 0] and inverted[50, 50] and inverted.sum() > WIDTH * HEIGHT - before
    page.keyboard.press("Control+z")
    assert (mask_of(page) == ~inverted).all()
    page.locator("#clear").click()
    assert not mask_of(page).any()
    for _ in range(2):
        page.locator("#undo").click()
    assert mask_of(page).sum() == before
    page.set_input_files("#mask-file", {"name": "m.png", "mimeType": "image/png", "buffer": coded(box)})
    assert (mask_of(page) == box).all()
    layer = np.dstack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), box[::-1] * np.uint8(255)])
    page.set_input_files("#mask-file", {"name": "m.png", "mimeType": "image/png", "buffer": coded(layer)})
    assert (mask_of(page) == box[::-1]).all(), "black strokes on a transparent layer"
    page.set_input_files("#mask-file", {"name": "m.png", "mimeType": "image/png", "buffer": coded(box[1:])})
    expect(page.get_by_role("alert")).to_contain_text(f"Resize the mask to {WIDTH}×{HEIGHT}")
    assert (mask_of(page) == box[::-1]).all()


def test_size_zoom_and_pan(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url)
    choose(page, coded(photograph()))
    size, zoom = page.locator("#size-text"), page.locator("#zoom-text")
    first = size.text_content() or ""
    page.mouse.move(*on_stage(page, 120, 80))
    page.mouse.wheel(0, -300)
    expect(size).not_to_have_text(first)
    larger = int((size.text_content() or "").split()[0])
    assert larger > int(first.split()[0])
    for _ in range(4):
        page.keyboard.press("[")
    assert int((size.text_content() or "").split()[0]) < larger
    whole = zoom.text_content() or ""
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    expect(zoom).not_to_have_text(whole)
    page.keyboard.down("Space")
    drag(page, (120, 80), (160, 100))
    page.keyboard.up("Space")
    assert not mask_of(page).any(), "the view was moved, nothing was painted"
    page.keyboard.press("0")
    expect(zoom).to_have_text(whole)


TURNED = [
    ("WEBP", 7),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("JPEG", 6), ("PNG", 8), ("WEBP", 3))),
]


@pytest.mark.parametrize("form, orientation", TURNED)
def test_the_mask_fits_a_picture_turned_by_exif(
    opened: Opener, stand_in: PageService, form: str, orientation: int
) -> None:
    page = opened(stand_in.url)
    exif = Image.Exif()
    exif[0x0112] = orientation
    choose(page, coded(photograph(), form, exif=exif.tobytes()), f"photo.{form.lower()}")
    size = {"width": WIDTH, "height": HEIGHT} if orientation < 5 else {"width": HEIGHT, "height": WIDTH}
    drag(page, (30, 20), (50, 20), **size)
    mask = mask_of(page)
    assert mask.shape == (size["height"], size["width"]) and mask[20, 40]
    shown = page.screenshot()
    fill(page)
    filled = np.abs(saved(page).astype(int) - COLOUR).max(axis=-1) < 40
    assert filled[20, 40] and not filled[:, size["width"] // 2 :].any()
    # Beside the mask the picture looks as before: the page showed it as the service read it.
    for point in ((120, 30), (30, 120)):
        x, y = map(int, on_stage(page, *point, **size))
        before, after = (
            Image.open(io.BytesIO(data)).convert("RGB").getpixel((x, y)) for data in (shown, page.screenshot())
        )
        assert np.abs(np.subtract(before, after)).max() < 30


@pytest.mark.slow
def test_a_large_picture_keeps_its_pixels(opened: Opener, stand_in: PageService) -> None:
    width, height = 6000, 4000
    page = opened(stand_in.url)
    choose(page, coded(np.full((height, width, 3), 90, np.uint8), "JPEG"), "large.jpg")
    drag(page, (3000, 2000), (3500, 2300), width=width, height=height)
    mask = mask_of(page)
    assert mask.shape == (height, width) and mask[2150, 3250] and mask.sum() > 100_000
    fill(page)
    assert saved(page).shape == (height, width, 3)


# --- files, the service's answers -------------------------------------------------------------------------------------


def test_pictures_are_dropped_and_pasted(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url)
    give = """([event, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], event + '.jpg', {type: 'image/jpeg'}));
      const options = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
      const Kind = event === 'drop' ? DragEvent : ClipboardEvent;
      document.body.dispatchEvent(new Kind(event, options));
    }"""
    for event in ("drop", "paste"):
        page.evaluate(give, [event, list(coded(photograph(), "JPEG", quality=50))])
        expect(page.locator("#status")).to_contain_text(f"{event}.jpg, {WIDTH} × {HEIGHT}")


@pytest.mark.slow
def test_samples_are_opened(opened: Opener, service: str) -> None:
    page = opened(service)
    for number, name in enumerate(("coffee", "osprey", "sand")):
        page.reload()
        page.locator("#samples button").nth(number).click()
        expect(page.locator("#status")).to_contain_text(f"{name}.jpg")


def test_what_is_no_picture_is_refused(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url)
    page.set_input_files("#file", {"name": "scan.tif", "mimeType": "image/tiff", "buffer": coded(photograph(), "TIFF")})
    expect(page.get_by_role("alert")).to_contain_text("cannot show a TIFF")
    choose(page, coded(photograph()))
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Nothing is painted yet")
    assert stand_in.forms == []


def test_settings_go_with_the_picture(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url)
    original = coded(photograph(), "JPEG", quality=90)
    choose(page, original, "photo.jpg")
    drag(page, (100, 80), (120, 80))
    page.get_by_label("Seed").fill("7")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Steps", exact=True).fill("0")
    page.locator("#run").click()
    assert stand_in.forms == [], "0 steps are none"
    page.get_by_label("Steps", exact=True).fill("12")
    page.get_by_label("Steps", exact=True).press("Enter")
    expect(current(page)).to_contain_text("seed 7")
    (form,) = stand_in.forms
    assert {name: form[name] for name in form if name not in ("image", "mask")} == {
        **{"seed": b"7", "steps": b"12", "match_colours": b"true"}
    }
    assert form["image"] == original, "the file goes as it is"
    name, data = downloaded(page, page.locator("#save").click)
    assert name == "photo_inpainted.jpg" and Image.open(io.BytesIO(data)).format == "JPEG"
    page.get_by_text("Try another").click()
    expect(current(page)).to_contain_text("seed 8")
    assert stand_in.forms[1]["image"] == original and stand_in.forms[1]["mask"] == form["mask"]


def test_errors_are_shown_with_their_remedy(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url)
    choose(page, coded(photograph()))
    drag(page, (100, 80), (120, 80))
    mask = mask_of(page)
    stand_in.error = {"error": "the picture is <b>too large</b>", "remedy": "scale it down", "status": 413}
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the picture is <b>too large</b>")
    expect(page.get_by_role("alert")).to_contain_text("scale it down")
    assert (mask_of(page) == mask).all()
    stand_in.error = None
    fill(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_stopping_closes_the_request(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url)
    choose(page, coded(photograph()))
    drag(page, (100, 80), (120, 80))
    mask = mask_of(page)
    stand_in.stalls = True
    page.keyboard.press("Enter")
    expect(page.locator("#progress-text")).to_contain_text("Step 1 of 4")
    drag(page, (20, 20), (40, 20))
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Stopped")
    assert stand_in.gone.wait(30)
    assert (mask_of(page) == mask).all(), "nothing is painted meanwhile"


def test_a_busy_service_is_asked_again(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url, expected="429")
    stand_in.busy = 1
    choose(page, coded(photograph()))
    drag(page, (100, 80), (120, 80))
    page.keyboard.press("Enter")
    expect(page.locator("#progress-text")).to_contain_text("busy: next try in 1 s")
    expect(page.locator("#status")).to_contain_text("Done")


def test_a_token_is_asked_for_and_kept(opened: Opener, stand_in: PageService) -> None:
    page = opened(stand_in.url, expected="401")
    stand_in.token = "right"
    choose(page, coded(photograph()))
    drag(page, (100, 80), (120, 80))
    for token in ("wrong", "right"):
        if token == "wrong":
            page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("asks for a token")
        page.get_by_label("Token", exact=True).fill(token)
        page.get_by_role("button", name="Continue").click()
    expect(page.locator("#status")).to_contain_text("Done")
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
