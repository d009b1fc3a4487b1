"""Layer lists as TensorRT 10's inspector writes them, by hand: no engine has been looked at."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from moebius_edge.export.engine_layers import engine_information, products_in_int8


def layer(name: str, metadata: str, *inputs: str, tensor: str = "t") -> dict[str, Any]:
    """One layer at detailed verbosity, as far as it is read."""
    read = [{"Name": tensor, "Location": "Device", "Dimensions": [2, 8, 8], "Format/Datatype": kind} for kind in inputs]
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": read,
        "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear INT8"}],
        "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32",
        "Metadata": metadata,
    }


def listed(*layers: Any) -> str:
    return json.dumps({"Layers": list(layers), "Bindings": ["sample", "noise"]})


HALF, INT8 = "Row major linear FP16 format", "Channel major INT8 format"
LAYERS = listed(
    layer("Reformatting CopyNode for Input Tensor 0", "", HALF),
    layer("conv_in/Conv", "[ONNX Layer: conv_in/Conv]", HALF),
    layer("a/Conv + a/Relu", "[ONNX Layer: a/Conv]\x1e[ONNX Layer: a/Relu]", INT8),
    layer("__myl_Fc_myl0_4", "[ONNX Layer: b/MatMul | b]\x1e[ONNX Layer: c/MatMul]", HALF, "Int8"),
    layer("d/MatMul", "", "Thirty-two wide channel vectorized row major Int8 format"),
    layer("e/MatMul", "[ONNX Layer: e/MatMul]", "Row major linear UINT8 format"),
    layer("f/MatMul", "[ONNX Layer: f/MatMul]", HALF, tensor="f/int8/x"),
)


def test_products_of_layers_with_an_int8_input_are_found() -> None:
    wanted = ["conv_in/Conv", "a/Conv", "b/MatMul", "c/MatMul", "d/MatMul", "e/MatMul", "f/MatMul", "gone"]
    assert products_in_int8(LAYERS, wanted) == ["a/Conv", "b/MatMul", "c/MatMul", "d/MatMul"]


def test_names_are_compared_whole() -> None:
    assert products_in_int8(LAYERS, ["a/Con", "Conv", "a/Conv + a/Relu", "d"]) == []


@pytest.mark.parametrize("text", [listed(), listed("conv_in/Conv", "a/Conv"), "{}", '{"Layers": [{}, "a"]}'])
def test_a_list_without_details_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="the engine's layers have no details"):
        products_in_int8(text, ["a/Conv"])


def test_the_inspector_is_asked_for_json() -> None:
    asked: list[Any] = []

    class Inspector:
        def get_engine_information(self, form: str) -> str:
            asked.append(form)
            return LAYERS

    engine = SimpleNamespace(create_engine_inspector=Inspector)
    plans = {b"plan": engine}
    package = SimpleNamespace(
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=plans.get),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )
    assert engine_information(package, None, b"plan") == LAYERS and asked == ["json"]
    with pytest.raises(ValueError, match="the plan cannot be loaded here"):
        engine_information(package, None, b"another GPU's")
