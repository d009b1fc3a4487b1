"""The distillation's ablation, at the scale of a few minutes a run: which loss terms help, over several seeds.

    python -m benchmarks.distillation --teacher TEACHER.safetensors --images FOLDER --vae DIR --output DIR

Every row and seed trains a fresh student at a small latent grid on the same samples, and fills held-out photographs
from pure noise. An interrupted ablation goes on where it was. Prints the table of docs/distillation.md
and writes ``ablation.json``. It judges terms, not the bundled model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from examples.train_tiny.evaluate import figures, fill
from examples.train_tiny.photographs import border_mean, held_out_cases
from moebius_edge.export.source import open_vae
from moebius_edge.imaging.classical import telea
from moebius_edge.model import build_student, load_checkpoint
from moebius_edge.training.loop import atomic_save
from moebius_edge.training.recipe import Inputs, RunOptions, preset_recipe
from moebius_edge.training.stage import train

ROWS: dict[str, tuple[str, ...]] = {
    "task alone, no teacher": ("task",),
    "coarse only": ("coarse",),
    "coarse + fine": ("coarse", "fine"),
    "coarse + fine + task": ("coarse", "fine", "task"),
    "coarse + fine + task + perceptual": ("coarse", "fine", "task", "perceptual"),
}
COLUMNS = {"hole_psnr_db": 2, "hole_ssim": 4, "perceptual_distance": 4, "texture_ratio": 3}
EVALUATION_SEED = 2  # crops and masks of the held-out photographs that chose nothing else


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", type=int, default=16, help="of the latent grid")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    vae = open_vae(options.vae)
    cases = held_out_cases(8, 8 * options.side, EVALUATION_SEED)
    results: dict[str, dict[str, dict[str, float]]] = {
        "border mean": {"-": figures([border_mean(c.image, c.mask) for c in cases], cases)},
        "Telea": {"-": figures([telea(c.image, c.mask) for c in cases], cases)},
    }
    base = preset_recipe("tiny", "student")
    student = replace(base.student, latent_size=options.side)
    optimiser = replace(base.optimiser, steps=options.steps, ema_decay=0.98)
    for seed in options.seeds:  # seeds outside, so that an early stop leaves whole tables
        for number, (row, terms) in enumerate(ROWS.items()):
            losses = replace(base.losses, terms=terms, distance="teacher")
            recipe = replace(base, seed=seed, student=student, optimiser=optimiser, losses=losses)
            teacher = None if terms == ("task",) else options.teacher
            inputs = Inputs(options.images, vae=options.vae, teacher=teacher)
            folder = options.output / f"seed-{seed}-row-{number}"
            weights = train(recipe, inputs, folder, RunOptions(device="cpu", sample_every=0), resume=True)
            trained = build_student(student)
            load_checkpoint(trained, weights)
            results.setdefault(row, {})[str(seed)] = figures(fill(trained.eval(), vae, cases), cases)
            atomic_save(results, options.output / "ablation.json")
            print(json.dumps({row: results[row]}), flush=True)
    print(table(results))


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| terms | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for row, seeds in results.items():
        cells = []
        for name, digits in COLUMNS.items():
            values = [f[name] for f in seeds.values()]
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
