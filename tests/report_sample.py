"""A report to present: results of an invented machine, and pictures drawn for them. No figure in it was measured."""

from __future__ import annotations

import copy
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
    """Image, mask, truth and results below ``folder/pictures``, at a quarter of the size that the document states."""
    rng = np.random.default_rng(0)
    for index, entry in enumerate(results["inputs"]):
        width, height = entry["width"] // 4, entry["height"] // 4
        y, x = np.mgrid[:height, :width] / max(width, height)
        waves = [np.sin(9 * (x * (index + 1) + c * y)) * np.cos(7 * (y + c * x)) for c in (0.4, 0.9, 1.5)]
        noise = rng.normal(0, 6, (height, width, 3))
        truth = np.clip(128 + 90 * np.dstack(waves) + noise, 0, 255).astype(np.uint8)
        hole = np.zeros((height, width), np.uint8)
        cv2.ellipse(hole, (width // 2, height // 2), (width // 5, height // 7), 20, 0, 360, 255, -1)
        stem = Path(entry["name"]).stem
        _save(folder / f"pictures/inputs/{stem}.png", np.where(hole[..., None] > 0, (210, 60, 40), truth))
        _save(folder / f"pictures/inputs/{stem}_mask.png", hole)
        if entry["truth"]:
            _save(folder / f"pictures/truth/{stem}.png", truth)
        for place, configuration in enumerate(results["configurations"]):
            if path := configuration["pictures"].get(entry["name"]):
                soft = cv2.blur(truth, (3 + place, 3 + place))
                _save(folder / path, np.where(hole[..., None] > 0, soft, truth))


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def configuration(
    name: str,
    *,
    latency: float = 100.0,
    truth: float | None = None,
    reference: float | None = None,
    measured_against: str = "reference",
    memory: float | None = 300e6,
    status: str = "ok",
    reason: str | None = None,
    start: str = "image",
    steps: int = 20,
    machine: str = "here",
) -> dict[str, Any]:
    """A row of the document with the figures that a test is about."""
    row = copy.deepcopy(sample_results()["configurations"][0])
    row |= {"id": name, "label": name, "machine": machine, "status": status, "reason": reason, "pictures": {}}
    row["settings"] |= {"start": start, "steps": steps, "steps_executed": steps}
    row["memory"]["peak_host_bytes"] = None if memory is None else int(memory)
    row["latency"]["stages"]["total"]["median_ms"] = float(latency)
    for against, psnr in (("truth", truth), ("reference", reference)):
        figures = row["accuracy"][f"against_{against}"] | {"hole_psnr_db": psnr}
        row["accuracy"][f"against_{against}"] = None if psnr is None else figures
    if reference is not None:
        row["accuracy"]["against_reference"]["reference"] = measured_against
    if status != "ok":
        row |= dict.fromkeys(("latency", "memory", "energy"))
        row["accuracy"] = {"against_reference": None, "against_truth": None}
    return row


def report_of(configurations: list[dict[str, Any]]) -> dict[str, Any]:
    """A document with these rows, no limits, and the machines that they name."""
    results = sample_results()
    machine = next(iter(results["machines"].values()))
    results["machines"] = {c["machine"]: {**machine, "label": c["machine"]} for c in configurations}
    results["limits"] = dict.fromkeys(results["limits"])
    results["configurations"] = copy.deepcopy(configurations)
    return results


def hostile_results() -> dict[str, Any]:
    """The sample with every text replaced by one that tries to be markup, a script, a template field or invisible."""
    kept = {"created", "id", "machine", "kind", "status", "scheduler", "start", "reference", "pictures"}
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='{{script}}' "
    evil += "\u202e\u2028\ud800<!--"

    def changed(entry: Any, key: str = "") -> Any:
        if isinstance(entry, dict):
            return {k: v if k in kept else changed(v, k) for k, v in entry.items()}
        if isinstance(entry, list):
            return [changed(v, key) for v in entry]
        return evil + key if isinstance(entry, str) else entry

    results: dict[str, Any] = changed(sample_results())
    for row in results["configurations"]:
        row["pictures"] = {results["inputs"][0]["name"]: "javascript:alert(3)"}
    return results
