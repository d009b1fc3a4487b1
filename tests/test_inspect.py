"""``moebius-edge inspect``: everything a bundle says of itself, and refusal of one that lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commanding import Captured, as_json, printed, refused
from fake_trt import write_engine
from toy import INT8, call_int8, flip_byte, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.system.files import sha256_file


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


def test_a_person_sees_what_it_is(toy: Path, capsys: Captured) -> None:
    lines = printed(capsys, "inspect", toy)
    assert lines[0] == "toy: three toy graphs for tests"
    for line in (f"path {toy}", "resolution 64", "defaults steps 20, guidance 2, start image", "gate psnr db 99"):
        assert line in lines
    denoiser = toy / "denoiser.onnx"
    size = f"{denoiser.stat().st_size / 1000:.1f} kB"
    assert f"denoiser.onnx {size} {sha256_file(denoiser)[:16]} verified" in lines
    assert "denoiser in sample float32 N x 9 x 8 x 8" in lines and "denoiser in branch int64 N" in lines
    assert not any(line.startswith(("int8", "engine ", "block", "distilled", "deep")) for line in lines)


def test_json_holds_all(toy: Path, capsys: Captured) -> None:
    document = as_json(capsys, "inspect", toy)
    manifest = json.loads((toy / "bundle.json").read_text())
    for key in ("name", "resolution", "precision", "files", "gate", "tools", "source", "model", "defaults"):
        assert document[key] == manifest[key], key
    assert document["verified"] is True and document["components"]["denoiser"]["inputs"]


def test_what_makes_a_bundle_special_is_shown(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    """Operators left in float32, features that can be reused, distilled guidance."""
    manifest = json.loads((toy / "bundle.json").read_text())
    islands = {"denoiser": {"Softmax": ["a", "b"], "Sin": ["c"]}, "vae_decoder": "all"}
    (toy / "bundle.json").write_text(json.dumps({**manifest, "precision": "float16", "float32_islands": islands}))
    line = "float32 islands denoiser.Softmax a x b, denoiser.Sin c, vae decoder all"
    assert line in printed(capsys, "inspect", toy)
    assert as_json(capsys, "inspect", toy)["float32_islands"] == islands
    lines = printed(capsys, "inspect", make_toy_bundle(tmp_path / "deep", deep=True))
    assert "deep channels 4" in lines and any(line.startswith("denoiser_shallow.onnx") for line in lines)
    distilled = make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.5)
    assert "distilled guidance 2.5" in printed(capsys, "inspect", distilled)
    assert as_json(capsys, "inspect", distilled)["distilled_guidance"] == 2.5


def test_an_int8_bundle_is_shown_block_by_block(toy: Path, capsys: Captured) -> None:
    lines = printed(capsys, "inspect", call_int8(toy))
    (line,) = (line for line in lines if line.startswith("int8 "))
    assert line.startswith("int8 rest float16, ranges mse, quantised products 3, products 5, share")
    assert lines[-3:] == ["a 0.5 yes 45.04", "b 0.25 yes 33.5 41 yes", "c 0.25 no"]
    assert as_json(capsys, "inspect", toy)["int8"] == INT8


def test_an_altered_bundle_is_refused_unless_told_otherwise(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    flip_byte(toy / "vae_decoder.onnx")
    refused(capsys, 4, "vae_decoder.onnx was altered", "inspect", toy)
    lines = printed(capsys, "inspect", toy, "--no-verify")
    assert any(line.endswith("size only") for line in lines) and not any("verified" in line for line in lines)
    refused(capsys, 4, "holds no bundle.json", "inspect", tmp_path)
    assert "error" in as_json(capsys, "inspect", tmp_path / "none", code=4)


def test_engines_are_listed(toy: Path, capsys: Captured) -> None:
    bundle = Bundle.load(toy)
    right = write_engine(bundle, max_batch=4)
    write_engine(bundle, version="10.4.0", onnx=dict.fromkeys(bundle.components, "0" * 64))
    flip_byte(write_engine(bundle, version="10.5.0").plan_path("denoiser"))
    (toy / "engines" / "rubbish").mkdir()
    lines = printed(capsys, "inspect", toy)
    rows = [line.split() for line in lines[-7:-3]]
    names = [*(f"float32-tensorrt-10.{minor}.0-orin-8-sm-8-gb-sm87" for minor in (3, 4, 5)), "rubbish"]
    assert [row[0] for row in rows] == names and rows[0][1:8] == ["Orin", "8", "SM", "8", "GB", "8.7", "4"]
    assert [row[-1] for row in rows] == ["verified", "stale", "damaged", "damaged"]
    assert lines[-3] == f"{names[1]} is stale: built from another vae_encoder.onnx than the bundle's"
    assert lines[-2].startswith(f"{names[2]} is damaged: {toy}/engines/") and "SHA-256" in lines[-2]
    assert lines[-1].startswith("rubbish is damaged: ") and "holds no engine.json" in lines[-1]
    engines = as_json(capsys, "inspect", toy, "--no-verify")["engines"]
    assert engines[0]["path"] == str(right.path) and engines[0]["key"]["gpu"] == "Orin 8 SM 8 GB"
    assert [row["state"].split(":")[0] for row in engines] == ["not verified", "stale", "not verified", "damaged"]
