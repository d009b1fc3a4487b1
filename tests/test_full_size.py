"""The denoiser at its published size, with random weights: what its file holds, and that TensorRT for RTX builds it.

Half a minute and 0.9 GB for the file, then a build in float32, in FP16 and in INT8 with FP16. Whether it computes the
right thing is shown at small sizes, and by the export's gate in ``test_export.py``.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from exporting import weight_bytes
from onnx import TensorProto

from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.calibration.blocks import Recipe, blocks
from moebius_edge.calibration.quantise import quantise, quantised_nodes
from moebius_edge.export.build_engine import build
from moebius_edge.export.engines import profile, rows
from moebius_edge.export.onnx_file import OPSET, write_onnx
from moebius_edge.export.operators import TRANSLATIONS, function_bodies
from moebius_edge.export.precision import to_float16
from moebius_edge.export.shallow import write_shallow
from moebius_edge.export.specialise import specialise
from moebius_edge.export.trt_builder import network_facts
from moebius_edge.export.trt_rules import problems
from moebius_edge.model import StudentConfig, build_student

pytestmark = pytest.mark.slow
CONFIG = StudentConfig()
COMPONENTS = resolved_components(8 * CONFIG.latent_size, CONFIG.deep_channels)
COMPONENT = COMPONENTS["denoiser"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("full")
    special = specialise(build_student(CONFIG).eval())
    write_onnx(special, COMPONENT, made / "float32.onnx", TRANSLATIONS, function_bodies(CONFIG, OPSET))
    write_shallow(made / "float32.onnx", made / "shallow32.onnx")
    yield made
    shutil.rmtree(made)  # pytest would keep the gigabytes of the last three runs


def count_operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.node)


def build_plan(
    folder: Path, name: str, precision: str, quantised: Sequence[str] = (), component: str = "denoiser"
) -> dict[str, Any]:
    """Parse, check and build for one GPU generation; what ``engine.json`` would record."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install moebius-edge[rtx]")
    request = {
        "component": component,
        "precision": precision,
        "onnx": str(folder / name),
        "quantised": list(quantised),
        "plan": str(folder / "denoiser.plan"),
        "flavour": "tensorrt-rtx",
        "gpu": "any",
        "compute_capabilities": ["8.9"],
        "profile": profile(COMPONENTS[component], rows(component, 1)),
        "workspace_bytes": None,
        "opt_level": None,
        "timing_cache": None,
    }
    return build(request, lambda event, **values: None)


def test_the_file_has_fifteen_of_each_operator(folder: Path) -> None:
    found = count_operators(onnx.load(folder / "float32.onnx"))
    assert (found["moebius::LocalLambda"], found["moebius::InteractiveLambda"]) == (15, 15)
    assert not any(found[name] for name in ("BatchNormalization", "Einsum", "GroupNormalization", "Resize"))


def test_the_shallow_part_has_the_finest_levels_five_of_fifteen(folder: Path) -> None:
    """Two on the way down, three on the way up; a ninth of the bytes."""
    found = count_operators(onnx.load(folder / "shallow32.onnx"))
    assert (found["moebius::LocalLambda"], found["moebius::InteractiveLambda"]) == (5, 5)
    share = (folder / "shallow32.onnx").stat().st_size / (folder / "float32.onnx").stat().st_size
    assert 0.05 < share < 0.15


def test_tensorrt_for_rtx_builds_it_in_float32(folder: Path) -> None:
    record = build_plan(folder, "float32.onnx", "float32")
    assert record["bytes"] > 4 * 200e6  # the weights are in it
    assert record["layers"]["SOFTMAX"] == 15 and record["layers"]["NORMALIZATION"] == 15 * 6 + 1
    assert record["tensors"]["FLOAT"] > 1000 and "HALF" not in record["tensors"]


def test_tensorrt_for_rtx_builds_it_in_fp16(folder: Path) -> None:
    shutil.copy(folder / "float32.onnx", folder / "float16.onnx")
    islands = to_float16(folder / "float16.onnx")
    assert len(islands["Softmax"]) == 15
    model = onnx.load(folder / "float16.onnx")
    sizes = weight_bytes(model)
    assert sizes["FLOAT16"] > 50 * sizes["FLOAT"]
    assert {i.type.tensor_type.elem_type for i in model.graph.output} == {TensorProto.FLOAT}
    del model
    record = build_plan(folder, "float16.onnx", "float16")
    assert record["bytes"] < 2.5 * 226e6
    # Products, convolutions and what lies between them are half; norms, softmax and the time embedding are not.
    assert record["tensors"]["HALF"] > 3 * record["tensors"]["FLOAT"] > 0
    part = write_shallow(folder / "float16.onnx", folder / "shallow16.onnx")
    assert count_operators(part)["moebius::LocalLambda"] == 5
    record = build_plan(folder, "shallow16.onnx", "float16", component="denoiser_shallow")
    assert record["tensors"]["HALF"] > 3 * record["tensors"]["FLOAT"] > 0 and record["layers"]["SOFTMAX"] == 5


def test_tensorrt_for_rtx_builds_it_in_int8(folder: Path) -> None:
    """Scales are made up: what is shown is that every kind of block is parsed as the recipe says, and builds."""
    shutil.copy(folder / "float32.onnx", folder / "int8.onnx")
    to_float16(folder / "int8.onnx")
    model = onnx.load(folder / "int8.onnx")
    found = blocks(model)
    recipe = Recipe({b.name: b.name != "time_embedding" for b in found})
    quantised = quantise(model, recipe, defaultdict(lambda: 0.05))
    assert problems(quantised) == []
    wanted = [node for b in found if b.name in recipe.chosen for node in b.nodes]
    assert sorted(quantised_nodes(quantised)) == sorted(wanted)
    onnx.save(quantised, folder / "int8.onnx")
    del model, quantised
    assert (folder / "int8.onnx").stat().st_size < 1.4 * 226e6
    assert sorted(network_facts(folder / "int8.onnx")["quantised"]) == sorted(wanted)
    record = build_plan(folder, "int8.onnx", "int8", wanted)
    assert (record["quantised_products"], record["products_in_int8"]) == (len(wanted), None)
    assert record["tensors"]["INT8"] > len(wanted) and record["bytes"] < 2.5 * 226e6
