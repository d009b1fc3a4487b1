"""The gate: a whole sampling trajectory on the exported files against the float32 reference, noise equal.

Both sides encode the same drawn scene, take the same steps from the same noise and decode. What is judged is
the decoded image; what is recorded also says where a difference grew. One trajectory on one scene proves the
conversion, not the model: how good the pictures are is the report's affair. The trajectory is ``..trajectory``'s
and the figures ``..fidelity``'s, which ``moebius-edge compare`` uses as well; here is the verdict.

The part of the denoiser that reuses a deep feature is judged by one call: given the feature of the same call, it must
give the whole denoiser's noise. What reuse costs over a trajectory is a setting's affair, not the conversion's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import QualityError
from ..metrics.trajectory import SEED
from ..pipeline.inpainter import STRENGTH
from ..runtimes import Runtime
from ..runtimes.base import drawn_feeds
from ..spec import DEEP, DENOISER, SHALLOW

CONDITIONS = {"seed": SEED, "strength": STRENGTH, "scheduler": "ddim"}


def judge(figures: dict[str, Any], min_psnr_db: float) -> None:
    """Raise ``QualityError`` with the figures unless the decoded image reaches ``min_psnr_db``."""
    if figures["psnr_db"] >= min_psnr_db:  # a NaN fails too
        return
    drift = figures["latent_drift"]
    raise QualityError(
        f"quality gate missed: the decoded image is {figures['psnr_db']:.2f} dB from the PyTorch reference, "
        f"{min_psnr_db:g} dB is the floor; the encoder differs by {figures['encoded_max_difference']:.1e}, "
        f"the latent by {drift[0]:.1e} after step 1 and {drift[-1]:.1e} after step {len(drift)}; nothing was "
        "saved: try another onnxruntime version, or lower --min-psnr to accept the difference"
    )


# Of the noise's largest value: only the order of sums may differ, and roundings where the types are shorter.
SHALLOW_DIFFERENCE = {"float32": 1e-4, "float16": 1e-2, "int8": 1e-2}


def shallow_difference(runtime: Runtime) -> float:
    """The largest difference between the noise of the whole denoiser and of its shallow part, over the largest noise.

    One call with a row of each branch, on an active ``runtime``.
    """
    feeds = drawn_feeds(runtime.components[DENOISER], 2)
    whole = runtime.run(DENOISER, feeds)
    noise = runtime.run(SHALLOW, {**feeds, DEEP: whole[DEEP]})["noise"]
    return float(f"{np.abs(noise - whole['noise']).max() / np.abs(whole['noise']).max():.3g}")


def judge_shallow(difference: float, precision: str) -> None:
    """Raise ``QualityError`` unless a ``shallow_difference`` is one of rounding alone."""
    if not difference <= SHALLOW_DIFFERENCE[precision]:
        raise QualityError(
            f"quality gate missed: the shallow part of the denoiser differs from the whole by {difference:.1e} of the "
            f"largest noise, {SHALLOW_DIFFERENCE[precision]:g} is allowed; nothing was saved: try another onnxruntime "
            "version"
        )
