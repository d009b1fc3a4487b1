"""The pictures that every configuration gets: an image, its mask and, where there is one, the true picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..errors import MachineError, UsageError
from ..imaging.mask_files import read_mask
from ..imaging.masks import Mask
from ..imaging.pictures import Picture, read_picture, write_picture
from ..system.files import sha256_file
from .results import PICTURES_FOLDER, shown_stem

_HELD = 4  # pictures that stay in memory between passes; more are read again each time


class Input(NamedTuple):
    """Where one image, its mask and its truth lie; ``truth`` may be the image itself."""

    image: Path
    mask: Path
    truth: Path | None = None

    @property
    def name(self) -> str:
        return self.image.name

    @property
    def shown(self) -> str:
        """The file name of its pictures in the report's folder."""
        return f"{shown_stem(self.name)}.png"


class Loaded(NamedTuple):
    """An input's pixels; ``truth`` is uint8 RGB (H, W, 3)."""

    source: Input
    picture: Picture
    hole: Mask
    truth: np.ndarray | None


@lru_cache(maxsize=_HELD)
def load_input(source: Input) -> Loaded:
    """Read an input.

    Raises:
        UsageError, MachineError: as ``read_picture`` and ``read_mask``; an empty mask, or a truth of another size.
    """
    picture = read_picture(source.image)
    hole = read_mask(source.mask, picture).hole
    if not hole.any():
        raise UsageError(f"mask {source.mask} is empty, nothing would be filled", "give one with a white part")
    truth = None
    if source.truth is not None:
        true = picture if source.truth == source.image else read_picture(source.truth)
        if true.size != picture.size:
            problem = f"truth {source.truth} has {true.size} pixels and {source.image} {picture.size}"
            raise UsageError(problem, "give one of the same size")
        truth = rgb8(true)
    return Loaded(source, picture, hole, truth)


def describe_inputs(inputs: Sequence[Input], folder: Path) -> list[dict[str, Any]]:
    """What ``results.json`` says of the inputs; their pictures are written into ``folder`` for the page."""
    rows = []
    for source in inputs:
        loaded = load_input(source)
        width, height = loaded.picture.size
        mask = loaded.hole.astype(np.uint8)[..., None] * 255
        write_shown(folder, "inputs", source.shown, rgb8(loaded.picture))
        write_shown(folder, "inputs", f"{shown_stem(source.name)}_mask.png", mask)
        if loaded.truth is not None:
            write_shown(folder, "truth", source.shown, loaded.truth)
        row = {"name": source.name, "width": width, "height": height, "truth": loaded.truth is not None}
        for name, path in (("sha256", source.image), ("mask_sha256", source.mask), ("truth_sha256", source.truth)):
            row[name] = None if path is None else sha256_file(path)
        rows.append({**row, "hole_share": float(f"{loaded.hole.mean():.4g}")})
    return rows


def write_shown(folder: Path, kind: str, name: str, pixels: np.ndarray) -> str:
    """Write ``pictures/kind/name`` below ``folder`` and return that path."""
    target = folder / PICTURES_FOLDER / kind / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot make folder {target.parent} ({error.strerror})", "name another output") from error
    write_picture(target, Picture(pixels))
    return f"{PICTURES_FOLDER}/{kind}/{name}"


def rgb8(picture: Picture) -> np.ndarray:
    """uint8 RGB (H, W, 3): what a page shows and a classical inpainter takes; alpha is left out."""
    pixels = picture.pixels
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / np.float32(257)).astype(np.uint8)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)) if pixels.shape[2] == 1 else pixels
