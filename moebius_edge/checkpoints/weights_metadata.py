"""The guidance that was distilled into a student, noted in the header of its ``.safetensors`` file.

A copy of the weights cannot lose it there. Without it such a student would be guided a second time, which raises no
error and spoils the pictures.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import BundleError, MachineError, UsageError
from ..sampling.guidance import is_distillable
from .weights_file import is_safetensors, open_weights

_KEY = "distilled_guidance"


def guidance_metadata(guidance: float) -> dict[str, str]:
    """The ``metadata`` to give to ``safetensors.torch.save`` with the weights of a student that learned ``guidance``.

    Raises UsageError unless it is finite and more than 1.
    """
    if not is_distillable(guidance):
        raise UsageError(f"distilled guidance is {guidance}: give a number of more than 1, such as 2.0")
    return {_KEY: repr(float(guidance))}


def find_guidance(checkpoint: Path, given: float | None) -> float | None:
    """The guidance distilled into ``checkpoint``: what is noted there, else what the user has ``given``, else None.

    Raises:
        UsageError: ``given`` is no guidance to distil, or not the one noted.
        BundleError: the file is damaged, or the note is no guidance.
        MachineError: the file cannot be read.
    """
    if given is not None:
        guidance_metadata(given)
    try:
        with checkpoint.open("rb") as file:
            can_have_note = is_safetensors(file.read(16))
    except OSError as error:
        raise MachineError(f"{checkpoint} cannot be read ({error.strerror or error}): give a readable file") from error
    note = open_weights(checkpoint).metadata.get(_KEY) if can_have_note else None
    if note is None:
        return given
    try:
        noted = float(guidance_metadata(float(note))[_KEY])
    except (ValueError, UsageError):
        raise BundleError(
            f"{checkpoint} notes the {_KEY} {note!r:.40}, not a number of more than 1: copy it again, or train it again"
        ) from None
    if given not in (None, noted):
        raise UsageError(
            f"{checkpoint} notes guidance {noted} as distilled, not {given}: leave --distilled-guidance out"
        )
    return noted
