"""Presets of ``run``: named settings that take the place of a bundle's own, see docs/few-steps.md.

A preset leaves alone where sampling starts, how strong guidance is and the seed: those are what the picture is to be,
not what it may cost. What it does depends on the start. From a picture far fewer steps would begin at less noise, for
strength leaves out the first of them: most steps stay, and every other call reuses deep features. From noise the
sampler of second order needs fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

_FAST_FROM_A_PICTURE = {"steps": 18, "cache_interval": 2}

# name -> start -> settings
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "image": _FAST_FROM_A_PICTURE,
        "prefill": _FAST_FROM_A_PICTURE,
        "noise": {"scheduler": "dpm++2m", "steps": 8},
    },
}


def preset_settings(name: str, chosen: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
    """What the preset ``name`` adds to the settings that were ``chosen`` for ``bundle``.

    Never more steps than the bundle's; no reuse of deep features where the bundle has no part that does it.
    """
    preset = PRESETS[name][chosen.get("start", bundle.defaults["start"])]
    settings = {**preset, "steps": min(preset["steps"], bundle.defaults["steps"])}
    if bundle.deep_channels is None:
        settings.pop("cache_interval", None)
    return {key: value for key, value in settings.items() if key not in chosen}


def preset_notes(name: str, chosen: Mapping[str, Any], bundle: Bundle) -> list[str]:
    """A note where ``bundle`` cannot have what the preset saves most by, and the user did not choose otherwise."""
    reuses = "cache_interval" in PRESETS[name][chosen.get("start", bundle.defaults["start"])]
    if not reuses or bundle.deep_channels is not None or "cache_interval" in chosen:
        return []
    lacks = f"preset {name} reuses deep features, and bundle {bundle.name} was exported without the part that does"
    return [f"{lacks}: export the checkpoint again, and it is faster"]
