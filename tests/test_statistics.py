"""Running figures against numpy on all values at once, and what a saved recording gives back or refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moebius_edge.calibration.statistics import STATE_FILE, SUMMARY_FILE, Statistics, TensorStatistics
from moebius_edge.errors import BundleError, UsageError

UNCONDITIONAL_THEN_CONDITIONAL = [(0, 1, 2), (0, 0, 2)]


def test_running_figures_are_those_of_all_values() -> None:
    rng = np.random.default_rng(1)
    calls = [rng.standard_normal((2, 5, 4, 3)).astype(np.float32) * (1 + i) for i in range(3)]
    for axis in (1, -1):
        tensor = TensorStatistics(axis, timesteps=3)
        for t, values in enumerate(calls):
            assert tensor.update(values, [(t, 1, 0), (t, 0, 0)])
        everything = np.stack(calls)  # (calls, 2, 5, 4, 3)
        assert tensor.count == everything.size
        assert (tensor.minimum, tensor.maximum) == (everything.min(), everything.max())
        assert tensor.histogram.maximum == np.abs(everything).max()
        reduced = (0, 1, 3, 4) if axis == 1 else (0, 1, 2, 3)
        assert np.array_equal(tensor.channels, np.abs(everything).max(axis=reduced))
        by_row = np.abs(everything).max(axis=(2, 3, 4))
        assert np.array_equal(tensor.strata[:, ::-1, 0], by_row)  # the first row was the unconditional branch, 1
        assert not tensor.strata[:, :, 1:].any()


def test_rows_may_lie_folded_in_the_first_axis() -> None:
    """As (N, V, h, w) reshaped to (N V, 1, h, w)."""
    values = np.arange(24, dtype=np.float32).reshape(6, 1, 2, 2)
    tensor = TensorStatistics(None, timesteps=1)
    tensor.update(values, UNCONDITIONAL_THEN_CONDITIONAL)
    assert tensor.strata[0, 1, 2] == 11 and tensor.strata[0, 0, 2] == 23 and tensor.channels is None


def test_half_precision_is_taken_as_it_is() -> None:
    tensor = TensorStatistics(1, timesteps=1)
    tensor.update(np.array([[-60000.0, 1.5]], np.float16), [(0, 0, 0)])
    assert (tensor.minimum, tensor.maximum) == (float(np.float16(-60000)), 1.5)
    assert tensor.channels is not None and tensor.channels.dtype == np.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(bad: float) -> None:
    tensor = TensorStatistics(1, timesteps=1)
    assert not tensor.update(np.array([[1, bad]], np.float32), [(0, 0, 0)])
    assert tensor.count == 0 and tensor.channels is None and not tensor.strata.any()


def recorded() -> Statistics:
    rng = np.random.default_rng(2)
    tensors = {"a": TensorStatistics(1, 2), "b": TensorStatistics(None, 2), "c": TensorStatistics(-1, 2)}
    statistics = Statistics({"seed": 3}, (900, 0), tensors, done=1)
    for t in range(2):
        strata = [(t, 1, 0), (t, 0, 1)]
        for name in "ab":
            tensors[name].update(rng.standard_normal((2, 3, 4)).astype(np.float32), strata)
        for where in strata:
            statistics.rows[where] += 1
    return statistics


def test_what_is_saved_comes_back_and_goes_on_alike(tmp_path: Path) -> None:
    statistics = recorded()
    statistics.save(tmp_path)
    loaded = Statistics.load(tmp_path, {"seed": 3})
    assert loaded is not None
    more = np.full((2, 3, 4), 7, np.float32)
    for one in (statistics, loaded):
        one.tensors["a"].update(more, [(0, 0, 0), (0, 0, 0)])
        one.tensors["c"].update(more, [(1, 0, 0), (1, 0, 0)])  # nothing was seen of it before
    assert (loaded.timesteps, loaded.done, list(loaded.tensors)) == ((900, 0), 1, ["a", "b", "c"])
    assert np.array_equal(loaded.rows, statistics.rows) and loaded.rows.sum() == 4
    for name, tensor in statistics.tensors.items():
        other = loaded.tensors[name]
        assert (other.axis, other.minimum, other.maximum, other.count) == (
            *(tensor.axis, tensor.minimum, tensor.maximum, tensor.count),
        )
        assert (other.histogram.limit, other.histogram.maximum) == (tensor.histogram.limit, tensor.histogram.maximum)
        assert np.array_equal(other.histogram.counts, tensor.histogram.counts)
        assert np.array_equal(other.strata, tensor.strata)
        assert (other.channels is None) == (tensor.channels is None) == (name == "b")
        assert tensor.channels is None or np.array_equal(other.channels, tensor.channels)


def test_the_summary_is_plain_json(tmp_path: Path) -> None:
    recorded().save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [SUMMARY_FILE, STATE_FILE]
    summary = json.loads((tmp_path / SUMMARY_FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert list(summary["tensors"]) == ["a", "b"], "a tensor without values has no range"
    assert summary["tensors"]["a"]["count"] == 48 and summary["pictures_done"] == 1


def test_nothing_recorded_is_none(tmp_path: Path) -> None:
    assert Statistics.load(tmp_path) is None


def test_a_recording_from_something_else_is_refused(tmp_path: Path) -> None:
    recorded().save(tmp_path)
    with pytest.raises(UsageError, match="recorded with another pictures, seed: remove it or name another folder"):
        Statistics.load(tmp_path, {"seed": 4, "pictures": "x"})


@pytest.mark.parametrize("contents", [b"", b"not a zip", None])
def test_a_damaged_recording_is_named(tmp_path: Path, contents: bytes | None) -> None:
    path = tmp_path / STATE_FILE
    recorded().save(tmp_path)
    path.write_bytes(path.read_bytes()[:-200] if contents is None else contents)
    with pytest.raises(BundleError, match=r"statistics\.npz is damaged: remove it"):
        Statistics.load(tmp_path)
