"""Engines: a bundle's ONNX files through TensorRT for RTX, which builds without a GPU.

The bundled model is built once, in a fresh interpreter that has neither PyTorch nor onnx, as a Jetson has neither; all
else is built from toys. No engine is executed here: that takes a GPU, see ``test_trt``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto
from onnx.inliner import inline_local_functions
from toy import flip_byte, make_toy_bundle
from trt_network import describe_network, network_facts

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, MachineError, OutOfMemory, UsageError
from moebius_edge.export import EngineOptions, build_engines, engines, trt_builder
from moebius_edge.export.engines import copy_bundle_for_engines, find_engine_key
from moebius_edge.export.precision import read_model
from moebius_edge.export.trt_builder import TrtBuilder, build, import_polygraphy, make_monitor
from moebius_edge.progress import no_progress
from moebius_edge.runtimes.cuda import Gpu
from moebius_edge.runtimes.engine_files import read_engine
from moebius_edge.runtimes.latent_loop import update_component
from moebius_edge.system import subprocess_job
from moebius_edge.system.files import sha256_file

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")

Captured = pytest.CaptureFixture[str]
OPTIONS = EngineOptions("tensorrt-rtx", compute_capabilities=("8.6",))
COMMAND = ("--engine", "tensorrt-rtx", "--compute-capability", "8.6")
ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24_000_000_000, False, "13.0")
ORIN = Gpu("Orin", (8, 7), 8_000_000_000, True, "12.6", 8)


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def engines_of(bundle: Bundle) -> list[str]:
    folder = bundle.path / "engines"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


# The bundled model, whole


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Bundle]:
    """The command as a Jetson would run it: nothing but numpy, OpenCV, Pillow, Polygraphy and TensorRT is there."""
    folder = tmp_path_factory.mktemp("tiny")
    absent = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "safetensors")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    output = folder / "engines of tiny"
    done = subprocess.run(
        [sys.executable, "-m", "moebius_edge", "export", "tiny", "-o", str(output), *COMMAND],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done, Bundle.load(output)


def test_a_bundle_becomes_engines_without_pytorch(tiny: tuple[Any, Bundle]) -> None:
    done, bundle = tiny
    (folder,) = (bundle.path / "engines").iterdir()
    assert folder.name == f"float32-tensorrt-rtx-{tensorrt_rtx.__version__}-any-sm86"
    assert str(folder) in done.stdout and "build denoiser_shallow (3 of 5)" in done.stderr
    engine = read_engine(folder)
    engine.verify("")
    for component, plan in engine.plans.items():  # what TensorRT logged; update has indices for weights
        assert 0 < plan["weights_bytes"] < plan["bytes"], component
        assert plan["persistent_bytes"] is not None, component
        assert (plan["activation_bytes"] > 1_000_000) == (component != "update"), component
    names = [*bundle.components, "update"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(["engine.json", *(f"{name}.plan" for name in names)])
    assert engine.onnx == {n: bundle.files[f"{n}.onnx"]["sha256"] for n in bundle.components}
    autoencoder = ("vae_encoder", "vae_decoder")
    assert engine.profiles == {name: [1, 1, 1] if name in autoencoder else [1, 2, 2] for name in names}
    for name in bundle.components:
        weights = onnx.load(bundle.component_path(name)).graph.initializer
        assert engine.plans[name]["bytes"] > 0.9 * sum(len(w.raw_data) for w in weights), "the weights are in the plan"


def test_nothing_changed_is_a_no_op_that_says_so(tiny: tuple[Any, Bundle], capsys: Captured) -> None:
    _, bundle = tiny
    (folder,) = (bundle.path / "engines").iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    for source in ([str(bundle.path)], ["tiny", "-o", str(bundle.path)]):
        assert main(["export", *COMMAND, *source]) == 0
        assert f"{folder} is there" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


# Layers that an ONNX operator becomes, always, one for one.
ONE_FOR_ONE = {
    "CONVOLUTION": {"Conv"},
    "NORMALIZATION": {"InstanceNormalization", "LayerNormalization"},
    "SOFTMAX": {"Softmax"},
    "RESIZE": {"Resize"},
    "ACTIVATION": {"Sigmoid", "Relu"},
}


def test_the_network_is_what_the_file_asked_for(tiny: tuple[Any, Bundle]) -> None:
    """Layer by layer, and in the precision of the bundle: nothing was lowered, nothing was left out."""
    _, bundle = tiny
    for name, component in bundle.components.items():
        facts = network_facts(bundle.component_path(name))
        whole = inline_local_functions(read_model(bundle.component_path(name)))  # as the parser does
        nodes = Counter(node.op_type for node in whole.graph.node)
        for layer, operators in ONE_FOR_ONE.items():
            assert facts["layers"].get(layer, 0) == sum(nodes[o] for o in operators), (name, layer)
        assert set(facts["tensors"]) <= {"FLOAT", "HALF", "INT32", "INT64", "BOOL"}, "shapes are whole numbers"
        stored = {
            t.name
            for t in onnx.load(bundle.component_path(name)).graph.initializer
            if t.data_type == TensorProto.FLOAT16
        }
        assert facts["tensors"].get("HALF", 0) == len(stored), "weights, which are cast, and nothing else"
        kinds = {"float32": "FLOAT", "int64": "INT64"}
        assert facts["inputs"] == {t.name: kinds[t.dtype] for t in component.inputs}
        assert facts["outputs"] == {t.name: kinds[t.dtype] for t in component.outputs}


@pytest.mark.parametrize("channels", [4, 16])
def test_the_update_is_defined_in_float32_with_the_tensors_that_the_runtime_binds(channels: int) -> None:
    network = TrtBuilder("tensorrt-rtx").create_update(32, channels)[1]
    facts, component = describe_network(network), update_component(32, channels)
    assert set(facts["tensors"]) == {"FLOAT", "INT32"} and facts["layers"]["REDUCE"] == 1
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    assert {t.name: tuple(t.shape) for t in outputs} == {t.name: (-1, *t.shape[1:]) for t in component.outputs}
    kinds = {"float32": "FLOAT", "int32": "INT32"}
    assert facts["inputs"] == {t.name: kinds[t.dtype] for t in component.inputs}
    assert set(facts["outputs"].values()) == {"FLOAT"}


# One plan


def request(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    plan = str(folder / f"{name}.plan")
    options = {"variant": "tensorrt-rtx", "compute_capabilities": ["8.6"], "timing_cache": None}
    request = {"stage": "build it", "component": name, "plan": plan, "workspace_bytes": None, "opt_level": None}
    return request | options | changes


def test_the_update_builds_for_many_rows_and_another_size(tmp_path: Path) -> None:
    profile = engines.profile(update_component(64, 4), engines.rows("update", 8))
    assert profile["coefficients"] == [[n, 6, 1, 1] for n in (1, 2, 16)]
    record = build(request(tmp_path, "update", onnx=None, profile=profile), no_progress, print)
    assert record["bytes"] == (tmp_path / "update.plan").stat().st_size > 1000


def test_options_reach_the_builder(toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, builder = [], tensorrt_rtx.Builder
    real = builder.create_builder_config
    monkeypatch.setattr(builder, "create_builder_config", lambda own: configs.append(real(own)) or configs[-1])
    profile = engines.profile(toy.components["vae_decoder"], [1, 1, 3])
    changes = {"workspace_bytes": 300_000_000, "opt_level": 2, "compute_capabilities": ["8.6", "12.0"]}
    asked = request(tmp_path, "vae_decoder", onnx=toy.component_path("vae_decoder"), profile=profile, **changes)
    steps: list[tuple[str, int, int]] = []
    record = build(asked, lambda *step: steps.append(step), print)
    (config,) = configs
    assert config.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE) == 300_000_000
    assert config.builder_optimization_level == 2
    assert config.profiling_verbosity == tensorrt_rtx.ProfilingVerbosity.DETAILED
    assert not config.get_flag(tensorrt_rtx.BuilderFlag.TF32), "float32 means float32"
    assert config.num_compute_capabilities == 2 and config.num_optimization_profiles == 1
    assert record["sha256"] == sha256_file(tmp_path / "vae_decoder.plan")
    percents = [done for _, done, _ in steps]
    assert percents == sorted(percents) and len(percents) > 3 and percents[0] > 0 and percents[-1] <= 100
    assert {(what, total) for what, _, total in steps} == {("build it", 100)}


def test_progress_is_one_number_that_never_goes_back() -> None:
    seen: list[int] = []
    monitor = make_monitor(tensorrt_rtx, seen.append)
    monitor.phase_start("whole", None, 2)
    monitor.phase_start("part", "whole", 4)
    for step in range(4):
        assert monitor.step_complete("part", step)
    monitor.phase_finish("part")
    monitor.step_complete("whole", 0)
    monitor.phase_start("part", "whole", 1)  # the name again
    monitor.step_complete("unheard of", 3)
    monitor.step_complete("part", 0)
    monitor.step_complete("whole", 1)
    assert seen == [12, 25, 37, 50, 100]


def test_a_timing_cache_is_for_tensorrt_and_named_after_the_gpu(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for Polygraphy's loaders: TensorRT itself needs a GPU."""
    given: dict[str, Any] = {}
    builder: Any = object.__new__(TrtBuilder)
    builder.variant, builder.title, builder.package = engines.VARIANTS["tensorrt"], "TensorRT 10.3", tensorrt_rtx
    builder.polygraphy = types.SimpleNamespace(
        Profile=dict,
        CreateConfig=lambda **options: given.update(options),
        PostprocessConfig=lambda config, change: config,
        EngineBytesFromNetwork=lambda network, **options: given.update(options) or (lambda: b"plan"),
    )
    assert builder.build((), request(tmp_path, "x", profile={}, timing_cache="a.cache"), print) == b"plan"
    assert given["load_timing_cache"] == given["save_timing_cache"] == "a.cache"
    key = replace(find_engine_key(OPTIONS, "float32"), version="10.3.0", gpu="Orin (nvgpu)")
    default = engines._timing_cache(toy, EngineOptions("tensorrt"), key)
    assert default == str(toy.path / "engines" / "timing-10.3.0-Orin-nvgpu-.cache")
    assert engines._timing_cache(toy, OPTIONS, key) is None, "its own are no-ops"
    with pytest.raises(UsageError, match="TensorRT for RTX keeps no timing cache: leave --timing-cache out"):
        build_engines(toy, replace(OPTIONS, timing_cache=tmp_path / "x"))


def test_typed_fp16_stays_fp16(tmp_path: Path) -> None:
    """The cast, the weight and the product are in the inner type, and no more."""
    counts = []
    for inner, number in (("float16", TensorProto.FLOAT16), ("float", TensorProto.FLOAT)):
        model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 20]>
            g (float[N, 4] x) => (float[N, 1] y) <{inner}[4, 1] w = {{1, 1, 1, 1}}>
            {{ a = Cast <to = {number}>(x) b = MatMul(a, w) y = Cast <to = 1>(b) }}""")
        onnx.save(model, tmp_path / "m.onnx")
        counts.append(network_facts(tmp_path / "m.onnx")["tensors"].get("HALF", 0))
    assert counts == [3, 0]


@pytest.mark.parametrize(
    ("opset", "operator", "message"),
    [
        (99, "Add", r"denoiser\.onnx is not for TensorRT for RTX .*opset 99 is newer than 23"),
        (20, "Strange", r"cannot parse .*denoiser\.onnx \(node 'the_node' \(Strange\): creator && \"Plugin not found"),
    ],
)
def test_what_tensorrt_does_not_take_is_named(toy: Bundle, opset: int, operator: str, message: str) -> None:
    file = toy.component_path("denoiser")
    model = onnx.load(file)
    model.opset_import[0].version = opset
    node = next(n for n in model.graph.node if n.output[0] == "fill")
    node.name, node.op_type = "the_node", operator
    onnx.save(model, file)
    with pytest.raises(BundleError, match=message) as caught:
        TrtBuilder("tensorrt-rtx").parse(file)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_tensorrt_refuses_while_it_builds(tiny: tuple[Any, Bundle], tmp_path: Path) -> None:
    """Turing: known to the enumeration, but without float32 products."""
    bundle = copy_bundle_for_engines(str(tiny[1].path), tmp_path / "turing")
    with pytest.raises(MachineError, match="cannot build denoiser .*Turing.*this GPU or driver does not suit it"):
        build_engines(bundle, replace(OPTIONS, compute_capabilities=("7.5",)))
    assert engines_of(bundle) == []


@pytest.mark.parametrize(
    ("logged", "kind", "message"),
    [
        ("[a.cpp::f::9] Error Code 1: Cuda Runtime (out of memory)", OutOfMemory, r"x \(Cuda .* memory ran out: close"),
        ("IBuilder::build: Error Code 2: odd", BundleError, r"cannot build x \(odd\): try another version"),
        (None, BundleError, r"cannot build x \(Invalid Engine\): try another"),
    ],
)
def test_the_first_error_that_tensorrt_logs_is_the_cause(logged: str | None, kind: Any, message: str) -> None:
    builder = TrtBuilder("tensorrt-rtx")
    from polygraphy.logger import G_LOGGER

    def load() -> None:
        for text in [] if logged is None else [logged, "another follows from it"]:
            G_LOGGER.error(text)
        G_LOGGER.critical("Invalid Engine")

    with pytest.raises(kind, match=message):
        builder._call("build x", load)


def test_the_sizes_that_a_build_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT 10.3 and as TensorRT for RTX 1.7 write them; a plan for two GPU generations has two of each."""
    texts = ["[I] Total Weights Memory: 16066278400", "Total Activation Memory: 5 bytes", "Total Activation Memory: 29"]
    records = [logging.makeLogRecord({"msg": text}) for text in texts]
    monkeypatch.setattr(trt_builder, "_LOG", types.SimpleNamespace(buffer=records))
    sizes = [trt_builder.logged_bytes(what) for what in ("Weights", "Activation", "Device Persistent")]
    assert sizes == [16_066_278_400, 29, None]


# When engines are built again


@pytest.mark.slow
def test_verbose_shows_what_tensorrt_logs_while_it_builds(toy: Bundle) -> None:
    command = [sys.executable, "-m", "moebius_edge", "export", str(toy.path), *COMMAND, "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("Total Weights Memory: ") == 4


def test_what_changed_is_built_again_and_said(toy: Bundle) -> None:
    first = build_engines(toy, OPTIONS)
    assert first.fresh and not first.notes and not build_engines(toy, OPTIONS).fresh
    wider = replace(OPTIONS, max_batch=2)
    second = build_engines(toy, wider)
    assert second.fresh and second.notes[0].endswith("is built again: settings.max_batch is 1 there, 2 here")
    assert second.engine.profiles["denoiser"] == [1, 2, 4] and second.engine.profiles["vae_encoder"] == [1, 1, 2]
    flip_byte(second.engine.plan_path("denoiser"))
    third = build_engines(toy, wider)
    assert third.fresh and "denoiser.plan was altered" in third.notes[0]
    assert third.engine.plans["denoiser"]["sha256"] == sha256_file(third.engine.plan_path("denoiser"))
    assert build_engines(toy, replace(wider, force=True)).fresh
    other = replace(toy, files={**toy.files, "denoiser.onnx": {"sha256": "0" * 64, "bytes": 1}})
    assert "onnx.denoiser is" in build_engines(other, wider).notes[0]
    document = json.loads((third.engine.path / "engine.json").read_text())
    del document["plans"]["update"]
    (third.engine.path / "engine.json").write_text(json.dumps(document))
    assert "plans.update is missing" in build_engines(toy, wider).notes[0]
    assert len(engines_of(toy)) == 1, "one engine a key, and no temporary folder"


def test_a_folder_that_is_no_engine_is_not_deleted(toy: Bundle) -> None:
    folder = toy.path / "engines" / find_engine_key(OPTIONS, "float32").folder
    folder.mkdir(parents=True)
    (folder / "denoiser.plan").touch()
    with pytest.raises(UsageError, match=r"is not overwritten, it holds no engine\.json"):
        build_engines(toy, OPTIONS)
    assert (folder / "denoiser.plan").is_file()


def test_profiles_fix_all_but_the_batch(toy: Bundle) -> None:
    assert engines.profile(toy.components["denoiser"], engines.rows("denoiser", 3)) == {
        "sample": [[1, 9, 8, 8], [2, 9, 8, 8], [6, 9, 8, 8]],
        **dict.fromkeys(("timestep", "branch"), [[1], [2], [6]]),
    }
    assert engines.rows("denoiser", 3, branches=1) == engines.rows("update", 3, branches=1) == [1, 1, 3]
    assert engines.rows("vae_encoder", 3) == [1, 1, 3]


# Where the engines go


def test_a_bundle_is_copied_to_the_output_once(toy: Bundle, tmp_path: Path) -> None:
    (toy.path / "engines" / "old").mkdir(parents=True)
    copy = copy_bundle_for_engines(str(toy.path), tmp_path / "copy")
    assert sorted(p.name for p in copy.path.iterdir()) == sorted([*toy.files, "bundle.json"])
    assert Bundle.load(copy.path).files == toy.files
    (copy.path / "engines").mkdir()
    again = copy_bundle_for_engines(str(toy.path), tmp_path / "copy")
    assert again.path == copy.path and (copy.path / "engines").is_dir()
    for output in (None, toy.path):
        assert copy_bundle_for_engines(str(toy.path), output).path == toy.path


def test_another_bundle_is_replaced_only_with_force(toy: Bundle, tmp_path: Path) -> None:
    other = make_toy_bundle(tmp_path / "other", name="other")
    with pytest.raises(UsageError, match="exists and is not empty"):
        copy_bundle_for_engines(str(toy.path), other)
    assert copy_bundle_for_engines(str(toy.path), other, force=True).name == "toy"
    with pytest.raises(UsageError, match="holds the bundle"):
        copy_bundle_for_engines(str(toy.path), tmp_path, force=True)
    assert (toy.path / "denoiser.onnx").is_file()


def test_what_takes_no_engines_is_told(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tiny takes no engines, it is part of the installed package: name a copy wit"):
        copy_bundle_for_engines("tiny", None)
    (toy.path / "engines").write_text("a file where the folder should be")
    with pytest.raises(MachineError, match=r"cannot (make|write) .*engines.*: "):
        build_engines(toy, OPTIONS)
    monkeypatch.setattr(engines.os, "access", lambda *a: False)
    with pytest.raises(UsageError, match="takes no engines, its folder is write-protected: name a copy with --output"):
        copy_bundle_for_engines(str(toy.path), None)


# The machine


def on(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None) -> None:
    def refuse() -> Gpu:
        raise MachineError("CUDA cannot use a GPU here", "unset CUDA_VISIBLE_DEVICES")

    monkeypatch.setattr(engines, "find_gpu", lambda: gpu)
    monkeypatch.setattr(engines, "require_gpu", refuse)


def test_what_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions("tensorrt-rtx")
    on(monkeypatch, None)
    key = find_engine_key(options, "float32")
    everywhere = key.compute_capabilities
    assert set(everywhere) >= {"8.0", "8.6", "8.9", "12.0"} and list(everywhere) == sorted(everywhere, key=float)
    assert "7.5" not in everywhere and key.gpu == "any", "it compiles no float32 product for Turing"
    on(monkeypatch, ADA)
    assert find_engine_key(options, "float32").compute_capabilities == ("8.9",)
    named = replace(options, compute_capabilities=("12.0", "8.6", "8.6"))
    assert find_engine_key(named, "float32").compute_capabilities == ("8.6", "12.0")


def test_an_unsupported_gpu_is_told_before_anything_is_done(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    on(monkeypatch, ORIN)
    assert main(["export", "tiny", "--engine", "tensorrt-rtx"]) == 3
    assert "does not build for Orin, compute capability 8.7 (it has 7.5, 8.0, " in capsys.readouterr().err
    assert main(["export", "tiny", "--engine", "tensorrt-rtx", "--compute-capability", "8.7"]) == 2
    assert "does not build for compute capability 8.7: it has 7.5" in capsys.readouterr().err


def test_tensorrt_builds_on_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "load_package", lambda variant: types.SimpleNamespace(__version__="10.3.0"))
    on(monkeypatch, None)
    with pytest.raises(MachineError, match="builds on the GPU that will .*; CUDA cannot use a GPU here: unset CUDA_"):
        find_engine_key(EngineOptions("tensorrt"), "float16")
    with pytest.raises(UsageError, match="leave --compute-capability out"):
        find_engine_key(EngineOptions("tensorrt", compute_capabilities=("8.6",)), "float16")
    with pytest.raises(UsageError, match="max batch is 0: give 1 or more pictures"):
        find_engine_key(EngineOptions("tensorrt", max_batch=0), "float16")
    on(monkeypatch, ORIN)
    assert find_engine_key(EngineOptions("tensorrt"), "float16").folder == "float16-tensorrt-10.3.0-orin-8-sm-8-gb-sm87"


@pytest.mark.parametrize(
    ("module", "engine", "extra"),
    [("tensorrt", "tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx", "rtx")],
)
def test_a_missing_or_untried_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, module: str, engine: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError, match=rf'package {module} is missing .*pip install "moebius-edge\[{extra}\]"'):
        find_engine_key(EngineOptions(engine), "float32")
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(__version__="12.0.0"))
    with pytest.raises(MachineError, match=r"12\.0\.0 is not supported, "):
        find_engine_key(EngineOptions(engine), "float32")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "polygraphy.logger", None)
    with pytest.raises(MachineError, match="polygraphy is missing: run `pip install polygraphy`"):
        import_polygraphy()


# A build that does not end well; how a process may end is tested in test_subprocess_job


def test_a_build_that_dies_is_told_by_its_component(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WORKER", [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    counts = iter([0, 1])
    monkeypatch.setattr(subprocess_job, "oom_kills", lambda: next(counts))
    with pytest.raises(OutOfMemory, match="killed the build of vae_encoder .*or pass a smaller --workspace or --max-b"):
        build_engines(toy, OPTIONS)
    assert engines_of(toy) == []


def test_ctrl_c_leaves_nothing(toy: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """A real SIGINT while the first component is being built."""

    def interrupted(command: Any, request: Any, name: str, *rest: Any) -> Any:
        return subprocess_job.run_job(command, request, name, lambda *step: os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(engines, "run_job", interrupted)
    assert main(["export", str(toy.path), *COMMAND]) == 130
    assert "interrupted" in capsys.readouterr().err and engines_of(toy) == []
