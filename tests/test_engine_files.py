"""Engines on disk: their key, and the refusal of one that was built for or from something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_trt import ORIN, VERSION, write_engine
from toy import flip_byte, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import BundleError
from moebius_edge.runtimes.cuda import Gpu
from moebius_edge.runtimes.engine_files import (
    VARIANTS,
    Engine,
    EngineKey,
    build_command,
    choose_engine,
    engine_folders,
    read_engine,
)

ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24_000_000_000, False, "13.0")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def choose(bundle: Bundle, variant: str = "tensorrt", version: str = VERSION, gpu: Gpu = ORIN) -> Engine:
    return choose_engine(bundle, VARIANTS[variant], version, gpu)


def test_the_key_names_the_folder() -> None:
    key = EngineKey("fp16", "tensorrt", "10.3.0", "Orin (nvgpu)", ("8.7",))
    assert key.folder == "fp16-tensorrt-10.3.0-orin-nvgpu-sm87"
    several = replace(key, variant="tensorrt-rtx", gpu="any", compute_capabilities=("8.6", "12.0"))
    assert several.folder == "fp16-tensorrt-rtx-10.3.0-any-sm86-120"
    assert "/" not in replace(key, gpu="../../etc").folder and ".." not in replace(key, gpu="../../etc").folder


def test_what_was_written_is_read(bundle: Bundle) -> None:
    written = write_engine(bundle, max_batch=3)
    assert read_engine(written.path) == written
    assert choose(bundle) == written
    assert engine_folders(bundle.path) == [written.path]
    written.path.rename(written.path.with_name(".moebius-0123.part"))  # a build in progress
    assert engine_folders(bundle.path) == []
    with pytest.raises(BundleError, match="has no TensorRT engine"):
        choose(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": "10.4.0"},
            r"built with TensorRT 10\.4\.0 for GPU Orin .*, this machine has TensorRT 10\.3\.0 and Orin 8 SM 8 GB \(8",
        ),
        ({"gpu": "Xavier"}, r"for GPU Xavier \(compute capability 8\.7\), this machine has .* and Orin"),
        ({"gpu": "Orin 16 SM 64 GB"}, r"for GPU Orin 16 SM 64 GB \(.*, this machine has .* and Orin 8 SM 8 GB \(8"),
        ({"compute_capabilities": ("8.9",)}, r"compute capability 8\.9\), this machine .*8\.7"),
        ({"precision": "fp16"}, r"built with precision fp16, the bundle has float32"),
        (
            {"onnx": {"vae_encoder": "0" * 64, "denoiser": "0" * 64, "vae_decoder": "0" * 64}},
            "built from another vae_encoder.onnx than the bundle's",
        ),
    ],
)
def test_an_engine_of_something_else_is_refused_with_the_command(
    bundle: Bundle, changes: dict[str, Any], message: str
) -> None:
    write_engine(bundle, **changes)
    with pytest.raises(BundleError, match=message) as caught:
        choose(bundle)
    assert str(caught.value).endswith(f": run `moebius-edge export {bundle.path} --engine tensorrt`")
    assert caught.value.exit_code == 4


def test_one_that_fits_is_found_among_others_and_else_the_nearest_is_explained(bundle: Bundle) -> None:
    write_engine(bundle, version="9.0.0", precision="int8")
    write_engine(bundle, version="10.4.0")
    with pytest.raises(BundleError, match=r"built with TensorRT 10\.4\.0"):
        choose(bundle)
    write_engine(bundle, variant="tensorrt-rtx", gpu="any")
    (bundle.path / "engines" / "rubbish").mkdir()
    right = write_engine(bundle)
    assert choose(bundle) == right


def test_rtx_engines_run_on_any_card_of_their_generations(bundle: Bundle) -> None:
    engine = write_engine(bundle, variant="tensorrt-rtx", gpu="any", compute_capabilities=("8.6", "8.9"))
    assert choose(bundle, "tensorrt-rtx", gpu=ADA) == engine
    with pytest.raises(BundleError, match=r"for GPU any \(compute capability 8\.6, 8\.9\), this machine has .*8\.7"):
        choose(bundle, "tensorrt-rtx")
    with pytest.raises(BundleError, match="has no TensorRT engine"):
        choose(bundle, "tensorrt", gpu=ADA)


def test_an_altered_truncated_or_missing_plan_is_refused(bundle: Bundle) -> None:
    """What is missing or has another size before anything is loaded, another content when it is mapped."""
    engine = write_engine(bundle)
    path = engine.plan_path("denoiser")
    content = path.read_bytes()
    with choose(bundle).map_plan("denoiser", "mend it") as plan:
        assert bytes(plan) == content
        with pytest.raises(TypeError):
            plan[0] = 0
    flip_byte(path)
    with pytest.raises(BundleError, match=r"denoiser\.plan was altered, its SHA-256 is not the recorded one: mend it"):
        choose(bundle).map_plan("denoiser", "mend it")
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"denoiser\.plan has \d+ bytes, \d+ are recorded: run .*tensorrt` --force"):
        choose(bundle)
    path.unlink()
    with pytest.raises(BundleError, match=r"denoiser\.plan is missing: run"):
        choose(bundle)


def change(*keys: str | int, value: Any = None) -> Any:
    """Sets a field, or deletes it where the value is None."""

    def apply(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        if value is None:
            del document[keys[-1]]
        else:
            document[keys[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("schema_version", value=9), "schema_version is 9, expected 1: run `pip install --upgrade"),
        (change("plans"), "plans is missing"),
        (change("plans", "denoiser"), "plans.denoiser is missing"),
        (change("plans", "update"), "plans.update is missing"),
        (change("profiles", "update"), "profiles.update is missing"),
        (change("plans", "denoiser", "bytes", value="many"), "plans.denoiser.bytes is 'many', expected a valid int"),
        (change("plans", "update", "sha256", value="0"), "plans.update.sha256 is '0', expected to match pattern"),
        (change("plans", "denoiser", "file", value="../../x"), r"'\.\./\.\./x' leaves the folder"),
        (change("plans", "denoiser", "file", value="a\0"), r"the text 'a\\x00' has characters that cannot be printed"),
        (change("key", "colour", value="red"), "key.colour is an unknown field"),
        (change("key", value=3), "key is 3, expected an object"),
        (change("key", "compute_capabilities", value="8.7"), "compute_capabilities is '8.7', expected a valid tuple"),
        (change("key", "compute_capabilities", 0, value=[]), r"compute_capabilities.0 is \[\], expected a valid str"),
        (change("settings", "max_batch", value=0), "settings.max_batch is 0, expected greater than or equal to 1"),
        (change("onnx", value={"denoiser": 5}), "onnx.denoiser is 5, expected a valid string"),
        (change("profiles", "denoiser", value=[1, 2]), "profiles.denoiser is .1, 2., expected to have at least 3"),
    ],
)
def test_a_damaged_description_is_refused(bundle: Bundle, damage: Any, message: str) -> None:
    engine = write_engine(bundle)
    path = engine.path / "engine.json"
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=message) as caught:
        choose(bundle)
    assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(BundleError, match="this is not valid JSON .*remove it with `rm -r "):
        choose(bundle)
    path.unlink()
    with pytest.raises(BundleError, match=r"holds no engine\.json, so it is no engine: remove it"):
        choose(bundle)


def test_the_command_suits_the_bundle(tmp_path: Path) -> None:
    rtx = VARIANTS["tensorrt-rtx"]
    assert build_command(Bundle.load("tiny"), rtx) == "moebius-edge export tiny --engine tensorrt-rtx --output DIR"
    spaced = Bundle.load(make_toy_bundle(tmp_path / "a toy"))
    assert build_command(spaced, rtx) == f"moebius-edge export '{tmp_path}/a toy' --engine tensorrt-rtx"
