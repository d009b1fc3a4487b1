"""How fast a step of the denoiser is: the plain network and the exported one, in PyTorch and in ONNX Runtime.

    python benchmarks/denoiser.py                  # full size, batch 2 (one guided step), float32
    python benchmarks/denoiser.py --rewrites       # every rewrite beside its plain twin, level by level

Needs the `export` extra; the weights are random, which does not matter to the time. All variants take turns, round by
round, so that a noisy machine slows them alike: read the ratios, not the seconds. Figures of ours are in
docs/rewrites.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.export.onnx_file import OPSET, write_onnx
from moebius_edge.export.operators import TRANSLATIONS, best_tile, function_bodies
from moebius_edge.export.specialise import (
    FoldedSeparableConv,
    QuarteredUpsample,
    SpecialInteractive,
    SpecialLocal,
    SpecialMixFFN,
    specialise,
)
from moebius_edge.model import Student, StudentConfig, build_student
from moebius_edge.model.lambdas import InteractiveLambda, LocalLambda
from moebius_edge.model.layers import Upsample
from moebius_edge.model.student import MixFFN, SeparableConv
from moebius_edge.spec import Component, Tensor
from moebius_edge.system.machine import available_cores, machine_info

Run = Callable[[], Any]
CLASSES = {
    "matrix products": ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits"),
    "convolutions": ("Conv", "FusedConv"),
    "norms and softmax": ("InstanceNormalization", "LayerNormalization", "SkipLayerNormalization", "Softmax"),
    "element by element": ("Add", "Mul", "Sigmoid", "Relu", "QuickGelu", "Sub", "Div"),
    "moving data": ("Transpose", "Reshape", "Concat", "Slice", "Gather", "Pad", "ReorderInput", "ReorderOutput",
                    "DepthToSpace", "Split", "Expand", "Unsqueeze", "Squeeze"),
}  # fmt: skip


class PlainDenoiser(nn.Module):
    """The student as it is, with the denoiser's inputs, for comparison with what is exported.

    ``sample`` (N, 9, h, w), ``timestep`` (N,), ``branch`` (N,) -> ``noise`` (N, 4, h, w).

    With M prompts a branch (10), branch 0 is prompt ids 0..M-1 (conditional), 1 is M..2M-1 (unconditional).
    """

    prompts: torch.Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("prompts", torch.arange(student.config.num_prompts), persistent=False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        ids = self.prompts + len(self.prompts) * branch[:, None]  # (N, M)
        noise: torch.Tensor = self.student(sample, timestep, ids).noise
        return noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=list(StudentConfig().block_out_channels))
    parser.add_argument("--latent-size", type=int, default=StudentConfig().latent_size)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=3, help="after two that are not counted")
    parser.add_argument("--rewrites", action="store_true", help="the rewrites one by one")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    config = StudentConfig(block_out_channels=tuple(options.channels), latent_size=options.latent_size)
    machine = machine_info()
    print(f"{machine['cpu']['model']}, {options.threads} threads, torch {torch.__version__}, "
          f"onnxruntime {onnxruntime.__version__}")  # fmt: skip
    figures = {"machine": machine, "options": {k: str(v) for k, v in vars(options).items()}}
    with tempfile.TemporaryDirectory() as folder:
        measure = rewrites if options.rewrites else whole
        figures["results"] = measure(config, options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def whole(config: StudentConfig, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The denoiser four times: plain and specialised, each in PyTorch and in ONNX Runtime."""
    student = build_student(config).eval()
    plain, special = PlainDenoiser(student).eval(), specialise(student)
    size = 8 * config.latent_size
    write_onnx(plain, resolved_components(size)["denoiser"], folder / "plain.onnx")
    component = resolved_components(size, config.deep_channels)["denoiser"]
    write_onnx(special, component, folder / "special.onnx", TRANSLATIONS, function_bodies(config, OPSET))
    torch.manual_seed(0)
    sample = torch.randn(options.batch, 9, config.latent_size, config.latent_size)
    timestep, branch = torch.full((options.batch,), 500.0), torch.arange(options.batch) % 2
    feeds = {"sample": sample.numpy(), "timestep": timestep.numpy(), "branch": branch.numpy()}
    sessions = {n: session(folder / f"{n}.onnx", options.threads) for n in ("plain", "special")}
    runs: dict[str, Run] = {
        "plain, PyTorch": lambda: plain(sample, timestep, branch),
        "exported, PyTorch": lambda: special(sample, timestep, branch),
        "plain, ONNX Runtime": lambda: sessions["plain"].run(None, feeds),
        "exported, ONNX Runtime": lambda: sessions["special"].run(None, feeds),
    }
    difference = np.abs(sessions["special"].run(None, feeds)[0] - plain(sample, timestep, branch).numpy()).max()
    times = take_turns(runs, options.rounds)
    ours = times["exported, ONNX Runtime"]
    print(f"one step of {options.batch} x {config.latent_size}x{config.latent_size}, channels {options.channels}; "
          f"largest difference {difference:.1e}\n")  # fmt: skip
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, ours, strict=True))
        print(f"  {name:<24} {statistics.median(values):8.3f} s   {ratio:5.2f} times the exported one's")
    peak = matrix_peak(options.threads)
    print(f"\nmeasured peak of a matrix product: {peak / 1e9:.0f} GFLOP/s (2048 x 2048, float32)")
    shares = by_class(profile(folder / "special.onnx", options.threads, feeds, folder))
    total = sum(shares.values())
    print("exported, ONNX Runtime, share of the time by operator class:")
    for name, share in shares.most_common():
        print(f"  {name:<24} {share / total:6.1%}   {share / 1e6:8.3f} s")
    counts = {n: counted(m, (sample, timestep, branch)) for n, m in (("plain", plain), ("exported", special))}
    rate = 2 * counts["exported"] / statistics.median(ours)
    print(f"multiply-adds: {counts['plain'] / 1e9:.1f} G plain, {counts['exported'] / 1e9:.1f} G exported, "
          f"which run at {rate / peak:.0%} of the peak")  # fmt: skip
    return {
        "seconds": times,
        "peak_flops": peak,
        "multiply_adds": counts,
        "operator_seconds": {k: v / 1e6 for k, v in shares.items()},
    }


def rewrites(config: StudentConfig, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every rewrite beside its plain twin, at the shapes of each level of the network."""
    tile = best_tile(config)
    prompts = torch.randn(2, config.num_prompts, config.cross_attention_dim)
    rows = []
    for level, channels in enumerate(config.block_out_channels):
        size = config.latent_size >> level
        grid = torch.randn(options.batch, channels, size, size)
        tokens = grid.flatten(2).transpose(1, 2).contiguous()
        branch = torch.arange(options.batch) % 2
        local = LocalLambda(channels, config.num_heads, config.window).eval()
        cross = InteractiveLambda(
            channels, config.num_heads, config.cross_attention_dim, config.num_prompts, size
        ).eval()
        ffn, conv = MixFFN(channels, config.mix_ffn_ratio).eval(), SeparableConv(channels, channels).eval()
        pairs: list[tuple[str, nn.Module, tuple[Any, ...], nn.Module, tuple[Any, ...]]] = [
            ("Local-lambda", local, (grid,), SpecialLocal(local, size, tile).eval(), (tokens,)),
            ("Interactive-lambda", Chosen(cross, prompts), (grid, branch),
             SpecialInteractive(cross, prompts).eval(), (tokens, branch)),
            ("Mix-FFN halves", ffn, (grid,), SpecialMixFFN(ffn).eval(), (grid,)),
            ("separable convolution", conv, (grid,), FoldedSeparableConv(conv).eval(), (grid,)),
        ]  # fmt: skip
        if level:
            up = Upsample(channels).eval()
            pairs.append(("upsampling", up, (grid,), QuarteredUpsample(up).eval(), (grid,)))
        for name, plain, given, special, rewritten in pairs:
            runs: dict[str, Run] = {}
            counts, moved = {}, {}
            for kind, module, inputs in (("plain", plain, given), ("rewritten", special, rewritten)):
                path = folder / f"{kind}.onnx"
                feeds = export(module, inputs, path, config)
                opened = session(path, options.threads)
                counts[kind] = counted(module, inputs)
                moved[kind] = traffic(profile(path, options.threads, feeds, folder))
                runs[f"{kind} torch"] = lambda m=module, i=inputs: m(*i)  # type: ignore[misc]
                runs[f"{kind} ort"] = lambda s=opened, f=feeds: s.run(None, f)  # type: ignore[misc]
            times = {k: statistics.median(v) for k, v in take_turns(runs, options.rounds).items()}
            rows.append({"rewrite": name, "channels": channels, "grid": size, "seconds": times,
                         "multiply_adds": counts, "bytes": moved})  # fmt: skip
            print(f"  {name:<22} {channels:>5} ch {size:>3}x{size:<3}"
                  f" torch {1e3 * times['plain torch']:8.1f} -> {1e3 * times['rewritten torch']:7.1f} ms"
                  f" ({times['plain torch'] / times['rewritten torch']:5.2f}x)"
                  f"  ort {1e3 * times['plain ort']:8.1f} -> {1e3 * times['rewritten ort']:7.1f} ms"
                  f" ({times['plain ort'] / times['rewritten ort']:5.2f}x)"
                  f"  {counts['plain'] / 1e9:6.2f} -> {counts['rewritten'] / 1e9:5.2f} G"
                  f"  {moved['plain'] / 1e6:6.0f} -> {moved['rewritten'] / 1e6:5.0f} MB", flush=True)  # fmt: skip
    return rows


class Chosen(nn.Module):
    """The plain Interactive-lambda fed as the exported graph feeds it: prompts picked by the branch."""

    def __init__(self, plain: InteractiveLambda, prompts: torch.Tensor) -> None:
        super().__init__()
        self.plain = plain
        self.register_buffer("prompts", prompts)

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> Any:
        return self.plain(x, self.prompts[branch])  # type: ignore[index]


def export(module: nn.Module, inputs: tuple[Any, ...], path: Path, config: StudentConfig) -> dict[str, np.ndarray]:
    """Writes ``module`` to ``path``; returns what its session is fed."""
    names = ["x", "branch"][: len(inputs)]
    tensors = tuple(
        Tensor(n, "int64" if t.dtype == torch.int64 else "float32", ("N", *t.shape[1:]))
        for n, t in zip(names, inputs, strict=True)
    )
    output = Tensor("y", "float32", ("N", *module(*inputs).shape[1:]))
    component = Component("part", tensors, (output,))
    write_onnx(module, component, path, TRANSLATIONS, function_bodies(config, OPSET))
    return {n: t.numpy() for n, t in zip(names, inputs, strict=True)}


def session(path: Path, threads: int, **settings: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def take_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round; two rounds before the first warm up and are not counted.

    ONNX Runtime lays out its memory anew in the second run: timed, that would count for half of it.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-2, rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def matrix_peak(threads: int, side: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few square float32 products."""
    torch.set_num_threads(threads)
    a, b = torch.randn(side, side), torch.randn(side, side)
    best = min(take_turns({"product": lambda: a @ b}, repeats)["product"])
    return 2 * side**3 / best


def profile(path: Path, threads: int, feeds: dict[str, np.ndarray], folder: Path) -> list[dict[str, Any]]:
    """ONNX Runtime's own record of every kernel in one run after two: the second still lays out its memory."""
    opened = session(path, threads, enable_profiling=True, profile_file_prefix=str(folder / "profile"))
    for _ in range(3):
        opened.run(None, feeds)
    events = json.loads(Path(opened.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return kernels[2 * len(kernels) // 3 :]


def by_class(kernels: list[dict[str, Any]]) -> Counter[str]:
    """Microseconds by operator class."""
    found: Counter[str] = Counter()
    for event in kernels:
        kind = event["args"]["op_name"]
        found[next((c for c, kinds in CLASSES.items() if kind in kinds), kind)] += event["dur"]
    return found


def traffic(kernels: list[dict[str, Any]]) -> int:
    """Bytes that the kernels read and wrote: their inputs, weights and outputs, each counted whenever it is used."""
    sizes = ("activation_size", "parameter_size", "output_size")
    return sum(int(event["args"].get(size, 0)) for event in kernels for size in sizes)


def counted(module: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiply-adds of convolutions and matrix products, as PyTorch counts them, and ours for our operators."""

    def local(q: Any, k: Any, v: Any, weight: Any, bias: Any, layout: Any, heads: int, tile: int, **_: Any) -> int:
        n, positions, width = v[0], v[1], v[2]
        keys, taps = weight
        reach = layout[1] * positions * heads * (keys + width) if tile else positions * keys * width * taps
        return 2 * n * (reach + (heads + 1) * positions * keys * width)

    def interactive(q: Any, keys: Any, values: Any, table: Any, **_: Any) -> int:
        return 2 * q[0] * q[1] * q[2] * keys[-1] * (q[3] + values[-1])

    formulas = {torch.ops.moebius.local_lambda: local, torch.ops.moebius.interactive_lambda: interactive}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2  # PyTorch counts a multiply-add as two


if __name__ == "__main__":
    main()
