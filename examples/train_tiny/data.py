"""Training pictures for the demonstration model: random crops of a folder of photographs, mixed with drawn pictures.

The photographs are decoded once into one memory-mapped file, so that a crop costs a millisecond. The drawn pictures
teach what photographs seldom show: flat colours of any value, gradients, lettering and sharp graphics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from moebius_edge.errors import UsageError

from .scenes import draw_scene

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SMALLEST_SIDE = 64  # photographs with a shorter side are left out
NETWORK_SIDE = 256  # pixels: the size of the pictures that the finished model works on


def list_photographs(folder: Path, exclude: Sequence[str] = ()) -> list[str]:
    """Return the sorted paths, relative to ``folder``, of the pictures in it that lie in no folder of ``exclude``."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: give a folder of photographs with --photos")
    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not set(path.relative_to(folder).parts[:-1]) & set(exclude)
    ]
    if not names:
        raise UsageError(f"{folder} holds no picture ({', '.join(SUFFIXES)}): give a folder of photographs")
    return sorted(names)


def split_validation(names: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Split names into those to train on and ``count`` to validate on, of few photographs at most half.

    The choice goes by the hash of the name, so it does not depend on the folder's other files.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    validation = set(ranked[: min(count, len(names) // 2)])
    return [name for name in names if name not in validation], sorted(validation)


class PhotoCache:
    """Decoded photographs in one memory-mapped file; ``cache[i]`` is uint8 RGB (H, W, 3)."""

    def __init__(self, file: Path) -> None:
        index = json.loads(file.with_suffix(".json").read_text())
        self.names: list[str] = index["names"]
        self.shapes: list[list[int]] = index["shapes"]
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.pixels = np.memmap(file, np.uint8, "r")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> np.ndarray:
        start, end = self.offsets[number], self.offsets[number + 1]
        return self.pixels[start:end].reshape(self.shapes[number])


def open_cache(file: Path, folder: Path, names: Sequence[str]) -> PhotoCache:
    """Open the cache of these photographs, and decode them into it first where that has not been done yet."""
    index = file.with_suffix(".json")
    if index.exists() and json.loads(index.read_text())["listed"] == list(names):
        return PhotoCache(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    index.unlink(missing_ok=True)  # it is written last, so that an interrupted decoding leaves no index
    kept, shapes = [], []
    with open(file, "wb") as stream:
        for name in names:
            picture = cv2.imread(str(folder / name), cv2.IMREAD_COLOR)  # applies the EXIF orientation
            if picture is None:
                raise UsageError(f"{folder / name} cannot be decoded: remove it or replace it by a sound picture")
            if min(picture.shape[:2]) < SMALLEST_SIDE:
                continue
            stream.write(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB).tobytes())
            kept.append(name)
            shapes.append(picture.shape)
    if not kept:
        raise UsageError(f"no picture in {folder} has {SMALLEST_SIDE} pixels a side: give larger photographs")
    index.write_text(json.dumps({"listed": list(names), "names": kept, "shapes": shapes}))
    return PhotoCache(file)


def random_photo_crop(rng: np.random.Generator, photo: np.ndarray, side: int) -> np.ndarray:
    """Cut a square at a random scale and place, resize it to ``side`` pixels, and flip, turn and recolour it.

    The scale lies between a slight enlargement and the whole photograph shrunk to the network's picture size, so a
    small crop shows part of what the network sees, at the scale at which the network sees it.
    """
    shortest = min(photo.shape[:2])
    coarsest = max(1.0, shortest / NETWORK_SIDE)
    scale = np.exp(rng.uniform(np.log(0.8), np.log(coarsest))) if rng.random() < 0.7 else coarsest
    cut = int(np.clip(round(side * scale), 8, shortest))
    y, x = (int(rng.integers(0, n - cut + 1)) for n in photo.shape[:2])
    crop = photo[y : y + cut, x : x + cut]
    crop = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA if cut > side else cv2.INTER_CUBIC)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if rng.random() < 0.25:
        crop = np.rot90(crop, int(rng.integers(1, 4)))
    if rng.random() < 0.4:
        crop = recolour(rng, crop)
    return np.ascontiguousarray(crop)


def recolour(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Change the channels' gains and the gamma of a uint8 picture, and sometimes exchange or invert the channels."""
    colour = picture.astype(np.float32) / 255
    colour = np.clip(colour * rng.uniform(0.75, 1.3, 3), 0, 1) ** np.exp(rng.normal(0, 0.25))
    if rng.random() < 0.3:
        colour = colour[..., rng.permutation(3)]
    if rng.random() < 0.08:
        colour = 1 - colour
    return (colour * 255).round().astype(np.uint8)


def random_rgb(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour, float32 (3,) of 0 to 255: any of the cube, sometimes a grey, sometimes a corner or a face."""
    colour = rng.uniform(0, 255, 3)
    if rng.random() < 0.25:
        colour[:] = colour[0]
    if rng.random() < 0.25:
        extreme = rng.random(3) < 0.6
        colour = np.where(extreme, 255.0 * (rng.random(3) < 0.5), colour)
    return colour.astype(np.float32)


def draw_flat(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw one colour, or up to four fields of different colours with straight borders; uint8 (side, side, 3)."""
    picture = np.empty((side, side, 3), np.float32)
    picture[:] = random_rgb(rng)
    if rng.random() < 0.4:
        row, column = (int(n) for n in rng.integers(1, side, 2))
        picture[:row] = random_rgb(rng)
        picture[:row, :column] = random_rgb(rng)
        picture[row:, column:] = random_rgb(rng)
    return picture.round().astype(np.uint8)


def draw_gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw a smooth blend of four corner colours; uint8 (side, side, 3)."""
    corners = np.stack([random_rgb(rng) for _ in range(4)]).reshape(2, 2, 3)
    if rng.random() < 0.5:  # a slight gradient, as of a wall or the sky
        corners = corners[:1, :1] + (corners - corners[:1, :1]) * rng.uniform(0.02, 0.3)
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    rows = corners[0] + (corners[1] - corners[0]) * ramp[:, None, None]
    picture = rows[:, 0][:, None] + (rows[:, 1] - rows[:, 0])[:, None] * ramp[None, :, None]
    return np.clip(picture + rng.uniform(-0.5, 0.5, picture.shape), 0, 255).round().astype(np.uint8)


def draw_graphics(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw lettering, lines and shapes with sharp edges on a flat or graded ground; uint8 (side, side, 3)."""
    canvas = draw_gradient(rng, side) if rng.random() < 0.5 else draw_flat(rng, side)
    for _ in range(int(rng.integers(2, 9))):
        colour = [int(c) for c in random_rgb(rng)]
        start, end = ([int(n) for n in rng.integers(0, side, 2)] for _ in range(2))
        kind = rng.random()
        if kind < 0.45:
            letters = "".join(chr(int(c)) for c in rng.integers(33, 127, int(rng.integers(2, 12))))
            font = int(rng.choice([cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_DUPLEX]))
            size = float(np.exp(rng.uniform(np.log(0.3), np.log(2.0))))
            cv2.putText(canvas, letters, start, font, size, colour, int(rng.integers(1, 4)), cv2.LINE_AA)
        elif kind < 0.65:
            cv2.line(canvas, start, end, colour, int(rng.integers(1, 6)), cv2.LINE_AA)
        elif kind < 0.85:
            cv2.rectangle(canvas, start, end, colour, int(rng.choice([-1, 1, 3])))
        else:
            radius = int(rng.integers(2, max(3, side // 4)))
            cv2.circle(canvas, start, radius, colour, int(rng.choice([-1, 2])), cv2.LINE_AA)
    return canvas


class PictureMixture:
    """``mixture(number, side)`` draws training picture ``number``, uint8 RGB (side, side, 3).

    It depends on the seed and the number alone, so a resumed training sees the pictures that it would have seen.
    """

    def __init__(self, cache: PhotoCache, seed: int) -> None:
        self.cache, self.seed = cache, seed

    def __call__(self, number: int, side: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, number])
        kind = rng.random()
        if kind < 0.72:
            return random_photo_crop(rng, self.cache[int(rng.integers(len(self.cache)))], side)
        if kind < 0.82:
            return draw_scene(rng, side)
        if kind < 0.90:
            return draw_flat(rng, side)
        if kind < 0.94:
            return draw_gradient(rng, side)
        return draw_graphics(rng, side)


def to_network(pictures: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    return pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def validation_pictures(cache: PhotoCache, side: int = NETWORK_SIDE) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Cut two pictures from each photograph: its centred square shrunk to ``side``, and its centre at full size.

    Returns the shrunk pictures and those at full size, uint8 RGB (side, side, 3). A photograph that is smaller than
    ``side`` is enlarged.
    """

    def centre(photo: np.ndarray, cut: int) -> np.ndarray:
        y, x = ((n - cut) // 2 for n in photo.shape[:2])
        interpolation = cv2.INTER_AREA if cut > side else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(photo[y : y + cut, x : x + cut], (side, side), interpolation=interpolation))

    photos = [cache[number] for number in range(len(cache))]
    shrunk = [centre(photo, min(photo.shape[:2])) for photo in photos]
    return shrunk, [centre(photo, min(side, *photo.shape[:2])) for photo in photos]
