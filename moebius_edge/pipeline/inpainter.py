"""The main job: fill the masked part of a picture with a bundle's network, and change nothing else.

``Inpainter`` goes from picture to picture: ``stitching.Filling`` plans the windows that cover the mask, each goes
through ``sampling.denoise``, and is blended in before the next is cut out. Files are read and written by ``imaging``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.bundle import Bundle
from ..errors import UsageError
from ..imaging.masks import Mask, latent_mask, threshold
from ..imaging.pictures import Picture
from ..imaging.stitching import Filling
from ..imaging.windows import Window, prefill
from ..options import STARTS
from ..runtimes import AUTO, Runtime, create_runtime
from ..sampling.guidance import Interval, check_interval, choose_guidance, guidance_at
from ..sampling.scheduler import SCHEDULERS, Scheduler
from ..spec import LATENT_CHANNELS
from .deep_cache import check_cache_interval
from .loop import Floats, Step, check_finite, denoise, initial_noise, measured

if TYPE_CHECKING:
    from .latency import StageTimer

__all__ = ["STARTS", "Inpainter", "Result", "Step", "check_finite", "denoise", "initial_noise"]

STRENGTH = 0.99  # upstream's: of 20 steps the first is left out
LARGE_SHARE = 0.9  # a mask covering more of the picture than this leaves too little to go by


@dataclass(frozen=True, eq=False)
class Result:
    """The filled picture, what the user should know of it, and every setting that made it (JSON-ready)."""

    picture: Picture
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> np.ndarray:
        """(H, W, C): grey, grey and alpha, RGB, or RGB and alpha, in the input's type."""
        return self.picture.samples


class Inpainter:
    """A bundle's model, ready for one picture after another.

    ``with Inpainter("tiny") as inpainter`` loads the graphs at once and frees them at the end. Without
    ``with`` the first picture that needs them loads them, and ``close`` frees them. A runtime passed in
    already active is used as it is and left active.

    Args:
        bundle: a loaded bundle, a bundle's folder, or the name of a bundled model.
        runtime: a runtime's name, ``auto`` for the fastest that works here, or a runtime that holds the graphs
            of ``bundle``.
        device: where a runtime given by name executes; ``auto`` here too.

    Raises:
        BundleError: the bundle is missing, damaged or altered.
        UsageError, MachineError: the runtime is unknown, or this machine lacks it.
    """

    def __init__(self, bundle: Bundle | str | Path, runtime: str | Runtime = AUTO, device: str = AUTO) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        self.runtime = runtime if isinstance(runtime, Runtime) else create_runtime(runtime, self.bundle, device)
        self._opened = False

    def __enter__(self) -> Inpainter:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what the runtime holds; the next picture loads it again."""
        if self._opened:
            self._opened = False
            self.runtime.__exit__(None, None, None)

    def _open(self) -> None:
        if not self.runtime.active:
            self.runtime.__enter__()
            self._opened = True

    def inpaint(
        self,
        image: np.ndarray | Picture,
        mask: np.ndarray,
        steps: int = 20,
        guidance: float | None = None,
        start: str = "image",
        seed: int = 0,
        strength: float | None = None,
        scheduler: str = "ddim",
        feather: float | None = None,
        on_step: Callable[[Step], None] | None = None,
        timer: StageTimer | None = None,
        guidance_interval: Interval | None = None,
        on_window: Callable[[Window, Floats, Mask], None] | None = None,
        cache_interval: int = 1,
        on_plan: Callable[[int, int], None] | None = None,
        match_colours: bool = True,
    ) -> Result:
        """Fill ``mask`` in ``image``; outside the mask and its seam every pixel keeps its bytes.

        Args:
            image: a picture, or (H, W) or (H, W, 1 to 4) of uint8 or uint16. Alpha is kept as it is outside the mask
                and becomes opaque in it; grey stays grey.
            mask: (H, W), True or above half of its type's range where to fill.
            steps: length of the sampler's schedule, of which ``strength`` executes a part.
            guidance: e = eu + guidance (ec - eu); 1 needs half the network's work. Absent, 2; a model with distilled
                guidance has its own, takes no other, and always needs half the work.
            start: where sampling starts. ``image``: from the original, as upstream; what is under the mask
                leaks into the start, so an object to be removed may show through. ``prefill``: from the
                original with its hole filled by a classical inpainter, right for removing an object.
                ``noise``: from nothing.
            seed: the same seed gives the same noise on every runtime.
            strength: share of the schedule that is executed, in (0, 1]; absent, 0.99, and 1 for ``noise``.
            scheduler: a name in ``SCHEDULERS``.
            feather: width of the seam in pixels; absent, a quarter of the hole's own thickness, at most 3% of each
                window's side or 4 pixels. Where the hole comes closer than that to the edge of its window, it is
                narrower.
            on_step: called after each network call of the denoiser; with several windows in the picture,
                index and total count through all of them.
            timer: collects the stages' latencies.
            guidance_interval: (low, high), guidance at the timesteps low <= t < high alone, of 0 to 1000; the others
                need half the work. Absent, at all. A model with distilled guidance takes none.
            on_window: called with each window, what the network made of it, RGB (resolution, resolution, 3), about
                [0, 1] and not clipped, and the hole that it saw, bool (resolution, resolution). Windows then go
                through the network one by one.
            cache_interval: one call of the denoiser in so many computes all of it; those between compute its finest
                level alone, and reuse what the deeper ones made (DeepCache, arXiv 2312.00858). At 1 nothing is reused.
            on_plan: called before the work with the number of windows and of the denoiser's calls.
            match_colours: bring the colours of each fill to those round its hole, where the autoencoder shifts them;
                ``stitching.match_colours`` says how. Upstream does not.

        Raises:
            UsageError: an argument is out of range, the mask has another size than the image, or the bundle cannot
                reuse deep features.
            BundleError: a component's output is not finite; the message names the stage.
        """
        with measured(timer, "total"):
            picture = image if isinstance(image, Picture) else Picture.from_array(image)
            hole = _checked_mask(mask, picture)
            picture = picture.opaque_in(hole)
            strength = _checked_strength(start, strength)
            guide = choose_guidance(guidance, self.bundle.distilled_guidance)
            check_interval(guidance_interval, self.bundle.distilled_guidance)
            check_cache_interval(cache_interval, self.bundle)
            _check_numbers(seed, feather)
            if scheduler not in SCHEDULERS:
                raise UsageError(f"unknown scheduler {scheduler!r}: choose one of {', '.join(SCHEDULERS)}")
            sampler = SCHEDULERS[scheduler](steps, strength)
            with measured(timer, "preprocess"):
                filling = Filling(picture.pixels, hole, self.bundle.resolution, feather, match_colours)
            windows = filling.windows
            notes = [*picture.notes, *_mask_notes(hole)]
            notes += _interval_notes(guidance_interval, guide.sampled, sampler)
            if windows:
                self._open()
            groups = _groups(windows, 1 if on_window is not None else self.runtime.pictures_per_call)
            calls = len(sampler.timesteps)
            if on_plan is not None:
                on_plan(len(windows), len(groups) * calls)
            sample = partial(
                denoise,
                self.runtime,
                scheduler=sampler,
                guidance=guide.sampled,
                timer=timer,
                interval=guidance_interval,
                cache_interval=cache_interval,
            )
            widest = 0.0
            number = 0
            for done, group in enumerate(groups):

                def report(step: Step, before: int = done * calls) -> None:
                    if on_step is not None:
                        on_step(replace(step, index=before + step.index, total=len(groups) * calls))

                noises = [initial_noise(seed, number + i, self._latent_shape()) for i in range(len(group))]
                fills = self._fill(filling, group, start, noises, sampler, sample, report, timer)
                for window, (made, seen) in zip(group, fills, strict=True):
                    if on_window is not None:
                        on_window(window, made, seen)
                    with measured(timer, "stitch"):
                        widest = max(widest, filling.feather(window))
                        filling.paste(window, made)
                number += len(group)
            settings = {
                "start": start,
                "steps": steps,
                "steps_executed": calls if windows else 0,
                "guidance": guide.scale,
                "guidance_interval": None if guidance_interval is None else list(guidance_interval),
                "distilled_guidance": self.bundle.distilled_guidance,
                "cache_interval": cache_interval,
                "strength": strength,
                "scheduler": scheduler,
                "seed": seed,
                "generator": "PCG64",
                "windows": len(windows),
                "network_calls": len(groups) * calls,
                "feather_px": widest,
                "match_colours": match_colours,
            }
            return Result(replace(picture, pixels=filling.canvas), notes, settings)

    def _latent_shape(self) -> tuple[int, int, int, int]:
        return 1, LATENT_CHANNELS, self.bundle.latent_size, self.bundle.latent_size

    def _fill(
        self,
        filling: Filling,
        group: Sequence[Window],
        start: str,
        noises: Sequence[Floats],
        sampler: Scheduler,
        sample: Callable[..., Iterator[Step]],
        report: Callable[[Step], None],
        timer: StageTimer | None,
    ) -> list[tuple[Floats, Mask]]:
        """What the network makes of windows that are sampled together, and the hole that it sees in each.

        RGB in [0, 1], (resolution, resolution, 3), and bool (resolution, resolution).
        Encoder and decoder take one window at a time: two would double their memory, which is the largest on a device.
        """
        cells, masked, latents, holes = [], [], [], []
        for window, noise in zip(group, noises, strict=True):
            with measured(timer, "preprocess"):
                image, hole = filling.view(window)
                holes.append(hole)
                cells.append(latent_mask(hole, self.bundle.latent_size)[None, None].astype(np.float32))
                first = prefill(image, hole) if start == "prefill" else image
            masked.append(self._encode(_to_network(image) * ~hole, timer, "the masked image"))
            if start == "noise":
                latents.append(noise)
            else:
                latents.append(sampler.add_noise(self._encode(_to_network(first), timer, "the start"), noise))
        for step in sample(np.concatenate(latents), np.concatenate(cells), np.concatenate(masked)):
            report(step)
        return [(self._decode(latent[None], timer), hole) for latent, hole in zip(step.latent, holes, strict=True)]

    def _decode(self, latent: Floats, timer: StageTimer | None) -> Floats:
        with measured(timer, "vae_decode"):
            decoded = self.runtime.run("vae_decoder", {"latent": latent})["image"]
        check_finite(decoded, "vae_decoder")
        return decoded[0].transpose(1, 2, 0) / 2 + np.float32(0.5)

    def _encode(self, image: Floats, timer: StageTimer | None, what: str) -> Floats:
        with measured(timer, "vae_encode"):
            latent = self.runtime.run("vae_encoder", {"image": image})["latent"]
        check_finite(latent, "vae_encoder", f" for {what}")
        return latent


def _groups(windows: Sequence[Window], most: int) -> list[list[Window]]:
    """``windows`` in their order, in groups of at most ``most`` that may be sampled together: none sees another's."""
    groups: list[list[Window]] = []
    for window in windows:
        if groups and len(groups[-1]) < most and not any(window.overlaps(other) for other in groups[-1]):
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


def _to_network(image: Floats) -> Floats:
    """(H, W, 3) in [0, 1] -> (1, 3, H, W) in [-1, 1]."""
    return image.transpose(2, 0, 1)[None] * np.float32(2) - np.float32(1)


def _checked_mask(mask: np.ndarray, picture: Picture) -> Mask:
    hole = threshold(mask)
    height, width = hole.shape
    if (width, height) != picture.size:
        raise UsageError(
            f"the mask is {width}x{height} and the picture is {picture.size[0]}x{picture.size[1]}: "
            "give a mask of the picture's size"
        )
    return hole


def _mask_notes(hole: Mask) -> list[str]:
    share = float(hole.mean())
    if share == 0:
        return ["mask is empty: image returned unchanged"]
    if share > LARGE_SHARE:
        return [f"mask covers {share:.0%} of the image: little is left to guide the fill"]
    return []


def _interval_notes(interval: Interval | None, guidance: float, sampler: Scheduler) -> list[str]:
    """An interval that changes nothing, or leaves no guidance at all, may not be what was meant."""
    if interval is None:
        return []
    chosen = f"guidance interval {interval[0]},{interval[1]}"
    if guidance == 1:
        return [f"{chosen} changes nothing: guidance is 1"]
    if all(guidance_at(t, guidance, interval) == 1 for t in sampler.timesteps):
        first, last = sampler.timesteps[0], sampler.timesteps[-1]
        return [f"{chosen} holds none of the timesteps, {first} to {last}: no guidance was applied"]
    return []


def _checked_strength(start: str, strength: float | None) -> float:
    if start not in STARTS:
        raise UsageError(f"unknown start {start!r}: choose one of {', '.join(STARTS)}")
    if start != "noise":
        return STRENGTH if strength is None else strength
    if strength is not None and strength != 1:
        raise UsageError(f"strength {strength} does not go with start noise, which is strength 1: leave it out")
    return 1.0


def _check_numbers(seed: int, feather: float | None) -> None:
    if seed < 0:
        raise UsageError(f"seed is {seed}: give a whole number of 0 or more")
    if feather is not None and not (math.isfinite(feather) and feather >= 0):
        raise UsageError(f"feather is {feather}: give 0 or more pixels")
