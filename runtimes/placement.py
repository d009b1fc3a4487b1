"""On which provider the nodes of a graph really ran, read from ONNX Runtime's own profile of one call.

A session may list a provider and still give it nothing: nodes it has no kernel for go to the CPU, without a word.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..errors import MachineError
from .providers import CPU

Placement = dict[str, Counter[str]]  # provider -> operator -> number of nodes

_HEAVY = re.compile(r"Conv|MatMul|Gemm|Einsum")  # where nearly all of a network's time goes, fused kinds included


def read_placement(profile: Path) -> Placement:
    """Count the nodes of a profile of one call; shape arithmetic and copies count as well."""
    placement: Placement = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        arguments = event.get("args") or {}
        if event.get("cat") == "Node" and "provider" in arguments:
            placement.setdefault(arguments["provider"], Counter())[arguments.get("op_name", "?")] += 1
    return placement


def check_placement(component: str, placement: Placement, wanted: str, device: str) -> None:
    """Raise ``MachineError`` unless ``wanted`` ran nodes and no product or convolution was left to the CPU.

    Shape arithmetic on the CPU is what ONNX Runtime intends and is no fault.
    """
    if not placement.get(wanted):
        others = ", ".join(f"{sum(ops.values())} on {name}" for name, ops in placement.items()) or "none at all"
        raise MachineError(
            f"{wanted} executes no node of {component} ({others}): update onnxruntime, or use another device than "
            f"{device}"
        )
    stray = Counter({op: n for op, n in placement.get(CPU, Counter()).items() if _HEAVY.search(op)})
    if stray:
        kinds = ", ".join(f"{n} {op}" for op, n in stray.most_common(4))
        raise MachineError(
            f"{component} would run {kinds} on the CPU, for {wanted} has no kernel for them: use a bundle of a "
            f"precision that {device} has, or the device cpu"
        )


def node_counts(placements: Mapping[str, Placement]) -> dict[str, dict[str, int]]:
    """Component -> provider -> number of nodes, for JSON."""
    return {
        component: {provider: sum(ops.values()) for provider, ops in placement.items()}
        for component, placement in placements.items()
    }
