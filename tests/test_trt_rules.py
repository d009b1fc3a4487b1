"""The rules of TensorRT 10.3, each broken once: the offending node is named. And what is exported keeps them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.export.trt_rules import problems
from moebius_edge.spec import COMPONENTS


def model(
    *nodes: onnx.NodeProto,
    opset: int = 20,
    functions: tuple[onnx.FunctionProto, ...] = (),
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in ("x", "y")]
    tensors = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("moebius", 1), helper.make_opsetid("other", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def node(
    kind: str, inputs: list[str], name: str = "the_node", domain: str = "", **attributes: object
) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, ["y"], name=name, domain=domain, **attributes)


def function(
    name: str = "Twice", domain: str = "moebius", formals: tuple[str, ...] = ("tw_x",), opset: int = 20
) -> onnx.FunctionProto:
    body = [helper.make_node("Add", [formals[0], formals[0]], ["tw_y"])]
    return helper.make_function(domain, name, list(formals), ["tw_y"], body, [helper.make_opsetid("", opset)])


CALL = node("Twice", ["x"], domain="moebius")


def quantised(scale: object = 0.5, zero: object = None, weight: str = "int8") -> onnx.ModelProto:
    """A convolution with a weight through DequantizeLinear."""
    weights = np.ones((4, 4, 1, 1), weight)
    constants = {"w": weights, "s": np.asarray(scale, np.float32)}
    inputs = ["w", "s"]
    if zero is not None:
        constants["z"] = np.asarray(zero, weight)
        inputs.append("z")
    return model(
        helper.make_node("DequantizeLinear", inputs, ["dq"], name="the_node", axis=0),
        helper.make_node("Conv", ["x", "dq"], ["y"]),
        constants=constants,
    )


def pair(
    user: str = "Conv", weight: bool = True, beside: tuple[str, ...] = (), half: bool = False, data: bool = True
) -> onnx.ModelProto:
    """A product with a pair on its data and a dequantised weight; ``beside`` reads the same pair."""
    linear = user in ("MatMul", "Gemm")
    shape, axis = ((4, 4), 1) if linear else ((4, 4, 1, 1), 0)
    constants = {"s": np.float32(0.5), "w": np.ones(shape, "int8"), "ws": np.ones(4, "float16" if half else "float32")}
    constants |= {"z": np.zeros((), "int8"), "wf": np.ones(shape, np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "the_quantiser"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "the_dequantiser"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["dw"], "of_the_weight", axis=axis),
        helper.make_node(user, ["d" if data else "x", "dw" if weight else "wf"], ["y"], "the_product"),
    ]
    nodes += [helper.make_node(kind, ["d"], [f"d_{kind}"], "stray") for kind in beside]
    return model(*nodes, constants=constants)


def in_function() -> onnx.ModelProto:
    body = [helper.make_node("DequantizeLinear", ["tw_x", "tw_x"], ["tw_y"], "inner")]
    twice = helper.make_function("moebius", "Twice", ["tw_x"], ["tw_y"], body, [helper.make_opsetid("", 20)])
    return model(CALL, functions=(twice,))


def two_matrices() -> onnx.ModelProto:
    """A product of two tensors, the second alone quantised."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"], "the_product"),
    ]
    return model(*nodes, constants={"s": np.float32(0.5), "z": np.zeros((), "int8")})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (model(node("Relu", ["x"]), opset=21), r"opset 21 is newer than 20"),
        (model(CALL, functions=(function(opset=22),)), r"opset 22 is newer than 20"),
        (model(node("Einsum", ["x", "x"], equation="ij,ij->ij")), r"node 'the_node' \(Einsum\): .*write it as MatMul"),
        (model(node("GroupNormalization", ["x", "s", "b"])), r"node 'the_node' \(GroupNormalization\)"),
        (model(node("Einsum", ["x", "x"], name="")), r"node 'y' \(Einsum\)"),
        (model(node("MatMulInteger", ["x", "x"])), r"node 'the_node' \(MatMulInteger\): quantisation is explicit"),
        (model(node("NoSuch", ["x"], domain="moebius")), r"'the_node' \(NoSuch\): domain 'moebius' has no function"),
        (
            model(CALL, functions=(function(formals=("x",)),)),
            r"function Twice: its tensor 'x' has the name of one in the graph",
        ),
        (
            model(CALL, functions=(function(formals=("tw_x", "tw_b")),)),
            r"'the_node' \(Twice\): leaves out inputs of its function, which takes 2",
        ),
        (
            model(
                node("Twice", ["x", ""], domain="moebius"), functions=(function(formals=("tw_x", "tw_b")),)
            ),
            r"leaves out inputs of its function, which takes 2",
        ),
        (quantised(scale=0.0), r"'the_node' \(DequantizeLinear\): its scale 's' is not finite and above 0"),
        (quantised(scale=np.nan), r"its scale 's' is not finite and above 0"),
        (quantised(zero=3), r"its zero point 'z' is not 0"),
        (quantised(weight="int32"), r"dequantises the INT32 'w'"),
        (model(node("QuantizeLinear", ["x", "x"])), r"its scale 'x' is not a constant"),
        (quantised(scale=np.inf), r"its scale 's' is not finite and above 0"),
        (pair(beside=("Relu",)), r"'the_dequantiser' \(DequantizeLinear\): is read by node 'stray' \(Relu\)"),
        (pair(weight=False), r"'the_product' \(Conv\): its input 'd' is quantised and 'wf' is not"),
        (pair(half=True), r"'the_product' \(Conv\): the scales of its inputs differ in type"),
        (two_matrices(), r"'the_product' \(MatMul\): its input 'd' is quantised and 'x' is not"),
        (in_function(), r"function Twice, node 'inner' \(DequantizeLinear\): .*inline the function"),
    ],
)
def test_a_broken_rule_names_the_node(broken: onnx.ModelProto, message: str) -> None:
    import re

    found = problems(broken)
    assert len(found) == 1 and re.search(message, found[0]), found


def test_rules_inside_functions_are_seen() -> None:
    body = [helper.make_node("Einsum", ["tw_x", "tw_x"], ["tw_y"], name="inner", equation="ij,ij->ij")]
    twice = helper.make_function("moebius", "Twice", ["tw_x"], ["tw_y"], body, [helper.make_opsetid("", 20)])
    assert problems(model(CALL, functions=(twice,)))[0].startswith("function Twice, node 'inner' (Einsum)")


def test_what_is_right_passes() -> None:
    assert problems(model(CALL, functions=(function(),))) == []
    assert problems(quantised(scale=np.ones(4), zero=np.zeros(4))) == []
    assert problems(quantised()) == []
    for user in ("Conv", "MatMul", "Gemm"):
        assert problems(pair(user)) == []
    assert problems(pair(data=False)) == []  # weights alone in INT8 are a mode of its own


def test_quantised_values_are_read_by_their_dequantiser_alone() -> None:
    stray = pair()
    stray.graph.node.append(helper.make_node("Transpose", ["q"], ["t"], "stray"))
    assert problems(stray)[0].startswith("node 'the_quantiser' (QuantizeLinear): is read by node 'stray' (Transpose)")


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_bundled_model_keeps_them(component: str) -> None:
    assert problems(onnx.load(ASSETS / "tiny" / f"{component}.onnx")) == []
