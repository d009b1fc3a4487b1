"""One step at the published size, with golden weights, as the command line runs it on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from golden import fill_golden
from training_toys import small_vae

from moebius_edge.model import build_student

pytestmark = pytest.mark.slow
MEMORY_BYTES = 8 << 30
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.timeout(900)
def test_a_student_s_step_at_512_pixels_fits_8_gib(tmp_path: Path) -> None:
    """From the published format (.bin, in float16 to be smaller), with gradient checkpointing and a small autoencoder.

    The task alone: the teacher's 0.862 B parameters would take most of the time and prove little of the step.
    """
    state = fill_golden(build_student()).state_dict()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "student.bin")
    del state
    small_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "pictures").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (520, 600, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "pictures" / "a.png"), picture)
    command = [sys.executable, "-m", "moebius_edge", "train", "--student", "student.bin", "--images", "pictures"]
    command += ["--vae", "vae", "--sample-every", "0"]
    command += ["--set", "optimiser.steps=1", "--set", "optimiser.batch=1", "--set", "losses.terms=['task']"]
    command += ["--set", "optimiser.batch_norm=running", "--gradient-checkpointing", "--device", "cpu", "-o", "run"]
    # A process inherits its parent's largest memory when it is started, and other tests made this one large: a small
    # process in between starts the training and reports its memory.
    launcher = [sys.executable, "-c", LAUNCHER, *command]
    result = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[-1]) * 1024 < MEMORY_BYTES
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert record["inputs"]["student"]["path"] == "student.bin" and record["recipe"]["student"]["latent_size"] == 64
    assert np.isfinite(record["result"]["last_figures"]["task"])
    assert (tmp_path / "run" / "student.safetensors").stat().st_size > 4 * 226_041_531
