"""How good a bundle's fills are on photographs it never saw: figures in the hole, and a contact sheet.

The baselines are the mean colour of the hole's border and OpenCV's Telea inpainting. The report's full
comparison is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from ..bundle.manifest import resolved_components
from ..data.masks import sample_mask
from ..data.photographs import HELD_OUT, load_photograph
from ..imaging.classical import telea
from ..metrics.fidelity import hole_psnr_db, hole_ssim, texture_ratio
from ..pipeline.inpainter import Inpainter
from ..pipeline.loop import fill as fill_holes
from ..pipeline.loop import initial_noise
from ..runtimes.pytorch import TorchRuntime
from ..sampling.calls import Sampling
from ..sampling.scheduler import DDIM
from ..spec import LATENT_CHANNELS, LATENT_DOWNSCALE
from ..system.files import atomic_write, utf8_path
from .autoencoder import texture_loss
from .data import to_network


@dataclass(frozen=True)
class Case:
    """A held-out crop with its mask: uint8 RGB (256, 256, 3) and bool (256, 256)."""

    name: str
    image: np.ndarray
    mask: np.ndarray


def held_out_cases(per_photograph: int = 4, size: int = 256, seed: int = 0) -> list[Case]:
    """Square crops of the held-out photographs with masks of 10 to 40% of their area, seeded."""
    cases: list[Case] = []
    for name in HELD_OUT:
        photograph = load_photograph(name)
        shortest = min(photograph.shape[:2])
        for number in range(per_photograph):
            rng = np.random.default_rng([seed, len(cases)])
            side = shortest if number == 0 else int(rng.integers(min(size, shortest), shortest + 1))
            y, x = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
            crop = cv2.resize(photograph[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA)
            mask = sample_mask(rng, size, (0.1, 0.4), ("medium", "thick", "box"))
            cases.append(Case(f"{name}-{number}", crop, mask))
    return cases


def border_mean(image: np.ndarray, mask: np.ndarray, width: int = 8) -> np.ndarray:
    """The hole filled with the mean colour of a ring of ``width`` pixels round it; uint8."""
    ring = cv2.dilate(mask.astype(np.uint8), np.ones((2 * width + 1,) * 2, np.uint8)).astype(bool) & ~mask
    filled = image.copy()
    filled[mask] = image[ring].mean(0).round()
    return filled


def fill(
    student: nn.Module, vae: Any, cases: Sequence[Case], steps: int = 20, guidance: float = 1.0
) -> list[np.ndarray]:
    """What ``student`` and the diffusers ``vae`` make of the cases from pure noise; uint8 RGB, the hole alone changed.

    Nothing of what lies under the mask is seen. Raises BundleError for a prediction that is not finite.
    """
    size = len(cases[0].mask)
    latent_size = size // LATENT_DOWNSCALE
    components = resolved_components(size)
    fills = []
    with TorchRuntime(student, vae, components) as runtime:
        for number, case in enumerate(cases):
            noise = initial_noise(number, 0, (1, LATENT_CHANNELS, latent_size, latent_size))
            sampling = Sampling(DDIM(steps), guidance)
            result = fill_holes(runtime, to_network(case.image[None]), case.mask[None], noise, sampling)
            image = result.images[0].transpose(1, 2, 0)
            pixels = ((image.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
            fills.append(np.where(case.mask[..., None], pixels, case.image))
    return fills


def figures(fills: Sequence[np.ndarray], cases: Sequence[Case]) -> dict[str, float]:
    """Mean hole PSNR (dB), mean SSIM of the hole's bounding box, mean perceptual distance and median texture ratio.

    The perceptual distance is ``autoencoder.texture_loss`` between whole pictures, differing in the hole alone: local
    energies of random filters. A learned one (LPIPS) would have to be downloaded.
    """
    rows = []
    for result, case in zip(fills, cases, strict=True):
        a, b = (to_network(i[None]) for i in (result, case.image))
        distance = texture_loss(torch.from_numpy(a), torch.from_numpy(b)).item()
        psnr, texture = hole_psnr_db(result, case.image, case.mask), texture_ratio(result, case.mask)
        rows.append((psnr, hole_ssim(a[0], b[0], case.mask), distance, texture))
    columns = np.array(rows).T
    return {
        "hole_psnr_db": float(columns[0].mean()),
        "hole_ssim": float(columns[1].mean()),
        "perceptual_distance": float(columns[2].mean()),
        "texture_ratio": float(np.median(columns[3])),
    }


def evaluate(
    bundle: str | Path, sheet: Path | None = None, starts: tuple[str, ...] = ("noise", "image")
) -> dict[str, dict[str, float]]:
    """Mean hole PSNR (dB) and median texture ratio: baselines, the bundle's defaults, upstream's settings a start.

    Of the starts ``image`` has seen a trace of what it is judged on; ``noise`` and ``prefill`` have not. Writes a
    contact sheet if asked.
    """
    cases = held_out_cases()
    outputs: dict[str, list[np.ndarray]] = {
        "border mean": [border_mean(c.image, c.mask) for c in cases],
        "Telea": [telea(c.image, c.mask) for c in cases],
    }
    with Inpainter(bundle) as inpainter:
        defaults = inpainter.bundle.defaults
        outputs["defaults"] = [inpainter.inpaint(c.image, c.mask, **defaults).image for c in cases]
        for start in starts:
            outputs[start] = [inpainter.inpaint(c.image, c.mask, start=start, seed=0).image for c in cases]
    if sheet is not None:
        _write_sheet(sheet, cases, outputs)
    return {
        name: {
            "hole_psnr_db": float(np.mean([hole_psnr_db(r, c.image, c.mask) for r, c in zip(rs, cases, strict=True)])),
            "texture_ratio": float(np.median([texture_ratio(r, c.mask) for r, c in zip(rs, cases, strict=True)])),
        }
        for name, rs in outputs.items()
    }


def _write_sheet(path: Path, cases: list[Case], outputs: dict[str, list[np.ndarray]]) -> None:
    """One row a case: original, masked, then every output; a heading row names them."""
    rows = []
    for i, case in enumerate(cases):
        masked = case.image.copy()
        masked[case.mask] = 255
        rows.append(np.hstack([case.image, masked, *(o[i] for o in outputs.values())]))
    width = cases[0].image.shape[1]
    heading = np.full((28, rows[0].shape[1], 3), 255, np.uint8)
    for column, name in enumerate(["original", "masked", *outputs]):
        cv2.putText(heading, name, (width * column + 8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    sheet = cv2.cvtColor(np.vstack([heading, *rows]), cv2.COLOR_RGB2BGR)
    with atomic_write(path) as temporary, utf8_path(temporary) as name:
        cv2.imwrite(name, sheet, [cv2.IMWRITE_JPEG_QUALITY, 88])
