"""What a preset adds to what was chosen, and what it leaves to the bundle."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from moebius_edge.pipeline import STARTS, Inpainter
from moebius_edge.presets import PRESETS, overridden, preset_settings
from moebius_edge.scheduler import SCHEDULERS

DEFAULTS = {"steps": 20, "guidance": 2.0, "start": "prefill", "strength": 0.4}
FAST = PRESETS["fast"]["prefill"]
FROM_NOISE = PRESETS["fast"]["noise"]


def test_presets_are_settings_of_the_pipeline_and_leave_the_picture_alone() -> None:
    for preset in PRESETS.values():
        assert tuple(preset) == STARTS
        for settings in preset.values():
            assert settings.keys() <= inspect.signature(Inpainter.inpaint).parameters.keys()
            assert not settings.keys() & {"start", "strength", "guidance", "seed"}
            assert settings["scheduler"] in SCHEDULERS


def test_nothing_chosen_is_the_presets_for_the_start() -> None:
    assert preset_settings("fast", {}, DEFAULTS, None) == FAST
    assert preset_settings("fast", {"seed": 3, "start": "noise"}, DEFAULTS, None) == FROM_NOISE != FAST
    assert preset_settings("fast", {}, {**DEFAULTS, "start": "noise"}, None) == FROM_NOISE


def test_what_is_chosen_stays() -> None:
    chosen: dict[str, Any] = {"steps": 50, "scheduler": FAST["scheduler"]}
    assert preset_settings("fast", chosen, DEFAULTS, None) == {"guidance_interval": FAST["guidance_interval"]}
    chosen |= {"guidance_interval": (0, 1000), "seed": 1}
    low, high = FAST["guidance_interval"]
    assert overridden("fast", chosen, DEFAULTS) == [
        f"preset fast has steps {FAST['steps']}, and 50 was chosen",
        f"preset fast has guidance interval {low},{high}, and 0,1000 was chosen",
    ]
    assert overridden("fast", {"guidance": 3.0, "steps": FROM_NOISE["steps"], "start": "noise"}, DEFAULTS) == []


def test_a_bundle_of_fewer_steps_keeps_them() -> None:
    assert preset_settings("fast", {}, {**DEFAULTS, "steps": 4}, None)["steps"] == 4


@pytest.mark.parametrize(
    ("chosen", "defaults", "distilled"),
    [({"guidance": 1.0}, {}, None), ({}, {"guidance": 1.0}, None), ({}, {"guidance": 2.5}, 2.5)],
)
def test_no_interval_where_a_call_has_one_row_already(
    chosen: dict[str, Any], defaults: dict[str, Any], distilled: float | None
) -> None:
    made = preset_settings("fast", chosen, DEFAULTS | defaults, distilled)
    assert "guidance_interval" not in made and made["steps"] == FAST["steps"]
