"""Presets of ``run``: named settings that take the place of a bundle's own. What was measured for them stands in
docs/few-steps.md.

A preset leaves alone where sampling starts, how strong guidance is and the seed: those are what the picture is to be,
not what it may cost. What it does depends on the start, for few steps fail differently: from a picture they begin at
less noise, since strength leaves out the first of them, and from noise the sampler of second order makes more texture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# σ in (0.19, 1.61] as timesteps: best at guidance 2.0 in arXiv 2404.07724, table 1.
_INTERVAL = (37, 499)
_FAST_FROM_A_PICTURE = {"scheduler": "dpm++2m", "steps": 15, "guidance_interval": _INTERVAL}

# name -> start -> settings
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "image": _FAST_FROM_A_PICTURE,
        "prefill": _FAST_FROM_A_PICTURE,
        "noise": {"scheduler": "ddim", "steps": 8, "guidance_interval": _INTERVAL},
    },
}


def preset_settings(
    name: str, chosen: Mapping[str, Any], defaults: Mapping[str, Any], distilled_guidance: float | None
) -> dict[str, Any]:
    """What the preset ``name`` adds to the settings that were ``chosen``, for a bundle with these ``defaults``.

    Never more steps than the bundle's, and no guidance interval where guidance is 1 or distilled: there a call has one
    row a picture already.
    """
    settings = {key: value for key, value in _settings(name, chosen, defaults).items() if key not in chosen}
    if "steps" in settings:
        settings["steps"] = min(settings["steps"], defaults["steps"])
    if distilled_guidance is not None or chosen.get("guidance", defaults["guidance"]) == 1:
        settings.pop("guidance_interval", None)
    return settings


def overridden(name: str, chosen: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """A note for each setting that was ``chosen`` otherwise than the preset has it."""
    return [
        f"preset {name} has {key.replace('_', ' ')} {_text(value)}, and {_text(chosen[key])} was chosen"
        for key, value in _settings(name, chosen, defaults).items()
        if key in chosen and chosen[key] != value
    ]


def _settings(name: str, chosen: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return PRESETS[name][chosen.get("start", defaults["start"])]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
