"""ONNX files that no runtime is given: no end, no foreign code, no other files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from toy import describe_again, make_toy_bundle

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, MachineError
from moebius_edge.runtimes.onnx_check import MAX_NODES, check_onnx_file
from moebius_edge.spec import COMPONENTS


def identity(*nodes: NodeProto, constants: dict[str, np.ndarray] | None = None, functions: Sequence = ()) -> ModelProto:
    """A graph from ``x`` to ``y`` that has ``nodes`` as well, of which nothing is needed."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:], tensors
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("moebius", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def call(name: str, domain: str = "moebius") -> NodeProto:
    return helper.make_node(name, ["x"], ["z"], domain=domain)


def function(name: str, *nodes: NodeProto) -> onnx.FunctionProto:
    return helper.make_function("moebius", name, ["x"], ["z"], nodes, [helper.make_opsetid("", 20)])


def loop() -> NodeProto:
    scalars = [
        helper.make_tensor_value_info(n, kind, []) for n, kind in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))
    ]
    result = helper.make_tensor_value_info("d", TensorProto.BOOL, [])
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", scalars, [result])
    return helper.make_node("Loop", ["times", "go"], [], body=body)


def outside() -> ModelProto:
    model = identity(constants={"w": np.ones(4, np.float32)})
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location="/etc/passwd")
    model.graph.initializer[0].ClearField("raw_data")
    return model


SPARSE, TRAINED = identity(), identity()
SPARSE.graph.sparse_initializer.add().dims.append(1 << 40)
TRAINED.training_info.add()
SMALL = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
DOUBLING = [function(f"F{i}", call(f"F{i + 1}"), call(f"F{i + 1}")) for i in range(40)]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (identity(loop()), "a graph inside of an operator, as loops and branches have"),
        (identity(call("F"), functions=[function("F", loop())]), "a graph inside of an operator"),
        (identity(call("F"), functions=[function("F", call("F"))]), "'F' of domain 'moebius' inside of a function"),
        (identity(call("F0"), functions=DOUBLING), "of domain 'moebius' inside of a function"),
        (identity(call("F")), "it calls 'F', a function that it lacks"),
        (identity(functions=[function("F"), function("F")]), "the function 'F' twice"),
        (identity(call("Attention", "com.microsoft")), "the operator 'Attention' of domain 'com.microsoft'"),
        (identity(*[call("F")] * 300, functions=[function("F", *[call("Neg", "")] * 99)]), f"over {MAX_NODES} ope"),
        (identity(*[call("Neg", "")] * MAX_NODES), f"over {MAX_NODES} operators"),
        (outside(), "its weights lie in another file"),
        (SPARSE, "sparse weights"),
        (TRAINED, "a part for training"),
    ],
)
def test_what_export_never_writes(tmp_path: Path, model: ModelProto, text: str) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=f"x.onnx is no ONNX file that this program writes .*{text}") as caught:
        check_onnx_file(path)
    assert str(caught.value).isprintable()


def test_weights_of_a_constant_in_another_file(tmp_path: Path) -> None:
    model = identity(helper.make_node("Constant", [], ["c"], value=SMALL))
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString())
    assert check_onnx_file(path) == 20
    tensor = model.graph.node[0].attribute[0].t
    tensor.data_location = TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="its weights lie in another file"):
        check_onnx_file(path)


def test_the_opset_of_what_export_writes_is_read(tmp_path: Path) -> None:
    for component in COMPONENTS:
        assert check_onnx_file(ASSETS / "tiny" / f"{component}.onnx") == 20
    quick_gelu = call("QuickGelu", "com.microsoft")  # INT8 for a CPU has it
    model = identity(quick_gelu, constants={"w": np.zeros(10_000, np.float32)})
    for opset in (1, 20, 300):
        model.opset_import[0].version = opset
        (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
        assert check_onnx_file(tmp_path / "x.onnx") == opset


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    whole = (ASSETS / "tiny" / "vae_encoder.onnx").read_bytes()
    for content in (b"", b"not a graph at all", whole[: len(whole) // 2], b"\xff" * 20, b"\x00\x01", b"\x3a" * 99):
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"x\.onnx is no ONNX file"):
            check_onnx_file(path)
    with pytest.raises(MachineError, match="cannot read .*none.onnx"):
        check_onnx_file(tmp_path / "none.onnx")


@pytest.mark.parametrize("command", ["run", "int8"])
def test_no_command_opens_such_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    (folder / "denoiser.onnx").write_bytes(identity(loop()).SerializeToString())
    describe_again(folder)
    image, mask = "examples/coffee.png", "examples/coffee_mask.png"
    arguments = {
        "run": ["run", image, mask, "--bundle", str(folder)],
        "int8": ["export", str(folder), "--precision", "int8", "--calibration-data", "examples"],
    }
    assert main([*arguments[command], "--output", str(tmp_path / "out.png")]) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "denoiser.onnx is no ONNX file that this program writes" in error
