"""The bundle: one folder that holds everything a device needs to run a model, and says what it is.

``bundle.json`` (see ``manifest``) describes the ONNX graphs beside it and records their hashes. What
``Bundle.load`` returns can be trusted. This module opens no ONNX file and imports no runtime.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..documents import read_document
from ..errors import BundleError, MachineError
from ..spec import LATENT_CHANNELS, LATENT_DOWNSCALE, Component
from ..system.files import atomic_write, safe_join, sha256_file
from ..text import json_text
from .manifest import (
    SCHEDULER,
    SCHEMA_VERSION,
    BundleDocument,
    FileRecord,
    Manifest,
    component_tables,
    resolved_components,
)

BUNDLE_FILE = "bundle.json"
ENGINES_FOLDER = "engines"  # built later, for one machine each, so the hashes do not cover it
ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("tiny",)


@dataclass(frozen=True, kw_only=True)
class Bundle(Manifest):
    """A checked ``bundle.json`` and where it lies. ``components`` have all sizes but the batch filled in."""

    path: Path
    components: dict[str, Component]

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
        safe_join(folder, BUNDLE_FILE)  # a link to elsewhere is refused, as it is for the other files
        document = read_document(folder / BUNDLE_FILE, BundleDocument, BundleError, remedy)
        for name, record in document.files.items():
            check_file(safe_join(folder, name), record, False, remedy)
        content = {field.name: getattr(document, field.name) for field in fields(Manifest)}
        sizes = document.resolution, document.deep_channels, document.latent_channels
        bundle = cls(path=folder, components=resolved_components(*sizes), **content)
        if verify:
            bundle.verify()
        return bundle

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the recorded one. Raises as ``load``."""
        for name, record in self.files.items():
            check_file(safe_join(self.path, name), record, True, _remedy(self.path))

    @property
    def branches(self) -> int:
        """Rows of the denoiser that a picture takes where it is guided: one where guidance is distilled."""
        return 2 if self.distilled_guidance is None else 1

    @property
    def paths(self) -> dict[str, Path]:
        """The ONNX file of each component."""
        return {name: self.component_path(name) for name in self.components}

    def component_path(self, name: str) -> Path:
        """The ONNX file of a component."""
        return self.path / self.components[name].file

    def settings(self, **chosen: Any) -> dict[str, Any]:
        """``chosen`` settings of a run, and the bundle's own defaults for those that are not chosen."""
        own: dict[str, Any] = {**self.defaults}
        if chosen.get("start", own["start"]) != own["start"]:  # its strength suits no other start
            own.pop("strength", None)
        return {**own, **chosen}

    def summary(self) -> dict[str, Any]:
        """Everything a person asks of a bundle, ready for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "path": str(self.path),
            "components": component_tables(self.components),
            "total_bytes": sum(record["bytes"] for record in self.files.values()),
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
        raise BundleError(f"the bundled model '{name_or_path}' is missing from {folder}", _remedy(folder))
    if os.path.isfile(folder):
        raise BundleError(f"bundle {folder} is a file", f"name the folder that holds {BUNDLE_FILE}")
    exists = os.path.isdir(folder)
    raise BundleError(
        f"folder {folder} holds no {BUNDLE_FILE}" if exists else f"there is no bundle folder {folder}",
        f"name the bundled model `tiny`, or make one with `moebius-edge export SOURCE --vae DIR --output {folder}`",
    )


def write_bundle(
    folder: str | os.PathLike[str],
    *,
    resolution: int,
    deep_channels: int | None = None,
    latent_channels: int = LATENT_CHANNELS,
    **others: Any,
) -> None:
    """Write ``bundle.json`` for the ONNX files that are in ``folder``, hashing every file there.

    ``others`` are the fields of ``Manifest``, but for those that follow from the rest: ``latent_size``, ``scheduler``
    and ``files``. All values must be plain JSON; a NaN or an infinity is a ``ValueError``, for no gate passes with one.

    Raises:
        BundleError: a component's file is missing, or a value is one that ``Bundle.load`` refuses.
        MachineError: the file cannot be written.
    """
    root = Path(folder)
    content = {
        **others,
        "resolution": resolution,
        "latent_size": resolution // LATENT_DOWNSCALE,
        "deep_channels": deep_channels,
        "latent_channels": latent_channels,
        "scheduler": SCHEDULER,
        "files": _file_records(root),
    }
    document = {
        "schema_version": SCHEMA_VERSION,
        **{f.name: content[f.name] for f in fields(Manifest) if content.get(f.name) is not None},
        "components": component_tables(resolved_components(resolution, deep_channels, latent_channels)),
    }
    text = json_text(document, indent=2, ensure_ascii=False)
    with atomic_write(root / BUNDLE_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    Bundle.load(root, verify=False)  # what cannot be loaded must not be handed on


def _file_records(root: Path) -> dict[str, FileRecord]:
    """The files that belong to a bundle, sorted, named with forward slashes; hidden files do not."""
    names = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    visible = [n for n in names if n.parts[0] != ENGINES_FOLDER and not any(part.startswith(".") for part in n.parts)]
    paths = {name.as_posix(): root / name for name in sorted(visible, key=Path.as_posix)}
    return {n: {"sha256": sha256_file(p), "bytes": p.stat().st_size} for n, p in paths.items() if n != BUNDLE_FILE}


def check_file(path: Path, record: FileRecord, verify: bool, remedy: str) -> None:
    """Check that a file has the recorded size and, to ``verify`` it, the recorded SHA-256.

    Raises:
        BundleError: it has not, is missing, or is no regular file.
        MachineError: it cannot be read.
    """
    try:
        status, recorded = path.stat(), record["bytes"]
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path} is not a regular file", remedy)
        if status.st_size != recorded:
            raise BundleError(f"{path} has {status.st_size} bytes, {recorded} are recorded", remedy)
        if verify and sha256_file(path) != record["sha256"].lower():
            raise BundleError(f"{path} was altered, its SHA-256 is not the recorded one", remedy)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path} is missing", remedy) from None
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}", f"check it with `ls -l {path}`") from error


def _remedy(folder: Path) -> str:
    if folder.parent == ASSETS:
        return "run `pip install --force-reinstall --no-deps moebius-edge`"
    return "copy or download the bundle again, or make it again with `moebius-edge export`"
