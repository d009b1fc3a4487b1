"""IO binding, really executed on the CPU: the same results, buffers that are kept, arrays that are the caller's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from toy import encode, make_toy_bundle

from moebius_edge.bundle import Bundle
from moebius_edge.runtimes.binding import BoundSession


@pytest.fixture
def bound(tmp_path: Path) -> BoundSession:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    session = onnxruntime.InferenceSession(bundle.component_path("vae_encoder"), providers=["CPUExecutionProvider"])
    return BoundSession(onnxruntime, session, bundle.components["vae_encoder"], "cpu")


def image(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).uniform(-1, 1, (batch, 3, 64, 64)).astype(np.float32)}


def test_results_are_those_of_a_plain_run(bound: BoundSession) -> None:
    for batch in (1, 3, 1):
        feeds = image(batch, seed=batch)
        np.testing.assert_allclose(bound.run(feeds)["latent"], encode(feeds["image"]), atol=1e-5)


def test_a_result_outlives_the_next_call(bound: BoundSession) -> None:
    first = bound.run(image(1, seed=1))["latent"]
    kept = first.copy()
    assert not np.array_equal(bound.run(image(1, seed=2))["latent"], kept)
    assert np.array_equal(first, kept)
    first[...] = 0  # nor does writing to it reach the buffers
    assert np.array_equal(bound.run(image(1, seed=1))["latent"], kept)


def test_buffers_are_allocated_once_for_each_batch_size(bound: BoundSession, monkeypatch: pytest.MonkeyPatch) -> None:
    real, shapes = onnxruntime.OrtValue.ortvalue_from_shape_and_type, []

    def counted(shape: list[int], *rest: Any) -> Any:
        shapes.append(tuple(shape))
        return real(shape, *rest)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", counted)
    for _ in range(3):
        bound.run(image(1))
        bound.run(image(2))
    assert shapes == [(1, 3, 64, 64), (1, 4, 8, 8), (2, 3, 64, 64), (2, 4, 8, 8)]
