"""Simulated INT8: its numbers and gradients by hand, its blocks and its result those of the exported INT8 file."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import CONFIG
from golden import fill_golden, golden_input
from torch import Tensor

from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.calibration.blocks import Recipe, blocks
from moebius_edge.calibration.quantise import quantise, quantise_weight
from moebius_edge.errors import BundleError, UsageError
from moebius_edge.export.onnx_file import OPSET, write_onnx
from moebius_edge.export.operators import TRANSLATIONS, function_bodies
from moebius_edge.export.specialise import specialise
from moebius_edge.model import Student, build_student
from moebius_edge.training.fake_quantise import block_names, round_activation, round_weight, simulate

torch.set_num_threads(1)
LAMBDAS = sorted(
    f"{side}_blocks.{level}.attentions.{i}.{name}.lambda"
    for side, each in (("down", 1), ("up", 2))
    for level in range(2)
    for i in range(each)
    for name in ("attn1", "attn2")
)


def test_activations_are_rounded_by_hand_and_their_gradient_passes_inside_the_range() -> None:
    x = torch.tensor([[0.0, 0.24, 0.26, -0.26, 63.4, 64.0, -64.0, -64.3, 1000.0]], requires_grad=True)
    rounded = round_activation(x, (0.5,))
    assert rounded.tolist()[0] == [0, 0, 0.5, -0.5, 63.5, 63.5, -64.0, -64.0, 63.5]
    rounded.sum().backward()
    assert x.grad is not None and x.grad.tolist()[0] == [1, 1, 1, 1, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 5)])
def test_weights_are_rounded_as_the_exporter_does_and_pass_every_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 2, 6).reshape(-1, *[1] * (len(shape) - 1))
    weight[2] = 0.0
    weight.requires_grad_()
    rounded = round_weight(weight)
    whole, scale = quantise_weight(weight.detach().numpy(), 0, "w")
    expected = whole * scale.reshape(-1, *[1] * (len(shape) - 1))
    np.testing.assert_allclose(rounded.detach().numpy(), expected, rtol=1e-6)
    assert not torch.equal(rounded, weight)
    rounded.sum().backward()
    assert weight.grad is not None and weight.grad.eq(1).all()


# --- against the exporter --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The golden student's denoiser in float32, its blocks, and inputs of both branches."""
    path = tmp_path_factory.mktemp("exported") / "denoiser.onnx"
    component = resolved_components(8 * CONFIG.latent_size, CONFIG.deep_channels)["denoiser"]
    write_onnx(specialise(golden()), component, path, TRANSLATIONS, function_bodies(CONFIG, OPSET))
    model = onnx.load(str(path))
    sample = golden_input("sample", (4, 9, CONFIG.latent_size, CONFIG.latent_size))
    feeds = {"sample": sample, "timestep": np.array([1, 300, 600, 900], np.float32), "branch": np.array([0, 1, 0, 1])}
    return SimpleNamespace(model=model, blocks=[b.name for b in blocks(model)], feeds=feeds)


def golden() -> Student:
    student = fill_golden(build_student(CONFIG))
    assert isinstance(student, Student)
    return student


def predict(student: Student, feeds: dict[str, np.ndarray]) -> Tensor:
    prompts = torch.arange(2 * CONFIG.num_prompts).reshape(2, -1)
    sample, timestep, branch = (torch.from_numpy(feeds[name]) for name in ("sample", "timestep", "branch"))
    noise: Tensor = student(sample, timestep, prompts[branch]).noise
    return noise


def plain_path(node: onnx.NodeProto) -> str:
    """The name that the simulation gives the input of an exported product."""
    namespace = next(p.value for p in node.metadata_props if p.key == "namespace")
    path = [part.split(":")[0] for part in namespace.split("/") if part.strip().startswith("network.")][-1]
    path = path.removeprefix("network.").replace(".depthwise", ".conv_dw").replace(".pointwise", ".conv_pw")
    path = re.sub(r"(attentions\.\d+)\.(attn\d|ff)", r"\1.transformer_blocks.0.\2", path)
    path = re.sub(r"\.phases\.\d$", ".conv", path)
    path = re.sub(r"\.ff\.ups\.\d$", ".ff.inverted_conv.conv", path).replace(".ff.down", ".ff.point_conv.conv")
    return re.sub(r"\.ff\.deeps\.(\d)$", r".ff.depth_conv.conv[\1]", path)


def test_the_blocks_are_those_of_the_exported_file(exported: SimpleNamespace) -> None:
    simulation = simulate(golden(), exported.blocks)
    assert simulation.left == LAMBDAS
    assert set(LAMBDAS) < set(exported.blocks)
    with pytest.raises(UsageError, match="names blocks that the model does not have: conv_9: remove them"):
        simulate(golden(), [*exported.blocks, "conv_9"])


def test_parameters_keep_their_names_and_order(exported: SimpleNamespace) -> None:
    student = golden()
    names, values = zip(*student.named_parameters(), strict=True)
    state = list(student.state_dict())
    simulate(student, exported.blocks)
    assert [n for n, _ in student.named_parameters()] == list(names) and list(student.state_dict()) == state
    assert all(a is b for (_, a), b in zip(student.named_parameters(), values, strict=True))


@torch.no_grad()
def test_until_it_has_scales_it_is_the_float_student(exported: SimpleNamespace) -> None:
    student = golden()
    expected = predict(student, exported.feeds)
    simulate(student, exported.blocks)
    torch.testing.assert_close(predict(student, exported.feeds), expected, rtol=1e-4, atol=1e-5)


def compared(exported: SimpleNamespace, chosen: list[str]) -> tuple[float, float]:
    """How near the simulation comes to the INT8 file with the same scales, and how near float32 does: dB."""
    student = golden()
    simulation = simulate(student, chosen)
    simulation.calibrate([lambda: predict(student, exported.feeds)], "mse")
    constants = {t.name for t in exported.model.graph.initializer}
    scales: dict[str, float] = {}
    for node in exported.model.graph.node:
        for name in node.input[:2]:
            if node.op_type in ("Conv", "Gemm", "MatMul") and name not in constants:
                path = plain_path(node)
                if path in simulation.scales:
                    assert scales.setdefault(name, simulation.scales[path]) == simulation.scales[path], path
    int8 = quantise(exported.model, Recipe(dict.fromkeys(chosen, True)), scales)
    file, unrounded = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, exported.feeds
        )[0]
        for m in (int8, exported.model)
    )
    with torch.no_grad():
        ours = predict(student, exported.feeds).numpy()
    errors = [np.square(a - file).mean() / np.square(file).mean() for a in (ours, unrounded)]
    return float(-10 * np.log10(errors[0])), float(-10 * np.log10(errors[1]))


UP = "up_blocks.0"  # a shortcut, an upsampler, and a skip connection behind it


@pytest.mark.parametrize(
    "block",
    [
        "time_embedding",
        "conv_in.depthwise",
        "conv_in",
        "down_blocks.0.downsamplers.0.conv",
        "down_blocks.1.resnets.0.time_emb_proj",
        f"{UP}.resnets.0.conv_shortcut",
        f"{UP}.attentions.0.proj_in",
        f"{UP}.attentions.0.attn1",
        f"{UP}.attentions.0.attn2",
        f"{UP}.attentions.0.ff",
        f"{UP}.attentions.0.ff.depthwise",
        f"{UP}.attentions.0.proj_out",
        f"{UP}.upsamplers.0.phases",
    ],
)
def test_a_block_is_rounded_as_in_the_exported_file(exported: SimpleNamespace, block: str) -> None:
    """To float32's rounding (some 116 dB), but where a value half way between two integers goes the other way."""
    ours, unrounded = compared(exported, [block])
    assert ours > unrounded + 15 and ours > 65 and unrounded < 70


# --- what is refused -------------------------------------------------------------------------------------


def test_a_recipe_of_nothing_that_is_simulated_is_refused() -> None:
    message = r"quantises nothing that training simulates \(down_blocks.0.attentions.0.attn1.lambda\): name conv"
    with pytest.raises(UsageError, match=message):
        simulate(golden(), LAMBDAS[:1])
    with pytest.raises(UsageError, match=r"nothing that training simulates \(no block at all\)"):
        simulate(golden(), [])


def test_ranges_that_are_zero_or_not_finite_are_named(exported: SimpleNamespace) -> None:
    ff, path = f"{UP}.attentions.0.ff", f"{UP}.attentions.0.transformer_blocks.0.ff"
    student = golden()
    mixed = student.diff_model.get_submodule(path)
    with torch.no_grad():
        half = len(mixed.inverted_conv.conv.bias) // 2
        mixed.inverted_conv.conv.weight[half:] = 0
        mixed.inverted_conv.conv.bias[half:] = 0
    simulation = simulate(student, [f"{ff}.depthwise"])
    forward = [lambda: predict(student, exported.feeds)]
    with pytest.raises(UsageError, match=rf"range of activation {path}.depth_conv.conv\[1\] is 0, which has no scale"):
        simulation.calibrate(forward, "mse")
    with torch.no_grad():
        mixed.inverted_conv.conv.bias[0] = float("inf")
    with pytest.raises(BundleError, match=rf"activation {path}.depth_conv.conv\[0\] of the student is not finite"):
        simulation.calibrate(forward, "mse")


def test_a_recipe_is_checked_against_the_student_s_shape() -> None:
    names = block_names(CONFIG)
    Recipe({"conv_out": True, f"{UP}.upsamplers.0.phases": False}).check(names)
    with pytest.raises(UsageError, match="does not have: up_blocks.1.upsamplers.0.phases: remove them, or use"):
        Recipe({"conv_in": True, "up_blocks.1.upsamplers.0.phases": False}).check(names)
