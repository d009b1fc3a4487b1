"""A training in a process of its own, for tests that kill it or run several: python training_process.py JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from training_toys import OPTIONS, RECIPE, FlatLatents, stage_inputs

from moebius_edge.training import stage
from moebius_edge.training.recipe import with_values

if __name__ == "__main__":
    torch.set_num_threads(1)
    call = json.loads(sys.argv[1])
    if call.get("double"):
        torch.set_default_dtype(torch.float64)
        load = stage.load_teacher
        stage.load_teacher = lambda path, device: load(path, device).double()
    options = replace(OPTIONS, **call.get("options", {}))
    recipe = with_values(RECIPE, call.get("recipe", {}))
    ours = replace(stage_inputs(teacher=Path(call["teacher"])), source=FlatLatents(torch.get_default_dtype()))
    stage.train_stage(recipe, ours, Path(call["output"]), options, call.get("resume", False))
