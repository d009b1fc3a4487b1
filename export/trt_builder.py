"""TensorRT's builder and parser, either flavour: an ONNX file -> a network and its types -> a plan.

Networks are always strongly typed: what the file says is what is computed, and no option here lowers a type. Every
failure becomes one line; TensorRT itself returns None and writes to its log.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import BundleError, MachineError, MoebiusError
from ..runtimes.engine_files import FLAVOURS, load_package, make_logger, max_opset, version_of
from ..runtimes.latent_loop import update_component
from ..runtimes.onnx_check import check_onnx_file
from ..spec import DENOISER
from ..system.files import utf8_path
from .build_progress import Fraction, make_monitor
from .engine_layers import engine_information, products_in_int8
from .timing_cache import read_timing_cache, write_timing_cache
from .update_network import define_update

Tell = Callable[..., None]  # (event, **values)

_HIGH_PRECISION, _LOW = ("HALF", "BF16"), ("INT8", "INT4", "UINT8", "FP8", "FP4", "E8M0")
# precision of the bundle -> types no tensor may have, and the type the denoiser must have somewhere
TYPES: dict[str, tuple[tuple[str, ...], str]] = {
    "float32": ((*_HIGH_PRECISION, *_LOW), "FLOAT"),
    "fp16": (("BF16", *_LOW), "HALF"),
    "int8": (("BF16", "INT4", "FP8", "FP4"), "INT8"),
}
TYPES["float16"] = TYPES["fp16"]

_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|failed to allocate|insufficient memory", re.IGNORECASE)
_UNSUPPORTED_GPU = re.compile(r"not supported by this TensorRT|for Turing|unsupported SM", re.IGNORECASE)


def network_facts(onnx: str | os.PathLike[str], flavour: str = "tensorrt-rtx") -> dict[str, Any]:
    """What TensorRT's parser makes of an ONNX file: ``layers`` and ``tensors`` count layer and tensor types by name,
    ``inputs`` and ``outputs`` map names to types, ``quantised`` lists the ONNX nodes whose product has two
    dequantised inputs. Builds nothing, needs no GPU with TensorRT for RTX.

    Raises:
        MachineError: this TensorRT is not installed.
        BundleError: the file cannot be parsed.
    """
    builder = TrtBuilder(flavour)
    return builder.facts(builder.parse(Path(onnx)))


def check_types(facts: dict[str, Any], precision: str, component: str) -> None:
    """Raise ``BundleError`` unless the network's tensor types are those of the precision that was asked for."""
    if precision not in TYPES:
        raise BundleError(f"precision {precision!r} is unknown, {', '.join(TYPES)} are not: update moebius-edge")
    forbidden, needed = TYPES[precision]
    if strange := [t for t in forbidden if t in facts["tensors"]]:
        raise BundleError(f"{component} has {strange[0]} tensors in a {precision} bundle: export the bundle again")
    if component == DENOISER and needed not in facts["tensors"]:
        raise BundleError(f"{component} has no {needed} tensor in a {precision} bundle: export the bundle again")


def check_products(facts: dict[str, Any], products: list[str], component: str) -> None:
    """Raise ``BundleError`` unless the network's quantised products are ``products``, names of ONNX nodes."""
    found, wanted = set(facts["quantised"]), set(products)
    if lost := sorted(wanted - found):
        raise BundleError(f"{component}: TensorRT does not see {lost[0]} as quantised: export the bundle again")
    if more := sorted(found - wanted):
        raise BundleError(f"{component}: {more[0]} is quantised, and bundle.json does not list it: export it again")


class TrtBuilder:
    """TensorRT's builder, its errors kept: the calls return nothing but None or False."""

    def __init__(self, flavour: str) -> None:
        self._flavour = FLAVOURS[flavour]
        self.package = load_package(self._flavour)
        self._errors: list[str] = []
        self._title = f"{self._flavour.title} {self.package.__version__}"
        self._logger = make_logger(self.package, self._log)
        try:
            self._builder = self.package.Builder(self._logger)
        except Exception as error:  # no driver, or a GPU it does not know
            raise self._problem("start", str(error)) from None

    def check(self, onnx: Path) -> None:
        """``check_onnx_file``, the opset, and the rules of ``trt_rules`` where the onnx package is installed."""
        version = version_of(self.package)
        highest, found = max_opset(self._flavour.name, version), check_onnx_file(onnx)
        wrong = [f"opset {found} is newer than {highest}, the highest it parses"] if found > highest else []
        with suppress(ImportError):
            from onnx import load

            from .trt_rules import problems

            wrong = wrong or problems(load(os.fspath(onnx), load_external_data=False), self._flavour.name, version)
        if wrong:
            raise BundleError(f"{onnx} is not for {self._title}: {wrong[0]}: export the bundle again")

    def parse(self, onnx: Path) -> Any:
        network = self._empty_network()
        parser = self.package.OnnxParser(network, self._logger)
        with utf8_path(onnx) as name:  # by path, so that external weights are found
            parsed = parser.parse_from_file(name)
        if not parsed:
            raise BundleError(f"{self._title} cannot parse {onnx} ({_parse_error(parser)}): export the bundle again")
        return network

    def update(self, latent_size: int) -> Any:
        """The network of ``update`` for latents of that size, see ``update_network``."""
        network = self._empty_network()
        define_update(self.package, network, update_component(latent_size))
        return network

    def _empty_network(self) -> Any:
        # On TensorRT 10 networks are weakly typed without it; from 11 on it has no effect.
        return self._builder.create_network(1 << int(self.package.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def facts(self, network: Any) -> dict[str, Any]:
        layers: Counter[str] = Counter()
        tensors: Counter[str] = Counter()
        dequantised: set[str] = set()  # tensors; layers come in an order in which each one's inputs are known
        quantised: list[str] = []
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            kind = _name(layer.type)
            layers[kind] += 1
            read = [t.name for t in map(layer.get_input, range(layer.num_inputs)) if t is not None]
            made = [t for t in map(layer.get_output, range(layer.num_outputs)) if t is not None]
            tensors.update(_name(t.dtype) for t in made)
            # Weights of a matrix product get a dimension or lose one on their way.
            if kind == "DEQUANTIZE" or (kind in ("SHUFFLE", "UNSQUEEZE") and read[0] in dequantised):
                dequantised.update(t.name for t in made)
            if kind in _PRODUCTS and len(read) > 1 and dequantised.issuperset(read[:2]):
                quantised.append(_onnx_node(layer))
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        return {
            "layers": dict(sorted(layers.items())),
            "tensors": dict(sorted(tensors.items())),
            "quantised": quantised,
            "inputs": {t.name: _name(t.dtype) for t in inputs},
            "outputs": {t.name: _name(t.dtype) for t in outputs},
        }

    def build(self, network: Any, request: dict[str, Any], tell: Tell) -> Any:
        """The plan, a buffer of TensorRT's own: a copy would need as much memory again."""
        trt, component = self.package, request["component"]
        config = self._builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        # On by default, it would round the inputs of float32 products to 10 bits; the file says float32.
        config.clear_flag(trt.BuilderFlag.TF32)
        if request["workspace_bytes"] is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
        if request["opt_level"] is not None:
            config.builder_optimization_level = request["opt_level"]
        if not self._flavour.needs_gpu:
            config.num_compute_capabilities = len(request["compute_capabilities"])
            for index, capability in enumerate(request["compute_capabilities"]):
                member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
                config.set_compute_capability(member, index)
        profile = self._builder.create_optimization_profile()
        for name, (least, best, most) in request["profile"].items():
            profile.set_shape(name, least, best, most)
        if config.add_optimization_profile(profile) < 0:
            raise self._problem(f"take the batch sizes of {component}", "")
        cache = self._load_timing_cache(config, request, tell)
        monitor = make_monitor(trt, Fraction(lambda fraction: tell("progress", fraction=fraction)))
        config.progress_monitor = monitor  # the variable keeps it alive; the binding does not
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise self._problem(f"build {component}", "")
        if cache is not None:
            blob = bytes(config.get_timing_cache().serialize())
            write_timing_cache(Path(request["timing_cache"]), trt.__version__, request["gpu"], blob)
        return plan

    def products_in_int8(self, plan: Any, products: list[str], tell: Tell) -> int | None:
        """How many of the quantised products the engine computes in INT8; None where that cannot be read."""
        if not self._flavour.needs_gpu:
            return None  # TensorRT for RTX chooses its kernels when the engine is loaded
        try:
            found = products_in_int8(engine_information(self.package, self._logger, plan), products)
        except Exception as error:  # the engine is built and good; that its layers cannot be listed takes nothing away
            tell("note", text=f"which products of the engine run in INT8 could not be read ({error})")
            return None
        if len(found) < len(products):
            first = next(name for name in products if name not in found)
            text = f"{self._title} computes {len(found)} of the {len(products)} quantised products in INT8, not {first}"
            tell("note", text=f"{text}: measure it beside FP16")
        return len(found)

    def _load_timing_cache(self, config: Any, request: dict[str, Any], tell: Tell) -> Any:
        if request["timing_cache"] is None or not self._flavour.needs_gpu:  # for RTX it has no effect
            return None
        version = self.package.__version__
        blob, note = read_timing_cache(Path(request["timing_cache"]), version, request["gpu"])
        if note:
            tell("note", text=note)
        cache = config.create_timing_cache(blob) or config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    def _log(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(message)

    def _problem(self, what: str, reason: str) -> MoebiusError:
        """Our error for one of TensorRT's: the first it logged, for the later ones follow from it."""
        everything = " ".join([*self._errors, reason])
        text = _tidy(self._errors[0]) if self._errors else reason or "it gives no reason"
        message = f"{self._title} cannot {what} ({text})"
        if _OUT_OF_MEMORY.search(everything):
            remedy = "close other programs, or pass a smaller --workspace or --max-batch"
            return MachineError(f"{message}: memory ran out: {remedy}")
        if what == "start" or _UNSUPPORTED_GPU.search(everything):
            return MachineError(f"{message}: this GPU or driver does not suit it: see its support matrix")
        return BundleError(f"{message}: try another version of it, or export the bundle again")


def _parse_error(parser: Any) -> str:
    if not parser.num_errors:
        return "it gives no reason"
    error = parser.get_error(0)
    node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
    return node + _tidy(error.desc())


def _tidy(message: str) -> str:
    """Without the place in TensorRT's sources and the number of the error, on one line."""
    text = re.sub(r"\[[\w./]+::[^\]]*\]\s*", "", " ".join(message.split()))
    return re.sub(r"^(IBuilder::\w+: )?Error Code \d+: ", "", text).strip()


def _onnx_node(layer: Any) -> str:
    """The ONNX node that a layer was parsed from; the layer's own name may have got a number."""
    noted = re.match(r"\[ONNX Layer: ([^\]|]+?)\s*[\]|]", layer.metadata or "")
    return str(noted[1] if noted else layer.name)


def _name(member: Any) -> str:
    return str(member).rpartition(".")[2]
