"""The main job with a network of a few lines of numpy: every result is known, and no model is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moebius_edge.bundle.bundle import SCHEDULER, Bundle
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.errors import BundleError, UsageError
from moebius_edge.imaging.masks import distance_outside
from moebius_edge.imaging.metadata import Metadata
from moebius_edge.imaging.pictures import Picture
from moebius_edge.pipeline.inpainter import Inpainter, Result
from moebius_edge.pipeline.latency import StageTimer
from moebius_edge.pipeline.loop import Step, denoise, initial_noise
from moebius_edge.runtimes import Runtime
from moebius_edge.sampling.calls import Sampling
from moebius_edge.sampling.guidance import Interval
from moebius_edge.sampling.scheduler import DDIM, DPMSolverPP2M, Scheduler
from moebius_edge.spec import LATENT_DOWNSCALE

R = 64
LATENT = R // LATENT_DOWNSCALE


BUNDLE = Bundle(
    path=Path("nowhere"),
    **dict.fromkeys(("name", "description", "licence"), "fake"),
    precision="float32",
    resolution=R,
    latent_size=LATENT,
    scaling_factor=1.0,
    **{key: {} for key in ("model", "source", "gate", "tools", "files")},
    defaults={"steps": 20, "guidance": 2.0, "start": "image"},
    scheduler=SCHEDULER,
    components=resolved_components(R),
)


class FakeRuntime(Runtime):
    """Encoder: the mean of each 8x8 block, a channel of zeros fourth. Decoder: its inverse, nearest.

    Denoiser: ``predict(x_t, mask, masked, t, branch)`` guesses the clean latent, the noise follows from it;
    so any sampler ends in the guess. By default that is what is known, and ``FILL`` in the hole.
    """

    FILL = 0.5

    def __init__(self, predict: Callable[..., np.ndarray] | None = None) -> None:
        super().__init__(resolved_components(R))
        self.predict = predict or self.known_and_fill
        self.calls: list[tuple[str, dict[str, np.ndarray]]] = []
        self.activations = 0
        self.broken: dict[str, tuple[int, float]] = {}  # component -> (call from which on, value)

    @property
    def info(self) -> dict[str, Any]:
        return {"name": "fake", "version": "1", "device": "cpu", "provider": "numpy"}

    def activate(self) -> None:
        self.activations += 1

    def deactivate(self) -> None:
        pass

    @classmethod
    def known_and_fill(
        cls, x: np.ndarray, mask: np.ndarray, masked: np.ndarray, t: int, branch: np.ndarray
    ) -> np.ndarray:
        return np.where(mask > 0, np.float32(cls.FILL), masked)

    def called(self, component: str) -> list[dict[str, np.ndarray]]:
        return [feeds for name, feeds in self.calls if name == component]

    def _run(self, component: str, feeds: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.calls.append((component, feeds))
        out = getattr(self, f"_{component}")(**feeds)
        since, value = self.broken.get(component, (10**9, 0.0))
        if len(self.called(component)) >= since:
            next(iter(out.values())).flat[7] = value
        return {name: out[name] for name in outputs}

    def _vae_encoder(self, image: np.ndarray) -> dict[str, np.ndarray]:
        s = LATENT_DOWNSCALE
        means = image.reshape(len(image), 3, LATENT, s, LATENT, s).mean(axis=(3, 5))
        return {"latent": np.concatenate([means, np.zeros_like(means[:, :1])], axis=1)}

    def _vae_decoder(self, latent: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": latent[:, :3].repeat(LATENT_DOWNSCALE, 2).repeat(LATENT_DOWNSCALE, 3)}

    def _denoiser(self, sample: np.ndarray, timestep: np.ndarray, branch: np.ndarray) -> dict[str, np.ndarray]:
        x, mask, masked = sample[:, :4], sample[:, 4:5], sample[:, 5:]
        t = int(timestep[0])
        alpha = np.float32(DDIM(20).alpha_bar(t))
        guess = self.predict(x, mask, masked, t, branch)
        return {"noise": ((x - np.sqrt(alpha) * guess) / np.sqrt(1 - alpha)).astype(np.float32)}


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (150, 170, 3), dtype=np.uint8)


@pytest.fixture
def hole() -> np.ndarray:
    mask = np.zeros((150, 170), bool)
    mask[60:80, 70:100] = True
    return mask


def inpaint(image: np.ndarray | Picture, mask: np.ndarray, runtime: Runtime | None = None, **options: Any) -> Result:
    with Inpainter(BUNDLE, runtime or FakeRuntime()) as inpainter:
        return inpainter.inpaint(image, mask, **{"steps": 4, "match_colours": False, **options})


FILLED = {np.uint8: round(0.75 * 255), np.uint16: round(0.75 * 65535)}  # FILL of [-1, 1] in samples


@pytest.mark.parametrize("start", ["image", "prefill", "noise"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
def test_the_hole_is_filled_and_the_rest_is_kept(
    photo: np.ndarray, hole: np.ndarray, start: str, scheduler: str
) -> None:
    before = photo.copy()
    result = inpaint(photo, hole, start=start, scheduler=scheduler, steps=20)
    np.testing.assert_array_equal(photo, before, "the input was changed")
    inner = np.s_[62:80, 77:100]  # the cells whose top left pixel is in the hole
    assert np.abs(result.image[inner].astype(int) - FILLED[np.uint8]).max() <= 1
    beyond = distance_outside(hole) >= 4
    np.testing.assert_array_equal(result.image[beyond], photo[beyond])
    assert not np.array_equal(result.image[~beyond & ~hole], photo[~beyond & ~hole]), "the seam is blended"
    assert result.notes == []


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_depth_channels_and_alpha_are_kept(hole: np.ndarray, dtype: type, channels: int | None) -> None:
    shape = hole.shape if channels is None else (*hole.shape, channels)
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    result = inpaint(image, hole).image
    image = image[..., None] if channels is None else image
    assert result.dtype == dtype and result.shape == image.shape
    beyond = distance_outside(hole) >= 4
    np.testing.assert_array_equal(result[beyond], image[beyond])
    colours = 3 if image.shape[2] > 2 else 1
    np.testing.assert_array_equal(result[~hole][..., colours:], image[~hole][..., colours:], "alpha")
    assert (result[hole][..., colours:] == np.iinfo(dtype).max).all(), "what is filled is meant to be seen"
    tolerance = np.iinfo(dtype).max // 255
    assert np.abs(result[70:79, 77:95, :colours].astype(int) - FILLED[dtype]).max() <= tolerance


def test_what_the_network_is_fed(photo: np.ndarray, hole: np.ndarray) -> None:
    """The crop in [-1, 1], mid-grey under the mask, and the mask on the latent grid."""
    runtime = FakeRuntime()
    inpaint(photo, hole, runtime)
    masked, image = (feeds["image"] for feeds in runtime.called("vae_encoder"))
    top, left = (60 + 80 - R) // 2, (70 + 100 - R) // 2
    crop = photo[top : top + R, left : left + R].transpose(2, 0, 1)[None] / 127.5 - 1
    np.testing.assert_allclose(image, crop, atol=1e-6)
    window = hole[top : top + R, left : left + R]
    np.testing.assert_allclose(masked, np.where(window, 0, crop), atol=1e-6)
    for feeds in runtime.called("denoiser"):
        assert feeds["sample"].shape == (2, 9, LATENT, LATENT)
        np.testing.assert_array_equal(feeds["sample"][:, 4], np.stack([window[::8, ::8]] * 2))
        np.testing.assert_array_equal(feeds["branch"], [1, 0])
        np.testing.assert_array_equal(feeds["sample"][0], feeds["sample"][1])


def test_the_three_starts(photo: np.ndarray, hole: np.ndarray) -> None:
    """``image``: from the original, hole included; ``prefill``: from its surroundings; ``noise``: neither."""
    photo[:] = 200
    photo[hole] = 0  # the object
    begin: dict[str, np.ndarray] = {}
    for start in ("image", "prefill", "noise"):
        runtime = FakeRuntime()
        result = inpaint(photo, hole, runtime, start=start, steps=20)
        begin[start] = runtime.called("denoiser")[0]["sample"][0, :4]
        assert len(runtime.called("vae_encoder")) == (1 if start == "noise" else 2)
        assert result.settings["start"] == start
        assert result.settings["steps_executed"] == (20 if start == "noise" else 19)
        assert result.settings["strength"] == (1.0 if start == "noise" else 0.99)
    noise = initial_noise(0, 0, (1, 4, LATENT, LATENT))
    np.testing.assert_array_equal(begin["noise"], noise[0])
    alpha = DDIM(20).alpha_bar(900)
    latent = {s: (begin[s] - np.sqrt(1 - alpha) * noise[0]) / np.sqrt(alpha) for s in ("image", "prefill")}
    inside = np.s_[0, 3:5, 3:5]
    assert latent["image"][inside].mean() == pytest.approx(-1, abs=0.01)
    assert latent["prefill"][inside].mean() == pytest.approx(200 / 127.5 - 1, abs=0.02)
    np.testing.assert_allclose(latent["prefill"][:3], np.full((3, LATENT, LATENT), 200 / 127.5 - 1), atol=0.02)


def test_guidance_mixes_the_branches_and_at_one_runs_half(photo: np.ndarray, hole: np.ndarray) -> None:
    def predict(x: np.ndarray, mask: np.ndarray, masked: np.ndarray, t: int, branch: np.ndarray) -> np.ndarray:
        values = np.where(branch == 0, 0.1, -0.2).astype(np.float32)  # conditional, unconditional
        return np.broadcast_to(values[:, None, None, None], x.shape)

    for guidance, rows in ((1, 1), (0, 2), (1.5, 2), (2.0, 2)):
        runtime = FakeRuntime(predict)
        result = inpaint(photo, hole, runtime, guidance=guidance)
        expected = -0.2 + guidance * (0.1 + 0.2)
        assert result.image[70, 80].astype(int) == pytest.approx((expected + 1) * 127.5, abs=1)
        assert {len(f["sample"]) for f in runtime.called("denoiser")} == {rows}
        assert runtime.called("denoiser")[0]["branch"].tolist() == ([0] if rows == 1 else [1, 0])


def test_guidance_on_an_interval_runs_half_beside_it(photo: np.ndarray, hole: np.ndarray) -> None:
    def predict(x: np.ndarray, mask: np.ndarray, masked: np.ndarray, t: int, branch: np.ndarray) -> np.ndarray:
        return np.clip(x * (0.9 if t > 400 else 0.5), -1, 1) * np.where(branch == 0, 1.0, 0.7)[:, None, None, None]

    def run(guidance: float, interval: Interval | None) -> tuple[Result, list[list[int]]]:
        runtime = FakeRuntime(predict)
        result = inpaint(photo, hole, runtime, steps=10, guidance=guidance, guidance_interval=interval)
        return result, [feeds["branch"].tolist() for feeds in runtime.called("denoiser")]

    (whole, _), (everywhere, rows) = run(3.0, None), run(3.0, (0, 1000))
    assert rows == [[1, 0]] * 9 and everywhere.settings["guidance_interval"] == [0, 1000] and everywhere.notes == []
    np.testing.assert_array_equal(everywhere.image, whole.image)
    middle, rows = run(3.0, (300, 600))  # the timesteps are 800, 700, .. 0
    assert rows == [[0]] * 3 + [[1, 0]] * 3 + [[0]] * 3 and not np.array_equal(middle.image, whole.image)
    (plain, _), (none, rows) = run(1.0, None), run(3.0, (301, 400))
    assert rows == [[0]] * 9 and none.settings["guidance"] == 3.0
    np.testing.assert_array_equal(none.image, plain.image)
    assert none.notes == ["guidance interval 301,400 holds no timestep with guidance: none was applied"]


def test_distilled_guidance_runs_one_branch_and_is_stated(photo: np.ndarray, hole: np.ndarray) -> None:
    runtime = FakeRuntime()
    with Inpainter(replace(BUNDLE, distilled_guidance=3.0), runtime) as inpainter:
        for chosen in ({}, {"guidance": 3}):
            settings = inpainter.inpaint(photo, hole, steps=4, **chosen).settings
            assert (settings["guidance"], settings["distilled_guidance"]) == (3.0, 3.0)
        assert [f["branch"].tolist() for f in runtime.called("denoiser")] == [[0]] * 6
        for other in (1, 2.0):
            with pytest.raises(UsageError, match="has guidance 3.0 distilled into it and takes no other"):
                inpainter.inpaint(photo, hole, steps=4, guidance=other)
        with pytest.raises(UsageError, match="guidance interval is 0,500, and the model has guidance 3.0 distilled"):
            inpainter.inpaint(photo, hole, steps=4, guidance_interval=(0, 500))


def batch_of_three() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, mask and masked latents without a picture."""
    rng = np.random.default_rng(0)
    latents, masked = rng.standard_normal((2, 3, 4, LATENT, LATENT), np.float32)
    return latents, (rng.random((3, 1, LATENT, LATENT)) < 0.5).astype(np.float32), masked


def test_denoise_on_a_batch_without_pictures() -> None:
    _, mask, masked = given = batch_of_three()
    scheduler = DDIM(20, 0.99)
    seen: list[tuple[Step, np.ndarray]] = []
    with FakeRuntime() as runtime:
        last = denoise(runtime, *given, Sampling(scheduler, 2.0), lambda step: seen.append((step, step.latent)))
    assert [(s.index, s.total) for s, _ in seen] == [(i, 19) for i in range(1, 20)]
    assert [s.timestep for s, _ in seen] == list(range(900, -1, -50))
    feeds = runtime.called("denoiser")
    assert [f["branch"].tolist() for f in feeds] == [[1, 1, 1, 0, 0, 0]] * 19
    assert [f["timestep"][5] for f in feeds] == scheduler.timesteps
    np.testing.assert_array_equal(feeds[3]["sample"][:, :4], np.tile(seen[2][1], (2, 1, 1, 1)))
    np.testing.assert_array_equal(last, seen[-1][1])
    np.testing.assert_allclose(last, np.where(mask > 0, 0.5, masked), atol=1e-4)
    assert last.dtype == np.float32


@pytest.mark.parametrize("kind", [DDIM, DPMSolverPP2M])
def test_denoise_keeps_each_picture_where_rows_come_and_go(kind: type[Scheduler]) -> None:
    _, mask, masked = given = batch_of_three()
    with FakeRuntime() as runtime:
        last = denoise(runtime, *given, Sampling(kind(10), 2.0, (300, 700)))
    feeds = runtime.called("denoiser")
    guided = [300 <= f["timestep"][0] < 700 for f in feeds]
    assert True in guided and False in guided
    assert [f["branch"].tolist() for f in feeds] == [[1, 1, 1, 0, 0, 0] if g else [0, 0, 0] for g in guided]
    np.testing.assert_allclose(last, np.where(mask > 0, 0.5, masked), atol=1e-4)


class FakeDeepRuntime(FakeRuntime):
    """Its deep feature is the timestep it was made at, in every cell; the shallow part takes it for the fill."""

    def __init__(self) -> None:
        super().__init__(lambda x, mask, masked, t, branch: np.where(mask > 0, np.float32(t / 1000), masked))
        self.components = dict(DEEP.components)
        self.asked: list[str] = []

    def _run(self, component: str, feeds: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.asked += outputs
        return super()._run(component, feeds, outputs)

    def _denoiser(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        t = feeds["timestep"][:, None, None, None]
        return {**super()._denoiser(**feeds), "deep": np.broadcast_to(t, (len(t), 4, LATENT, LATENT))}

    def _denoiser_shallow(self, deep: np.ndarray, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        guess, self.predict = self.predict, lambda x, mask, masked, t, branch: np.where(mask > 0, deep / 1000, masked)
        made = super()._denoiser(**feeds)
        self.predict = guess
        return made


DEEP = replace(BUNDLE, deep_channels=4, components=resolved_components(R, 4))


def test_deep_features_are_those_of_the_last_full_call(photo: np.ndarray, hole: np.ndarray) -> None:
    def run(cache_interval: int, **options: Any) -> tuple[Result, list[tuple[str, int, float]]]:
        with Inpainter(DEEP, runtime := FakeDeepRuntime()) as inpainter:
            options |= {"steps": 10, "guidance": 2.0, "cache_interval": cache_interval, "match_colours": False}
            result = inpainter.inpaint(photo, hole, **options)
        calls = [(n, f) for n, f in runtime.calls if n.startswith("denoiser")]
        return result, [(n, int(f["timestep"][0]), float(f["deep"].mean()) if "deep" in f else -1) for n, f in calls]

    plain, calls = run(1)
    assert calls == [("denoiser", t, -1) for t in range(800, -1, -100)]
    assert plain.settings["cache_interval"] == 1 and plain.settings["steps_executed"] == 9
    reused, calls = run(3)
    whole = {800: 800, 500: 500, 200: 200}
    assert calls == [
        ("denoiser", t, -1) if t in whole else ("denoiser_shallow", t, max(w for w in whole if w - 300 < t < w))
        for t in range(800, -1, -100)
    ]
    assert reused.settings["cache_interval"] == 3 and reused.settings["steps_executed"] == 9
    # The last call guesses what its feature says: 0.2 of [-1, 1], and not the 0 of its own timestep.
    for result, fill in ((plain, 0.0), (reused, 0.2)):
        assert result.image[70, 80].astype(int) == pytest.approx((fill + 1) * 127.5, abs=1)
    _, calls = run(100, guidance_interval=(300, 600))  # another number of rows needs a feature of its own
    assert [t for name, t, _ in calls if name == "denoiser"] == [800, 500, 200]


@pytest.mark.parametrize(("cache_interval", "features"), [(1, 0), (3, 3), (8, 1), (100, 1)])
def test_a_feature_that_nobody_reuses_is_not_asked_for(
    photo: np.ndarray, hole: np.ndarray, cache_interval: int, features: int
) -> None:
    """It may be megabytes that travel; of nine calls the last is whole at an interval of eight."""
    with Inpainter(DEEP, runtime := FakeDeepRuntime()) as inpainter:
        inpainter.inpaint(photo, hole, steps=10, cache_interval=cache_interval)
    assert runtime.asked.count("deep") == features and runtime.asked.count("noise") == 9


def test_initial_noise_is_pinned() -> None:
    """These numbers are the same on every machine; a change of them changes every result."""
    noise = initial_noise(0, 0, (1, 4, 8, 8))
    np.testing.assert_allclose(noise[0, 0, 0, :3], [0.10189378, -0.15594129, 0.61658621], rtol=1e-6)
    assert noise.dtype == np.float32
    others = [initial_noise(1, 0, (1, 4, 8, 8)), initial_noise(0, 1, (1, 4, 8, 8))]
    assert all(np.abs(noise - other).max() > 1 for other in others)
    np.testing.assert_array_equal(noise, initial_noise(0, 0, (1, 4, 8, 8)))


def test_several_windows_count_and_draw_through(hole: np.ndarray) -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    mask = np.zeros((300, 500), bool)
    mask[20:30, 20:40] = mask[200:240, 300:330] = True
    runtime, seen = FakeRuntime(), []
    result = inpaint(image, mask, runtime, on_step=lambda s: seen.append((s.index, s.total, s.timestep)), steps=4)
    assert seen == [(i + 1, 6, t) for i, t in enumerate([500, 250, 0] * 2)]
    assert result.settings["windows"] == 2 and result.settings["network_calls"] == 6
    first, second = (runtime.called("denoiser")[i]["sample"][0, :4] for i in (0, 3))
    assert np.abs(first - second).max() > 1, "each window has its own noise"
    assert (np.abs(result.image[mask].astype(int) - FILLED[np.uint8]) <= 1).mean() > 0.6
    beyond = distance_outside(mask) >= 4
    np.testing.assert_array_equal(result.image[beyond], image[beyond])

    windows: list[Any] = []
    mask[230:240] = False  # these windows are not scaled
    inpaint(image, mask, on_window=lambda *given: windows.append(given))
    assert [window.fills for window, _, _ in windows] == [(20, 20, 30, 40), (200, 300, 230, 330)]
    for window, generated, hole in windows:
        top, left, bottom, right = window.fills
        assert hole.shape == (R, R) and hole.sum() == (bottom - top) * (right - left)
        assert generated.shape == (R, R, 3) and generated.dtype == np.float32
        assert (np.abs(generated * 255 - FILLED[np.uint8]) < 1).any()


def test_windows_that_share_no_pixel_go_through_together_where_the_runtime_gains_from_it() -> None:
    """One after the other or four in a call: the same picture, from fewer calls."""

    class Batching(FakeRuntime):
        @property
        def pictures_per_call(self) -> int:
            return 4

    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    mask = np.zeros((300, 500), bool)
    mask[20:26, 10:490] = True  # a line: each window shares pixels with the next
    mask[150:290:60, 30:490:80] = True  # specks far apart
    one, many = FakeRuntime(), Batching()
    expected, result = inpaint(image, mask, one), inpaint(image, mask, many)
    np.testing.assert_allclose(result.image.astype(int), expected.image, atol=1)
    calls = [len(runtime.called("denoiser")) for runtime in (one, many)]
    assert [made.settings["network_calls"] for made in (expected, result)] == calls and calls[1] < calls[0]
    assert result.settings["windows"] == expected.settings["windows"]
    rows = {len(feeds["branch"]) for feeds in many.called("denoiser")}
    assert min(rows) == 2 and max(rows) == 8, "the line's windows alone, four specks together"
    assert {len(feeds["image"]) for feeds in many.called("vae_encoder")} == {1}, "these need the most memory"


def test_each_window_sees_what_is_filled_already() -> None:
    image = np.full((64, 400, 3), 255, np.uint8)
    mask = np.zeros((64, 400), bool)
    mask[28:36] = True
    runtime = FakeRuntime()
    result = inpaint(image, mask, runtime)
    first, second = (feeds["image"][0] for feeds in runtime.called("vae_encoder")[:3:2])
    assert (first[:, 32] == 0).all(), "all of the line is a hole, which is mid-grey"
    share = (np.abs(second[:, 32] - FakeRuntime.FILL) < 0.01).mean()
    assert 0.1 < share < 0.5, "the next window's left part is filled"
    assert (np.abs(result.image[mask].astype(int) - FILLED[np.uint8]) <= 1).mean() > 0.9


def test_colours_are_matched_to_those_round_the_hole(photo: np.ndarray, hole: np.ndarray) -> None:
    """An autoencoder that gives back everything 30 levels too dark."""

    class Dark(FakeRuntime):
        def _vae_decoder(self, latent: np.ndarray) -> dict[str, np.ndarray]:
            return {"image": super()._vae_decoder(latent)["image"] - np.float32(30 / 127.5)}

    photo[:] = 150
    known = Dark(lambda x, mask, masked, t, branch: np.full_like(x, 150 / 127.5 - 1))
    inside = (150, 150, 150)
    matched = inpaint(photo, hole, known, match_colours=True)
    np.testing.assert_allclose(matched.image[hole].astype(int), np.broadcast_to(inside, (hole.sum(), 3)), atol=1)
    raw = inpaint(photo, hole, known, match_colours=False)
    np.testing.assert_allclose(raw.image[hole].astype(int), 120, atol=1)
    assert (matched.settings["match_colours"], raw.settings["match_colours"]) == (True, False)


def test_settings_say_everything_and_a_picture_keeps_its_profile_and_notes(photo: np.ndarray, hole: np.ndarray) -> None:
    picture = Picture(photo, None, Metadata(b"profile"), ("it was CMYK",))
    options = {"steps": 10, "strength": 0.5, "scheduler": "dpm++2m", "feather": 6}
    result = inpaint(picture, hole, seed=7, guidance=1.5, guidance_interval=(200, 800), **options)
    assert result.picture.metadata.icc == b"profile" and result.notes == ["it was CMYK"]
    assert result.settings == {
        **{"start": "image", "steps": 10, "steps_executed": 5, "strength": 0.5, "scheduler": "dpm++2m"},
        **{"guidance": 1.5, "guidance_interval": [200, 800], "distilled_guidance": None, "cache_interval": 1},
        **{"seed": 7, "generator": "PCG64", "windows": 1, "network_calls": 5, "feather_px": 6},
        **{"match_colours": False, "match_depth": 0.0},
    }


def test_an_empty_mask_returns_the_image_and_loads_nothing(photo: np.ndarray) -> None:
    runtime = FakeRuntime()
    result = Inpainter(BUNDLE, runtime).inpaint(photo, np.zeros(photo.shape[:2], bool))
    np.testing.assert_array_equal(result.image, photo)
    assert result.notes == ["mask is empty: image returned unchanged"]
    assert result.settings["windows"] == 0 and result.settings["steps_executed"] == 0
    assert runtime.activations == 0 and runtime.calls == []


@pytest.mark.parametrize(("rows", "warned"), [(135, False), (140, True), (150, True)])
def test_a_mask_over_nearly_everything_warns(photo: np.ndarray, rows: int, warned: bool) -> None:
    mask = np.zeros(photo.shape[:2], bool)
    mask[:rows] = True
    notes = inpaint(photo, mask).notes
    assert bool(notes) == warned
    if warned:
        assert notes == [f"mask covers {rows / 150:.0%} of the image: little is left to guide the fill"]


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (63, 64), (20, 20)])
@pytest.mark.parametrize("start", ["image", "prefill", "noise"])
def test_tiny_pictures(size: tuple[int, int], start: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, bool)
    mask[size[0] // 2, size[1] // 2] = True
    for feather in (2, 0):
        result = inpaint(image, mask, start=start, feather=feather)
        beyond = ~mask & (distance_outside(mask) >= feather)
        np.testing.assert_array_equal(result.image[beyond], image[beyond])
    assert result.settings["feather_px"] == 0


@pytest.mark.parametrize(
    ("component", "since", "value", "message"),
    [
        ("vae_encoder", 1, np.nan, "vae_encoder returned NaN for the masked image"),
        ("vae_encoder", 2, np.inf, "vae_encoder returned an infinite value for the start"),
        ("denoiser", 3, np.nan, r"denoiser returned NaN at step 3 of 19 \(t=800\)"),
        ("denoiser", 19, -np.inf, r"denoiser returned an infinite value at step 19 of 19 \(t=0\)"),
        ("vae_decoder", 1, np.nan, "vae_decoder returned NaN"),
    ],
)
def test_what_is_not_finite_ends_the_run(
    photo: np.ndarray, hole: np.ndarray, component: str, since: int, value: float, message: str
) -> None:
    runtime = FakeRuntime()
    runtime.broken[component] = (since, value)
    with pytest.raises(BundleError, match=f"^{message}: .*export or download the bundle again$"):
        inpaint(photo, hole, runtime, steps=20)
    assert len(runtime.called(component)) == since, "it went on after that"
    assert not runtime.active


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "nothing"}, "unknown start 'nothing': choose one of image, prefill, noise"),
        ({"scheduler": "euler"}, r"unknown scheduler 'euler': choose one of ddim, dpm\+\+2m"),
        ({"steps": 1}, "strength 0.99 leaves no"),
        ({"start": "noise", "strength": 0.5}, "strength 0.5 does not go with start noise, which is strength 1"),
        ({"guidance": float("nan")}, "guidance is nan: give a number from 0 to 1000"),
        ({"cache_interval": 0}, "cache interval is 0: give a whole number of 1"),
        ({"guidance_interval": (500, 200)}, "interval is 500,200: give LOW,HIGH with 0 <= LOW <= HIGH <= 1000"),
        ({"seed": -1}, "seed is -1"),
        ({"feather": -2}, "feather is -2: give 0 or more pixels"),
        ({"match_depth": -2}, "match_depth is -2: give 0 or more pixels"),
        ({"cache_interval": 2}, "cache interval is 2, and bundle nowhere was exported without the part"),
        ({"mask": np.zeros((170, 150), bool)}, "the mask is 150x170 and the picture is 170x150: give a mask of"),
    ],
)
def test_arguments_out_of_range(photo: np.ndarray, hole: np.ndarray, options: dict[str, Any], message: str) -> None:
    runtime = FakeRuntime()
    with pytest.raises(UsageError, match=message):
        Inpainter(BUNDLE, runtime).inpaint(photo, **{"mask": hole, "steps": 4, **options})
    assert runtime.activations == 0


def test_the_runtime_is_opened_once_and_closed(photo: np.ndarray, hole: np.ndarray) -> None:
    runtime = FakeRuntime()
    with Inpainter(BUNDLE, runtime) as inpainter:
        assert runtime.active
        for _ in range(2):
            inpainter.inpaint(photo, hole, steps=2)
    assert runtime.activations == 1 and not runtime.active

    lazy = Inpainter(BUNDLE, runtime)
    assert not runtime.active
    for _ in range(2):
        lazy.inpaint(photo, hole, steps=2)
    assert runtime.activations == 2 and runtime.active
    lazy.close()
    lazy.close()
    assert not runtime.active

    with runtime:  # the caller's: used as it is, and left to the caller
        with Inpainter(BUNDLE, runtime) as inpainter:
            inpainter.inpaint(photo, hole, steps=2)
        assert runtime.active
    assert runtime.activations == 3


def test_an_interrupt_passes_through_and_frees_the_runtime(photo: np.ndarray, hole: np.ndarray) -> None:
    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    runtime = FakeRuntime()
    with pytest.raises(KeyboardInterrupt):
        inpaint(photo, hole, runtime, on_step=stop)
    assert not runtime.active and len(runtime.called("denoiser")) == 1


def test_every_stage_is_timed(photo: np.ndarray, hole: np.ndarray) -> None:
    timer = StageTimer()
    inpaint(photo, hole, timer=timer, steps=10)
    stages = timer.summary()
    counts = {"preprocess": 2, "vae_encode": 2, "denoise": 9, "vae_decode": 1, "stitch": 1, "total": 1}
    assert {stage: figures["count"] for stage, figures in stages.items()} == counts
    parts = sum(f["total_ms"] for s, f in stages.items() if s != "total")
    assert 0 < parts <= stages["total"]["total_ms"]


# --- the Python interface --------------------------------------------------------------------------------


def test_the_package_offers_the_interface_and_loads_it_late() -> None:
    import moebius_edge

    assert moebius_edge.Inpainter is Inpainter and moebius_edge.Bundle is Bundle
    with pytest.raises(AttributeError, match="module 'moebius_edge' has no attribute 'Outpainter'"):
        _ = moebius_edge.Outpainter
    code = "import sys, moebius_edge as m; print('numpy' in sys.modules); m.Inpainter; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(("mode", "shape"), [("RGB", (150, 170, 3)), ("L", (150, 170, 1)), ("RGBA", (150, 170, 4))])
def test_pictures_of_pillow_are_filled_as_arrays_are(
    photo: np.ndarray, hole: np.ndarray, mode: str, shape: tuple[int, ...]
) -> None:
    picture = Image.fromarray(photo).convert(mode)
    expected = inpaint(np.asarray(picture), hole)
    result = inpaint(picture, Image.fromarray(hole))
    assert result.image.shape == shape and result.pil.mode == mode and result.pil.size == (170, 150)
    np.testing.assert_array_equal(result.image, expected.image)
    np.testing.assert_array_equal(np.asarray(result.pil).reshape(shape), result.image)
    palette = Image.fromarray(photo).quantize(16)
    np.testing.assert_array_equal(inpaint(palette, hole).image, inpaint(palette.convert("RGB"), hole).image)
    deep = inpaint((photo.astype(np.uint16) * 257), hole)
    assert deep.image.dtype == np.uint16
    np.testing.assert_array_equal(np.asarray(deep.pil), np.rint(deep.image / 257).astype(np.uint8))


class Generator:
    """Stands for PyTorch's generator."""

    def initial_seed(self) -> int:
        return 7


def test_a_call_with_the_names_of_a_diffusers_pipeline(photo: np.ndarray, hole: np.ndarray) -> None:
    image, mask = Image.fromarray(photo), Image.fromarray(hole)
    with Inpainter(BUNDLE, FakeRuntime(lambda x, *_: np.clip(x, -1, 1))) as pipe:
        options = {"num_inference_steps": 5, "guidance_scale": 1.5}
        result = pipe(image=image, mask_image=mask, **options, strength=0.8, generator=7)
        (filled,) = result.images
        assert isinstance(filled, Image.Image) and filled.size == image.size
        direct = pipe.inpaint(photo, hole, steps=5, guidance=1.5, strength=0.8, seed=7)
        np.testing.assert_array_equal(np.asarray(filled), direct.image)
        other = pipe.inpaint(photo, hole, steps=5, guidance=1.5, strength=0.8, seed=8)
        assert not np.array_equal(direct.image, other.image)
        for pure, start in ((None, {}), (1, {"start": "noise"})):
            same = pipe(image, mask, 5, strength=pure, generator=Generator()).images[0]
            np.testing.assert_array_equal(np.asarray(same), pipe.inpaint(photo, hole, steps=5, seed=7, **start).image)
        both = pipe(image=[image, image.resize((85, 75))], mask_image=[mask, mask.resize((85, 75))], **options)
        assert [picture.size for picture in both.images] == [(170, 150), (85, 75)]
        with pytest.raises(UsageError, match="takes no prompt, height, since .* mask alone: leave it out$"):
            pipe(image=image, mask_image=mask, prompt="a cat", negative_prompt="", height=64)
        with pytest.raises(UsageError, match="there are 2 images and 1 masks: give a mask for each image"):
            pipe(image=[image, image], mask_image=mask)
