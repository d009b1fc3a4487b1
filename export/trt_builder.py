"""TensorRT's parser and builder, either flavour, through Polygraphy's loaders.

Networks are always strongly typed: what the file says is what is computed, and no option here lowers a type. Every
failure becomes one line, whose cause TensorRT writes to its log alone. A process works with one flavour, for Polygraphy
imports one of the two packages for good.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import BundleError, MachineError, MoebiusError, OutOfMemory
from ..runtimes.flavours import FLAVOURS, load_package
from ..runtimes.update import COEFFICIENTS, update_component
from ..spec import LATENT_CHANNELS, Component
from ..system.files import utf8_path

Network = tuple[Any, ...]  # Polygraphy's: the builder, the network, and the parser where there is one

_PRODUCT_LAYERS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|failed to allocate|insufficient memory", re.IGNORECASE)
_UNSUPPORTED_GPU = re.compile(r"not supported by this TensorRT|for Turing|unsupported SM", re.IGNORECASE)
_INT8 = re.compile(r"\bint8\b", re.IGNORECASE)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]|]+?)\s*[\]|]")
_SAMPLE_CHANNELS = 2 * LATENT_CHANNELS + 1
# Indices of channels. TensorRT reads them where they lie until the plan is built: never a temporary array.
_CHANNELS = np.arange(_SAMPLE_CHANNELS, dtype=np.int32)
_ALL_BUT_ROWS = 0b1110  # axes to sum over, a bit each


class _ErrorLog(logging.Handler):
    """Keeps what TensorRT and Polygraphy log as errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.CRITICAL:  # at that level Polygraphy only sums up
            self.messages.append(record.getMessage())


_ERRORS = _ErrorLog()


class TrtBuilder:
    """Parses and builds with one flavour of TensorRT.

    Raises:
        MachineError: TensorRT or Polygraphy is not installed.
    """

    def __init__(self, flavour: str) -> None:
        self.flavour = FLAVOURS[flavour]
        self.package = load_package(self.flavour)
        self.title = f"{self.flavour.title} {self.package.__version__}"
        import_polygraphy(self.flavour.extra).config.USE_TENSORRT_RTX = not self.flavour.needs_gpu
        from polygraphy.backend import trt  # it reads that setting once, when it is imported

        self.polygraphy = trt

    def parse(self, onnx: Path) -> Network:
        """The network of an ONNX file.

        Raises:
            BundleError: the file cannot be parsed; the message names the node.
            MachineError: TensorRT does not start on this machine.
        """
        with utf8_path(onnx) as name:
            load = self.polygraphy.NetworkFromOnnxPath(name, strongly_typed=True)
            return self._call("parse", load, onnx)

    def define_update(self, latent_size: int) -> Network:
        """The network of ``update`` for latents of that size."""
        network: Network = self._call("start", self.polygraphy.CreateNetwork(strongly_typed=True))
        define_update(self.package, network[1], update_component(latent_size))
        return network

    def build(self, network: Network, request: dict[str, Any], on_percent: Callable[[int], None]) -> Any:
        """The plan, a buffer of TensorRT's own: a copy would need as much memory again.

        ``request`` is ``build_worker.build``'s. Raises BundleError, or MachineError where the machine is at fault.
        """
        trt, polygraphy = self.package, self.polygraphy
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
        cache = request["timing_cache"]
        if self.flavour.needs_gpu:
            config = polygraphy.CreateConfig(load_timing_cache=cache, **options)
        else:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            capabilities = [tuple(map(int, c.split("."))) for c in request["compute_capabilities"]]
            config = CreateConfigRTX(compute_capabilities=capabilities, **options)
        # On by default, TF32 would round the inputs of float32 products to ten bits; the file says float32.
        config = polygraphy.PostprocessConfig(config, lambda b, n, c: c.clear_flag(trt.BuilderFlag.TF32))
        load = polygraphy.EngineBytesFromNetwork(network, config=config, save_timing_cache=cache)
        return self._call("build", load, request["component"])

    def count_in_int8(self, plan: Any, names: list[str]) -> tuple[int | None, str]:
        """How many of the quantised ONNX nodes ``names`` a plan computes in INT8 on this GPU, and a note for the user.

        The count is None where it is not known: TensorRT for RTX chooses its kernels when the engine is loaded.
        """
        if not self.flavour.needs_gpu:
            return None, ""
        try:
            engine = self.polygraphy.EngineFromBytes(plan)()
            form = self.package.LayerInformationFormat.JSON
            in_int8 = nodes_in_int8(engine.create_engine_inspector().get_engine_information(form), names)
        except Exception as error:  # the engine is built and good; that its layers cannot be listed takes nothing away
            return None, f"which operators of the engine run in INT8 could not be read ({error})"
        if len(in_int8) == len(names):
            return len(names), ""
        first = next(name for name in names if name not in in_int8)
        return len(in_int8), (
            f"{self.title} computes {len(in_int8)} of the {len(names)} quantised operators in INT8, not {first}: "
            "measure it beside FP16"
        )

    def _call(self, what: str, load: Callable[[], Any], subject: object = "") -> Any:
        """What a loader returns, or our error for one of TensorRT's: the first it logged, for others follow from it."""
        from polygraphy.exception import PolygraphyException

        _ERRORS.messages.clear()
        try:
            return load()
        except Exception as error:
            started = isinstance(error, PolygraphyException)  # anything else is a constructor of TensorRT that failed
            raise self._error(what if started else "start", str(subject) if started else "", str(error)) from None

    def _error(self, what: str, subject: str, reason: str) -> MoebiusError:
        messages = [*_ERRORS.messages, reason]
        node = [m for m in messages if "In node " in m]
        problem = f"{self.title} cannot {f'{what} {subject}'.strip()} ({_tidy((node or messages)[0])})"
        if any(map(_OUT_OF_MEMORY.search, messages)):
            remedy = "close other programs, or pass a smaller --workspace or --max-batch"
            return OutOfMemory(f"{problem}: memory ran out", remedy)
        if what == "start" or any(map(_UNSUPPORTED_GPU.search, messages)):
            return MachineError(f"{problem}: this GPU or driver does not suit it", "see its support matrix")
        return BundleError(problem, "try another version of it, or export the bundle again")


def import_polygraphy(extra: str) -> ModuleType:
    """The package, its messages kept in ``_ERRORS`` and not printed; ``extra`` is ours that brings it.

    Raises ``MachineError`` where it is not installed.
    """
    try:
        import polygraphy.config
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise MachineError("the package polygraphy is missing", f'run `pip install "moebius-edge[{extra}]"`') from None
    logger = logging.getLogger("Polygraphy")
    G_LOGGER.use_python_logging_system, G_LOGGER.colors, logger.propagate = True, False, False
    logger.addHandler(_ERRORS)
    return polygraphy


def network_facts(onnx: str | os.PathLike[str], flavour: str = "tensorrt-rtx") -> dict[str, Any]:
    """``describe_network`` of an ONNX file, which builds nothing and needs no GPU with TensorRT for RTX.

    Raises as ``TrtBuilder`` and its ``parse``.
    """
    return describe_network(TrtBuilder(flavour).parse(Path(onnx))[1])


def describe_network(network: Any) -> dict[str, Any]:
    """What TensorRT made of a file: ``layers`` and ``tensors`` count layer and tensor types by name, ``inputs`` and
    ``outputs`` map names to types, ``quantised`` lists the ONNX convolutions and matrix products of two dequantised
    inputs."""
    layers: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    dequantised: set[str] = set()  # tensors; layers come in an order in which each one's inputs are known
    quantised: list[str] = []
    for layer in map(network.get_layer, range(network.num_layers)):
        kind = _name(layer.type)
        layers[kind] += 1
        inputs = [t.name for t in map(layer.get_input, range(layer.num_inputs)) if t is not None]
        outputs = [t for t in map(layer.get_output, range(layer.num_outputs)) if t is not None]
        tensors.update(_name(t.dtype) for t in outputs)
        # Weights of a matrix product get a dimension or lose one on their way.
        if kind == "DEQUANTIZE" or (kind in ("SHUFFLE", "UNSQUEEZE") and inputs[0] in dequantised):
            dequantised.update(t.name for t in outputs)
        if kind in _PRODUCT_LAYERS and len(inputs) > 1 and dequantised.issuperset(inputs[:2]):
            noted = _ONNX_LAYER.match(layer.metadata or "")  # the layer's own name may have got a number
            quantised.append(noted[1] if noted else layer.name)
    return {
        "layers": dict(sorted(layers.items())),
        "tensors": dict(sorted(tensors.items())),
        "quantised": quantised,
        "inputs": {t.name: _name(t.dtype) for t in map(network.get_input, range(network.num_inputs))},
        "outputs": {t.name: _name(t.dtype) for t in map(network.get_output, range(network.num_outputs))},
    }


def nodes_in_int8(information: str, names: Iterable[str]) -> list[str]:
    """Those of the ONNX nodes ``names`` that a layer with an INT8 input computes.

    ``information`` is the JSON of TensorRT's engine inspector at detailed verbosity: layers with the ONNX nodes that
    they were fused from in their name or metadata, and the format of each input in words that differ by version.

    Raises:
        ValueError: it is no JSON, or was written without details.
    """
    layers = json.loads(information).get("Layers", [])
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError("the engine's layers have no details")
    in_int8: set[str] = set()
    for layer in layers:
        formats = [[v for k, v in i.items() if k != "Name"] for i in layer.get("Inputs", []) if isinstance(i, dict)]
        if any(_INT8.search(json.dumps(values)) for values in formats):
            in_int8.update(_ONNX_LAYER.findall(str(layer.get("Metadata", ""))))
            in_int8.update(part.strip() for part in str(layer.get("Name", "")).split(" + "))
    return [name for name in names if name in in_int8]


def make_monitor(trt: Any, on_percent: Callable[[int], None]) -> Any:
    """TensorRT's progress monitor, whose nested phases become one number from 0 to 100 that never goes back."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[Any]] = {}  # name -> [parent, steps, steps done]
            self._percent = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [parent_phase, max(1, num_steps), 0]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][2] = step + 1
            outermost = [n for n, (parent, _, _) in list(self._phases.items()) if parent not in self._phases]
            percent = int(100 * self._fraction(outermost[0])) if outermost else 0
            if percent > self._percent:
                self._percent = percent
                on_percent(percent)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _fraction(self, name: str) -> float:
            _, steps, done = self._phases[name]
            inner = [self._fraction(n) for n, (parent, _, _) in list(self._phases.items()) if parent == name]
            return min(done + max(inner, default=0.0), steps) / steps

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
        indices = network.add_constant((stop - start,), _CHANNELS[start:stop]).get_output(0)
        return gather(tensor, indices, 1)

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
    latent = channels(inputs["sample"], 0, LATENT_CHANNELS)
    mask_and_masked = channels(inputs["sample"], LATENT_CHANNELS, _SAMPLE_CHANNELS)
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


def _tidy(message: str) -> str:
    """A message on one line, without the place in TensorRT's sources and the number of the error."""
    text = re.sub(r"\[[\w./]+::[^\]]*\]\s*", "", " ".join(message.removeprefix("[E] ").split()))
    text = re.sub(r"In node -?\d+ with name: (.*?) and operator: (\S+) \(\w+\): \w+: ", r"node '\1' (\2): ", text)
    return re.sub(r"^(IBuilder::\w+: )?Error Code \d+: ", "", text).strip()


def _name(member: Any) -> str:
    return str(member).rpartition(".")[2]
