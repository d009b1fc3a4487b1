"""``moebius-edge inspect``: what a bundle is, from ``bundle.json``, and its engines, from their ``engine.json``.

No graph is opened and no runtime needed, so it is not known here whether an engine suits this machine. ``--memory``
asks the driver for the GPU's memory, if there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import BundleError
from . import console
from .shared import AsJson

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle


def inspect(
    bundle: Annotated[str, Argument(metavar="BUNDLE", help="A bundle's folder, or the name 'tiny'.")],
    verify: Annotated[bool, Option("--verify/--no-verify", help="Compare every file's SHA-256.")] = True,
    memory: Annotated[bool, Option("--memory", help="Show what each engine takes on the GPU.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a bundle: model, gate, files, tensors and engines."""
    from ..bundle.bundle import Bundle

    loaded = Bundle.load(bundle, verify=verify)
    summary, engines = loaded.summary(), list(_engines(loaded, verify, memory))
    if as_json:
        console.print_json({**summary, "engines": engines, "verified": verify})
        return
    int8: dict[str, Any] = summary.pop("int8") or {}
    blocks = int8.get("blocks", [])
    print(f"{summary.pop('name')}: {summary.pop('description')}\n")
    facts = {name: value for name, value in summary.items() if name not in ("files", "components", "schema_version")}
    console.print_facts({**facts, "int8": {name: value for name, value in int8.items() if not isinstance(value, list)}})
    for rows in (list(_files(loaded, verify)), list(_tensors(loaded)), [_engine(row) for row in engines], blocks):
        if rows:
            print()
            console.print_table(rows)
    for row in engines:
        if ": " in row["state"]:
            print(f"{Path(row['path']).name} is {row['state']}")
    for row in engines:
        if needed := row.get("memory"):
            print()
            console.print_table(needed.pop("graphs"))
            console.print_facts({"engine": Path(row["path"]).name, **needed})
    if memory and not engines:
        console.note("the bundle has no engines: `moebius-edge export BUNDLE --engine tensorrt` builds them")


def _engines(bundle: Bundle, verify: bool, memory: bool) -> Iterator[dict[str, Any]]:
    """Every engine as JSON, with its ``state``: verified, not verified, stale, or what is wrong with it."""
    from ..runtimes.cuda import find_gpu
    from ..runtimes.engine_files import engine_document, engine_folders, read_engine, staleness
    from ..runtimes.engine_memory import plan_memory

    gpu = find_gpu() if memory else None
    for folder in engine_folders(bundle.path):
        row: dict[str, Any] = {"path": str(folder), "state": "verified" if verify else "not verified"}
        try:
            engine = read_engine(folder)
            row |= engine_document(engine)
            if stale := staleness(engine, bundle):
                row["state"] = f"stale: {stale}"
                yield row
                continue
            if memory:
                row["memory"] = plan_memory(bundle, engine, gpu).to_dict()
                row["memory"]["gpu_memory_bytes"] = None if gpu is None else gpu.memory_bytes
            if verify:
                engine.verify("build it again")
        except BundleError as error:  # of the bundle's good parts it takes nothing away
            row["state"] = f"damaged: {error}"
        yield row


def _files(bundle: Bundle, verified: bool) -> Iterator[dict[str, Any]]:
    for name, record in bundle.files.items():
        state = "verified" if verified else "size only"
        yield {"file": name, "bytes": record["bytes"], "SHA-256": record["sha256"][:16], "state": state}


def _tensors(bundle: Bundle) -> Iterator[dict[str, Any]]:
    for component in bundle.components.values():
        for direction, tensors in (("in", component.inputs), ("out", component.outputs)):
            for tensor in tensors:
                facts = {"tensor": tensor.name, "type": tensor.dtype, "shape": tensor.shape}
                yield {"graph": component.name, "direction": direction, **facts}


def _engine(row: dict[str, Any]) -> dict[str, Any]:
    key, plans = row.get("key", {}), row.get("plans", {})
    return {
        "engine": Path(row["path"]).name,
        "GPU": key.get("gpu"),
        "compute capability": key.get("compute_capabilities"),
        "pictures": row.get("settings", {}).get("max_batch"),
        "bytes": sum(plan["bytes"] for plan in plans.values()) or None,
        "state": row["state"].partition(":")[0],
    }
