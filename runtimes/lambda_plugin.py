"""``LocalLambda`` in TensorRT as one kernel: the plug-in, for those versions that can have it.

The kernel is PTX that was compiled beforehand (``export/lambda_kernel.py``), so a device needs neither Triton nor
PyTorch. From 10.10 on TensorRT puts the PTX itself into the engine (an ahead-of-time plug-in of ``tensorrt.plugin``),
and nothing of ours runs with it; before, a plug-in in Python (``IPluginV3``) launches it. TensorRT for RTX has no
plug-ins.

The ONNX file stays as it is. What the parser is given has another body for the function ``LocalLambda``, which leaves
the window to a node of the plug-in's name; the parsers of all versions look for a plug-in where a node names one.
"""

from __future__ import annotations

import importlib
import json
import math
import mmap
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..bundle.bundle import ASSETS
from ..errors import UsageError
from .cuda import Cuda
from .engine_files import Engine, version_of
from .protobuf import read_contents, read_fields, write_field

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

DOMAIN: Final = "moebius"  # of the node, and the plug-in's namespace
FUNCTION: Final = "LocalLambda"
PLUGIN: Final = "LocalWindow"
KERNEL: Final = "local_window"  # in the PTX
KERNELS_FILE = ASSETS / "kernels" / "local_lambda.zip"
AHEAD_OF_TIME = (10, 10)  # TensorRT's first version whose ahead-of-time plug-ins are found from an ONNX file
_PORTABLE_BELOW = 90  # PTX for older targets runs on all newer GPUs; that from 9.0 on is for its own target alone
_FUNCTION_FIELD, _NAME_FIELD = 25, 1  # of ModelProto and of FunctionProto, in onnx.proto


@dataclass(frozen=True)
class Kernel:
    """PTX for one target and one grid. ``blocks`` are for one row of the batch, ``shared`` is bytes a block."""

    target: int  # such as 87
    ptx: bytes
    blocks: int
    threads: int
    shared: int


def find_kernel(capability: tuple[int, int], size: int) -> Kernel:
    """The kernel for a GPU and a grid of ``size`` x ``size``. Raises ``LookupError`` where there is none."""
    own = 10 * capability[0] + capability[1]
    fitting = [
        (kernel["capability"], name)
        for name, kernel in _listed()["kernels"].items()
        if kernel["size"] == size
        and (kernel["capability"] == own or kernel["capability"] <= min(own, _PORTABLE_BELOW - 1))
    ]
    if not fitting:
        raise LookupError(f"no kernel for compute capability {capability[0]}.{capability[1]} and a grid of {size}")
    target, name = max(fitting)
    listed = _listed()["kernels"][name]
    return Kernel(target, _member(name), listed["grid"], listed["threads"], listed["shared"])


def uses_plugin(chosen: str, bundle: Bundle, variant: str, capabilities: tuple[str, ...]) -> bool:
    """Whether an engine gets the plug-in, with ``chosen`` as on the command line: auto, on or off.

    auto means off, until a measurement on a GPU says that the plug-in pays.

    Raises:
        UsageError: it was asked for, and there is none for this bundle, GPU or variant of TensorRT.
    """
    if chosen != "on":
        return False
    problem = _why_not(bundle, variant, capabilities)
    if problem:
        raise UsageError(f"--lambda-plugin on: {problem}", "leave it out")
    return True


def _why_not(bundle: Bundle, variant: str, capabilities: tuple[str, ...]) -> str:
    if variant != "tensorrt":
        return "TensorRT for RTX has no plug-ins"
    if bundle.precision != "float16":
        return f"the plug-in is for FP16, and bundle {bundle.path} is {bundle.precision}"
    network = _listed()["network"]
    if network != {name: bundle.model.get(name) for name in network}:
        return f"the plug-in is for networks of the published shape, and bundle {bundle.path} has another"
    try:
        for capability in capabilities:
            find_kernel(_parsed(capability), network["latent_size"])
    except LookupError as error:
        return str(error)
    return ""


def plugin_model(path: Path) -> bytes | None:
    """The ONNX file with the plug-in's body for ``LocalLambda``; None if the file has no such function.

    The file is one that ``check_onnx_file`` has passed.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        functions = [f for f in read_fields(data, 0, len(data)) if f.number == _FUNCTION_FIELD]
        name = FUNCTION.encode()
        ours = [f for f in functions if read_contents(data, f.content, f.end).get(_NAME_FIELD, [b""])[0] == name]
        if not ours:
            return None
        (place,) = ours
        body = write_field(_FUNCTION_FIELD, _member("function.bin"))
        return b"".join((memoryview(data)[: place.start], body, memoryview(data)[place.end :]))


_registered: set[str] = set()  # the packages that know the plug-in: they keep it as long as the process lives
_capability: tuple[int, int] = (0, 0)  # of the GPU
_functions: dict[tuple[int, int], int] = {}  # capability and side of the grid -> what the driver loaded


def register_plugin(package: Any, capability: str) -> None:
    """Make the plug-in known to TensorRT's ``package``, for a GPU such as 8.7; needed to build, in either form."""
    global _capability
    _capability = _parsed(capability)
    _functions.clear()
    if package.__name__ in _registered:
        return
    _registered.add(package.__name__)
    if runs_ahead_of_time(package):
        _register_ahead_of_time(package)
    else:
        creator = _make_creator(package, Cuda())
        package.get_plugin_registry().register_creator(creator, DOMAIN)
        _creators.append(creator)


_creators: list[Any] = []  # TensorRT keeps no reference


def load_plugin(package: Any, engine: Engine) -> None:
    """Before an engine is loaded: its plug-in, if it has one that is not in the engine itself."""
    if engine.settings.get("lambda_plugin") and not runs_ahead_of_time(package):
        register_plugin(package, engine.key.compute_capabilities[0])


def runs_ahead_of_time(package: Any) -> bool:
    """Whether engines of this TensorRT hold the kernel themselves; those of others need the plug-in to be loaded."""
    return version_of(package) >= AHEAD_OF_TIME


def _register_ahead_of_time(package: Any) -> None:
    trtp: Any = importlib.import_module(f"{package.__name__}.plugin")
    name = f"{DOMAIN}::{PLUGIN}"

    def describe(q, content, v, taps):  # type: ignore[no-untyped-def]
        return q.like()

    def tune(q, content, v, taps, outputs):  # type: ignore[no-untyped-def]
        return [trtp.AutoTuneCombination(", ".join(5 * ["FP16"]), "LINEAR")]

    def implement(q, content, v, taps, outputs, tactic):  # type: ignore[no-untyped-def]
        kernel = find_kernel(_capability, math.isqrt(v.shape_expr[1].constant_value()))
        launch = trtp.KernelLaunchParams(
            grid_x=kernel.blocks, grid_y=v.shape_expr[0], block_x=kernel.threads, shared_mem=kernel.shared
        )
        return KERNEL, kernel.ptx, launch, trtp.SymIntExprs(0)

    # As types and not as texts, which is what an annotation in this file would be: tensorrt.plugin looks at them.
    tensors = dict.fromkeys(("q", "content", "v", "taps"), trtp.TensorDesc)
    describe.__annotations__ = {**tensors, "return": trtp.TensorDesc}
    result = tuple.__class_getitem__((str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))
    implement.__annotations__ = {"return": result}
    # There is no other implementation, so that no flag of the network has to prefer this one.
    trtp.register(name)(describe)
    trtp.autotune(name)(tune)
    trtp.aot_impl(name)(implement)


def _make_creator(trt: Any, cuda: Cuda) -> Any:
    """The plug-in in Python, for TensorRT before ``AHEAD_OF_TIME``; ``cuda`` launches in TensorRT's own context."""

    class LocalWindow(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self) -> None:
            for base in LocalWindow.__bases__:
                base.__init__(self)
            self.num_outputs = 1
            self.plugin_name, self.plugin_namespace, self.plugin_version = PLUGIN, DOMAIN, "1"

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def get_output_data_types(self, input_types: Any) -> Any:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, exprBuilder: Any) -> Any:  # noqa: N803
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            desc = in_out[pos].desc
            return bool(desc.format == trt.TensorFormat.LINEAR and desc.type == trt.DataType.HALF)

        def configure_plugin(self, inp: Any, out: Any) -> None:
            pass

        def on_shape_change(self, inp: Any, out: Any) -> None:
            load(inp[2].dims[1])  # before a step is recorded, for nothing is loaded while one is

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: Any, stream: int
        ) -> int:
            rows, positions = input_desc[2].dims[:2]
            kernel, function = load(positions)
            addresses = [*inputs, *outputs]
            cuda.launch_kernel(function, (kernel.blocks, rows), kernel.threads, kernel.shared, addresses, stream)
            return 0

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

        def set_tactic(self, tactic: int) -> None:
            pass

        def clone(self) -> Any:
            cloned = LocalWindow()
            cloned.__dict__.update(self.__dict__)
            return cloned

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = PLUGIN, DOMAIN, "1"
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, fc: Any, phase: Any) -> Any:
            return LocalWindow()

    def load(positions: int) -> tuple[Kernel, int]:
        size = math.isqrt(positions)
        kernel = find_kernel(_capability, size)
        key = (kernel.target, size)
        if key not in _functions:
            _functions[key] = cuda.load_kernel(kernel.ptx, KERNEL)
        return kernel, _functions[key]

    return Creator()


def _parsed(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)


@cache
def _listed() -> dict[str, Any]:
    listed: dict[str, Any] = json.loads(_member("kernels.json"))
    return listed


def _member(name: str) -> bytes:
    with zipfile.ZipFile(KERNELS_FILE) as packed:
        return packed.read(name)
