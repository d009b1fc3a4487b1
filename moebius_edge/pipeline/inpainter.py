"""The main job: fill the masked part of a picture with a bundle's network, and change nothing else.

``Inpainter.inpaint`` plans the windows that cover the mask (``stitching.Filling``); each goes through ``loop.fill`` and
is blended in before the next is cut out. ``Inpainter(...)(image=..., mask_image=...)`` is the same with the names of a
diffusers inpainting pipeline. Files are read and written by ``imaging``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..bundle.bundle import Bundle
from ..errors import UsageError
from ..imaging.masks import Mask, threshold
from ..imaging.pictures import Picture
from ..imaging.stitching import Filling
from ..imaging.windows import Window, prefill
from ..options import STARTS
from ..runtimes import AUTO, Runtime, create_runtime
from ..sampling.calls import Sampling
from ..sampling.guidance import Interval, check_interval, choose_guidance
from ..sampling.scheduler import SCHEDULERS
from .latency import StageTimer
from .loop import Fill, Floats, OnStep, Step, check_cache_interval, fill, initial_noise

if TYPE_CHECKING:
    from PIL.Image import Image

STRENGTH = 0.99  # upstream's: of 20 steps the first is left out
_LARGE_SHARE = 0.9  # a mask that covers more of the picture leaves too little to go by
OnWindow = Callable[[Window, Floats, Mask], None]


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

    @property
    def pil(self) -> Image:
        """The picture for Pillow, in 8 bits a channel."""
        from PIL.Image import fromarray

        samples = self.image
        if samples.dtype == np.uint16:
            samples = np.rint(samples / 257).astype(np.uint8)
        return fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)


class Images(NamedTuple):
    """What a call of an ``Inpainter`` returns, as a diffusers pipeline does: ``images`` are of Pillow."""

    images: list[Image]


class Inpainter:
    """A bundle's model, ready for one picture after another.

    ``with Inpainter("tiny") as inpainter`` loads the graphs at once and frees them at the end. Without
    ``with`` the first picture that needs them loads them, and ``close`` frees them. A runtime passed in
    already active is used as it is and left active.

    Args:
        bundle: a loaded bundle, a bundle's folder, or the name of a bundled model.
        runtime: a runtime's name, ``auto`` for the fastest that works here, or a runtime that holds the components
            of ``bundle``.
        device: where a runtime given by name executes; ``auto`` here too.

    Raises:
        BundleError: the bundle is missing, damaged or altered.
        UsageError, MachineError: the runtime is unknown, or this machine lacks it.
    """

    def __init__(self, bundle: Bundle | str | Path, runtime: str | Runtime = AUTO, device: str = AUTO) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle, verify=False)
        self.runtime = runtime if isinstance(runtime, Runtime) else create_runtime(runtime, self.bundle, device)
        if self.bundle is not bundle and self.runtime.executes_onnx:
            self.bundle.verify()
        self._opened = False
        self.fill: Callable[..., Fill] = fill  # replaced where one thread runs the networks and others do the rest

    def __enter__(self) -> Inpainter:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
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
        image: np.ndarray | Picture | Image,
        mask: np.ndarray | Image,
        steps: int = 20,
        guidance: float | None = None,
        start: str = "image",
        seed: int = 0,
        strength: float | None = None,
        scheduler: str = "ddim",
        feather: float | None = None,
        on_step: OnStep | None = None,
        timer: StageTimer | None = None,
        guidance_interval: Interval | None = None,
        on_window: OnWindow | None = None,
        cache_interval: int = 1,
        match_colours: bool = True,
        match_depth: float = 0.0,
    ) -> Result:
        """Fill ``mask`` in ``image``; outside the mask and its seam every pixel keeps its bytes.

        Args:
            image: a picture, of Pillow's too, or (H, W) or (H, W, 1 to 4) of uint8 or uint16. Alpha is kept outside
                the mask and becomes opaque in it; grey stays grey.
            mask: (H, W), True or above half of its type's range where to fill; one of Pillow's counts by brightness.
            steps: length of the sampler's schedule, of which ``strength`` executes a part.
            guidance: e = eu + guidance (ec - eu); 1 needs half the network's work. The default is 2; a model with
                distilled guidance has its own, takes no other, and always needs half the work.
            start: ``image`` starts from the original, as upstream; what is under the mask leaks into the start.
                ``prefill`` starts from the original with its hole filled by a classical inpainter, right for removing
                an object. ``noise`` starts from nothing.
            seed: the same seed gives the same noise on every runtime.
            strength: share of the schedule that is executed, in (0, 1]; by default 0.99, and 1 for ``noise``.
            scheduler: a name in ``SCHEDULERS``.
            feather: width of the seam in pixels; by default it follows the hole, see ``stitching.seam``.
            on_step: called after each call of the denoiser; index and total count through all windows.
            timer: collects the stages' latencies.
            guidance_interval: (low, high), guidance at the timesteps low <= t < high alone, of 0 to 1000; the others
                need half the work. By default all are guided. A model with distilled guidance takes none.
            on_window: called with each window, its fill as RGB (resolution, resolution, 3), about [0, 1] and not
                clipped, and the hole that the network saw. Windows then go through the network one by one.
            cache_interval: one call of the denoiser in so many computes all of it; those between compute its finest
                level alone, and reuse the deep feature (DeepCache, arXiv 2312.00858). At 1 nothing is reused.
            match_colours: bring the colours of each fill to those round its hole, where the autoencoder shifts them.
                Upstream does not.
            match_depth: how deep in the hole colours follow a smooth classical fill, in pixels of the network: for a
                weak network, whose colours are wrong there. See ``stitching.match_colours``.

        Raises:
            UsageError: an argument is out of range, the mask has another size than the image, or the bundle cannot
                reuse deep features.
            BundleError: a component's output is not finite; the message names the stage.
        """
        timer = timer or StageTimer()
        with timer.measure("total"):
            picture = image if isinstance(image, Picture) else Picture.from_array(_array(image))
            hole = _checked_mask(mask, picture)
            picture = picture.opaque_in(hole)
            sampling = self._sampling(steps, strength, start, scheduler, guidance, guidance_interval, cache_interval)
            if seed < 0:
                raise UsageError(f"seed is {seed}", "give a whole number of 0 or more")
            if feather is not None and not 0 <= feather < math.inf:
                raise UsageError(f"feather is {feather}", "give 0 or more pixels")
            if not 0 <= match_depth < math.inf:
                raise UsageError(f"match_depth is {match_depth}", "give 0 or more pixels")
            with timer.measure("preprocess"):
                filling = Filling(picture.pixels, hole, self.bundle.resolution, feather, match_colours, match_depth)
            if filling.windows:
                self._open()
            groups = _groups(filling.windows, 1 if on_window is not None else self.runtime.pictures_per_call)
            calls, done = len(sampling.scheduler.timesteps), 0

            def report(step: Step) -> None:
                if on_step is not None:
                    index, total = done * calls + step.index, len(groups) * calls
                    on_step(replace(step, index=index, total=total, window=first + 1, windows=len(filling.windows)))

            for done, group in enumerate(groups):
                first = sum(map(len, groups[:done]))
                with timer.measure("preprocess"):
                    images, holes, starts = _views(filling, group, start)
                    noise = self._noise(seed, range(first, first + len(group)))
                filled = self.fill(self.runtime, images, holes, noise, sampling, starts, report, timer)
                _paste(filling, group, holes, filled.images, on_window, timer)
        notes = [*picture.notes, *_notes(hole, sampling)]
        settings = {
            "start": start,
            "steps": steps,
            "steps_executed": calls if groups else 0,
            "guidance": choose_guidance(guidance, self.bundle.distilled_guidance).scale,
            "guidance_interval": None if guidance_interval is None else list(guidance_interval),
            "distilled_guidance": self.bundle.distilled_guidance,
            "cache_interval": cache_interval,
            "strength": sampling.scheduler.strength,
            "scheduler": scheduler,
            "seed": seed,
            "generator": "PCG64",
            "windows": len(filling.windows),
            "network_calls": len(groups) * calls,
            "feather_px": max(map(filling.feather, filling.windows), default=0.0),
            "match_colours": match_colours,
            "match_depth": match_depth if match_colours else 0.0,
        }
        return Result(replace(picture, pixels=filling.canvas), notes, settings)

    def _noise(self, seed: int, windows: Iterable[int]) -> Floats:
        """(B, C, h, w): each window, by its number, has its own noise."""
        shape = (1, self.bundle.latent_channels, self.bundle.latent_size, self.bundle.latent_size)
        return np.concatenate([initial_noise(seed, window, shape) for window in windows])

    def __call__(
        self,
        image: Any,
        mask_image: Any,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        strength: float | None = None,
        generator: Any = 0,
        **unsupported: Any,
    ) -> Images:
        """Fill pictures with the arguments of a diffusers inpainting pipeline, and the bundle's own for the others.

        Args:
            image, mask_image: a picture and its mask as for ``inpaint``, or a list of each.
            strength: 1 starts from noise, less from the image.
            generator: a seed, or an object with ``initial_seed()``, such as PyTorch's generator.
            unsupported: other arguments of such pipelines may be None or empty, as in ``prompt=""``.

        Raises:
            UsageError: as ``inpaint``, or for an argument that this network has no use for, such as a prompt.
        """
        if given := [name for name, value in unsupported.items() if value not in (None, "", [])]:
            why = "since it is conditioned on the picture and its mask alone"
            raise UsageError(f"the network takes no {', '.join(given)}, {why}", "leave it out")
        images, masks = (value if isinstance(value, (list, tuple)) else [value] for value in (image, mask_image))
        if len(images) != len(masks):
            raise UsageError(f"there are {len(images)} images and {len(masks)} masks", "give a mask for each image")
        start = None if strength is None else "noise" if strength == 1 else "image"
        arguments = {"steps": num_inference_steps, "guidance": guidance_scale, "strength": strength, "start": start}
        settings = self.bundle.settings(**{name: value for name, value in arguments.items() if value is not None})
        seed = int(generator.initial_seed() if hasattr(generator, "initial_seed") else generator or 0)
        return Images([self.inpaint(i, m, seed=seed, **settings).pil for i, m in zip(images, masks, strict=True)])

    def _sampling(
        self,
        steps: int,
        strength: float | None,
        start: str,
        scheduler: str,
        guidance: float | None,
        interval: Interval | None,
        cache_interval: int,
    ) -> Sampling:
        """How ``inpaint`` samples with these arguments, or ``UsageError`` for one that is out of range."""
        if start not in STARTS:
            raise UsageError(f"unknown start {start!r}", f"choose one of {', '.join(STARTS)}")
        if scheduler not in SCHEDULERS:
            raise UsageError(f"unknown scheduler {scheduler!r}", f"choose one of {', '.join(SCHEDULERS)}")
        if start == "noise" and strength not in (None, 1):
            raise UsageError(f"strength {strength} does not go with start noise, which is strength 1", "leave it out")
        if strength is None:
            strength = 1.0 if start == "noise" else STRENGTH
        guide = choose_guidance(guidance, self.bundle.distilled_guidance)
        check_interval(interval, self.bundle.distilled_guidance)
        check_cache_interval(cache_interval, self.bundle)
        return Sampling(SCHEDULERS[scheduler](steps, strength), guide.sampled, interval, cache_interval)


def _array(image: np.ndarray | Image) -> np.ndarray:
    """An array as it is; a picture of Pillow's as uint8 or uint16, in a mode that the pipeline knows."""
    if isinstance(image, np.ndarray):
        return image
    if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return np.asarray(image)


def _views(filling: Filling, windows: Sequence[Window], start: str) -> tuple[Floats, Mask, Floats | None]:
    """The images (B, 3, R, R) in [-1, 1] that the network sees, their holes (B, R, R), and where sampling starts."""
    views = [filling.view(window) for window in windows]
    images, holes = np.stack([_to_network(image) for image, _ in views]), np.stack([hole for _, hole in views])
    if start == "prefill":
        return images, holes, np.stack([_to_network(prefill(image, hole)) for image, hole in views])
    return images, holes, images if start == "image" else None


def _paste(
    filling: Filling,
    windows: Sequence[Window],
    holes: Mask,
    images: Floats,
    on_window: OnWindow | None,
    timer: StageTimer,
) -> None:
    """Blend the decoded ``images`` (B, 3, R, R) in [-1, 1] of ``windows`` into the picture."""
    for window, hole, decoded in zip(windows, holes, images, strict=True):
        generated = decoded.transpose(1, 2, 0) / 2 + np.float32(0.5)
        if on_window is not None:
            on_window(window, generated, hole)
        with timer.measure("stitch"):
            filling.paste(window, generated)


def _to_network(image: Floats) -> Floats:
    """(H, W, 3) in [0, 1] -> (3, H, W) in [-1, 1]."""
    return image.transpose(2, 0, 1) * np.float32(2) - np.float32(1)


def _groups(windows: Sequence[Window], most: int) -> list[list[Window]]:
    """``windows`` in their order, in groups of at most ``most`` of which none overlaps another, to be sampled
    together."""
    groups: list[list[Window]] = []
    for window in windows:
        if groups and len(groups[-1]) < most and not any(window.overlaps(other) for other in groups[-1]):
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


def _checked_mask(mask: np.ndarray | Image, picture: Picture) -> Mask:
    hole = threshold(mask if isinstance(mask, np.ndarray) else np.asarray(mask.convert("L")))
    if hole.shape[::-1] != picture.size:
        (height, width), (wide, high) = hole.shape, picture.size
        problem = f"the mask is {width}x{height} and the picture is {wide}x{high}"
        raise UsageError(problem, "give a mask of the picture's size")
    return hole


def _notes(hole: Mask, sampling: Sampling) -> list[str]:
    """What may not have been meant: an empty mask or one over nearly everything, an interval without guidance."""
    notes, share, interval = [], float(hole.mean()), sampling.interval
    if share == 0:
        notes.append("mask is empty: image returned unchanged")
    elif share > _LARGE_SHARE:
        notes.append(f"mask covers {share:.0%} of the image: little is left to guide the fill")
    if interval is not None and all(call.rows == 1 for call in sampling.calls()):
        notes.append(f"guidance interval {interval[0]},{interval[1]} holds no timestep with guidance: none was applied")
    return notes
