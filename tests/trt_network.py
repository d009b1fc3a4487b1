"""What TensorRT makes of an ONNX file, as the tests look at it. Not a test."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from moebius_edge.export.trt_builder import TrtBuilder


def network_facts(onnx: Path) -> dict[str, Any]:
    """``describe_network`` of an ONNX file, by TensorRT for RTX, which builds nothing and needs no GPU."""
    return describe_network(TrtBuilder("tensorrt-rtx").parse(onnx)[1])


def describe_network(network: Any) -> dict[str, Any]:
    """What TensorRT made of a file: ``layers`` and ``tensors`` count layer and tensor types by name, ``inputs`` and
    ``outputs`` map names to types, ``quantised`` lists the ONNX convolutions and matrix products of two dequantised
    inputs."""
    layers: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    dequantised: set[str] = set()  # tensors; layers come in an order in which each one's inputs are known
    quantised: list[str] = []
    for layer in map(network.get_layer, range(network.num_layers)):
        kind = _name(layer.type)
        layers[kind] += 1
        inputs = [t.name for t in map(layer.get_input, range(layer.num_inputs)) if t is not None]
        outputs = [t for t in map(layer.get_output, range(layer.num_outputs)) if t is not None]
        tensors.update(_name(t.dtype) for t in outputs)
        # Weights of a matrix product get a dimension or lose one on their way.
        if kind == "DEQUANTIZE" or (kind in ("SHUFFLE", "UNSQUEEZE") and inputs[0] in dequantised):
            dequantised.update(t.name for t in outputs)
        multiplies = kind in ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY") and len(inputs) > 1
        if multiplies and dequantised.issuperset(inputs[:2]):
            # The layer's own name may have got a number.
            onnx_name = re.match(r"\[ONNX Layer: ([^\]|]+?)\s*[\]|]", layer.metadata or "")
            quantised.append(onnx_name[1] if onnx_name else layer.name)
    return {
        "layers": dict(sorted(layers.items())),
        "tensors": dict(sorted(tensors.items())),
        "quantised": quantised,
        "inputs": {t.name: _name(t.dtype) for t in map(network.get_input, range(network.num_inputs))},
        "outputs": {t.name: _name(t.dtype) for t in map(network.get_output, range(network.num_outputs))},
    }


def _name(member: Any) -> str:
    return str(member).rpartition(".")[2]
