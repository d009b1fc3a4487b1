"""Where two conversions of a network, or two runtimes, part: every tensor that both compute, compared.

Polygraphy's comparator runs both files with their inner tensors marked as outputs. Tensors are matched by name, which
the passes of this package keep: of a float32 file and its FP16 or INT8 one, all but those of the lambda operators that
were inlined. What casts and the nodes of quantisation return is left out, for it has no counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from ..errors import BundleError, MachineError, UsageError
from ..progress import Progress, no_progress
from ..runtimes.base import drawn_feeds
from ..spec import Component, Tensor
from .onnx_graph import constant_tensors, infer_tensors, signature
from .precision import read_model
from .trt_builder import import_polygraphy

LIMIT_BYTES = 256 << 20  # of the tensors that one file returns at a time
_ROWS = 2  # of the drawn feeds: one of each branch
_CONVERSIONS = ("Cast", "QuantizeLinear", "DequantizeLinear")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class LayerDifference:
    """How far a tensor is apart in two runs.

    Attributes:
        operator: the type of the operator that computes it.
        relative_error: the root of the summed squared differences over that of the first run's squares.
        psnr_db: against the first run's largest magnitude; infinite where the two are equal.
        order: the operator's position in the first graph.
    """

    tensor: str
    operator: str
    shape: tuple[int, ...]
    relative_error: float
    max_abs_error: float
    psnr_db: float
    order: int


def compare_layers(
    a: Path, b: Path, feeds: Mapping[str, np.ndarray] | None = None, provider_a: str = "cpu", provider_b: str = "cpu",
    on_progress: Progress = no_progress,
) -> list[LayerDifference]:  # fmt: skip
    """Run the ONNX files ``a`` and ``b`` on the same ``feeds``, by default drawn ones, and compare what they compute.

    ``provider_a`` and ``provider_b`` are ONNX Runtime's: ``cpu``, ``cuda`` or ``tensorrt``. A large model is run
    several times, each time for tensors of at most ``LIMIT_BYTES``. The largest relative error comes first.

    Raises:
        MachineError: Polygraphy or ONNX Runtime is missing, or lacks a provider.
        BundleError: a file is no ONNX model, or cannot be run.
        UsageError: the files have no tensor in common.
    """
    models = [_load(path) for path in (a, b)]
    nodes = {name: (i, node) for i, node in enumerate(models[0].graph.node) for name in node.output}
    groups = list(_groups(models))
    if not groups:
        raise UsageError(f"{a} and {b} compute no tensor of the same name: compare two conversions of one network")
    inputs = [Tensor(name, kind, shape) for name, kind, shape in map(signature, models[0].graph.input)]
    feeds = dict(feeds or drawn_feeds(Component(models[0].graph.name, tuple(inputs), ()), _ROWS))
    differences = []
    for done, names in enumerate(groups):
        on_progress("compare layers", done, len(groups))
        first, second = _run(models, names, feeds, (provider_a, provider_b))
        for name in names:
            index, node = nodes[name]
            differences.append(_difference(name, node.op_type, index, first[name], second[name]))
    on_progress("compare layers", len(groups), len(groups))
    return sorted(differences, key=lambda d: (-d.relative_error, d.order))


def _load(path: Path) -> ModelProto:
    try:
        return read_model(path)
    except OSError as error:
        raise MachineError(f"cannot read {path} ({error.strerror}): check it with `ls -l {path}`") from error
    except Exception as error:  # protobuf's own
        raise BundleError(f"{path} is no ONNX model: export the bundle again") from error


def _groups(models: list[ModelProto]) -> Iterator[list[str]]:
    """The names of the tensors to compare, in the order of the first graph and in groups of bounded size."""
    makers = [{name: node.op_type for node in m.graph.node for name in node.output if name} for m in models]
    constant = set.union(*(constant_tensors(m.graph) for m in models))
    inferred = infer_tensors(models[0], _ROWS)
    group: list[str] = []
    room = LIMIT_BYTES
    for name, operator in makers[0].items():
        shape, kind = inferred.get(name, ((), TensorProto.FLOAT))
        converted = operator in _CONVERSIONS and makers[1].get(name) in _CONVERSIONS
        if name not in makers[1] or name in constant or converted or kind not in _FLOATS:
            continue
        size = 4 * math.prod(shape) if shape and 0 not in shape else LIMIT_BYTES
        if group and size > room:
            yield group
            group, room = [], LIMIT_BYTES
        group.append(name)
        room -= size
    if group:
        yield group


def _run(
    models: list[ModelProto], names: list[str], feeds: dict[str, np.ndarray], providers: tuple[str, str]
) -> list[Mapping[str, np.ndarray]]:
    """The tensors ``names`` as each of the models computes them."""
    import_polygraphy()
    from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator

    def runner(index: int) -> Any:
        marked = ModifyOutputs(models[index], outputs=names, copy=True)
        session = SessionFromOnnx(BytesFromOnnx(marked), providers=[providers[index]])
        return OnnxrtRunner(session, name=str(index))

    try:
        results = Comparator.run([runner(0), runner(1)], data_loader=[feeds])
    except Exception as error:  # Polygraphy's, or ONNX Runtime's
        raise BundleError(f"the layers cannot be compared ({' '.join(str(error).split()):.300})") from None
    return [iterations[0] for _, iterations in results]


def _difference(name: str, operator: str, order: int, first: np.ndarray, second: np.ndarray) -> LayerDifference:
    reference, other = first.astype(np.float64), second.astype(np.float64)
    if reference.shape != other.shape:
        shapes = f"{first.shape} in one file and {second.shape} in the other"
        raise UsageError(f"tensor {name} is {shapes}: compare two conversions of one network")
    error = np.abs(reference - other)
    norm, distance = float(np.linalg.norm(reference)), float(np.linalg.norm(error))
    largest = float(error.max(initial=0))
    if distance == 0:
        relative, psnr = 0.0, math.inf
    elif norm == 0 or not math.isfinite(distance):
        relative, psnr = math.inf, -math.inf
        largest = largest if math.isfinite(distance) else math.inf
    else:
        relative = distance / norm
        psnr = 20 * math.log10(float(np.abs(reference).max()) * math.sqrt(error.size) / distance)
    return LayerDifference(name, operator, first.shape, relative, largest, psnr, order)
