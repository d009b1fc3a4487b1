"""Where nodes ran: read from a real profile, and judged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import MachineError
from moebius_edge.runtimes.placement import check_placement, node_counts, read_placement

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def test_a_real_profile_is_read(tmp_path: Path) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(bundle.component_path("vae_encoder"), options, providers=[CPU])
    session.run(None, {"image": np.zeros((1, 3, 64, 64), np.float32)})
    placement = read_placement(Path(session.end_profiling()))
    assert placement == {CPU: Counter({"AveragePool": 1, "Conv": 1})}
    assert node_counts({"vae_encoder": placement}) == {"vae_encoder": {CPU: 2}}


def test_shape_arithmetic_may_stay_on_the_cpu() -> None:
    check_placement("denoiser", {CUDA: Counter(Conv=40), CPU: Counter(Shape=3, Gather=2)}, CUDA, "cuda")


@pytest.mark.parametrize("operator", ["Conv", "FusedMatMul", "QLinearConv", "Gemm", "Einsum"])
def test_a_product_left_to_the_cpu_is_an_error(operator: str) -> None:
    placement = {CUDA: Counter(Add=40), CPU: Counter({operator: 2, "Shape": 1})}
    with pytest.raises(MachineError, match=f"denoiser would run 2 {operator} on the CPU, for {CUDA} has no kernel"):
        check_placement("denoiser", placement, CUDA, "cuda")


@pytest.mark.parametrize(("placement", "text"), [({CPU: Counter(Conv=3)}, "3 on CPUE"), ({}, "none at all")])
def test_a_provider_without_a_node_is_an_error(placement: dict, text: str) -> None:
    with pytest.raises(MachineError, match=rf"executes no node of denoiser \({text}"):
        check_placement("denoiser", placement, CUDA, "cuda")
