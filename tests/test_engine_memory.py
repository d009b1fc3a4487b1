"""What engines take on the GPU: the plan, its refusal before anything is loaded, and ``inspect --memory``.

The figures are those that TensorRT for RTX 1.7.1 logged for the published architecture, built for compute capability
8.9 and one picture at a time; for four it logged four times the denoiser's activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commanding import Captured, as_json, printed
from fake_trt import ORIN, FakeCuda, trt_runtime, write_engine
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.cli import main
from moebius_edge.errors import OutOfMemory
from moebius_edge.model.student import StudentConfig
from moebius_edge.runtimes import engine_memory
from moebius_edge.runtimes.cuda import Gpu
from moebius_edge.runtimes.engine_files import VARIANTS, Engine, EngineKey
from moebius_edge.runtimes.engine_memory import MemoryPlan, check_fits, plan_memory

Figures = dict[str, tuple[int, int]]
VAE: Figures = {"vae_encoder": (136_595_840, 413_990_912), "vae_decoder": (197_876_356, 679_391_744)}
PUBLISHED: dict[str, Figures] = {  # component -> weights and activations in bytes
    "float32": {
        "denoiser": (943_228_100, 3_358_769_152),
        "denoiser_shallow": (83_321_796, 2_459_526_656),
        "update": (148, 590_336),
        **VAE,
    },
    "float16": {
        "denoiser": (476_186_402, 1_683_481_088),
        "denoiser_shallow": (46_116_642, 1_233_866_240),
        "update": (148, 590_336),
        **VAE,
    },
}
NANO_FREE = 5_600_000_000  # of an 8 GB board
DESKTOP = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24_000_000_000, False, "13.0", 128)


def published(precision: str, pictures: int) -> tuple[Bundle, Engine]:
    """The published model's tensors and engines, without files."""
    components = resolved_components(512, StudentConfig().deep_channels)
    bundle: Any = object.__new__(Bundle)
    bundle.__dict__.update(path=Path("places2"), components=components, latent_size=64, precision=precision)
    bundle.__dict__.update(distilled_guidance=None)
    plans: Any = {}
    for name, (weights, activations) in PUBLISHED[precision].items():
        plans[name] = {"bytes": 1, "weights_bytes": weights, "activation_bytes": activations * pictures}
    rows = {name: [1, 1, pictures] if name.startswith("vae") else [1, 2, 2 * pictures] for name in plans}
    key = EngineKey(precision, "tensorrt", "10.3.0", ORIN.model, ("8.7",))
    settings: Any = {"max_batch": pictures, "workspace_bytes": None, "opt_level": None}
    return bundle, Engine(Path("engine"), 1, key, {}, plans, settings, rows, {})


def check(plan: MemoryPlan, bundle: Bundle, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_memory, "available_memory_bytes", lambda swap: None if swap else free)
    check_fits(plan, bundle, VARIANTS["tensorrt"], FakeCuda())  # type: ignore[arg-type]


def test_the_published_models_plan() -> None:
    """Activations count once: in five contexts of their own they would take 6.9 GB, and the set 8.3 GB."""
    plan = plan_memory(*published("float32", 1), DESKTOP)
    assert plan.weights_bytes == 1_361_022_240 and plan.activation_bytes == 3_358_769_152
    picture, latents, deep = 3 * 512 * 512 * 4, 64 * 64 * 4, StudentConfig().deep_channels * 64 * 64 * 4
    autoencoder = 2 * (picture + 4 * latents)
    denoiser = 2 * (9 * latents + 4 + 8 + 4 * latents) + 2 * deep
    update = 2 * (4 * latents + 4 + 4 + 6 * 4 + 9 * latents + 4 * latents + 4)
    sizes = {graph.graph: graph.buffers_bytes for graph in plan.graphs}
    assert sizes["denoiser_shallow"] == 0, "all of its tensors are the denoiser's"
    assert sizes["denoiser"] == denoiser and sizes["update"] == update
    assert sizes["vae_encoder"] + sizes["vae_decoder"] == autoencoder
    assert plan.total_bytes == 4_719_791_392 + sum(sizes.values())
    bundle, engine = published("float32", 4)
    engine.plans["denoiser"]["persistent_bytes"] = engine.plans["vae_decoder"]["persistent_bytes"] = 1_000_000
    contexts = {graph.graph: graph.contexts_bytes for graph in plan_memory(bundle, engine, DESKTOP).graphs}
    assert (contexts["denoiser"], contexts["vae_decoder"], contexts["update"]) == (4_000_000, 2_000_000, 0)
    assert plan_memory(*published("float32", 1), ORIN).buffers_bytes == 2 * plan.buffers_bytes, "its host twins too"


def test_an_8_gb_board_takes_one_picture_and_is_told_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("float32", "float16"):
        bundle, engine = published(precision, 1)
        check(plan_memory(bundle, engine, ORIN), bundle, NANO_FREE, monkeypatch)
    cases = [
        ("float32", 4, NANO_FREE, r"--engine tensorrt` with --max-batch 1$"),
        ("float16", 4, NANO_FREE, r"--engine tensorrt` with --max-batch 2$"),
        ("float32", 1, 3_000_000_000, r"or export the bundle with --precision fp16, which takes about half$"),
        (
            "float16",
            1,
            2_000_000_000,
            r"close other programs until 2\.\d\d GB are free, or use a GPU with more memory$",
        ),
    ]
    for precision, pictures, free, remedy in cases:
        bundle, engine = published(precision, pictures)
        with pytest.raises(OutOfMemory, match=remedy) as caught:
            check(plan_memory(bundle, engine, ORIN), bundle, free, monkeypatch)
        assert f"for {pictures} at a time need" in str(caught.value) and "swap does not help" in str(caught.value)
        assert f"and {free / 1e9:.2f} GB of the memory that the GPU shares" in str(caught.value)


def test_a_set_that_does_not_fit_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    figures = {"denoiser": {"weights_bytes": 2_000_000_000, "activation_bytes": 3_000_000_000}}
    write_engine(bundle, figures=figures)
    cuda = FakeCuda()
    runtime, package = trt_runtime(bundle, cuda)
    monkeypatch.setattr(engine_memory, "available_memory_bytes", lambda swap: 4_999_999_999)
    with pytest.raises(OutOfMemory, match=r"need 5\.00 GB \(weights 2\.00 GB, activations 3\.00 GB"), runtime:
        raise AssertionError("never entered")
    assert package.engines == [] and "allocate" not in cuda.calls and cuda.left() == []
    discrete = FakeCuda(DESKTOP)
    write_engine(bundle, figures=figures, gpu=DESKTOP.model, compute_capabilities=("8.9",))
    with pytest.raises(OutOfMemory, match=r"and 4\.00 GB on the GPU are free"), trt_runtime(bundle, discrete)[0]:
        raise AssertionError("never entered")
    discrete.free_bytes = 6_000_000_000
    with trt_runtime(bundle, discrete)[0]:
        assert len([size for size in map(len, discrete.memory.values()) if size == 2000]) == 1, "one for all contexts"
    assert discrete.left() == []


def test_inspect_shows_the_plan(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy_bundle(tmp_path / "toy")
    assert "no engines: `moebius-edge export" in _note(capsys, toy)
    figures = {"denoiser": {"weights_bytes": 2_000_000_000, "activation_bytes": 3_000_000_000}}
    write_engine(Bundle.load(toy), max_batch=3, figures=figures)
    monkeypatch.setattr("moebius_edge.runtimes.cuda.find_gpu", lambda: ORIN)
    lines = printed(capsys, "inspect", toy, "--memory")
    assert "denoiser 2.0 GB 3.0 GB 0 B 40.1 kB" in lines and "update 37 B 0 B 52.7 kB" in lines
    assert lines[-2:] == ["total 5.0 GB", "gpu memory 8.0 GB"]
    (engine,) = as_json(capsys, "inspect", toy, "--memory")["engines"]
    assert engine["memory"]["pictures"] == 3 and engine["memory"]["activation_bytes"] == 3_000_000_000
    assert engine["memory"]["graphs"][0]["activation_bytes"] is None, "this build has logged none"
    assert "memory" not in as_json(capsys, "inspect", toy)["engines"][0]
    make_toy_bundle(toy, deep=True)
    (engine,) = as_json(capsys, "inspect", toy, "--memory")["engines"]
    assert engine["state"].startswith("stale") and "memory" not in engine, "it is not this bundle's"


def _note(capsys: Captured, toy: Path) -> str:
    assert main(["inspect", str(toy), "--memory"]) == 0
    return capsys.readouterr().err
