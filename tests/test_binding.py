"""IO binding, really executed on the CPU: the same results, buffers that are kept, arrays that are the caller's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from toy import encode, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
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
        np.testing.assert_allclose(bound.run(feeds, ["latent"])["latent"], encode(feeds["image"]), atol=1e-5)


def test_a_result_outlives_the_next_call(bound: BoundSession) -> None:
    first = bound.run(image(1, seed=1), ["latent"])["latent"]
    kept = first.copy()
    assert not np.array_equal(bound.run(image(1, seed=2), ["latent"])["latent"], kept)
    assert np.array_equal(first, kept)
    first[...] = 0  # nor does writing to it reach the buffers
    assert np.array_equal(bound.run(image(1, seed=1), ["latent"])["latent"], kept)


def test_buffers_are_allocated_once_for_each_batch_size(bound: BoundSession, monkeypatch: pytest.MonkeyPatch) -> None:
    real, shapes = onnxruntime.OrtValue.ortvalue_from_shape_and_type, []

    def counted(shape: list[int], *rest: Any) -> Any:
        shapes.append(tuple(shape))
        return real(shape, *rest)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", counted)
    for _ in range(3):
        bound.run(image(1), ["latent"])
        bound.run(image(2), ["latent"])
    assert shapes == [(1, 3, 64, 64), (1, 4, 8, 8), (2, 3, 64, 64), (2, 4, 8, 8)]


def test_what_is_not_wanted_stays_on_the_device(tmp_path: Path) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))
    session = onnxruntime.InferenceSession(bundle.component_path("denoiser"), providers=["CPUExecutionProvider"])
    both = BoundSession(onnxruntime, session, bundle.components["denoiser"], "cpu")
    feeds = {"sample": np.ones((2, 9, 8, 8), np.float32), "timestep": np.full(2, 500, np.float32)}
    feeds["branch"] = np.arange(2)
    whole = both.run(feeds, ["noise", "deep"])
    read = []
    class Counted:
        def __init__(self, buffer: Any, name: str) -> None:
            self.buffer, self.name = buffer, name

        def numpy(self) -> np.ndarray:
            read.append(self.name)
            return self.buffer.numpy()

    for name, buffer in both._sets[2].outputs.items():
        both._sets[2].outputs[name] = Counted(buffer, name)
    made = both.run(feeds, ["noise"])
    assert read == ["noise"] and list(made) == ["noise"]
    np.testing.assert_array_equal(made["noise"], whole["noise"])
