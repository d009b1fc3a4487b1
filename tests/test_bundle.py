"""A bundle that loads is whole and fits this program; anything else is refused with what mends it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import INT8

from moebius_edge.bundle import bundle as bundle_module
from moebius_edge.bundle.bundle import Bundle, resolve_bundle, write_bundle
from moebius_edge.errors import BundleError
from moebius_edge.spec import COMPONENTS
from moebius_edge.system.files import sha256_file

ONNX_FILES = {f"{name}.onnx": f"graph of {name}".encode() for name in COMPONENTS}
SOURCE = {"checkpoint": {"file": "student.safetensors", "sha256": "00" * 32}}
DELETED = object()
AGAIN = "copy or download the bundle again, or make it again with `moebius-edge export`"


def make(folder: Path, **changes: Any) -> Path:
    """A bundle whose graphs are a few bytes of text: this module never opens them."""
    folder.mkdir(exist_ok=True)
    for name, content in ONNX_FILES.items():
        (folder / name).write_bytes(content)
    if "deep_channels" in changes:
        (folder / "denoiser_shallow.onnx").write_text("the finest level")
    values: dict[str, Any] = {
        "name": "test",
        "description": "a test – nothing more",
        "licence": "Apache-2.0",
        "model": {"block_out_channels": [32, 64, 128]},
        "resolution": 256,
        "scaling_factor": 0.13025,
        "precision": "float32",
        "source": SOURCE,
        "gate": {"psnr_db": 91.5},
        "tools": {"torch": "2.13.0"},
        "defaults": {"steps": 20, "guidance": 2.0, "start": "image"},
    }
    write_bundle(folder, **(values | changes))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "bundle.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_round_trip(tmp_path: Path) -> None:
    folder = make(tmp_path / "b", resolution=512, precision="int8", int8=INT8)
    bundle = Bundle.load(folder)
    assert Bundle.load(str(folder)) == bundle and bundle.path == folder
    text = (folder / "bundle.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "schema_version": 3,\n  "name": "test",\n') and text.endswith("}\n")
    assert "a test – nothing more" in text, "the file is for people"
    make(tmp_path / "c", resolution=512, precision="int8", int8=INT8)
    assert (tmp_path / "c/bundle.json").read_text(encoding="utf-8") == text, "it is the same each time"
    assert not {"distilled_guidance", "deep_channels"} & json.loads(text).keys()
    summary = json.loads(json.dumps(bundle.summary()))
    assert {key: summary[key] for key in json.loads(text)} == json.loads(text)
    assert summary["total_bytes"] == sum(map(len, ONNX_FILES.values())) and summary["path"] == str(folder)
    assert (bundle.latent_size, bundle.scaling_factor, bundle.source, bundle.int8) == (64, 0.13025, SOURCE, INT8)
    assert bundle.scheduler["beta_start"] == 0.00085 and bundle.scheduler["noise_offset"] == 0.0357
    record = {"sha256": sha256_file(folder / "denoiser.onnx"), "bytes": len(ONNX_FILES["denoiser.onnx"])}
    assert bundle.files["denoiser.onnx"] == record
    assert bundle.component_path("denoiser") == folder / "denoiser.onnx"
    assert list(bundle.components) == ["vae_encoder", "denoiser", "vae_decoder"]
    sample, timestep, branch = bundle.components["denoiser"].inputs
    assert (sample.name, sample.dtype, sample.shape) == ("sample", "float32", ("N", 9, 64, 64))
    assert (timestep.dtype, timestep.shape, branch.dtype) == ("float32", ("N",), "int64")
    assert bundle.components["vae_decoder"].outputs[0].shape == ("N", 3, 512, 512)


def test_a_deep_feature_brings_a_file(tmp_path: Path) -> None:
    defaults = {"steps": 20, "guidance": 2.5, "start": "image"}
    bundle = Bundle.load(make(tmp_path / "b", deep_channels=64, distilled_guidance=2.5, defaults=defaults))
    assert list(bundle.components) == ["vae_encoder", "denoiser", "denoiser_shallow", "vae_decoder"]
    whole, shallow = bundle.components["denoiser"], bundle.components["denoiser_shallow"]
    assert whole.outputs[1] == shallow.inputs[3] and shallow.inputs[:3] == whole.inputs
    assert (whole.outputs[1].name, whole.outputs[1].shape) == ("deep", ("N", 64, 32, 32))
    assert shallow.outputs == whole.outputs[:1] and bundle.branches == 1
    (bundle.path / "denoiser_shallow.onnx").unlink()
    edit(bundle.path, lambda data: data["files"].pop("denoiser_shallow.onnx"))
    with pytest.raises(BundleError, match=r"files lacks 'denoiser_shallow\.onnx'"):
        Bundle.load(bundle.path)


def test_other_files_are_hashed_but_not_engines_or_hidden_ones(tmp_path: Path) -> None:
    folder = make(tmp_path / "b")
    for name in ("denoiser.onnx.data", "engines/key/denoiser.plan", ".cache/lock", ".hidden", "NOTICE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    make(folder)
    (folder / "engines/key/denoiser.plan").write_text("rebuilt")
    edit(folder, lambda data: data.update(colour="an unknown field, which is ignored"))
    assert list(Bundle.load(folder).files) == sorted([*ONNX_FILES, "NOTICE", "denoiser.onnx.data"])


@pytest.mark.parametrize("verify", [True, False])
def test_an_altered_truncated_or_missing_file_is_refused(tmp_path: Path, verify: bool) -> None:
    path = make(tmp_path / "b") / "vae_decoder.onnx"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes().replace(b"graph", b"grapi"))
    if verify:
        with pytest.raises(BundleError, match=f"vae_decoder.onnx was altered, .*: {re.escape(AGAIN)}"):
            Bundle.load(tmp_path / "b")
    else:
        Bundle.load(tmp_path / "b", verify=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"vae_decoder.onnx has {size - 1} bytes, {size} are recorded"):
        Bundle.load(tmp_path / "b", verify=verify)
    path.unlink()
    with pytest.raises(BundleError, match=f"vae_decoder.onnx is missing: {re.escape(AGAIN)}"):
        Bundle.load(tmp_path / "b", verify=verify)


@pytest.mark.parametrize("version", [4, "3", None])
def test_another_schema_is_refused_first(tmp_path: Path, version: object) -> None:
    """Whatever else is wrong, for another version may have other fields."""
    edit(make(tmp_path / "b"), lambda data: data.update(schema_version=version, description=7))
    message = re.escape(f"schema_version is {version!r}, expected 3: run `pip install --upgrade moebius-edge`, or copy")
    with pytest.raises(BundleError, match=message):
        Bundle.load(tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "this is not valid JSON"),
        (b"[" * 100_000, "this is not valid JSON"),
        (b'{"a": ' * 33 + b"1" + b"}" * 33, "this is not valid JSON .it nests more than 32 deep"),
        (b'{"a": NaN}', "the number nan is not finite"),
        (b'{"a": ' + b"9" * 20 + b"}", "a whole number has more than 64 bits"),
        (b'{"a": "\\ud800"}', r"the text '\\ud800' has characters that cannot be printed"),
        (b'{"a\\u001b[2J": 1}', r"the text 'a\\x1b\[2J' has characters that cannot be printed"),
        (b" " * (3 << 20) + b"{}", "the file has 3145730 bytes, expected at most 2097152"),
        (b"[]", "this should hold a JSON object"),
        (b"{}", "schema_version is missing"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (make(tmp_path / "b") / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(tmp_path / "b")
    assert str(caught.value).endswith(AGAIN) and "\n" not in str(caught.value)


def test_a_pipe_is_refused_and_not_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "b")
    (folder / "denoiser.onnx").unlink()
    os.mkfifo(folder / "denoiser.onnx")
    with pytest.raises(BundleError, match=r"denoiser\.onnx is not a regular file: copy"):
        Bundle.load(folder)
    (folder / "bundle.json").rename(tmp_path / "elsewhere.json")
    os.mkfifo(folder / "bundle.json")
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        Bundle.load(folder)
    (folder / "bundle.json").unlink()
    (folder / "bundle.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match=r"'bundle\.json' leaves the folder"):
        Bundle.load(folder)


RECORD = {"sha256": "0" * 64, "bytes": 1}
EDITS: list[tuple[str, Any, str]] = [
    ("resolution", 100, "resolution is 100, expected a multiple of 8"),
    ("latent_size", 64, "latent_size is 64, expected 8, an eighth of the resolution"),
    ("name", "two\nlines", r"name is 'two\\nlines', expected to match pattern"),
    ("scheduler/beta_end", 0.02, "scheduler.beta_end is 0.02 there, 0.012 here"),
    ("defaults/guidance", DELETED, "defaults.guidance is missing"),
    ("defaults/guidance", 3.0, "defaults.guidance is 3.0, expected 2.0, which is distilled"),
    ("defaults/match_depth", -1, "defaults.match_depth is -1, expected greater than or equal to 0"),
    ("defaults/strength", 0.01, "defaults.strength is 0.01, expected more: of 20 steps it leaves none"),
    ("deep_channels", 32, "components.denoiser.outputs is .*64.* there, .*32.* here"),
    ("precision", "float16", "precision is 'float16', expected 'int8' with the field int8"),
    ("files/denoiser.onnx", DELETED, "files lacks 'denoiser.onnx'"),
    ("files/denoiser.onnx/bytes", 1 << 50, "files.denoiser.onnx.bytes is 1125899906842624, expected less than"),
    ("files/a\nb", RECORD, r"files.a\\nb is 'a\\nb', expected to match pattern"),
    ("files/..", RECORD, r"'\.\.' leaves the folder"),
    ("components/vae_encoder", DELETED, "components.vae_encoder is None there"),
    ("components/extra", {"file": "x", "inputs": [], "outputs": []}, "components.extra is .* there, None here"),
    ("components/denoiser/inputs/1/dtype", "float16", "denoiser.inputs is .*float16.* there, .*float32.* here"),
]


@pytest.mark.parametrize(("path", "value", "message"), EDITS, ids=[m for _, _, m in EDITS])
def test_a_field_that_does_not_fit_is_refused(tmp_path: Path, path: str, value: Any, message: str) -> None:
    defaults = {"steps": 20, "guidance": 2.0, "start": "image"}
    changes = {"int8": INT8, "precision": "int8", "distilled_guidance": 2.0, "defaults": defaults, "resolution": 64}

    def change(data: Any) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        for key in parents:
            data = data[key]
        data[last] = value
        if value is DELETED:
            del data[last]

    edit(make(tmp_path / "b", deep_channels=64, **changes), change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(tmp_path / "b")
    assert "again" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_names_the_ways_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle folder .*no: .*`tiny`.*`moebius-edge export SOURCE"):
        Bundle.load(tmp_path / "no")
    with pytest.raises(BundleError, match=r"holds no bundle\.json: .*`moebius-edge export"):
        Bundle.load(tmp_path)
    file = make(tmp_path / "b") / "bundle.json"
    with pytest.raises(BundleError, match=r"is a file: name the folder that holds bundle\.json"):
        Bundle.load(file)


def test_the_name_tiny_is_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "ASSETS", tmp_path / "assets")
    with pytest.raises(BundleError, match="'tiny' is missing from .*pip install --force-reinstall"):
        resolve_bundle("tiny")
    (tmp_path / "assets").mkdir()
    make(tmp_path / "assets" / "tiny")
    assert Bundle.load("tiny").name == "test"
    (tmp_path / "assets/tiny/denoiser.onnx").unlink()
    with pytest.raises(BundleError, match="denoiser.onnx is missing: run `pip install --force-reinstall"):
        Bundle.load("tiny")
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "tiny", name="mine")
    assert Bundle.load("./tiny").name == Bundle.load(Path("tiny")).name == "mine"


def test_write_refuses_what_load_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="resolution is 250, expected a multiple of 8"):
        make(tmp_path / "a", resolution=250)
    with pytest.raises(BundleError, match="defaults.start is missing"):
        make(tmp_path / "b", defaults={"steps": 20, "guidance": 2.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        make(tmp_path / "c", gate={"psnr_db": float("inf")})
    assert not (tmp_path / "c" / "bundle.json").exists()


def test_settings_that_were_not_chosen_are_the_bundles(tmp_path: Path) -> None:
    defaults = {"steps": 20, "guidance": 2.0, "start": "prefill", "strength": 0.4}
    bundle = Bundle.load(make(tmp_path / "b", defaults=defaults))
    assert bundle.settings(seed=3) == {**defaults, "seed": 3}
    assert bundle.settings(steps=4, strength=1.0) == {**defaults, "steps": 4, "strength": 1.0}
    assert "strength" not in bundle.settings(start="image"), "it suits the bundle's own start alone"


def test_the_published_schemas_are_those_of_the_program(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "docs/schemas"
    subprocess.run([sys.executable, folder / "generate.py", tmp_path], check=True)
    texts = [{path.name: json.loads(path.read_text()) for path in f.glob("*.json")} for f in (tmp_path, folder)]
    assert {"bundle.schema.json", "engine.schema.json"} <= texts[0].keys()
    assert texts[0] == texts[1], "run `make schemas`"


def test_loading_imports_no_runtime(tmp_path: Path) -> None:
    folder = make(tmp_path / "b")
    code = (
        "import sys; from moebius_edge.bundle.bundle import Bundle; Bundle.load(sys.argv[1])\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
