"""The search on blocks whose errors are known and add up: what it must find, brute force says."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from moebius_edge.calibration.blocks import Block, Recipe
from moebius_edge.calibration.evaluate import Metrics
from moebius_edge.calibration.search import MARGIN_DB, SEARCH_STEPS, Search, best_psnr_db, smoothing_helps
from moebius_edge.errors import QualityError
from moebius_edge.progress import Progress, no_progress
from moebius_edge.system.fingerprint import ResultCache

CASES = (1.0, 1.5)  # how much harder than the first each case is


@dataclass
class Part:
    """A block that alone has ``db`` in the first case, and ``smoothed_db`` smoothed, if it can be."""

    name: str
    macs: int
    db: float
    smoothed_db: float | None = None
    candidate: bool = True


@dataclass
class Fake:
    """Quantiser and evaluator in one: the candidate's file says what was quantised, errors add up.

    ``tried`` holds what each trial quantised and smoothed; the trial of number ``stop_at`` is interrupted.
    """

    parts: Sequence[Part]
    stop_at: int = -1
    facts: dict[str, Any] = field(default_factory=lambda: {"ranges": "mse"})
    tried: list[tuple[frozenset[str], tuple[str, ...]]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # of the evaluators that were made

    def __post_init__(self) -> None:
        self.blocks = [Block(p.name, (p.name,), frozenset(), p.macs) for p in self.parts]
        self.candidates = [b for b, p in zip(self.blocks, self.parts, strict=True) if p.candidate]
        self.smoothable = frozenset(p.name for p in self.parts if p.smoothed_db is not None)

    def quantise(self, recipe: Recipe) -> tuple[onnx.ModelProto, dict[str, list[str]]]:
        text = json.dumps({"quantised": recipe.quantised, "smoothed": recipe.smoothed})
        return helper.make_model(helper.make_graph([], "candidate", [], [], doc_string=text)), {}

    def error(self, chosen: frozenset[str], smoothed: Sequence[str]) -> float:
        decibels = [p.smoothed_db if p.name in smoothed else p.db for p in self.parts if p.name in chosen]
        return sum(4 / 10 ** (db / 10) for db in decibels if db is not None)

    def evaluate(self, folder: Path, what: str, progress: Progress) -> list[Metrics]:
        if len(self.tried) == self.stop_at:
            raise KeyboardInterrupt
        document = json.loads(onnx.load(folder / "denoiser.onnx").graph.doc_string)
        recipe = Recipe(document["quantised"], tuple(document["smoothed"]))
        self.tried.append((recipe.chosen, recipe.smoothed))
        progress(what, 1, 2)
        error = self.error(recipe.chosen, recipe.smoothed)
        decibels = [10 * math.log10(4 / (error * harder)) if error else 200.0 for harder in CASES]
        return [{"hole_psnr_db": round(db, 2)} for db in decibels]


def search_of(fake: Fake, folder: Path, progress: Progress = no_progress) -> Search:
    def evaluator(steps: int) -> Any:
        fake.steps.append(steps)
        return fake

    return Search(fake, evaluator, ResultCache(folder), progress, 20)  # type: ignore[arg-type]


def measured(fake: Fake, folder: Path, progress: Progress = no_progress) -> dict[str, dict[str, float]]:
    search = search_of(fake, folder, progress)
    search.measure([p.name for p in fake.parts])
    return search.sensitivity


def choose(fake: Fake, floor: float, folder: Path) -> Recipe:
    measured(fake, folder)
    fake.tried.clear()
    return search_of(fake, folder).find_recipe(floor)


# --- each block alone -------------------------------------------------------------------------------------

THREE = [Part("a", 100, 50.0), Part("b", 100, 40.0, 44.0), Part("c", 100, 30.0, 30.2)]


def test_each_block_is_measured_alone_and_smoothed_where_it_can_be(tmp_path: Path) -> None:
    fake, progress = Fake(THREE), list[tuple[str, int, int]]()
    sensitivity = measured(fake, tmp_path / "cache", lambda *update: progress.append(update))
    mean = 10 * math.log10((1 + 1.5) / 2)
    expected = {"a": [50], "b": [40, 44], "c": [30, 30.2]}
    for name, row in sensitivity.items():
        assert list(row) == ["psnr_db", "smoothed_psnr_db"][: len(expected[name])]
        assert list(row.values()) == pytest.approx([db - mean for db in expected[name]], abs=0.02)
    alone = [frozenset(name) for name in "abcbc"]
    assert fake.tried == [(name, ()) for name in alone[:3]] + [(name, tuple(name)) for name in alone[3:]]
    assert [done for _, done, _ in progress] == [0, 1, 2, 3, 4] and {total for *_, total in progress} == {5}
    assert progress[0][0] == "sensitivity of a" and progress[3][0] == "sensitivity of b, smoothed"
    assert fake.steps == [SEARCH_STEPS]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "the candidates are gone"
    assert [smoothing_helps(sensitivity[name]) for name in "abc"] == [False, True, False]
    assert best_psnr_db(sensitivity["b"]) == sensitivity["b"]["smoothed_psnr_db"]
    assert best_psnr_db(sensitivity["c"]) == sensitivity["c"]["psnr_db"]


def test_an_interrupted_measurement_goes_on_and_a_complete_one_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        measured(Fake(THREE, stop_at=2), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "the candidate is gone"
    later, again = Fake(THREE), Fake(THREE)
    assert measured(later, folder) == measured(Fake(THREE), tmp_path / "anew") == measured(again, folder)
    assert [names for names, _ in later.tried] == [{"c"}, {"b"}, {"c"}] and again.tried == []
    other = Fake(THREE, facts={"ranges": "minmax"})
    measured(other, folder)
    assert len(other.tried) == 5, "what depends on other facts is measured anew"


# --- how many together ------------------------------------------------------------------------------------


def brute_force(fake: Fake, floor: float, smoothed: Sequence[str]) -> int:
    """The most multiply-adds of any choice of candidates whose worst case stays above floor and margin."""
    most, limit = 0, 4 / 10 ** ((floor + MARGIN_DB) / 10)
    for number in range(len(fake.candidates) + 1):
        for some in itertools.combinations(fake.candidates, number):
            chosen = frozenset(block.name for block in some)
            if fake.error(chosen, smoothed) * max(CASES) <= limit:
                most = max(most, sum(block.macs for block in some))
    return most


# Where the order by error over multiply-adds is exact: equal multiply-adds, equal ratios, one that is hopeless.
EXACT = {
    "equal multiply-adds": [Part(f"b{i}", 100, db) for i, db in enumerate((36, 48, 40, 33, 45, 38, 60))],
    "the same error for each multiply-add": [Part(f"b{i}", 100, 40.0) for i in range(6)],
    "large and insensitive": [Part("a", 1000, 55), Part("b", 10, 36), Part("c", 500, 50), Part("d", 200, 38)],
    "the largest alone is below the floor": [Part("a", 100_000, 20), Part("b", 300, 45), Part("c", 20, 40)],
    "one that brings much for its error": [
        *[Part("a", 1000, 34), Part("b", 10, 38), Part("c", 10, 38), Part("d", 10, 38), Part("e", 10, 60)]
    ],
    "smoothed": [Part("a", 100, 30, 42), Part("b", 100, 36, 36.1), Part("c", 100, 28, 45), Part("d", 100, 25)],
    "no candidate": [Part("a", 100, 45), Part("b", 1000, 90, candidate=False), Part("c", 100, 36)],
}


@pytest.mark.parametrize("floor", [30.0, 33.0, 36.5])
@pytest.mark.parametrize("name", EXACT)
def test_the_recipe_is_the_best_there_is(tmp_path: Path, name: str, floor: float) -> None:
    fake = Fake(EXACT[name])
    recipe = choose(fake, floor, tmp_path)
    helped = [p.name for p in fake.parts if p.smoothed_db is not None and p.smoothed_db > p.db + 1]
    brought = sum(block.macs for block in fake.blocks if block.name in recipe.chosen)
    assert brought == brute_force(fake, floor, helped) > 0
    assert set(recipe.smoothed) == recipe.chosen & set(helped)
    assert recipe.quantised.keys() == {p.name for p in fake.parts}, "a person may switch any block"
    assert len(fake.tried) <= 2 + math.ceil(math.log2(len(fake.blocks)))
    assert fake.steps[-1] == 20, "whole trajectories decide"
    assert len(fake.tried[0][0]) == max(len(chosen) for chosen, _ in fake.tried), "all at once are tried first"


def test_the_worst_case_and_the_margin_count(tmp_path: Path) -> None:
    """31 dB and half as much error again are wanted for a floor of 30."""
    worst = 10 * math.log10(max(CASES))
    enough, short = 30 + MARGIN_DB + worst + 0.02, 30 + MARGIN_DB + worst - 0.02
    assert choose(Fake([Part("a", 1, enough)]), 30.0, tmp_path / "a").chosen == {"a"}
    with pytest.raises(QualityError, match=r"31 dB in the hole are wanted \(30 and a margin of 1\), a alone has 30.98"):
        choose(Fake([Part("a", 1, short)]), 30.0, tmp_path / "b")


def test_where_nothing_passes_the_best_block_is_named(tmp_path: Path) -> None:
    fake = Fake([Part("a", 1000, 20.0), Part("b", 10, 25.0), Part("c", 10, 90.0, candidate=False)])
    text = (
        r"no block can be quantised: 31 dB in the hole are wanted \(30 and a margin of 1\), b alone has 24\.0\d; "
        r"nothing was saved: lower --min-psnr, or use --precision fp16"
    )
    with pytest.raises(QualityError, match=text):
        choose(fake, 30.0, tmp_path)
    assert fake.tried == [], "what is hopeless alone is not sampled at length"
    with pytest.raises(QualityError, match="there is no block to quantise; nothing was saved"):
        choose(Fake([Part("c", 10, 90.0, candidate=False)]), 30.0, tmp_path / "none")
