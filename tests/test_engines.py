"""Engines: a bundle's ONNX files through TensorRT for RTX, which builds without a GPU.

The bundled model is built once, in a fresh interpreter that has neither PyTorch nor onnx, as a Jetson has neither; all
else is built from toys. No engine is executed here: that takes a GPU, see ``test_trt``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from toy import INT8, call_int8, flip_byte, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.export import build_engine, engine_process, engine_target, engines, trt_builder
from moebius_edge.export.build_progress import Fraction, make_monitor
from moebius_edge.export.engine_target import EngineOptions, Target, find_target
from moebius_edge.export.engines import build_engines, place_bundle
from moebius_edge.export.trt_builder import TrtBuilder, check_types, network_facts
from moebius_edge.runtimes.cuda import Gpu
from moebius_edge.runtimes.engine_files import read_engine
from moebius_edge.runtimes.latent_loop import update_component
from moebius_edge.system.files import sha256_file
from moebius_edge.system.machine import available_memory_bytes

pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")

Captured = pytest.CaptureFixture[str]
OPTIONS = EngineOptions("tensorrt-rtx", compute_capabilities=("8.6",))
ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24_000_000_000, False, "13.0")
ORIN = Gpu("Orin", (8, 7), 8_000_000_000, True, "12.6")


@pytest.fixture(scope="module")
def target() -> Target:
    return find_target(OPTIONS)


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def leftovers(bundle: Bundle) -> list[str]:
    folder = bundle.path / "engines"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


# --- the bundled model, whole ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Bundle]:
    """The command as a Jetson would run it: nothing but numpy, OpenCV, Pillow and TensorRT is there."""
    folder = tmp_path_factory.mktemp("tiny")
    absent = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "safetensors")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    output = folder / "engines of tiny"
    command = ["export", "tiny", "--engine", "tensorrt-rtx", "-o", str(output), "--compute-capability", "8.6"]
    done = subprocess.run(
        [sys.executable, "-m", "moebius_edge", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done, Bundle.load(output)


def test_a_bundle_becomes_engines_without_pytorch(tiny: tuple[Any, Bundle]) -> None:
    done, bundle = tiny
    import tensorrt_rtx

    (folder,) = (bundle.path / "engines").iterdir()
    assert folder.name == f"float32-tensorrt-rtx-{tensorrt_rtx.__version__}-any-sm86"
    assert done.stdout.startswith(f"saved {folder} (5 plans, ")
    assert done.stdout.endswith(f"next: moebius-edge run IMAGE MASK --bundle {bundle.path} --runtime tensorrt-rtx\n")
    assert "build denoiser_shallow (3 of 5)" in done.stderr
    engine = read_engine(folder)
    engine.verify("")
    assert sorted(p.name for p in folder.iterdir()) == [
        "denoiser.plan",
        "denoiser_shallow.plan",
        "engine.json",
        "update.plan",
        "vae_decoder.plan",
        "vae_encoder.plan",
    ]
    assert engine.onnx == {n: bundle.files[f"{n}.onnx"]["sha256"] for n in bundle.components}
    one, pair = [1, 1, 1], [1, 2, 2]
    repeated = dict.fromkeys(("denoiser", "denoiser_shallow", "update"), pair)
    assert engine.profiles == {"vae_encoder": one, "vae_decoder": one, **repeated}
    assert sorted(engine.plans) == sorted(engine.profiles)
    for name in bundle.components:
        weights = onnx.load(bundle.component_path(name)).graph.initializer
        assert engine.plans[name]["bytes"] > 0.9 * sum(len(w.raw_data) for w in weights), "the weights are in the plan"


def test_nothing_changed_is_a_no_op_that_says_so(tiny: tuple[Any, Bundle], capsys: Captured) -> None:
    _, bundle = tiny
    (folder,) = (bundle.path / "engines").iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    command = ["export", "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]
    for source in ([str(bundle.path)], ["tiny", "-o", str(bundle.path)]):
        assert main([*command, *source]) == 0
        assert capsys.readouterr().out.startswith(f"nothing to do: {folder} is there, built from these files")
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
    (folder,) = (bundle.path / "engines").iterdir()
    plans = read_engine(folder).plans
    for name in bundle.components:
        plan = plans[name]
        whole = inline_local_functions(onnx.load(bundle.component_path(name)))  # as the parser does
        nodes = Counter(node.op_type for node in whole.graph.node)
        for layer, operators in ONE_FOR_ONE.items():
            assert plan["layers"].get(layer, 0) == sum(nodes[o] for o in operators), (name, layer)
        assert set(plan["tensors"]) <= {"FLOAT", "INT32", "INT64", "BOOL"}, "shapes are whole numbers, all else float32"
        facts = network_facts(bundle.component_path(name))
        assert {k: facts[k] for k in ("layers", "tensors")} == {k: plan[k] for k in ("layers", "tensors")}
        component = bundle.components[name]
        kinds = {"float32": "FLOAT", "int64": "INT64"}
        assert facts["inputs"] == {t.name: kinds[t.dtype] for t in component.inputs}
        assert facts["outputs"] == {t.name: kinds[t.dtype] for t in component.outputs}


def test_the_update_is_built_as_it_is_defined(tiny: tuple[Any, Bundle]) -> None:
    """In float32, from its own layers, with the tensors that the runtime binds."""
    import tensorrt_rtx as trt

    _, bundle = tiny
    (folder,) = (bundle.path / "engines").iterdir()
    plan = read_engine(folder).plans["update"]
    builder = TrtBuilder("tensorrt-rtx")
    network = builder.update(bundle.latent_size)
    facts = builder.facts(network)
    assert {k: plan[k] for k in ("layers", "tensors")} == {k: facts[k] for k in ("layers", "tensors")}
    assert set(plan["tensors"]) == {"FLOAT", "INT32"} and plan["layers"]["REDUCE"] == 1
    component = update_component(bundle.latent_size)
    made = [network.get_output(i) for i in range(network.num_outputs)]
    shapes = {t.name: tuple(t.shape) for t in made}
    assert shapes == {t.name: (-1, *t.shape[1:]) for t in component.outputs}
    assert {trt.nptype(t.dtype) for t in made} == {np.float32}
    assert {n: trt.nptype(getattr(trt.DataType, k)) for n, k in facts["inputs"].items()} == {
        t.name: np.dtype(t.dtype).type for t in component.inputs
    }


def test_a_damaged_engine_is_built_again(toy: Bundle, target: Target) -> None:
    old = build_engines(toy, OPTIONS, target).engine
    document = json.loads((old.path / "engine.json").read_text())
    del document["plans"]["update"], document["profiles"]["update"]
    (old.path / "engine.json").write_text(json.dumps(document))
    again = build_engines(toy, OPTIONS, target)
    assert again.fresh and "plans.update is missing" in again.notes[0]
    assert again.engine.plan_path("update").is_file()


@pytest.mark.parametrize("capability", ["8.0", "12.0"])
def test_the_update_builds_for_many_rows_and_other_sizes(tmp_path: Path, capability: str) -> None:
    """At the size of the published model, and beside an FP16 denoiser: it stays float32."""
    component = update_component(64)
    request = {
        "component": "update",
        "precision": "float32",
        "onnx": None,
        "quantised": [],
        "plan": str(tmp_path / "update.plan"),
        "flavour": "tensorrt-rtx",
        "gpu": "any",
        "compute_capabilities": [capability],
        "profile": engines.profile(component, engines.rows("update", 8)),
        "workspace_bytes": None,
        "opt_level": None,
        "timing_cache": None,
    }
    assert request["profile"]["coefficients"] == [[n, 6, 1, 1] for n in (1, 2, 16)]
    record = build_engine.build(request, lambda event, **values: None)
    assert record["bytes"] == (tmp_path / "update.plan").stat().st_size > 1000


# --- types -----------------------------------------------------------------------------------------------


def half_model(path: Path, inner: int) -> Path:
    """x -> Cast -> MatMul -> Cast -> y with the product in the type ``inner``."""
    weight = numpy_helper.from_array(np.ones((4, 4), helper.tensor_dtype_to_np_dtype(inner)), "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=inner),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_typed_fp16_stays_fp16_and_is_told_from_float32(tmp_path: Path) -> None:
    half = network_facts(half_model(tmp_path / "half.onnx", TensorProto.FLOAT16))
    full = network_facts(half_model(tmp_path / "full.onnx", TensorProto.FLOAT))
    assert half["tensors"]["HALF"] == 3 and "HALF" not in full["tensors"]  # the cast, the weight, the product
    check_types(half, "fp16", "denoiser")
    check_types(full, "float32", "denoiser")
    check_types(full, "fp16", "vae_decoder")  # an island may be a whole component
    with pytest.raises(BundleError, match="denoiser has HALF tensors in a float32 bundle"):
        check_types(half, "float32", "denoiser")
    with pytest.raises(BundleError, match="denoiser has no HALF tensor in a fp16 bundle"):
        check_types(full, "fp16", "denoiser")
    with pytest.raises(BundleError, match="precision 'fp7' is unknown, float32, fp16, int8"):
        check_types(full, "fp7", "denoiser")


def test_a_bundle_of_another_precision_than_it_says_is_refused(toy: Bundle, target: Target) -> None:
    lying = dataclasses.replace(toy, precision="fp16")
    with pytest.raises(BundleError, match="denoiser has no HALF tensor in a fp16 bundle: export the bundle again"):
        build_engines(lying, OPTIONS, target)
    assert leftovers(toy) == []


# --- when it is built again ------------------------------------------------------------------------------


def test_what_changed_is_built_again_and_said(toy: Bundle, target: Target) -> None:
    first = build_engines(toy, OPTIONS, target)
    assert first.fresh and not first.notes
    assert not build_engines(toy, OPTIONS, target).fresh
    wider = dataclasses.replace(OPTIONS, max_batch=2)
    second = build_engines(toy, wider, target)
    assert second.fresh and second.notes[0].endswith("is built again: max_batch was 1 and is 2 now")
    assert second.engine.profiles["denoiser"] == [1, 2, 4] and second.engine.profiles["vae_encoder"] == [1, 1, 2]
    assert not build_engines(toy, wider, target).fresh
    flip_byte(second.engine.plan_path("denoiser"))
    third = build_engines(toy, wider, target)
    assert third.fresh and "denoiser.plan was altered" in third.notes[0]
    assert third.engine.plans["denoiser"]["sha256"] == sha256_file(third.engine.plan_path("denoiser"))
    assert build_engines(toy, wider, target, force=True).fresh
    changed = dataclasses.replace(toy, files={**toy.files, "denoiser.onnx": {"sha256": "0" * 64, "bytes": 1}})
    fourth = build_engines(changed, wider, target)
    assert fourth.fresh and "it was built from another denoiser.onnx than the bundle's" in fourth.notes[0]
    assert len(leftovers(toy)) == 1, "one engine a key, and no temporary folder"


def test_a_folder_that_is_no_engine_is_not_deleted(toy: Bundle, target: Target) -> None:
    built = build_engines(toy, OPTIONS, target)
    (built.engine.path / "engine.json").unlink()
    with pytest.raises(UsageError, match=r"is not overwritten, it holds no engine\.json"):
        build_engines(toy, OPTIONS, target)
    assert (built.engine.path / "denoiser.plan").is_file()


# --- where the engines go --------------------------------------------------------------------------------


def test_a_bundle_is_copied_to_the_output_once(toy: Bundle, tmp_path: Path) -> None:
    (toy.path / "engines" / "old").mkdir(parents=True)
    copy = place_bundle(str(toy.path), tmp_path / "copy")
    assert sorted(p.name for p in copy.path.iterdir()) == sorted([*toy.files, "bundle.json"])
    assert Bundle.load(copy.path).files == toy.files
    (copy.path / "engines").mkdir()
    again = place_bundle(str(toy.path), tmp_path / "copy")
    assert again.path == copy.path and (copy.path / "engines").is_dir()
    assert place_bundle(str(toy.path), None).path == toy.path
    assert place_bundle(str(toy.path), toy.path).path == toy.path


def test_another_bundle_is_replaced_only_with_force(toy: Bundle, tmp_path: Path) -> None:
    other = make_toy_bundle(tmp_path / "other", name="other")
    with pytest.raises(UsageError, match="exists and is not empty"):
        place_bundle(str(toy.path), other)
    assert place_bundle(str(toy.path), other, force=True).name == "toy"
    with pytest.raises(UsageError, match="holds the bundle"):
        place_bundle(str(toy.path), tmp_path, force=True)
    assert (toy.path / "denoiser.onnx").is_file()


def test_the_installed_package_takes_no_engines(capsys: Captured) -> None:
    assert main(["export", "tiny", "--engine", "tensorrt-rtx"]) == 2
    message = "bundle tiny takes no engines, it is part of the installed package: name a copy with --output DIR"
    assert message in capsys.readouterr().err


def test_a_write_protected_bundle_names_the_output(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.os, "access", lambda *a: False)
    with pytest.raises(UsageError, match="takes no engines, its folder is write-protected: name a copy with --output"):
        place_bundle(str(toy.path), None)


# --- the machine -----------------------------------------------------------------------------------------


def on(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None) -> None:
    monkeypatch.setattr(engine_target, "find_gpu", lambda: gpu)


def test_what_is_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, None)
    everywhere = find_target(EngineOptions("tensorrt-rtx"))
    assert everywhere.gpu == "any" and set(everywhere.compute_capabilities) >= {"8.0", "8.6", "8.9", "12.0"}
    assert "7.5" not in everywhere.compute_capabilities, "it compiles no float32 product for Turing"
    assert list(everywhere.compute_capabilities) == sorted(everywhere.compute_capabilities, key=float)
    on(monkeypatch, ADA)
    assert find_target(EngineOptions("tensorrt-rtx")).compute_capabilities == ("8.9",)
    asked = EngineOptions("tensorrt-rtx", compute_capabilities=("12.0", "8.6", "8.6"))
    assert find_target(asked).compute_capabilities == ("8.6", "12.0")


def test_an_unsupported_gpu_is_told_before_anything_is_done(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    on(monkeypatch, ORIN)
    assert main(["export", "tiny", "--engine", "tensorrt-rtx"]) == 3
    assert "does not build for Orin, compute capability 8.7 (it has 7.5, 8.0, " in capsys.readouterr().err
    assert main(["export", "tiny", "--engine", "tensorrt-rtx", "--compute-capability", "8.7"]) == 2
    assert "does not build for compute capability 8.7: it has 7.5" in capsys.readouterr().err


def test_tensorrt_builds_on_its_own_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    monkeypatch.setattr(engine_target, "load_package", lambda flavour: types.SimpleNamespace(__version__="10.3.0"))
    on(monkeypatch, None)
    with pytest.raises(MachineError, match="this machine shows none: check with `nvidia-smi`.*--engine tensorrt-rtx"):
        find_target(EngineOptions("tensorrt"))
    with pytest.raises(UsageError, match="leave --compute-capability out"):
        find_target(EngineOptions("tensorrt", compute_capabilities=("8.6",)))
    on(monkeypatch, ORIN)
    assert find_target(EngineOptions("tensorrt")) == Target("tensorrt", "10.3.0", "Orin", ("8.7",))


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    for module, engine, extra in (("tensorrt", "tensorrt", "tensorrt"), ("tensorrt_rtx", "tensorrt-rtx", "rtx")):
        monkeypatch.setitem(sys.modules, module, None)
        assert main(["export", "tiny", "--engine", engine]) == 3
        error = capsys.readouterr().err
        assert f"the package {module} is missing" in error and f'pip install "moebius-edge[{extra}]"' in error


def test_a_version_that_was_never_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    for version in ("8.6.1", "12.0.0"):
        monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__=version))
        with pytest.raises(MachineError, match=rf"TensorRT {version} is not supported, 10\.3 or newer and below 12\.0"):
            find_target(EngineOptions("tensorrt"))


def test_a_gpu_that_tensorrt_finds_wanting_while_it_builds(tiny: tuple[Any, Bundle], tmp_path: Path) -> None:
    """Turing: known to the enumeration, but without float32 products."""
    bundle = place_bundle(str(tiny[1].path), tmp_path / "turing")
    options = EngineOptions("tensorrt-rtx", compute_capabilities=("7.5",))
    with pytest.raises(MachineError, match="cannot build vae_encoder .*Turing.*this GPU or driver does not suit it"):
        build_engines(bundle, options, find_target(options))
    assert leftovers(bundle) == []


def test_too_little_memory_or_disk(toy: Bundle, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as little:
        little.setattr(engines, "available_memory_bytes", lambda: 700_000_000)
        with pytest.raises(MachineError, match=r"takes about 0\.8 GB of memory and 0\.7 GB are available: close"):
            build_engines(toy, OPTIONS, target)
    usage = engines.shutil.disk_usage("/")
    monkeypatch.setattr(engines.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(MachineError, match=r"take about 0\.1 GB and the disk of .* has 0\.0 GB left: free space"):
        build_engines(toy, OPTIONS, target)
    assert leftovers(toy) == []


def test_available_memory_is_less_than_all_of_it() -> None:
    available = available_memory_bytes()
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = sum(int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
    assert available is not None and 0 < available < total


def test_what_cannot_be_learnt_of_memory_is_no_reason(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "available_memory_bytes", lambda: None)
    engines.check_room(toy)


# --- a build that does not end well ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os.kill(os.getpid(), 9)", "the build of vae_encoder was killed, probably out of memory: close other"),
        ("os._exit(137)", "the build of vae_encoder was killed, probably out of memory"),
        ("os.abort()", r"ended by SIGABRT: try another version"),
        ("print('odd', file=sys.stderr); sys.exit(5)", r"ended with exit code 5 \(odd\): try another version"),
        ("sys.stdin.read(); os.kill(os.getpid(), 9)", "was killed, probably out of memory"),
    ],
)
def test_a_build_that_dies_is_reported_as_what_it_is(
    toy: Bundle, target: Target, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.setattr(engine_process, "_command", lambda: [sys.executable, "-c", f"import os, sys; {code}"])
    with pytest.raises(MachineError, match=message):
        build_engines(toy, OPTIONS, target)
    assert leftovers(toy) == []


def test_a_build_that_hangs_is_ended_and_a_busy_one_is_not(
    toy: Bundle, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "STALLED_S", 0.7)
    asleep = "import time; time.sleep(100)"
    monkeypatch.setattr(engine_process, "_command", lambda: [sys.executable, "-c", asleep])
    with pytest.raises(MachineError, match=r"vae_encoder hung, it used no processor time for 0\.7 seconds, probably"):
        build_engines(toy, OPTIONS, target)
    busy = "import os, time; end = time.time() + 3\nwhile time.time() < end: pass\nos._exit(7)"
    monkeypatch.setattr(engine_process, "_command", lambda: [sys.executable, "-c", busy])
    with pytest.raises(MachineError, match="ended with exit code 7"):
        build_engines(toy, OPTIONS, target)
    assert leftovers(toy) == []


def test_ctrl_c_ends_the_build_and_leaves_nothing(
    tiny: tuple[Any, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """A real SIGINT while the denoiser is being built; an engine of before stays whole."""
    bundle = place_bundle(str(tiny[1].path), tmp_path / "copy")
    children = []
    real = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        assert options["start_new_session"], "a terminal's Ctrl-C would reach the child, in the midst of TensorRT"
        children.append(real(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(engine_process.subprocess, "Popen", popen)
    converse = engine_process._converse

    def interrupted(stdin: Any, stdout: Any, request: dict[str, Any], on_progress: Any, notes: list[str]) -> Any:
        def then(fraction: float) -> None:
            if request["component"] == "denoiser":
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            on_progress(fraction)

        return converse(stdin, stdout, request, then, notes)

    monkeypatch.setattr(engine_process, "_converse", interrupted)
    command = ["export", str(bundle.path), "--engine", "tensorrt-rtx", "--compute-capability", "8.6"]
    assert main(command) == 130
    assert f"interrupted, no engine written; the bundle is {bundle.path}" in capsys.readouterr().err
    assert leftovers(bundle) == []
    assert [child.returncode for child in children] == [0, -signal.SIGKILL]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot be asked to")
def test_a_build_ends_with_its_parent() -> None:
    """Killed outright, the parent ends nothing itself; here not even the build's input comes to an end."""
    reading, writing = os.pipe()
    code = "import subprocess, sys\nchild = subprocess.Popen(sys.argv[1:], stdin=0, stderr=1)\n"
    code += "print(child.pid, flush=True)\nchild.wait()"
    slow = "import sys; from moebius_edge.export import build_engine\nplain = build_engine._end_with_parent\n"
    slow += "build_engine._end_with_parent = lambda: (plain(), sys.stderr.write('ready'), sys.stderr.flush())\n"
    slow += "build_engine.main()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", slow], stdin=reading, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert parent.stdout.read(5) == "ready"
    parent.kill()
    parent.wait()
    assert parent.stdout.read() == "", "the child has closed its end, so it has ended"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(child, 0)
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                raise ProcessLookupError
            time.sleep(0.05)
    os.close(writing)
    os.close(reading)


def test_an_unwritable_place_is_told(toy: Bundle, target: Target) -> None:
    (toy.path / "engines").write_text("a file where the folder should be")
    with pytest.raises(MachineError, match=r"cannot (make|write) .*engines.*: "):
        build_engines(toy, OPTIONS, target)


def with_denoiser(tmp_path: Path, change: Any) -> Bundle:
    folder = make_toy_bundle(tmp_path / "changed")
    model = onnx.load(folder / "denoiser.onnx")
    change(model)
    onnx.save(model, folder / "denoiser.onnx")
    manifest = json.loads((folder / "bundle.json").read_text())
    path = folder / "denoiser.onnx"
    manifest["files"]["denoiser.onnx"] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return Bundle.load(folder)


def test_an_opset_that_is_not_parsed_is_refused(tmp_path: Path, target: Target) -> None:
    def newer(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 99

    with pytest.raises(BundleError, match=r"denoiser\.onnx is not for TensorRT for RTX .*opset 99 is newer than 23"):
        build_engines(with_denoiser(tmp_path, newer), OPTIONS, target)


def test_a_node_that_breaks_a_rule_or_the_parser_is_named(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def einsum(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.output[0] == "fill")
        node.CopyFrom(helper.make_node("Einsum", list(node.input), ["fill"], "the_sum", equation="nchw,nkij->nkhw"))

    def unknown(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.output[0] == "fill")
        node.name, node.op_type = "the_stranger", "Strange"

    with pytest.raises(BundleError, match=r"is not for .*node 'the_sum' \(Einsum\)"):
        build_engines(with_denoiser(tmp_path, einsum), OPTIONS, target)
    bundle = with_denoiser(tmp_path, unknown)
    with pytest.raises(BundleError, match=r"cannot parse .*denoiser\.onnx \(node 'the_stranger' \(Strange\)"):
        network_facts(bundle.component_path("denoiser"))
    assert leftovers(bundle) == []


# --- options that reach TensorRT, progress, the parent's end ----------------------------------------------


def test_options_reach_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx

    configs = []
    real = tensorrt_rtx.Builder.create_builder_config

    def recording(builder: Any) -> Any:
        configs.append(real(builder))
        return configs[-1]

    monkeypatch.setattr(tensorrt_rtx.Builder, "create_builder_config", recording)
    toy = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    seen: list[float] = []
    request = {
        "component": "vae_decoder",
        "precision": "float32",
        "onnx": str(toy.component_path("vae_decoder")),
        "quantised": [],
        "plan": str(tmp_path / "x.plan"),
        "flavour": "tensorrt-rtx",
        "gpu": "any",
        "compute_capabilities": ["8.6", "12.0"],
        "profile": engines.profile(toy.components["vae_decoder"], [1, 1, 3]),
        "workspace_bytes": 300_000_000,
        "opt_level": 2,
        "timing_cache": None,
    }
    record = build_engine.build(request, lambda event, fraction: seen.append(fraction))
    (config,) = configs
    assert config.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE) == 300_000_000
    assert config.builder_optimization_level == 2
    assert not config.get_flag(tensorrt_rtx.BuilderFlag.TF32), "float32 means float32"
    assert config.num_compute_capabilities == 2 and config.num_optimization_profiles == 1
    assert record["sha256"] == sha256_file(tmp_path / "x.plan")
    assert seen == sorted(seen) and len(seen) > 3 and seen[0] > 0 and seen[-1] <= 1


def test_progress_is_one_figure_that_never_goes_back() -> None:
    seen: list[float] = []
    fraction = Fraction(seen.append)
    fraction.start("whole", None, 2)
    fraction.start("part", "whole", 4)
    for step in range(4):
        fraction.step("part", step)
    fraction.finish("part")
    fraction.step("whole", 0)
    fraction.start("part", "whole", 1)  # the name again
    fraction.step("unheard of", 3)
    fraction.step("part", 0)
    fraction.step("whole", 1)
    assert seen == [0.125, 0.25, 0.375, 0.5, 1.0]


def test_a_build_nobody_waits_for_stops() -> None:
    import tensorrt_rtx

    def gone(fraction: float) -> None:
        raise BrokenPipeError

    monitor = make_monitor(tensorrt_rtx, Fraction(gone))
    monitor.phase_start("whole", None, 2)
    assert monitor.step_complete("whole", 0) is False


def test_a_distilled_denoiser_is_tuned_for_a_row_a_picture(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.5))
    asked: dict[str, Any] = {}

    def run_build(request: dict[str, Any], *rest: Any) -> dict[str, Any]:
        asked[request["component"]] = request["profile"]
        if request["component"] == "update":
            raise BundleError("enough")
        return {}

    monkeypatch.setattr(engines, "run_build", run_build)
    with pytest.raises(BundleError, match="enough"):
        build_engines(bundle, dataclasses.replace(OPTIONS, max_batch=3), target)
    assert asked["denoiser"]["timestep"] == [[1], [1], [3]] and asked["update"]["unconditional"] == [[1], [1], [3]]


def test_profiles_fix_all_but_the_batch(toy: Bundle) -> None:
    component = toy.components["denoiser"]
    assert engines.profile(component, engines.rows("denoiser", 3)) == {
        "sample": [[1, 9, 8, 8], [2, 9, 8, 8], [6, 9, 8, 8]],
        "timestep": [[1], [2], [6]],
        "branch": [[1], [2], [6]],
    }


# --- INT8 ------------------------------------------------------------------------------------------------


def int8_model(path: Path, names: tuple[str, ...] = ("first", "second")) -> Path:
    """x -> MatMul ``first`` -> MatMul ``second`` -> y, both inputs of each through pairs."""
    constants = {"s": np.float32(0.5), "z": np.int8(0), "w": np.eye(4, dtype=np.int8), "ws": np.ones(4, np.float32)}
    nodes, read = [], "x"
    for index, name in enumerate(names):
        q, d, w, made = (f"{kind}{index}" for kind in "qdwm")
        nodes += [
            helper.make_node("QuantizeLinear", [read, "s", "z"], [q]),
            helper.make_node("DequantizeLinear", [q, "s", "z"], [d]),
            helper.make_node("DequantizeLinear", ["w", "ws"], [f"{w}_d"], axis=1),
            helper.make_node("MatMul", [d, f"{w}_d"], [made], name),
        ]
        read = made
    nodes.append(helper.make_node("Relu", [read], ["y"]))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def int8_request(folder: Path, quantised: list[str]) -> dict[str, Any]:
    return {
        "component": "denoiser",
        "precision": "int8",
        "onnx": str(int8_model(folder / "int8.onnx")),
        "quantised": quantised,
        "plan": str(folder / "int8.plan"),
        "flavour": "tensorrt-rtx",
        "gpu": "any",
        "compute_capabilities": ["8.6"],
        "profile": {"x": [[1, 4], [2, 4], [2, 4]]},
        "workspace_bytes": None,
        "opt_level": None,
        "timing_cache": None,
    }


def test_an_int8_plan_says_how_many_products_are_quantised(tmp_path: Path) -> None:
    record = build_engine.build(int8_request(tmp_path, ["second", "first"]), lambda event, **values: None)
    assert (record["quantised_products"], record["products_in_int8"]) == (2, None)
    assert record["tensors"]["INT8"] > 0


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["first", "second", "third"], "denoiser: TensorRT does not see third as quantised: export the bundle again"),
        (["first"], r"denoiser: second is quantised, and bundle\.json does not list it: export it again"),
        ([], "denoiser: first is quantised, and"),
    ],
)
def test_products_that_are_not_those_of_the_bundle_are_refused(
    tmp_path: Path, listed: list[str], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        build_engine.build(int8_request(tmp_path, listed), lambda event, **values: None)
    assert not (tmp_path / "int8.plan").exists()


def test_a_bundle_for_the_cpu_is_refused(toy: Bundle, target: Target) -> None:
    bundle = Bundle.load(call_int8(toy.path, target="cpu"))
    with pytest.raises(UsageError, match="is INT8 for cpu, TensorRT cannot build it: .* --precision int8 --target ten"):
        build_engines(bundle, OPTIONS, target)
    assert leftovers(bundle) == []


def test_the_denoisers_requests_have_their_products(
    tmp_path: Path, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = make_toy_bundle(tmp_path / "deep", deep=True)
    bundle, asked = Bundle.load(call_int8(deep, shallow_nodes=["a/2"])), {}

    def run_build(request: dict[str, Any], *rest: Any) -> dict[str, Any]:
        assert set(request) == build_engine.REQUEST
        asked[request["component"]] = (request["precision"], request["quantised"])
        if request["component"] == "update":
            raise BundleError("enough")
        return {}

    monkeypatch.setattr(engines, "run_build", run_build)
    with pytest.raises(BundleError, match="enough"):
        build_engines(bundle, OPTIONS, target)
    assert asked == {
        "vae_encoder": ("int8", []),
        "denoiser": ("int8", INT8["nodes"]),
        "denoiser_shallow": ("int8", ["a/2"]),
        "vae_decoder": ("int8", []),
        "update": ("float32", []),
    }


def on_a_jetson(monkeypatch: pytest.MonkeyPatch, answer: Any) -> tuple[int | None, list[str]]:
    """What is found and said of two products' kernels where TensorRT chooses them as it builds."""
    import types

    def information(*arguments: Any) -> str:
        if isinstance(answer, Exception):
            raise answer
        return json.dumps({"Layers": [
            {"Name": name, "Inputs": [{"Name": "t", "Format/Datatype": kind}]} for name, kind in answer.items()
        ]})  # fmt: skip

    package = types.SimpleNamespace(__version__="10.3.0")
    package.Logger = package.Builder = lambda *arguments: None
    monkeypatch.setattr(trt_builder, "load_package", lambda flavour: package)
    monkeypatch.setattr(trt_builder, "make_logger", lambda *arguments: None)
    monkeypatch.setattr(trt_builder, "engine_information", information)
    told: list[str] = []
    builder = TrtBuilder("tensorrt")
    return builder.products_in_int8(b"", ["a", "b"], lambda event, text: told.append(f"{event}: {text}")), told


def test_kernels_in_int8_are_counted_where_tensorrt_has_chosen_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_jetson(monkeypatch, {"a": "Int8", "b": "Row major INT8 format"}) == (2, [])
    found, (note,) = on_a_jetson(monkeypatch, {"a": "Int8", "b": "Half"})
    assert found == 1
    assert note == "note: TensorRT 10.3.0 computes 1 of the 2 quantised products in INT8, not b: measure it beside FP16"
    found, (note,) = on_a_jetson(monkeypatch, RuntimeError("no inspector"))
    assert found is None
    assert note == "note: which products of the engine run in INT8 could not be read (no inspector)"
