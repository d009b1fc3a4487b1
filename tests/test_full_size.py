"""The denoiser at its published size, with random weights: what its file holds, and that TensorRT for RTX builds it.

Half a minute and 0.9 GB for the file, then a build in float32, in FP16 and in INT8 with FP16. Whether it computes the
right thing is shown at small sizes, and by the export's gate in ``test_export.py``.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from exporting import weight_bytes
from trt_network import network_facts

from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.calibration.blocks import Recipe, blocks
from moebius_edge.calibration.quantise import quantise, quantised_nodes
from moebius_edge.export.engines import profile, rows
from moebius_edge.export.onnx_file import OPSET, write_onnx
from moebius_edge.export.operators import TRANSLATIONS, function_bodies
from moebius_edge.export.precision import to_float16
from moebius_edge.export.shallow import write_shallow
from moebius_edge.export.specialise import specialise
from moebius_edge.export.trt_builder import build
from moebius_edge.export.trt_rules import problems
from moebius_edge.model import StudentConfig, build_student
from moebius_edge.progress import no_progress

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


def built(folder: Path, name: str, component: str = "denoiser") -> tuple[dict[str, Any], int]:
    """What TensorRT for RTX makes of a file, and the size in bytes of the plan for one GPU generation."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install moebius-edge[rtx]")
    request = {
        "stage": "build",
        "component": component,
        "onnx": str(folder / name),
        "plan": str(folder / "denoiser.plan"),
        "variant": "tensorrt-rtx",
        "compute_capabilities": ["8.9"],
        "profile": profile(COMPONENTS[component], rows(component, 1)),
        "workspace_bytes": None,
        "opt_level": None,
        "timing_cache": None,
    }
    return network_facts(folder / name), build(request, no_progress, print)["bytes"]


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
    facts, size = built(folder, "float32.onnx")
    assert size > 4 * 200e6  # the weights are in it
    assert facts["layers"]["SOFTMAX"] == 15 and facts["layers"]["NORMALIZATION"] == 15 * 6 + 1
    assert facts["tensors"]["FLOAT"] > 1000 and "HALF" not in facts["tensors"]


def test_tensorrt_for_rtx_builds_it_in_fp16(folder: Path) -> None:
    shutil.copy(folder / "float32.onnx", folder / "float16.onnx")
    assert len(to_float16(folder / "float16.onnx")["Softmax"]) == 15
    sizes = weight_bytes(onnx.load(folder / "float16.onnx"))
    assert sizes["FLOAT16"] > 50 * sizes["FLOAT"]
    facts, size = built(folder, "float16.onnx")
    assert size < 2.5 * 226e6 and set(facts["outputs"].values()) == {"FLOAT"}
    # Products, convolutions and what lies between them are half; norms, softmax and the time embedding are not.
    assert facts["tensors"]["HALF"] > 3 * facts["tensors"]["FLOAT"] > 0
    write_shallow(folder / "float16.onnx", folder / "shallow16.onnx")
    facts, _ = built(folder, "shallow16.onnx", "denoiser_shallow")
    assert facts["tensors"]["HALF"] > 3 * facts["tensors"]["FLOAT"] > 0 and facts["layers"]["SOFTMAX"] == 5


def test_tensorrt_for_rtx_builds_it_in_int8(folder: Path) -> None:
    """Scales are made up: what is shown is that every kind of block is parsed as the recipe says, and builds."""
    shutil.copy(folder / "float32.onnx", folder / "int8.onnx")
    to_float16(folder / "int8.onnx")
    model = onnx.load(folder / "int8.onnx")
    found = blocks(model)
    recipe = Recipe({b.name: b.name != "time_embedding" for b in found})
    quantised = quantise(model, recipe, defaultdict(lambda: 0.05))
    assert problems(quantised) == []
    wanted = sorted(node for b in found if b.name in recipe.chosen for node in b.nodes)
    assert sorted(quantised_nodes(quantised)) == wanted
    onnx.save(quantised, folder / "int8.onnx")
    del model, quantised
    assert (folder / "int8.onnx").stat().st_size < 1.4 * 226e6
    facts, size = built(folder, "int8.onnx")
    assert sorted(facts["quantised"]) == wanted
    assert facts["tensors"]["INT8"] > len(wanted) and size < 2.5 * 226e6
