"""What a GPU has to tell in ten minutes: driver, graphs, ceilings, the local lambda operator, and the whole network.

    make gpu                                             # all steps, in order
    python -m benchmarks.gpu.run --out DIR --step fused  # one of them

Needs PyTorch with CUDA, Triton, numpy and this checkout, nothing else: other packages that the modules it uses import
are stood in for. Each step is a process of its own with a limit, and its result is written at once, DIR/STEP.json;
what failed says why, and the rest goes on. ``--small`` runs tiny shapes, on the CPU where there is no GPU: that is what
the tests do. Weights are random, which does not matter to the time.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

for _name in ("onnx", "onnxscript", "onnxruntime", "pydantic", "safetensors", "cv2", "PIL"):
    try:
        importlib.import_module(_name)
    except ImportError:  # imported, and not needed for anything here
        sys.modules[_name] = MagicMock()

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius_edge.export.lambda_kernel import (
    arrange_taps,
    compile_kernel,
    fused_local_lambda,
    local_window,
    published_levels,
)
from moebius_edge.export.operators import kernel_positions
from moebius_edge.export.specialise import SpecialLocal, specialise
from moebius_edge.model import StudentConfig, build_student
from moebius_edge.runtimes.cuda import Cuda, find_gpu
from moebius_edge.runtimes.lambda_plugin import KERNEL, find_kernel

TOTAL_S = 600
FORMS = ("tiled", "convolved", "one product", "fused")
Result = dict[str, Any]


class Bench:
    """Where and how large: ``small`` shapes on whatever there is, and Triton's interpreter without a GPU."""

    def __init__(self, small: bool, out: Path) -> None:
        self.small, self.out = small, out
        self.gpu = torch.cuda.is_available()
        if not (self.gpu or small):
            raise RuntimeError("PyTorch sees no GPU")
        self.device = "cuda" if self.gpu else "cpu"
        self.half = torch.float16 if self.gpu else torch.float32  # of whole networks: a CPU is slow at FP16
        self.config = StudentConfig()
        if small:
            self.config = StudentConfig(
                block_out_channels=(32,), num_heads=1, latent_size=16, layers_per_block=1, window=3
            )
        self.heads, self.window = self.config.num_heads, self.config.window
        self.levels = {16: 32} if small else published_levels()

    @property
    def kernel(self) -> Any:
        from triton.runtime.interpreter import InterpretedFunction

        return local_window if self.gpu else InterpretedFunction(local_window.fn)

    def ms(self, run: Callable[[], Any], seconds: float = 0.5) -> float:
        """Median milliseconds, after three runs that are not counted, for at least about that long."""
        for _ in range(0 if self.small else 3):
            run()
        times: list[float] = []
        while not times or (sum(times) < 1000 * seconds and len(times) < 200 and not self.small):
            if self.gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                started = time.perf_counter()
                run()
                times.append(1000 * (time.perf_counter() - started))
        return statistics.median(times)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)


# The steps, in the order in which they run. Each returns what is written.


def driver(bench: Bench) -> Result:
    """What the driver says of the GPU, and that a process without one says so."""
    code = "from benchmarks.gpu.run import find_gpu; print(find_gpu())"
    hidden = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return {"gpu": str(find_gpu()), "hidden": hidden.stdout.strip(), "hidden_error": hidden.stderr[-300:]}


def graph(bench: Bench, cuda: Any = None) -> Result:
    """``runtimes/cuda.py`` alone: the shipped PTX launched, recorded and replayed, compared and timed."""
    cuda = cuda or Cuda()
    gpu = cuda.gpu()
    cuda.open()
    stream = cuda.create_stream()
    size, keys, heads = 64, 40, 8
    kernel = find_kernel(gpu.compute_capability, size)
    function = cuda.load_kernel(kernel.ptx, KERNEL)
    counts = (size**2 * heads * keys, keys**2, size**2 * keys, 15 * 16 * keys, size**2 * heads * keys)
    sizes = [2 * count for count in counts]
    rng = np.random.default_rng(0)
    host = [cuda.allocate_host(size) for size in sizes]
    device = [cuda.allocate(size) for size in sizes]
    for memory, address, count in zip(host, device, counts, strict=True):
        memory[:] = rng.standard_normal(count).astype(np.float16).view(np.uint8)
        cuda.upload(address, memory, len(memory), stream)

    def enqueue() -> None:
        cuda.launch_kernel(function, (kernel.blocks, 1), kernel.threads, kernel.shared, device, stream)

    def result() -> np.ndarray:
        cuda.download(host[4], device[4], sizes[4], stream)
        cuda.synchronise(stream)
        return np.array(host[4])

    enqueue()
    direct = result()
    cuda.begin_capture(stream)
    enqueue()
    recorded = cuda.end_capture(stream)
    cuda.launch_graph(recorded, stream)
    same = bool((result() == direct).all())
    times = {}
    for name, launch in (("launch_ms", enqueue), ("replay_ms", lambda: cuda.launch_graph(recorded, stream))):
        started = time.perf_counter()
        for _ in range(50):
            launch()
        cuda.synchronise(stream)
        times[name] = 20 * (time.perf_counter() - started)
    cuda.destroy_graph(recorded)
    for memory, address in zip(host, device, strict=True):
        cuda.free(address)
        cuda.free_host(memory)
    cuda.destroy_stream(stream)
    cuda.close()
    return {"gpu": str(gpu), "ptx": kernel.target, "replay_is_the_launch": same, **times}


def ceilings(bench: Bench) -> Result:
    """Copy bandwidth, and the fastest large product of each type."""
    found: Result = {}
    source = torch.empty((1 << 16) if bench.small else (1 << 29), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = 2 * len(source) / bench.ms(lambda: target.copy_(source)) / 1e6
    side = 64 if bench.small else 8192
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = bench.normal(side, side, dtype=dtype), bench.normal(side, side, dtype=dtype)
        found[f"{name}_tflops"] = 2 * side**3 / bench.ms(lambda a=a, b=b: a @ b) / 1e9  # type: ignore[misc]
    return found


class Local(nn.Module):
    """``SpecialLocal`` in one of ``FORMS``, with tables made once, so that a CUDA graph can record it."""

    def __init__(self, special: SpecialLocal, form: str, kernel: Any) -> None:
        super().__init__()
        self.special, self.form, self.kernel = special, form, kernel
        self.taps: Tensor | None = None
        self.window = round(special.kernel.shape[1] ** 0.5)

    def prepare(self) -> None:
        """Arrange the weights; once they have their type and device."""
        weight = self.special.kernel
        if self.form == "fused":
            self.taps = arrange_taps(weight)
        elif self.form == "tiled":
            table = torch.from_numpy(kernel_positions(self.window, self.special.tile)).to(weight.device)
            self.taps = F.pad(weight, (0, 1))[:, table].transpose(0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        special = self.special
        q, v = special.to_q(x), special.to_v(x)
        k = special.to_k(x).transpose(1, 2).softmax(-1)
        return self.lambdas(q, k, v).reshape(x.shape)

    def lambdas(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, P, C), k (N, K, P), v (N, P, V) -> (N, P, H, V), in any shape of as many elements."""
        special = self.special
        (rows, positions, keys), heads = v.shape, special.heads
        size = round(positions**0.5)
        content = k @ v + special.bias
        if self.form == "fused":
            assert self.taps is not None
            q = q.reshape(rows, positions, heads, keys)
            return fused_local_lambda(q, content, v, self.taps, self.window, kernel=self.kernel, num_warps=4)
        if self.form == "convolved":
            maps = v.transpose(1, 2).reshape(rows * keys, 1, size, size)
            convolved = F.conv2d(
                maps, special.kernel.reshape(keys, 1, self.window, self.window), padding=self.window // 2
            )
            lambdas = convolved.reshape(rows, keys, keys, positions).permute(0, 3, 2, 1) + content.unsqueeze(1)
            return q.reshape(rows, positions, heads, keys) @ lambdas
        if self.form == "one product":
            q = q.reshape(rows, positions, heads, keys)
            maps = v.transpose(1, 2).reshape(rows, keys, size, size)
            seen = F.unfold(maps, self.window, padding=self.window // 2)
            seen = seen.reshape(rows, keys, -1, positions).permute(0, 3, 2, 1)
            return q @ special.kernel @ seen + q @ content.unsqueeze(1)
        assert self.taps is not None
        tile = special.tile
        q = q.reshape(rows, positions // tile, tile * heads, keys)
        local = (q.unflatten(2, (tile, heads)) @ self.taps).flatten(2, 3)
        return local @ F.pad(v, (0, 0, 0, 1))[:, special.layout] + q @ content.unsqueeze(1)


def replace_local(network: nn.Module, form: str, bench: Bench) -> None:
    """Put ``Local`` in the place of every ``SpecialLocal``; after the network has its type and device."""
    for name, module in list(network.named_modules()):
        if isinstance(module, SpecialLocal):
            local = Local(module, form, bench.kernel)
            local.prepare()
            network.set_submodule(name, local)


def one_level(bench: Bench, size: int, keys: int, form: str, dtype: torch.dtype) -> tuple[Local, tuple[Tensor, ...]]:
    """The operator alone with random weights, and its inputs q, k and v for two rows."""
    from moebius_edge.model.lambdas import LocalLambda

    torch.manual_seed(size)
    special = SpecialLocal(LocalLambda(keys * bench.heads, bench.heads, bench.window).eval(), size, 8).to(
        bench.device, dtype
    )
    local = Local(special, form, bench.kernel)
    local.prepare()
    q, v = (bench.normal(2, size * size, width, dtype=dtype) for width in (keys * bench.heads, keys))
    k = bench.normal(2, keys, size * size, dtype=torch.float32).softmax(-1).to(dtype)
    return local, (q, k, v)


def operator(bench: Bench) -> Result:
    """The operator's four forms in FP16, level by level."""
    found: Result = {}
    for size, keys in bench.levels.items():
        for form in FORMS:
            local, inputs = one_level(bench, size, keys, form, torch.float16)
            try:
                found[f"{size} {form} ms"] = bench.ms(lambda run=local.lambdas, i=inputs: run(*i))  # type: ignore[misc]
            except RuntimeError as error:  # memory, or a kernel that the card refuses: the others still count
                found[f"{size} {form} failed"] = str(error)[:300]
    return found


def fused(bench: Bench) -> Result:
    """The kernel against float64 with fresh inputs, timed with 4 and 8 warps, and its PTX for four targets."""
    found: Result = {}
    for size, keys in bench.levels.items():
        local, inputs = one_level(bench, size, keys, "fused", torch.float16)
        exact = Local(local.special.double(), "convolved", None)
        expected = exact.lambdas(*(t.double() for t in inputs)).flatten()
        local.special.half()
        worst = (local.lambdas(*inputs).double().flatten() - expected).abs().max() / expected.abs().max()
        found[f"{size} relative error"] = float(worst)
        q, k, v = inputs
        q, content = q.reshape(2, -1, bench.heads, keys), k @ v + local.special.bias
        for warps in (4, 8) if bench.gpu else (4,):
            run = lambda q=q, c=content, v=v, w=warps, t=local.taps: fused_local_lambda(  # noqa: E731
                q, c, v, t, bench.window, kernel=bench.kernel, num_warps=w
            )
            found[f"{size} {warps} warps ms"] = bench.ms(run)
    for capability in (80, 87, 89, 110) if not bench.small else (87,):
        ptx, _ = compile_kernel(capability, 16, 160, 8, 15)
        (bench.out / f"sm_{capability}-16.ptx").write_text(ptx)
    return found


def inputs_of(bench: Bench, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    side = bench.config.latent_size
    branch = torch.arange(rows, device=bench.device) % 2
    return bench.normal(rows, 9, side, side, dtype=dtype), torch.full((rows,), 500.0, device=bench.device), branch


def plain_network(bench: Bench, dtype: torch.dtype) -> tuple[Any, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    student = build_student(bench.config).eval().to(bench.device, dtype)
    sample, timestep, branch = inputs_of(bench, 2, dtype)
    prompts = torch.arange(bench.config.num_prompts, device=bench.device)
    return student, (sample, timestep, prompts + bench.config.num_prompts * branch[:, None])


def plain(bench: Bench) -> Result:
    """The plain student, eager, in float32 (TF32 off) and FP16."""
    torch.backends.cudnn.benchmark = True
    found = {}
    for name, dtype in (("float32", torch.float32), ("FP16", bench.half)):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        student, inputs = plain_network(bench, dtype)
        found[f"{name} ms"] = bench.ms(lambda s=student, i=inputs: s(*i))  # type: ignore[misc]
    return found


def compiled(bench: Bench) -> Result:
    """The plain student in FP16 through torch.compile."""
    student, inputs = plain_network(bench, bench.half)
    run = torch.compile(student, backend="eager" if bench.small else "inductor")
    started = time.perf_counter()
    run(*inputs)
    return {"compile_s": time.perf_counter() - started, "FP16 ms": bench.ms(lambda: run(*inputs))}


def recorded(bench: Bench, run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as the replay of a CUDA graph; itself where there is no GPU."""
    if not bench.gpu:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def multiply_adds(bench: Bench, special: Any) -> int:
    """Of one row: products and convolutions as PyTorch counts them, and the local operator at its true window."""
    from torch.utils.flop_counter import FlopCounterMode

    def local(q: Any, k: Any, v: Any, weight: Any, *_: Any, **__: Any) -> int:
        rows, positions, keys = v
        return 2 * rows * positions * bench.heads * keys * (2 * weight[1] + keys) + 2 * rows * positions * keys * keys

    def interactive(q: Any, keys: Any, values: Any, table: Any, **_: Any) -> int:
        return int(2 * q[0] * q[1] * q[2] * keys[-1] * (q[3] + values[-1]))

    ours = torch.ops.moebius
    formulas: Any = {ours.local_lambda: local, ours.interactive_lambda: interactive}
    meta = [t.cpu() for t in inputs_of(bench, 1, torch.float32)]
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        special(*meta)
    return int(counter.get_total_flops()) // 2


def network(bench: Bench) -> Result:
    """The rewritten student in FP16 in a CUDA graph: tiled and fused, one row and two, whole and cached."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    special = specialise(build_student(bench.config).eval())
    found: Result = {"gmacs a row": multiply_adds(bench, special) / 1e9}
    special.to(bench.device, bench.half)
    for form in ("tiled", "fused"):
        ours = copy.deepcopy(special)
        replace_local(ours, form, bench)
        for rows in (1, 2):
            sample, timestep, branch = inputs_of(bench, rows, bench.half)
            noise, deep = ours(sample, timestep, branch)
            if not torch.isfinite(noise).all():
                found[f"{form} {rows} rows not finite"] = True
            whole = recorded(bench, lambda n=ours, i=(sample, timestep, branch): n(*i))  # type: ignore[misc]
            found[f"{form} {rows} rows ms"] = bench.ms(whole)
            cached = recorded(
                bench,
                lambda n=ours, i=(sample, timestep, branch, deep): n.network.shallow(*i),  # type: ignore[misc]
            )
            found[f"{form} {rows} rows cached ms"] = bench.ms(cached)
    return found


STEPS: dict[str, tuple[Callable[[Bench], Result], int]] = {  # and the most seconds of each
    "driver": (driver, 40),
    "graph": (graph, 40),
    "ceilings": (ceilings, 40),
    "operator": (operator, 80),
    "fused": (fused, 80),
    "plain": (plain, 80),
    "network": (network, 100),
    "compiled": (compiled, 140),
}


def table(results: dict[str, Result]) -> str:
    """The rows for docs/benchmarks.md; what was not measured is a dash."""

    def ms(step: str, key: str) -> float | None:
        value = results.get(step, {}).get(key)
        return value if isinstance(value, float) else None

    eager, peak = ms("plain", "FP16 ms"), ms("ceilings", "fp16_tflops")
    work = ms("network", "gmacs a row")
    rows = (
        ("plain, eager, float32", ms("plain", "float32 ms")),
        ("plain, eager, FP16", eager),
        ("plain, torch.compile, FP16", ms("compiled", "FP16 ms")),
        ("ours in a CUDA graph, FP16", ms("network", "tiled 2 rows ms")),
        ("ours with the fused kernel, FP16", ms("network", "fused 2 rows ms")),
    )
    lines = ["| a guided step (two rows) | ms | times plain eager FP16 | of the measured FP16 peak |"]
    lines.append("| --- | --- | --- | --- |")
    for name, value in rows:
        gain = f"{eager / value:.2f}" if eager and value else "-"
        ours = name.startswith("ours")
        share = f"{4 * work / value / peak:.0%}" if ours and value and peak and work else "-"
        lines.append(f"| {name} | {'-' if value is None else f'{value:.2f}'} | {gain} | {share} |")
    return "\n".join(lines) + "\n"


def run_step(name: str, small: bool, out: Path) -> Result:
    """Run one step here and write what it found, or why it failed."""
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    try:
        result = STEPS[name][0](Bench(small, out))
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {error}"[:1000]}
    result["seconds"] = round(time.perf_counter() - started, 1)
    write(out / f"{name}.json", result)
    return result


def write(path: Path, result: Result) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{path.stem}: {json.dumps(result)}", flush=True)


def run_all(small: bool, out: Path) -> None:
    """Every step in a process of its own, so that a kernel that breaks its context breaks no other step."""
    deadline = time.monotonic() + TOTAL_S
    for name, (_, limit) in STEPS.items():
        left = min(limit, deadline - time.monotonic())
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--step", name, "--out", str(out)]
        try:
            if left < 5:
                raise subprocess.TimeoutExpired(command, left)
            done = subprocess.run([*command, *(["--small"] if small else [])], timeout=left)
            if done.returncode and not (out / f"{name}.json").exists():
                write(out / f"{name}.json", {"failed": f"it ended with code {done.returncode}"})
        except subprocess.TimeoutExpired:
            write(out / f"{name}.json", {"failed": f"it took more than {left:.0f} s"})
        finish(out)


def finish(out: Path) -> None:
    """Write what there is so far as one file and as the table."""
    results = {name: json.loads(p.read_text()) for name in STEPS if (p := out / f"{name}.json").exists()}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        run_step(options.step, options.small, options.out)
    else:
        for old in options.out.glob("*.json"):
            old.unlink()
        run_all(options.small, options.out)
        print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
