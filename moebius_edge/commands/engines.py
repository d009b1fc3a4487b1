"""The engine part of ``moebius-edge export``: options in, news out. The work is ``export.engines``'s."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import console

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..export import EngineOptions


class EngineName(str, Enum):
    """``runtimes.engine_files.FLAVOURS``, which is not imported here."""

    tensorrt = "tensorrt"
    rtx = "tensorrt-rtx"


@dataclass(frozen=True)
class EngineJob:
    """Checked options."""

    options: EngineOptions

    def takes(self, source: str) -> bool:
        """Whether SOURCE is a bundle, so that engines are all there is to make."""
        from ..export.engines import is_bundle

        return is_bundle(source)

    def placed(self, source: str, output: Path | None, force: bool) -> Bundle:
        from ..export.engines import copy_bundle_for_engines

        try:
            return copy_bundle_for_engines(source, output, force)
        except KeyboardInterrupt:
            raise console.Interrupted("interrupted, nothing written") from None


def prepare_engines(
    engine: EngineName,
    max_batch: int,
    workspace_mb: int | None,
    opt_level: int | None,
    timing_cache: Path | None,
    compute_capabilities: list[str] | None,
    force: bool,
) -> EngineJob:
    """Check options and machine before anything long is begun; raises as ``find_engine_key`` does."""
    from ..export.engines import EngineOptions, find_engine_key

    options = EngineOptions(
        engine.value,
        max_batch=max_batch,
        workspace_bytes=None if workspace_mb is None else workspace_mb * 1_000_000,
        opt_level=opt_level,
        timing_cache=timing_cache,
        compute_capabilities=tuple(compute_capabilities or ()),
        force=force,
    )
    find_engine_key(options, "float32")
    return EngineJob(options)


def make_engines(bundle: Bundle, job: EngineJob, as_json: bool) -> None:
    """Build, with progress on stderr, and print what was made and how to run it."""
    from ..export import build_engines

    with console.progress() as update:
        try:
            built = build_engines(bundle, job.options, update)
        except KeyboardInterrupt:
            raise console.Interrupted(f"interrupted, no engine written; the bundle is {bundle.path}") from None
    for text in built.notes:
        console.note(text)
    engine, runtime = built.engine, job.options.flavour
    if as_json:
        document: dict[str, Any] = {"output": str(bundle.path), "gate": bundle.gate}
        document |= {"engine": str(engine.path), "built": built.fresh, "notes": list(built.notes)}
        console.print_json({**document, "exit_code": 0})
        return
    total = console.size(sum(record["bytes"] for record in engine.plans.values()))
    if built.fresh:
        print(f"saved {engine.path} ({console.counted(len(engine.plans), 'plan')}, {total})")
        for name, record in engine.plans.items():
            print(f"  {name} {console.size(record['bytes'])}, built in {record['build_seconds']:.1f} s")
    else:
        print(f"nothing to do: {engine.path} is there, built from these files with these options ({total})")
        print("  --force builds it again")
    print(f"next: moebius-edge run IMAGE MASK --bundle {bundle.path} --runtime {runtime}")
