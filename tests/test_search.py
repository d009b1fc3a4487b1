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

from moebius_edge.calibration.blocks import Block
from moebius_edge.calibration.recipe import Recipe
from moebius_edge.calibration.search import MARGIN_DB, Sensitivity, choose_recipe, measure_sensitivity, try_recipe
from moebius_edge.calibration.trials import Figures, Progress
from moebius_edge.errors import QualityError

KEY = {"recording": {"model": "a"}, "ranges": "mse"}
CASES = (1.0, 1.5)  # how much harder than the first each case is


@dataclass
class Part:
    """A block that alone has ``db`` in the first case, and ``smoothed_db`` smoothed, if it can be."""

    name: str
    multiplications: int
    db: float
    smoothed_db: float | None = None
    candidate: bool = True


@dataclass
class Fake:
    """Quantiser and trials in one: the candidate's file says what was quantised, errors add up.

    ``tried`` holds what each trial quantised and smoothed; the trial of number ``stop_at`` is interrupted.
    """

    parts: Sequence[Part]
    stop_at: int = -1
    tried: list[tuple[frozenset[str], tuple[str, ...]]] = field(default_factory=list)
    folders: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks = [Block(p.name, (p.name,), p.multiplications) for p in self.parts]
        self.candidates = [b for b, p in zip(self.blocks, self.parts, strict=True) if p.candidate]
        self.smoothable = frozenset(p.name for p in self.parts if p.smoothed_db is not None)

    def make(self, recipe: Recipe) -> tuple[onnx.ModelProto, dict[str, list[str]]]:
        graph = helper.make_graph([], "candidate", [], [], doc_string=json.dumps(recipe.document()))
        return helper.make_model(graph), {}

    def error(self, chosen: frozenset[str], smoothed: Sequence[str]) -> float:
        decibels = [p.smoothed_db if p.name in smoothed else p.db for p in self.parts if p.name in chosen]
        return sum(4 / 10 ** (db / 10) for db in decibels if db is not None)

    def denoiser(self, file: Path, label: str, progress: Progress) -> list[Figures]:
        if len(self.tried) == self.stop_at:
            raise KeyboardInterrupt
        document = json.loads(onnx.load(file).graph.doc_string)
        recipe = Recipe(document["quantised"], tuple(document["smoothed"]))
        self.tried.append((recipe.chosen, recipe.smoothed))
        self.folders.append(sorted(p.name for p in file.parent.iterdir()))
        progress(label, 1, 2)
        error = self.error(recipe.chosen, recipe.smoothed)
        decibels = [10 * math.log10(4 / (error * harder)) if error else 200.0 for harder in CASES]
        return [Figures(f"case {i}", round(db, 2), 1, 1, 1, []) for i, db in enumerate(decibels)]


def silent(label: str, done: int, total: int) -> None:
    """The progress of a test that looks at none."""


def sensitivity_of(fake: Fake, folder: Path, key: dict[str, Any] = KEY) -> Sensitivity:
    return measure_sensitivity(fake, fake, [p.name for p in fake.parts], folder, key, silent)  # type: ignore[arg-type]


def choose(fake: Fake, floor: float, folder: Path) -> Recipe:
    folder.mkdir(exist_ok=True)
    known = sensitivity_of(fake, folder)
    fake.tried.clear()
    return choose_recipe(fake, known, fake, floor, folder, silent)  # type: ignore[arg-type]


# --- each block alone -------------------------------------------------------------------------------------

THREE = [Part("a", 100, 50.0), Part("b", 100, 40.0, 44.0), Part("c", 100, 30.0, 30.2)]


def test_each_block_is_measured_alone_and_smoothed_where_it_can_be(tmp_path: Path) -> None:
    fake = Fake(THREE)
    known = sensitivity_of(fake, tmp_path)
    mean = 10 * math.log10((1 + 1.5) / 2)
    assert known.plain == pytest.approx({"a": 50 - mean, "b": 40 - mean, "c": 30 - mean}, abs=0.02)
    assert known.smoothed == pytest.approx({"b": 44 - mean, "c": 30.2 - mean}, abs=0.02)
    alone = [frozenset(name) for name in "abcbc"]
    assert fake.tried == [(name, ()) for name in alone[:3]] + [(name, tuple(name)) for name in alone[3:]]


def test_smoothing_is_used_where_it_brings_half_a_decibel(tmp_path: Path) -> None:
    known = sensitivity_of(Fake(THREE), tmp_path)
    assert [known.helps(name) for name in "abc"] == [False, True, False]
    assert known.best("b") == known.smoothed["b"] and known.best("c") == known.plain["c"]
    worse = Sensitivity({"a": 40.0}, {"a": 30.0})
    assert worse.best("a") == 40.0 and not worse.helps("a")


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    first = sensitivity_of(Fake(THREE), tmp_path)
    again = Fake(THREE)
    assert sensitivity_of(again, tmp_path) == first and again.tried == []
    content = json.loads((tmp_path / "sensitivity.json").read_text())
    assert content == {"key": KEY, "plain_psnr_db": first.plain, "smoothed_psnr_db": first.smoothed}


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sensitivity_of(Fake(THREE, stop_at=2), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sensitivity.json"], "the candidate is gone"
    later = Fake(THREE)
    assert sensitivity_of(later, tmp_path) == sensitivity_of(Fake(THREE), tmp_path, {"anew": True})
    assert [names for names, _ in later.tried] == [{"c"}, {"b"}, {"c"}]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 3}'])
def test_figures_of_another_key_or_damaged_ones_are_measured_anew(tmp_path: Path, damage: str) -> None:
    sensitivity_of(Fake(THREE), tmp_path)
    other = Fake(THREE)
    if damage:
        (tmp_path / "sensitivity.json").write_text(damage)
        sensitivity_of(other, tmp_path)
    else:
        sensitivity_of(other, tmp_path, {**KEY, "ranges": "minmax"})
    assert len(other.tried) == 5


def test_progress_goes_through_all_blocks(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    fake = Fake(THREE)
    names = [p.name for p in THREE]
    measure_sensitivity(fake, fake, names, tmp_path, KEY, lambda *values: told.append(values))  # type: ignore[arg-type]
    assert [done for _, done, total in told] == [0, 1, 2, 3, 4] and {total for *_, total in told} == {5}
    assert told[0][0] == "sensitivity of a" and told[3][0] == "sensitivity of b, smoothed"


# --- how many together ------------------------------------------------------------------------------------


def brute_force(fake: Fake, floor: float, smoothed: Sequence[str]) -> int:
    """The most multiplications of any choice of candidates whose worst case stays above floor and margin."""
    most, limit = 0, 4 / 10 ** ((floor + MARGIN_DB) / 10)
    for number in range(len(fake.candidates) + 1):
        for some in itertools.combinations(fake.candidates, number):
            chosen = frozenset(block.name for block in some)
            if fake.error(chosen, smoothed) * max(CASES) <= limit:
                most = max(most, sum(block.multiplications for block in some))
    return most


# Where the order by harm for what is brought is exact: equal multiplications, equal ratios, one that is hopeless.
EXACT = {
    "equal multiplications": [Part(f"b{i}", 100, db) for i, db in enumerate((36, 48, 40, 33, 45, 38, 60))],
    "the same harm for each multiplication": [Part(f"b{i}", 100, 40.0) for i in range(6)],
    "large and harmless": [Part("a", 1000, 55), Part("b", 10, 36), Part("c", 500, 50), Part("d", 200, 38)],
    "the largest alone is below the floor": [Part("a", 100_000, 20), Part("b", 300, 45), Part("c", 20, 40)],
    "one that brings much for its harm": [
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
    brought = sum(block.multiplications for block in fake.blocks if block.name in recipe.chosen)
    assert brought == brute_force(fake, floor, helped) > 0
    assert set(recipe.smoothed) == recipe.chosen & set(helped)
    assert recipe.quantised.keys() == {p.name for p in fake.parts}, "a person may switch any block"
    assert len(fake.tried) <= 2 + math.ceil(math.log2(len(fake.blocks)))


def test_all_at_once_is_tried_first(tmp_path: Path) -> None:
    fake = Fake([Part(f"b{i}", 10, 60.0) for i in range(16)])
    assert len(choose(fake, 30.0, tmp_path).chosen) == 16 and len(fake.tried) == 1


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


def test_a_candidate_lies_in_the_folder_only_while_it_is_tried(tmp_path: Path) -> None:
    fake = Fake(THREE)
    try_recipe(fake, fake, Recipe({"a": True}), tmp_path, "a", silent)  # type: ignore[arg-type]
    assert fake.folders == [["candidate.onnx"]] and list(tmp_path.iterdir()) == []
