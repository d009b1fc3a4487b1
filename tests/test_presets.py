"""What a preset adds to what was chosen, and what it leaves to the bundle."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.pipeline.inpainter import STARTS, Inpainter
from moebius_edge.pipeline.presets import PRESETS, preset_notes, preset_settings
from moebius_edge.sampling.scheduler import SCHEDULERS

FAST = PRESETS["fast"]["prefill"]
FROM_NOISE = PRESETS["fast"]["noise"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = Bundle.load(make_toy_bundle(tmp_path_factory.mktemp("deep") / "toy", deep=True))
    return replace(made, defaults={"steps": 20, "guidance": 2.0, "start": "prefill", "strength": 0.4})


def test_presets_are_settings_of_the_pipeline_and_leave_the_picture_alone() -> None:
    for preset in PRESETS.values():
        assert tuple(preset) == STARTS
        for settings in preset.values():
            assert settings.keys() <= inspect.signature(Inpainter.inpaint).parameters.keys()
            assert not settings.keys() & {"start", "strength", "guidance", "seed"}
            assert settings.get("scheduler", "ddim") in SCHEDULERS


def test_nothing_chosen_is_the_presets_for_the_start(bundle: Bundle) -> None:
    assert preset_settings("fast", {}, bundle) == FAST
    assert preset_settings("fast", {"seed": 3, "start": "noise"}, bundle) == FROM_NOISE != FAST
    from_noise = replace(bundle, defaults={**bundle.defaults, "start": "noise"})
    assert preset_settings("fast", {}, from_noise) == FROM_NOISE
    assert preset_notes("fast", {}, bundle) == []
    fewer_steps = replace(bundle, defaults={**bundle.defaults, "steps": 4})
    assert preset_settings("fast", {"start": "noise"}, fewer_steps) == FROM_NOISE | {"steps": 4}


def test_what_is_chosen_stays(bundle: Bundle) -> None:
    chosen: dict[str, Any] = {"steps": 50, "start": "noise"}
    assert preset_settings("fast", chosen, bundle) == {"scheduler": FROM_NOISE["scheduler"]}
    assert preset_settings("fast", {"cache_interval": 1, "steps": 9, "seed": 1}, bundle) == {}


def test_a_bundle_that_cannot_reuse_features_goes_without_and_says_so(bundle: Bundle) -> None:
    plain = replace(bundle, deep_channels=None)
    rest = {name: value for name, value in FAST.items() if name != "cache_interval"}
    assert preset_settings("fast", {}, plain) == rest
    (note,) = preset_notes("fast", {}, plain)
    assert note == (
        "preset fast reuses deep features, and bundle toy was exported without the part that does: "
        "export the checkpoint again, and it is faster"
    )
    assert preset_notes("fast", {"cache_interval": 1}, plain) == preset_notes("fast", {"start": "noise"}, plain) == []
