"""Recordings of a toy whose activations are its noise, against the noise of the plain pipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
from calibrating import make_calibration_bundle
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.calibration.recording import Settings, record
from moebius_edge.calibration.statistics import Statistics
from moebius_edge.data.calibration_pictures import picture_and_hole
from moebius_edge.errors import BundleError, UsageError
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.runtimes.base import Arrays
from moebius_edge.runtimes.ort import OrtRuntime

SETTINGS = Settings(steps=5, seed=7)  # 4 calls at strength 0.99
RESOLUTION = 64


class Drawn:
    """Pictures of random blocks; ``broken`` is one that cannot be read."""

    def __init__(self, number: int = 4, broken: int | None = None) -> None:
        self.number, self.broken = number, broken
        self.read_ones: list[int] = []

    def __len__(self) -> int:
        return self.number

    def name(self, i: int) -> str:
        return f"drawn {i}"

    def read(self, i: int) -> tuple[np.ndarray, None]:
        if i == self.broken:
            raise UsageError(f"drawn {i} is damaged")
        self.read_ones.append(i)
        blocks = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        return blocks.repeat(10, 0).repeat(10, 1), None

    def fingerprint(self) -> str:
        return "drawn"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(make_calibration_bundle(tmp_path_factory.mktemp("bundle") / "toy", RESOLUTION))


class Listening(OrtRuntime):
    """The plain runtime, its denoiser's calls kept."""

    calls: list[tuple[Arrays, np.ndarray]]

    def run(
        self, component: str, feeds: Mapping[str, np.ndarray], outputs: Collection[str] | None = None
    ) -> Arrays:
        made = super().run(component, feeds, outputs)
        if component == "denoiser":
            self.calls.append((dict(feeds), made["noise"]))
        return made


def noise_of_the_pipeline(bundle: Bundle, pictures: Drawn) -> list[tuple[Arrays, np.ndarray]]:
    runtime = Listening(bundle.components, bundle.paths)
    runtime.calls = []
    with Inpainter(bundle, runtime) as inpainter:
        for i in range(len(pictures)):
            picture, hole = picture_and_hole(pictures, i, RESOLUTION, seed=7)
            inpainter.inpaint(picture, hole, steps=5, seed=7 + i)
    return runtime.calls


def test_figures_are_those_of_every_call_of_the_pipeline(bundle: Bundle, tmp_path: Path) -> None:
    statistics = record(bundle, Drawn(), SETTINGS, tmp_path / "new" / "folder")
    calls = noise_of_the_pipeline(bundle, Drawn())
    noise = np.stack([n for _, n in calls])  # (16 calls, 2 rows, 4, 8, 8)
    assert statistics.timesteps == (600, 400, 200, 0) and statistics.done == 4 and len(calls) == 16
    assert list(statistics.tensors)[0] == "exact" and len(statistics.tensors) == 3
    for name, tensor in statistics.tensors.items():
        assert tensor.count == noise.size
        np.testing.assert_allclose([tensor.minimum, tensor.maximum], [noise.min(), noise.max()], rtol=1e-5)
        axes = (0, 1, 3, 4) if name == "passed" else (0, 1, 2, 3)
        np.testing.assert_allclose(tensor.channels, np.abs(noise).max(axis=axes), rtol=1e-5)
        magnitudes = np.abs(noise[noise != 0])
        expected, _ = np.histogram(magnitudes, tensor.histogram.counts.size, (0, tensor.histogram.limit))
        moved = np.abs(np.cumsum(tensor.histogram.counts - expected)).max()  # by rounding, into a neighbouring bin
        assert moved <= 3


def test_figures_are_kept_by_timestep_branch_and_size_of_hole(bundle: Bundle, tmp_path: Path) -> None:
    statistics = record(bundle, Drawn(), SETTINGS, tmp_path)
    assert (statistics.rows == [[2, 1, 1], [2, 1, 1]]).all()  # small, medium, large, small holes in every call
    expected = np.zeros_like(statistics.tensors["exact"].strata)
    for feeds, noise in noise_of_the_pipeline(bundle, Drawn()):
        for row in range(2):
            t = statistics.timesteps.index(int(feeds["timestep"][row]))
            where = t, int(feeds["branch"][row]), int(np.searchsorted((0.1, 0.25), feeds["sample"][row, 4].mean()))
            expected[where] = max(expected[where], np.abs(noise[row]).max())
    np.testing.assert_allclose(statistics.tensors["exact"].strata, expected, rtol=1e-5)


def same(a: Statistics, b: Statistics) -> bool:
    return list(a.tensors) == list(b.tensors) and all(
        np.array_equal(t.histogram.counts, b.tensors[name].histogram.counts)
        and np.array_equal(t.strata, b.tensors[name].strata)
        and (t.minimum, t.maximum) == (b.tensors[name].minimum, b.tensors[name].maximum)
        for name, t in a.tensors.items()
    )


def test_an_interrupted_recording_goes_on_to_the_same_numbers(bundle: Bundle, tmp_path: Path) -> None:
    whole = record(bundle, Drawn(), SETTINGS, tmp_path / "whole")
    with pytest.raises(UsageError, match="drawn 2 is damaged"):
        record(bundle, Drawn(broken=2), SETTINGS, tmp_path / "interrupted")
    pictures = Drawn()
    resumed = record(bundle, pictures, SETTINGS, tmp_path / "interrupted")
    assert pictures.read_ones == [2, 3]
    assert same(whole, resumed) and np.array_equal(whole.rows, resumed.rows)
    again = Drawn()
    assert same(record(bundle, again, SETTINGS, tmp_path / "whole"), whole) and again.read_ones == []


def test_another_seed_is_another_recording(bundle: Bundle, tmp_path: Path) -> None:
    first = record(bundle, Drawn(), SETTINGS, tmp_path / "a")
    with pytest.raises(UsageError, match="recorded with another seed: remove it or name another folder"):
        record(bundle, Drawn(), Settings(steps=5, seed=8), tmp_path / "a")
    assert not same(first, record(bundle, Drawn(), Settings(steps=5, seed=8), tmp_path / "b"))


def test_groups_bound_what_a_run_returns(bundle: Bundle, tmp_path: Path) -> None:
    one_tensor = 4 * 2 * 4 * 8 * 8
    whole = record(bundle, Drawn(), SETTINGS, tmp_path / "whole")
    labels: list[str] = []
    settings = Settings(steps=5, seed=7, group_bytes=one_tensor)
    parts = record(bundle, Drawn(), settings, tmp_path / "parts", lambda label, done, total: labels.append(label))
    assert same(whole, parts), "identities leave no room for rounding"
    assert whole.key == parts.key
    assert labels[0] == "record drawn 0, 1 of 4, 3 runs a call"


def test_progress_counts_every_call(bundle: Bundle, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    record(bundle, Drawn(), SETTINGS, tmp_path, lambda *update: told.append(update))
    assert [done for _, done, _ in told] == list(range(1, 17))
    assert told[0] == ("record drawn 0, 1 of 4", 1, 16) and told[-1] == ("record drawn 3, 4 of 4", 16, 16)


def test_the_autoencoder_is_recorded_as_well(tmp_path: Path) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    statistics = record(bundle, Drawn(), Settings(steps=5, component="vae_decoder"), tmp_path / "record")
    assert list(statistics.tensors) == ["latent"]
    assert statistics.tensors["latent"].count == 4 * 4 * 8 * 8


def test_distilled_guidance_has_the_conditional_branch_alone(tmp_path: Path) -> None:
    settings = Settings(steps=5, guidance=1.0)
    bundle = Bundle.load(make_calibration_bundle(tmp_path / "toy"))
    rows = record(bundle, Drawn(), settings, tmp_path / "record").rows
    assert rows[:, 0].sum() == 16 and rows[:, 1].sum() == 0


def test_an_activation_that_is_not_finite_is_named_and_nothing_saved(tmp_path: Path) -> None:
    bundle = Bundle.load(make_calibration_bundle(tmp_path / "toy", scale=np.inf))
    with pytest.raises(BundleError, match=r"activation \S*p_y of the denoiser is not finite"):
        record(bundle, Drawn(), SETTINGS, tmp_path / "record")
    assert list((tmp_path / "record").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(component="unet"), "no component 'unet': choose one of vae_encoder, denoiser, vae_decoder"),
        (Settings(scheduler="euler9"), "unknown scheduler 'euler9'"),
        (Settings(group_bytes=0), "group size is 0 bytes"),
        (Settings(start="middle"), "unknown start 'middle'"),
    ],
)
def test_settings_out_of_range_are_refused(bundle: Bundle, tmp_path: Path, settings: Settings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        record(bundle, Drawn(), settings, tmp_path)


def test_too_few_pictures_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few calibration pictures, 3"):
        record(bundle, Drawn(3), SETTINGS, tmp_path)
