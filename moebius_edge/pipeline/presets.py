"""Presets of ``run``: named settings that take the place of a bundle's own, see docs/few-steps.md.

A preset leaves alone where sampling starts, how strong guidance is and the seed: those are what the picture is to be,
not what it may cost. What it does depends on the start, for few steps fail differently: from a picture they begin at
less noise, since strength leaves out the first of them, and from noise the sampler of second order makes more texture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

# The interval is σ in (0.19, 1.61] as timesteps: best at guidance 2.0 in arXiv 2404.07724, table 1. The cache interval
# is the longest in diffusers' benchmark of DeepCache.
_CHEAP = {"guidance_interval": (37, 499), "cache_interval": 5}
_FAST_FROM_A_PICTURE = {"scheduler": "dpm++2m", "steps": 15, **_CHEAP}

# name -> start -> settings
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "image": _FAST_FROM_A_PICTURE,
        "prefill": _FAST_FROM_A_PICTURE,
        "noise": {"scheduler": "ddim", "steps": 8, **_CHEAP},
    },
}


def preset_settings(name: str, chosen: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
    """What the preset ``name`` adds to the settings that were ``chosen`` for ``bundle``.

    Never more steps than the bundle's; no guidance interval where guidance is 1 or distilled, for there a call has one
    row a picture already; no reuse of deep features where the bundle has no part that does it.
    """
    preset = PRESETS[name][chosen.get("start", bundle.defaults["start"])]
    settings = {**preset, "steps": min(preset["steps"], bundle.defaults["steps"])}
    if bundle.distilled_guidance is not None or chosen.get("guidance", bundle.defaults["guidance"]) == 1:
        del settings["guidance_interval"]
    if bundle.deep_channels is None:
        del settings["cache_interval"]
    return {key: value for key, value in settings.items() if key not in chosen}


def preset_notes(name: str, chosen: Mapping[str, Any], bundle: Bundle) -> list[str]:
    """A note where ``bundle`` cannot have what the preset saves most by, and the user did not choose otherwise."""
    if bundle.deep_channels is not None or "cache_interval" in chosen:
        return []
    lacks = f"preset {name} reuses deep features, and bundle {bundle.name} was exported without the part that does"
    return [f"{lacks}: export the checkpoint again, and it is faster"]
