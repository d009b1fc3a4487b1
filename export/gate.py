"""The gate: a whole sampling trajectory on the exported files against the float32 reference, noise equal.

Both sides encode the same drawn scene, take the same steps from the same noise and decode. What is judged is
the decoded image; what is recorded also says where a difference grew. One trajectory on one scene proves the
conversion, not the model: how good the pictures are is the report's affair. The trajectory is ``..trajectory``'s
and the figures ``..fidelity``'s, which ``moebius-edge compare`` uses as well; here is the verdict.
"""

from __future__ import annotations

from typing import Any

from ..errors import QualityError
from ..pipeline import STRENGTH
from ..trajectory import SEED

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
