"""The search on blocks whose errors are known and add up: what it must find, brute force says."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from moebius_edge.calibration import search as search_module
from moebius_edge.calibration.blocks import Block, Recipe
from moebius_edge.calibration.evaluate import Metrics
from moebius_edge.calibration.search import MARGIN_DB, MAX_RECIPES, POINTS, Search
from moebius_edge.errors import QualityError
from moebius_edge.imaging.masks import latent_mask
from moebius_edge.metrics.trajectory import Trajectory, draw_scene
from moebius_edge.pipeline.inpainter import STRENGTH
from moebius_edge.progress import Progress, no_progress
from moebius_edge.runtimes.base import Arrays
from moebius_edge.sampling.guidance import Guidance
from moebius_edge.sampling.scheduler import DDIM
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
    """Quantiser, evaluator and denoiser in one: the candidate's file says what was quantised, errors add up.

    A block's error in the picture is ``gain`` times its error in the noise. ``tried`` holds what each recipe quantised
    and smoothed, ``called`` the blocks that were measured alone; the call of number ``stop_at`` is interrupted.
    """

    parts: Sequence[Part]
    stop_at: int = -1
    facts: dict[str, Any] = field(default_factory=lambda: {"ranges": "mse"})
    gain: float = 7.0
    excess: float = 1.0  # of the errors of several blocks over the sum of each one's
    exponent: float = 1.0  # of the sum of errors, in the error of a picture
    scale: float = 1.0
    guidance: Guidance = Guidance(2.0, 2.0)
    tried: list[tuple[frozenset[str], tuple[str, ...]]] = field(default_factory=list)
    called: list[tuple[str, bool]] = field(default_factory=list)
    steps: int = 20

    def __post_init__(self) -> None:
        self.blocks = [Block(p.name, (p.name,), frozenset(), p.macs) for p in self.parts]
        self.candidates = [b for b, p in zip(self.blocks, self.parts, strict=True) if p.candidate]
        self.smoothable = frozenset(p.name for p in self.parts if p.smoothed_db is not None)
        self.cases = [(str(i), draw_scene(64, i)) for i in range(len(CASES))]

    def quantise(self, recipe: Recipe) -> tuple[onnx.ModelProto, dict[str, list[str]]]:
        text = json.dumps({"quantised": recipe.quantised, "smoothed": recipe.smoothed})
        return helper.make_model(helper.make_graph([], "candidate", [], [], doc_string=text)), {}

    def error(self, chosen: frozenset[str], smoothed: Sequence[str]) -> float:
        decibels = [p.smoothed_db if p.name in smoothed else p.db for p in self.parts if p.name in chosen]
        total = sum(10 ** (-db / 10) for db in decibels if db is not None)
        return total * (self.excess if len(chosen) > 1 else 1)

    def references(self, what: str, progress: Progress) -> list[Trajectory]:
        latents = [np.full((1, 4, 8, 8), float(i), np.float32) for i in range(19)]
        return [Trajectory(np.zeros((2, 4, 8, 8), np.float32), latents, np.zeros(0)) for _ in self.cases]

    def evaluate(self, folder: Path, what: str, progress: Progress) -> list[Metrics]:
        document = json.loads(onnx.load(folder / "denoiser.onnx").graph.doc_string)
        recipe = Recipe(document["quantised"], tuple(document["smoothed"]))
        self.tried.append((recipe.chosen, recipe.smoothed))
        error = self.scale * self.error(recipe.chosen, recipe.smoothed) ** self.exponent
        return [{"hole_psnr_db": -10 * math.log10(error * harder)} for harder in CASES]

    # The denoiser in parts.

    def opened(self, quantiser: Any, feeds: Arrays) -> Fake:
        self.feeds, self.noise = feeds, np.zeros_like(feeds["sample"][:, :4])
        return self

    def share(self, name: str) -> float:
        return 0.5

    def noise_with(self, name: str, smoothed: bool) -> np.ndarray:
        if len(self.called) == self.stop_at:
            raise KeyboardInterrupt
        self.called.append((name, smoothed))
        error = self.error(frozenset([name]), [name] if smoothed else [])
        return self.noise + np.float32(math.sqrt(error / self.gain))


def search_of(fake: Fake, folder: Path, progress: Progress = no_progress) -> Search:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "PartedDenoiser", fake.opened)
        search = Search(fake, fake, ResultCache(folder), progress)  # type: ignore[arg-type]
        search.measure([b.name for b in fake.candidates])
    return search


def choose(fake: Fake, floor: float, folder: Path) -> Recipe:
    return search_of(fake, folder).find_recipe(floor)


# --- each block alone -------------------------------------------------------------------------------------

THREE = [Part("a", 100, 50.0), Part("b", 100, 40.0, 44.0), Part("c", 100, 30.0, 30.2)]


def test_each_block_is_measured_alone_and_smoothed_where_it_can_be(tmp_path: Path) -> None:
    fake, progress = Fake(THREE), list[tuple[str, int, int]]()
    search = search_of(fake, tmp_path / "cache", lambda *update: progress.append(update))
    for part in THREE:
        row = search.errors[part.name]
        assert row["plain"] == pytest.approx(10 ** (-part.db / 10) / fake.gain, rel=1e-5)
        assert ("smoothed" in row) == (part.smoothed_db is not None)
    assert fake.called == [(name, False) for name in "abc"] + [(name, True) for name in "bc"]
    assert [done for _, done, _ in progress[1:]] == [0, 1, 2, 3, 4] and {total for *_, total in progress[1:]} == {5}
    assert progress[0][0].startswith("search, at most about ") and progress[4][0] == "sensitivity of b, smoothed"
    assert [search.error(name) == search.errors[name]["plain"] for name in "abc"] == [True, False, True]
    assert search.sensitivity() == {}, "decibels are not known before a recipe was measured"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["sensitivity.json"]
    assert search.find_recipe(20.0).smoothed == ("b",)
    harder = 10 * math.log10(max(CASES))
    rows = {"a": [50.0], "b": [40.0, 44.0], "c": [30.0, 30.2]}
    for name, row in search.sensitivity().items():
        assert list(row) == ["psnr_db", "smoothed_psnr_db"][: len(rows[name])]
        assert list(row.values()) == pytest.approx([db - harder for db in rows[name]], abs=0.02)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["sensitivity.json"], "the candidate is gone"


@pytest.mark.parametrize("guidance", [Guidance(2.0, 2.0), Guidance(3.0, 1.0)])
def test_a_call_has_points_of_all_cases_with_the_branches_that_are_sampled(tmp_path: Path, guidance: Guidance) -> None:
    fake = Fake(THREE, guidance=guidance)
    search_of(fake, tmp_path)
    rows = 1 if guidance.sampled == 1 else 2
    points, timesteps = len(POINTS), DDIM(20, STRENGTH).timesteps
    indices = [round(share * 18) for share in POINTS]
    assert fake.feeds["timestep"].tolist() == [timesteps[i] for i in indices] * rows
    assert fake.feeds["branch"].tolist() == [0] * points if rows == 1 else [1] * points + [0] * points
    assert fake.feeds["sample"][:points, 0, 0, 0].tolist() == [i - 1 for i in indices], "what the last step returned"
    for point in range(points):
        hole = fake.cases[point % 2][1][1]
        assert np.array_equal(fake.feeds["sample"][point, 4], latent_mask(hole, 8))


def test_an_interrupted_measurement_goes_on_and_a_complete_one_is_read(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search_of(Fake(THREE, stop_at=2), tmp_path)
    later, again = Fake(THREE), Fake(THREE)
    errors = search_of(later, tmp_path).errors
    assert errors == search_of(Fake(THREE), tmp_path / "anew").errors == search_of(again, tmp_path).errors
    assert [name for name, _ in later.called] == ["c", "b", "c"] and again.called == []
    other = Fake(THREE, facts={"ranges": "minmax"})
    search_of(other, tmp_path)
    assert len(other.called) == 5, "what depends on other facts is measured anew"


# --- how many together ------------------------------------------------------------------------------------


def brute_force(fake: Fake, floor: float, smoothed: Sequence[str]) -> int:
    """The most multiply-adds of any choice of candidates whose worst case stays above floor and margin."""
    most, limit = 0, 10 ** (-(floor + MARGIN_DB) / 10)
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
    assert len(fake.tried) <= MAX_RECIPES
    assert len(fake.tried[0][0]) == max(len(chosen) for chosen, _ in fake.tried), "all at once are tried first"


@pytest.mark.parametrize("excess", [0.6, 1.7])
def test_errors_that_do_not_add_up_cost_no_more_trials(tmp_path: Path, excess: float) -> None:
    """All blocks are alike, so that the best recipe is a number of them."""
    fake = Fake([Part(f"b{i}", 100, 45.0) for i in range(60)], excess=excess)
    number = len(choose(fake, 30.0, tmp_path).chosen)
    fits = [n for n in range(2, 61) if n * excess * max(CASES) * 10**-4.5 <= 10 ** (-(30 + MARGIN_DB) / 10)]
    assert number == max(fits) < 60 and len(fake.tried) <= MAX_RECIPES


@pytest.mark.parametrize("exponent", [0.4, 0.7])
def test_errors_that_the_sampler_mends_in_part_are_followed(tmp_path: Path, exponent: float) -> None:
    """The error of a picture is a power of the sum of the blocks', such that 20 of 60 alike are at the floor."""
    scale = 10 ** (-(40 + MARGIN_DB) / 10) / max(CASES) / (20.4 * 10**-4.5) ** exponent
    fake = Fake([Part(f"b{i}", 100, 45.0) for i in range(60)], exponent=exponent, scale=scale)
    assert 19 <= len(choose(fake, 40.0, tmp_path).chosen) <= 20
    assert len(fake.tried) <= MAX_RECIPES


def test_the_worst_case_and_the_margin_count(tmp_path: Path) -> None:
    """31 dB and half as much error again are wanted for a floor of 30."""
    worst = 10 * math.log10(max(CASES))
    enough, short = 30 + MARGIN_DB + worst + 0.02, 30 + MARGIN_DB + worst - 0.02
    assert choose(Fake([Part("a", 1, enough)]), 30.0, tmp_path / "a").chosen == {"a"}
    wanted = r"31 dB in the hole are wanted \(30 and a margin of 1\), 1 block had 30.98; nothing was saved"
    with pytest.raises(QualityError, match=wanted):
        choose(Fake([Part("a", 1, short)]), 30.0, tmp_path / "b")


def test_where_nothing_passes_what_was_tried_is_told(tmp_path: Path) -> None:
    fake = Fake([Part("a", 1000, 20.0), Part("b", 10, 25.0), Part("c", 10, 90.0, candidate=False)])
    text = (
        r"no recipe is good enough: 31 dB in the hole are wanted \(30 and a margin of 1\), 2 blocks had 17\.\d\d; "
        r"nothing was saved: lower --min-psnr, or use --precision fp16"
    )
    with pytest.raises(QualityError, match=text):
        choose(fake, 30.0, tmp_path)
    assert len(fake.tried) == 1, "what is hopeless alone is not tried"
    with pytest.raises(QualityError, match="there is no block to quantise; nothing was saved"):
        choose(Fake([Part("c", 10, 90.0, candidate=False)]), 30.0, tmp_path / "none")
