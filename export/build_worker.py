"""One ONNX file, or ``update``, -> one TensorRT plan, in a process of its own: see ``system.subprocess_job``.

A process a plan gives all memory back, and when it is killed the parent lives to say so.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..progress import Progress
from ..runtimes.flavours import max_opset, version_of
from ..runtimes.onnx_check import check_onnx_file
from ..spec import DENOISER
from ..system.files import atomic_write, sha256_file
from ..system.machine import peak_memory_bytes
from ..system.subprocess_job import Note, serve_job
from .trt_builder import TrtBuilder, describe_network

_NEVER = ("BF16", "INT4", "FP8", "FP4")
# precision of the bundle -> types no tensor may have, and the type the denoiser must have somewhere
TYPES: dict[str, tuple[tuple[str, ...], str]] = {
    "float32": ((*_NEVER, "HALF", "INT8", "UINT8"), "FLOAT"),
    "float16": ((*_NEVER, "INT8", "UINT8"), "HALF"),
    "int8": (_NEVER, "INT8"),
}


def build(request: dict[str, Any], progress: Progress, note: Note) -> dict[str, Any]:
    """Build and write one plan; what ``engine.json`` records of it.

    ``request`` is made by ``engines.build_engines``: component, precision and ONNX file (None for ``update``), the
    names of its quantised operators, the plan to write, and TensorRT's options.

    Raises:
        BundleError: the file cannot be parsed or built, or is not of its precision.
        MachineError: TensorRT is missing, does not know the GPU, or memory or disk ran out.
    """
    started = time.monotonic()
    builder = TrtBuilder(request["flavour"])
    if request["onnx"] is None:
        network = builder.define_update(request["profile"]["sample"][0][-1])
    else:
        check_for_tensorrt(Path(request["onnx"]), builder)
        network = builder.parse(Path(request["onnx"]))
    facts = describe_network(network[1])
    check_types(facts, request["precision"], request["component"])
    check_quantised(facts, request["quantised"], request["component"])
    plan = builder.build(network, request, lambda percent: progress(request["stage"], percent, 100))
    with atomic_write(request["plan"]) as temporary:
        temporary.write_bytes(plan)
    quantised: dict[str, int | None] = {}
    if request["quantised"]:
        count, text = builder.count_in_int8(plan, request["quantised"])
        quantised = {"quantised_products": len(request["quantised"]), "products_in_int8": count}
        if text:
            note(text)
    return {
        "file": Path(request["plan"]).name,
        "sha256": sha256_file(request["plan"]),
        "bytes": Path(request["plan"]).stat().st_size,
        "layers": facts["layers"],
        "tensors": facts["tensors"],
        **quantised,
        "build_seconds": round(time.monotonic() - started, 1),
        "build_peak_memory_bytes": peak_memory_bytes(),
    }


def check_for_tensorrt(onnx: Path, builder: TrtBuilder) -> None:
    """Raise ``BundleError`` for a file that is none of ours, of too new an opset, or that breaks a rule.

    The rules are those of ``trt_rules``, where the onnx package is installed.
    """
    version = version_of(builder.package)
    highest, opset = max_opset(builder.flavour.name, version), check_onnx_file(onnx)
    violations = [f"opset {opset} is newer than {highest}, the highest it parses"] if opset > highest else []
    with suppress(ImportError):
        from onnx import load

        from .trt_rules import problems

        violations += problems(load(os.fspath(onnx), load_external_data=False), builder.flavour.name, version)
    if violations:
        raise BundleError(f"{onnx} is not for {builder.title}: {violations[0]}", "export the bundle again")


def check_types(facts: dict[str, Any], precision: str, component: str) -> None:
    """Raise ``BundleError`` unless the network's tensor types are those of the precision that was asked for."""
    if precision not in TYPES:
        raise BundleError(f"precision {precision!r} is unknown, {', '.join(TYPES)} are not: update moebius-edge")
    forbidden, needed = TYPES[precision]
    if wrong := [t for t in forbidden if t in facts["tensors"]]:
        raise BundleError(f"{component} has {wrong[0]} tensors in a {precision} bundle: export the bundle again")
    if component == DENOISER and needed not in facts["tensors"]:
        raise BundleError(f"{component} has no {needed} tensor in a {precision} bundle: export the bundle again")


def check_quantised(facts: dict[str, Any], names: list[str], component: str) -> None:
    """Raise ``BundleError`` unless the network's quantised operators are the ONNX nodes ``names``."""
    if missing := sorted(set(names) - set(facts["quantised"])):
        raise BundleError(f"{component}: TensorRT does not see {missing[0]} as quantised: export the bundle again")
    if more := sorted(set(facts["quantised"]) - set(names)):
        raise BundleError(f"{component}: {more[0]} is quantised, and bundle.json does not list it: export it again")


def _serve(request: dict[str, Any], progress: Progress, note: Note) -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # TensorRT would not return to Python in time
    return build(request, progress, note)


if __name__ == "__main__":
    sys.exit(serve_job(_serve))
