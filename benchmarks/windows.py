"""Thin and scattered masks on a photograph: what changes beside the mask, how sharp the seam is, how long it takes.

    python benchmarks/windows.py PHOTOGRAPH [--bundle tiny] [--picture windows.jpg]

The photograph is the truth: each mask is laid over it, what is under it is painted black, and the fill is compared with
what was there. With --picture the first mask with its windows, and its fill, are drawn side by side.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import cv2
import numpy as np

from moebius_edge.imaging.classical import telea
from moebius_edge.imaging.masks import Mask
from moebius_edge.imaging.pictures import read_picture
from moebius_edge.imaging.windows import plan_windows
from moebius_edge.metrics.fidelity import hole_psnr_db
from moebius_edge.pipeline.inpainter import Inpainter


def wire(height: int, width: int, thickness: int, degrees: float) -> Mask:
    mask = np.zeros((height, width), np.uint8)
    along = np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]) * (width + height)
    ends = (tuple(int(v) for v in np.array([width, height]) / 2 + sign * along) for sign in (-1, 1))
    cv2.line(mask, *ends, 1, thickness)
    return mask.astype(bool)


def specks(height: int, width: int, number: int) -> Mask:
    rng, mask = np.random.default_rng(0), np.zeros((height, width), np.uint8)
    for _ in range(number):
        cv2.circle(mask, (int(rng.integers(width)), int(rng.integers(height))), int(rng.integers(1, 7)), 1, -1)
    return mask.astype(bool)


def date_stamp(height: int, width: int) -> Mask:
    mask = np.zeros((height, width), np.uint8)
    cv2.putText(mask, "2026-11-27 12:30", (width // 12, height - height // 8), cv2.FONT_HERSHEY_SIMPLEX, 2, 1, 6)
    return mask.astype(bool)


def frame(height: int, width: int) -> Mask:
    mask = np.ones((height, width), bool)
    mask[10:-10, 10:-10] = False
    return mask


def disc(height: int, width: int) -> Mask:
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, (width // 2, height // 2), height // 5, 1, -1)
    return mask.astype(bool)


def masks(height: int, width: int) -> dict[str, Mask]:
    wires = {f"wire of {t} px at {d}°": wire(height, width, t, d) for t, d in ((7, 17), (2, 0), (4, 60), (12, 135))}
    others = {"a date stamp": date_stamp(height, width), "80 specks": specks(height, width, 80)}
    return wires | others | {"a frame of 10 px": frame(height, width), "a disc": disc(height, width)}


def sharpness(pixels: np.ndarray, where: Mask) -> float:
    """The variance of the Laplacian of the brightness."""
    laplacian = cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32), cv2.CV_32F)
    return float(laplacian[where].var())


def drawn(pixels: np.ndarray, mask: Mask, resolution: int) -> np.ndarray:
    """The picture with its mask in red and its windows outlined."""
    shown = pixels.copy()
    shown[mask] = (230, 30, 30)
    for window in plan_windows(mask, resolution):
        corners = (window.left, window.top), (window.left + window.side - 1, window.top + window.side - 1)
        cv2.rectangle(shown, *corners, (255, 255, 255), 3)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", type=Path)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    truth = read_picture(options.photograph).pixels
    truth = np.repeat(truth, 3, axis=2) if truth.shape[2] == 1 else truth
    print("| mask | pixels | windows | calls | changed beside it | sharpness there | PSNR dB | Telea dB | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with Inpainter(options.bundle) as inpainter:
        for name, mask in masks(*truth.shape[:2]).items():
            image = np.where(mask[..., None], 0, truth).astype(np.uint8)
            began = time.perf_counter()
            result = inpainter.inpaint(image, mask, **inpainter.bundle.settings())
            seconds = time.perf_counter() - began
            beside = (result.image != truth).any(axis=2) & ~mask
            sharp = sharpness(result.image, beside) / sharpness(truth, beside) if beside.any() else 1.0
            psnr = [hole_psnr_db(filled, truth, mask) for filled in (result.image, telea(image, mask))]
            print(
                f"| {name} | {mask.sum()} | {result.settings['windows']} | {result.settings['network_calls']} | "
                f"{beside.sum() / mask.sum():.2f} x | {sharp:.2f} | {psnr[0]:.1f} | {psnr[1]:.1f} | {seconds:.1f} |",
                flush=True,
            )
            if options.picture:
                pair = np.hstack([drawn(truth, mask, inpainter.bundle.resolution), result.image])
                small = cv2.resize(pair, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
                cv2.imwrite(str(options.picture), small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
                options.picture = None


if __name__ == "__main__":
    main()
