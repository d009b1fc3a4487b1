"""A training in a process of its own, for tests that kill it or run several: python training_process.py JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from training_toys import OPTIONS, RECIPE, material

from moebius_edge.training.recipe import with_values
from moebius_edge.training.stage import train_stage

if __name__ == "__main__":
    torch.set_num_threads(1)
    call = json.loads(sys.argv[1])
    options = replace(OPTIONS, **call.get("options", {}))
    recipe = with_values(RECIPE, call.get("recipe", {}))
    ours = material(teacher=Path(call["teacher"]))
    train_stage(recipe, ours, Path(call["output"]), options, call.get("resume", False))
