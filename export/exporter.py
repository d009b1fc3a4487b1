"""``export_bundle``: a checkpoint and its autoencoder become a bundle that has passed its gate, or nothing at all.

The gate takes one whole sampling trajectory on the exported files and one on PyTorch, from the same noise, and compares
the decoded images. One trajectory on one drawn scene proves the conversion, not the model. The part of the denoiser
that reuses a deep feature is judged by one call: given the feature of that call, it must give the whole one's noise.

PyTorch is imported late, so that a wrong path or an occupied output is reported at once.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..bundle.bundle import Bundle, write_bundle
from ..bundle.manifest import resolved_components
from ..errors import MachineError, QualityError, UsageError
from ..options import GATE_RUNTIMES
from ..progress import Progress, no_progress
from ..runtimes import create_runtime
from ..runtimes.base import drawn_feeds
from ..runtimes.onnx_check import check_onnx_file
from ..runtimes.openvino import import_openvino
from ..sampling.guidance import choose_guidance
from ..spec import DEEP, DENOISER, LATENT_DOWNSCALE, SHALLOW
from ..system.files import atomic_directory, check_replaceable, refuse_loss, scratch_directory
from ..system.packages import install
from .engines import is_bundle
from .source import AnyPath, Source, find_source, load_config, load_student, load_vae

if TYPE_CHECKING:
    from ..metrics.trajectory import Trajectory
    from ..model import StudentConfig
    from ..runtimes import Runtime

# The gate's floor in dB by precision. Of float32 against float32 only the order of sums may differ.
MIN_PSNR_DB = {"float32": 60.0, "float16": 40.0}
# The largest difference between the noise of the whole denoiser and of its shallow part, over the largest noise: only
# the order of sums may differ, and roundings where the types are shorter.
SHALLOW_DIFFERENCE = {"float32": 1e-4, "float16": 1e-2, "int8": 1e-2}
# What suits a bundled model better than upstream's settings; docs/tiny-model.md has the measurements.
BUNDLED_DEFAULTS: dict[str | None, dict[str, Any]] = {
    "tiny": {"start": "prefill", "strength": 0.7, "guidance": 3.0, "match_depth": 16.0}
}


@dataclass(frozen=True)
class BundleOptions:
    """How a checkpoint becomes a bundle.

    Attributes:
        vae: a diffusers VAE folder; a bundled model has its own.
        config: a JSON file of a ``StudentConfig``; ``find_source`` says where one is looked for otherwise.
        steps, guidance: of the gate, and the bundle's defaults unless the model is a bundled one.
        distilled_guidance: the guidance that a student has learned whose checkpoint does not note it.
        precision: ``float32`` or ``float16``.
        weights: what a ``float32`` bundle's weights are stored in: ``float32`` or ``float16``.
        min_psnr_db: the gate's floor, by default the precision's in ``MIN_PSNR_DB``.
        gate_runtime: what computes the gate's trajectory on the exported files: ``onnxruntime`` or ``openvino``.
        calibration_data: pictures, as for ``open_pictures``, that the autoencoder's ranges are recorded over for
            ``float16``; by default scenes are drawn.
        force: replace an existing bundle.
    """

    vae: AnyPath | None = None
    config: AnyPath | None = None
    steps: int = 20
    guidance: float | None = None
    distilled_guidance: float | None = None
    precision: str = "float32"
    min_psnr_db: float | None = None
    calibration_data: str | None = None
    force: bool = False
    gate_runtime: str = "onnxruntime"
    weights: str = "float32"


def export_bundle(
    source: AnyPath, output: AnyPath, options: BundleOptions | None = None, progress: Progress = no_progress
) -> Bundle:
    """Export ``source`` (a file of student weights, or a bundled model's name) to the folder ``output``.

    Raises:
        UsageError: an argument is unusable, or ``output`` may not be replaced.
        MachineError: a package or file is missing, or ``output`` cannot be written.
        BundleError: the weights are damaged, unsafe, of another configuration or not finite.
        QualityError: the gate was missed; nothing was saved.
    """
    options = options or BundleOptions()
    if not 2 <= options.steps <= 1000:
        raise UsageError(f"{options.steps} steps make no trajectory: choose 2 to 1000")
    if options.precision not in MIN_PSNR_DB:
        raise UsageError(f"there is no precision {options.precision!r}: choose one of {', '.join(MIN_PSNR_DB)}")
    check_gate_runtime(options.gate_runtime)
    files = _find_source(source, output, options)
    guidance, _ = choose_guidance(options.guidance, files.distilled_guidance)
    with atomic_directory(output, overwrite=options.force) as folder:
        _export(folder, Path(output).resolve().name, files, options, guidance, progress)
    return Bundle.load(Path(output), verify=False)


@contextmanager
def float32_bundle(
    source: AnyPath, output: AnyPath, options: BundleOptions, progress: Progress = no_progress
) -> Iterator[Bundle]:
    """``source`` as a float32 bundle: itself where it is one, else exported to a folder that is gone afterwards.

    That folder lies beside ``output``, the place of what the caller makes of the bundle. Raises as ``export_bundle``.
    """
    if is_bundle(source):
        if (options.vae, options.config, options.distilled_guidance) != (None, None, None):
            problem = f"{source} is a bundle, complete as it is"
            raise UsageError(problem, "leave --vae, --config and --distilled-guidance out")
        bundle = Bundle.load(source)
        for name in bundle.components:
            check_onnx_file(bundle.component_path(name))
        yield bundle
        return
    check_replaceable(output, options.force)  # before an export that may take minutes
    _find_source(source, output, options)
    with scratch_directory(output) as folder:
        yield export_bundle(source, folder / Path(output).resolve().name, options, progress)


def _find_source(source: AnyPath, output: AnyPath, options: BundleOptions) -> Source:
    files = find_source(source, options.vae, options.config, options.distilled_guidance)
    refuse_loss(output, (files.checkpoint, files.vae, files.config), "which is being exported")
    return files


def _export(
    folder: Path, name: str, files: Source, options: BundleOptions, guidance: float, progress: Progress
) -> None:
    """Write the graphs, compare them with PyTorch, and only then describe them as a bundle that has passed."""
    progress("load packages", 0, 0)
    tools = _tool_versions()
    from ..metrics.fidelity import compare
    from ..metrics.trajectory import SEED, run_trajectory
    from ..pipeline.inpainter import STRENGTH
    from ..runtimes.pytorch import TorchRuntime

    # As the bundle will run: with distilled guidance on the conditional branch alone.
    sampled = choose_guidance(guidance, files.distilled_guidance).sampled

    def trajectory(runtime: Runtime, what: str) -> Trajectory:
        progress(what, 0, 0)
        return run_trajectory(runtime, steps=options.steps, guidance=sampled, on_step=partial(progress, what))

    progress(f"load weights, VAE scaling factor {files.scaling_factor:g}", 0, 0)
    config = load_config(files)
    resolution = config.latent_size * LATENT_DOWNSCALE
    components = resolved_components(resolution, config.deep_channels, config.latent_channels)
    student, vae = load_student(files, config), load_vae(files)
    paths = {name: folder / component.file for name, component in components.items()}
    min_psnr_db = MIN_PSNR_DB[options.precision] if options.min_psnr_db is None else options.min_psnr_db
    half = options.precision == "float16"
    islands = _write_components(paths, components, student, vae, half, progress)
    precisions: dict[str, Any] = dict.fromkeys(islands, {"type": "float16"})
    if half:
        from .autoencoder import half_autoencoder, range_images

        images = range_images(config.latent_size * LATENT_DOWNSCALE, options.calibration_data)
        typed, float32_nodes = half_autoencoder(paths, images, min_psnr_db, progress)
        precisions, islands = precisions | typed, islands | float32_nodes
    elif options.weights == "float16":
        from .precision import store_in_half

        for path in paths.values():
            store_in_half(path)
        precisions = dict.fromkeys(paths, {"type": "float32", "weights": "float16"})
    reference = trajectory(TorchRuntime(student, vae, components), "gate, PyTorch")

    del student, vae  # a gigabyte at full size, and the other runtime needs as much again
    gc.collect()
    conditions = {"steps": options.steps, "guidance": guidance, "start": "image"}
    defaults = {**conditions, **BUNDLED_DEFAULTS.get(files.bundled, {})}
    if files.distilled_guidance is not None:
        defaults["guidance"] = guidance  # any other is refused
    card = {**_description(name, files, config), "tools": tools, "defaults": defaults}
    card |= {"precision": options.precision, "precisions": precisions, "float32_islands": islands}
    write_bundle(folder, gate={}, **card)  # provisional, so that a runtime can be made of it
    with create_runtime(options.gate_runtime, Bundle.load(folder, verify=False), "cpu") as runtime:
        gate = compare(trajectory(runtime, f"gate, {options.gate_runtime}"), reference)
        judge(gate, min_psnr_db, options.gate_runtime)
        gate["shallow_difference"] = shallow_difference(runtime)
    judge_shallow(gate["shallow_difference"], options.precision)
    progress("write bundle.json", 0, 0)
    gate |= {
        "min_psnr_db": min_psnr_db,
        "runtime": options.gate_runtime,
        **conditions,
        "seed": SEED,
        "strength": STRENGTH,
        "scheduler": "ddim",
    }
    write_bundle(folder, gate=gate, **card)


def _write_components(
    paths: dict[str, Path], components: dict[str, Any], student: Any, vae: Any, half: bool, progress: Progress
) -> dict[str, Any]:
    """Write the ONNX file of each component, the denoiser's in FP16 if ``half``; of these the float32 nodes."""
    from .onnx_file import OPSET, build_modules, check_onnx, write_onnx
    from .operators import TRANSLATIONS, function_bodies
    from .precision import to_float16
    from .shallow import write_shallow

    modules = build_modules(student, vae)
    islands: dict[str, Any] = {}
    for index, (name, component) in enumerate(components.items()):
        progress(f"export {name}", index, len(components))
        path = paths[name]
        if name == SHALLOW:
            write_shallow(paths[DENOISER], path)
            check_onnx(path, component)
            continue
        bodies = function_bodies(student.config, OPSET) if name == DENOISER else ()
        write_onnx(modules[name], component, path, TRANSLATIONS, bodies)
        if half and name == DENOISER:
            islands[name] = to_float16(path)
            check_onnx(path, component)
    return islands


def _description(name: str, files: Source, config: StudentConfig) -> dict[str, Any]:
    """What ``bundle.json`` says of the model, whatever its precision."""
    bundled = "Demonstration model of reduced width for 256x256. Real work uses the published weights."
    own = f"Moebius student exported from {files.checkpoint.name}."
    return {
        "name": files.bundled or name,
        "description": bundled if files.bundled else own,
        "licence": "Apache-2.0" if files.bundled else "that of the checkpoint (not stated)",
        "model": config.to_dict(),
        "resolution": config.latent_size * LATENT_DOWNSCALE,
        "scaling_factor": files.scaling_factor,
        "distilled_guidance": files.distilled_guidance,
        "deep_channels": config.deep_channels,
        "latent_channels": config.latent_channels,
        "source": files.provenance(),
    }


def _tool_versions() -> dict[str, str]:
    """The versions of everything that has a say in the files; importing each is the check that it is there."""
    try:
        packages = [importlib.import_module(n) for n in ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers")]
    except ImportError as error:
        raise MachineError(f"export needs {error.name}", str(install("export"))) from None
    return {"moebius-edge": __version__, **{package.__name__: str(package.__version__) for package in packages}}


def check_gate_runtime(name: str) -> None:
    """Raise ``UsageError`` or ``MachineError``, before anything long is begun, unless ``name`` can take a gate here."""
    if name not in GATE_RUNTIMES:
        raise UsageError(f"there is no gate on {name!r}", f"choose one of {', '.join(GATE_RUNTIMES)}")
    if name == "openvino":
        import_openvino()


def judge(figures: dict[str, Any], min_psnr_db: float, runtime: str = "onnxruntime") -> None:
    """Raise ``QualityError`` with the figures unless the decoded image reaches ``min_psnr_db``."""
    if figures["psnr_db"] >= min_psnr_db:  # a NaN fails too
        return
    drift = figures["latent_drift"]
    raise QualityError(
        f"quality gate missed: the decoded image is {figures['psnr_db']:.2f} dB from the PyTorch reference, "
        f"{min_psnr_db:g} dB is the floor; the encoder differs by {figures['encoded_max_difference']:.1e}, "
        f"the latent by {drift[0]:.1e} after step 1 and {drift[-1]:.1e} after step {len(drift)}; nothing was saved",
        f"try another {runtime} version, or lower --min-psnr to accept the difference",
    )


def shallow_difference(runtime: Runtime) -> float:
    """The largest difference between the noise of the whole denoiser and of its shallow part, over the largest noise.

    It takes one call of each, with a row of either branch, on an active ``runtime``.
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
            f"largest noise, {SHALLOW_DIFFERENCE[precision]:g} is allowed; nothing was saved",
            "try another onnxruntime version",
        )
