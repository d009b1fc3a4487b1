"""The bundle: one folder that holds everything a device needs to run a model, and says what it is.

``bundle.json`` (see ``manifest``) describes the ONNX graphs beside it and records their hashes. What
``Bundle.load`` returns can be trusted. This module opens no ONNX file and imports no runtime.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BundleError, MachineError
from .files import atomic_write, safe_join, sha256_file
from .manifest import SCHEDULER, component_table, read_manifest, resolved_components, schema_version
from .spec import LATENT_DOWNSCALE, Component
from .text import json_text

BUNDLE_FILE = "bundle.json"
ENGINES_FOLDER = "engines"  # built later, for one machine each, so the hashes do not cover it
ASSETS = Path(__file__).parent / "assets"
BUNDLED = ("tiny",)


@dataclass(frozen=True)
class Bundle:
    """A checked ``bundle.json`` and where it lies. ``components`` have all sizes but the batch filled in."""

    path: Path
    name: str
    description: str
    licence: str
    resolution: int  # image pixels, each way
    latent_size: int  # latent positions, each way
    precision: str
    scaling_factor: float
    model: dict[str, Any]
    scheduler: dict[str, Any]
    defaults: dict[str, Any]  # steps, guidance, start, and strength where it is not the usual one
    source: dict[str, Any]  # what it was made from, by SHA-256
    gate: dict[str, Any]  # the measured figures it passed with
    tools: dict[str, Any]  # versions
    files: dict[str, dict[str, Any]]  # name -> {"sha256", "bytes"}
    components: dict[str, Component]
    # What stayed float32 in files of lower precision: component -> operator type -> node names, or "all".
    float32_islands: dict[str, Any] = field(default_factory=dict)
    distilled_guidance: float | None = None  # what the conditional branch predicts by itself; see ``guidance``
    int8: dict[str, Any] | None = None  # how it was quantised, see docs/int8.md; None in other precisions
    deep_channels: int | None = None  # of the feature that calls may reuse, see ``deep_cache``; None: they cannot

    @classmethod
    def load(cls, path_or_name: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Read a bundle by folder or by the name of a bundled model.

        Every field and every file's size is always checked; ``verify`` also compares each file's SHA-256.

        Raises:
            BundleError: no bundle there, or it is damaged, altered, or of an unknown schema.
            MachineError: a file cannot be read.
        """
        folder = resolve_bundle(path_or_name)
        remedy = _remedy(folder)
        data = read_manifest(folder / BUNDLE_FILE, remedy)
        for name, record in data["files"].items():
            _check_file(safe_join(folder, name), record, verify, remedy)
        return cls(
            path=folder,
            name=data["name"],
            description=data["description"],
            licence=data["licence"],
            resolution=data["resolution"],
            latent_size=data["latent_size"],
            precision=data["precision"],
            scaling_factor=float(data["scaling_factor"]),
            model=data["model"],
            scheduler=data["scheduler"],
            defaults=data["defaults"],
            source=data["source"],
            gate=data["gate"],
            tools=data["tools"],
            float32_islands=data.get("float32_islands", {}),
            distilled_guidance=data.get("distilled_guidance"),
            int8=data.get("int8"),
            deep_channels=data.get("deep_channels"),
            files=data["files"],
            components=resolved_components(data["resolution"], data.get("deep_channels")),
        )

    @property
    def branches(self) -> int:
        """Rows of the denoiser that a picture takes where it is guided: one where guidance is distilled."""
        return 2 if self.distilled_guidance is None else 1

    def component_path(self, name: str) -> Path:
        """The ONNX file of a component."""
        return self.path / self.components[name].file

    def settings(self, **chosen: Any) -> dict[str, Any]:
        """``chosen`` settings of a run, and the bundle's own steps, guidance, start and strength where they are not."""
        settings = {**{key: self.defaults[key] for key in ("steps", "guidance", "start")}, **chosen}
        if "strength" in self.defaults and settings["start"] == self.defaults["start"]:  # it suits no other start
            settings.setdefault("strength", self.defaults["strength"])
        return settings

    def summary(self) -> dict[str, Any]:
        """Everything a person asks of a bundle, ready for JSON."""
        return {
            "name": self.name,
            "path": str(self.path),
            "description": self.description,
            "licence": self.licence,
            "schema_version": schema_version(self.distilled_guidance, self.deep_channels),
            "precision": self.precision,
            "float32_islands": self.float32_islands,
            "distilled_guidance": self.distilled_guidance,
            "deep_channels": self.deep_channels,
            "int8": self.int8,
            "resolution": self.resolution,
            "latent_size": self.latent_size,
            "scaling_factor": self.scaling_factor,
            "total_bytes": sum(record["bytes"] for record in self.files.values()),
            "defaults": self.defaults,
            "scheduler": self.scheduler,
            "model": self.model,
            "components": {name: component_table(c) for name, c in self.components.items()},
            "gate": self.gate,
            "source": self.source,
            "tools": self.tools,
            "files": self.files,
        }


def resolve_bundle(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a bundle. The string ``tiny`` means the bundled model; for a folder so named: ``./tiny``.

    Raises:
        BundleError: there is no such folder, or it holds no ``bundle.json``.
    """
    bundled = isinstance(name_or_path, str) and name_or_path in BUNDLED
    folder = ASSETS / name_or_path if bundled else Path(name_or_path)
    if os.path.isfile(folder / BUNDLE_FILE):
        return folder
    if bundled:
        raise BundleError(f"the bundled model '{name_or_path}' is missing from {folder}: {_remedy(folder)}")
    if os.path.isfile(folder):
        raise BundleError(f"bundle {folder} is a file: name the folder that holds {BUNDLE_FILE}")
    exists = os.path.isdir(folder)
    what = f"folder {folder} holds no {BUNDLE_FILE}" if exists else f"there is no bundle folder {folder}"
    raise BundleError(
        f"{what}: name the bundled model `tiny`, or make one with "
        f"`moebius-edge export SOURCE --vae DIR --output {folder}`"
    )


def write_bundle(
    folder: str | os.PathLike[str],
    *,
    name: str,
    description: str,
    licence: str,
    model: dict[str, Any],
    resolution: int,
    scaling_factor: float,
    precision: str,
    source: dict[str, Any],
    gate: dict[str, Any],
    tools: dict[str, Any],
    defaults: dict[str, Any],
    float32_islands: dict[str, Any] | None = None,
    distilled_guidance: float | None = None,
    int8: dict[str, Any] | None = None,
    deep_channels: int | None = None,
) -> None:
    """Write ``bundle.json`` for the ONNX files that lie in ``folder``, hashing every file there.

    ``float32_islands`` lists what stayed float32 in a file of lower precision: component, operator type, node names.
    ``distilled_guidance`` is the guidance that the conditional branch predicts by itself; it must be the default too.
    ``int8`` says how an INT8 bundle was quantised; ``deep_channels`` that the denoiser gives a deep feature of so many
    channels, and that ``denoiser_shallow`` is there.
    All values must be plain JSON; a NaN or an infinity is a ``ValueError``, for no gate passes with one.

    Raises:
        BundleError: a component's file is missing, or a value is one that ``Bundle.load`` refuses.
        MachineError: the file cannot be written.
    """
    root = Path(folder)
    content = {
        "schema_version": schema_version(distilled_guidance, deep_channels),
        "name": name,
        "description": description,
        "licence": licence,
        "precision": precision,
        "float32_islands": float32_islands or {},
        **({} if distilled_guidance is None else {"distilled_guidance": distilled_guidance}),
        **({} if deep_channels is None else {"deep_channels": deep_channels}),
        **({} if int8 is None else {"int8": int8}),
        "resolution": resolution,
        "latent_size": resolution // LATENT_DOWNSCALE,
        "scaling_factor": scaling_factor,
        "defaults": defaults,
        "scheduler": SCHEDULER,
        "model": model,
        "components": {n: component_table(c) for n, c in resolved_components(resolution, deep_channels).items()},
        "gate": gate,
        "source": source,
        "tools": tools,
        "files": {
            name: {"sha256": sha256_file(root / name), "bytes": (root / name).stat().st_size}
            for name in _contents(root)
        },
    }
    text = json_text(content, indent=2, ensure_ascii=False)
    with atomic_write(root / BUNDLE_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    Bundle.load(root, verify=False)  # what cannot be loaded must not be handed on


def _contents(root: Path) -> list[str]:
    """Names of the files that belong to a bundle, sorted, with forward slashes; hidden files do not."""
    names = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
    kept = (n for n in names if n.parts[0] != ENGINES_FOLDER and not any(x.startswith(".") for x in n.parts))
    return sorted(n.as_posix() for n in kept if n.as_posix() != BUNDLE_FILE)


def _check_file(path: Path, record: dict[str, Any], verify: bool, remedy: str) -> None:
    if not path.is_file():
        raise BundleError(f"bundle file {path} is missing: {remedy}")
    try:
        size, recorded = path.stat().st_size, record["bytes"]
        if size != recorded:
            raise BundleError(f"bundle file {path} has {size} bytes, {recorded} are recorded: {remedy}")
        if verify and sha256_file(path) != record["sha256"].lower():
            raise BundleError(f"bundle file {path} was altered, it has not the recorded SHA-256: {remedy}")
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}: check it with `ls -l {path}`") from error


def _remedy(folder: Path) -> str:
    if folder.parent == ASSETS:
        return "run `pip install --force-reinstall moebius-edge`"
    return "copy or download the bundle again, or make it again with `moebius-edge export`"
