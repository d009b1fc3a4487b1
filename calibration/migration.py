"""Moving the outliers of activations into the weights, where a scale for each channel takes them: SmoothQuant.

X · W = (X / s) · (s W) for a factor s of each input channel. The division goes into what makes X, such as the
gain of a norm; that is the exporter's business. Arithmetic here, no graphs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

ALPHA = 0.5  # the paper's for most of its networks


def migration_factors(
    name: str, activations: npt.ArrayLike, weights: npt.ArrayLike, alpha: float = ALPHA
) -> npt.NDArray[np.float32]:
    """s (C,) by which channel j of the activations is divided, and of the weights multiplied.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), equation 4 of Xiao et al., arXiv 2211.10438. A channel that is zero on
    either side has nothing to move: its factor is 1.

    Args:
        name: of the activation, for errors.
        activations: largest |X| of each input channel, (C,).
        weights: largest |W| of each input channel, (C,).
        alpha: 0 moves the weights' outliers into the activations, 1 the activations' into the weights.

    Raises:
        UsageError: ``alpha`` is not in [0, 1], or a maximum is not finite.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha of the migration is {alpha}: give a number from 0 to 1")
    x, w = np.asarray(activations, np.float64), np.asarray(weights, np.float64)
    if x.ndim != 1 or x.shape != w.shape:
        raise ValueError(f"{name} has maxima of shape {x.shape} and its weight {w.shape}: give one a channel for both")
    if not (np.isfinite(x).all() and np.isfinite(w).all()):
        raise UsageError(f"a channel of activation {name} or of its weight is not finite: leave its node out of INT8")
    alive = (x > 0) & (w > 0)
    factors = np.where(alive, x, 1) ** alpha / np.where(alive, w, 1) ** (1 - alpha)
    return factors.astype(np.float32)
