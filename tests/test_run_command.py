"""``moebius-edge run`` from the outside: files in, files and text out, and every bad input of the list."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commanding import Captured, as_json, contents, printed, refused
from fake_gpu import FakeGpu
from PIL import Image
from toy import flip_byte, make_toy_bundle

from moebius_edge.cli import main
from moebius_edge.pipeline.presets import PRESETS
from moebius_edge.runtimes.ort import OrtRuntime

PAIR = ("run", "photo.png", "photo_mask.png")
FOLDERS = ("run", "images", "masks", "-o", "out")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Toy bundles by their options, each made once."""
    made: dict[str, Path] = {}

    def toy(**options: Any) -> Path:
        key = str(options)
        if key not in made:
            made[key] = make_toy_bundle(tmp_path_factory.mktemp("bundles") / "toy", **options)
        return made[key]

    return toy


@pytest.fixture
def toy(toys: Callable[..., Path]) -> tuple[str, str]:
    """The option that names the plain toy."""
    return "--bundle", str(toys())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with one picture and its mask, 16 by 16 pixels white in the middle."""
    write_pair(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def write_pair(folder: Path, stem: str = "photo", suffix: str = ".png", size: tuple[int, int] = (96, 80)) -> None:
    width, height = size
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(stem.encode())).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(folder / f"{stem}{suffix}")
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 - 8 : height // 2 + 8, width // 2 - 8 : width // 2 + 8] = 255
    Image.fromarray(mask).save(folder / f"{stem}_mask.png")


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


# --- one picture -----------------------------------------------------------------------------------------


def test_a_picture_is_filled_and_the_rest_is_untouched(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    before = contents(here)
    lines = printed(capsys, *PAIR, *toy, "--feather", "4")
    assert contents(here) - before == {"photo_inpainted.png"}
    assert lines[0] == "saved photo_inpainted.png"
    assert lines[1].startswith("settings start image, steps 20, steps executed 19, guidance 2, cache interval 1, ")
    assert lines[2] == "bundle toy (float32)" and lines[3].startswith("runtime onnxruntime 1.")
    hole = pixels("photo_mask.png") > 127
    changed = (pixels("photo.png") != pixels("photo_inpainted.png")).any(axis=-1)
    assert changed[hole].mean() > 0.9
    changed[80 // 2 - 13 : 80 // 2 + 13, 96 // 2 - 13 : 96 // 2 + 13] = False
    assert not changed.any()


def test_the_loop_is_five_frames_from_the_command(
    here: Path, toy: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From ``run`` to the generator that steps through the timesteps, both counted."""
    depths, plain = [], OrtRuntime._run

    def step(self: OrtRuntime, component: str, *given: Any) -> dict[str, np.ndarray]:
        names = [Path(frame.filename).name + " " + frame.function for frame in inspect.stack(context=0)]
        if component == "denoiser":
            loop = next(index for index, name in enumerate(names) if name.endswith(" denoise"))
            depths.append(names.index("run.py run") - loop + 1)
        return plain(self, component, *given)

    monkeypatch.setattr(OrtRuntime, "_run", step)
    assert main([*PAIR, *toy]) == 0
    assert len(depths) == 19 and max(depths) <= 5


def test_the_table_is_complete_and_fits_80_columns(
    here: Path, toy: tuple[str, str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*PAIR, *toy]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert lines[0].split()[:3] == ["stage", "count", "first"] and all(len(line) <= 80 for line in lines)
    counts = {line.split()[0]: line.split()[1] for line in lines[2:]}
    assert counts == {
        **dict.fromkeys(("load", "read", "write", "vae_decode", "stitch", "total"), "1"),
        **dict.fromkeys(("preprocess", "vae_encode"), "2"),
        "denoise": "19",
    }


def test_settings_are_passed_on_and_named(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    options = "--steps 8 --guidance 1 --start prefill --strength 0.5 --seed 7 --scheduler dpm++2m"
    document = as_json(capsys, *PAIR, *toy, *options.split())
    settings = document["results"][0]["settings"]
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
        "guidance_interval": None,
        "preset": None,
    }
    assert {name: settings[name] for name in expected} == expected
    assert document["latency"]["stages"]["denoise"]["count"] == 4


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("--guidance 0", {"steps": 6, "guidance": 0.0, "start": "prefill", "strength": 0.5}),
        ("--start noise", {"start": "noise", "strength": 1.0}),
        ("--strength 1", {"start": "prefill", "strength": 1.0}),
    ],
)
def test_what_is_not_chosen_is_the_bundles(
    here: Path, tmp_path: Path, capsys: Captured, chosen: str, expected: dict[str, Any]
) -> None:
    """An explicit 0 is a choice, and a strength belongs to its start alone."""
    folder = make_toy_bundle(tmp_path / "own")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["defaults"] = {"steps": 6, "guidance": 1.5, "start": "prefill", "strength": 0.5}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    settings = as_json(capsys, *PAIR, "--bundle", folder, *chosen.split())["results"][0]["settings"]
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "made_with", "shown", "reported"),
    [
        ("--guidance-interval 200,800", {}, "guidance interval 200 x 800", {"guidance_interval": [200, 800]}),
        ("--cache-interval 3", {"deep": True}, "cache interval 3", {"cache_interval": 3}),
        (
            "--preset fast",
            {"deep": True},
            "settings preset fast, start image",
            {**PRESETS["fast"]["image"], "preset": "fast", "strength": 0.99, "guidance": 2.0, "seed": 0},
        ),
        ("", {"distilled_guidance": 2.5}, "distilled guidance 2.5", {"guidance": 2.5, "distilled_guidance": 2.5}),
        ("--guidance 2.5", {"distilled_guidance": 2.5}, "guidance 2.5", {"guidance": 2.5}),
    ],
)
def test_ways_to_sample_are_shown_and_reported(
    here: Path,
    toys: Callable[..., Path],
    capsys: Captured,
    options: str,
    made_with: dict[str, Any],
    shown: str,
    reported: dict[str, Any],
) -> None:
    """A toy with distilled guidance returns NaN on its unconditional branch: one row a call is all that it gets."""
    report = ("--latency-report", "report.json")
    lines = printed(capsys, *PAIR, "--bundle", toys(**made_with), *options.split(), *report)
    assert shown in lines[1] and lines[-1] == "latency report report.json"
    settings = json.loads((here / "report.json").read_text())["settings"]
    assert {name: settings[name] for name in reported} == reported


@pytest.mark.parametrize(
    ("option", "made_with", "message"),
    [
        ("--guidance-interval=800,200", {}, "guidance interval is 800,200: give LOW,HIGH with 0 <= LOW <= HIGH"),
        (
            "--guidance-interval=0,500",
            {"distilled_guidance": 2.5},
            "guidance interval is 0,500, and the model has guidance 2.5 distilled into it",
        ),
        ("--cache-interval=3", {}, "was exported without the part that reuses deep features: leave it out, or export"),
        ("--guidance=1", {"distilled_guidance": 2.5}, "guidance is 1.0, and the model has guidance 2.5 distilled into"),
    ],
)
def test_settings_that_the_model_cannot_have_end_a_batch_at_once(
    here: Path, toys: Callable[..., Path], capsys: Captured, option: str, made_with: dict[str, Any], message: str
) -> None:
    for stem in ("one", "two"):
        write_pair(here / "in", stem)
    refused(capsys, 2, message, "run", "in", "in", "-o", "out", "--bundle", toys(**made_with), option)
    assert not (here / "out").exists()


def test_what_is_chosen_beside_a_preset_holds(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    options = "--preset fast --steps 7 --guidance-interval 0,1000 --cache-interval 1 --start noise"
    settings = as_json(capsys, *PAIR, *toy, *options.split())["results"][0]["settings"]
    assert (settings["steps"], settings["guidance_interval"], settings["start"]) == (7, [0, 1000], "noise")
    assert settings["scheduler"] == PRESETS["fast"]["noise"]["scheduler"]
    assert main([*PAIR, *toy, "--preset", "fast"]) == 0
    assert "note: preset fast reuses deep features, and bundle toy was exported without" in capsys.readouterr().err


def test_json_is_the_only_thing_on_stdout(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    assert main([*PAIR, *toy, "-o", "out.jpg", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    (entry,) = document["results"]
    assert document["exit_code"] == 0
    assert (entry["image"], entry["mask"], entry["output"]) == ("photo.png", "photo_mask.png", "out.jpg")
    note = "out.jpg is JPEG, which is lossy: pixels outside the mask change slightly; .png keeps them"
    assert entry["notes"] == [note] and f"note: {note}" in err
    assert document["latency"]["runtime"]["name"] == "onnxruntime"


def test_latency_report(here: Path, toy: tuple[str, str]) -> None:
    assert main([*PAIR, *toy, "--latency-report", "latency.json"]) == 0
    report = json.loads((here / "latency.json").read_text())
    assert (report["schema_version"], report["bundle"]["name"]) == (1, "toy")
    denoise = report["stages"]["denoise"]
    assert report["settings"]["steps_executed"] == denoise["count"] == 19
    assert 0 < denoise["median_ms"] <= denoise["p95_ms"] <= denoise["p99_ms"] <= denoise["total_ms"]
    stages = ("denoise", "vae_encode", "vae_decode", "stitch")
    parts = sum(report["stages"][stage]["total_ms"] for stage in stages)
    assert report["stages"]["total"]["total_ms"] >= parts
    assert report["peak_memory_bytes"] > 1 << 20 and report["machine"]["cpu"]["cores_available"] >= 1


def test_masks_inverted_dilated_and_empty(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    original = pixels("photo.png")
    assert main([*PAIR, *toy, "--feather", "0", "-o", "dilated.png", "--mask-dilate", "4"]) == 0
    changed = (pixels("dilated.png") != original).any(axis=-1)
    assert 16 * 16 < changed.sum() <= 24 * 24
    Image.fromarray(np.zeros((80, 96), np.uint8)).save("empty.png")
    capsys.readouterr()
    assert main(["run", "photo.png", "empty.png", *toy, "-o", "same.png"]) == 0
    assert "note: mask is empty: image returned unchanged" in capsys.readouterr().err
    assert (pixels("same.png") == original).all()
    assert main(["run", "photo.png", "empty.png", *toy, "-o", "all.png", "--invert-mask"]) == 0
    said = capsys.readouterr().err
    assert "mask covers 100% of the image" in said and "leave out --invert-mask if white marks the hole" in said


def test_what_marks_the_hole_is_found_out_or_chosen(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    mask = pixels("photo_mask.png")
    Image.fromarray(np.dstack([mask, mask * 0, mask * 0])).save("red.png")
    assert main([*PAIR, *toy, "-o", "white.png"]) == 0
    (entry,) = as_json(capsys, "run", "photo.png", "red.png", *toy, "-o", "red_filled.png")["results"]
    assert entry["notes"] == ["mask red.png has red (#ff0000) strokes on black (#000000): the strokes are filled"]
    Image.fromarray(mask // 255 + np.uint8(2) * (np.arange(96) < 20).astype(np.uint8)).save("labels.png")
    labels = ("run", "photo.png", "labels.png", *toy, "-o", "label.png")
    refused(capsys, 2, "has 3 grey levels, 0, 1 and 2: --mask-from index:N fills one", *labels)
    refused(capsys, 2, "--mask-from purple is unknown: choose alpha, luma, red,", *labels, "--mask-from", "purple")
    assert main([*labels, "--mask-from", "index:1"]) == 0
    assert len({Path(name).read_bytes() for name in ("white.png", "red_filled.png", "label.png")}) == 1


def test_the_same_command_gives_the_same_bytes(here: Path, toy: tuple[str, str]) -> None:
    for name in ("a.png", "b.png"):
        assert main([*PAIR, *toy, "-o", name, "--seed", "3"]) == 0
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


def test_an_output_folder_takes_the_default_name_and_odd_names_stay(
    here: Path, toy: tuple[str, str], capsys: Captured
) -> None:
    (here / "out").mkdir()
    assert main([*PAIR, *toy, "-o", "out"]) == 0
    assert contents(here / "out") == {"photo_inpainted.png"}
    capsys.readouterr()
    long = "a photo  [red]with[bold] " + "much " * 20 + "é.png"
    assert main([*PAIR, *toy, "-o", long]) == 0
    assert f"saved {long}\n" in capsys.readouterr().out and (here / long).is_file()


def test_the_bundled_model_says_that_it_is_a_demonstration(here: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main([*PAIR, "--bundle", str(make_toy_bundle(tmp_path / "t", name="tiny"))]) == 0
    note = "note: tiny is a small demonstration model; for the published weights run `moebius-edge download"
    assert note in capsys.readouterr().err


def test_the_choice_of_a_device_is_told_where_there_is_one(
    here: Path, toy: tuple[str, str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebius_edge.system.machine.gpus", lambda: [])
    plain = as_json(capsys, *PAIR, *toy)
    runtime = plain["latency"]["runtime"]
    assert (runtime["device"], runtime["selection"]["device"]) == ("cpu", "cpu") and "nodes" not in runtime

    FakeGpu(monkeypatch)
    assert main([*PAIR, *toy, "--json", "--latency-report", "l.json"]) == 0
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].startswith("note: onnxruntime on cuda is the fastest that works here")
    runtime = json.loads(out)["latency"]["runtime"]
    assert runtime == json.loads((here / "l.json").read_text())["runtime"]
    assert runtime["selection"]["device"] == "cuda" and runtime["nodes"]["denoiser"]["CUDAExecutionProvider"] > 5
    assert json.loads(out)["results"][0]["settings"] == plain["results"][0]["settings"]


def test_a_device_that_does_not_work_ends_the_run(
    here: Path, toy: tuple[str, str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.broken = {"CUDAExecutionProvider"}
    refused(capsys, 3, "could not start CUDAExecutionProvider", *PAIR, *toy, "--device", "cuda")
    gpu.providers = ("CPUExecutionProvider",)
    refused(capsys, 3, "has no CUDAExecutionProvider", *PAIR, *toy, "--device", "cuda")


# --- bad input: one line, the documented code, nothing written -------------------------------------------


def test_unusable_pictures_are_named(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    huge = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (here / "huge.png").write_bytes(huge)
    (here / "cut.png").write_bytes((here / "photo.png").read_bytes()[:2000])
    (here / "text.png").write_text("this is no picture\n")
    (here / "empty.png").write_bytes(b"")
    (here / "masks").mkdir()
    write_pair(here, "other", size=(64, 48))
    before = contents(here)
    for image, mask, code, message in (
        ("nowhere.png", "photo_mask.png", 3, "there is no image nowhere.png"),
        ("photo.png", "nowhere.png", 3, "there is no mask nowhere.png"),
        ("cut.png", "photo_mask.png", 2, "cut.png"),
        ("text.png", "photo_mask.png", 2, "text.png"),
        ("photo.png", "text.png", 2, "text.png"),
        ("empty.png", "photo_mask.png", 2, "empty.png"),
        ("huge.png", "photo_mask.png", 2, "30000x30000"),
        ("photo_mask.png", "photo.png", 2, "are IMAGE and MASK swapped?"),
        ("photo.png", "masks", 2, "photo.png is a file but masks is a folder"),
    ):
        refused(capsys, code, message, "run", image, mask, *toy)
    assert "96x80" in refused(capsys, 2, "64x48", "run", "photo.png", "other_mask.png", *toy)
    assert contents(here) == before


def test_damaged_bundles(here: Path, tmp_path: Path, toys: Callable[..., Path], capsys: Captured) -> None:
    (here / "photo_inpainted.png").write_bytes(b"older")
    before = contents(here)
    flipped, missing, unknown = (make_toy_bundle(tmp_path / name) for name in ("flipped", "missing", "unknown"))
    flip_byte(flipped / "denoiser.onnx")
    (missing / "vae_decoder.onnx").unlink()
    manifest = json.loads((unknown / "bundle.json").read_text())
    (unknown / "bundle.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    for bundle, message in (
        (flipped, "denoiser.onnx was altered"),
        (missing, "vae_decoder.onnx is missing"),
        (unknown, "99"),
        (tmp_path / "none", "there is no bundle folder"),
        *((toys(nan_in=name), f"{name} returned NaN") for name in ("vae_encoder", "denoiser", "vae_decoder")),
    ):
        refused(capsys, 4, message, *PAIR, "--bundle", bundle)
    assert contents(here) == before and (here / "photo_inpainted.png").read_bytes() == b"older"


def test_a_file_system_that_takes_no_more(here: Path, toy: tuple[str, str]) -> None:
    """A real failing write, by the system's limit on a file's size."""
    write_pair(here, "large", size=(640, 480))
    before = contents(here)
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from moebius_edge.cli import main\n"
        f"sys.exit(main(['run', 'large.png', 'large_mask.png', *{toy!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "error: cannot write large_inpainted.png" in done.stderr and "Traceback" not in done.stderr
    assert contents(here) == before


def test_outputs_that_cannot_be_written_fail_before_any_work(
    here: Path, toy: tuple[str, str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebius_edge.imaging.pictures.read_picture", lambda path: pytest.fail("the picture was read"))
    os.symlink("photo.png", "link.png")
    for code, message, *options in (
        (3, "there is no folder no: run `mkdir -p no`", "-o", "no/out.png"),
        (2, "output out.xyz has extension .xyz: use one of .png", "-o", "out.xyz"),
        (2, "output out has no extension", "-o", "out"),
        (2, "the output photo.png is the image itself", "-o", "photo.png"),
        (2, "photo_mask.png is the mask itself", "-o", "./photo_mask.png"),
        (2, "the output link.png is the image itself", "-o", "link.png"),
        (2, "photo.png is one of the pictures", "--latency-report", "photo.png"),
        (3, "there is no folder no", "--latency-report", "no/latency.json"),
        (2, "is no file", "--latency-report", "."),
        (3, "cannot write to /proc", "-o", "/proc/out.png"),
        (2, "--recursive is for folders", "--recursive"),
        (2, "--pair-by order is for folders", "--pair-by", "order"),
    ):
        refused(capsys, code, message, *PAIR, *toy, *options)
    long = "写" * 82  # 246 bytes, and .png fits
    (here / "photo.png").rename(here / f"{long}.png")
    refused(capsys, 2, "_inpainted.png is too long, 260 bytes", "run", f"{long}.png", "photo_mask.png", *toy)
    (here / "old.png").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    message = "cannot write old.png, it is write-protected"
    refused(capsys, 3, message, "run", f"{long}.png", "photo_mask.png", *toy, "-o", "old.png")


# --- Ctrl-C and SIGTERM ----------------------------------------------------------------------------------


def signalled(monkeypatch: pytest.MonkeyPatch, number: int, call: int) -> None:
    """Let the process get a signal in the denoiser's call ``call``."""
    plain, calls = OrtRuntime._run, []

    def run(self: OrtRuntime, component: str, *given: Any) -> dict[str, np.ndarray]:
        calls.append(component)
        if calls.count("denoiser") == call:
            os.kill(os.getpid(), number)
        return plain(self, component, *given)

    monkeypatch.setattr(OrtRuntime, "_run", run)


def test_ctrl_c_in_the_sampling_loop_and_while_writing(
    here: Path, toy: tuple[str, str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(here)
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, 3)
        assert main([*PAIR, *toy]) == 130
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", "interrupted, nothing written")

    def interrupted(stream: Any, *arguments: object) -> None:
        stream.write(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr("moebius_edge.imaging.pictures.write_png", interrupted)
    assert main([*PAIR, *toy, "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"error": "interrupted, nothing written", "exit_code": 130}
    assert contents(here) == before


@pytest.mark.parametrize(("name", "said"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")])
def test_a_batch_that_is_ended_says_what_is_done(
    here: Path, toy: tuple[str, str], capsys: Captured, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    for stem in "abc":
        write_pair(here / "in", stem)
    number = getattr(signal, name)
    signalled(monkeypatch, number, 25)
    assert main(["run", "in", "in", "-o", "out", *toy]) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == f"{said}, 1 of 3 done: the same command goes on from there"
    assert len(contents(here / "out")) == 2 and len(log_lines(here / "out")) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- folders ---------------------------------------------------------------------------------------------


def write_folders(here: Path, **pairs: str) -> None:
    """The folders ``images`` and ``masks``: each image below the one, its mask below the other; ``""``: no mask."""
    for name, mask in {"a.png": "a.png", **pairs}.items():
        for folder, file, source in (("images", name, "photo.png"), ("masks", mask, "photo_mask.png")):
            if file:
                (here / folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(here / source, here / folder / file)


def saved(out: str) -> list[str]:
    return [line.removeprefix("saved ") for line in out.splitlines() if line.startswith("saved ")]


def test_a_folder_is_processed_pair_by_pair(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    for stem, suffix in (("a", ".png"), ("b", ".jpg"), ("c", ".png")):
        write_pair(here / "in", stem, suffix)
    (here / "in" / "notes.txt").write_text("no picture")
    asked = ["run", "in", "in", "-o", "out", *toy]
    assert main([*asked, "--latency-report", "l.json"]) == 0
    out, err = capsys.readouterr()
    assert contents(here / "out") == {"a.png", "b.png", "c.png", "run.jsonl"}
    assert saved(out) == [f"out/{stem}.png" for stem in "abc"] and out.splitlines()[-1] == "3 of 3 done"
    assert "[2/3] b.jpg" in err
    report = json.loads((here / "l.json").read_text())
    assert report["stages"]["load"]["count"] == 1, "the model is opened once"
    assert report["stages"]["total"]["count"] == report["settings"]["pictures"] == 3

    Image.fromarray(np.zeros((80, 96), np.uint8)).save(here / "in" / "b_mask.png")
    document = as_json(capsys, *asked, "--force")
    assert [result["settings"]["steps_executed"] for result in document["results"]] == [19, 0, 19]
    assert "steps_executed" not in document["latency"]["settings"], "what differs is not one setting"


def test_one_bad_pair_does_not_stop_the_rest(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    write_folders(here, **{"b.png": "b.png", "folder.png": "folder.png"})
    (here / "images" / "a.png").write_text("no picture")
    (here / "out" / "folder.png").mkdir(parents=True)
    assert main([*FOLDERS, *toy]) == 6
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert saved(out) == ["out/b.png"] and len(errors) == 3
    assert errors[0].startswith("error: a.png: images/a.png")
    assert errors[1].startswith("error: folder.png: output out/folder.png is no file")
    assert errors[2] == "error: 1 of 3 done, 2 failed"
    document = as_json(capsys, *FOLDERS, *toy, code=6)
    assert document["error"] == "1 of 3 done, 2 failed"
    failed, done, *_ = document["results"]
    assert (failed["image"], failed["exit_code"]) == ("images/a.png", 2) and "output" not in failed
    assert done["output"] == "out/b.png"


def test_a_gpus_memory_that_runs_out_costs_one_picture(
    here: Path, toy: tuple[str, str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its steps, and the one after it is what it is without that."""
    gpu, plain, calls = FakeGpu(monkeypatch), OrtRuntime._run, 0

    def run(self: OrtRuntime, component: str, *given: Any) -> dict[str, np.ndarray]:
        nonlocal calls
        step = component == "denoiser" and self.active
        calls += step
        gpu.failure = "CUDA failure 2: out of memory ; GPU=0 ; hostname=here" if step and calls == 5 else ""
        return plain(self, component, *given)

    monkeypatch.setattr(OrtRuntime, "_run", run)
    before = contents(here)
    message = "denoiser failed: not enough memory on cuda (CUDA failure 2: out of memory): close other programs"
    refused(capsys, 3, message, *PAIR, *toy, "--device", "cuda")
    assert contents(here) == before
    gpu.failure, calls = "", 0
    write_folders(here, **{"a.png": "a.png", "b.png": "b.png"})
    assert main([*FOLDERS, *toy, "--device", "cuda", "--jobs", "1"]) == 6
    out, err = capsys.readouterr()
    assert saved(out) == ["out/b.png"] and f"error: a.png: {message}" in err
    assert contents(here / "out") == {"b.png", "run.jsonl"}
    assert main([*FOLDERS[:3], "-o", "whole", *toy, "--device", "cuda"]) == 0
    assert (here / "whole" / "b.png").read_bytes() == (here / "out" / "b.png").read_bytes()


def test_pairs_that_cannot_be_made(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    write_folders(here, **{"good2.jpg": "good2.png", "twice.png": "twice.png", "lonely.png": "lonley.png"})
    shutil.copy(here / "photo.png", here / "images" / "good2.png")
    shutil.copy(here / "photo_mask.png", here / "masks" / "twice.bmp")
    assert main([*FOLDERS, *toy]) == 6
    err = capsys.readouterr().err
    assert "error: good2.jpg: good2.jpg and good2.png share a name: rename one" in err
    assert "error: twice.png: twice.png has 2 masks, twice.bmp and twice.png: keep one" in err
    assert "error: lonely.png: lonely.png has no mask: put lonely.png or lonely_mask.png into masks" in err
    assert "note: 1 mask without an image: lonley.png" in err
    assert "error: 1 of 5 done, 4 failed" in err and contents(here / "out") == {"a.png", "run.jsonl"}


def test_a_bad_model_ends_a_batch_at_once(here: Path, toys: Callable[..., Path], capsys: Captured) -> None:
    write_folders(here, **{"b.png": "b.png"})
    refused(capsys, 4, "denoiser returned NaN", *FOLDERS, "--bundle", toys(nan_in="denoiser"))


def test_folders_that_make_no_sense(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    write_folders(here, **{"sub/b.png": "sub/b.png"})
    os.remove("images/a.png")
    (here / "images" / "list.csv").write_text("a,b")
    (here / "file").write_text("")
    refused(capsys, 2, "name one for the results with --output DIR", "run", "masks", "masks", *toy)
    refused(capsys, 2, "the output folder masks holds the input", "run", "masks", "masks", "-o", "masks", *toy)
    refused(capsys, 2, "output file is a file", "run", "masks", "masks", "-o", "file", *toy)
    refused(capsys, 3, "there is no folder no", "run", "masks", "masks", "-o", "no/out", *toy)
    message = refused(capsys, 2, "folder images holds no images", *FOLDERS, *toy)
    assert "1 file of images skipped: list.csv; 1 sub-folder of images skipped: sub" in message


def test_a_batch_without_a_result_leaves_nothing(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    write_folders(here)
    (here / "images" / "a.png").write_text("no picture")
    before = contents(here)
    assert main([*FOLDERS, *toy, "--latency-report", "l.json"]) == 6
    err = capsys.readouterr().err
    assert "note: no latency report was written to l.json: no picture was processed" in err
    assert "error: 0 of 1 done, 1 failed" in err and contents(here) == before


@pytest.mark.parametrize("kind", ["symbolic", "hard", "folder", "mask", "unused mask", "result"])
def test_no_picture_is_overwritten_through_a_link(
    here: Path, toy: tuple[str, str], capsys: Captured, kind: str
) -> None:
    write_folders(here, **{"b.png": "b.png", "sub/c.png": "sub/c.png"})
    shutil.copy(here / "masks" / "a.png", here / "masks" / "unused.png")
    (here / "out").mkdir()
    targets = {"symbolic": "images/b.png", "mask": "masks/a.png", "unused mask": "masks/unused.png"}
    if kind == "hard":
        os.link("images/a.png", "out/b.png")
    elif kind == "folder":
        os.symlink("../images/sub", "out/sub")
    else:
        os.symlink(f"../{targets.get(kind, 'out/a.png')}", "out/b.png")
    message = refused(capsys, 2, ", which would be lost: remove the link", *FOLDERS, "--recursive", *toy)
    assert "the output out/" in message and " leads to " in message
    os.symlink("images/b.png", "l.json")
    if kind == "hard":
        os.remove("out/b.png")
        report = ("--latency-report", "l.json")
        refused(capsys, 2, "the latency report l.json is one of the pictures", *FOLDERS, *toy, *report)
        os.symlink("../images/b.png", "out/run.jsonl")
        refused(capsys, 2, "out/run.jsonl leads to images/b.png, which would be lost", *FOLDERS, *toy)


def test_what_is_no_picture_is_skipped_by_name(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    write_folders(here, **{"jf.jfif": "jf.png"})
    images = here / "images"
    Image.open(images / "a.png").save(images / "jf.jfif", "JPEG")
    for number in range(7):
        (images / f"note{number}.txt").write_text("text")
    (images / ".hidden.png").write_text("hidden")
    shutil.copy(images / "a.png", images / "a.png~")
    (images / "gone.png").symlink_to("nowhere")
    os.mkfifo(images / "pipe.png")
    (images / "sub").mkdir()
    document = as_json(capsys, *FOLDERS, *toy)
    assert [entry["output"] for entry in document["results"]] == [f"out/{n}.png" for n in ("a", "jf")]
    assert document["notes"] == [
        "10 files of images skipped: a.png~, gone.png, note0.txt, note1.txt, note2.txt and 5 more",
        "1 sub-folder of images skipped: sub",
    ]


def test_sub_folders_keep_their_place(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    """Even where results and masks lie in the same tree, and links make it endless."""
    write_folders(here, **{"x/a.png": "x/a_mask.png", "x/y/b.jpg": "x/y/b.png", "z/lonely.png": ""})
    (here / "masks").rename(here / "images" / "masks")
    os.symlink("..", "images/x/up")
    os.mkdir("elsewhere")
    os.rename("images/x/y", "elsewhere/y")
    os.symlink("../../elsewhere/y", "images/x/y")
    asked = ["run", "images", "images/masks", "--recursive", "--force", *toy, "-o"]
    for _ in range(2):  # the second time there are results in the tree
        assert main([*asked, "images/out"]) == 6
        out, err = capsys.readouterr()
        assert saved(out) == ["images/out/a.png", "images/out/x/a.png", "images/out/x/y/b.png"]
        assert "z/lonely.png: lonely.png has no mask: put lonely.png or lonely_mask.png into images/masks/z" in err
        assert "error: 3 of 4 done, 1 failed" in err and "[3/4] x/y/b.jpg" in err and "note: " not in err
    assert contents(here / "images" / "out") == {"a.png", "x", "x/a.png", "x/y", "x/y/b.png", "run.jsonl"}
    (here / "images" / "out2").mkdir()
    (here / "images" / "out2" / "x").write_text("a file")
    assert main([*asked, "images/out2"]) == 6
    assert "error: x/a.png: cannot make folder images/out2/x (File exists)" in capsys.readouterr().err


def test_names_are_compared_in_one_form_of_unicode(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    """As of files that have been on a Mac. The result keeps the image's spelling."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_folders(here, **{f"{decomposed}/{decomposed}.png": f"{composed}/{composed}.png"})
    assert main([*FOLDERS, *toy, "--recursive"]) == 0
    assert saved(capsys.readouterr().out) == ["out/a.png", f"out/{decomposed}/{decomposed}.png"]
    write_folders(here, **{f"{decomposed}.png": "", f"{composed}.jpg": f"{composed}.png"})
    assert main([*FOLDERS, *toy]) == 6
    assert "share a name: rename one" in capsys.readouterr().err


def test_pairs_by_order(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    write_folders(here, **{"b.png": "1.png", "c.png": "10.png"})
    by_order = (*toy, "--pair-by", "order")
    document = as_json(capsys, *FOLDERS, *by_order)
    pairs = [(entry["image"], entry["mask"], entry["output"]) for entry in document["results"]]
    masks = ["1.png", "10.png", "a.png"]
    assert pairs == [(f"images/{s}.png", f"masks/{m}", f"out/{s}.png") for s, m in zip("abc", masks, strict=True)]
    assert document["notes"] == ["paired by order: a.png with masks/1.png, and so on"]
    refused(capsys, 2, "needs two folders, but images is both", "run", "images", "images", *FOLDERS[3:], *by_order)
    (here / "images" / "c.png").rename(here / "images" / "b.jpg")
    assert main([*FOLDERS, *by_order]) == 6
    assert capsys.readouterr().err.count("b.jpg and b.png share a name: rename one") == 2
    os.remove("masks/1.png")
    refused(capsys, 2, "images holds 3 pictures and masks 2: add or remove", *FOLDERS, *by_order)


# --- folders of thousands: overlapped, and taken up again ------------------------------------------------


def write_batch(here: Path, count: int) -> list[str]:
    """``count`` pairs in the folder ``in``; returns a command that fills them."""
    for number in range(count):
        write_pair(here / "in", f"p{number}")
    return ["run", "in", "in", "-o", "out", "--steps", "2"]


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("jobs", ["3", "5"])
def test_the_device_does_not_wait_for_files(
    here: Path, toy: tuple[str, str], capsys: Captured, monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    """Reading, the network and writing take 0.1 s each, asleep: one after another they take three times as long."""
    asked = write_batch(here, 12)
    plain = OrtRuntime._run

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: (time.sleep(0.1), function(*arguments, **options))[1]

    def run(self: OrtRuntime, component: str, *given: Any) -> dict[str, np.ndarray]:
        time.sleep(0.1 if component == "denoiser" else 0)
        return plain(self, component, *given)

    monkeypatch.setattr(OrtRuntime, "_run", run)
    for name in ("pictures.read_picture", "pictures.write_picture"):
        module, _, function = f"moebius_edge.imaging.{name}".rpartition(".")
        monkeypatch.setattr(f"{module}.{function}", slow(getattr(sys.modules[module], function)))
    document = as_json(capsys, *asked, *toy, "--guidance", "1", "--jobs", jobs)
    assert [result["output"] for result in document["results"]] == sorted(f"out/p{n}.png" for n in range(12))
    stages, throughput = document["latency"]["stages"], document["latency"]["throughput"]
    serial_ms = sum(stages[name]["total_ms"] for name in ("read", "total", "write"))
    assert stages["read"]["count"] == stages["write"]["count"] == 12
    assert throughput["elapsed_ms"] < 0.6 * serial_ms and throughput["device_busy_percent"] > 60
    assert contents(here / "out") == {"run.jsonl", *(f"p{n}.png" for n in range(12))}


def test_few_pictures_are_in_memory_at_a_time(
    here: Path, toy: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moebius_edge.imaging import pictures

    asked, counts, plain = write_batch(here, 10), {"read": 0, "written": 0, "most": 0}, pictures.read_picture

    def read(path: Path) -> Any:
        counts["read"] += 1
        counts["most"] = max(counts["most"], counts["read"] - counts["written"])
        return plain(path)

    def write(path: Path, picture: Any) -> tuple[str, ...]:
        time.sleep(0.03)
        counts["written"] += 1
        Path(path).touch()
        return ()

    monkeypatch.setattr(pictures, "read_picture", read)
    monkeypatch.setattr(pictures, "write_picture", write)
    assert main([*asked, *toy, "--jobs", "2"]) == 0
    assert counts["read"] == counts["written"] == 10 and counts["most"] <= 2


def test_a_killed_run_goes_on_without_losing_or_repeating_a_picture(
    here: Path, toy: tuple[str, str], capsys: Captured
) -> None:
    """Killed outright, in a process of its own, as soon as some results are there."""
    asked = [*write_batch(here, 24), *toy]
    process = subprocess.Popen([sys.executable, "-m", "moebius_edge", *asked], stderr=subprocess.DEVNULL)
    log = here / "out" / "run.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 5):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    there = {line["name"]: (here / "out" / line["name"]).stat().st_mtime_ns for line in log_lines(here / "out")}
    log.write_text(log.read_text() + '{"name": "p1')  # what a full disk may leave of a line
    assert 5 <= len(there) < 24
    document = as_json(capsys, *asked)
    assert contents(here / "out") == {"run.jsonl", *(f"p{n}.png" for n in range(24))}
    before = {Path(result["output"]).name for result in document["results"] if "done_before" in result}
    assert before == set(there) and len(document["results"]) == 24
    assert all((here / "out" / name).stat().st_mtime_ns == when for name, when in there.items())
    assert document["latency"]["settings"]["pictures"] == 24 - len(there)
    whole = as_json(capsys, *asked[:4], "whole", *asked[5:])
    assert [r["settings"] for r in whole["results"]] == [r["settings"] for r in document["results"]]
    for number in range(24):
        assert (here / "out" / f"p{number}.png").read_bytes() == (here / "whole" / f"p{number}.png").read_bytes()


def test_what_has_changed_is_filled_again(here: Path, toy: tuple[str, str], tmp_path: Path, capsys: Captured) -> None:
    """Other settings do not pass for done, nor another model, a changed picture or mask, or a result that is gone."""
    asked = [*write_batch(here, 4), *toy]

    def filled(*options: str) -> list[str]:
        results = as_json(capsys, *asked, *options)["results"]
        return [Path(result["output"]).stem for result in results if "done_before" not in result]

    every = [f"p{n}" for n in range(4)]
    assert filled() == every and filled() == [] and filled("--jobs", "1", "--guidance", "2") == []
    assert filled("--seed", "1") == every and filled("--seed", "1") == [] and filled("--seed", "1", "--force") == every
    assert filled("--mask-dilate", "2") == every and filled("--scheduler", "dpm++2m") == every and filled() == every
    (here / "out" / "p0.png").unlink()
    (here / "out" / "p1.png").write_bytes(b"half")
    write_pair(here / "in", "p2", size=(96, 88))
    os.utime(here / "in" / "p3_mask.png", (1, 1))
    assert filled() == every and filled() == []
    write_pair(here / "in", "p4")
    assert filled() == ["p4"]
    assert filled("--bundle", str(make_toy_bundle(tmp_path / "other", deep=True))) == [*every, "p4"]
    capsys.readouterr()
    assert main([*asked, "--bundle", str(tmp_path / "other")]) == 0
    out, err = capsys.readouterr()
    message = "5 of 5 pictures were done before with the same settings, says out/run.jsonl: --force fills them again"
    assert (out, err) == ("5 of 5 done\n", f"note: {message}\n")


def test_every_picture_of_a_folder_has_a_line(here: Path, toy: tuple[str, str], capsys: Captured) -> None:
    asked = write_batch(here, 3)
    (here / "in" / "p1.png").write_text("no picture")
    assert main([*asked, *toy]) == 6
    lines = {line["name"]: line for line in log_lines(here / "out")}
    assert set(lines) == {"p0.png", "p1.png", "p2.png"}
    assert lines["p0.png"]["settings"]["steps"] == 2 and lines["p0.png"]["latency_ms"]["denoise"] > 0
    assert lines["p0.png"]["image"] == "in/p0.png" and lines["p0.png"]["output"] == "out/p0.png"
    assert lines["p1.png"]["exit_code"] == 2 and "in/p1.png" in lines["p1.png"]["error"]
    out, err = capsys.readouterr()
    assert "throughput " in out and "device busy percent" in out
    write_pair(here / "in", "p1")
    results = as_json(capsys, *asked, *toy)["results"]
    assert ["done_before" in result for result in results] == [True, False, True]


def test_an_error_is_printed_while_a_decoder_is_silenced(here: Path, toy: tuple[str, str]) -> None:
    """A reader of a 16-bit picture points descriptor 2 elsewhere; what the program says meanwhile is still seen."""
    write_batch(here, 2)
    (here / "in" / "p0.png").write_text("no picture")
    code = (
        "import os, sys\nfrom moebius_edge import cli\nfrom moebius_edge.commands import console\n"
        "plain = console.print_error\n"
        "def print_error(*given):\n"
        "    saved = os.dup(2); os.dup2(os.open(os.devnull, os.O_WRONLY), 2)\n"
        "    plain(*given); os.dup2(saved, 2)\n"
        "console.print_error = print_error\n"
        f"sys.exit(cli.main(['run', 'in', 'in', '-o', 'out', *{toy!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 6 and "error: p0.png: in/p0.png" in done.stderr and "1 of 2 done" in done.stderr


# --- the process -----------------------------------------------------------------------------------------


def test_paths_that_are_not_utf8(here: Path, toys: Callable[..., Path], capsys: Captured) -> None:
    """Of the bundle, the folders and the pictures; what is printed and written is valid all the same."""
    name = os.fsdecode(b"b\xe9")
    (here / name).mkdir()
    for ending in (".png", "_mask.png"):
        shutil.copy(here / f"photo{ending}", here / name / f"{name}{ending}")
    shutil.copytree(toys(), here / name / "bundle")
    out = os.path.join(name, "out")
    options = ("--bundle", os.path.join(name, "bundle"), "--latency-report", f"{name}/l.json")
    document = as_json(capsys, "run", name, name, "-o", out, *options)
    assert document["results"][0]["image"] == "b\\xe9/b\\xe9.png"
    assert json.loads((here / name / "l.json").read_text("utf-8"))["bundle"]["name"] == "toy"
    assert contents(here / out) == {f"{name}.png", "run.jsonl"}
    assert as_json(capsys, "run", name, name, "-o", out, *options)["results"][0]["done_before"] is True


@pytest.mark.parametrize(
    ("runtime", "line"), [("onnxruntime", "[I:onnxruntime:"), ("openvino", "openvino denoiser of 2: ")]
)
def test_verbose_shows_what_the_runtime_logs(here: Path, toy: tuple[str, str], runtime: str, line: str) -> None:
    pytest.importorskip(runtime, reason=f"the extra {runtime} is not installed")
    command = [sys.executable, "-m", "moebius_edge", *PAIR, *toy, "--device", "cpu", "--runtime", runtime]
    quiet, verbose = (
        subprocess.run([*command, *more], capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": "cache"})
        for more in ((), ("--verbose",))
    )
    assert quiet.returncode == verbose.returncode == 0
    assert line in verbose.stderr and line not in quiet.stderr and line not in verbose.stdout


def test_a_terminal_gets_a_bar_and_the_result_stays(here: Path, toy: tuple[str, str]) -> None:
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-m", "moebius_edge", *PAIR, *toy]
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
