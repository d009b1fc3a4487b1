"""The three networks as checked ONNX files: float32, opset 20, free batch, the tensor names and scales of ``spec``.

Each module's ``forward`` takes and returns exactly the tensors of one component, in that order, and the denoiser's its
deep feature too: here a checkpoint's conventions (prompt ids, unscaled latents, a posterior) end. The PyTorch runtime
does not use these modules, so that the gate also sees a mistake made here.
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
from torch import Tensor, nn

from ..errors import BundleError
from ..model import Student
from ..spec import Component
from ..system.files import utf8_path
from .onnx_graph import signature
from .specialise import specialise, specialise_autoencoder
from .trt_rules import OPSET, problems


class _Autoencoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)


class Encoder(_Autoencoder):
    """``image`` (N, 3, H, W) in [-1, 1] -> scaled ``latent`` (N, 4, h, w): the posterior's mean, no draw."""

    def forward(self, image: Tensor) -> Tensor:
        mean: Tensor = self.vae.encode(image).latent_dist.mean
        return mean * self.scaling_factor


class Decoder(_Autoencoder):
    """Scaled ``latent`` (N, 4, h, w) -> ``image`` (N, 3, H, W), nominally in [-1, 1] and not clipped."""

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latent / self.scaling_factor).sample
        return image


def build_modules(student: Student, vae: Any) -> dict[str, nn.Module]:
    """The modules by component name, in evaluation mode."""
    special = specialise_autoencoder(vae)
    return {
        "vae_encoder": Encoder(special).eval(),
        "denoiser": specialise(student),
        "vae_decoder": Decoder(special).eval(),
    }


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
        BundleError: the module became a node that TensorRT 10.3 does not take.
    """
    # Batch 2, for a 1 would be taken as fixed.
    shapes = [[size if isinstance(size, int) else 2 for size in t.shape] for t in component.inputs]
    examples = [torch.zeros(s, dtype=getattr(torch, t.dtype)) for s, t in zip(shapes, component.inputs, strict=True)]
    batch = torch.export.Dim("N")
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in component.inputs],
            output_names=[t.name for t in component.outputs],
            dynamic_shapes=tuple({0: batch} for _ in examples),
            custom_translation_table=dict(translations) if translations else None,
            verbose=False,
        )
    assert program is not None
    _drop_metadata(program.model, component.name)
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
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if opset != OPSET:
        raise RuntimeError(f"{path.name} was exported with opset {opset}, not {OPSET}")
    values = [signature(value) for value in (*model.graph.input, *model.graph.output)]
    expected = [(t.name, t.dtype, t.shape) for t in (*component.inputs, *component.outputs)]
    if values != expected:
        raise RuntimeError(f"{path.name} has the inputs and outputs {values} where the contract has {expected}")
    if violations := problems(model):
        raise BundleError(f"{path.name} is not for TensorRT 10.3: {violations[0]}")


def _drop_metadata(model: Any, name: str) -> None:
    """Name the graph, and keep of the exporter's notes a node's module path alone: others hold this machine's paths."""
    model.graph.name = name
    items = [model, model.graph, *model.graph.all_nodes(), *model.graph.inputs, *model.graph.outputs]
    items += model.graph.initializers.values()
    items += [output for node in model.graph.all_nodes() for output in node.outputs]
    for item in items:
        for key in set(item.metadata_props) - {"namespace"}:
            del item.metadata_props[key]
        item.doc_string = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither deprecation warnings nor chatter on the log from the exporter; its errors still raise and log."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
