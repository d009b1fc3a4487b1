"""What a GPU has to tell in ten minutes: driver, graphs, ceilings, the lambda operator, the network and the decoder.

    make gpu                                                            # all steps, in order
    python -m benchmarks.gpu.run --out DIR --step fused --step network  # those, in this order

Needs PyTorch with CUDA, Triton, numpy and this checkout, nothing else: other packages that the modules it uses import
are stood in for. Each step is a process of its own with a limit, forked when all is imported. Every figure is written
at once, to DIR/STEP.json; what failed says why, and the rest goes on. ``--small`` runs tiny shapes, on the CPU where
there is no GPU: that is what the tests do. Weights are random, which does not matter to the time.
"""

from __future__ import annotations

import argparse
import copy
import importlib.machinery
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

_ONNX = ("onnx", "onnx.reference", "onnx.utils", "onnx_ir", "onnxscript", "onnxruntime")
for _name in (*_ONNX, "pydantic", "safetensors", "cv2", "PIL", "PIL.TiffImagePlugin"):
    try:
        importlib.import_module(_name)
    except ImportError:  # imported, and not needed for anything here
        sys.modules[_name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(_name, None))

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from moebius_edge.export.lambda_kernel import arrange_taps, fused_local_lambda, local_window, published_levels
from moebius_edge.export.operators import kernel_positions
from moebius_edge.export.specialise import SpecialLocal, specialise
from moebius_edge.metrics.fidelity import psnr_db
from moebius_edge.model import StudentConfig, build_student
from moebius_edge.runtimes.cuda import Cuda, find_gpu
from moebius_edge.runtimes.lambda_plugin import KERNEL, find_kernel
from moebius_edge.training.optimiser import MuonAdamW

from .decoder import PUBLISHED, loud_decoder, quarter, rescale
from .shares import floors, kernel_shares

TOTAL_S = 600
FORMS = ("tiled", "convolved", "one product", "fused")
Result = dict[str, Any]


class Found(Result):
    """What a step has found, in a file from the first figure on: what came before a limit or a crash is not lost."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.path = path

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if self.path is not None:
            self.path.write_text(json.dumps(self, indent=2) + "\n", encoding="utf-8")

    def measure(self, key: str, value: Callable[[], Any]) -> None:
        """Enter ``value()``, or why there is none: memory, or a kernel that the card refuses. The rest goes on."""
        try:
            self[key] = value()
        except Exception as error:
            self[f"{key} failed"] = _reason(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:600]


class Bench:
    """Where and how large: ``small`` shapes on whatever there is, and Triton's interpreter without a GPU."""

    def __init__(self, small: bool, out: Path, found: Found | None = None) -> None:
        self.small, self.out, self.found = small, out, Found() if found is None else found
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
        if self.gpu:
            return local_window
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(local_window.fn)

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
    code = "from moebius_edge.runtimes.cuda import find_gpu; print(find_gpu())"
    hidden = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    bench.found["versions"] = (
        f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, Triton {triton.__version__}"
    )
    bench.found["gpu"] = str(find_gpu())
    bench.found["hidden"], bench.found["hidden_error"] = hidden.stdout.strip(), hidden.stderr[-300:]
    return bench.found


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
    source = torch.empty((1 << 16) if bench.small else (1 << 29), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.found.measure("copy_gb_per_s", lambda: 2 * len(source) / bench.ms(lambda: target.copy_(source)) / 1e6)
    side = 64 if bench.small else 8192

    def product(dtype: torch.dtype) -> float:
        a, b = (bench.normal(side, side, dtype=dtype) for _ in range(2))
        return 2 * side**3 / bench.ms(lambda: a @ b) / 1e9

    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        bench.found.measure(f"{name}_tflops", lambda dtype=dtype: product(dtype))  # type: ignore[misc]
    return bench.found


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

    def ms(size: int, keys: int, form: str) -> float:
        local, inputs = one_level(bench, size, keys, form, torch.float16)
        return bench.ms(lambda: local.lambdas(*inputs), 0.3)

    for size, keys in bench.levels.items():
        for form in FORMS:
            bench.found.measure(f"{size} {form} ms", lambda given=(size, keys, form): ms(*given))  # type: ignore[misc]
    return bench.found


def fused(bench: Bench) -> Result:
    """The kernel against float64 with fresh inputs, timed with 4 and 8 warps."""

    def error(size: int, keys: int) -> float:
        local, inputs = one_level(bench, size, keys, "fused", torch.float16)
        result = local.lambdas(*inputs).double().flatten()
        exact = Local(local.special.double(), "convolved", None)
        expected = exact.lambdas(*(t.double() for t in inputs)).flatten()
        return float((result - expected).abs().max() / expected.abs().max())

    def ms(size: int, keys: int, warps: int) -> float:
        local, (q, k, v) = one_level(bench, size, keys, "fused", torch.float16)
        assert local.taps is not None
        given = q.reshape(2, -1, bench.heads, keys), k @ v + local.special.bias, v, local.taps, bench.window
        return bench.ms(lambda: fused_local_lambda(*given, kernel=bench.kernel, num_warps=warps), 0.3)

    for size, keys in bench.levels.items():
        bench.found.measure(f"{size} relative error", lambda given=(size, keys): error(*given))  # type: ignore[misc]
        for warps in (4, 8) if bench.gpu else (4,):
            bench.found.measure(f"{size} {warps} warps ms", lambda given=(size, keys, warps): ms(*given))  # type: ignore[misc]
    return bench.found


def inputs_of(bench: Bench, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    side = bench.config.latent_size
    branch = torch.arange(rows, device=bench.device) % 2
    return bench.normal(rows, 9, side, side, dtype=dtype), torch.full((rows,), 500.0, device=bench.device), branch


def plain_network(bench: Bench, dtype: torch.dtype) -> tuple[Any, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    with torch.device(bench.device):
        student = build_student(bench.config).eval().to(dtype)
    sample, timestep, branch = inputs_of(bench, 2, dtype)
    prompts = torch.arange(bench.config.num_prompts, device=bench.device)
    return student, (sample, timestep, prompts + bench.config.num_prompts * branch[:, None])


def plain(bench: Bench) -> Result:
    """The plain student, eager, in float32 (TF32 off) and FP16."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def ms(dtype: torch.dtype) -> float:
        student, inputs = plain_network(bench, dtype)
        return bench.ms(lambda: student(*inputs), 1)

    bench.found.measure("float32 ms", lambda: ms(torch.float32))
    bench.found.measure("FP16 ms", lambda: ms(bench.half))
    return bench.found


def compiled(bench: Bench) -> Result:
    """The plain student in FP16 through torch.compile."""
    student, inputs = plain_network(bench, bench.half)
    run = torch.compile(student, backend="eager" if bench.small else "inductor")
    started = time.perf_counter()
    run(*inputs)
    bench.found["compile_s"] = time.perf_counter() - started
    bench.found["FP16 ms"] = bench.ms(lambda: run(*inputs))
    return bench.found


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


def special_network(bench: Bench) -> Any:
    """The student rewritten as for the export, with random weights, in FP16."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        special = specialise(build_student(bench.config).eval())
    return special.to(bench.device, bench.half)


def network(bench: Bench) -> Result:
    """The rewritten student in FP16 in a CUDA graph: tiled and fused, one row and two, whole and cached."""
    torch.backends.cudnn.benchmark = True
    special = special_network(bench)

    def gmacs() -> float:
        parts = floors(special, inputs_of(bench, 1, bench.half), bench.heads)
        return sum(part["gmacs"] for part in parts.values())

    bench.found.measure("gmacs a row", gmacs)
    for form in ("tiled", "fused"):
        ours = copy.deepcopy(special)
        replace_local(ours, form, bench)
        for rows in (2, 1):
            bench.found.measure(f"{form} {rows} rows ms", lambda n=ours, r=rows: whole_ms(bench, n, r))  # type: ignore[misc]
            bench.found.measure(f"{form} {rows} rows cached ms", lambda n=ours, r=rows: cached_ms(bench, n, r))  # type: ignore[misc]
        ours.to(memory_format=torch.channels_last)
        bench.found.measure(f"{form} 2 rows channels last ms", lambda n=ours: whole_ms(bench, n, 2))  # type: ignore[misc]
    return bench.found


def whole_ms(bench: Bench, ours: Any, rows: int) -> float:
    inputs = inputs_of(bench, rows, bench.half)
    if not torch.isfinite(ours(*inputs)[0]).all():
        raise ValueError("the noise is not finite")
    return bench.ms(recorded(bench, lambda: ours(*inputs)))


def cached_ms(bench: Bench, ours: Any, rows: int) -> float:
    inputs = inputs_of(bench, rows, bench.half)
    deep = ours(*inputs)[1]
    return bench.ms(recorded(bench, lambda: ours.network.shallow(*inputs, deep)))


def shares(bench: Bench) -> Result:
    """Kernel time of the rewritten student's guided step by class of operator, eager, beside the floor of each class.

    A floor is the time of an operator's arithmetic at the measured FP16 product or that of its inputs and outputs at
    the measured copy, whichever is longer, where the step ``ceilings`` has run; the local operator counts as one.
    """
    torch.backends.cudnn.benchmark = True
    special, inputs = special_network(bench), inputs_of(bench, 2, bench.half)
    measured = bench.out / "ceilings.json"
    peaks = json.loads(measured.read_text()) if measured.exists() else {}
    bench.found.measure("floor", lambda: floors(special, inputs, bench.heads, peaks))
    for form in ("tiled", "fused"):
        ours = copy.deepcopy(special)
        replace_local(ours, form, bench)
        bench.found.measure(form, lambda n=ours: kernel_shares(n, inputs, Local, 1 if bench.small else 3))  # type: ignore[misc]
    return bench.found


def decoder(bench: Bench) -> Result:
    """The published decoder's shape, its residual stream beyond FP16: PSNR against float32, eager, and in a graph."""
    torch.backends.cudnn.benchmark = True
    plain = loud_decoder((32, 32, 32, 64) if bench.small else PUBLISHED).to(bench.device)
    latent = bench.normal(1, 4, *((4, 4) if bench.small else (64, 64)), dtype=torch.float32)
    quarter(plain)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    expected = plain(latent).cpu().numpy()

    def measure(
        name: str, network: Any, dtype: torch.dtype = torch.float32, layout: Any = torch.preserve_format
    ) -> None:
        network, x = (t.to(dtype=dtype, memory_format=layout) for t in (copy.deepcopy(network), latent))

        def fidelity() -> float | str:
            result = network(x).float().cpu().numpy()
            return psnr_db(result, expected) if np.isfinite(result).all() else "not finite"

        bench.found.measure(f"{name} psnr_db", fidelity)
        bench.found.measure(f"{name} ms", lambda: bench.ms(lambda: network(x), 0.3))
        bench.found.measure(f"{name} graph ms", lambda: bench.ms(recorded(bench, lambda: network(x)), 0.3))

    measure("float32", plain)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    measure("TF32", plain)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    measure("BF16", plain, torch.bfloat16)
    measure("FP16", plain, torch.float16)
    bench.found["divisor"] = rescale(plain, latent)
    measure("FP16 rescaled", plain, torch.float16)
    measure("FP16 rescaled, channels last", plain, torch.float16, torch.channels_last)
    return bench.found


def demonstration() -> StudentConfig:
    """The shape of the demonstration's student, examples/train_tiny/denoiser.py: the recipe ``tiny``, 16 channels."""
    return StudentConfig(
        block_out_channels=(64, 128, 256), layers_per_block=1, cross_attention_dim=32, prompt_embedding_dim=32,
        latent_size=32, latent_channels=16,
    )  # fmt: skip


@torch.enable_grad()
def training(bench: Bench) -> Result:
    """Images a second of training the demonstration's student in BF16: forward, backward and the optimiser's step."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    config, batch = demonstration(), 2 if bench.small else 96
    student = build_student(config).to(bench.device).train()
    optimiser = MuonAdamW(student, 3e-3)
    side, channels = config.latent_size, config.latent_channels
    sample = bench.normal(batch, 2 * channels + 1, side, side, dtype=torch.float32)
    noise = bench.normal(batch, channels, side, side, dtype=torch.float32)
    timestep = torch.randint(0, 1000, (batch,), device=bench.device)
    prompts = torch.arange(config.num_prompts, device=bench.device).expand(batch, -1)

    def step(model: Any) -> None:
        with torch.autocast(bench.device, torch.bfloat16):
            predicted = model(sample, timestep, prompts).noise
        F.mse_loss(predicted.float(), noise).backward()
        optimiser.step()
        optimiser.zero_grad()

    def images_per_s(model: Any) -> float:
        return 1000 * batch / bench.ms(lambda: step(model), 2)

    bench.found.measure("eager images/s", lambda: images_per_s(student))
    F.mse_loss(student(sample, timestep, prompts).noise, noise).backward()
    bench.found.measure("optimiser ms", lambda: bench.ms(optimiser.step))
    compiled = torch.compile(student, backend="eager" if bench.small else "inductor")
    started = time.perf_counter()
    step(compiled)
    bench.found["compile_s"] = time.perf_counter() - started
    bench.found.measure("compiled images/s", lambda: images_per_s(compiled))
    return bench.found


STEPS: dict[str, tuple[Callable[[Bench], Result], int]] = {  # and the most seconds of each
    "driver": (driver, 30),
    "graph": (graph, 20),
    "ceilings": (ceilings, 20),
    "operator": (operator, 40),
    "fused": (fused, 40),
    "plain": (plain, 40),
    "network": (network, 60),
    "shares": (shares, 50),
    "decoder": (decoder, 60),
    "training": (training, 110),
    "compiled": (compiled, 130),
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
    return "\n".join([*lines, *decoder_rows(results.get("decoder", {}))]) + "\n"


def decoder_rows(found: Result) -> list[str]:
    """The table of one decode to 512 x 512, of what was measured."""

    def text(key: str, digits: int) -> str:
        value = found.get(key, "-")
        return f"{value:.{digits}f}" if isinstance(value, float) else str(value)

    names = [key.removesuffix(" psnr_db") for key in found if key.endswith(" psnr_db")]
    lines = [
        "",
        "| decoder | PSNR against float32, dB | eager, ms | in a CUDA graph, ms |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {n} | {text(n + ' psnr_db', 1)} | {text(n + ' ms', 2)} | {text(n + ' graph ms', 2)} |" for n in names]
    return lines if names else []


def run_step(name: str, small: bool, out: Path) -> Result:
    """Run one step here and write what it found, or why it failed."""
    started = time.perf_counter()
    found = Found(out / f"{name}.json")
    try:
        with torch.no_grad():
            found.update(STEPS[name][0](Bench(small, out, found)))
    except Exception as error:
        found["failed"] = _reason(error)
    found["seconds"] = round(time.perf_counter() - started, 1)
    print(f"{name}: {json.dumps(found)}", flush=True)
    return found


def run_all(names: Iterable[str], small: bool, out: Path, seconds: float = TOTAL_S) -> None:
    """Each step in a process of its own, so that a kernel that breaks its context breaks no other step.

    It is forked from this one, which has imported everything and has not touched the GPU: that saves each the seconds
    of the imports.
    """
    deadline = time.monotonic() + seconds
    for name in names:
        left = min(STEPS[name][1], deadline - time.monotonic())
        path = out / f"{name}.json"
        path.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=run_step, args=(name, small, out))
        problem = f"it took more than {left:.0f} s" if left > 0 else "no time was left"
        if left > 0:
            process.start()
            process.join(left)
            if not process.is_alive():
                problem = f"it ended with code {process.exitcode}" if process.exitcode else ""
            process.kill()
            process.join()
        if problem:
            found = {**(json.loads(path.read_text()) if path.exists() else {}), "failed": problem}
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print(f"{name}: {json.dumps(found)}", flush=True)
        finish(out)


def finish(out: Path) -> None:
    """Write what there is so far as one file and as the table."""
    results = {name: json.loads(p.read_text()) for name in STEPS if (p := out / f"{name}.json").exists()}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(results), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--step", choices=STEPS, action="append", help="run this one, and others that are named so")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="the most in all; what is left is not run")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.step:
        for old in options.out.glob("*.json"):
            old.unlink()
    run_all(options.step or STEPS, options.small, options.out, options.seconds)
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
