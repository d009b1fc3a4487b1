"""``moebius-edge inspect``: everything a bundle says of itself, and refusal of one that lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_trt import write_engine
from toy import INT8, call_int8, flip_byte, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.cli import main
from moebius_edge.system.files import sha256_file

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


def test_a_person_sees_what_it_is(toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", str(toy)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "toy: three toy graphs for tests"
    facts = dict(line.split(maxsplit=1) for line in lines[2:10])
    assert facts["path"] == str(toy)
    assert facts["images"] == "64x64 pixels, latent 8x8"
    assert facts["defaults"] == "steps 20, guidance 2, start image"
    assert facts["gate"] == "psnr_db 99"
    rows = [line.split() for line in lines]
    assert ["denoiser.onnx", *sizes(toy), sha256_file(toy / "denoiser.onnx")[:16], "verified"] in rows
    assert ["denoiser", "in", "sample", "float32", "N", "x", "9", "x", "8", "x", "8"] in rows
    assert ["in", "branch", "int64", "N"] in rows
    assert err == ""


def test_what_stayed_float32_is_counted(toy: Path, capsys: Captured) -> None:
    manifest = json.loads((toy / "bundle.json").read_text())
    islands = {"denoiser": {"Softmax": ["a", "b"], "Sin": ["c"]}, "vae_decoder": "all"}
    (toy / "bundle.json").write_text(json.dumps({**manifest, "precision": "float16", "float32_islands": islands}))
    assert main(["inspect", str(toy)]) == 0
    out = capsys.readouterr().out
    assert "in float32  denoiser: 2 Softmax, 1 Sin; vae_decoder: all" in out
    assert main(["inspect", str(toy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["float32_islands"] == islands


def test_an_int8_bundle_is_shown_block_by_block(toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["inspect", str(toy)]) == 0
    assert "multiplications" not in capsys.readouterr().out
    call_int8(toy)
    assert main(["inspect", str(toy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = "int8         for tensorrt, 3 of 5 products, 75.0% of the multiplications, the rest float16, ranges mse"
    assert " ".join(said.split()) in [" ".join(line.split()) for line in lines]
    rows = [line.split() for line in lines[-3:]]
    assert rows == [["a", "45.0", "50.00%", "yes"], ["b", "33.5", "41.0", "25.00%", "smoothed"], ["c", "25.00%", "no"]]
    assert main(["inspect", str(toy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["int8"] == INT8
    content = {key: value for key, value in INT8.items() if key != "blocks"}
    (toy / "bundle.json").write_text(
        json.dumps({**json.loads((toy / "bundle.json").read_text()), "precision": "int8", "int8": content})
    )
    assert main(["inspect", str(toy)]) == 0, "a table is not what a bundle is made of"


def test_what_can_be_reused_is_shown(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["inspect", str(toy)]) == 0
    assert "\nreuse" not in capsys.readouterr().out
    assert main(["inspect", str(make_toy_bundle(tmp_path / "deep", deep=True))]) == 0
    out = capsys.readouterr().out
    assert "\nreuse       deep features of 4 channels, with run --cache-interval N\n" in out
    assert "denoiser_shallow.onnx" in out


def test_distilled_guidance_is_shown(toy: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["inspect", str(toy)]) == 0
    assert not any(line.startswith("guidance ") for line in capsys.readouterr().out.splitlines())
    distilled = make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.5)
    assert main(["inspect", str(distilled)]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["guidance", "2.5, distilled into the network: one call a step"] in lines
    assert main(["inspect", str(distilled), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["distilled_guidance"], document["schema_version"]) == (2.5, 3)


def sizes(toy: Path) -> list[str]:
    return [f"{(toy / 'denoiser.onnx').stat().st_size / 1000:.1f}", "kB"]


def test_json_holds_all(toy: Path, capsys: Captured) -> None:
    assert main(["inspect", str(toy), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    manifest = json.loads((toy / "bundle.json").read_text())
    for key in ("name", "resolution", "precision", "files", "gate", "tools", "source", "model", "defaults"):
        assert document[key] == manifest[key], key
    assert document["verified"] is True
    assert document["components"]["denoiser"]["inputs"]


def test_an_altered_bundle_is_refused_unless_told_otherwise(toy: Path, capsys: Captured) -> None:
    flip_byte(toy / "vae_decoder.onnx")
    assert main(["inspect", str(toy)]) == 4
    out, err = capsys.readouterr()
    assert out == "" and "vae_decoder.onnx was altered" in err
    assert main(["inspect", str(toy), "--no-verify"]) == 0
    out = capsys.readouterr().out
    assert "size only" in out and "verified" not in out


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: Captured) -> None:
    assert main(["inspect", str(tmp_path)]) == 4
    assert "holds no bundle.json" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none"), "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["exit_code"] == 4


def test_engines_are_listed(toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(toy)]) == 0
    assert "GPU" not in capsys.readouterr().out, "no table without engines"
    bundle = Bundle.load(toy)
    right = write_engine(bundle, max_batch=4)
    write_engine(bundle, version="10.4.0", onnx=dict.fromkeys(bundle.components, "0" * 64))
    flip_byte(write_engine(bundle, version="10.5.0").plan_path("denoiser"))
    (toy / "engines" / "rubbish").mkdir()
    assert main(["inspect", str(toy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[-7:-3]]
    names = [*(f"float32-tensorrt-10.{minor}.0-orin-sm87" for minor in (3, 4, 5)), "rubbish"]
    assert [row[0] for row in rows] == names
    assert rows[0][1:4] == ["Orin", "(8.7)", "4"]
    assert [row[-1] for row in rows] == ["verified", "stale", "damaged", "damaged"]
    assert lines[-3] == f"{names[1]} is stale: built from another vae_encoder.onnx than the bundle's"
    assert lines[-2].startswith(f"{names[2]} is damaged: {toy}/engines/") and "SHA-256" in lines[-2]
    assert lines[-1].startswith("rubbish is damaged: ") and "holds no engine.json" in lines[-1]
    assert main(["inspect", str(toy), "--no-verify", "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert engines[0]["path"] == str(right.path) and engines[0]["key"]["gpu"] == "Orin"
    assert [row["state"].split(":")[0] for row in engines] == ["not verified", "stale", "not verified", "damaged"]


def test_a_long_list_is_shown_by_its_ends() -> None:
    from moebius_edge.commands.inspect import _flat

    assert _flat({"drift": [0.5, *range(17), 2.0], "shape": [1, 2]}) == [
        ("drift", "(0.5 .. 2.0, 19 values)"),
        ("shape", "(1, 2)"),
    ]
