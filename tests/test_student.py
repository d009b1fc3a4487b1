"""The student against the published network's recorded numbers, and what export and training rely on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from golden import check_against_golden, fill_golden, golden_input, golden_keys, golden_numbers

from moebius_edge.errors import BundleError, UsageError
from moebius_edge.model import StudentConfig, TeacherConfig, build_student, build_teacher
from moebius_edge.model.lambdas import LocalLambda, PositionConv, interactive_lambda, position_product

SMALL = StudentConfig(
    block_out_channels=(32, 64, 128),
    num_heads=4,
    cross_attention_dim=48,
    prompt_embedding_dim=64,
    latent_size=16,
)
SMALL_TEACHER = TeacherConfig((32, 64, 128, 128), num_heads=4, cross_attention_dim=48, prompt_embedding_dim=64)
NARROW = dataclasses.replace(
    SMALL, block_out_channels=(32, 32), num_heads=2, latent_size=8, window=5, layers_per_block=1
)


@pytest.mark.parametrize(
    ("network", "size", "config"),
    [
        ("student", "full", StudentConfig()),
        ("student", "small", SMALL),
        ("teacher", "full", TeacherConfig()),
        ("teacher", "small", SMALL_TEACHER),
    ],
)
def test_keys_and_shapes_are_the_checkpoints(network, size, config):
    with torch.device("meta"):
        module = build_student(config) if network == "student" else build_teacher(config)
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == golden_keys(network, size)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert type(config).from_dict({}) == type(config)()


def test_small_reproduces_the_recorded_numbers():
    check_against_golden(fill_golden(build_student(SMALL)), "student_small", sample_tolerance=2e-5, size=16)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_full_reproduces_the_recorded_numbers():
    check_against_golden(fill_golden(build_student()), "student_full", sample_tolerance=2e-5, size=64)


@pytest.mark.parametrize(("change", "text"), [(1e-4, "1[.]..e-04"), (float("nan"), "nan")])
def test_the_golden_comparison_can_fail(change, text):
    student = fill_golden(build_student(SMALL))
    with torch.no_grad():
        student.diff_model.conv_out.bn2.bias[0] += change
    with pytest.raises(AssertionError, match=f"student_small sample: off by {text}"):
        check_against_golden(student, "student_small", sample_tolerance=2e-5, size=16)


def test_timesteps_may_be_float_or_int_and_differ_per_row():
    student = fill_golden(build_student(SMALL))
    numbers = golden_numbers("student_small")
    sample = torch.from_numpy(golden_input("student_small", (2, 9, 16, 16)))
    ids = torch.stack([torch.arange(10, 20), torch.arange(10)])
    with torch.no_grad():
        mixed = student(sample, torch.tensor([999.0, 1.0]), ids).noise.numpy()
    assert abs(mixed[0] - numbers["sample_t999"][0]).max() < 2e-5
    assert abs(mixed[1] - numbers["sample_t1"][1]).max() < 2e-5


def test_the_shallow_part_is_the_whole_given_its_own_deep_feature():
    network = fill_golden(build_student(SMALL))
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 9, 16, 16, generator=generator)
    timesteps, ids = torch.tensor([0, 937]), torch.stack([torch.arange(10), torch.arange(10, 20)])
    with torch.no_grad():
        whole = network(sample, timesteps, ids)
        deep = whole.blocks[-2]
        assert deep.shape == (2, network.config.deep_channels, 16, 16)
        assert torch.equal(network.shallow(sample, timesteps, ids, deep), whole.noise)
        other = network.shallow(sample, timesteps, ids, 0.9 * deep)
    assert (other - whole.noise).abs().max() > 0.01 * whole.noise.abs().max()


@pytest.mark.parametrize(
    ("config", "level"),
    [(NARROW, 1), (SMALL, 2), (dataclasses.replace(SMALL, block_out_channels=(32, 64, 64, 96)), 3)],
)
def test_coarse_feature_and_layer_end_the_last_down_block(config, level):
    student = build_student(config)
    names = {id(module): name for name, module in student.named_modules()}
    last = config.layers_per_block - 1
    assert names[id(student.output_layer)] == "diff_model.conv_out.conv_pw"
    assert names[id(student.coarse_layer)] == f"diff_model.down_blocks.{level}.attentions.{last}.proj_out"
    seen = []
    student.diff_model.down_blocks[level].register_forward_hook(lambda m, i, output: seen.append(output[0]))
    size = config.latent_size
    out = student(torch.randn(1, 9, size, size), torch.tensor([5]), torch.arange(10)[None])
    assert student.coarse_feature(out) is seen[0]
    assert seen[0].shape == (1, config.block_out_channels[-1], size >> level, size >> level)


def test_interactive_lambda_is_its_definition():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 6, dtype=torch.double), torch.rand(2, 5, 10, dtype=torch.double)
    v, e = torch.randn(2, 4, 10, dtype=torch.double), torch.randn(6, 10, 5, dtype=torch.double)
    content = torch.einsum("nkm,nvm->nkv", k, v)
    position = torch.einsum("pmk,nvm->npkv", e, v)
    expected = torch.einsum("nhkp,npkv->nhvp", q, content[:, None] + position)
    torch.testing.assert_close(interactive_lambda(q, k, v, e), expected)


def test_local_lambda_is_its_definition():
    """The lambdas written out, content and position, with the stored 3-D convolution; a grid that is not square."""
    torch.manual_seed(0)
    module = LocalLambda(32, heads=2, window=15).eval()
    x = torch.randn(2, 32, 6, 7)
    with torch.no_grad():
        q = module.norm_q(module.to_q(x)).reshape(2, 2, 16, 42)
        k = module.to_k(x).flatten(2).softmax(-1)
        v = module.norm_v(module.to_v(x))
        position = module.pos_conv(v.unsqueeze(1)).flatten(3)  # (N, K, V, P)
        lambdas = position + torch.einsum("nkm,nvm->nkv", k, v.flatten(2))[..., None]
        expected = torch.einsum("nhkp,nkvp->nhvp", q, lambdas).reshape(x.shape)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_position_convolution_has_the_gradients_of_conv2d():
    torch.manual_seed(0)
    shapes = ((6, 1, 9, 7), (4, 1, 5, 5), (4,))
    inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    ours, reference = PositionConv.apply(*inputs), F.conv2d(*inputs, padding=2)
    torch.testing.assert_close(ours, reference)
    weights = torch.randn_like(ours)
    expected = torch.autograd.grad(reference, inputs, weights)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, weights), expected)


@pytest.mark.parametrize(("grid", "window"), [((8, 8), 15), ((9, 7), 5), ((16, 16), 15)])
def test_the_position_product_is_the_convolution(grid, window):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((6, 1, *grid), (4, 1, window, window), (4,))]
    ours, reference = position_product(*inputs), F.conv2d(*inputs, padding=window // 2)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    weights = torch.randn_like(ours)
    expected = torch.autograd.grad(reference, inputs, weights)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, weights), expected, rtol=1e-4, atol=1e-3)


def test_training_reaches_every_weight_and_moves_the_batch_norms():
    student = build_student(NARROW)
    assert student.training
    before = {k: v.clone() for k, v in student.named_buffers() if k.endswith("running_mean")}
    torch.manual_seed(0)
    inputs = torch.randn(3, 9, 8, 8), torch.tensor([1, 500, 999]), torch.arange(10).expand(3, 10)
    student(*inputs).noise.square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    assert not any(torch.equal(mean, student.get_buffer(name)) for name, mean in before.items())


@pytest.mark.parametrize("shape", [(1, 9, 16, 16), (1, 4, 8, 8), (1, 9, 8, 4)])
def test_another_latent_size_is_refused(shape):
    student = build_student(NARROW).eval()
    with pytest.raises(UsageError, match=r"takes \(N, 9, 8, 8\), that is images of 64x64 only"):
        student(torch.zeros(shape), torch.zeros(1), torch.arange(10)[None])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1, "window": 0}, "colour is an unknown field: .*pip install --upgrade"),
        ({"num_heads": "8"}, "num_heads is '8', expected a valid integer"),
        ({"num_heads": 0}, "num_heads is 0, expected greater than or equal to 1"),
        ({"num_heads": 3}, "320 channels do not divide into 3 heads"),
        ({"window": 4}, "window 4 has no centre"),
        ({"window": 257}, "window is 257, expected less than or equal to 255"),
        ({"latent_size": 18}, "latent_size 18 does not halve"),
        ({"latent_size": 2**40}, "latent_size is 1099511627776, expected less than or equal to 1024"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000, expected less than or equal to 16"),
        ({"block_out_channels": 320}, "block_out_channels is 320, expected a valid tuple"),
        ({"block_out_channels": [320, None]}, "block_out_channels.1 is None, expected a valid integer"),
        ({"block_out_channels": [32, 48]}, "block_out_channels.1 is 48, expected a multiple of 32"),
        ({"block_out_channels": [32] * 9}, "block_out_channels is .*, expected to have at most 8 items"),
        ({"block_out_channels": [32]}, "block_out_channels is .*, expected to have at least 2 items"),
        ({"mix_ffn_ratio": float("nan")}, "mix_ffn_ratio is nan, expected a finite number"),
        ({"mix_ffn_ratio": 0.0}, "mix_ffn_ratio is 0.0, expected greater than"),
        ({"mix_ffn_ratio": 1e300}, "mix_ffn_ratio is 1e\\+300, expected less than or equal to 64"),
        ({"gate_rank": 16}, "it describes a teacher, and a student is wanted: .*train --teacher FILE"),
    ],
)
def test_a_config_that_makes_no_network_is_refused(values, message):
    with pytest.raises(UsageError if "gate_rank" in values else BundleError, match=message):
        StudentConfig.from_dict(values)
    with pytest.raises(BundleError, match="32 channels do not give 32 heads keys of half width"):
        TeacherConfig.from_dict({"block_out_channels": [32, 64], "num_heads": 32})
