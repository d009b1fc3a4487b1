"""The teacher against the published network's recorded numbers; its attention's forms against each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from golden import check_against_golden, fill_golden
from test_student import SMALL_TEACHER as SMALL

from moebius_edge.errors import UsageError
from moebius_edge.model import build_teacher, gla


def recurrent_gla(q, k, v, g):
    """The recurrence of ``gla``, token by token: the reference. Shapes as in ``chunked_gla``."""
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])  # (N, H, K, V)
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, dim=1) * q.shape[-1] ** -0.5


def attention_inputs(tokens, heads=3, keys=4, values=5, forget=0.3, dtype=torch.float64, device="cpu"):
    batch = 2
    torch.manual_seed(tokens)
    q, k = torch.randn(2, batch, tokens, heads, keys, dtype=dtype).unbind()
    v = torch.randn(batch, tokens, heads, values, dtype=dtype)
    g = -forget * torch.rand(batch, tokens, heads, keys, dtype=dtype)
    return tuple(x.to(device) for x in (q, k, v, g))


def test_small_reproduces_the_recorded_numbers():
    check_against_golden(fill_golden(build_teacher(SMALL)), "teacher_small", sample_tolerance=1e-4, size=16)


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 16), (15, 16), (16, 16), (17, 16), (256, 16), (70, 1)])
def test_chunked_is_the_recurrence(tokens, chunk):
    inputs = attention_inputs(tokens)
    torch.testing.assert_close(gla.chunked_gla(*inputs, chunk=chunk), recurrent_gla(*inputs))
    assert torch.equal(gla.gated_linear_attention(*inputs), gla.chunked_gla(*inputs))


@pytest.mark.parametrize("forget", [0.0, 1e-4, 20.0, 1e4])
def test_chunked_is_stable_however_fast_it_forgets(forget):
    inputs = attention_inputs(200, forget=forget, dtype=torch.float32)
    exact = recurrent_gla(*(x.double() for x in inputs))
    chunked = gla.chunked_gla(*inputs)
    assert bool(chunked.isfinite().all())
    assert float((chunked.double() - exact).abs().max()) < 1e-5 * float(exact.abs().max())


def test_chunked_has_the_recurrences_gradients():
    gradients = []
    for form in (gla.chunked_gla, recurrent_gla):
        inputs = [x.requires_grad_() for x in attention_inputs(37)]
        gradients.append(torch.autograd.grad(form(*inputs).square().sum(), inputs))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference)


def test_chunked_keeps_half_precision_to_its_ends():
    inputs = attention_inputs(300, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gla.chunked_gla(*(x.bfloat16() for x in inputs[:3]), inputs[3])
    assert out.dtype == torch.bfloat16
    exact = recurrent_gla(*(x.bfloat16().double() for x in inputs[:3]), inputs[3].double())
    assert float((out.double() - exact).abs().max()) < 0.005 * float(exact.abs().max())


@pytest.mark.gpu
def test_the_fused_kernel_is_the_recurrence():
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    inputs = attention_inputs(1000, heads=8, keys=20, values=40, dtype=torch.float32, device="cuda")
    exact = recurrent_gla(*(x.double() for x in inputs))
    assert gla._fused_gla() is not None
    fused = gla.gated_linear_attention(*inputs)
    # The kernel works in TF32.
    assert float((fused.double() - exact).abs().max()) < 0.005 * float(exact.abs().max())


@pytest.mark.parametrize("shape", [(1, 9, 12, 16), (1, 9, 16, 20), (1, 8, 16, 16), (9, 16, 16)])
def test_a_sample_it_cannot_halve_is_refused(shape):
    with torch.device("meta"):
        teacher = build_teacher(SMALL)
    with pytest.raises(UsageError, match=r"takes \(N, 9, h, w\) with h and w multiples of 8"):
        teacher(torch.zeros(shape, device="meta"), torch.zeros(1), torch.arange(10)[None])


def test_encode_is_forward_up_to_the_mid_block():
    teacher = fill_golden(build_teacher(SMALL))
    inputs = torch.randn(2, 9, 16, 16), torch.tensor([3, 700]), torch.arange(10).expand(2, 10)
    with torch.no_grad():
        blocks = teacher(*inputs).blocks
        teacher.diff_model.up_blocks = torch.nn.ModuleList()
        encoded = teacher.encode(*inputs)
    assert len(encoded) == 5 and len(blocks) == 9
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(encoded, blocks, strict=False))
    with pytest.raises(UsageError, match="multiples of 8"):
        teacher.encode(inputs[0][..., :12], *inputs[1:])


@pytest.mark.parametrize("channels", [(32, 64), (32, 64, 96), (32, 64, 128, 160)])
def test_coarse_feature_is_the_first_up_blocks_output(channels):
    teacher = build_teacher(dataclasses.replace(SMALL, block_out_channels=channels, layers_per_block=1))
    seen = []
    teacher.diff_model.up_blocks[0].register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.no_grad():
        out = teacher(torch.randn(1, 9, 16, 16), torch.tensor([5]), torch.arange(10)[None])
    assert teacher.coarse_feature(out) is seen[0]
    size = 16 >> (len(channels) - 2)
    assert seen[0].shape == (1, channels[-1], size, size)
