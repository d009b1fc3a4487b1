"""Which parts of a network need float32 beside FP16: the gate's trajectory with every choice of islands.

    python benchmarks/precision.py BUNDLE          # a float32 bundle, or `tiny`

Each row converts the bundle's files once more, runs the whole guided trajectory on ONNX Runtime and compares it with
the float32 files on the same noise. ONNX Runtime's CPU computes most FP16 operators in float32 and rounds what they
return: the figures show what storing in FP16 costs, not what summing in FP16 would. Needs no PyTorch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import BundleError
from moebius_edge.export.precision import ISLAND_MODULES, ISLANDS, to_float16
from moebius_edge.metrics.fidelity import compare
from moebius_edge.metrics.trajectory import Trajectory, run_trajectory
from moebius_edge.runtimes import create_runtime
from moebius_edge.sampling.guidance import choose_guidance

DENOISER, ENCODER, DECODER = "denoiser", "vae_encoder", "vae_decoder"
SOFTMAX, NORMS = ("Softmax",), ("InstanceNormalization", "LayerNormalization")
# label, components in FP16, operator types and modules that stay float32
CHOICES: list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = [
    ("denoiser, no island", (DENOISER,), (), ()),
    ("denoiser but the time embedding", (DENOISER,), (), ISLAND_MODULES),
    ("denoiser but time and softmax", (DENOISER,), SOFTMAX, ISLAND_MODULES),
    ("denoiser but time and norms", (DENOISER,), NORMS, ISLAND_MODULES),
    ("denoiser, as exported", (DENOISER,), ISLANDS, ISLAND_MODULES),
    ("encoder, no island", (ENCODER,), (), ()),
    ("encoder, as exported", (ENCODER,), ISLANDS, ISLAND_MODULES),
    ("decoder, no island", (DECODER,), (), ()),
    ("decoder, islands as elsewhere", (DECODER,), ISLANDS, ISLAND_MODULES),
    ("encoder and denoiser, as exported", (ENCODER, DENOISER), ISLANDS, ISLAND_MODULES),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    if bundle.precision != "float32":
        raise SystemExit(f"{bundle.path} is {bundle.precision}: name a float32 bundle")
    guidance = choose_guidance(options.guidance, bundle.distilled_guidance).sampled

    def trajectory(of: Bundle) -> Trajectory:
        runtime = create_runtime("onnxruntime", of, "cpu")
        return run_trajectory(runtime, steps=options.steps, guidance=guidance, on_step=lambda done, total: None)

    reference = trajectory(bundle)
    print(f"{'in FP16':<36} {'PSNR, dB':>9} {'SSIM':>9} {'latent, rms':>12}")
    for label, components, islands, modules in CHOICES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                figures = compare(trajectory(converted(bundle, Path(folder), components, islands, modules)), reference)
            except BundleError as error:
                print(f"{label:<36} {str(error).partition(':')[0]}", flush=True)  # which stage returned what
                continue
        drift = figures["latent_rms_drift"][-1]
        print(f"{label:<36} {figures['psnr_db']:9.2f} {figures['ssim']:9.5f} {drift:12.2e}", flush=True)


def converted(
    bundle: Bundle, folder: Path, components: Iterable[str], islands: tuple[str, ...], modules: tuple[str, ...]
) -> Bundle:
    """A copy of ``bundle`` in ``folder`` with these components in FP16."""
    for name, component in bundle.components.items():
        shutil.copy(bundle.component_path(name), folder / component.file)
        if name in components:
            to_float16(folder / component.file, islands, modules)
    return replace(bundle, path=folder)


if __name__ == "__main__":
    main()
