"""Presets of ``run``: named settings that take the place of a bundle's own. What was measured for them stands in
docs/few-steps.md.

Where a bundle cannot reuse deep features a preset goes without, and says so.

A preset leaves alone where sampling starts, how strong guidance is and the seed: those are what the picture is to be,
not what it may cost. What it does depends on the start, for few steps fail differently: from a picture they begin at
less noise, since strength leaves out the first of them, and from noise the sampler of second order makes more texture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

# σ in (0.19, 1.61] as timesteps: best at guidance 2.0 in arXiv 2404.07724, table 1.
_INTERVAL = (37, 499)
_CACHE = 5  # the longest in diffusers' benchmark of DeepCache
_FAST_FROM_A_PICTURE = {"scheduler": "dpm++2m", "steps": 15, "guidance_interval": _INTERVAL, "cache_interval": _CACHE}

# name -> start -> settings
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "image": _FAST_FROM_A_PICTURE,
        "prefill": _FAST_FROM_A_PICTURE,
        "noise": {"scheduler": "ddim", "steps": 8, "guidance_interval": _INTERVAL, "cache_interval": _CACHE},
    },
}


def preset_settings(name: str, chosen: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
    """What the preset ``name`` adds to the settings that were ``chosen`` for ``bundle``.

    Never more steps than the bundle's; no guidance interval where guidance is 1 or distilled, for there a call has one
    row a picture already; no reuse of deep features where the bundle has no part that does it.
    """
    settings = {key: value for key, value in _settings(name, chosen, bundle).items() if key not in chosen}
    if "steps" in settings:
        settings["steps"] = min(settings["steps"], bundle.defaults["steps"])
    if bundle.distilled_guidance is not None or chosen.get("guidance", bundle.defaults["guidance"]) == 1:
        settings.pop("guidance_interval", None)
    if bundle.deep_channels is None:
        settings.pop("cache_interval", None)
    return settings


def preset_notes(name: str, chosen: Mapping[str, Any], bundle: Bundle) -> list[str]:
    """A note for each setting that was ``chosen`` otherwise than the preset has it, or that ``bundle`` cannot have."""
    settings = _settings(name, chosen, bundle)
    notes = [
        f"preset {name} has {key.replace('_', ' ')} {_text(value)}, and {_text(chosen[key])} was chosen"
        for key, value in settings.items()
        if key in chosen and chosen[key] != value
    ]
    if bundle.deep_channels is None and "cache_interval" not in chosen:
        notes.append(
            f"preset {name} reuses deep features, and bundle {bundle.name} was exported without the part that does: "
            "export the checkpoint again, and it is faster"
        )
    return notes


def _settings(name: str, chosen: Mapping[str, Any], bundle: Bundle) -> dict[str, Any]:
    return PRESETS[name][chosen.get("start", bundle.defaults["start"])]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
