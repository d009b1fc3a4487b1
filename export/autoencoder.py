"""The autoencoder's files in FP16, where need be divided by a power of two that nothing sees.

The decoders of Stable Diffusion's family leave FP16's range in their residual stream. Group norm does not see a scale,
GN(x / k; ε / k²) = GN(x; ε): so the tensors that group norms alone read, through linear operators, are divided by k.
Weights, biases and ε change, no operator does. k follows from ranges recorded in float32; every file is
then run with a rounding after each operator, and one that is not good enough stays float32. Needs onnx, no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..bundle.manifest import ComponentPrecision
from ..data.calibration_pictures import square
from ..data.sources import open_pictures
from ..errors import BundleError
from ..metrics.fidelity import planes, psnr_db
from ..metrics.trajectory import SEED, draw_scene
from ..progress import Progress
from ..runtimes.providers import quiet_options
from ..system.machine import available_cores
from .onnx_graph import attribute, constant_tensors, drop_unused, tensor_readers
from .precision import LARGEST, convert, float_tensors, read_model

Feeds = Mapping[str, np.ndarray]

AUTOENCODER = ("vae_encoder", "vae_decoder")
MARGIN = 8.0  # how many times what was recorded must fit into FP16: other pictures reach further
_DRAWN_SCENES = 2  # each whole and with a hole
_PICTURES = 16
# Operators that multiply their first input by constant weights, and those that only arrange what they read.
_PRODUCTS = ("Conv", "MatMul")
_ARRANGING = ("Concat", "DepthToSpace", "Pad", "Reshape", "Resize", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def half_autoencoder(
    paths: Mapping[str, Path], images: Sequence[np.ndarray], min_psnr_db: float, progress: Progress
) -> tuple[dict[str, ComponentPrecision], dict[str, Any]]:
    """Rewrite the float32 files ``paths`` of the encoder and the decoder in FP16, each where that is good enough.

    Ranges are recorded over ``images``, each (1, 3, H, W) in [-1, 1], and over their latents and one of pure noise.
    ``min_psnr_db`` is the floor of each file against its float32 form.

    Returns:
        What each component computes in, and the names of its float32 nodes by operator type, or "all".
    """
    precisions: dict[str, ComponentPrecision] = {}
    islands: dict[str, Any] = {}
    feeds: list[Feeds] = [{"image": image} for image in images]
    for index, name in enumerate(AUTOENCODER):
        progress(f"FP16 for {name}", index, len(AUTOENCODER))
        precisions[name], islands[name], results = _half(paths[name], feeds, min_psnr_db)
        noise = np.random.default_rng(SEED).standard_normal(results[0].shape, np.float32)
        feeds = [{"latent": latent} for latent in (*results, noise)]
    return precisions, islands


def range_images(resolution: int, pictures: str | None = None) -> list[np.ndarray]:
    """Images (1, 3, H, W) in [-1, 1] for ``half_autoencoder``: the first of ``pictures``, else drawn scenes.

    ``pictures`` are as for ``open_pictures``, which says what is raised.
    """
    if pictures is not None:
        opened = open_pictures(pictures)
        return [planes(square(opened.read(i)[0], resolution))[None] for i in range(min(_PICTURES, len(opened)))]
    scenes = [draw_scene(resolution, SEED + number) for number in range(_DRAWN_SCENES)]
    return [image * part for image, hole in scenes for part in (np.float32(1), (~hole).astype(np.float32))]


def _half(path: Path, feeds: Sequence[Feeds], min_psnr_db: float) -> tuple[ComponentPrecision, Any, list[np.ndarray]]:
    """``half_autoencoder`` of one file, and what its float32 form returns for each of the ``feeds``."""
    model = onnx.shape_inference.infer_shapes(read_model(path), check_type=True, data_prop=True)
    ranges, results = record_ranges(model, feeds)
    divided, scores = divisible_tensors(model), attention_scores(model)
    divisor = choose_divisor(ranges[name] for name in divided)
    try:
        _check_ranges(model, ranges, divided | scores)
        divide(model, divided, divisor)
        islands = convert(model, float32_tensors=scores)
        onnx.checker.check_model(model, full_check=True)
        _check_results(model, feeds, results, min_psnr_db)
    except BundleError as error:
        return {"type": "float32", "reason": error.problem}, "all", results
    onnx.save(model, str(path))
    return {"type": "float16", "divisor": divisor}, islands, results


def record_ranges(model: ModelProto, feeds: Sequence[Feeds]) -> tuple[dict[str, float], list[np.ndarray]]:
    """The largest magnitude of every float32 tensor that a node computes over ``feeds``, and the first outputs.

    The graph itself takes the maxima, so that no tensor is held for longer than it is needed.
    """
    recording = ModelProto()
    recording.CopyFrom(model)
    graph = recording.graph
    floats = float_tensors(graph)
    names = [name for node in graph.node for name in node.output if name in floats]
    for index, name in enumerate(names):
        magnitude, largest = f"magnitude_{index}", f"largest_{index}"
        graph.node.append(helper.make_node("Abs", [name], [magnitude]))
        graph.node.append(helper.make_node("ReduceMax", [magnitude], [largest], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    session = _open(recording)
    maxima, results = np.zeros(len(names)), []
    for feed in feeds:
        result, *largest_magnitudes = session.run(None, dict(feed))
        maxima = np.maximum(maxima, np.array(largest_magnitudes))  # which hands a NaN on
        results.append(result)
    return dict(zip(names, map(float, maxima), strict=True)), results


def divisible_tensors(model: ModelProto) -> set[str]:
    """The tensors that can be divided by one number without an effect on what the model computes.

    They are the largest set in which every tensor is computed by a linear operator, from others of the set unless a
    product with constant weights computes it, and read by group norms and by linear operators that stay in the set.
    """
    constant, readers = constant_tensors(model.graph), tensor_readers(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    linear = {name for name, node in makers.items() if name not in constant | outputs and _is_linear(node, constant)}

    def stays(name: str) -> bool:
        maker = makers[name]
        if maker.op_type not in _PRODUCTS and not set(_data_inputs(maker)) - constant <= linear:
            return False
        return all(
            reader.op_type == "Shape"
            or (reader.op_type == "InstanceNormalization" and reader.input[0] == name)
            or (reader.output[0] in linear and name in _data_inputs(reader))
            for reader in readers.get(name, ())
        )

    while removed := {name for name in linear if not stays(name)}:
        linear -= removed
    return linear


def divide(model: ModelProto, divided: Collection[str], divisor: int) -> None:
    """Divide, in place, every tensor of ``divided`` (as ``divisible_tensors`` returns it) by ``divisor``."""
    if divisor == 1:
        return
    constant = constant_tensors(model.graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    quotients: dict[str, str] = {}

    def quotient(name: str) -> str:
        if name not in quotients:
            quotients[name] = f"{name}_over_{divisor}"
            value = numpy_helper.to_array(weights[name]) / np.float32(divisor)
            model.graph.initializer.append(numpy_helper.from_array(value, quotients[name]))
        return quotients[name]

    for node in model.graph.node:
        if node.op_type == "InstanceNormalization" and node.input[0] in divided:
            (epsilon,) = (a for a in node.attribute if a.name == "epsilon")
            epsilon.f /= divisor**2
        elif node.output[0] in divided and node.op_type in (*_PRODUCTS, "Add"):
            # A product of a divided tensor is divided already, but for its bias.
            kept = 2 if node.op_type in _PRODUCTS and node.input[0] in divided else 0
            for i, name in enumerate(node.input):
                if i >= kept and name in constant:
                    node.input[i] = quotient(name)
    drop_unused(model)


def attention_scores(model: ModelProto) -> set[str]:
    """The products that a softmax reads: rounded to FP16, large ones would be wrong by more than a whole exponent."""
    makers = {name: node for node in model.graph.node for name in node.output}
    read = {node.input[0] for node in model.graph.node if node.op_type == "Softmax"}
    return {name for name in read if name in makers and makers[name].op_type == "MatMul"}


def choose_divisor(ranges: Iterable[float]) -> int:
    """The least power of two by which the largest of ``ranges`` is below FP16's end by ``MARGIN`` times.

    A power of two changes no digit of the weights, short of FP16's smallest.
    """
    excess = MARGIN * max(ranges, default=0.0) / LARGEST
    return 2 ** math.ceil(math.log2(excess)) if 1 < excess < math.inf else 1


def _check_ranges(model: ModelProto, ranges: Mapping[str, float], exempt: Collection[str]) -> None:
    """Raise ``BundleError`` where a tensor outside ``exempt`` is too large for FP16, or any is not finite."""
    for node in model.graph.node:
        for name in node.output:
            largest = ranges.get(name, 0.0)
            limit = math.inf if name in exempt else LARGEST / MARGIN
            if not largest < limit:
                raise BundleError(
                    f"tensor {name} ({node.op_type}) reaches {largest:.3g}, FP16 ends at {LARGEST:g} and {MARGIN:g} "
                    "times the recorded range must fit",
                    "use --precision fp32",
                )


def _check_results(
    model: ModelProto, feeds: Sequence[Feeds], results: Sequence[np.ndarray], min_psnr_db: float
) -> None:
    """Raise ``BundleError`` unless the FP16 ``model`` returns the float32 ``results`` to within ``min_psnr_db``.

    The runtime's optimisations are off: what an FP16 operator returns is then rounded to FP16, as on a GPU.
    """
    session = _open(model, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    for feed, expected in zip(feeds, results, strict=True):
        (result,) = session.run(None, dict(feed))
        figure = psnr_db(result, expected)
        if not figure >= min_psnr_db:  # a NaN is missed too
            raise BundleError(
                f"in FP16 it is {figure:.2f} dB from float32, {min_psnr_db:g} dB is the floor", "use --precision fp32"
            )


def _open(model: ModelProto, level: Any = None) -> Any:
    options = quiet_options(onnxruntime, available_cores())
    options.enable_cpu_mem_arena = False
    if level is not None:
        options.graph_optimization_level = level
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _is_linear(node: NodeProto, constant: Collection[str]) -> bool:
    """Whether a node is linear in the tensors that are no constants, but for an added constant."""
    if node.op_type in _PRODUCTS:
        return node.input[0] not in constant and all(name in constant for name in node.input[1:])
    if node.op_type == "Pad":  # with zeros, unless a third input says otherwise
        return attribute(node, "mode", b"constant") == b"constant" and len(node.input) < 3
    return node.op_type == "Add" or node.op_type in _ARRANGING


def _data_inputs(node: NodeProto) -> list[str]:
    """The inputs that hold what ``node`` is linear in; others are weights, shapes and the like."""
    return list(node.input) if node.op_type in ("Add", "Concat") else [node.input[0]]
