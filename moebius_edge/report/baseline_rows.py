"""The rows of ``--baseline``: classical methods, ONNX models described by a file, and PyTorch on a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle.bundle import ASSETS, Bundle
from ..errors import UsageError
from ..system.files import sha256_file
from ..toml import read_toml
from .baselines import CLASSICAL, read_description
from .configurations import FLOAT32, TORCH, Choices, Configuration, configuration, slug


def baseline_rows(names: Sequence[str], bundles: Sequence[Bundle], choices: Choices) -> list[Configuration]:
    """The rows of ``--baseline``: a classical method, ``torch``, or a TOML file of an ONNX model or of a checkpoint.

    Raises:
        UsageError: a name that is none of them, or a file that describes neither. MachineError: a file is missing.
    """
    rows: list[Configuration] = []
    for name in names:
        if name in CLASSICAL:
            runtime = {"name": "opencv", "version": None, "device": "cpu"}
            rows.append(Configuration(name, CLASSICAL[name][0], "baseline", {"method": name}, runtime))
        elif name == TORCH:
            rows += _torch_rows(bundles, choices, {})
        elif name.endswith(".toml"):
            values = read_toml(Path(name))
            rows += _torch_rows(bundles, choices, values, Path(name)) if "checkpoint" in values else [_described(name)]
        else:
            known = ", ".join((*CLASSICAL, TORCH))
            raise UsageError(f"unknown baseline {name!r}: choose one of {known}, or name a .toml file")
    return rows


def _torch_rows(
    bundles: Sequence[Bundle], choices: Choices, files: Mapping[str, Any], description: Path | None = None
) -> list[Configuration]:
    """PyTorch on the checkpoint that a bundle was made from, once for each checkpoint."""
    rows: dict[str, Configuration] = {}
    shown = description or "--baseline torch"
    folder = Path() if description is None else description.parent
    paths = {key: folder / value for key, value in files.items() if key in ("checkpoint", "vae")}
    if description is not None and set(paths) != set(files) | {"vae"}:
        raise UsageError(f"{description} should hold checkpoint and vae, the files of a PyTorch model, and no more")
    for bundle in sorted(bundles, key=lambda b: b.precision != FLOAT32):  # of one checkpoint's, the float32 bundle
        recorded = bundle.source["checkpoint"]["sha256"] if "checkpoint" in bundle.source else None
        source = dict(paths) or _own_checkpoint(bundle)
        if not source or not source["checkpoint"].is_file() or sha256_file(source["checkpoint"]) != recorded:
            continue
        for settings in choices.settings(bundle):
            made = configuration(bundle, f"{TORCH}-{bundle.name}", TORCH, "cpu", settings, kind=TORCH)
            label = made.label.replace(f"{TORCH}-", "", 1)
            made = replace(made, label=label, source={**made.source, **{k: str(v) for k, v in source.items()}})
            rows.setdefault(made.id, made)
    if not rows:
        raise UsageError(
            f"{shown}: no bundle here was made from that checkpoint: name the checkpoint and its vae in a .toml file"
        )
    return list(rows.values())


def _own_checkpoint(bundle: Bundle) -> dict[str, Path]:
    """Of a model that comes with the package."""
    folder = bundle.path / "checkpoint"
    return {"checkpoint": folder / "student.safetensors", "vae": folder / "vae"} if ASSETS in folder.parents else {}


def _described(name: str) -> Configuration:
    description = read_description(Path(name))
    return Configuration(
        id=slug(description.title),
        label=description.title,
        kind="baseline",
        source={"description": str(Path(name).resolve())},
        runtime={"name": "onnxruntime", "version": None, "device": description.device},
        depends={"model": sha256_file(description.model), "description": sha256_file(Path(name))},
    )
