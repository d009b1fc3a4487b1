"""``LocalLambda`` as one kernel: its numbers in Triton's interpreter, the PTX, and the plug-in on stubs.

Nothing here runs on a GPU. What the stubs of TensorRT's bindings ask for is what 10.3, 10.13 and 11.4 ask for.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.cli import main
from moebius_edge.errors import UsageError
from moebius_edge.export.onnx_file import OPSET
from moebius_edge.export.operators import DOMAIN, interactive_function, local_function
from moebius_edge.model import lambdas
from moebius_edge.runtimes import lambda_plugin
from moebius_edge.runtimes.lambda_plugin import KERNEL, KERNELS_FILE, PLUGIN, find_kernel, plugin_model, uses_plugin
from moebius_edge.system.files import sha256_file

PUBLISHED = {"block_out_channels": [320, 640, 1280], "latent_size": 64, "num_heads": 8, "window": 15}
TARGETS = (80, 86, 87, 89, 90, 100, 110, 120)
SIZES = (64, 32, 16)


@pytest.fixture(scope="module")
def module() -> Any:
    pytest.importorskip("triton", reason="the kernel is compiled and interpreted on x86-64 Linux")
    from moebius_edge.export import lambda_kernel

    return lambda_kernel


# The numbers


def draw(n: int, size: int, heads: int, keys: int, window: int) -> dict[str, torch.Tensor]:
    """The operator's inputs, float64, q as (N, P, H, K)."""
    generator = torch.Generator().manual_seed(size + keys)
    positions = size * size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "q": normal(n, positions, heads, keys),
        "k": normal(n, keys, positions).softmax(-1),
        "v": normal(n, positions, keys),
        "weight": normal(keys, window * window) / window,
        "bias": normal(keys, 1),
    }


def check_kernel(module: Any, n: int, size: int, heads: int, keys: int, window: int, dtype: torch.dtype) -> None:
    """Against the plain form in float64, of the same rounded inputs."""
    from triton.runtime.interpreter import InterpretedFunction

    inputs = {name: tensor.to(dtype) for name, tensor in draw(n, size, heads, keys, window).items()}
    q, k, v, weight, bias = (tensor.double() for tensor in inputs.values())
    content = (k @ v + bias).to(dtype)
    found = module.fused_local_lambda(
        inputs["q"], content, inputs["v"], module.arrange_taps(inputs["weight"]), window,
        kernel=InterpretedFunction(module.local_window.fn),
    )  # fmt: skip
    maps, square = v.transpose(1, 2).reshape(n, keys, size, size), weight.reshape(keys, 1, window, window)
    expected = lambdas.local_lambda(q.permute(0, 2, 3, 1), k, maps, square, bias[:, 0]).permute(0, 3, 1, 2)
    worst = float((found.double() - expected).abs().max() / expected.abs().max())
    assert worst < (1e-6 if dtype == torch.float32 else 1e-3), worst


@pytest.mark.parametrize(
    ("keys", "dtype"), [(40, torch.float32), (40, torch.float16), (80, torch.float16), (160, torch.float16)]
)
def test_the_kernel_is_the_plain_operator_at_every_width(module: Any, keys: int, dtype: torch.dtype) -> None:
    check_kernel(module, 1, 16, 1, keys, 15, dtype)


def test_the_kernel_takes_rows_heads_and_tiles_apart(module: Any) -> None:
    check_kernel(module, 2, 16, 2, 24, 3, torch.float32)
    check_kernel(module, 1, 32, 1, 16, 3, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("level", SIZES)
def test_the_kernel_is_the_plain_operator_at_the_published_levels(module: Any, level: int) -> None:
    check_kernel(module, 1, level, 8, module.published_levels()[level], 15, torch.float16)


def test_what_the_kernel_is_not_made_for_is_refused(module: Any) -> None:
    for size, keys, heads, window in ((24, 40, 8, 15), (64, 8, 8, 15), (64, 40, 6, 15), (64, 40, 8, 17)):
        with pytest.raises(ValueError, match="no kernel"):
            module.constants(size, keys, heads, window)


# What is shipped


def kernels() -> dict[str, str]:
    with zipfile.ZipFile(KERNELS_FILE) as packed:
        return {name: packed.read(name).decode() for name in packed.namelist() if name.endswith(".ptx")}


def test_every_target_and_level_is_shipped() -> None:
    shipped = kernels()
    assert shipped.keys() == {f"sm_{target}-{size}.ptx" for target in TARGETS for size in SIZES}
    assert KERNELS_FILE.stat().st_size < 1_000_000
    for name, ptx in shipped.items():
        target = int(name[3:].split("-")[0])
        suffix = "a" if target >= 90 else ""
        assert re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1] == f"sm_{target}{suffix}"  # type: ignore[index]
        (entry,) = re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
        assert entry[0] == KERNEL and entry[1].count(".param") == 5, "q, content, v, taps, y and nothing of Triton's"
        version = float(re.search(r"^\.version (\S+)", ptx, re.MULTILINE)[1])  # type: ignore[index]
        assert version <= (8.5 if target <= 90 else 9.0), "JetPack 6 reads 8.5, JetPack 7 reads 9.0"
        kernel = find_kernel((target // 10, target % 10), int(name[:-4].split("-")[1]))
        assert kernel.ptx.decode() == ptx and kernel.shared <= 48 * 1024
        assert f".reqntid {kernel.threads}" in ptx


def test_the_shipped_kernels_were_compiled_from_this_source(module: Any) -> None:
    remedy = "run `python -m moebius_edge.export.lambda_kernel`"
    assert lambda_plugin._listed()["source_sha256"] == module.source_hash(), remedy
    assert lambda_plugin._member("function.bin") == module.plugin_function().SerializeToString(deterministic=True)


@pytest.mark.slow
def test_one_target_compiled_again_is_what_is_shipped(module: Any) -> None:
    import triton

    if triton.__version__ != lambda_plugin._listed()["triton"]:
        pytest.skip("another version of Triton writes other PTX")
    ptx, launch = module.compile_kernel(87, 16, 160, 8, 15)
    kernel = find_kernel((8, 7), 16)
    assert ptx.encode() == kernel.ptx
    assert launch == {"grid": kernel.blocks, "threads": kernel.threads, "shared": kernel.shared}


def test_a_gpu_gets_its_own_kernel_or_one_that_runs_everywhere() -> None:
    chosen = {(8, 0): 80, (8, 7): 87, (8, 8): 87, (8, 9): 89, (9, 0): 90, (10, 3): 89, (11, 0): 110, (12, 1): 89}
    assert {capability: find_kernel(capability, 64).target for capability in chosen} == chosen
    for capability, size in (((7, 5), 64), ((8, 7), 24)):
        with pytest.raises(LookupError, match="no kernel for compute capability"):
            find_kernel(capability, size)


# The file that the parser is given


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """One node ``LocalLambda`` and its body among other functions and weights."""
    names = ["q", "k", "v", "weight", "bias", "layout"]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, None) for n in names[:-1]]
    values.append(helper.make_tensor_value_info("layout", TensorProto.INT64, None))
    node = helper.make_node("LocalLambda", names, ["y"], domain=DOMAIN, heads=8, tile=8)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    weights = [helper.make_tensor("unused", TensorProto.FLOAT, [300], np.arange(300, dtype=np.float32))]
    graph = helper.make_graph([node], "one node", values, [output], weights)
    functions = [local_function(OPSET, 15, 8, 8), interactive_function(OPSET, 10)]
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    path = tmp_path / "one.onnx"
    onnx.save(helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=9), path)
    return path


def test_only_the_body_of_the_function_changes(onnx_file: Path) -> None:
    before, after = onnx.load(onnx_file), onnx.load_from_string(plugin_model(onnx_file) or b"")
    old, new = (next(f for f in m.functions if f.name == "LocalLambda") for m in (before, after))
    assert list(old.input) == list(new.input) and list(old.output) == list(new.output)
    (node,) = (n for n in new.node if n.domain == DOMAIN)
    assert node.op_type == PLUGIN and helper.get_node_attr_value(node, "plugin_namespace") == b"moebius"
    before.functions.remove(old)
    after.functions.remove(new)
    assert before == after
    del before.functions[:]
    onnx.save(before, onnx_file)
    assert plugin_model(onnx_file) is None


def test_the_body_gives_the_kernel_what_it_takes(module: Any, onnx_file: Path) -> None:
    """Content and taps as the body makes them, and with them the plain operator's numbers."""
    from triton.runtime.interpreter import InterpretedFunction

    size, heads, keys = 16, 2, 16
    drawn = draw(1, size, heads, keys, 15)
    body = module.plugin_function()
    (plug,) = (node for node in body.node if node.domain == DOMAIN)
    body.node.remove(plug)
    del body.output[:]
    body.output.extend(plug.input[1::2])
    del body.attribute[:]
    feeds = {name: tensor.float().numpy() for name, tensor in zip(body.input, drawn.values(), strict=False)}
    content, taps = ReferenceEvaluator(body).run(None, {**feeds, "ll_layout": np.zeros(1, np.int64)}, attributes={})
    content, taps = (torch.from_numpy(np.ascontiguousarray(array)) for array in (content, taps))
    found = module.fused_local_lambda(
        drawn["q"].float(), content, drawn["v"].float(), taps, 15,
        kernel=InterpretedFunction(module.local_window.fn),
    )  # fmt: skip
    q, k, v, weight, bias = drawn.values()
    maps, square = v.transpose(1, 2).reshape(1, keys, size, size), weight.reshape(keys, 1, 15, 15)
    expected = lambdas.local_lambda(q.permute(0, 2, 3, 1), k, maps, square, bias[:, 0]).permute(0, 3, 1, 2)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


# The plug-in


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, namespace] = creator
        return True


def stub(version: str) -> tuple[types.ModuleType, Registry]:
    """The part of TensorRT's bindings that the plug-in in Python touches."""
    package, registry = types.ModuleType(f"stub_{version.replace('.', '_')}"), Registry()
    package.__version__ = version  # type: ignore[attr-defined]
    for name in ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime", "IPluginCreatorV3One"):
        setattr(package, name, type(name, (), {}))
    package.get_plugin_registry = lambda: registry  # type: ignore[attr-defined]
    package.PluginFieldCollection = list  # type: ignore[attr-defined]
    package.DimsExprs = list  # type: ignore[attr-defined]
    package.TensorFormat = SimpleNamespace(LINEAR="linear", CHW32="chw32")  # type: ignore[attr-defined]
    package.DataType = SimpleNamespace(HALF="half", FLOAT="float")  # type: ignore[attr-defined]
    return package, registry


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lambda_plugin, "_registered", set())
    yield


class Driver:
    """Stands for ``Cuda``: what is loaded and launched."""

    loaded: list[bytes]
    launched: list[tuple[Any, ...]]

    def __init__(self) -> None:
        type(self).loaded, type(self).launched = [], []

    def load_kernel(self, ptx: bytes, name: str) -> int:
        self.loaded.append(ptx)
        return 1000 + len(self.loaded)

    def launch_kernel(self, *arguments: Any) -> None:
        self.launched.append(arguments)


def tensor(*dims: int, format: str = "linear", type: str = "half") -> SimpleNamespace:
    """A description, in both forms: its own one and that of a shape that may vary."""
    return SimpleNamespace(dims=dims, format=format, type=type, desc=SimpleNamespace(format=format, type=type))


def test_before_10_10_the_plug_in_launches_the_kernel_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_plugin, "Cuda", Driver)
    package, registry = stub("10.3.0")
    for _ in range(2):
        lambda_plugin.register_plugin(package, "8.7")
    ((key, creator),) = registry.creators.items()
    assert key == (PLUGIN, "moebius") and creator.plugin_version == "1"
    plugin = creator.create_plugin("a name", [], "build").attach_to_context(None)
    assert plugin.get_capability_interface(None) is plugin and plugin.num_outputs == 1
    assert plugin.get_output_data_types(["half"] * 4) == ["half"]
    inputs = [tensor(2, 512, 64, 40), tensor(2, 40, 40), tensor(2, 4096, 40), tensor(15, 16, 40)]
    assert plugin.get_output_shapes([t.dims for t in inputs], [], None) == [[2, 512, 64, 40]]
    assert plugin.supports_format_combination(0, inputs, 4)
    for other in (tensor(1, format="chw32"), tensor(1, type="float")):
        assert not plugin.supports_format_combination(0, [other], 4)
    outputs = [tensor(2, 512, 64, 40)]
    plugin.on_shape_change(inputs, outputs)
    own = find_kernel((8, 7), 64)
    assert Driver.loaded == [own.ptx], "not while a step is recorded"
    assert plugin.enqueue(inputs, outputs, [1, 2, 3, 4], [5], 0, 77) == 0
    assert plugin.clone().enqueue(inputs, outputs, [1, 2, 3, 4], [6], 0, 77) == 0
    assert Driver.loaded == [own.ptx]
    grid = (own.blocks, 2)
    assert Driver.launched == [(1001, grid, own.threads, own.shared, [1, 2, 3, 4, y], 77) for y in (5, 6)]


class Dimension:
    def __init__(self, value: int | None) -> None:
        self._value = value

    def constant_value(self) -> int:
        assert self._value is not None, "the number of rows is free"
        return self._value


class TensorDesc:
    def __init__(self, *sizes: int | None) -> None:
        self.shape_expr = [Dimension(size) for size in sizes]

    def like(self) -> TensorDesc:
        return TensorDesc(*(d._value for d in self.shape_expr))


@pytest.mark.parametrize("version", ["10.10.0", "10.13.3", "11.4.0"])
def test_from_10_10_the_engine_gets_the_kernel(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, registry = stub(version)
    functions: dict[str, Callable[..., Any]] = {}

    def decorator(kind: str) -> Callable[[str], Callable[..., Any]]:
        def named(name: str) -> Callable[..., Any]:
            assert name == f"moebius::{PLUGIN}"
            return lambda function: functions.setdefault(kind, function)

        return named

    qdp: Any = types.ModuleType(f"{package.__name__}.plugin")
    qdp.TensorDesc, qdp.KernelLaunchParams, qdp.SymIntExprs = TensorDesc, SimpleNamespace, list
    qdp.AutoTuneCombination = lambda types, formats: (types, formats)
    qdp.register, qdp.autotune, qdp.aot_impl = map(decorator, ("register", "autotune", "aot_impl"))
    qdp.SymIntExprs = type("SymIntExprs", (list,), {"__init__": lambda self, length: None})
    monkeypatch.setitem(sys.modules, qdp.__name__, qdp)
    lambda_plugin.register_plugin(package, "9.0")
    assert not registry.creators

    described = inspect.signature(functions["register"])
    assert list(described.parameters) == ["q", "content", "v", "taps"]
    assert {p.annotation for p in described.parameters.values()} == {TensorDesc}, "types, not texts: they are looked at"
    assert described.return_annotation is TensorDesc
    implemented = inspect.signature(functions["aot_impl"])
    assert list(implemented.parameters) == ["q", "content", "v", "taps", "outputs", "tactic"]
    assert implemented.return_annotation.__args__ == (str, bytes, qdp.KernelLaunchParams, qdp.SymIntExprs)

    shapes = ((None, 512, 64, 40), (None, 40, 40), (None, 4096, 40), (15, 16, 40))
    inputs = [TensorDesc(*shape) for shape in shapes]
    y = functions["register"](*inputs)
    assert [d._value for d in y.shape_expr] == [None, 512, 64, 40]
    assert functions["autotune"](*inputs, [y]) == [("FP16, FP16, FP16, FP16, FP16", "LINEAR")]
    name, ptx, launch, extra = functions["aot_impl"](*inputs, [y], 0)
    own = find_kernel((9, 0), 64)
    assert (name, ptx, extra) == (KERNEL, own.ptx, [])
    assert (launch.grid_x, launch.block_x, launch.shared_mem) == (own.blocks, own.threads, own.shared)
    assert launch.grid_y is inputs[2].shape_expr[0]


def test_an_engine_with_the_plug_in_needs_it_only_before_10_10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_plugin, "Cuda", Driver)
    for settings, version, known in (({}, "10.3.0", 0), ({"lambda_plugin": True}, "10.13.3", 0),
                                     ({"lambda_plugin": True}, "10.3.0", 1)):  # fmt: skip
        package, registry = stub(version)
        engine: Any = SimpleNamespace(settings=settings, key=SimpleNamespace(compute_capabilities=("8.7",)))
        lambda_plugin.load_plugin(package, engine)
        assert len(registry.creators) == known


def test_the_plug_in_is_off_unless_asked_for_and_refused_where_there_is_none() -> None:
    tiny = Bundle.load("tiny", verify=False)
    published = replace(tiny, precision="float16", model={**tiny.model, **PUBLISHED})
    for chosen in ("auto", "off"):
        assert not uses_plugin(chosen, published, "tensorrt", ("8.7",))
    assert uses_plugin("on", published, "tensorrt", ("8.7",))
    refused = (
        (published, "tensorrt-rtx", "8.9", "no plug-ins"),
        (replace(published, precision="float32"), "tensorrt", "8.7", "is for FP16"),
        (replace(tiny, precision="float16"), "tensorrt", "8.7", "published shape"),
        (published, "tensorrt", "7.5", "compute capability 7.5"),
    )
    for bundle, variant, capability, reason in refused:
        with pytest.raises(UsageError, match=reason):
            uses_plugin("on", bundle, variant, (capability,))


def test_the_command_says_where_there_is_no_plug_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    output = tmp_path / "out"
    command = ["export", "tiny", "-o", str(output), "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]
    assert main([*command, "--lambda-plugin", "on"]) == 2
    assert "TensorRT for RTX has no plug-ins" in capsys.readouterr().err
    assert sha256_file(output / "bundle.json") == sha256_file(Bundle.load("tiny", verify=False).path / "bundle.json")
    assert main(["export", "tiny", "-o", str(output), "--lambda-plugin", "on"]) == 2
    assert "--lambda-plugin: options of engines" in capsys.readouterr().err
