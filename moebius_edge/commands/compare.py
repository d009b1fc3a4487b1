"""``moebius-edge compare``: how far two bundles, or two runtimes on one bundle, are apart on the same noise.

Both sides run one whole trajectory, A then B, and A's is the reference. The measuring is that of ``metrics``, which the
export's gate uses too; no PyTorch is imported. With ``--layers`` the denoisers are compared tensor by tensor instead,
by ``export.layers``.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import UsageError
from ..options import AUTO, Device, Runtime
from . import console
from .shared import AsJson, CacheInterval, Guidance, MaskFrom, Seed, Verbose

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..metrics.trajectory import Scene, Trajectory
    from ..runtimes import Runtime as Executor

_LAYERS = 20  # tensors in the table; --json has all
SEED = 20  # the gate's: ``trajectory.SEED``, which is not imported here, for that takes numpy and OpenCV


def compare(
    bundle_a: Annotated[str, Argument(metavar="BUNDLE", help="The reference: a folder, or 'tiny'.")],
    bundle_b: Annotated[str, Argument(metavar="BUNDLE", help="What is compared; it may be the same one.")],
    layers: Annotated[bool, Option("--layers", help="Compare all tensors of denoisers or .onnx files.")] = False,
    runtime_a: Annotated[Runtime, Option(help="What executes the first.")] = AUTO,
    runtime_b: Annotated[Runtime, Option(help="What executes the second.")] = AUTO,
    device_a: Annotated[Device, Option(help="Where the first executes.")] = AUTO,
    device_b: Annotated[Device, Option(help="Where the second executes.")] = AUTO,
    steps: Annotated[int, Option(min=2, max=1000, metavar="N", help="Sampling steps.")] = 20,
    guidance: Guidance = None,
    cache_interval: CacheInterval = 1,
    seed: Seed = SEED,
    image: Annotated[Path | None, Option(metavar="IMAGE", help="A photograph; default a drawn scene.")] = None,
    mask: Annotated[Path | None, Option(metavar="MASK", help="Its mask: white is filled.")] = None,
    mask_from: MaskFrom = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Compare two bundles, or two runtimes, on the same noise.

    Shows the drift of the latent after each step, then PSNR, SSIM and the worst pixel of the decoded picture. The two
    must have one resolution. --cache-interval is for the second: a bundle against itself shows what reuse costs.
    --layers shows where the denoisers part on one call, the largest relative error first.
    """
    if layers:
        _compare_layers((bundle_a, bundle_b), (device_a, device_b), as_json)
        return
    from ..bundle.bundle import Bundle
    from ..metrics.fidelity import compare as compare_trajectories
    from ..pipeline.loop import check_cache_interval
    from ..runtimes import create_runtime

    if (image is None) != (mask is None):
        raise UsageError("--image and --mask go together", "give both, or neither for the drawn scene")
    a, b = Bundle.load(bundle_a), Bundle.load(bundle_b)
    if a.resolution != b.resolution:
        first, second = f"{a.resolution}x{a.resolution}", f"{b.resolution}x{b.resolution}"
        problem = f"{bundle_a} is for {first} pixels and {bundle_b} for {second}"
        raise UsageError(problem, "compare bundles of one resolution")
    scales = _guidance_scales(a, b, guidance)
    check_cache_interval(cache_interval or 1, b)
    scene, notes = (None, []) if image is None or mask is None else _scene(image, mask, a.resolution, mask_from)
    # Both are made before either runs: a wrong name must not wait for the other side's minutes.
    runtimes = create_runtime(runtime_a, a, device_a), create_runtime(runtime_b, b, device_b)
    notes += [f"A: {text}" for text in runtimes[0].notes] + [f"B: {text}" for text in runtimes[1].notes]
    for text in notes:
        console.note(text)
    options = {"steps": steps, "seed": seed, "scene": scene}
    reference, side_a = _run("A", a, runtimes[0], 1, guidance=scales[1], **options)
    trajectory, side_b = _run("B", b, runtimes[1], cache_interval or 1, guidance=scales[2], **options)
    settings = {"steps": steps, "guidance": scales[0], "seed": seed}
    pictures = {"image": image and str(image), "mask": mask and str(mask)}
    document = {"a": side_a, "b": side_b, "settings": {**settings, **pictures}, "notes": notes}
    document["figures"] = compare_trajectories(trajectory, reference)
    if as_json:
        console.print_json(document)
    else:
        _print(document)


def _compare_layers(names: tuple[str, str], devices: tuple[str, str], as_json: bool) -> None:
    """Print where two denoisers part on one call: every tensor for ``--json``, else those that are furthest apart."""
    from ..bundle.bundle import Bundle

    files = [Path(name) if name.endswith(".onnx") else Bundle.load(name).component_path("denoiser") for name in names]
    providers = ["cpu" if device == AUTO else device for device in devices]
    with console.needs("compare --layers", "export"), console.progress() as on_progress:
        from ..export.layers import compare_layers

        found = compare_layers(files[0], files[1], None, providers[0], providers[1], on_progress)
    rows = [vars(row) | {"psnr_db": row.psnr_db if math.isfinite(row.psnr_db) else None} for row in found]
    if as_json:
        console.print_json({"a": str(files[0]), "b": str(files[1]), "tensors": rows})
    else:
        console.print_table(rows[:_LAYERS])


def _guidance_scales(a: Bundle, b: Bundle, chosen: float | None) -> tuple[float, float, float]:
    """One guidance on both sides, and what each samples with: 1 where guidance is distilled into it."""
    from ..sampling.guidance import choose_guidance

    distilled = {value for value in (a.distilled_guidance, b.distilled_guidance) if value is not None}
    if len(distilled) == 2:
        sides = f"{a.path} has guidance {a.distilled_guidance} distilled into it and {b.path} {b.distilled_guidance}"
        raise UsageError(sides, "compare bundles of one guidance")
    scale = next(iter(distilled), a.defaults["guidance"]) if chosen is None else chosen
    guides = [choose_guidance(scale, bundle.distilled_guidance) for bundle in (a, b)]
    return guides[0].scale, guides[0].sampled, guides[1].sampled


def _scene(image: Path, mask: Path, resolution: int, mask_from: str | None) -> tuple[Scene, list[str]]:
    """The picture's part with the largest hole as the network sees it, and what the user should know."""
    from ..imaging.mask_files import read_mask
    from ..imaging.pictures import read_picture
    from ..metrics.trajectory import cut_scene

    picture = read_picture(image)
    hole, mask_notes = read_mask(mask, picture, source=mask_from)
    if not hole.any():
        raise UsageError(f"mask {mask} is empty, nothing would be filled", "white must mark the hole")
    scene, windows = cut_scene(picture.pixels, hole, resolution)
    notes = [*picture.notes, *mask_notes]
    if windows > 1:
        notes.append(f"{mask} takes {windows} windows of the picture: the one that fills most is compared")
    return scene, notes


def _run(
    letter: str, bundle: Bundle, runtime: Executor, cache_interval: int, **options: Any
) -> tuple[Trajectory, dict[str, Any]]:
    """One side's trajectory, and what executed it: asked while it is active, when all of it is known."""
    from ..metrics.trajectory import run_trajectory

    with console.progress() as on_progress:
        on_step = partial(on_progress, f"{letter}, {runtime.info['name']} on {runtime.info['device']}")
        on_step(0, 0)
        with runtime:
            trajectory = run_trajectory(runtime, cache_interval=cache_interval, on_step=on_step, **options)
            info = runtime.report()
    names = ("precision", "resolution", "distilled_guidance")
    side = {"bundle": bundle.name, "path": str(bundle.path), **{name: getattr(bundle, name) for name in names}}
    denoiser = bundle.files["denoiser.onnx"]["sha256"]
    return trajectory, {**side, "cache_interval": cache_interval, "denoiser_sha256": denoiser, "runtime": info}


def _print(document: dict[str, Any]) -> None:
    for letter in "ab":
        side, runtime = document[letter], document[letter]["runtime"]
        remarks = "" if side["distilled_guidance"] is None else ", guidance distilled"
        if side["cache_interval"] > 1:
            remarks += f", deep features every {side['cache_interval']}"
        where = f"{runtime['name']} {runtime['version']} on {runtime['device']}"
        print(f"{letter.upper()}  {side['bundle']} ({side['precision']}{remarks}), {where}")
    figures = document["figures"]
    print(f"{console.shown('settings', document['settings'])}\n")
    drift = zip(figures["latent_drift"], figures["latent_rms_drift"], strict=True)
    rows = [{"step": step, "largest drift": most, "rms drift": rms} for step, (most, rms) in enumerate(drift, start=1)]
    console.print_table(rows)
    worst = figures["worst_pixel"]
    place = f"at x {worst['x']}, y {worst['y']}, {('red', 'green', 'blue')[worst['channel']]}"
    print()
    equal = " (equal)" if figures["image_max_difference"] == 0 else ""
    facts = {"PSNR": f"{figures['psnr_db']:.2f} dB{equal}", "SSIM": f"{figures['ssim']:.6f}"}
    console.print_facts({**facts, "worst pixel": f"{worst['levels']:.3g} of 255 levels {place}"})
