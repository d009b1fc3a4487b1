"""One 512x512 picture at the published size, end to end: upstream's way and ours, each with its time and its error.

    python benchmarks/picture.py FOLDER prepare                    # weights are drawn, and exported in float32
    python benchmarks/picture.py FOLDER plain exact half fast      # or all ways without a name
    python benchmarks/picture.py FOLDER                            # those that are missing, and the table

Each way is a process of its own on ``--cores``, and writes its picture and its times to FOLDER as soon as it has them:
run them in pieces, on a busy machine too, for processor seconds are counted beside wall seconds. A picture is one drawn
scene with a hole, from decoded pixels to pixels; loading and compiling come before it and are told apart.

Drawn weights take the time that the published ones take. A PSNR with them says how exact the arithmetic of a way is,
and nothing of what anyone would see. For the published weights put ``student.pt`` and ``vae/`` into FOLDER instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.metrics.fidelity import hole_psnr_db
from moebius_edge.metrics.trajectory import draw_scene
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.pipeline.latency import StageTimer
from moebius_edge.pipeline.presets import preset_settings
from moebius_edge.runtimes import Runtime, create_runtime
from moebius_edge.runtimes.base import drawn_feeds
from moebius_edge.spec import DENOISER, SHALLOW
from moebius_edge.system.files import atomic_write
from moebius_edge.system.machine import machine_info

SETTINGS: dict[str, Any] = {"guidance": 2.0, "start": "image", "match_colours": False}
REFERENCE = "plain"


class Way(NamedTuple):
    """A line of the table: what it is, what executes it, and the settings that are not ``SETTINGS``."""

    label: str
    runtime: Callable[[Path], Runtime]
    bundle: str = "float32"
    preset: str | None = None
    settings: dict[str, Any] = {}


def pytorch(folder: Path) -> Runtime:
    """The modules as upstream has them: nothing folded, diffusers' own autoencoder."""
    import torch

    from moebius_edge.export.source import find_source, load_config, load_student, load_vae
    from moebius_edge.runtimes.pytorch import TorchRuntime

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = find_source(folder / "student.pt", folder / "vae", None)
    components = Bundle.load(folder / "float32", verify=False).components
    return TorchRuntime(load_student(source, load_config(source)), load_vae(source), components)


def onnxruntime(folder: Path) -> Runtime:
    return create_runtime("onnxruntime", Bundle.load(folder / "float32", verify=False), "cpu")


def openvino(folder: Path) -> Runtime:
    return create_runtime("openvino", Bundle.load(folder / "float32", verify=False), "cpu")


def half(folder: Path) -> Runtime:
    """As OpenVINO computes an FP16 bundle, in bfloat16 where the CPU has it, from the float32 files."""
    from moebius_edge.runtimes.openvino import OpenVinoRuntime

    bundle = Bundle.load(folder / "float32", verify=False)
    digests = {name: bundle.files[component.file]["sha256"] for name, component in bundle.components.items()}
    rows = {"vae_encoder": 1, "vae_decoder": 1}
    return OpenVinoRuntime(bundle.components, bundle.paths, digests=digests, half=tuple(bundle.components), rows=rows)


def int8(folder: Path) -> Runtime:
    return create_runtime("openvino", Bundle.load(folder / "int8", verify=False), "cpu")


WAYS = {
    REFERENCE: Way("plain PyTorch modules, diffusers' VAE, float32", pytorch),
    "ort": Way("ONNX Runtime, float32", onnxruntime),
    "exact": Way("OpenVINO, float32", openvino),
    "half": Way("OpenVINO, bfloat16", half),
    "int8": Way("OpenVINO, INT8 and bfloat16", int8, "int8"),
    "fast": Way("OpenVINO, bfloat16, `--preset fast`", half, preset="fast"),
    "distilled": Way("OpenVINO, bfloat16, distilled guidance (work alone)", half, settings={"guidance": 1.0}),
    "fast-distilled": Way(
        "OpenVINO, bfloat16, both (work alone)", half, preset="fast", settings={"guidance": 1.0}
    ),
    "fast-int8": Way("OpenVINO, INT8 and bfloat16, `--preset fast`", int8, "int8", "fast"),
}  # fmt: skip


class CpuTimer(StageTimer):
    """Sums the processor seconds of all threads beside the wall's, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        sums = self.seconds.setdefault(stage, [0.0, 0.0])
        self.seconds[stage] = [sums[0] + time.perf_counter() - wall, sums[1] + time.process_time() - cpu]


def prepare(folder: Path) -> None:
    """Drawn weights of the published network and autoencoder where there are none, and their float32 bundle."""
    import torch
    from diffusers import AutoencoderKL

    from moebius_edge.export import BundleOptions, export_bundle
    from moebius_edge.model import StudentConfig, build_student

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "student.pt").exists():
        torch.manual_seed(0)
        torch.save(build_student(StudentConfig()).state_dict(), folder / "student.pt")
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "scaling_factor": 0.13025}
        AutoencoderKL(**kinds, **widths).save_pretrained(folder / "vae")
    export_bundle(folder / "student.pt", folder / "float32", BundleOptions(vae=folder / "vae", steps=2, force=True))


def fill(folder: Path, name: str, steps: int) -> None:
    """One way in this process: its picture to ``NAME.npy``, its figures to ``NAME.json``."""
    way = WAYS[name]
    bundle = Bundle.load(folder / way.bundle, verify=False)
    image, hole = draw_scene(bundle.resolution)
    pixels = np.rint((image[0].transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    settings = {**SETTINGS, **way.settings, "steps": steps}
    if way.preset:
        chosen = {name: value for name, value in settings.items() if name != "steps"}
        settings |= preset_settings(way.preset, chosen, replace(bundle, defaults={**bundle.defaults, "steps": steps}))
    started, cpu = time.perf_counter(), time.process_time()
    runtime, timer = way.runtime(folder), CpuTimer()
    with Inpainter(bundle, runtime) as inpainter:
        warm_up(runtime, settings)
        load = [time.perf_counter() - started, time.process_time() - cpu]
        result = inpainter.inpaint(pixels, hole, timer=timer, **settings)
    total, stages = timer.seconds.pop("total"), timer.seconds
    np.save(folder / f"{name}.npy", result.image)
    figures = {
        **{"label": way.label, "calls": result.settings["network_calls"], "settings": settings, "load_s": load},
        **{"wall_s": total[0], "cpu_s": total[1], "stages_s": stages, "runtime": runtime.info},
        **{"machine": machine_info(), "python": platform.python_version(), "openvino": version("openvino")},
    }
    with atomic_write(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def warm_up(runtime: Runtime, settings: dict[str, Any]) -> None:
    """One call of the denoiser for each number of rows of a picture: OpenVINO compiles at the first."""
    rows = {1} if settings["guidance"] == 1 else {1, 2} if "guidance_interval" in settings else {2}
    for name in (DENOISER, SHALLOW) if "cache_interval" in settings else (DENOISER,):
        for number in rows:
            runtime.run(name, drawn_feeds(runtime.components[name], number))


def table(folder: Path) -> str:
    """The ways that were measured, beside the first: times faster in processor seconds, PSNR of 8-bit pictures."""
    lines = ["| way | calls | wall s | processor s | encode, steps, decode | times faster | hole, dB |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    hole = draw_scene(Bundle.load(folder / "float32", verify=False).resolution)[1]
    pictures = {name: np.load(folder / f"{name}.npy") for name in WAYS if (folder / f"{name}.npy").exists()}
    measured = {name: json.loads((folder / f"{name}.json").read_text()) for name in pictures}
    for name, row in measured.items():
        faster = measured[REFERENCE]["cpu_s"] / row["cpu_s"] if REFERENCE in measured else float("nan")
        stages = ", ".join(f"{row['stages_s'][s][1]:.1f}" for s in ("vae_encode", "denoise", "vae_decode"))
        alone = name == REFERENCE or REFERENCE not in pictures or "work alone" in row["label"]
        psnr = "" if alone else f"{hole_psnr_db(pictures[name], pictures[REFERENCE], hole):.1f}"
        seconds = f"{row['wall_s']:.1f} | {row['cpu_s']:.1f}"
        lines.append(f"| {row['label']} | {row['calls']} | {seconds} | {stages} | {faster:.2f} | {psnr} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"prepare, {', '.join(WAYS)}; default what is missing")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="fewer of them cost less, and are not a picture's time")
    parser.add_argument("--here", action="store_true", help="in this process, one way")
    options = parser.parse_args()
    if options.here:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
        fill(options.folder, options.ways[0], options.steps)
        return
    if unknown := {*options.ways} - {"prepare", *WAYS}:
        parser.error(f"there is no way {', '.join(unknown)}")
    missing = [name for name in WAYS if not (options.folder / f"{name}.json").exists()]
    for name in options.ways or missing:
        if name == "prepare":
            prepare(options.folder)
        elif WAYS[name].bundle == "int8" and not (options.folder / "int8").exists():
            print(f"{name}: no {options.folder / 'int8'}, see docs/int8.md for how it is made", file=sys.stderr)
        else:
            command = [sys.executable, "-m", "benchmarks.picture", str(options.folder), name, "--here"]
            command += ["--cores", str(options.cores), "--steps", str(options.steps)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(options.cores)})
            print(table(options.folder), flush=True)


if __name__ == "__main__":
    main()
