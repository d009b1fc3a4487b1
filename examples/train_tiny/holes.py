"""The holes that the denoiser learns to fill and is judged on, in the shapes in which people mark what should go.

``strokes`` are LaMa's brush strokes and boxes, medium and thick, dilated, as upstream trains on: about a third of the
picture. The other kinds are what a removal tool is mostly given: an object's outline, a box, a wire, specks of dust.
"""

from __future__ import annotations

import cv2
import numpy as np

from moebius_edge.data.masks import draw_mask

KINDS = ("strokes", "object", "box", "wire", "specks")
SHARES = (0.5, 0.2, 0.1, 0.12, 0.08)  # of the kinds among training samples
_SMALLEST, _LARGEST = 0.002, 0.85  # shares of the picture that a hole covers


def draw_hole(rng: np.random.Generator, side: int, kind: str) -> np.ndarray:
    """Draw a hole of one of ``KINDS``, bool (side, side), True where to fill; neither empty nor the whole picture."""
    draw = {"strokes": _strokes, "object": _object, "box": _box, "wire": _wires, "specks": _specks}[kind]
    while True:
        mask = draw(rng, side)
        if _SMALLEST <= mask.mean() <= _LARGEST:
            return mask


def widened(mask: np.ndarray, pixels: int) -> np.ndarray:
    """``mask`` dilated by a disc of that radius; bool."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return cv2.dilate(mask.astype(np.uint8), disc).astype(bool)


def draw_outline(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw the silhouette of an object, float32 (side, side) in [0, 1], 1 to 30% of the area, edges smooth.

    It is a blob, sometimes with limbs, or a bent pole.
    """
    outline = np.zeros((side, side), np.uint8)
    centre = rng.uniform(0.2, 0.8, 2) * side
    if rng.random() < 0.8:
        size = np.sqrt(rng.uniform(0.015, 0.2)) * side
        _fill(outline, centre + _blob(rng) * size)
        for _ in range(int(rng.integers(1, 6)) if rng.random() < 0.35 else 0):
            angle, length = rng.uniform(0, 2 * np.pi), size * rng.uniform(0.6, 1.3)
            end = centre + length * np.array([np.cos(angle), np.sin(angle)])
            _bent_line(rng, outline, centre, end, max(2, int(size * rng.uniform(0.1, 0.3))))
    else:
        angle, length = rng.uniform(0, 2 * np.pi), side * rng.uniform(0.3, 0.8)
        half = length / 2 * np.array([np.cos(angle), np.sin(angle)])
        _bent_line(rng, outline, centre - half, centre + half, int(side * rng.uniform(0.02, 0.09)))
    return outline.astype(np.float32) / 255


def covering_mask(rng: np.random.Generator, outline: np.ndarray) -> np.ndarray:
    """Draw the mask that a person would draw over an object: its outline widened, or a box round it; bool."""
    mask = widened(outline > 0.02, int(rng.integers(2, 2 + max(2, len(outline) // 20))))
    if rng.random() < 0.2:
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        mask[top : top + height, left : left + width] = True
    return mask


def _strokes(rng: np.random.Generator, side: int) -> np.ndarray:
    """Medium and thick strokes until a drawn share of the picture is covered, then dilated."""
    share, mask = 0.55 * rng.random() ** 2, np.zeros((side, side), bool)
    while not mask.any() or mask.mean() < share:
        mask |= draw_mask(rng, side, "medium" if rng.random() < 0.7 else "thick")
    return widened(mask, int(rng.integers(0, max(2, side // 32))))


def _object(rng: np.random.Generator, side: int) -> np.ndarray:
    return covering_mask(rng, draw_outline(rng, side))


def _box(rng: np.random.Generator, side: int) -> np.ndarray:
    return draw_mask(rng, side, "box")


def _wires(rng: np.random.Generator, side: int) -> np.ndarray:
    """One to four lines, nearly parallel, from edge to edge and slightly bent."""
    mask = np.zeros((side, side), np.uint8)
    angle, middle = rng.uniform(0, np.pi), rng.uniform(0.2, 0.8, 2) * side
    for _ in range(int(rng.integers(1, 5))):
        turn = angle + rng.normal(0, 0.06)
        half = 1.5 * side * np.array([np.cos(turn), np.sin(turn)])
        place = middle + rng.normal(0, 0.15 * side, 2)
        _bent_line(rng, mask, place - half, place + half, max(2, int(side * rng.uniform(0.015, 0.05))))
    return mask > 127


def _specks(rng: np.random.Generator, side: int) -> np.ndarray:
    """Three to forty small blobs and scratches."""
    mask = np.zeros((side, side), np.uint8)
    for _ in range(int(rng.integers(3, 41))):
        _fill(mask, rng.uniform(0, side, 2) + _blob(rng) * side * rng.uniform(0.01, 0.045))
    return mask > 127


def _blob(rng: np.random.Generator) -> np.ndarray:
    """A closed curve round the origin, float (96, 2), with unit area before it is clipped by the picture."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    waves = [rng.normal(0, 0.3 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(2, 7)]
    radii = np.clip(1 + np.sum(waves, 0), 0.25, None)
    stretch, turn = np.exp(rng.normal(0, 0.4)), rng.uniform(0, np.pi)
    points = radii[:, None] * np.stack([np.cos(angles) * stretch, np.sin(angles) / stretch], 1)
    points = points @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    area = 0.5 * abs(np.sum(points[:, 0] * np.roll(points[:, 1], 1) - points[:, 1] * np.roll(points[:, 0], 1)))
    return points / np.sqrt(area)


def _fill(canvas: np.ndarray, points: np.ndarray) -> None:
    cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)


def _bent_line(rng: np.random.Generator, canvas: np.ndarray, start: np.ndarray, end: np.ndarray, width: int) -> None:
    """Draw a line that sags by up to a tenth of its length."""
    along = np.linspace(0, 1, 24)[:, None]
    normal = np.array([start[1] - end[1], end[0] - start[0]])
    points = start + along * (end - start) + normal * rng.uniform(-0.1, 0.1) * 4 * along * (1 - along)
    cv2.polylines(canvas, [np.round(points * 16).astype(np.int32)], False, 255, max(1, width), cv2.LINE_AA, 4)
