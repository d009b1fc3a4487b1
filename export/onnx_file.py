"""One module -> one checked ONNX file: float32, opset 20, free batch, the tensor names of ``spec``.

It knows nothing of the networks, nor of precision: what the file computes is the module's affair.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from ..errors import BundleError, UsageError
from ..spec import Component
from ..system.files import utf8_path
from .graphs import example_inputs
from .trt_rules import problems

# The highest opset TensorRT 10.3 (JetPack 6) reads. 21 would bring GroupNormalization, whose per-channel
# scale TensorRT mishandles before 10.9.
OPSET = 20
LARGEST_BYTES = 2**31 - 2**24  # of one protobuf file, with room for the graph itself

# What stays of the exporter's metadata: a node's module path. Its stack traces hold this machine's paths.
_KEPT_METADATA = frozenset({"namespace"})


def write_onnx(
    module: nn.Module,
    component: Component,
    path: Path,
    translations: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> None:
    """Export ``module`` as ``component`` (all sizes but ``N`` filled in) to the single file ``path``.

    ``translations`` maps torch operators to the onnxscript functions that stand for them; ``functions`` are the
    bodies of operators that no runtime knows.

    Raises:
        UsageError: the weights are too large for one ONNX file.
        BundleError: the module became a node that TensorRT 10.3 does not take.
    """
    weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if weights > LARGEST_BYTES:
        raise UsageError(
            f"the {component.name} has {weights / 1e9:.2f} GB of weights, and an ONNX file holds 2 GB: "
            "use a smaller model configuration"
        )
    names = [t.name for t in component.inputs]
    batch = torch.export.Dim("N")
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            example_inputs(component),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=[t.name for t in component.outputs],
            dynamic_shapes=tuple({0: batch} for _ in names),
            custom_translation_table=dict(translations) if translations else None,
            verbose=False,
        )
    assert program is not None
    _tidy(program.model, component.name)
    for proto in functions:
        function = ir.serde.deserialize_function(proto)
        program.model.opset_imports.setdefault(function.domain, 1)
        program.model.functions[function.identifier()] = function
    program.save(str(path), external_data=False)
    check_onnx(path, component)


def check_onnx(path: Path, component: Component) -> None:
    """Raise ``RuntimeError`` (a bug, here or in the exporter) unless ``path`` is a valid ``component``.

    Raises ``BundleError`` for a valid one that the oldest TensorRT would refuse or misread, see ``trt_rules``.
    """
    with utf8_path(path) as name:
        onnx.checker.check_model(name, full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    found = {entry.domain: entry.version for entry in model.opset_import}
    if found.get("") != OPSET:
        raise RuntimeError(f"{path.name} was exported with opset {found.get('')}, not {OPSET}")
    for kind, values, tensors in (
        ("input", model.graph.input, component.inputs),
        ("output", model.graph.output, component.outputs),
    ):
        got = [_signature(value) for value in values]
        wanted = [(t.name, t.dtype, t.shape) for t in tensors]
        if got != wanted:
            raise RuntimeError(f"{path.name} has the {kind}s {got} where the contract has {wanted}")
    if found_problems := problems(model):
        raise BundleError(f"{path.name} is not for TensorRT 10.3: {found_problems[0]}")


def _signature(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return value.name, dtype, tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)


def _tidy(model: Any, name: str) -> None:
    """Name the graph, and drop the metadata that describes the exporting machine."""
    model.graph.name = name
    described = [model, model.graph, *model.graph.all_nodes(), *model.graph.inputs, *model.graph.outputs]
    described += model.graph.initializers.values()
    described += [output for node in model.graph.all_nodes() for output in node.outputs]
    for item in described:
        for key in set(item.metadata_props) - _KEPT_METADATA:
            del item.metadata_props[key]
        item.doc_string = None


@contextmanager
def _quiet() -> Iterator[None]:
    """No deprecation warnings and no chatter on the log from the exporter; its errors still raise and log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
