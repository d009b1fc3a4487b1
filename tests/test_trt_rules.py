"""The rules of TensorRT 10.3, each broken once: the offending node is named. And what is exported keeps them."""

from __future__ import annotations

import re

import onnx
import pytest

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.export.operators import local_function
from moebius_edge.export.trt_rules import OPSET, problems
from moebius_edge.spec import components

CONSTANTS = """float s = {0.5}, float zero_scale = {0}, float infinite = {inf}, float undefined = {nan}, int8 z = {0},
int8 three = {3}, int8[1] w = {1}, int32[1] w32 = {1}, float[1] wf = {1}, float16[1] half = {1}, float[1] b = {1}"""
CALL = "[the_node] y = moebius.Twice(x)"
PAIR = "[the_quantiser] q = QuantizeLinear(x, s, z) [the_dequantiser] d = DequantizeLinear(q, s, z) "
WEIGHT = "dw = DequantizeLinear(w, s) "
CONV = "Conv <kernel_shape = [1, 1]>"
PRODUCT = f"[the_product] y = {CONV}(d, dw)"


def model(nodes: str, function: str = "", opset: int = 20, formals: str = "tw_x", inner_opset: int = 20) -> str:
    """A file of these ``nodes``, with a function ``Twice`` if its body's nodes are given."""
    if function:
        domain = f'<domain: "moebius", opset_import: ["": {inner_opset}]>'
        function = f"{domain} Twice ({formals}) => (tw_y) {{ {function} }}"
    imports = f'"": {opset}, "moebius": 1'
    graph = f"g (float[N, 4] x) => (float[N, 4] y) <{CONSTANTS}> {{ {nodes} }}"
    return f"<ir_version: 10, opset_import: [{imports}]> {graph} {function}"


def dequantised(weight: str = "w", scale: str = "s", zero: str = "") -> str:
    """A convolution with a weight through DequantizeLinear."""
    return model(f"[the_node] dq = DequantizeLinear({weight}, {scale}{zero and f', {zero}'}) y = {CONV}(x, dq)")


def found(text: str) -> list[str]:
    return problems(onnx.parser.parse_model(text))


TWICE = "tw_y = Add(tw_x, tw_x)"
EINSUM = 'Einsum <equation = "ij,ij->ij">'
TAKES_TWO = {"function": TWICE, "formals": "tw_x, tw_b"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (model("y = Relu(x)", opset=21), r"opset 21 is newer than 20"),
        (model(CALL, TWICE, inner_opset=22), r"opset 22 is newer than 20"),
        (model(f"[the_node] y = {EINSUM}(x, x)"), r"node 'the_node' \(Einsum\): .*write it as MatMul"),
        (model("[the_node] y = GroupNormalization(x, s, b)"), r"node 'the_node' \(GroupNormalization\)"),
        (model(f"y = {EINSUM}(x, x)"), r"node 'y' \(Einsum\)"),
        (model("[the_node] y = MatMulInteger(x, x)"), r"node 'the_node' \(MatMulInteger\): quantisation is explicit"),
        (model("[the_node] y = moebius.NoSuch(x)"), r"'the_node' \(NoSuch\): domain 'moebius' has no function"),
        (model(CALL, "tw_y = Add(x, x)", formals="x"), r"function Twice: its tensor 'x' has the name of one in the g"),
        (model(CALL, **TAKES_TWO), r"'the_node' \(Twice\): leaves out inputs of its function, which takes 2"),
        (model('y = moebius.Twice(x, "")', **TAKES_TWO), r"leaves out inputs of its function, which takes 2"),
        (model(CALL, f"[inner] tw_y = {EINSUM}(tw_x, tw_x)"), r"^function Twice, node 'inner' \(Einsum\)"),
        (dequantised(scale="zero_scale"), r"'the_node' \(DequantizeLinear\): its scale 'zero_scale' is not finite and"),
        (dequantised(scale="undefined"), r"its scale 'undefined' is not finite and above 0"),
        (dequantised(scale="infinite"), r"its scale 'infinite' is not finite and above 0"),
        (dequantised(zero="three"), r"its zero point 'three' is not 0"),
        (dequantised("w32"), r"dequantises the INT32 'w32'"),
        (model("y = QuantizeLinear(x, x)"), r"its scale 'x' is not a constant"),
        (model(PAIR + WEIGHT + PRODUCT + "[stray] r = Relu(d)"), r"'the_dequantiser' .* is read by node 'stray'"),
        (model(PAIR + WEIGHT + PRODUCT + "[stray] r = Transpose(q)"), r"'the_quantiser' .* is read by node 'stray'"),
        (model(PAIR + "[the_product] y = Conv(d, wf)"), r"'the_product' \(Conv\): .*'d' is quantised and 'wf' is"),
        (model(PAIR + "[the_product] y = MatMul(x, d)"), r"'the_product' \(MatMul\): .*'d' is quantised and 'x' is"),
        (
            model(PAIR + "dw = DequantizeLinear(w, half) " + PRODUCT),
            r"'the_product' \(Conv\): the scales of its inputs differ in type",
        ),
        (
            model("k = Reshape(w, x) [the_node] y = Conv(x, k)"),
            r"'the_node' \(Conv\): its kernel 'k' is computed: give the attribute kernel_shape",
        ),
        (
            model(CALL, "tw_k = Reshape(tw_x, tw_x) [inner] tw_y = Conv(tw_x, tw_k)"),
            r"function Twice, node 'inner' \(Conv\): its kernel 'tw_k' is computed",
        ),
        (
            model(CALL, "[inner] tw_y = DequantizeLinear(tw_x, tw_x)"),
            r"function Twice, node 'inner' \(DequantizeLinear\): .*inline the function",
        ),
    ],
)
def test_a_broken_rule_names_the_node(broken: str, message: str) -> None:
    (problem,) = found(broken)
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    "right",
    [
        model(CALL, TWICE),
        dequantised(),
        dequantised(zero="z"),
        *[model(PAIR + WEIGHT + PRODUCT.replace(CONV, kind)) for kind in (CONV, "MatMul", "Gemm")],
        model(
            PAIR + WEIGHT + "p = MatMul(d, dw) " + f"y = {CONV}(x, dw)"
        ),  # weights alone in INT8 are a mode of its own
        model("y = Conv(x, wf)"),
        model("y = ConvTranspose(x, x)"),  # whose kernel's size is read from the tensor
        model(CALL, "tw_y = Conv(tw_x, tw_x)"),  # what the call passes
        model(CALL, "tw_k = Reshape(tw_x, tw_x) tw_y = Conv <kernel_shape = [1, 1]>(tw_x, tw_k)"),
    ],
)
def test_what_is_right_passes(right: str) -> None:
    assert found(right) == []


@pytest.mark.parametrize("file", [f"{name}.onnx" for name in components(deep_channels=1)])
def test_the_bundled_model_keeps_them(file: str) -> None:
    assert problems(onnx.load(ASSETS / "tiny" / file)) == []


def test_what_is_exported_keeps_them() -> None:
    """Both bodies of LocalLambda, as a file that calls neither."""
    for tile in (0, 4):
        body = local_function(OPSET, 5, tile, 2)
        model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]> g (float[1] x) => (float[1] y)
            { y = Relu(x) }""")
        model.functions.append(body)
        assert problems(model) == []
