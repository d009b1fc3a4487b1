"""Export: the files say what PyTorch says, the gate can fail, and nothing is left behind when it does.

One small student with golden weights and one random autoencoder are exported once; the tests read that bundle
or run the exporter up to the point they are about, with its ONNX files put in place of a new conversion.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from exporting import CONFIG, element_types, save_student, save_vae, weight_bytes
from golden import fill_golden
from onnx import TensorProto
from safetensors.torch import save
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.checkpoints.weights_metadata import guidance_metadata
from moebius_edge.errors import BundleError, MachineError, QualityError, UsageError
from moebius_edge.export import BundleOptions, export_bundle, float32_bundle
from moebius_edge.export.exporter import judge
from moebius_edge.export.onnx_file import check_onnx
from moebius_edge.export.onnx_graph import signature
from moebius_edge.export.precision import ISLANDS
from moebius_edge.export.source import find_source, load_config, load_student, load_vae
from moebius_edge.model import StudentConfig, build_student
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.runtimes import create_runtime
from moebius_edge.runtimes.pytorch import TorchRuntime
from moebius_edge.spec import DEEP, DENOISER, SHALLOW, components
from moebius_edge.system.files import sha256_file

STEPS = 4
FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
NAMES = list(components(CONFIG.deep_channels))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("parts")
    vae = save_vae(folder / "vae")
    student = save_student(folder / "golden.pt")
    return SimpleNamespace(student=student, vae=vae, options=BundleOptions(vae=vae, steps=2))


@pytest.fixture(scope="module")
def exported(parts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    progress: list[tuple[str, int, int]] = []
    output = tmp_path_factory.mktemp("out") / "golden-bundle"
    options = replace(parts.options, steps=STEPS)
    bundle = export_bundle(parts.student, output, options, lambda *step: progress.append(step))
    return SimpleNamespace(bundle=bundle, progress=progress)


def convert_by(monkeypatch: pytest.MonkeyPatch, write: Callable[[str, Path], None]) -> None:
    """Have the exporter's ONNX files written by ``write(component, path)``."""
    monkeypatch.setattr(
        "moebius_edge.export.onnx_file.write_onnx", lambda module, component, path, *more: write(component.name, path)
    )


@pytest.fixture
def converted(exported: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter as it is, but for the conversion: it is given the files that were made once."""
    convert_by(monkeypatch, lambda name, path: shutil.copy(exported.bundle.component_path(name), path))


def reference(parts: SimpleNamespace) -> TorchRuntime:
    source = find_source(parts.student, parts.vae, None)
    config = load_config(source)
    contract = resolved_components(8 * config.latent_size, config.deep_channels)
    return TorchRuntime(load_student(source, config), load_vae(source), contract)


def test_latents_of_another_number_of_channels(parts: SimpleNamespace, tmp_path: Path) -> None:
    student = save_student(tmp_path / "wide.pt", replace(CONFIG, latent_channels=6))
    options = replace(parts.options, vae=save_vae(tmp_path / "vae", latent_channels=6))
    bundle = export_bundle(student, tmp_path / "bundle", options)
    assert bundle.latent_channels == 6 and bundle.gate["psnr_db"] >= 60
    assert [t.shape[1] for t in bundle.components[DENOISER].inputs[:1]] == [13]
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    hole = np.zeros((64, 64), bool)
    hole[24:40, 24:40] = True
    with Inpainter(bundle, runtime="onnxruntime") as inpainter:
        filled = inpainter.inpaint(picture, hole, steps=2, feather=0).image
    assert (filled[~hole] == picture[~hole]).all() and (filled[hole] != picture[hole]).any()


# What was written


def test_the_gate_is_passed_and_kept(exported: SimpleNamespace) -> None:
    bundle = Bundle.load(exported.bundle.path, verify=True)
    gate = bundle.gate
    assert 60 <= gate["psnr_db"] < 200, "an exact match would mean that the file was not run"
    assert gate["steps_executed"] == len(gate["latent_drift"]) == int(STEPS * 0.99)
    assert gate["latent_max_difference"] == max(gate["latent_drift"]) > 0
    assert gate["ssim"] > 0.99999 and gate["worst_pixel"]["difference"] == gate["image_max_difference"] > 0
    assert gate["reference_image_std"] > 0.01, "a flat picture would pass any floor"
    assert (gate["steps"], gate["guidance"], gate["seed"]) == (STEPS, 2.0, 20)
    assert (gate["start"], gate["strength"], gate["scheduler"]) == ("image", 0.99, "ddim")
    assert (gate["min_psnr_db"], gate["runtime"]) == (60, "onnxruntime")
    assert 0 <= gate["shallow_difference"] <= 1e-4
    assert bundle.defaults == {"steps": STEPS, "guidance": 2.0, "start": "image"}
    stages = {"load weights, VAE scaling factor 0.13025", *(f"export {n}" for n in NAMES), "gate, PyTorch"}
    assert stages <= {what for what, _, _ in exported.progress}
    assert exported.progress.count(("gate, onnxruntime", 3, 3)) == 1


def test_the_bundle_says_what_it_was_made_of(exported: SimpleNamespace, parts: SimpleNamespace) -> None:
    bundle = exported.bundle
    weights = parts.vae / "diffusion_pytorch_model.safetensors"
    assert bundle.source == {
        "checkpoint": {"file": "golden.pt", "sha256": sha256_file(parts.student)},
        "vae": {"file": weights.name, "sha256": sha256_file(weights)},
    }
    assert (bundle.name, bundle.precision, bundle.resolution) == ("golden-bundle", "float32", 64)
    assert bundle.scaling_factor == 0.13025
    assert StudentConfig.from_dict(bundle.model) == CONFIG
    assert set(bundle.tools) == {"moebius-edge", "torch", "onnx", "onnxscript", "onnxruntime", "diffusers"}
    assert bundle.tools["torch"] == torch.__version__


@pytest.mark.parametrize("name", NAMES)
def test_the_files_keep_the_contract(exported: SimpleNamespace, name: str) -> None:
    path = exported.bundle.component_path(name)
    model = onnx.load(path)
    own = [("moebius", 1)] if name in (DENOISER, SHALLOW) else []  # the lambda operators
    assert [(i.domain, i.version) for i in model.opset_import] == [("", 20), *own]
    component = exported.bundle.components[name]
    for values, tensors in ((model.graph.input, component.inputs), (model.graph.output, component.outputs)):
        assert list(map(signature, values)) == [(t.name, t.dtype, t.shape) for t in tensors]
    assert model.graph.name == name
    assert not any(onnx.external_data_helper.uses_external_data(t) for t in model.graph.initializer)
    data = path.read_bytes()
    assert b"site-packages" not in data and b".py" not in data, "paths of this machine are in the file"


def networks(parts: SimpleNamespace) -> dict[str, Callable[..., tuple[torch.Tensor, ...]]]:
    """The networks called directly: the gate's reference could share a mistake with the files."""
    student = fill_golden(build_student(CONFIG))
    vae = AutoencoderKL.from_pretrained(parts.vae, low_cpu_mem_usage=False).eval()

    def denoise(sample: torch.Tensor, timestep: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        denoised = student(sample, timestep, torch.arange(10) + 10 * branch[:, None])
        return denoised.noise, denoised.blocks[-2]

    return {
        DENOISER: denoise,
        "vae_encoder": lambda image: (vae.encode(image).latent_dist.mode() * 0.13025,),
        "vae_decoder": lambda latent: (vae.decode(latent / 0.13025).sample,),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_batch_equals_pytorch(exported: SimpleNamespace, parts: SimpleNamespace, name: str) -> None:
    component, generator = exported.bundle.components[name], torch.Generator().manual_seed(3)
    direct = networks(parts).get(name)
    with create_runtime("onnxruntime", exported.bundle, "cpu") as runtime, reference(parts) as torch_runtime:
        for batch in (1, 2, 3):
            inputs = {
                t.name: torch.randn([batch, *map(int, t.shape[1:])], generator=generator) for t in component.inputs
            }
            if name in (DENOISER, SHALLOW):
                inputs |= {"timestep": torch.linspace(0, 950, batch), "branch": torch.arange(batch) % 2}
            arrays = {key: value.numpy() for key, value in inputs.items()}
            ours, theirs = (r.run(name, arrays) for r in (runtime, torch_runtime))
            assert list(ours) == [t.name for t in component.outputs]
            twins = [theirs] if direct is None else [theirs, dict(zip(ours, direct(**inputs), strict=True))]
            for output, value in ((output, np.asarray(value)) for twin in twins for output, value in twin.items()):
                assert np.abs(value).max() > 0.05
                scale = np.abs(value).max() / 10 if output == DEEP else 1  # a feature has a scale of its own
                np.testing.assert_allclose(ours[output], value, atol=3e-5 * scale, rtol=0)


# The gate


def test_a_missed_gate_leaves_nothing(converted: None, parts: SimpleNamespace, tmp_path: Path) -> None:
    message = r"is 1?\d\d\.\d\d dB from the PyTorch reference, 1000 dB is the floor; the encoder .* nothing was"
    with pytest.raises(QualityError, match=message):
        export_bundle(parts.student, tmp_path / "bundle", replace(parts.options, min_psnr_db=1000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weight", ["vae.quant_conv", "network.conv_out.pointwise", "vae.decoder.conv_out"])
def test_the_gate_sees_a_wrong_graph(
    exported: SimpleNamespace, parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    """One graph's last convolution a tenth too strong: every output still looks plausible."""
    changed = []

    def write(name: str, path: Path) -> None:
        model = onnx.load(exported.bundle.component_path(name))
        for tensor in model.graph.initializer:
            if tensor.name == f"{weight}.weight":
                stronger = np.float32(1.1) * onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(stronger, tensor.name))
                changed.append(name)
        onnx.save(model, path)

    convert_by(monkeypatch, write)
    with pytest.raises(QualityError, match="60 dB is the floor"):
        export_bundle(parts.student, tmp_path / "bundle", parts.options)
    assert len(changed) == 1 and list(tmp_path.iterdir()) == []


def test_distilled_guidance_is_gated_on_one_branch(
    converted: None, parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    plain = TorchRuntime._denoise

    def counted(self: TorchRuntime, sample: Any, timestep: Any, branch: Any) -> Any:
        rows.append(branch.tolist())
        return plain(self, sample, timestep, branch)

    monkeypatch.setattr(TorchRuntime, "_denoise", counted)
    student = tmp_path / "student.safetensors"
    student.write_bytes(save(torch.load(parts.student, weights_only=True), guidance_metadata(3.0)))
    shutil.copy(parts.student.with_suffix(".json"), tmp_path / "student.json")
    bundle = export_bundle(student, tmp_path / "noted", replace(parts.options, steps=3))
    assert rows == [[0], [0]], "the conditional branch alone"
    assert (bundle.distilled_guidance, bundle.defaults["guidance"], bundle.gate["guidance"]) == (3.0, 3.0, 3.0)
    assert bundle.gate["psnr_db"] >= 60
    said = export_bundle(parts.student, tmp_path / "said", replace(parts.options, distilled_guidance=1.5))
    assert said.distilled_guidance == said.defaults["guidance"] == 1.5 and rows[2:] == [[0]]
    with pytest.raises(UsageError, match="guidance is 2.0, and the model has guidance 3.0 distilled"):
        export_bundle(student, tmp_path / "other", replace(parts.options, guidance=2.0))
    assert not (tmp_path / "other").exists()


def test_the_gate_can_be_taken_on_openvino(
    converted: None, parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install moebius-edge[openvino]")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    steps: list[str] = []
    options = replace(parts.options, gate_runtime="openvino")
    bundle = export_bundle(parts.student, tmp_path / "bundle", options, lambda what, *_: steps.append(what))
    assert bundle.gate["runtime"] == "openvino" and 60 <= bundle.gate["psnr_db"] < 200
    assert "gate, openvino" in steps and "gate, onnxruntime" not in steps
    with pytest.raises(QualityError, match="199 dB is the floor; .* try another openvino version, or lower"):
        export_bundle(parts.student, tmp_path / "none", replace(options, min_psnr_db=199.0))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MachineError, match=r"the package openvino is missing .*pip install .*moebius-edge\[openvino\]"):
        export_bundle(tmp_path / "is read later", tmp_path / "none", options)


def test_a_gate_without_a_figure_is_missed() -> None:
    metrics = {"psnr_db": 40.0, "encoded_max_difference": 0.5, "latent_drift": [0.0, 0.25]}
    judge(metrics, 40.0)
    with pytest.raises(QualityError):
        judge({**metrics, "psnr_db": math.nan}, 40.0)


def test_an_existing_output(converted: None, parts: SimpleNamespace, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "bundle.json").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not empty"):
        export_bundle(parts.student, output, parts.options)
    assert (output / "bundle.json").read_text() == "mine"
    bundle = export_bundle(parts.student, output, replace(parts.options, force=True))
    assert (bundle.name, bundle.defaults["steps"]) == ("bundle", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_what_is_exported_is_never_overwritten(parts: SimpleNamespace) -> None:
    folder, options = parts.student.parent, replace(parts.options, force=True)
    with pytest.raises(UsageError, match="holds .*golden.pt, which is being exported"):
        export_bundle(parts.student, folder, options)
    (folder / "bundle.json").write_text("a bundle, as it seems")
    with pytest.raises(UsageError, match="holds .*golden.pt, which is being exported"):
        float32_bundle(parts.student, folder, options).__enter__()
    (folder / "bundle.json").unlink()
    assert parts.student.is_file()


def test_a_float32_bundle_is_made_beside_the_output_or_taken_as_it_is(
    converted: None, parts: SimpleNamespace, tmp_path: Path
) -> None:
    with float32_bundle(parts.student, tmp_path / "int8", parts.options) as bundle:
        assert (bundle.name, bundle.precision, bundle.path.parent.parent) == ("int8", "float32", tmp_path)
    assert list(tmp_path.iterdir()) == []
    toy = make_toy_bundle(tmp_path / "toy")
    with float32_bundle(toy, tmp_path / "int8", BundleOptions()) as bundle:
        assert bundle.path == toy
    with pytest.raises(UsageError, match="is a bundle, complete as it is: leave --vae"):
        float32_bundle(toy, tmp_path / "int8", parts.options).__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BundleOptions(precision="int4"), "there is no precision 'int4': choose one of float32, float16"),
        (BundleOptions(steps=1), "1 steps make no trajectory: choose 2 to 1000"),
    ],
)
def test_unusable_options_are_refused_first(tmp_path: Path, options: BundleOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_bundle("none", tmp_path / "b", options)


def test_an_interrupt_leaves_nothing(converted: None, parts: SimpleNamespace, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "gate, PyTorch":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(parts.student, tmp_path / "bundle", parts.options, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_reference_runs_in_float32_only(parts: SimpleNamespace) -> None:
    runtime = reference(parts)
    assert runtime.info["name"] == "torch" and runtime.info["version"] == torch.__version__
    runtime._student.half()
    with pytest.raises(TypeError, match="runs in float32, and Student"), runtime:
        pass


# In FP16


@pytest.fixture(scope="module")
def half(exported: SimpleNamespace, parts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = replace(parts.options, steps=STEPS, precision="float16")
    with pytest.MonkeyPatch.context() as patch:
        convert_by(patch, lambda name, path: shutil.copy(exported.bundle.component_path(name), path))
        return export_bundle(parts.student, tmp_path_factory.mktemp("half") / "bundle", options)


def test_a_bundle_passes_its_gate_and_lists_its_islands(half: Bundle) -> None:
    assert half.precision == "float16" and half.gate["min_psnr_db"] == 40
    assert 40 <= half.gate["psnr_db"] < 100  # above float32's own differences: something was rounded
    assert set(half.float32_islands) == {"vae_encoder", "denoiser", "vae_decoder"}
    listed = half.float32_islands["denoiser"]
    assert set(ISLANDS) <= set(listed) and {"Sin", "Cos"} <= set(listed)
    assert half.precisions == {
        **dict.fromkeys((DENOISER,), {"type": "float16"}),
        **dict.fromkeys(("vae_encoder", "vae_decoder"), {"type": "float16", "divisor": 1}),
    }
    names = [n.name for n in onnx.load(half.component_path("denoiser")).graph.node]
    assert all(names.count(name) == 1 for kind in listed.values() for name in kind)


def test_its_weights_are_fp16_but_for_the_islands(half: Bundle) -> None:
    sizes = {name: weight_bytes(onnx.load(half.component_path(name))) for name in half.components}
    assert sizes["denoiser"]["FLOAT16"] > 8 * sizes["denoiser"]["FLOAT"]
    assert all(sizes[name]["FLOAT16"] > 8 * sizes[name]["FLOAT"] for name in ("vae_encoder", "vae_decoder"))
    for name in half.components:
        types = element_types(onnx.load(half.component_path(name)))
        declared = [*half.components[name].inputs, *half.components[name].outputs]
        assert all(types[t.name] == (FLOAT if t.dtype == "float32" else INT64) for t in declared)


def test_every_island_computes_in_float32_and_every_product_in_fp16(half: Bundle) -> None:
    model = onnx.load(half.component_path("denoiser"))
    types, weights = element_types(model), {t.name: t.data_type for t in model.graph.initializer}
    islands = {name for names in half.float32_islands["denoiser"].values() for name in names}
    seen = set()
    for node in model.graph.node:
        if node.op_type in ("Softmax", "InstanceNormalization", "LayerNormalization", "MatMul", "Conv", "LocalLambda"):
            wanted = FLOAT if node.name in islands else HALF
            given = [types.get(i, weights.get(i)) for i in node.input]
            assert all(t == wanted for t in given if t in (FLOAT, HALF)), node.name
            assert types[node.output[0]] == wanted, node.name
            seen.add((node.op_type, wanted))
    assert {("Softmax", FLOAT), ("MatMul", HALF), ("Conv", HALF), ("LocalLambda", HALF)} <= seen


def test_float32_with_weights_stored_in_fp16(exported: SimpleNamespace, parts: SimpleNamespace, tmp_path: Path) -> None:
    options = replace(parts.options, steps=STEPS, weights="float16")
    with pytest.MonkeyPatch.context() as patch:
        convert_by(patch, lambda name, path: shutil.copy(exported.bundle.component_path(name), path))
        bundle = export_bundle(parts.student, tmp_path / "bundle", options)
    assert bundle.precision == "float32" and 60 <= bundle.gate["psnr_db"] < exported.bundle.gate["psnr_db"]
    assert bundle.precisions == dict.fromkeys(bundle.components, {"type": "float32", "weights": "float16"})
    for name in bundle.components:
        sizes = weight_bytes(onnx.load(bundle.component_path(name)))
        assert sizes["FLOAT16"] > 8 * sizes["FLOAT"]


def test_a_node_the_oldest_tensorrt_refuses_is_named(tmp_path: Path) -> None:
    path = make_toy_bundle(tmp_path / "toy") / "denoiser.onnx"
    model = onnx.load(path)
    check_onnx(path, resolved_components(64)["denoiser"])
    unused = onnx.helper.make_node("Einsum", ["sample"], ["unused"], "the_node", equation="nchw->nc")
    model.graph.node.append(unused)
    onnx.save(model, path)
    with pytest.raises(BundleError, match=r"denoiser\.onnx is not for TensorRT 10\.3: node 'the_node' \(Einsum\)"):
        check_onnx(path, resolved_components(64)["denoiser"])
