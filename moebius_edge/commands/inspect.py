"""``moebius-edge inspect``: what a bundle is, from ``bundle.json``, and its engines, from their ``engine.json``.

No graph is opened and no runtime needed, so it is not known here whether an engine suits this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BundleError
from . import console

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..bundle.manifest import Block, Int8


def inspect(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or the name 'tiny'.")],
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare every file's SHA-256.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show a bundle: model, gate, files, tensors and engines."""
    from ..bundle.bundle import Bundle

    loaded = Bundle.load(bundle, verify=verify)
    engines = _engines(loaded, verify)
    if as_json:
        console.print_json({**loaded.summary(), "engines": engines, "verified": verify, "exit_code": 0})
        return
    _print_facts(loaded)
    _print_files(loaded, verify)
    _print_tensors(loaded)
    _print_engines(engines)
    if loaded.int8 is not None:
        _print_blocks(loaded.int8.get("blocks", []))


def _engines(bundle: Bundle, verify: bool) -> list[dict[str, Any]]:
    """Every engine as JSON, with its ``state``: verified, size only, stale, or what is wrong with it."""
    from ..runtimes.engine_files import engine_document, engine_folders, read_engine, staleness

    found = []
    for folder in engine_folders(bundle.path):
        row: dict[str, Any] = {"path": str(folder)}
        try:
            engine = read_engine(folder)
            row |= engine_document(engine)
            if stale := staleness(engine, bundle):
                row["state"] = f"stale: {stale}"
            else:
                if verify:
                    engine.verify("build it again")
                row["state"] = "verified" if verify else "not verified"
        except BundleError as error:  # of the bundle's good parts it takes nothing away
            row["state"] = f"damaged: {error}"
        found.append(row)
    return found


def _print_facts(bundle: Bundle) -> None:
    pixels, positions = (f"{n}x{n}" for n in (bundle.resolution, bundle.latent_size))
    total, files = console.size(bundle.summary()["total_bytes"]), console.counted(len(bundle.files), "file")
    facts: dict[str, Any] = {
        "path": bundle.path,
        "licence": bundle.licence,
        "images": f"{pixels} pixels, latent {positions}",
        "precision": f"{bundle.precision}, {total} in {files}",
        "in float32": _islands(bundle.float32_islands),
        "int8": "" if bundle.int8 is None else describe_int8(bundle.int8),
        "guidance": _guidance(bundle.distilled_guidance),
        "reuse": _reuse(bundle.deep_channels),
        "defaults": _pairs({**bundle.defaults}),
        "model": _pairs(bundle.model),
        "gate": _pairs(bundle.gate),
        "made with": _pairs(bundle.tools),
    }
    print(f"{bundle.name}: {bundle.description}\n")
    width = max(map(len, facts))
    for name, value in facts.items():
        if str(value):
            print(f"{name:<{width}}  {value}")
    for name, value in _flat({**bundle.source}):
        print(f"{'source':<{width}}  {name} {value}")


def _print_files(bundle: Bundle, verified: bool) -> None:
    table = console.table("file", "size", "SHA-256", "state", right=("size",))
    for name, record in bundle.files.items():
        table.add_row(
            name,
            console.size(record["bytes"]),
            record["sha256"][:16],
            "verified" if verified else "size only",
        )
    print()
    console.print_table(table)
    print()


def _print_tensors(bundle: Bundle) -> None:
    table = console.table("graph", "", "tensor", "type", "shape")
    for component in bundle.components.values():
        name = component.name
        for direction, tensors in (("in", component.inputs), ("out", component.outputs)):
            for tensor in tensors:
                table.add_row(name, direction, tensor.name, tensor.dtype, " x ".join(map(str, tensor.shape)))
                name = ""
    console.print_table(table)


def _print_engines(engines: list[dict[str, Any]]) -> None:
    if not engines:
        return
    table = console.table("engine", "GPU", "pictures", "size", "state", right=("pictures", "size"))
    for row in engines:
        key = row.get("key")
        facts = ["", "", ""]
        if key is not None:
            capabilities = ", ".join(key["compute_capabilities"])
            total = sum(plan["bytes"] for plan in row["plans"].values())
            facts = [f"{key['gpu']} ({capabilities})", f"{row['settings']['max_batch']}", console.size(total)]
        table.add_row(Path(row["path"]).name, *facts, row["state"].partition(":")[0])
    print()
    console.print_table(table)
    for row in engines:
        if ": " in row["state"]:
            print(f"{Path(row['path']).name} is {row['state']}")


def describe_int8(int8: Int8) -> str:
    """What was quantised, and for what."""
    return (
        f"for {int8['target']}, {int8['quantised_products']} of {int8['products']} products, "
        f"{int8['share_of_multiplications']:.1%} of the multiplications, "
        f"the rest {int8['rest']}, ranges {int8['ranges']}"
    )


def _print_blocks(blocks: list[Block]) -> None:
    """The quantised denoiser block by block: what it costs alone, and what it brings."""
    right = ("alone, dB", "smoothed, dB", "multiplications")
    table = console.table("block", *right, "quantised", right=right)
    for row in blocks:
        alone, smoothed = row.get("psnr_db"), row.get("smoothed_psnr_db")
        state = "no" if not row["quantised"] else "smoothed" if row.get("smoothed") else "yes"
        table.add_row(row["name"], *("" if v is None else f"{v:.1f}" for v in (alone, smoothed)),
                      f"{row['share']:.2%}", state)  # fmt: skip
    print()
    console.print_table(table)


def _islands(islands: dict[str, Any]) -> str:
    """What stayed float32, each component's nodes counted by type; --json has their names."""
    parts = []
    for component, kinds in islands.items():
        counts = "all" if isinstance(kinds, str) else ", ".join(f"{len(v)} {k}" for k, v in kinds.items())
        parts.append(f"{component}: {counts}")
    return "; ".join(parts)


def _reuse(channels: int | None) -> str:
    return "" if channels is None else f"deep features of {channels} channels, with run --cache-interval N"


def _guidance(distilled: float | None) -> str:
    return "" if distilled is None else f"{distilled:g}, distilled into the network: one call a step"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in _flat(values))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as dotted names; floats to four digits, which is what a person compares."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and len(value) > 8:  # a figure a step; --json has them all
            rows.append((prefix + name, f"({value[0]} .. {value[-1]}, {len(value)} values)"))
        elif isinstance(value, list):
            rows.append((prefix + name, "(" + ", ".join(map(str, value)) + ")"))
        else:
            rows.append((prefix + name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows
