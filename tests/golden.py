"""Helpers for the tests: the golden numbers of the published networks, and the weights they were made with.

Every weight and input is a function of its name alone, so the numbers need no checkpoint. Not a test itself.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

DATA = Path(__file__).parent / "data" / "golden"
TIMESTEPS = (1, 500, 999)  # those of the recorded forward passes
PROMPT_IDS = np.stack([np.arange(10, 20), np.arange(10)])  # row 0 unconditional, row 1 conditional


def golden_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the state-dict entry ``key``; the first rule that fits wins."""
    g = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if key.endswith("running_var"):
        return (0.5 + g.random(shape)).astype(np.float32)
    z = g.standard_normal(shape).astype(np.float32)
    if key.endswith(("running_mean", "rel_pos_emb")):
        return np.float32(0.1) * z
    if key.endswith("embedding_layer.weight"):
        return z
    if len(shape) == 1:
        return np.float32(1) + np.float32(0.1) * z if key.endswith("weight") else np.float32(0.1) * z
    return z / np.float32(math.sqrt(math.prod(shape[1:])))


def golden_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A whole golden state dict for ``module``."""
    return {k: torch.from_numpy(np.asarray(golden_tensor(k, tuple(v.shape)))) for k, v in module.state_dict().items()}


def fill_golden(module: nn.Module) -> nn.Module:
    """``module`` with the golden weights, in eval mode."""
    module.load_state_dict(golden_state(module))
    return module.eval()


def golden_input(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The input called ``name``."""
    g = np.random.default_rng(zlib.crc32(f"input:{name}".encode()))
    return g.standard_normal(shape).astype(np.float32)


def golden_numbers(name: str) -> dict[str, Any]:
    """The recorded arrays of ``name``.npz."""
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def golden_keys(network: str, size: str) -> dict[str, list[int]]:
    """Key -> shape of the ``network`` (student, teacher) in ``size`` (full, small)."""
    keys: dict[str, list[int]] = json.loads((DATA / f"{network}_keys.json").read_text())[size]
    return keys


def check_against_golden(module: nn.Module, name: str, sample_tolerance: float, size: int) -> dict[str, float]:
    """Compares outputs and blocks on the recorded inputs; returns the largest differences."""
    numbers = golden_numbers(name)
    sample = torch.from_numpy(golden_input(name, (2, 9, size, size)))
    limits = {"sample": sample_tolerance, "head": 1e-3, "mean": 1e-5, "std": 2e-5}
    worst = dict.fromkeys(limits, 0.0)
    for t in TIMESTEPS:
        with torch.no_grad():
            out = module(sample, torch.full((2,), t), torch.from_numpy(PROMPT_IDS))
        recorded = sum(key.startswith("block") and key.endswith(f"_t{t}_shape") for key in numbers)
        assert len(out.blocks) == recorded
        compared = [("sample", out.noise.numpy(), numbers[f"sample_t{t}"])]
        for i, tensor in enumerate(out.blocks):
            block = tensor.numpy().astype(np.float64)
            assert list(block.shape) == numbers[f"block{i}_t{t}_shape"].tolist()
            values = {"head": block[:, :8, :4, :4], "mean": block.mean(), "std": block.std()}
            compared += [(what, value, numbers[f"block{i}_t{t}_{what}"]) for what, value in values.items()]
        for what, value, expected in compared:
            worst[what] = float(np.maximum(worst[what], np.abs(value - expected).max()))  # which keeps a NaN
    for what, limit in limits.items():
        assert worst[what] <= limit, f"{name} {what}: off by {worst[what]:.2e}, allowed {limit:.0e}"
    return worst
