"""A toy bundle with something to calibrate: its denoiser's result goes through products that change nothing.

``exact`` -> a local function of two matrix products with the identity -> ``passed`` -> a 1x1 convolution with the
identity -> ``noise``. So every recorded tensor but those of the function's inside is the noise itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from toy import make_toy_bundle

from moebius_edge.system.files import sha256_file

DOMAIN = "moebius"


def make_calibration_bundle(
    folder: Path, resolution: int = 64, scale: float = 1.0, distilled_guidance: float | None = None
) -> Path:
    """``scale`` is that of the products' weights: NaN or infinity for damaged ones."""
    make_toy_bundle(folder, resolution, distilled_guidance=distilled_guidance)
    path = folder / "denoiser.onnx"
    model = onnx.load(str(path))
    graph = model.graph
    del graph.node[-1]  # exact -> noise
    nodes = [
        helper.make_node("Pass", ["exact", "eye"], ["passed"], domain=DOMAIN),
        helper.make_node("Conv", ["passed", "kernel"], ["noise"]),
    ]
    graph.node.extend(nodes)
    eye, kernel = np.diag(np.full(resolution // 8, scale)), np.eye(4)[..., None, None]
    weights = {"eye": eye, "kernel": kernel}
    graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items())
    body = [
        helper.make_node("MatMul", ["p_x", "p_w"], ["p_y"]),
        helper.make_node("Mul", ["p_w", "p_w"], ["p_constant"]),  # of a weight alone: a weight too
        helper.make_node("MatMul", ["p_y", "p_constant"], ["p_z"]),
    ]
    opset = next(entry for entry in model.opset_import if not entry.domain)
    model.functions.append(helper.make_function(DOMAIN, "Pass", ["p_x", "p_w"], ["p_z"], body, [opset]))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.save(model, str(path))
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"][path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder
