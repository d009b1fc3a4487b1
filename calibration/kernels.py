"""Which products of an INT8 file ONNX Runtime really computes in integers on this machine's CPU.

It decides while it optimises the graph: pairs whose pattern it does not know stay, and the product between them runs in
float32, slower than without them. So the graph that it optimised is what is looked at.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime

from ..errors import MachineError
from ..system.files import utf8_path
from .quantise import quantised_nodes

INTEGER = ("QLinearConv", "MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "ConvInteger", "QGemm")


def integer_kernels(path: str | os.PathLike[str]) -> dict[str, int]:
    """How many nodes of each kind in ``INTEGER`` ONNX Runtime's CPU makes of the file ``path``.

    Raises:
        MachineError: fewer than the file has quantised products.
    """
    wanted = len(quantised_nodes(onnx.load(os.fspath(path))))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that an optimised file is for this machine alone, as this one is
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        with utf8_path(path) as name:
            onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])
        kinds = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    found = {kind: kinds[kind] for kind in INTEGER if kinds[kind]}
    if sum(found.values()) < wanted:
        raise MachineError(
            f"ONNX Runtime {onnxruntime.__version__} computes {sum(found.values())} of the {wanted} quantised products "
            f"of {path} in integers: update onnxruntime, or export for the target cpu"
        )
    return found
