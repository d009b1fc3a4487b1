"""The sampler's arithmetic as an engine of its own, ``update``: what it is fed and what it gives. No bundle has it.

Between two calls of the denoiser lie guidance and one step of the sampler, both linear in what is on the device. So one
small network, which ``export.update_network`` defines with TensorRT's own calls, serves every sampler: the numbers that
differ from step to step are its input ``coefficients``.

Every tensor has the denoiser's N rows, so that it runs at any batch the denoiser runs at. Row r belongs to picture
r mod B; its two rows carry the same latent.
"""

from __future__ import annotations

import numpy as np

from ..sampling.scheduler import LinearStep
from ..spec import LATENT_CHANNELS, Component, Tensor

UPDATE = "update"
COEFFICIENTS = ("guidance", *LinearStep._fields)


def update_component(latent_size: int) -> Component:
    """The tensors of ``update``. It is known by them: an engine with others is refused, so new arithmetic needs a
    new name here.

    With e = eu + guidance (ec - eu), x and m the latent and the rest of ``sample``, p ``clean``, and the coefficients:
    ``next_sample`` is x' = latent·x + noise·e + previous·p, then m; ``next_clean`` is clean_latent·x + clean_noise·e;
    ``magnitude`` is Σ|noise|, which is finite where all of the noise is (unless that lies beyond 1e33).
    """

    def tensor(name: str, channels: int) -> Tensor:
        return Tensor(name, "float32", ("N", channels, latent_size, latent_size))

    return Component(
        UPDATE,
        (
            tensor("sample", 2 * LATENT_CHANNELS + 1),
            tensor("noise", LATENT_CHANNELS),
            tensor("clean", LATENT_CHANNELS),
            Tensor("unconditional", "int32", ("N",)),  # the row of ``noise`` that is this row's eu
            Tensor("conditional", "int32", ("N",)),  # and its ec: the same row where there is no guidance
            Tensor("coefficients", "float32", ("N", len(COEFFICIENTS), 1, 1)),
        ),
        (
            tensor("next_sample", 2 * LATENT_CHANNELS + 1),
            tensor("next_clean", LATENT_CHANNELS),
            Tensor("magnitude", "float32", ("N", 1, 1, 1)),
        ),
    )


def guidance_rows(rows: int, batch: int) -> dict[str, np.ndarray]:
    """``unconditional`` and ``conditional`` for a denoiser that has the ``batch`` unconditional rows first.

    With ``rows`` equal to ``batch`` both are the row itself, and e is the noise as it is.
    """
    first = np.arange(rows, dtype=np.int32) % batch
    return {"unconditional": first, "conditional": first + np.int32(rows - batch)}
