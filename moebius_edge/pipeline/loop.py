"""The sampling loop, and the one way of a batch of windows through the three networks.

``fill`` is what ``run``, the export's gate, calibration and training's evaluation execute: it encodes, calls
``denoise`` and decodes. Where the latents lie in the meantime is the runtime's business: see ``LatentBatch``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..imaging.masks import latent_mask
from ..runtimes import Runtime
from ..runtimes.base import check_finite
from ..sampling.calls import Sampling
from ..spec import NOISE_OFFSET
from .latency import StageTimer

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the denoiser is done: ``index`` counts from 1 to ``total``, and ``window`` from 1 to ``windows``."""

    index: int
    total: int
    timestep: int
    read: Callable[[], Floats]
    window: int = 1
    windows: int = 1

    @property
    def latent(self) -> Floats:
        """(B, 4, h, w), the outcome of the call; read it inside of ``on_step``, for the next call replaces it."""
        return self.read()


OnStep = Callable[[Step], None]


@dataclass(frozen=True, eq=False)
class Fill:
    """What the networks made of a batch.

    ``images`` (B, 3, R, R) span about [-1, 1] and are not clipped; ``start`` and ``masked`` are the encoder's latents
    (B, 4, h, w); ``start`` is None where sampling began from noise alone.
    """

    images: Floats
    masked: Floats
    start: Floats | None


def denoise(
    runtime: Runtime,
    latents: Floats,
    mask: Floats,
    masked: Floats,
    sampling: Sampling,
    on_step: OnStep | None = None,
    timer: StageTimer | None = None,
) -> Floats:
    """The sampling loop on an active ``runtime``: the latents (B, 4, h, w) after the last step.

    A call has 2B rows, the unconditional branch of all B first, then the conditional: e = eu + g (ec - eu).
    At guidance 1, where that is ec, it has the B conditional rows alone.

    Args:
        latents: (B, 4, h, w), noised for the scheduler's first timestep.
        mask: (B, 1, h, w), 1 in the hole.
        masked: (B, 4, h, w), latents of the images without their holes.
        on_step: called after each call of the denoiser; an exception that it raises ends the loop.
        timer: takes one entry ``denoise`` a call.

    Raises:
        BundleError: the predicted noise is not finite.
    """
    timer = timer or StageTimer()
    calls = sampling.calls()
    batch = runtime.start_sampling(latents, np.concatenate([mask, masked], axis=1), sampling.scheduler)
    for call in calls:
        with timer.measure("denoise"):
            batch.step(call)
            if call.index == call.total:
                latents = batch.read()  # the copy from a device belongs to the last step
        if on_step is not None:
            on_step(Step(call.index, call.total, call.timestep, batch.read))
    return latents


def fill(
    runtime: Runtime,
    images: Floats,
    holes: npt.NDArray[np.bool_],
    noise: Floats,
    sampling: Sampling,
    start: Floats | None = None,
    on_step: OnStep | None = None,
    timer: StageTimer | None = None,
) -> Fill:
    """Fill the holes of images of the network's size on an active ``runtime``.

    Encoder and decoder take one image at a time: two would double their memory, which is the largest on a device.

    Args:
        images: (B, 3, R, R) float32 in [-1, 1]; what lies in the holes is not seen.
        holes: (B, R, R), True where to fill.
        noise: (B, 4, h, w), as ``initial_noise`` draws it.
        start: images (B, 3, R, R) whose latents are noised for the first timestep; None starts from ``noise`` itself.

    Raises:
        BundleError: what a component returned is not finite; the message names the stage.
    """
    timer = timer or StageTimer()

    def encode(image: Floats, what: str) -> Floats:
        with timer.measure("vae_encode"):
            latent = runtime.run("vae_encoder", {"image": image})["latent"]
        check_finite(latent, "vae_encoder", f" for {what}")
        return latent

    def decode(latent: Floats) -> Floats:
        with timer.measure("vae_decode"):
            image = runtime.run("vae_decoder", {"latent": latent})["image"]
        check_finite(image, "vae_decoder")
        return image

    pairs = list(zip(images, holes, strict=True))
    masked = np.concatenate([encode(image[None] * ~hole, "the masked image") for image, hole in pairs])
    started = None if start is None else np.concatenate([encode(image[None], "the start") for image in start])
    mask = np.stack([latent_mask(hole, noise.shape[-1])[None].astype(np.float32) for hole in holes])
    latents = noise if started is None else sampling.scheduler.add_noise(started, noise)
    latents = denoise(runtime, latents, mask, masked, sampling, on_step, timer)
    return Fill(np.concatenate([decode(latent[None]) for latent in latents]), masked, started)


def initial_noise(seed: int, region_index: int, shape: tuple[int, int, int, int]) -> Floats:
    """The noise that a region starts from, (N, 4, h, w), the same on every machine and runtime.

    numpy's PCG64 seeded with ``SeedSequence([seed, region_index])`` draws float64 normals of ``shape``, then
    (N, 4, 1, 1) more, which times ``NOISE_OFFSET`` are added (upstream's offset, one an image and channel).
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, region_index])))
    noise = generator.standard_normal(shape)
    offset = generator.standard_normal((*shape[:2], 1, 1))
    return (noise + NOISE_OFFSET * offset).astype(np.float32)


def check_cache_interval(interval: int, bundle: Bundle) -> None:
    """Raise ``UsageError`` unless ``bundle`` can reuse its deep feature for ``interval`` calls."""
    if interval < 1:
        raise UsageError(f"cache interval is {interval}", "give a whole number of 1 (nothing is reused) or more")
    if interval > 1 and bundle.deep_channels is None:
        lacks = f"bundle {bundle.path} was exported without the part that reuses deep features"
        raise UsageError(f"cache interval is {interval}, and {lacks}", "leave it out, or export the checkpoint again")
