"""The denoiser at its published size, with made-up weights: its bundle, and that TensorRT for RTX builds it.

A minute, 9 GB of memory and 3 GB of disk for the bundle, then a build in FP16 and one in INT8 with FP16.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exporting import save_vae, weight_bytes
from golden import fill_golden
from trt_network import network_facts

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.calibration.blocks import Recipe, blocks
from moebius_edge.calibration.quantise import quantise, quantised_nodes
from moebius_edge.export import BundleOptions, export_bundle
from moebius_edge.export.engines import profile, rows
from moebius_edge.export.precision import to_float16
from moebius_edge.export.shallow import write_shallow
from moebius_edge.export.trt_builder import build
from moebius_edge.export.trt_rules import problems
from moebius_edge.model import StudentConfig, build_student
from moebius_edge.progress import no_progress

pytestmark = pytest.mark.slow
CONFIG = StudentConfig()
COMPONENTS = resolved_components(8 * CONFIG.latent_size, CONFIG.deep_channels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No configuration lies beside the checkpoint: the published one holds."""
    made = tmp_path_factory.mktemp("full")
    torch.save(fill_golden(build_student()).state_dict(), made / "diffusion_pytorch_model.bin")
    vae = save_vae(made / "vae")  # narrow: the published one's export is tested in test_autoencoder.py
    options = BundleOptions(vae=vae, steps=2)  # one network call on either side: seconds instead of minutes
    export_bundle(made / "diffusion_pytorch_model.bin", made / "bundle", options)
    yield made / "bundle"
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


def test_the_bundle_passes_its_gate(folder: Path) -> None:
    bundle = Bundle.load(folder)
    assert bundle.gate["psnr_db"] >= 60 and bundle.gate["steps_executed"] == 1
    assert (bundle.resolution, bundle.latent_size) == (512, 64)
    assert StudentConfig.from_dict(bundle.model) == StudentConfig()
    assert bundle.files["denoiser.onnx"]["bytes"] > 4 * 226_041_531 - 2**20


def test_the_file_has_fifteen_of_each_operator(folder: Path) -> None:
    found = count_operators(onnx.load(folder / "denoiser.onnx"))
    assert (found["moebius::LocalLambda"], found["moebius::InteractiveLambda"]) == (15, 15)
    assert not any(found[name] for name in ("BatchNormalization", "Einsum", "GroupNormalization", "Resize"))


def test_the_shallow_part_has_the_finest_levels_five_of_fifteen(folder: Path) -> None:
    """Two on the way down, three on the way up; a ninth of the bytes."""
    found = count_operators(onnx.load(folder / "denoiser_shallow.onnx"))
    assert (found["moebius::LocalLambda"], found["moebius::InteractiveLambda"]) == (5, 5)
    share = (folder / "denoiser_shallow.onnx").stat().st_size / (folder / "denoiser.onnx").stat().st_size
    assert 0.05 < share < 0.15


def test_tensorrt_for_rtx_builds_it_in_fp16(folder: Path) -> None:
    shutil.copy(folder / "denoiser.onnx", folder / "float16.onnx")
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
    shutil.copy(folder / "denoiser.onnx", folder / "int8.onnx")
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
