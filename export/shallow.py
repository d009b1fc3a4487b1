"""``denoiser_shallow``: the part of an exported denoiser that is left to compute where its deep feature is given.

It is cut out of the finished file, so that precision, quantisation and every rewrite in it are the whole denoiser's,
and no pass has to know of two graphs. Needs onnx only, no PyTorch.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, helper
from onnx.utils import Extractor

from ..spec import DEEP, SHALLOW


def write_shallow(denoiser: Path, target: Path) -> ModelProto:
    """Cut ``denoiser_shallow`` out of the file ``denoiser``, and write it to ``target``."""
    part = shallow_part(onnx.load(str(denoiser)))
    onnx.save(part, str(target))
    return part


def shallow_part(model: ModelProto) -> ModelProto:
    """The part of a denoiser, in any precision, that lies between its inputs with ``deep`` and ``noise``."""
    (output,) = (value for value in model.graph.output if value.name == DEEP)
    (producer,) = (node for node in model.graph.node if DEEP in node.output)
    inner = DEEP  # the tensor that the network reads: in FP16 the output is a float32 copy of it
    if producer.op_type == "Cast" and not any(DEEP in node.input for node in model.graph.node):
        inner = producer.input[0]
        half = model.graph.value_info.add()
        half.CopyFrom(output)
        half.name, half.type.tensor_type.elem_type = inner, TensorProto.FLOAT16
    inputs = [value.name for value in model.graph.input]
    part = Extractor(model).extract_model([*inputs, inner], ["noise"])
    if inner != DEEP:
        del model.graph.value_info[-1]
        (value,) = (value for value in part.graph.input if value.name == inner)
        value.CopyFrom(output)
        part.graph.node.insert(0, helper.make_node("Cast", [DEEP], [inner], f"cast_{DEEP}", to=TensorProto.FLOAT16))
    part.graph.name = SHALLOW
    onnx.checker.check_model(part, full_check=True)
    return part
