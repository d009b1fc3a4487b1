"""A report to present: results of an invented machine, and pictures drawn for them. No figure in it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

DATA = Path(__file__).parent / "data" / "report"


def sample_results() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DATA / "results.json").read_text(encoding="utf-8"))
    return document


def draw_pictures(results: dict[str, Any], folder: Path) -> None:
    """Image, mask, truth and results below ``folder/pictures`` for every input and configuration of ``results``."""
    rng = np.random.default_rng(0)
    for index, entry in enumerate(results["inputs"]):
        width, height = entry["width"], entry["height"]
        y, x = np.mgrid[:height, :width] / max(width, height)
        waves = [np.sin(9 * (x * (index + 1) + c * y)) * np.cos(7 * (y + c * x)) for c in (0.4, 0.9, 1.5)]
        truth = np.clip(128 + 90 * np.dstack(waves) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
        hole = np.zeros((height, width), np.uint8)
        cv2.ellipse(hole, (width // 2, height // 2), (width // 5, height // 7), 20, 0, 360, 255, -1)
        stem = Path(entry["name"]).stem
        _save(folder / f"pictures/inputs/{stem}.png", np.where(hole[..., None] > 0, (210, 60, 40), truth))
        _save(folder / f"pictures/inputs/{stem}_mask.png", hole)
        if entry["truth"]:
            _save(folder / f"pictures/truth/{stem}.png", truth)
        for place, configuration in enumerate(results["configurations"]):
            if path := configuration["pictures"].get(entry["name"]):
                soft = cv2.GaussianBlur(truth, (0, 0), 3 + place) + rng.normal(0, 2, truth.shape)
                _save(folder / path, np.where(hole[..., None] > 0, soft, truth))


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
