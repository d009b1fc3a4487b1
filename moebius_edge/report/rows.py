"""What was measured as ``results.json`` has it: a row for each configuration, and the machine's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .configurations import Configuration
from .instruments import network_calls, with_share
from .worker import Outcome


def row(
    configuration: Configuration, machine: str, outcome: Outcome, peaks: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """An outcome as one of ``configurations``; ``peaks`` are those of its runtime and precision."""
    ok = outcome["status"] == "ok"
    bundle = configuration.bundle and {**configuration.bundle, "engine_bytes": outcome.get("engine_bytes")}
    accuracy = outcome.get("accuracy") or {"against_reference": None, "against_truth": None}
    unmeasured = None if ok else "it was not measured"
    work = outcome.get("work")
    if work is not None:
        assert configuration.settings is not None
        alike = len(network_calls(configuration.settings)) == 1
        step_ms = outcome["latency"]["stages"]["denoise"]["median_ms"] if alike else outcome["mean_call_ms"]
        work = with_share(work, step_ms, peaks)
    return {
        "id": configuration.id,
        "label": configuration.label,
        "machine": machine,
        "kind": configuration.kind,
        "bundle": bundle,
        "runtime": outcome.get("runtime") or configuration.runtime,
        "settings": configuration.settings,
        "status": outcome["status"],
        "reason": outcome["reason"],
        **{key: outcome.get(key) for key in ("latency", "sustained", "memory", "energy")},
        "work": work,
        "accuracy": {
            **accuracy,
            "reference_reason": None if accuracy["against_reference"] else unmeasured or outcome["reference_reason"],
            "truth_reason": None if accuracy["against_truth"] else unmeasured or "no true pictures were given: --truth",
        },
        "pictures": outcome.get("pictures", {}),
    }


def machine_label(info: Mapping[str, Any]) -> str:
    """The board's or the processor's name, the cores, and the GPU, of ``machine.machine_info``."""
    name = info["board"] or info["cpu"]["model"] or info["architecture"]
    cores = info["cpu"]["cores_available"]
    gpus = [gpu["name"] for gpu in info["gpus"]]
    return ", ".join([" ".join(str(name).split()), f"{cores} core" + ("s" if cores != 1 else ""), *gpus])
