"""``export_bundle``: checkpoint and VAE -> a bundle folder that has passed its gate, or nothing at all.

The order of work, and what is saved; how each step is done stands in the modules beside it. PyTorch is
imported late, so that a wrong path or an occupied output is reported at once.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bundle.bundle import Bundle, write_bundle
from ..bundle.manifest import resolved_components
from ..errors import MachineError, UsageError
from ..runtimes.onnx_check import check_onnx_file
from ..sampling.guidance import choose_guidance
from ..spec import DENOISER, LATENT_DOWNSCALE, SHALLOW
from ..system.files import atomic_directory, check_replaceable, refuse_loss, scratch_directory
from .engines import is_bundle
from .source import Source, find_source, load_config, load_student, load_vae

if TYPE_CHECKING:
    from ..metrics.trajectory import Trajectory
    from ..runtimes import Runtime

Progress = Callable[[str, float | None], None]

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers")
# precision -> the gate's floor in dB. Float32 against float32: only the order of sums may differ.
MIN_PSNR_DB = {"float32": 60.0, "float16": 40.0}
PRECISIONS = {"fp32": "float32", "fp16": "float16"}  # as the command line says it -> as bundle.json does
# What suits a bundled model better than upstream's settings; docs/tiny-model.md has the measurements.
BUNDLED_DEFAULTS: dict[str, dict[str, Any]] = {"tiny": {"start": "prefill", "strength": 0.4, "guidance": 1.0}}


def export_bundle(
    source: str | os.PathLike[str],
    vae: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    name: str | None = None,
    description: str | None = None,
    licence: str | None = None,
    steps: int = 20,
    guidance: float | None = None,
    distilled_guidance: float | None = None,
    precision: str = "float32",
    min_psnr_db: float | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> Bundle:
    """Export ``source`` (student weights, or a bundled model's name) with ``vae`` to the folder ``output``.

    ``config`` is a JSON file of a ``StudentConfig``; ``source.find_source`` says where one is looked for.
    ``steps`` and ``guidance`` are the gate's; they are the bundle's defaults too, unless the model is a bundled
    one. ``distilled_guidance`` is for a student that has learned guidance and whose checkpoint does not note it; the
    gate is then taken at that guidance, as the bundle will run. ``precision`` is ``float32`` or ``float16``;
    ``min_psnr_db`` is by default that precision's in ``MIN_PSNR_DB``. ``progress(stage, fraction)`` is told what is
    being done; the fraction is of that stage, None where not known. An existing bundle at ``output`` is replaced only
    with ``force``.

    Raises:
        UsageError: an argument is unusable, or ``output`` may not be replaced.
        MachineError: a package or file is missing, or ``output`` cannot be written.
        BundleError: the weights are damaged, unsafe, of another configuration or not finite.
        QualityError: the gate was missed; nothing was saved.
    """
    if not 2 <= steps <= 1000:
        raise UsageError(f"{steps} steps make no trajectory: choose 2 to 1000")
    if precision not in MIN_PSNR_DB:
        raise UsageError(f"there is no precision {precision!r}: choose one of {', '.join(MIN_PSNR_DB)}")
    floor = MIN_PSNR_DB[precision] if min_psnr_db is None else min_psnr_db
    found = find_source(source, vae, config, distilled_guidance)
    refuse_loss(output, (found.checkpoint, found.vae, found.config), "which is being exported")
    given = {"name": name, "description": description, "licence": licence}
    card: dict[str, Any] = {
        **_default_card(found, Path(output)),
        **{key: value for key, value in given.items() if value is not None},
        "precision": precision,
        "scaling_factor": found.scaling_factor,
        "distilled_guidance": found.distilled_guidance,
    }
    scale, _ = choose_guidance(guidance, found.distilled_guidance)
    trajectory = {"steps": steps, "guidance": scale, "start": "image"}
    card["defaults"] = {**trajectory, **BUNDLED_DEFAULTS.get(found.bundled or "", {})}
    if found.distilled_guidance is not None:
        card["defaults"]["guidance"] = scale  # a bundled model's own would be refused
    with atomic_directory(output, overwrite=force) as folder:
        _fill(folder, found, card, trajectory, floor, progress or _silent)
    return Bundle.load(Path(output), verify=False)


@contextmanager
def float32_bundle(
    source: str | os.PathLike[str],
    vae: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    force: bool = False,
    **options: Any,
) -> Iterator[Bundle]:
    """SOURCE as a float32 bundle: itself where it is one, else exported to a folder that is gone afterwards.

    That folder lies beside ``output``, which is where the result of the caller's work is to be; ``options`` are
    ``export_bundle``'s. Raises as it does.
    """
    if is_bundle(source):
        if (vae, options.get("config"), options.get("distilled_guidance")) != (None, None, None):
            raise UsageError(
                f"{source} is a bundle, complete as it is: leave --vae, --config and --distilled-guidance out"
            )
        bundle = Bundle.load(source)
        for name in bundle.components:
            check_onnx_file(bundle.component_path(name))
        yield bundle
        return
    check_replaceable(output, force)  # before an export that may take minutes
    found = find_source(source, vae, options.get("config"), options.get("distilled_guidance"))
    refuse_loss(output, (found.checkpoint, found.vae, found.config), "which is being exported")
    with scratch_directory(output) as folder:
        yield export_bundle(source, vae, folder / Path(output).resolve().name, **options)


def _fill(
    folder: Path,
    found: Source,
    card: dict[str, Any],
    trajectory: dict[str, Any],
    min_psnr_db: float,
    tell: Progress,
) -> None:
    """Write the graphs, measure them on ``trajectory``, and only then describe them as a bundle that has passed."""
    steps = trajectory["steps"]
    # As the bundle will run: with distilled guidance on the conditional branch alone.
    guidance = choose_guidance(trajectory["guidance"], found.distilled_guidance).sampled
    tell("load packages", None)
    card["tools"] = _tools()
    from ..metrics.fidelity import compare
    from ..runtimes.ort import OrtRuntime
    from ..runtimes.pytorch import TorchRuntime
    from .gate import CONDITIONS, judge, judge_shallow, shallow_difference
    from .graphs import build_graphs
    from .onnx_file import OPSET, check_onnx, write_onnx
    from .operators import TRANSLATIONS, function_bodies
    from .precision import FLOAT32_COMPONENTS, to_float16
    from .shallow import write_shallow

    tell(f"load weights, VAE scaling factor {found.scaling_factor:g}", None)
    config = load_config(found)
    card["model"] = config.to_dict()
    card["resolution"] = config.latent_size * LATENT_DOWNSCALE
    card["source"] = found.provenance()
    card["deep_channels"] = config.deep_channels
    components = resolved_components(card["resolution"], config.deep_channels)
    half = card["precision"] == "float16"
    card["float32_islands"] = dict.fromkeys(FLOAT32_COMPONENTS, "all") if half else {}
    student, vae = load_student(found, config), load_vae(found)
    graphs = build_graphs(student, vae)
    for index, (name, component) in enumerate(components.items()):
        tell(f"export {name}", index / len(components))
        if name == SHALLOW:
            write_shallow(folder / components[DENOISER].file, folder / component.file)
            check_onnx(folder / component.file, component)
            continue
        bodies = function_bodies(config, OPSET) if name == DENOISER else ()
        write_onnx(graphs[name], component, folder / component.file, TRANSLATIONS, bodies)
        if half and name not in FLOAT32_COMPONENTS:
            card["float32_islands"][name] = to_float16(folder / component.file)
            check_onnx(folder / component.file, component)
    reference = _run(TorchRuntime(student, vae, components), steps, guidance, "gate, PyTorch", tell)

    del student, vae, graphs  # a gigabyte at full size, and the other runtime needs as much again
    gc.collect()
    runtime = OrtRuntime(components, {name: folder / component.file for name, component in components.items()})
    with runtime:
        candidate = _run(runtime, steps, guidance, "gate, ONNX Runtime", tell)
        figures = compare(candidate, reference)
        judge(figures, min_psnr_db)
        figures["shallow_difference"] = shallow_difference(runtime)
    judge_shallow(figures["shallow_difference"], card["precision"])
    tell("write bundle.json", None)
    write_bundle(folder, gate={**figures, "min_psnr_db": min_psnr_db, **trajectory, **CONDITIONS}, **card)


def _run(runtime: Runtime, steps: int, guidance: float, stage: str, tell: Progress) -> Trajectory:
    from ..metrics.trajectory import run_trajectory

    tell(stage, 0.0)
    return run_trajectory(
        runtime,
        steps=steps,
        guidance=guidance,
        on_step=lambda done, total: tell(stage, done / total),
    )


def _default_card(found: Source, output: Path) -> dict[str, Any]:
    if found.bundled is not None:
        description = "Demonstration model of reduced width for 256x256. Real work uses the published weights."
        return {"name": found.bundled, "description": description, "licence": "Apache-2.0"}
    description = f"Moebius student exported from {found.checkpoint.name}."
    return {
        "name": output.resolve().name,
        "description": description,
        "licence": "that of the checkpoint (not stated)",
    }


def _tools() -> dict[str, str]:
    """Versions of everything that has a say in the files; importing each is the check that it is there."""
    versions = {"moebius-edge": __version__}
    missing = []
    for package in PACKAGES:
        try:
            versions[package] = str(importlib.import_module(package).__version__)
        except ImportError:
            missing.append(package)
    if missing:
        raise MachineError(f'export needs {", ".join(missing)}: run `pip install "moebius-edge[export]"`')
    return versions


def _silent(stage: str, fraction: float | None) -> None:
    """The progress of a caller who wants none."""
