"""``moebius-edge run`` from the outside: files in, files and text out, and every bad input of the list."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeGpu
from PIL import Image
from toy import flip_byte, make_toy_bundle

from moebius_edge.cli import main
from moebius_edge.pipeline.presets import PRESETS

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("bundles") / "toy")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write_pair(
    folder: Path, stem: str = "photo", suffix: str = ".png", size: tuple[int, int] = (96, 80)
) -> None:
    """An image and its mask, 16 by 16 pixels white in the middle."""
    width, height = size
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(stem.encode())).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(folder / f"{stem}{suffix}")
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 - 8 : height // 2 + 8, width // 2 - 8 : width // 2 + 8] = 255
    Image.fromarray(mask).save(folder / f"{stem}_mask.png")


def run(toy: Path, *arguments: str | Path) -> int:
    return main(["run", *map(str, arguments), "--bundle", str(toy)])


def contents(folder: Path) -> set[str]:
    """Every name below a folder, hidden temporary files included."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- one picture -----------------------------------------------------------------------------------------


def test_a_picture_is_filled_and_the_rest_is_untouched(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    before = contents(here)
    assert run(toy, "photo.png", "photo_mask.png", "--feather", "4") == 0
    out, err = capsys.readouterr()
    assert contents(here) - before == {"photo_inpainted.png"}
    assert out.splitlines()[0] == "saved photo_inpainted.png"
    assert "start image, 19 of 20 steps, guidance 2, strength 0.99, ddim, seed 0\n" in out
    assert "bundle toy (float32), onnxruntime 1." in out and " on cpu\n" in out
    assert "error" not in err and "demonstration" not in err

    original, result = (np.asarray(Image.open(here / f"photo{e}.png")) for e in ("", "_inpainted"))
    assert result.shape == original.shape
    hole = np.asarray(Image.open(here / "photo_mask.png")) > 127
    assert (result[hole] != original[hole]).any(axis=-1).mean() > 0.9
    far = np.ones_like(hole)
    far[80 // 2 - 13 : 80 // 2 + 13, 96 // 2 - 13 : 96 // 2 + 13] = False
    assert (result[far] == original[far]).all()


def test_the_table_is_complete_and_fits_80_columns(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write_pair(here)
    assert run(toy, "photo.png", "photo_mask.png") == 0
    lines = capsys.readouterr().out.splitlines()
    (header,) = (line.split() for line in lines if line.startswith("latency (ms)"))
    assert header == ["latency", "(ms)", "count", "first", "median", "p95", "p99", "total"]
    rows = {
        line.split()[0]: line.split()[1:]
        for line in lines
        if line and line.split()[1:2] in (["1"], ["2"], ["19"])
    }
    assert set(rows) == {
        "load",
        "read",
        "write",
        "preprocess",
        "vae_encode",
        "denoise",
        "vae_decode",
        "stitch",
        "total",
    }
    assert len(rows["denoise"]) == 6 and rows["denoise"][0] == "19"
    assert len(rows["load"]) == 3, "one value has no median"
    assert all(len(line) <= 80 for line in lines if not line.startswith("total is one"))


def test_settings_are_passed_on_and_named(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    options = "--steps 8 --guidance 1 --start prefill --strength 0.5 --seed 7 --scheduler dpm++2m --json"
    assert run(toy, "photo.png", "photo_mask.png", *options.split()) == 0
    document = json.loads(capsys.readouterr().out)
    (entry,) = document["results"]
    expected = {
        "steps": 8,
        "steps_executed": 4,
        "guidance": 1.0,
        "start": "prefill",
        "strength": 0.5,
        "seed": 7,
        "scheduler": "dpm++2m",
        "generator": "PCG64",
        "windows": 1,
        "network_calls": 4,
        "match_colours": True,
    }
    assert {name: entry["settings"][name] for name in expected} == expected
    assert document["latency"]["stages"]["denoise"]["count"] == 4


def test_what_is_not_chosen_is_the_bundles(here: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = make_toy_bundle(tmp_path / "own")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["defaults"] = {"steps": 6, "guidance": 1.5, "start": "prefill"}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    write_pair(here)
    assert run(folder, "photo.png", "photo_mask.png", "--guidance", "0", "--json") == 0
    settings = json.loads(capsys.readouterr().out)["results"][0]["settings"]
    assert (settings["steps"], settings["guidance"], settings["start"]) == (6, 0.0, "prefill"), (
        "0 is a choice"
    )


def test_guidance_on_an_interval_is_named_and_reported(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    chosen = ("--guidance-interval", "200,800", "--latency-report", "report.json")
    assert run(toy, "photo.png", "photo_mask.png", *chosen) == 0
    assert ", guidance 2 at timesteps 200 to below 800, strength 0.99" in capsys.readouterr().out
    assert json.loads((here / "report.json").read_text())["settings"]["guidance_interval"] == [200, 800]
    assert run(toy, "photo.png", "photo_mask.png", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)["results"]
    assert entry["settings"]["guidance_interval"] is None and entry["settings"]["preset"] is None


def test_an_interval_out_of_range_or_beside_distilled_guidance(
    here: Path, toy: Path, tmp_path: Path, capsys: Captured
) -> None:
    write_pair(here)
    message = "guidance interval is 800,200: give LOW,HIGH with 0 <= LOW <= HIGH <= 1000, such as 200,800"
    refused(2, message, here, toy, capsys, "photo.png", "photo_mask.png", "--guidance-interval", "800,200")
    distilled = make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.5)
    message = "guidance interval is 0,500, and the model has guidance 2.5 distilled into it"
    refused(2, message, here, distilled, capsys, "photo.png", "photo_mask.png", "--guidance-interval", "0,500")


def test_deep_features_are_reused_where_the_bundle_can(here: Path, toy: Path, tmp_path: Path, capsys: Captured) -> None:
    deep = make_toy_bundle(tmp_path / "deep", deep=True)
    write_pair(here)
    assert run(deep, "photo.png", "photo_mask.png", "--cache-interval", "3", "--latency-report", "report.json") == 0
    assert ", 19 of 20 steps, deep features every 3, guidance 2, " in capsys.readouterr().out
    assert json.loads((here / "report.json").read_text())["settings"]["cache_interval"] == 3
    message = "was exported without the part that reuses deep features: leave it out, or export the checkpoint again"
    refused(2, message, here, toy, capsys, "photo.png", "photo_mask.png", "--cache-interval", "3")
    assert run(toy, "photo.png", "photo_mask.png", "--preset", "fast") == 0
    captured = capsys.readouterr()
    assert "note: preset fast reuses deep features, and bundle toy was exported without" in captured.err
    assert "deep features" not in captured.out


def test_a_preset_takes_the_place_of_the_bundles_settings(here: Path, tmp_path: Path, capsys: Captured) -> None:
    toy = make_toy_bundle(tmp_path / "deep", deep=True)
    write_pair(here)
    assert run(toy, "photo.png", "photo_mask.png", "--preset", "fast", "--latency-report", "report.json") == 0
    out, err = capsys.readouterr()
    assert "\npreset fast, start image, " in out and "was chosen" not in err
    settings = json.loads((here / "report.json").read_text())["settings"]
    for name, value in PRESETS["fast"]["image"].items():
        assert settings[name] == (list(value) if isinstance(value, tuple) else value)
    assert settings["preset"] == "fast"
    assert (settings["start"], settings["strength"], settings["guidance"], settings["seed"]) == ("image", 0.99, 2.0, 0)


def test_what_is_chosen_beside_a_preset_holds_and_is_said(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    options = "--preset fast --steps 7 --guidance-interval 0,1000 --cache-interval 1 --scheduler dpm++2m --start noise"
    assert run(toy, "photo.png", "photo_mask.png", *options.split(), "--json") == 0
    out, err = capsys.readouterr()
    settings = json.loads(out)["results"][0]["settings"]
    assert (settings["steps"], settings["guidance_interval"], settings["start"]) == (7, [0, 1000], "noise")
    fast = PRESETS["fast"]["noise"]
    low, high = fast["guidance_interval"]
    assert f"note: preset fast has steps {fast['steps']}, and 7 was chosen\n" in err
    assert f"preset fast has guidance interval {low},{high}, and 0,1000 was chosen\n" in err
    assert f"note: preset fast has cache interval {fast['cache_interval']}, and 1 was chosen\n" in err
    assert err.count("was chosen") == 3 + (fast["scheduler"] != "dpm++2m")


def test_distilled_guidance_costs_one_row_and_is_named(here: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.5)  # NaN on the unconditional branch
    write_pair(here)
    assert run(folder, "photo.png", "photo_mask.png", "--latency-report", "report.json") == 0
    assert ", guidance 2.5 (distilled, one call a step), strength 0.99" in capsys.readouterr().out
    settings = json.loads((here / "report.json").read_text())["settings"]
    assert (settings["guidance"], settings["distilled_guidance"]) == (2.5, 2.5)
    assert run(folder, "photo.png", "photo_mask.png", "--guidance", "2.5", "--json") == 0
    settings = json.loads(capsys.readouterr().out)["results"][0]["settings"]
    assert (settings["guidance"], settings["distilled_guidance"]) == (2.5, 2.5)


def test_another_guidance_than_the_distilled_ends_a_batch_at_once(
    here: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder = make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.5)
    for stem in ("one", "two"):
        write_pair(here / "in", stem)
    assert run(folder, "in", "in", "-o", "out", "--guidance", "1") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: guidance is 1.0, and the model has guidance 2.5 distilled into it and takes no other: leave it out, "
        "or use a model without distilled guidance"
    ]
    assert not (here / "out").exists()


@pytest.mark.parametrize(("chosen", "strength"), [((), 0.5), (("--start", "noise"), 1.0), (("--strength", "1"), 1.0)])
def test_a_bundles_strength_goes_with_its_start_alone(
    here: Path, tmp_path: Path, capsys: Captured, chosen: tuple[str, ...], strength: float
) -> None:
    folder = make_toy_bundle(tmp_path / "own")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["defaults"] = {"steps": 6, "guidance": 1, "start": "prefill", "strength": 0.5}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    write_pair(here)
    assert run(folder, "photo.png", "photo_mask.png", "--json", *chosen) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["settings"]["strength"] == strength


def test_json_is_the_only_thing_on_stdout(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    assert run(toy, "photo.png", "photo_mask.png", "-o", "out.jpg", "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["exit_code"] == 0
    (entry,) = document["results"]
    assert (entry["image"], entry["mask"], entry["output"]) == ("photo.png", "photo_mask.png", "out.jpg")
    assert entry["notes"] == [
        "out.jpg is JPEG, which is lossy: pixels outside the mask change slightly; .png keeps them"
    ]
    assert "note: out.jpg is JPEG" in err
    assert document["latency"]["runtime"]["name"] == "onnxruntime"
    assert document["latency"]["stages"]["total"]["count"] == 1


def test_latency_report(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    assert run(toy, "photo.png", "photo_mask.png", "--latency-report", "latency.json") == 0
    assert "latency report latency.json\n" in capsys.readouterr().out
    report = json.loads((here / "latency.json").read_text())
    assert report["schema_version"] == 1
    assert report["bundle"]["name"] == "toy"
    assert report["settings"]["steps_executed"] == 19
    assert report["stages"]["denoise"]["count"] == 19
    denoise = report["stages"]["denoise"]
    assert 0 < denoise["median_ms"] <= denoise["p95_ms"] <= denoise["p99_ms"] <= denoise["total_ms"]
    total = report["stages"]["total"]["total_ms"]
    assert total >= sum(
        report["stages"][s]["total_ms"] for s in ("denoise", "vae_encode", "vae_decode", "stitch")
    )
    assert report["peak_memory_bytes"] > 1 << 20
    assert report["machine"]["cpu"]["cores_available"] >= 1


def test_masks_inverted_dilated_and_empty(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    common = ("photo.png", "photo_mask.png", "--feather", "0")
    original = np.asarray(Image.open("photo.png"))
    assert run(toy, *common, "-o", "dilated.png", "--mask-dilate", "4") == 0
    changed = (np.asarray(Image.open("dilated.png")) != original).any(axis=-1)
    assert 16 * 16 < changed.sum() <= 24 * 24

    Image.fromarray(np.zeros((80, 96), np.uint8)).save("empty.png")
    capsys.readouterr()
    assert run(toy, "photo.png", "empty.png", "-o", "same.png") == 0
    assert "note: mask is empty: image returned unchanged" in capsys.readouterr().err
    assert (np.asarray(Image.open("same.png")) == original).all()

    assert run(toy, "photo.png", "empty.png", "-o", "all.png", "--invert-mask") == 0
    said = capsys.readouterr().err
    assert "mask covers 100% of the image" in said and "leave out --invert-mask if white marks the hole" in said


def test_what_marks_the_hole_is_found_out_or_chosen(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    mask = np.asarray(Image.open(here / "photo_mask.png"))
    Image.fromarray(np.dstack([mask, mask * 0, mask * 0])).save(here / "red.png")
    assert run(toy, "photo.png", "photo_mask.png", "-o", "white.png") == 0
    capsys.readouterr()
    assert run(toy, "photo.png", "red.png", "-o", "red_filled.png", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)["results"]
    assert entry["notes"] == ["mask red.png has red (#ff0000) strokes on black (#000000): the strokes are filled"]
    labels = mask // 255 + np.uint8(2) * (np.arange(96) < 20).astype(np.uint8)
    Image.fromarray(labels).save(here / "labels.png")
    message = "has 3 grey levels, 0, 1 and 2: --mask-from index:N fills one"
    refused(2, message, here, toy, capsys, "photo.png", "labels.png")
    assert run(toy, "photo.png", "labels.png", "-o", "label.png", "--mask-from", "index:1") == 0
    assert len({(here / name).read_bytes() for name in ("white.png", "red_filled.png", "label.png")}) == 1
    capsys.readouterr()
    message = "--mask-from purple is unknown: choose alpha, luma, red, green, blue, or index:N"
    refused(2, message, here, toy, capsys, "photo.png", "labels.png", "--mask-from", "purple")


def test_swapped_arguments_are_recognised(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    refused(2, "are IMAGE and MASK swapped?", here, toy, capsys, "photo_mask.png", "photo.png")


def test_a_mask_of_the_picture_before_its_rotation(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(here / "photo.png").save(here / "turned.png", exif=exif)
    assert run(toy, "turned.png", "photo_mask.png", "-o", "out.png") == 0
    assert "has the sides of the picture before its EXIF rotation: turned with it" in capsys.readouterr().err
    original, result = (np.asarray(Image.open(here / name)) for name in ("photo.png", "out.png"))
    hole = np.rot90(np.asarray(Image.open(here / "photo_mask.png")) > 0, -1)
    assert (np.rot90(original, -1) != result).any(axis=-1)[hole].mean() > 0.9


def test_the_same_command_gives_the_same_bytes(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    for name in ("a.png", "b.png"):
        assert run(toy, "photo.png", "photo_mask.png", "-o", name, "--seed", "3") == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


def test_an_output_folder_takes_the_default_name(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    (here / "out").mkdir()
    assert run(toy, "photo.png", "photo_mask.png", "-o", "out") == 0
    assert contents(here / "out") == {"photo_inpainted.png"}


def test_odd_names_are_printed_as_they_are(here: Path, toy: Path, capsys: Captured) -> None:
    long = "a photo [red]with[bold] " + "much " * 20 + "é.png"
    write_pair(here)
    assert run(toy, "photo.png", "photo_mask.png", "-o", long) == 0
    assert f"saved {long}\n" in capsys.readouterr().out
    assert (here / long).is_file()


def test_the_bundled_model_says_that_it_is_a_demonstration(
    here: Path, tmp_path: Path, capsys: Captured
) -> None:
    write_pair(here)
    assert run(make_toy_bundle(tmp_path / "t", name="tiny"), "photo.png", "photo_mask.png") == 0
    err = capsys.readouterr().err
    assert (
        "note: tiny is a small demonstration model; for the published weights run `moebius-edge download"
        in err
    )


# --- bad input: one line, the documented code, nothing written -------------------------------------------


def refused(code: int, message: str, here: Path, toy: Path, capsys: Captured, *arguments: str | Path) -> str:
    """Run, and check that it fails as documented and leaves the folder as it was. Returns the message."""
    before = contents(here)
    assert run(toy, *arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert "Traceback" not in err
    assert contents(here) == before
    return errors[0]


def test_missing_files(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    refused(3, "there is no image nowhere.png", here, toy, capsys, "nowhere.png", "photo_mask.png")
    refused(3, "there is no mask nowhere.png", here, toy, capsys, "photo.png", "nowhere.png")


def test_truncated_and_false_pictures(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    (here / "cut.png").write_bytes((here / "photo.png").read_bytes()[:2000])
    refused(2, "cut.png", here, toy, capsys, "cut.png", "photo_mask.png")
    (here / "text.png").write_text("this is no picture\n")
    refused(2, "text.png", here, toy, capsys, "text.png", "photo_mask.png")
    refused(2, "text.png", here, toy, capsys, "photo.png", "text.png")
    (here / "empty.png").write_bytes(b"")
    refused(2, "empty.png", here, toy, capsys, "empty.png", "photo_mask.png")


def test_a_huge_header_is_refused_before_decoding(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    (here / "huge.png").write_bytes(data)
    refused(2, "30000x30000", here, toy, capsys, "huge.png", "photo_mask.png")


def test_a_mask_of_another_size_names_both(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    write_pair(here, "other", size=(64, 48))
    message = refused(2, "64x48", here, toy, capsys, "photo.png", "other_mask.png")
    assert "96x80" in message


def test_damaged_bundles(here: Path, tmp_path: Path, capsys: Captured) -> None:
    write_pair(here)
    pair = ("photo.png", "photo_mask.png")
    flipped = make_toy_bundle(tmp_path / "flipped")
    flip_byte(flipped / "denoiser.onnx")
    refused(4, "denoiser.onnx was altered", here, flipped, capsys, *pair)

    missing = make_toy_bundle(tmp_path / "missing")
    (missing / "vae_decoder.onnx").unlink()
    refused(4, "vae_decoder.onnx is missing", here, missing, capsys, *pair)

    unknown = make_toy_bundle(tmp_path / "unknown")
    manifest = json.loads((unknown / "bundle.json").read_text())
    (unknown / "bundle.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    refused(4, "99", here, unknown, capsys, *pair)

    refused(4, "there is no bundle folder", here, tmp_path / "none", capsys, *pair)


@pytest.mark.parametrize("component", ["vae_encoder", "denoiser", "vae_decoder"])
def test_nan_weights_end_the_run_with_the_stage(
    component: str, here: Path, tmp_path: Path, capsys: Captured
) -> None:
    write_pair(here)
    bundle = make_toy_bundle(tmp_path / "nan", nan_in=component)
    refused(4, f"{component} returned NaN", here, bundle, capsys, "photo.png", "photo_mask.png")


def test_a_full_disk(here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(here)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moebius_edge.imaging.pictures.write_png", full)
    message = refused(3, "cannot write photo_inpainted.png", here, toy, capsys, "photo.png", "photo_mask.png")
    assert "the disk is full" in message


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_file_system_that_takes_no_more(here: Path, toy: Path) -> None:
    """A real failing write, by the system's limit on a file's size."""
    write_pair(here, size=(640, 480))
    before = contents(here)
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from moebius_edge.cli import main\n"
        f"sys.exit(main(['run', 'photo.png', 'photo_mask.png', '--bundle', {str(toy)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "error: cannot write photo_inpainted.png" in done.stderr and "Traceback" not in done.stderr
    assert contents(here) == before


def test_outputs_that_cannot_be_written_fail_before_any_work(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(here)
    monkeypatch.setattr("moebius_edge.imaging.pictures.read_picture", lambda path: pytest.fail("the picture was read"))
    pair = ("photo.png", "photo_mask.png")
    refused(3, "there is no folder no: run `mkdir -p no`", here, toy, capsys, *pair, "-o", "no/out.png")
    refused(
        2, "output out.xyz has extension .xyz: use one of .png", here, toy, capsys, *pair, "-o", "out.xyz"
    )
    refused(2, "output out has no extension", here, toy, capsys, *pair, "-o", "out")
    refused(2, "the output photo.png is the image itself", here, toy, capsys, *pair, "-o", "photo.png")
    refused(2, "photo_mask.png is the mask itself", here, toy, capsys, *pair, "-o", "./photo_mask.png")
    os.symlink("photo.png", "link.png")
    refused(2, "the output link.png is the image itself", here, toy, capsys, *pair, "-o", "link.png")
    refused(2, "photo.png is one of the pictures", here, toy, capsys, *pair, "--latency-report", "photo.png")
    refused(3, "there is no folder no", here, toy, capsys, *pair, "--latency-report", "no/latency.json")
    refused(2, "is no file", here, toy, capsys, *pair, "--latency-report", ".")
    if sys.platform == "linux":
        refused(3, "cannot write to /proc", here, toy, capsys, *pair, "-o", "/proc/out.png")
    (here / "old.png").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    refused(3, "cannot write old.png, it is write-protected", here, toy, capsys, *pair, "-o", "old.png")


def test_a_folder_and_a_file_do_not_mix(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    (here / "masks").mkdir()
    refused(2, "photo.png is a file but masks is a folder", here, toy, capsys, "photo.png", "masks")


def test_unknown_runtime_and_missing_device(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here)
    pair = ("photo.png", "photo_mask.png")
    refused(2, "unknown runtime 'caffe'", here, toy, capsys, *pair, "--runtime", "caffe")
    refused(2, "no device 'tpu'", here, toy, capsys, *pair, "--device", "tpu")


def test_the_choice_of_a_device_is_told_where_there_is_one(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(here)
    monkeypatch.setattr("moebius_edge.system.machine.gpus", lambda: [])
    pair = ("photo.png", "photo_mask.png", "--json")
    assert run(toy, *pair) == 0
    plain, err = capsys.readouterr()
    assert "note:" not in err, "without a GPU nothing was chosen"
    runtime = json.loads(plain)["latency"]["runtime"]
    assert (runtime["device"], runtime["selection"]["device"]) == ("cpu", "cpu") and "nodes" not in runtime

    FakeGpu(monkeypatch)
    assert run(toy, *pair, "--latency-report", "l.json") == 0
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].startswith("note: onnxruntime on cuda is the fastest that works here")
    runtime = json.loads(out)["latency"]["runtime"]
    assert runtime == json.loads((here / "l.json").read_text())["runtime"]
    assert runtime["selection"]["device"] == "cuda" and runtime["nodes"]["denoiser"]["CUDAExecutionProvider"] > 5
    assert json.loads(out)["results"][0]["settings"] == json.loads(plain)["results"][0]["settings"]


def test_a_device_that_does_not_work_ends_the_run(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(here)
    gpu = FakeGpu(monkeypatch)
    gpu.broken = {"CUDAExecutionProvider"}
    pair = ("photo.png", "photo_mask.png")
    refused(3, "could not start CUDAExecutionProvider", here, toy, capsys, *pair, "--device", "cuda")
    gpu.providers = ("CPUExecutionProvider",)
    refused(3, "has no CUDAExecutionProvider", here, toy, capsys, *pair, "--device", "cuda")


def test_a_failed_run_keeps_an_older_result(here: Path, tmp_path: Path, capsys: Captured) -> None:
    write_pair(here)
    (here / "photo_inpainted.png").write_bytes(b"older")
    bundle = make_toy_bundle(tmp_path / "nan", nan_in="vae_decoder")
    refused(4, "vae_decoder returned NaN", here, bundle, capsys, "photo.png", "photo_mask.png")
    assert (here / "photo_inpainted.png").read_bytes() == b"older"


def test_ctrl_c_in_the_sampling_loop(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(here)
    from moebius_edge.runtimes.ort import OrtRuntime

    plain, calls = OrtRuntime._run, []

    def interrupting(self: OrtRuntime, component: str, feeds: dict, outputs: list) -> dict:
        calls.append(component)
        if calls.count("denoiser") == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, component, feeds, outputs)

    monkeypatch.setattr(OrtRuntime, "_run", interrupting)
    before = contents(here)
    assert run(toy, "photo.png", "photo_mask.png") == 130
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", "interrupted, nothing written")
    assert contents(here) == before


def test_ctrl_c_while_writing(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(here)

    def interrupted(stream: object, *arguments: object) -> None:
        stream.write(b"half a picture")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr("moebius_edge.imaging.pictures.write_png", interrupted)
    before = contents(here)
    assert run(toy, "photo.png", "photo_mask.png", "--json") == 130
    assert json.loads(capsys.readouterr().out) == {"error": "interrupted, nothing written", "exit_code": 130}
    assert contents(here) == before


# --- folders ---------------------------------------------------------------------------------------------


def test_a_folder_is_processed_pair_by_pair(here: Path, toy: Path, capsys: Captured) -> None:
    for stem, suffix in (("a", ".png"), ("b", ".jpg"), ("c", ".png")):
        write_pair(here / "in", stem, suffix)
    (here / "in" / "notes.txt").write_text("no picture")
    assert run(toy, "in", "in", "-o", "out", "--latency-report", "l.json") == 0
    out, err = capsys.readouterr()
    assert contents(here / "out") == {"a.png", "b.png", "c.png"}
    assert [line for line in out.splitlines() if line.startswith("saved")] == [
        f"saved out/{s}.png" for s in "abc"
    ]
    assert out.splitlines()[-1] == "3 of 3 done"
    assert "[2/3] b.jpg" in err
    report = json.loads((here / "l.json").read_text())
    assert report["stages"]["load"]["count"] == 1, "the model is opened once"
    assert report["stages"]["total"]["count"] == 3
    assert report["settings"]["pictures"] == 3 and report["settings"]["steps_executed"] == 19

    Image.fromarray(np.zeros((80, 96), np.uint8)).save(here / "in" / "b_mask.png")
    assert run(toy, "in", "in", "-o", "out", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [r["settings"]["steps_executed"] for r in document["results"]] == [19, 0, 19]
    assert "steps_executed" not in document["latency"]["settings"], "what differs is not one setting"


def test_one_bad_pair_does_not_stop_the_rest(here: Path, toy: Path, capsys: Captured) -> None:
    images, masks = here / "images", here / "masks"
    for stem in "abcd":
        write_pair(images, stem)
        masks.mkdir(exist_ok=True)
        (images / f"{stem}_mask.png").rename(masks / f"{stem}.png")
    (images / "a.png").write_text("no picture")
    assert run(toy, "images", "masks", "--output", "out") == 6
    out, err = capsys.readouterr()
    assert contents(here / "out") == {"b.png", "c.png", "d.png"}
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert errors[0].startswith("error: a.png: images/a.png")
    assert errors[1] == "error: 3 of 4 done, 1 failed"

    assert run(toy, "images", "masks", "--output", "out", "--json") == 6
    document = json.loads(capsys.readouterr().out)
    assert (document["exit_code"], document["error"]) == (6, "3 of 4 done, 1 failed")
    failed, *done = document["results"]
    assert (failed["image"], failed["exit_code"]) == ("images/a.png", 2) and "output" not in failed
    assert [entry["output"] for entry in done] == ["out/b.png", "out/c.png", "out/d.png"]


def test_pairs_that_cannot_be_made(here: Path, toy: Path, capsys: Captured) -> None:
    images, masks = here / "images", here / "masks"
    for stem in ("good", "twice", "lonely"):
        write_pair(images, stem)
    write_pair(images, "good2", ".jpg")
    masks.mkdir()
    for stem in ("good", "good2", "twice"):
        (images / f"{stem}_mask.png").rename(masks / f"{stem}.png")
    (images / "lonely_mask.png").rename(masks / "lonley.png")
    Image.open(images / "good2.jpg").save(images / "good2.png")
    Image.open(masks / "twice.png").save(masks / "twice.bmp")
    assert run(toy, images, masks, "-o", "out") == 6
    err = capsys.readouterr().err
    assert "error: good2.jpg: good2.jpg and good2.png share a name: rename one" in err
    assert "error: twice.png: twice.png has 2 masks, twice.bmp and twice.png: keep one" in err
    assert f"error: lonely.png: lonely.png has no mask: put lonely.png or lonely_mask.png into {masks}" in err
    assert "note: 1 mask without an image: lonley.png" in err
    assert "error: 1 of 4 done, 3 failed" in err
    assert contents(here / "out") == {"good.png"}


def test_a_bad_model_ends_a_batch_at_once(here: Path, tmp_path: Path, capsys: Captured) -> None:
    for stem in "abc":
        write_pair(here / "in", stem)
    bundle = make_toy_bundle(tmp_path / "nan", nan_in="denoiser")
    refused(4, "denoiser returned NaN", here, bundle, capsys, "in", "in", "-o", "out")
    refused(2, "unknown runtime", here, bundle, capsys, "in", "in", "-o", "out", "--runtime", "x")


def test_folders_that_make_no_sense(here: Path, toy: Path, capsys: Captured) -> None:
    write_pair(here / "in")
    (here / "empty").mkdir()
    (here / "file").write_text("")
    refused(2, "name one for the results with --output DIR", here, toy, capsys, "in", "in")
    refused(2, "the output folder in holds the input", here, toy, capsys, "in", "in", "-o", "in")
    refused(2, "output file is a file", here, toy, capsys, "in", "in", "-o", "file")
    refused(3, "there is no folder no", here, toy, capsys, "in", "in", "-o", "no/out")
    refused(2, "folder empty holds no images", here, toy, capsys, "empty", "in", "-o", "out")


def test_a_batch_without_a_result_leaves_nothing(here: Path, toy: Path, capsys: Captured) -> None:
    (here / "in").mkdir()
    (here / "in" / "a.png").write_text("no picture")
    (here / "in" / "a_mask.png").write_text("no picture")
    before = contents(here)
    assert run(toy, "in", "in", "-o", "out", "--latency-report", "l.json") == 6
    err = capsys.readouterr().err
    assert "note: no latency report was written to l.json: no picture was processed" in err
    assert "error: 0 of 1 done, 1 failed" in err
    assert contents(here) == before


def test_ctrl_c_in_a_batch_says_what_is_done(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stem in "abc":
        write_pair(here / "in", stem)
    from moebius_edge.imaging import pictures as imaging

    plain, read = imaging.read_picture, []

    def interrupting(path: Path, *given: object) -> imaging.Picture:
        read.append(path)
        if Path(path).name == "b.png":
            raise KeyboardInterrupt
        return plain(path, *given)

    monkeypatch.setattr(imaging, "read_picture", interrupting)
    assert run(toy, "in", "in", "-o", "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted, 1 of 3 done"
    assert contents(here / "out") == {"a.png"}


def write_folders(here: Path, **pairs: str) -> None:
    """The folders ``images`` and ``masks``: each image below the one, its mask below the other; ``""``: no mask."""
    write_pair(here / "made")
    for name, mask in {"a.png": "a.png", **pairs}.items():
        for folder, file, made in (("images", name, "photo.png"), ("masks", mask, "photo_mask.png")):
            if file:
                (here / folder / file).parent.mkdir(parents=True, exist_ok=True)
                (here / folder / file).write_bytes((here / "made" / made).read_bytes())


def saved(out: str) -> list[str]:
    return [line.removeprefix("saved ") for line in out.splitlines() if line.startswith("saved ")]


@pytest.mark.parametrize("kind", ["symbolic", "hard", "of the folder", "of the mask", "of an unused mask"])
def test_no_input_is_overwritten_through_a_link(here: Path, toy: Path, capsys: Captured, kind: str) -> None:
    write_folders(here, **{"b.png": "b.png", "sub/c.png": "sub/c.png"})
    (here / "masks" / "unused.png").write_bytes((here / "masks" / "a.png").read_bytes())
    (here / "out").mkdir()
    options = []
    if kind == "hard":
        os.link("images/a.png", "out/b.png")
    elif kind == "of the folder":
        os.symlink("../images/sub", "out/sub")
        options = ["--recursive"]
    else:
        names = {"symbolic": "images/b.png", "of the mask": "masks/a.png", "of an unused mask": "masks/unused.png"}
        os.symlink(f"../{names[kind]}", "out/b.png")
    message = refused(2, "is a link to the input", here, toy, capsys, "images", "masks", "-o", "out", *options)
    assert "out/" in message and ("images/" in message or "masks/" in message)


def test_two_results_are_never_one_file(here: Path, toy: Path, capsys: Captured) -> None:
    write_folders(here, **{"b.png": "b.png"})
    (here / "out").mkdir()
    os.symlink("b.png", "out/a.png")
    arguments = ("images", "masks", "-o", "out")
    assert "out/b.png" in refused(2, "the results of a.png and b.png would be one", here, toy, capsys, *arguments)
    os.remove("out/a.png")
    os.symlink("images/b.png", "l.json")
    options = ("--latency-report", "l.json")
    refused(2, "the latency report l.json is one of the pictures", here, toy, capsys, *arguments, *options)


def test_pictures_are_known_by_their_contents(here: Path, toy: Path, capsys: Captured) -> None:
    """And what is no picture is skipped by name."""
    write_folders(here, **{"scan": "scan.png", "wrong.dat": "wrong_mask.gif", "jf.jfif": "jf.png"})
    Image.open(here / "images" / "a.png").convert("RGB").save(here / "images" / "jf.jfif", "JPEG")
    for number in range(7):
        (here / "images" / f"note{number}.txt").write_text("text")
    (here / "images" / ".hidden.png").write_text("hidden")
    (here / "images" / "a.png~").write_bytes((here / "images" / "a.png").read_bytes())
    (here / "images" / "gone.png").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(here / "images" / "pipe.png")
    (here / "images" / "sub").mkdir()
    assert run(toy, "images", "masks", "-o", "out") == 0
    out, err = capsys.readouterr()
    assert saved(out) == [f"out/{name}.png" for name in ("a", "jf", "scan", "wrong")]
    notes = [line.removeprefix("note: ") for line in err.splitlines() if line.startswith("note: ")]
    files, folders = notes
    assert files.startswith("10 files of images skipped, no readable pictures: a.png~, gone.png, note0.txt, note1.txt")
    assert files.endswith(", note2.txt and 5 more")
    assert folders == "1 sub-folder of images skipped: sub; add --recursive"

    assert run(toy, "images", "masks", "-o", "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == notes


def test_a_folder_without_pictures_says_what_it_holds(here: Path, toy: Path, capsys: Captured) -> None:
    write_folders(here, **{"sub/b.png": "sub/b.png"})
    os.remove("images/a.png")
    (here / "images" / "list.csv").write_text("a,b")
    message = refused(2, "folder images holds no images", here, toy, capsys, "images", "masks", "-o", "out")
    assert "1 file of images skipped, no readable pictures: list.csv" in message
    assert "1 sub-folder of images skipped: sub; add --recursive" in message


def test_sub_folders_keep_their_place(here: Path, toy: Path, capsys: Captured) -> None:
    """Even where results and masks lie in the same tree, and links make it endless."""
    write_folders(here, **{"x/a.png": "x/a_mask.png", "x/y/b.jpg": "x/y/b.png", "z/lonely.png": ""})
    (here / "masks").rename(here / "images" / "masks")
    os.symlink("..", "images/x/up")
    os.mkdir("elsewhere")
    os.rename("images/x/y", "elsewhere/y")
    os.symlink("../../elsewhere/y", "images/x/y")
    asked = ("images", "images/masks", "-o", "images/out", "--recursive")
    for _ in range(2):  # the second time there are results in the tree
        assert run(toy, *asked) == 6
        out, err = capsys.readouterr()
        assert saved(out) == ["images/out/a.png", "images/out/x/a.png", "images/out/x/y/b.png"]
        assert "z/lonely.png: lonely.png has no mask: put lonely.png or lonely_mask.png into images/masks/z" in err
        assert "error: 3 of 4 done, 1 failed" in err and "[3/4] x/y/b.jpg" in err and "note: " not in err
    assert contents(here / "images" / "out") == {"a.png", "x", "x/a.png", "x/y", "x/y/b.png"}
    (here / "images" / "out2").mkdir()
    (here / "images" / "out2" / "x").write_text("a file")
    refused(2, "images/out2/x is not a folder", here, toy, capsys, *asked[:3], "images/out2", "--recursive")
    refused(2, "--recursive is for folders", here, toy, capsys, "made/photo.png", "made/photo_mask.png", "--recursive")


def test_names_are_compared_in_one_form_of_unicode(here: Path, toy: Path, capsys: Captured) -> None:
    """As of files that have been on a Mac. The result keeps the image's spelling."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_folders(here, **{f"{decomposed}/{decomposed}.png": f"{composed}/{composed}.png"})
    assert run(toy, "images", "masks", "-o", "out", "--recursive") == 0
    assert saved(capsys.readouterr().out) == ["out/a.png", f"out/{decomposed}/{decomposed}.png"]

    write_folders(here, **{f"{decomposed}.png": "", f"{composed}.jpg": f"{composed}.png"})
    assert run(toy, "images", "masks", "-o", "out") == 6
    assert "share a name: rename one" in capsys.readouterr().err


def test_pairs_by_order(here: Path, toy: Path, capsys: Captured) -> None:
    write_folders(here, **{"b.png": "1.png", "c.png": "10.png"})
    asked = ("images", "masks", "-o", "out", "--pair-by", "order", "--json")
    assert run(toy, *asked) == 0
    document = json.loads(capsys.readouterr().out)
    pairs = [(entry["image"], entry["mask"], entry["output"]) for entry in document["results"]]
    masks = ["1.png", "10.png", "a.png"]
    assert pairs == [(f"images/{s}.png", f"masks/{m}", f"out/{s}.png") for s, m in zip("abc", masks, strict=True)]
    assert document["notes"] == ["paired by order: a.png with masks/1.png, and so on"]

    os.remove("masks/1.png")
    options = ("-o", "new", "--pair-by", "order")
    refused(2, "images holds 3 pictures and masks 2: add or remove", here, toy, capsys, "images", "masks", *options)
    refused(2, "needs two folders, but images is both", here, toy, capsys, "images", "images", *options)
    refused(2, "--pair-by order is for folders", here, toy, capsys, "images/a.png", "masks/a.png", *options[2:])
    (here / "images" / "c.png").rename(here / "images" / "b.jpg")
    (here / "masks" / "1.png").write_bytes((here / "masks" / "a.png").read_bytes())
    assert run(toy, "images", "masks", *options) == 6
    assert capsys.readouterr().err.count("b.jpg and b.png share a name: rename one") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of Linux, in bytes")
def test_the_longest_name_is_checked_before_the_work(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    stem = "写" * 82  # 246 bytes, and .png fits
    write_pair(here)
    (here / "photo.png").rename(here / f"{stem}.png")
    with monkeypatch.context() as patch:
        patch.setattr("moebius_edge.imaging.pictures.read_picture", lambda path: pytest.fail("the picture was read"))
        refused(2, "_inpainted.png is too long, 260 bytes", here, toy, capsys, f"{stem}.png", "photo_mask.png")
    assert run(toy, f"{stem}.png", "photo_mask.png", "-o", "short.png") == 0

    write_folders(here, **{"folder.png": "folder.png"})
    (here / "out" / "folder.png").mkdir(parents=True)
    (here / f"{stem}.png").rename(here / "images" / f"{stem}写写.j")
    (here / "masks" / f"{stem}写写.p").write_bytes((here / "masks" / "a.png").read_bytes())
    capsys.readouterr()
    assert run(toy, "images", "masks", "-o", "out") == 6
    out, err = capsys.readouterr()
    assert saved(out) == ["out/a.png"]
    assert "error: folder.png: output out/folder.png is no file" in err and "[2/3] folder.png" not in err
    assert f"error: {stem}写写.j: the name of the output out/{stem}写写.png is too long, 256 bytes" in err


# --- the process -----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_paths_that_are_not_utf8(here: Path, toy: Path, capsys: Captured) -> None:
    """Of the bundle, the folders and the pictures; what is printed and written is valid all the same."""
    name = os.fsdecode(b"b\xe9")
    write_pair(here, "b")
    (here / name).mkdir()
    for ending in (".png", "_mask.png"):
        (here / f"b{ending}").rename(here / name / f"{name}{ending}")
    bundle = here / name / "bundle"
    shutil.copytree(toy, bundle)
    capsys.readouterr()
    out = os.path.join(name, "out")
    assert run(bundle, name, name, "-o", out, "--json", "--latency-report", f"{name}/l.json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["results"][0]["image"] == "b\\xe9/b\\xe9.png"
    assert json.loads((here / name / "l.json").read_text("utf-8"))["bundle"]["name"] == "toy"
    assert (here / out / f"{name}.png").is_file()
    assert contents(here / out) == {f"{name}.png"}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_in_a_batch_says_what_is_done(
    here: Path, toy: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stem in "abc":
        write_pair(here / "in", stem)
    from moebius_edge.runtimes.ort import OrtRuntime

    plain, calls = OrtRuntime._run, []

    def terminated(self: OrtRuntime, component: str, feeds: dict, outputs: list) -> dict:
        calls.append(component)
        if calls.count("denoiser") == 25:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, component, feeds, outputs)

    monkeypatch.setattr(OrtRuntime, "_run", terminated)
    assert run(toy, "in", "in", "-o", "out") == 143
    assert capsys.readouterr().err.splitlines()[-1] == "terminated, 1 of 3 done"
    assert contents(here / "out") == {"a.png"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_stdout_stops_no_batch(here: Path, toy: Path) -> None:
    write_folders(here, **{"b.png": "", "c.png": "c.png"})
    command = [sys.executable, "-m", "moebius_edge", "run", "images", "masks", "-o", "out", "--bundle", str(toy)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert contents(here / "out") == {"a.png", "c.png"}
    assert done.returncode == 6 and "Traceback" not in done.stderr
    assert "error: cannot write to standard output (No space left on device)" in done.stderr.splitlines()[-1]


# --- a terminal ------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_bar_and_the_result_stays(here: Path, toy: Path) -> None:
    import pty

    write_pair(here)
    parent, child = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "moebius_edge",
        "run",
        "photo.png",
        "photo_mask.png",
        "--bundle",
        str(toy),
    ]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=child, text=True, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:  # Linux's end of file of a terminal
            break
        if not data:
            break
        shown += data
    os.close(parent)
    assert done.returncode == 0, shown
    assert b"photo.png" in shown and b"19/19" in shown and b"\x1b[" in shown
    assert done.stdout.startswith("saved photo_inpainted.png\n"), "stdout is a pipe: no bar, no colour"
    assert "\x1b" not in done.stdout
