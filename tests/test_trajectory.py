"""The trajectory on graphs whose end is known, and the scene it runs on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy import decode, encode, expected_latent, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.metrics.trajectory import Scene, draw_scene, run_trajectory
from moebius_edge.runtimes import create_runtime


def test_the_scene_is_always_the_same() -> None:
    image, hole = draw_scene(64)
    assert image.shape == (1, 3, 64, 64) and image.dtype == np.float32 and np.abs(image).max() <= 1
    assert image.std() > 0.2 and 0.05 < hole.mean() < 0.3
    assert np.array_equal(image, draw_scene(64)[0]) and not np.array_equal(image, draw_scene(64, seed=1)[0])


def chequered() -> Scene:
    """A scene of one's own: 8x8 blocks, the hole four of them."""
    blocks = np.random.default_rng(5).uniform(-0.5, 0.5, (1, 3, 8, 8)).astype(np.float32)
    hole = np.zeros((64, 64), bool)
    hole[16:32, 24:40] = True
    return blocks.repeat(8, 2).repeat(8, 3), hole


@pytest.mark.parametrize("scene", [None, chequered()])
def test_it_ends_where_any_correct_sampler_ends(tmp_path: Path, scene: Scene | None) -> None:
    runtime = create_runtime("onnxruntime", Bundle.load(make_toy_bundle(tmp_path / "toy")), "cpu")
    steps: list[tuple[int, int]] = []
    trajectory = run_trajectory(
        runtime, steps=6, guidance=1.5, scene=scene, on_step=lambda done, total: steps.append((done, total))
    )
    assert steps == [(i, 5) for i in range(1, 6)] and len(trajectory.latents) == 5
    image, hole = draw_scene(64) if scene is None else scene
    masked = encode(image * ~hole)
    np.testing.assert_allclose(trajectory.encoded, np.concatenate([encode(image), masked]), atol=1e-5)
    cells = hole.reshape(8, 8, 8, 8).any(axis=(1, 3))
    if scene is not None:  # on whole blocks the latent mask needs no rounding
        end = expected_latent(cells[None, None].astype(np.float32), masked, 1.5)
        np.testing.assert_allclose(trajectory.latents[-1], end, atol=1e-4)
    np.testing.assert_allclose(trajectory.image, decode(trajectory.latents[-1]), atol=1e-5)
    assert not runtime.active


def test_distilled_guidance_ends_where_guiding_does(tmp_path: Path) -> None:
    """The unconditional branch of the distilled toy is NaN: it is not run."""
    ends = []
    for distilled, guidance in ((None, 1.5), (1.5, 1)):
        folder = make_toy_bundle(tmp_path / str(distilled), distilled_guidance=distilled)
        runtime = create_runtime("onnxruntime", Bundle.load(folder), "cpu")
        ends.append(run_trajectory(runtime, steps=4, guidance=guidance, on_step=lambda done, total: None).image)
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-5)


def test_an_active_runtime_is_left_active(tmp_path: Path) -> None:
    with create_runtime("onnxruntime", Bundle.load(make_toy_bundle(tmp_path / "toy")), "cpu") as runtime:
        images = [run_trajectory(runtime, steps=3, guidance=1, on_step=lambda *_: None).image for _ in range(2)]
        assert runtime.active
    np.testing.assert_array_equal(images[0], images[1])
