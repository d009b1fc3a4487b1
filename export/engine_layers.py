"""What TensorRT made of the quantised products: read from a built engine's own layer information.

A network says where INT8 is allowed to be; which kernels the builder then chose only the engine knows. TensorRT lists
its layers as JSON (``IEngineInspector``, detailed verbosity): each with the ONNX nodes it came from in its name or
metadata, and the format of each input in words. The words differ between versions, so INT8 is looked for in any of
them. Needs the GPU that the engine is for; never run on one yet, tested on written samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

_INT8 = re.compile(r"\bint8\b", re.IGNORECASE)


def products_in_int8(information: str, products: Iterable[str]) -> list[str]:
    """Those of the ONNX nodes ``products`` that a layer with an INT8 input computes.

    ``information`` is the inspector's JSON.

    Raises:
        ValueError: it is not, or was built without details.
    """
    layers = json.loads(information).get("Layers", [])
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError("the engine's layers have no details")
    integer = [_sources(layer) for layer in layers if _reads_int8(layer)]
    return [name for name in products if any(name in sources for sources in integer)]


def engine_information(package: Any, logger: Any, plan: Any) -> str:
    """The inspector's JSON for a plan, a buffer, of this GPU. Raises ``ValueError`` where the plan cannot be loaded."""
    runtime = package.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ValueError("the plan cannot be loaded here")
    text: str = engine.create_engine_inspector().get_engine_information(package.LayerInformationFormat.JSON)
    return text


def _reads_int8(layer: dict[str, Any]) -> bool:
    """Whether an input is INT8 by its format or type; its name is a name and says nothing."""
    inputs = [i for i in layer.get("Inputs", []) if isinstance(i, dict)]
    return any(_INT8.search(json.dumps([v for k, v in i.items() if k != "Name"])) for i in inputs)


def _sources(layer: dict[str, Any]) -> set[str]:
    """The ONNX nodes that a layer was fused from."""
    noted = re.findall(r"\[ONNX Layer: ([^\]|]+?)\s*[\]|]", str(layer.get("Metadata", "")))
    return {*noted, *(part.strip() for part in str(layer.get("Name", "")).split(" + "))}
