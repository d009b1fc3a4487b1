"""Candidates of the bundled denoiser: which blocks may be quantised, and what a recipe changes in the file."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.calibration.quantise import activations, quantised_nodes
from moebius_edge.calibration.quantiser import Quantiser
from moebius_edge.calibration.recipe import Recipe
from moebius_edge.calibration.recording import Settings, record
from moebius_edge.calibration.statistics import Statistics, TensorStatistics
from moebius_edge.data.calibration_pictures import Photographs
from moebius_edge.errors import UsageError

TINY = Bundle.load("tiny", verify=False)
DENOISER = TINY.component_path("denoiser")
ATTENTION, FEED_FORWARD = (f"down_blocks.0.attentions.0.{part}" for part in ("attn1", "ff"))


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Of two calls for each of four photographs; what ``cpu`` wants includes what ``tensorrt`` does."""
    pictures = Photographs(("china", "flower", "camera", "coins"))
    return record(TINY, pictures, Settings(steps=2, target="cpu"), tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def quantiser(statistics: Statistics) -> Quantiser:
    return Quantiser(DENOISER, statistics, "minmax", "tensorrt")


def constants(model: ModelProto) -> dict[str, TensorProto]:
    return {t.name: t for t in model.graph.initializer}


def test_candidates_are_what_pays(quantiser: Quantiser, statistics: Statistics) -> None:
    assert sum(map(quantiser.share, quantiser.blocks)) == pytest.approx(1)
    for target in ("tensorrt", "cpu"):
        names = {b.name for b in Quantiser(DENOISER, statistics, "minmax", target).candidates}
        assert {ATTENTION, FEED_FORWARD, "up_blocks.0.resnets.0.conv1"} <= names
        assert not [n for n in names if n.endswith((".depthwise", ".lambda")) or "time_emb" in n]
    share = sum(map(quantiser.share, quantiser.candidates))
    assert 0.6 < share < 0.9, "lambda operators and depthwise convolutions have the rest"


def test_a_recipe_becomes_pairs_at_its_blocks(quantiser: Quantiser, statistics: Statistics) -> None:
    before = quantiser.model.SerializeToString()
    model, islands = quantiser.make(Recipe({ATTENTION: True, FEED_FORWARD: False}))
    (block,) = (b for b in quantiser.blocks if b.name == ATTENTION)
    assert sorted(quantised_nodes(model)) == sorted(block.nodes) and islands == {}
    for name in activations(quantiser.model, Recipe({ATTENTION: True})):
        scale = float(numpy_helper.to_array(constants(model)[f"{name}_scale"]))
        assert scale == pytest.approx(statistics.tensors[name].histogram.maximum / 127)
    assert quantiser.model.SerializeToString() == before


def test_the_method_of_the_ranges_counts(quantiser: Quantiser, statistics: Statistics) -> None:
    recipe = Recipe({FEED_FORWARD: True})
    clipped, whole = (
        {
            n: float(numpy_helper.to_array(t))
            for n, t in constants(q.make(recipe)[0]).items()
            if n.endswith("_scale") and not t.dims
        }
        for q in (Quantiser(DENOISER, statistics, "percentile", "tensorrt"), quantiser)
    )
    assert clipped.keys() == whole.keys() and all(clipped[n] <= whole[n] for n in whole)
    assert any(clipped[n] < 0.95 * whole[n] for n in whole)


def test_the_rest_in_fp16_has_fp16_scales_and_islands(quantiser: Quantiser) -> None:
    recipe = Recipe({ATTENTION: True})
    model, islands = quantiser.make(recipe, half=True)
    scales = {n: t.data_type for n, t in constants(model).items() if n.endswith("_scale")}
    assert scales and set(scales.values()) == {TensorProto.FLOAT16}
    assert "LayerNormalization" in islands and all(islands.values())
    assert sorted(quantised_nodes(model)) == sorted(quantised_nodes(quantiser.make(recipe)[0]))
    weights = [t for t in constants(model).values() if t.data_type == TensorProto.FLOAT16 and np.prod(t.dims) > 1000]
    assert len(weights) > 50, "the other products are in FP16"


def test_smoothing_changes_what_its_block_reads_and_no_other(quantiser: Quantiser, statistics: Statistics) -> None:
    assert {ATTENTION, FEED_FORWARD} <= quantiser.smoothable
    both = {ATTENTION: True, FEED_FORWARD: True}
    plain, smoothed = (constants(quantiser.make(Recipe(both, s))[0]) for s in ((), (ATTENTION,)))
    changed = {n for n in plain if plain[n].SerializeToString() != smoothed[n].SerializeToString()}
    assert plain.keys() == smoothed.keys()
    scales = {n for n in changed if n.endswith("_scale") and not plain[n].dims}
    read = {f"{name}_scale" for name in activations(quantiser.model, Recipe({ATTENTION: True}))}
    assert scales and scales <= read
    for name in scales:
        assert float(numpy_helper.to_array(smoothed[name])) < float(numpy_helper.to_array(plain[name]))
    # Gain and bias of the norm, weights and their scales of the products behind it.
    others = {n for n in changed - scales if ".ff" in n}
    assert others == set() and 4 <= len(changed - scales) <= 10


def test_smoothing_a_block_that_is_not_quantised_changes_nothing(quantiser: Quantiser) -> None:
    plain, smoothed = (quantiser.make(Recipe({FEED_FORWARD: True}, s))[0] for s in ((), (ATTENTION,)))
    assert plain.SerializeToString() == smoothed.SerializeToString()


def test_a_block_that_the_model_has_not_is_named(quantiser: Quantiser) -> None:
    with pytest.raises(UsageError, match=r"the recipe names blocks that the model does not have: attic: remove them"):
        quantiser.make(Recipe({ATTENTION: True, "attic": True}))
    with pytest.raises(UsageError, match="does not have: cellar"):
        quantiser.make(Recipe({ATTENTION: True}, ("cellar",)))


def test_ranges_that_are_missing_zero_or_not_finite_name_their_tensor(statistics: Statistics) -> None:
    model, recipe = onnx.load(DENOISER), Recipe({ATTENTION: True})
    name = activations(model, recipe)[0]
    tensors = dict(statistics.tensors)
    del tensors[name]
    changed = copy.copy(statistics)
    changed.tensors = tensors
    with pytest.raises(UsageError, match=f"there is no range for tensor {name}: record the calibration again"):
        Quantiser(DENOISER, changed, "minmax", "tensorrt").make(recipe)
    for value, shown in ((0.0, "0"), (np.inf, "inf")):
        tensor = TensorStatistics(None, 2)
        tensor.histogram.maximum = value
        changed.tensors = {**tensors, name: tensor}
        with pytest.raises(UsageError, match=f"activation {name} .*{shown}"):
            Quantiser(DENOISER, changed, "minmax", "tensorrt").make(recipe)
