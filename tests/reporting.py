"""What the report's tests share. Not a test."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.report.grid import Choices, Configuration, grid, with_references
from moebius_edge.report.inputs import Input


def write_inputs(folder: Path, *names: str, size: tuple[int, int] = (96, 80)) -> list[Input]:
    """Photographs of noise in ``folder/images`` with masks of 16 by 16 in ``folder/masks``; each its own truth."""
    width, height = size
    inputs = []
    for name in names or ("a", "b"):
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (height, width, 3), np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[30:46, 40:56] = 255
        for kind, array in (("images", pixels), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / kind / f"{name}.png")
        image = folder / "images" / f"{name}.png"
        inputs.append(Input(image, folder / "masks" / f"{name}.png", image))
    return inputs


def rows(*bundles: Path, **choices: Any) -> list[Configuration]:
    """The grid of ``bundles`` with its references, at three steps unless told."""
    loaded = [Bundle.load(path, verify=False) for path in bundles]
    return with_references(grid(loaded, Choices(**{"steps": (3,), **choices})), None)


def spec(folder: Path, configuration: Configuration, inputs: list[Input], **changes: Any) -> dict[str, Any]:
    """What ``collect`` hands to the measuring process, for one run without a reference."""
    return {
        "configuration": asdict(configuration),
        "inputs": [[path and str(path) for path in source] for source in inputs],
        "runs": 1,
        "warmup": 0,
        "sustained_minutes": 0.0,
        "folder": str(folder),
        "record": None,
        "reference": None,
        **changes,
    }
