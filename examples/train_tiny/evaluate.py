"""Measure an autoencoder on a folder of photographs, or the fills of bundles on photographs they were not trained on.

    python -m examples.train_tiny.evaluate --vae runs/autoencoder/vae --photos PHOTOS/held-out --sheet sheet.png
    python -m examples.train_tiny.evaluate --bundle runs/bundle --photos PHOTOS/held-out --sheet sheet.png

Fills are compared with the mean colour of the hole's border and with OpenCV's inpainting: Telea, Navier-Stokes, and
with --contrib, which needs opencv-contrib-python, frequency-selective reconstruction and shift-map. Each bundle is run
with its defaults and with every combination of --start, --steps and --guidance; name several to compare, such as one
with distilled guidance. The tables are Markdown. The perceptual distance is between the features of the encoder of
--features, by default the bundled model's. Without --photos, four photographs of scikit-image are used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.errors import MachineError
from moebius_edge.export.source import open_vae
from moebius_edge.imaging.classical import navier_stokes, telea
from moebius_edge.metrics.fidelity import hole_psnr_db, hole_ssim
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.pipeline.loop import fill as fill_holes
from moebius_edge.pipeline.loop import initial_noise
from moebius_edge.runtimes.pytorch import TorchRuntime
from moebius_edge.sampling.calls import Sampling
from moebius_edge.sampling.scheduler import DDIM
from moebius_edge.spec import LATENT_DOWNSCALE

from .data import list_photographs, open_cache, to_network, validation_pictures
from .holes import draw_hole
from .metrics import FeatureDistance, evaluate, hole_texture_ratio, speck_share
from .photographs import Case, border_mean, folder_cases, held_out_cases
from .training import reconstruct, write_sheet

Fill = Callable[[np.ndarray, np.ndarray], np.ndarray]  # uint8 RGB (H, W, 3) and bool (H, W) to the filled picture
BUNDLED_VAE = ASSETS / "tiny" / "checkpoint" / "vae"
COLUMNS = {  # of the table: title and digits
    "hole_psnr_db": ("hole PSNR, dB", 2),
    "hole_ssim": ("hole SSIM", 3),
    "texture_ratio": ("texture", 3),
    "perceptual_distance": ("perceptual distance", 3),
    "specks_percent": ("specks, %", 2),
    "flat_error_99": ("flat colours, levels", 1),
}

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


def figures(
    fills: Sequence[np.ndarray], cases: Sequence[Case], distance: FeatureDistance | None = None
) -> dict[str, float]:
    """Means of hole PSNR (dB), hole SSIM, perceptual distance and specks (%), and the median texture ratio.

    ``distance`` is by default that of the bundled model's encoder. See ``metrics`` for the others.
    """
    distance = distance or FeatureDistance(open_vae(BUNDLED_VAE))
    rows = []
    for result, case in zip(fills, cases, strict=True):
        a, b = (to_network(i[None]) for i in (result, case.image))
        rows.append(
            (
                hole_psnr_db(result, case.image, case.mask),
                hole_ssim(a[0], b[0], case.mask),
                distance(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(case.mask)[None, None].float()),
                100 * speck_share(result, case.mask),
                hole_texture_ratio(result, case.image, case.mask),
            )
        )
    columns = np.array(rows).T
    return {
        "hole_psnr_db": float(columns[0].mean()),
        "hole_ssim": float(columns[1].mean()),
        "perceptual_distance": float(columns[2].mean()),
        "specks_percent": float(columns[3].mean()),
        "texture_ratio": float(np.nanmedian(columns[4])) if np.isfinite(columns[4]).any() else float("nan"),
    }


def flat_cases(size: int = 256) -> list[Case]:
    """Pictures of one colour, every channel dark or bright, and a mid-grey one, each with a brush stroke's hole."""
    colours = [*itertools.product((24, 232), repeat=3), (128, 128, 128)]
    holes = [draw_hole(np.random.default_rng([9, number]), size, "strokes") for number in range(len(colours))]
    return [
        Case(f"flat-{i}", np.full((size, size, 3), colour, np.uint8), hole, "flat")
        for i, (colour, hole) in enumerate(zip(colours, holes, strict=True))
    ]


def flat_error(fills: Sequence[np.ndarray], cases: Sequence[Case]) -> float:
    """The 99% quantile of the error in the holes of pictures of one colour, in levels of 255."""
    errors = [np.abs(f.astype(int) - c.image)[c.mask].ravel() for f, c in zip(fills, cases, strict=True)]
    return float(np.quantile(np.concatenate(errors), 0.99))


def baselines(contrib: bool = False) -> dict[str, Fill]:
    """The fills without a network, by name; with ``contrib`` also those of opencv-contrib-python, which take seconds.

    Raises MachineError if that is asked for and not installed.
    """
    fills: dict[str, Fill] = {"border mean": border_mean, "Telea": telea, "Navier-Stokes": navier_stokes}
    if contrib:
        xphoto: Any = vars(cv2).get("xphoto")
        if xphoto is None:
            raise MachineError(
                "OpenCV lacks xphoto", "pip install opencv-contrib-python-headless in another environment"
            )
        fills["FSR"] = partial(_contributed, xphoto, xphoto.INPAINT_FSR_FAST)
        fills["shift-map"] = partial(_contributed, xphoto, xphoto.INPAINT_SHIFTMAP)
    return fills


def _contributed(xphoto: Any, algorithm: int, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """OpenCV's contributed inpainting, which wants BGR or, for shift-map, Lab; its masks are 0 where to fill."""
    lab = algorithm == xphoto.INPAINT_SHIFTMAP
    there, back = (cv2.COLOR_RGB2Lab, cv2.COLOR_Lab2RGB) if lab else (cv2.COLOR_RGB2BGR, cv2.COLOR_BGR2RGB)
    filled = np.zeros_like(image)
    xphoto.inpaint(cv2.cvtColor(image, there), np.where(mask, 0, 255).astype(np.uint8), filled, algorithm)
    return np.where(mask[..., None], cv2.cvtColor(filled, back), image)


def network_fills(inpainter: Inpainter, grid: Sequence[dict[str, Any]]) -> dict[str, Fill]:
    """A bundle's fills, by the settings' names: its defaults, and each of ``grid``.

    A bundle with distilled guidance has one guidance, and takes no other.
    """
    distilled, defaults = inpainter.bundle.distilled_guidance is not None, inpainter.bundle.defaults
    fills: dict[str, Fill] = {}
    for settings in (defaults, *({**defaults, "strength": None, **settings} for settings in grid)):
        if distilled:
            settings = {name: value for name, value in settings.items() if name != "guidance"}
        name = f"{settings['start']}, {settings['steps']} steps, guidance {settings.get('guidance', 'distilled')}"
        if settings.get("strength") is not None:
            name += f", strength {settings['strength']}"

        fills.setdefault(name, partial(_network_fill, inpainter, settings))
    return fills


def _network_fill(inpainter: Inpainter, settings: Mapping[str, Any], image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(inpainter.inpaint(image, mask, seed=0, **settings).image)


def evaluate_fills(
    fills: dict[str, Fill], cases: Sequence[Case], distance: FeatureDistance, sheet: Path | None = None
) -> str:
    """Fill all cases in each way; return tables of the figures, in Markdown. ``sheet`` shows 24 cases."""
    flat = flat_cases(len(cases[0].mask))
    kinds = sorted({case.kind for case in cases})
    outputs: dict[str, list[np.ndarray]] = {}
    rows, by_kind = [], []
    for name, run in fills.items():
        outputs[name] = [run(case.image, case.mask) for case in cases]
        results = figures(outputs[name], cases, distance)
        results["flat_error_99"] = flat_error([run(case.image, case.mask) for case in flat], flat)
        rows.append([name, *(f"{results[column]:.{digits}f}" for column, (_, digits) in COLUMNS.items())])
        pairs = list(zip(outputs[name], cases, strict=True))
        by_kind.append([name])
        for kind in kinds:
            values = [hole_psnr_db(result, case.image, case.mask) for result, case in pairs if case.kind == kind]
            by_kind[-1].append(f"{np.mean(values):.2f}")
    if sheet is not None:
        holes = [np.where(case.mask[..., None], np.uint8(255), case.image) for case in cases]
        columns = {"original": [case.image for case in cases], "masked": holes, **outputs}
        labelled = [[_label(name, len(holes[0])), *pictures[:24]] for name, pictures in columns.items()]
        rows_of_sheet = [np.hstack(row) for row in zip(*labelled, strict=True)]
        write_sheet(sheet, [rows_of_sheet], columns=1)
    tables = [
        _table(["fill", *(title for title, _ in COLUMNS.values())], rows),
        _table([f"hole PSNR, dB, of {len(cases)} cases", *kinds], by_kind),
    ]
    return "\n\n".join(tables)


def _label(text: str, size: int) -> np.ndarray:
    """A white picture with the text at its foot, broken at commas."""
    picture = np.full((size, size, 3), 255, np.uint8)
    for number, line in enumerate(reversed(text.split(", "))):
        place = (6, size - 10 - 24 * number)
        cv2.putText(picture, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def evaluate_bundles(options: argparse.Namespace) -> str:
    """The tables of the baselines and of every bundle with its settings."""
    cases = folder_cases(options.photos, options.cases) if options.photos else held_out_cases()
    grid = [
        {"start": start, "steps": steps, "guidance": guidance}
        for start, steps, guidance in itertools.product(options.start, options.steps, options.guidance)
    ]
    with ExitStack() as stack:
        fills = baselines(options.contrib)
        for bundle in options.bundle:
            inpainter = stack.enter_context(Inpainter(bundle))
            prefix = f"{Path(bundle).name}, " if len(options.bundle) > 1 else ""
            fills |= {f"{prefix}{name}": run for name, run in network_fills(inpainter, grid).items()}
        return evaluate_fills(fills, cases, FeatureDistance(open_vae(options.features)), options.sheet)


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
    parser.add_argument("--bundle", action="append", help="exported bundle, in place of an autoencoder; several times")
    parser.add_argument("--photos", type=Path, help="folder of photographs, searched recursively")
    parser.add_argument("--cases", type=int, default=96, help="crops cut from the photographs, each with a hole")
    parser.add_argument("--start", nargs="+", default=["noise"], choices=("noise", "prefill", "image"))
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--contrib", action="store_true", help="compare with opencv-contrib-python's inpainting too")
    parser.add_argument("--features", type=Path, default=BUNDLED_VAE, help="autoencoder of the perceptual distance")
    parser.add_argument("--sheet", type=Path, help="file for a contact sheet")
    options = parser.parse_args(arguments)
    if options.bundle:
        print(evaluate_bundles(options))
    elif options.vae and options.photos:
        print(json.dumps(evaluate_autoencoder(options.vae, options.photos, options.sheet), indent=2))
    else:
        parser.error("give --bundle, or --vae with --photos")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1:])
