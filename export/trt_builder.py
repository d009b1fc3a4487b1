"""One ONNX file, or ``update``, -> one TensorRT plan, of either variant, through Polygraphy's loaders.

``python -m moebius_edge.export.trt_builder`` answers a request (see ``system.subprocess_job``): a process a plan gives
all memory back, and Polygraphy imports one of the two packages for good. Networks are always strongly typed: what the
file says is what is computed, and no option here lowers a type.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from logging.handlers import BufferingHandler
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import BundleError, MachineError, MoebiusError, OutOfMemory
from ..progress import Progress
from ..runtimes.base import is_verbose
from ..runtimes.engine_files import VARIANTS, load_package, max_opset, version_of
from ..runtimes.lambda_plugin import plugin_model, register_plugin
from ..runtimes.latent_loop import COEFFICIENTS, update_component
from ..runtimes.onnx_check import check_onnx_file
from ..spec import MAX_LATENT_CHANNELS, Component, sample_channels
from ..system.files import atomic_write, sha256_file, utf8_path
from ..system.machine import peak_memory_bytes
from ..system.subprocess_job import Note, serve_job

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|failed to allocate|insufficient memory", re.IGNORECASE)
_UNSUPPORTED_GPU = re.compile(r"not supported by this TensorRT|for Turing|unsupported SM", re.IGNORECASE)
# Indices of channels. TensorRT reads them where they lie until the plan is built: never a temporary array.
_CHANNELS = np.arange(sample_channels(MAX_LATENT_CHANNELS), dtype=np.int32)
_ALL_BUT_ROWS = 0b1110  # axes to sum over, a bit each
# What TensorRT and Polygraphy log: TensorRT's calls themselves return nothing but None.
_LOG = BufferingHandler(capacity=100_000)


def build(request: dict[str, Any], progress: Progress, note: Note) -> dict[str, Any]:
    """Build and write one plan; what ``engine.json`` records of it.

    ``request`` is made by ``engines.build_engines``: component and ONNX file (None for ``update``), the plan to write,
    TensorRT's options, and the name of the work for ``progress``.

    Raises:
        BundleError: the file cannot be parsed or built.
        MachineError: TensorRT is missing, does not know the GPU, or memory or disk ran out.
    """
    started = time.monotonic()
    builder = TrtBuilder(request["variant"])
    if request["onnx"] is None:
        network = builder.create_update(*request["profile"]["noise"][0][2:0:-1])
    else:
        network = builder.parse(Path(request["onnx"]), request.get("lambda_plugin"))
    plan = builder.build(network, request, lambda percent: progress(request["stage"], percent, 100))
    with atomic_write(request["plan"]) as temporary:
        temporary.write_bytes(plan)
    path = Path(request["plan"])
    return {
        "file": path.name,
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "weights_bytes": logged_bytes("Weights"),
        "activation_bytes": logged_bytes("Activation"),
        "persistent_bytes": logged_bytes("Device Persistent"),
        "build_seconds": round(time.monotonic() - started, 1),
        "build_peak_memory_bytes": peak_memory_bytes(),
    }


def import_polygraphy() -> ModuleType:
    """The package, whose messages are kept and not printed. Raises ``MachineError`` where it is missing."""
    try:
        import polygraphy.config
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise MachineError("the package polygraphy is missing", "run `pip install polygraphy`") from None
    logger = logging.getLogger("Polygraphy")
    G_LOGGER.use_python_logging_system, G_LOGGER.colors, logger.propagate = True, False, False
    G_LOGGER.module_severity = G_LOGGER.VERBOSE  # TensorRT's information, which has the sizes
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_LOG)
    if is_verbose():
        logger.addHandler(logging.StreamHandler())
    return polygraphy


class TrtBuilder:
    """Polygraphy's loaders on one variant of TensorRT. A network is its tuple of builder, network and parser.

    Raises:
        MachineError: TensorRT or Polygraphy is not installed.
    """

    def __init__(self, variant: str) -> None:
        self.variant = VARIANTS[variant]
        self.package = load_package(self.variant)
        self.title = f"{self.variant.title} {self.package.__version__}"
        import_polygraphy().config.USE_TENSORRT_RTX = not self.variant.needs_gpu
        from polygraphy.backend import trt  # it reads that setting once, when it is imported

        self.polygraphy = trt

    def parse(self, onnx: Path, plugin_for: str | None = None) -> Any:
        """The network of an ONNX file; ``plugin_for`` a GPU such as 8.7 the plug-in takes the place of ``LocalLambda``.

        Raises ``BundleError`` for a file that ``export`` does not write, of too new an opset, or with a node that
        cannot be parsed, which is named.
        """
        highest, opset = max_opset(self.variant.name, version_of(self.package)), check_onnx_file(onnx)
        if opset > highest:
            problem = f"{onnx} is not for {self.title}: opset {opset} is newer than {highest}, the highest it parses"
            raise BundleError(problem, "export the bundle again")
        if plugin_for and (model := plugin_model(onnx)):
            self._call("start", lambda: register_plugin(self.package, plugin_for))
            return self._call(f"parse {onnx}", self.polygraphy.NetworkFromOnnxBytes(model, strongly_typed=True))
        with utf8_path(onnx) as name:
            return self._call(f"parse {onnx}", self.polygraphy.NetworkFromOnnxPath(name, strongly_typed=True))

    def create_update(self, latent_size: int, latent_channels: int) -> Any:
        """The network of ``update`` for latents of that size and number of channels."""
        network = self._call("start", self.polygraphy.CreateNetwork(strongly_typed=True))
        define_update(self.package, network[1], update_component(latent_size, latent_channels))
        return network

    def build(self, network: Any, request: dict[str, Any], on_percent: Callable[[int], None]) -> Any:
        """The plan, a buffer of TensorRT's own: a copy would need as much memory again. Raises as ``build``."""
        trt, polygraphy, cache = self.package, self.polygraphy, request["timing_cache"]
        profile = polygraphy.Profile()
        for name, (least, best, most) in request["profile"].items():
            profile.add(name, min=least, opt=best, max=most)
        options = {
            "profiles": [profile],
            "builder_optimization_level": request["opt_level"],
            "progress_monitor": make_monitor(trt, on_percent),
        }
        if request["workspace_bytes"] is not None:
            options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: request["workspace_bytes"]}
        if self.variant.needs_gpu:
            config = polygraphy.CreateConfig(load_timing_cache=cache, **options)
        else:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            capabilities = [tuple(map(int, c.split("."))) for c in request["compute_capabilities"]]
            config = CreateConfigRTX(compute_capabilities=capabilities, **options)
        # On by default, TF32 would round the inputs of float32 products to ten bits; the file says float32.
        config = polygraphy.PostprocessConfig(config, lambda b, n, c: c.clear_flag(trt.BuilderFlag.TF32))
        load = polygraphy.EngineBytesFromNetwork(network, config=config, save_timing_cache=cache)
        return self._call(f"build {request['component']}", load)

    def _call(self, what: str, load: Callable[[], Any]) -> Any:
        """What a loader returns, or our error for the first that TensorRT logged, for others follow from it."""
        from polygraphy.exception import PolygraphyException

        _LOG.flush()
        try:
            return load()
        except Exception as error:  # but for Polygraphy's own it is a constructor of TensorRT that failed
            raise self._error(what if isinstance(error, PolygraphyException) else "start", str(error)) from None

    def _error(self, what: str, reason: str) -> MoebiusError:
        messages = [r.getMessage() for r in _LOG.buffer if r.levelno == logging.ERROR] + [reason]
        cause = next((m for m in messages if "In node " in m), messages[0])
        problem = f"{self.title} cannot {what} ({_tidy(cause)})"
        if any(map(_OUT_OF_MEMORY.search, messages)):
            remedy = "close other programs, or pass a smaller --workspace or --max-batch"
            return OutOfMemory(f"{problem}: memory ran out", remedy)
        if what == "start" or any(map(_UNSUPPORTED_GPU.search, messages)):
            return MachineError(f"{problem}: this GPU or driver does not suit it", "see its support matrix")
        return BundleError(problem, "try another version of it, or export the bundle again")


def _tidy(message: str) -> str:
    """A message on one line, without the place in TensorRT's sources and the number of the error."""
    text = re.sub(r"\[[\w./]+::[^\]]*\]\s*", "", " ".join(message.removeprefix("[E] ").split()))
    text = re.sub(r"In node -?\d+ with name: (.*?) and operator: (\S+) \(\w+\): \w+: ", r"node '\1' (\2): ", text)
    return re.sub(r"^(IBuilder::\w+: )?Error Code \d+: ", "", text).strip()


def logged_bytes(what: str) -> int | None:
    """The memory for ``what`` that the build has logged; of several GPU generations in a plan it is the largest.

    Without a GPU a plan cannot be opened, so the builder's log is the only source; None where it says nothing.
    """
    sizes = (re.search(rf"Total {what} Memory: (\d+)", record.getMessage()) for record in _LOG.buffer)
    return max((int(size[1]) for size in sizes if size), default=None)


def make_monitor(trt: Any, on_percent: Callable[[int], None]) -> Any:
    """TensorRT's progress monitor, whose nested phases become one number from 0 to 100 that never goes back."""
    phases: dict[str, list[Any]] = {}  # name -> [parent, steps, steps done]
    highest = 0

    def fraction(name: str) -> float:
        _, steps, done = phases[name]
        inner = [fraction(n) for n, (parent, _, _) in list(phases.items()) if parent == name]
        return float(min(done + max(inner, default=0.0), steps)) / steps

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases[phase_name] = [parent_phase, max(1, num_steps), 0]

        def step_complete(self, phase_name: str, step: int) -> bool:
            nonlocal highest
            if phase_name in phases:
                phases[phase_name][2] = step + 1
            percent = max((int(100 * fraction(n)) for n, p in list(phases.items()) if p[0] not in phases), default=0)
            if percent > highest:
                highest = percent
                on_percent(percent)
            return True

        def phase_finish(self, phase_name: str) -> None:
            phases.pop(phase_name, None)

    return Monitor()


def define_update(trt: Any, network: Any, component: Component) -> None:
    """Add the layers of ``component`` (``update_component``) to an empty, strongly typed ``network``.

    ``trt`` is the TensorRT package. Slices are gathers, which need no sizes: the number of rows is free. There is no
    ONNX file of ``update``, for it would have to be in every bundle: a device has no onnx package to write one.
    """
    types = {"float32": trt.DataType.FLOAT, "int32": trt.DataType.INT32}
    inputs = {
        t.name: network.add_input(t.name, types[t.dtype], tuple(-1 if d == "N" else int(d) for d in t.shape))
        for t in component.inputs
    }

    def gather(tensor: Any, indices: Any, axis: int) -> Any:
        return network.add_gather(tensor, indices, axis).get_output(0)

    def channels(tensor: Any, start: int, stop: int) -> Any:
        return gather(tensor, network.add_constant((stop - start,), _CHANNELS[start:stop]).get_output(0), 1)

    def combine(operation: Any, a: Any, b: Any) -> Any:
        return network.add_elementwise(a, b, operation).get_output(0)

    def add(a: Any, b: Any) -> Any:
        return combine(trt.ElementWiseOperation.SUM, a, b)

    def times(name: str, a: Any) -> Any:
        index = COEFFICIENTS.index(name)
        return combine(trt.ElementWiseOperation.PROD, channels(inputs["coefficients"], index, index + 1), a)

    unconditional, conditional = (gather(inputs["noise"], inputs[n], 0) for n in ("unconditional", "conditional"))
    difference = combine(trt.ElementWiseOperation.SUB, conditional, unconditional)
    noise = add(unconditional, times("guidance", difference))
    split, end = (int(t.shape[1]) for name in ("noise", "sample") for t in component.inputs if t.name == name)
    latent, mask_and_masked = channels(inputs["sample"], 0, split), channels(inputs["sample"], split, end)
    moved = add(add(times("latent", latent), times("noise", noise)), times("previous", inputs["clean"]))
    joined = network.add_concatenation([moved, mask_and_masked])
    joined.axis = 1
    size = network.add_unary(inputs["noise"], trt.UnaryOperation.ABS).get_output(0)
    outputs = {
        "next_sample": joined.get_output(0),
        "next_clean": add(times("clean_latent", latent), times("clean_noise", noise)),
        "magnitude": network.add_reduce(size, trt.ReduceOperation.SUM, _ALL_BUT_ROWS, True).get_output(0),
    }
    for tensor in component.outputs:
        outputs[tensor.name].name = tensor.name
        network.mark_output(outputs[tensor.name])


def _serve(request: dict[str, Any], progress: Progress, note: Note) -> dict[str, Any]:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # TensorRT would not return to Python in time
    return build(request, progress, note)


if __name__ == "__main__":
    sys.exit(serve_job(_serve))
