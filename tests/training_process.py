"""A training in a process of its own, for tests that kill it or run several: python training_process.py JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from training_toys import OPTIONS, RECIPE, FlatLatents, material

from moebius_edge.training import stage
from moebius_edge.training.recipe import with_values

if __name__ == "__main__":
    torch.set_num_threads(1)
    call = json.loads(sys.argv[1])
    if call.get("double"):
        torch.set_default_dtype(torch.float64)
        load = stage.load_teacher
        stage.load_teacher = lambda path, device: load(path, device).double()
    if call.get("accelerate_says_fsdp"):  # as it does on GPUs, and never on CPUs
        made = stage.make_accelerator

        def make_accelerator(device: str, fsdp: bool = False) -> Accelerator:
            accelerator = made(device, fsdp)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            return accelerator

        stage.make_accelerator = make_accelerator
    options = replace(OPTIONS, **call.get("options", {}))
    recipe = with_values(RECIPE, call.get("recipe", {}))
    ours = replace(material(teacher=Path(call["teacher"])), source=FlatLatents(torch.get_default_dtype()))
    stage.train_stage(recipe, ours, Path(call["output"]), options, call.get("resume", False))
