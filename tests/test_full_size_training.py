"""One step of the distillation at its published size, with golden weights, as the command line runs it on a CPU."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import fill_golden

from moebius_edge.model import build_student, build_teacher

pytestmark = pytest.mark.slow
MEMORY_BYTES = 24 << 30


@pytest.mark.timeout(1800)
def test_a_step_at_512_pixels_fits_24_gib(tmp_path: Path) -> None:
    """The published checkpoints' format (.bin, in float16 to be smaller), cached latents, gradient checkpointing."""
    for name, network in (("teacher", build_teacher()), ("student", build_student())):
        state = fill_golden(network).state_dict()
        torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / f"{name}.bin")
        del network, state
    rng = np.random.default_rng(0)
    clean = rng.standard_normal((2, 4, 64, 64)).astype(np.float16)
    mask = np.zeros((2, 1, 64, 64), np.uint8)
    mask[..., 16:40, 16:40] = 1
    np.savez(tmp_path / "latents.npz", clean=clean, masked=clean[:, None] * (1 - mask)[:, :, None], mask=mask)
    output = tmp_path / "run"
    command = [sys.executable, "-m", "moebius_edge", "train", "--preset", "moebius", "--stage", "student"]
    command += ["--teacher", "teacher.bin", "--student", "student.bin", "--latents", "latents.npz"]
    command += ["--set", "optimiser.steps=1", "--set", "optimiser.batch=1", "--set", "losses.distance=teacher"]
    command += ["--gradient-checkpointing", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    record = json.loads((output / "train.json").read_text())
    figures = record["result"]["last_figures"]
    print(f"{peak_bytes / 2**30:.1f} GiB, {record['seconds']} s, {figures}")
    assert peak_bytes < MEMORY_BYTES
    assert record["material"]["teacher"]["path"] == "teacher.bin" and record["recipe"]["student"]["latent_size"] == 64
    losses = ("coarse", "fine", "task", "perceptual", "w_out", "w_perceptual", "w_cross")
    assert all(np.isfinite(figures[name]) and figures[name] > 0 for name in losses)
    assert (output / "student.safetensors").stat().st_size > 4 * 226_041_531
