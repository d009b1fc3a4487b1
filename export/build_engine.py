"""One ONNX file, or ``update`` -> one TensorRT plan, in a process: ``python -m moebius_edge.export.build_engine``.

Request: a JSON object on stdin (``REQUEST``). Replies: JSON lines on stdout, each with an ``event``: ``progress``,
``note``, and at the end ``done`` or ``failed``. A process a plan gives all memory back, and when it is killed the
parent (``engine_process``) lives to say so. What TensorRT is told stands in ``trt_builder``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import BundleError, MoebiusError
from ..system.files import atomic_write, sha256_file
from ..system.machine import peak_memory_bytes
from .trt_builder import Tell, TrtBuilder, check_products, check_types

# component, precision and the ONNX file (None for ``update``, which has none); the names of its quantised products;
# the plan to write; what TensorRT is told. All of them are given.
REQUEST = {
    *("component", "precision", "onnx", "quantised", "plan", "flavour", "gpu", "compute_capabilities", "profile"),
    *("workspace_bytes", "opt_level", "timing_cache"),
}


def build(request: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Build and write one plan; what ``engine.json`` records of it.

    Raises:
        BundleError: the file cannot be parsed or built, or is not of its precision.
        MachineError: TensorRT is missing, does not know the GPU, or memory or disk ran out.
    """
    if set(request) != REQUEST:
        raise AssertionError(f"request has {sorted(request)}, not {sorted(REQUEST)}")
    started = time.monotonic()
    component = request["component"]
    builder = TrtBuilder(request["flavour"])
    if request["onnx"] is None:
        network = builder.update(request["profile"]["sample"][0][-1])
    else:
        builder.check(Path(request["onnx"]))
        network = builder.parse(Path(request["onnx"]))
    facts = builder.facts(network)
    check_types(facts, request["precision"], component)
    check_products(facts, request["quantised"], component)
    plan = builder.build(network, request, tell)
    with atomic_write(request["plan"]) as temporary:
        temporary.write_bytes(plan)
    size = Path(request["plan"]).stat().st_size
    quantised: dict[str, int | None] = {}
    if request["quantised"]:
        in_int8 = builder.products_in_int8(plan, request["quantised"], tell)
        quantised = {"quantised_products": len(request["quantised"]), "products_in_int8": in_int8}
    return {
        "file": Path(request["plan"]).name,
        "sha256": sha256_file(request["plan"]),
        "bytes": size,
        "layers": facts["layers"],
        "tensors": facts["tensors"],
        **quantised,
        "build_seconds": round(time.monotonic() - started, 1),
        "build_peak_memory_bytes": peak_memory_bytes(),
    }


def main() -> int:
    """Answer one request; the exit code is 0 whenever the last line says how it ended."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not end up among the replies

    def tell(event: str, **values: Any) -> None:
        replies.write(json.dumps({"event": event, **values}) + "\n")
        replies.flush()

    _end_with_parent()
    try:
        tell("done", result=build(json.load(sys.stdin), tell))
    except BundleError as error:
        tell("failed", kind="bundle", message=str(error))
    except MoebiusError as error:
        tell("failed", kind="machine", message=str(error))
    except MemoryError:
        tell("failed", kind="machine", message="memory ran out during the build: close other programs")
    return 0


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent is killed, which cannot end it any more."""
    if sys.platform == "linux":
        kill_on_parent_death = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(kill_on_parent_death, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
