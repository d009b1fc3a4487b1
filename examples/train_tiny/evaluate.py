"""Measure an autoencoder on a folder of photographs, or the fills of a bundle on photographs it was not trained on.

    python -m examples.train_tiny.evaluate --vae runs/autoencoder/vae --photos PHOTOS/held-out --sheet sheet.png
    python -m examples.train_tiny.evaluate --bundle runs/bundle --sheet sheet.png

Fills are compared with the mean colour of the hole's border and with OpenCV's Telea inpainting.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.export.source import open_vae
from moebius_edge.imaging.classical import telea
from moebius_edge.metrics.fidelity import hole_psnr_db, hole_ssim, texture_ratio
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.pipeline.loop import fill as fill_holes
from moebius_edge.pipeline.loop import initial_noise
from moebius_edge.runtimes.pytorch import TorchRuntime
from moebius_edge.sampling.calls import Sampling
from moebius_edge.sampling.scheduler import DDIM
from moebius_edge.spec import LATENT_DOWNSCALE

from .data import list_photographs, open_cache, to_network, validation_pictures
from .losses import texture_loss
from .metrics import evaluate
from .photographs import Case, border_mean, held_out_cases
from .training import reconstruct, write_sheet

FLAT_VALUES = (0, 51, 128, 204, 255)


def fill(
    student: nn.Module, vae: Any, cases: Sequence[Case], steps: int = 20, guidance: float = 1.0
) -> list[np.ndarray]:
    """What ``student`` and the diffusers ``vae`` make of the cases from pure noise; uint8 RGB, the hole alone changed.

    Nothing of what lies under the mask is seen. Raises BundleError for a prediction that is not finite.
    """
    size = len(cases[0].mask)
    channels = int(vae.config.latent_channels)
    components = resolved_components(size, latent_channels=channels)
    fills = []
    with TorchRuntime(student, vae, components) as runtime:
        for number, case in enumerate(cases):
            noise = initial_noise(number, 0, (1, channels, size // LATENT_DOWNSCALE, size // LATENT_DOWNSCALE))
            sampling = Sampling(DDIM(steps), guidance)
            result = fill_holes(runtime, to_network(case.image[None]), case.mask[None], noise, sampling)
            image = result.images[0].transpose(1, 2, 0)
            pixels = ((image.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
            fills.append(np.where(case.mask[..., None], pixels, case.image))
    return fills


def figures(fills: Sequence[np.ndarray], cases: Sequence[Case]) -> dict[str, float]:
    """Mean hole PSNR (dB), mean SSIM of the hole's bounding box, mean perceptual distance and median texture ratio.

    The perceptual distance is ``texture_loss`` between whole pictures, which differ in the hole alone. A learned one
    (LPIPS) would have to be downloaded.
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


def evaluate_bundle(bundle: str | Path, sheet: Path | None = None) -> dict[str, dict[str, float]]:
    """The ``figures`` of the baselines, of the bundle's defaults, and of the starts ``noise`` and ``image``.

    The start ``image`` has seen a trace of what it is judged on; the others have not.
    """
    cases = held_out_cases()
    outputs = {
        "border mean": [border_mean(c.image, c.mask) for c in cases],
        "Telea": [telea(c.image, c.mask) for c in cases],
    }
    with Inpainter(bundle) as inpainter:
        defaults = inpainter.bundle.defaults
        outputs["defaults"] = [inpainter.inpaint(c.image, c.mask, **defaults).image for c in cases]
        for start in ("noise", "image"):
            outputs[start] = [inpainter.inpaint(c.image, c.mask, start=start, seed=0).image for c in cases]
    if sheet is not None:
        holes = [np.where(c.mask[..., None], np.uint8(255), c.image) for c in cases]
        write_sheet(sheet, [[c.image for c in cases], holes, *outputs.values()], columns=1)
    return {name: figures(fills, cases) for name, fills in outputs.items()}


def evaluate_autoencoder(vae: Path, photos: Path, sheet: Path | None = None) -> dict[str, dict[str, float]]:
    """The figures of ``metrics.evaluate`` on the photographs, shrunk to the network's size and at full size."""
    model = open_vae(vae)
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(Path(folder) / "photos.bin", photos, list_photographs(photos))
        shrunk, full_size = validation_pictures(cache)
    results = {}
    for name, pictures, flat_values in (("shrunk", shrunk, FLAT_VALUES), ("full_size", full_size, (128,))):
        decoded: list[np.ndarray] = []

        def run(picture: np.ndarray, decoded: list[np.ndarray] = decoded) -> np.ndarray:
            decoded.append(reconstruct(model, picture))
            return decoded[-1]

        results[name] = evaluate(run, pictures, flat_values)
        if name == "shrunk" and sheet is not None:
            write_sheet(sheet, [pictures, decoded[: len(pictures)]])
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, help="diffusers folder of an autoencoder")
    parser.add_argument("--photos", type=Path, help="folder of photographs for it, searched recursively")
    parser.add_argument("--bundle", help="exported bundle, in place of an autoencoder")
    parser.add_argument("--sheet", type=Path, help="file for a contact sheet")
    options = parser.parse_args(arguments)
    if options.bundle:
        results = evaluate_bundle(options.bundle, options.sheet)
    elif options.vae and options.photos:
        results = evaluate_autoencoder(options.vae, options.photos, options.sheet)
    else:
        parser.error("give --bundle, or --vae with --photos")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1:])
