"""Measure a trained autoencoder on a folder of photographs, and write a contact sheet of what it makes of them.

python -m examples.train_tiny.evaluate --vae runs/autoencoder/vae --photos PHOTOS/held-out --sheet sheet.png
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moebius_edge.training.autoencoder import load_autoencoder

from .data import list_photographs, open_cache, validation_pictures
from .metrics import evaluate
from .training import reconstruct, write_sheet

FLAT_VALUES = (0, 51, 128, 204, 255)


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--vae", type=Path, required=True, help="diffusers folder of the autoencoder")
    options.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    options.add_argument("--sheet", type=Path, help="file for a contact sheet of the shrunk photographs")
    chosen = options.parse_args(arguments)
    model = load_autoencoder(chosen.vae)
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(Path(folder) / "photos.bin", chosen.photos, list_photographs(chosen.photos))
        shrunk, full_size = validation_pictures(cache)
    figures = {}
    for name, pictures in (("shrunk", shrunk), ("full_size", full_size)):
        decoded = []

        def run(picture: np.ndarray, decoded: list[np.ndarray] = decoded) -> np.ndarray:
            decoded.append(reconstruct(model, picture))
            return decoded[-1]

        figures[name] = evaluate(run, pictures, FLAT_VALUES if name == "shrunk" else (128,))
        if name == "shrunk" and chosen.sheet:
            write_sheet(chosen.sheet, pictures, decoded[: len(pictures)])
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1:])
