"""``moebius-edge compare``: how far two bundles, or two runtimes on one bundle, are apart on the same noise.

Both sides run one whole trajectory, A then B, and A's is the reference. The measuring is ``..trajectory``'s and
``..fidelity``'s, which the export's gate uses too; no PyTorch is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import console

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..metrics.trajectory import Scene, Trajectory
    from ..runtimes import Runtime
    from ..sampling.guidance import Guidance

SEED = 20  # the gate's: ``trajectory.SEED``, which is not imported here, for that takes numpy and OpenCV


def compare(
    bundle_a: Annotated[str, typer.Argument(metavar="BUNDLE", help="The reference: a folder, or 'tiny'.")],
    bundle_b: Annotated[str, typer.Argument(metavar="BUNDLE", help="What is compared; it may be the same one.")],
    runtime_a: Annotated[str, typer.Option(metavar="NAME", help="What executes the first.")] = "auto",
    runtime_b: Annotated[str, typer.Option(metavar="NAME", help="What executes the second.")] = "auto",
    device_a: Annotated[str, typer.Option(metavar="NAME", help="Where the first executes.")] = "auto",
    device_b: Annotated[str, typer.Option(metavar="NAME", help="Where the second executes.")] = "auto",
    steps: Annotated[int, typer.Option(min=2, max=1000, metavar="N", help="Sampling steps.")] = 20,
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="X", help="Guidance, 1 halves the time; default 2, or what is distilled."),
    ] = None,
    cache_interval: Annotated[
        int, typer.Option(min=1, metavar="N", help="Reuse deep features in the second: one call in N computes them.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the noise, and of the drawn scene.")] = SEED,
    image: Annotated[Path | None, typer.Option(metavar="IMAGE", help="A photograph; default a drawn scene.")] = None,
    mask: Annotated[Path | None, typer.Option(metavar="MASK", help="Its mask: white is filled.")] = None,
    mask_from: Annotated[
        str | None,
        typer.Option(metavar="alpha|luma|red|green|blue|index:N", help="What of MASK marks the hole, as of run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Compare two bundles, or two runtimes, on the same noise.

    Shows the drift of the latent after each step, then PSNR, SSIM and the worst pixel of the decoded picture.
    The two must have one resolution. A bundle against itself with --cache-interval shows what reuse costs.
    """
    from ..bundle.bundle import Bundle
    from ..metrics.fidelity import compare as compare_trajectories
    from ..pipeline.loop import check_cache_interval
    from ..runtimes import create_runtime

    if (image is None) != (mask is None):
        raise UsageError("--image and --mask go together: give both, or neither for the drawn scene")
    bundles = (Bundle.load(bundle_a), Bundle.load(bundle_b))
    first, second = bundles
    if first.resolution != second.resolution:
        raise UsageError(
            f"{bundle_a} is for {first.resolution}x{first.resolution} pixels and {bundle_b} for "
            f"{second.resolution}x{second.resolution}: compare bundles of one resolution"
        )
    guides = _guides(bundles, guidance)
    check_cache_interval(cache_interval, second)
    scene, notes = (None, []) if image is None or mask is None else _scene(image, mask, first.resolution, mask_from)
    # Both are made before either runs: a wrong name must not wait for the other side's minutes.
    choices = ((runtime_a, device_a), (runtime_b, device_b))
    runtimes = [create_runtime(name, b, device) for b, (name, device) in zip(bundles, choices, strict=True)]
    notes += [f"{letter}: {text}" for letter, runtime in zip("AB", runtimes, strict=True) for text in runtime.notes]
    for text in notes:
        console.note(text)
    trajectories, infos = [], []
    intervals = (1, cache_interval)  # the reference computes all of every call
    for letter, runtime, guide, interval in zip("AB", runtimes, guides, intervals, strict=True):
        trajectory, info = _run(letter, runtime, steps, guide.sampled, seed, scene, interval)
        trajectories.append(trajectory)
        infos.append(info)
    figures = compare_trajectories(trajectories[1], trajectories[0])
    document = {
        "a": _side(first, infos[0], 1),
        "b": _side(second, infos[1], cache_interval),
        "settings": {
            "steps": steps,
            "guidance": guides[0].scale,
            "seed": seed,
            "image": None if image is None else str(image),
            "mask": None if mask is None else str(mask),
        },
        "notes": notes,
        "figures": figures,
        "exit_code": 0,
    }
    if as_json:
        console.print_json(document)
    else:
        _print(document)


def _guides(bundles: tuple[Bundle, Bundle], chosen: float | None) -> list[Guidance]:
    """One guidance on both sides, which one of them, or each, may have distilled into it."""
    from ..sampling.guidance import choose_guidance

    distilled = [b.distilled_guidance for b in bundles]
    known = {g for g in distilled if g is not None}
    if len(known) == 2:
        raise UsageError(
            f"{bundles[0].path} has guidance {distilled[0]} distilled into it and {bundles[1].path} {distilled[1]}: "
            "compare bundles of one guidance"
        )
    return [choose_guidance(next(iter(known), None) if chosen is None else chosen, g) for g in distilled]


def _scene(image: Path, mask: Path, resolution: int, mask_from: str | None) -> tuple[Scene, list[str]]:
    """The picture's part with the largest hole as the network sees it, and what the user should know."""
    from ..imaging.mask_files import read_mask
    from ..imaging.pictures import read_picture
    from ..metrics.trajectory import cut_scene

    picture = read_picture(image)
    hole, mask_notes = read_mask(mask, picture, source=mask_from)
    if not hole.any():
        raise UsageError(f"mask {mask} is empty, nothing would be filled: white must mark the hole")
    scene, windows = cut_scene(picture.pixels, hole, resolution)
    notes = [*picture.notes, *mask_notes]
    if windows > 1:
        notes.append(f"{mask} takes {windows} windows of the picture: the one that fills most is compared")
    return scene, notes


def _run(
    letter: str, runtime: Runtime, steps: int, guidance: float, seed: int, scene: Scene | None, cache_interval: int
) -> tuple[Trajectory, dict[str, Any]]:
    """One side's trajectory, and what executed it: asked while it is active, when all of it is known."""
    from ..metrics.trajectory import run_trajectory

    infos: list[dict[str, Any]] = []
    with console.progress() as update:
        label = f"{letter}, {runtime.info['name']} on {runtime.info['device']}"
        update(label, 0, 0)

        def on_step(done: int, total: int) -> None:
            update(label, done, total)
            if not infos:
                infos.append(runtime.report())

        trajectory = run_trajectory(
            runtime,
            steps=steps,
            guidance=guidance,
            seed=seed,
            scene=scene,
            cache_interval=cache_interval,
            on_step=on_step,
        )
    return trajectory, infos[0]


def _side(bundle: Bundle, info: dict[str, Any], cache_interval: int) -> dict[str, Any]:
    return {
        "bundle": bundle.name,
        "path": str(bundle.path),
        "precision": bundle.precision,
        "resolution": bundle.resolution,
        "distilled_guidance": bundle.distilled_guidance,
        "cache_interval": cache_interval,
        "denoiser_sha256": bundle.files["denoiser.onnx"]["sha256"],
        "runtime": info,
    }


def _print(document: dict[str, Any]) -> None:
    for letter in "ab":
        side = document[letter]
        runtime = side["runtime"]
        said = "" if side["distilled_guidance"] is None else ", guidance distilled"
        if side["cache_interval"] > 1:
            said += f", deep features every {side['cache_interval']}"
        print(
            f"{letter.upper()}  {side['bundle']} ({side['precision']}{said}), "
            f"{runtime['name']} {runtime['version']} on {runtime['device']}"
        )
    settings, figures = document["settings"], document["figures"]
    picture = settings["image"] or "a drawn scene"
    print(f"{settings['steps']} steps, guidance {settings['guidance']:g}, seed {settings['seed']}, {picture}\n")
    table = console.table("after step", "latent, largest", "latent, rms", right=("latent, largest", "latent, rms"))
    rows = zip(figures["latent_drift"], figures["latent_rms_drift"], strict=True)
    for step, (largest, rms) in enumerate(rows, start=1):
        table.add_row(str(step), f"{largest:.2e}", f"{rms:.2e}")
    console.print_table(table)
    worst = figures["worst_pixel"]
    capped = " (equal)" if figures["image_max_difference"] == 0 else ""
    print(f"\nPSNR         {figures['psnr_db']:.2f} dB{capped}")
    print(f"SSIM         {figures['ssim']:.6f}")
    print(
        f"worst pixel  {worst['levels']:.3g} of 255 levels at x {worst['x']}, y {worst['y']}, "
        f"{('red', 'green', 'blue')[worst['channel']]}"
    )
