"""A bundle that loads is whole and fits this program; anything else is refused with what mends it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import INT8

from moebius_edge import bundle as bundle_module
from moebius_edge.bundle import Bundle, resolve_bundle, write_bundle
from moebius_edge.errors import BundleError
from moebius_edge.files import sha256_file
from moebius_edge.spec import COMPONENTS

ONNX_FILES = {f"{name}.onnx": f"graph of {name}".encode() for name in COMPONENTS}
AGAIN = "copy or download the bundle again, or make it again with `moebius-edge export`"


def make(folder: Path, **changes: Any) -> Path:
    """A bundle whose graphs are a few bytes of text: this module never opens them."""
    folder.mkdir(exist_ok=True)
    for name, content in ONNX_FILES.items():
        (folder / name).write_bytes(content)
    values: dict[str, Any] = {
        "name": "test",
        "description": "a test – nothing more",
        "licence": "Apache-2.0",
        "model": {"block_out_channels": [32, 64, 128]},
        "resolution": 256,
        "scaling_factor": 0.13025,
        "precision": "fp32",
        "source": {"checkpoint": "00" * 32},
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
    folder = make(tmp_path / "b")
    bundle = Bundle.load(folder)
    assert (bundle.path, bundle.name, bundle.resolution, bundle.latent_size) == (folder, "test", 256, 32)
    assert (bundle.precision, bundle.scaling_factor) == ("fp32", 0.13025)
    assert bundle.description == "a test – nothing more" and bundle.licence == "Apache-2.0"
    assert bundle.model == {"block_out_channels": [32, 64, 128]}
    assert bundle.defaults == {"steps": 20, "guidance": 2.0, "start": "image"}
    assert bundle.scheduler["beta_start"] == 0.00085 and bundle.scheduler["noise_offset"] == 0.0357
    assert bundle.gate == {"psnr_db": 91.5} and bundle.tools == {"torch": "2.13.0"}
    assert bundle.source == {"checkpoint": "00" * 32}
    assert bundle.files["denoiser.onnx"] == {
        "sha256": sha256_file(folder / "denoiser.onnx"),
        "bytes": len(ONNX_FILES["denoiser.onnx"]),
    }
    assert bundle.component_path("denoiser") == folder / "denoiser.onnx"
    assert Bundle.load(str(folder)) == bundle


def test_components_have_their_sizes_filled_in(tmp_path: Path) -> None:
    components = Bundle.load(make(tmp_path / "b", resolution=512)).components
    assert list(components) == ["vae_encoder", "denoiser", "vae_decoder"]
    sample, timestep, branch = components["denoiser"].inputs
    assert (sample.name, sample.dtype, sample.shape) == ("sample", "float32", ("N", 9, 64, 64))
    assert (timestep.dtype, timestep.shape) == ("float32", ("N",))
    assert (branch.dtype, branch.shape) == ("int64", ("N",))
    assert components["vae_decoder"].outputs[0].shape == ("N", 3, 512, 512)


def test_the_file_is_for_people_and_the_same_each_time(tmp_path: Path) -> None:
    first = (make(tmp_path / "a") / "bundle.json").read_text(encoding="utf-8")
    second = (make(tmp_path / "b") / "bundle.json").read_text(encoding="utf-8")
    assert first == second
    assert first.startswith('{\n  "schema_version": 1,\n  "name": "test",\n')
    assert "a test – nothing more" in first and first.endswith("}\n")


def test_a_deep_feature_raises_the_schema_and_brings_a_file(tmp_path: Path) -> None:
    """A program that reads schema 2 would take the denoiser's second output for a damaged file."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b/denoiser_shallow.onnx").write_text("the finest level")
    folder = make(tmp_path / "b", deep_channels=64)
    written = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    assert (written["schema_version"], written["deep_channels"]) == (3, 64)
    bundle = Bundle.load(folder)
    assert list(bundle.components) == ["vae_encoder", "denoiser", "denoiser_shallow", "vae_decoder"]
    whole, shallow = bundle.components["denoiser"], bundle.components["denoiser_shallow"]
    assert whole.outputs[1] == shallow.inputs[3] and shallow.inputs[:3] == whole.inputs
    assert (whole.outputs[1].name, whole.outputs[1].shape) == ("deep", ("N", 64, 32, 32))
    assert shallow.outputs == whole.outputs[:1]
    assert bundle.deep_channels == bundle.summary()["deep_channels"] == 64 and bundle.summary()["schema_version"] == 3
    plain = Bundle.load(make(tmp_path / "plain"))
    assert plain.deep_channels is None and plain.summary()["schema_version"] == 1
    distilled = {"steps": 20, "guidance": 2.5, "start": "image"}
    both = Bundle.load(make(folder, deep_channels=64, distilled_guidance=2.5, defaults=distilled))
    assert (both.deep_channels, both.distilled_guidance, both.summary()["schema_version"]) == (64, 2.5, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema version 1 does not go with 'distilled_guidance' None and 'deep_channels' 64"),
        ({"deep_channels": None}, "schema version 3 does not go with .* and 'deep_channels' None"),
        ({"deep_channels": 0}, "'deep_channels' should be a whole number of 1 or more and is 0"),
        ({"deep_channels": True}, "'deep_channels' should be a whole number of 1 or more and is True"),
        ({"deep_channels": "64"}, "'deep_channels' should be a whole number of 1 or more and is '64'"),
        ({"deep_channels": 32}, "component 'denoiser' has outputs .*64.*, this program needs .*32"),
        ({"files": {}}, "'files' lacks 'vae_encoder.onnx'"),
    ],
)
def test_a_deep_feature_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/denoiser_shallow.onnx").write_text("the finest level")
    edit(make(tmp_path / "b", deep_channels=64), lambda data: data.update(change))
    with pytest.raises(BundleError, match=message):
        Bundle.load(tmp_path / "b")


def test_without_its_shallow_part_none_is_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"'files' lacks 'denoiser_shallow\.onnx'"):
        make(tmp_path / "b", deep_channels=64)


def test_other_files_are_hashed_but_not_engines_or_hidden_ones(tmp_path: Path) -> None:
    folder = make(tmp_path / "b")
    for name in ("denoiser.onnx.data", "engines/key/denoiser.plan", ".cache/lock", ".hidden", "NOTICE"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    make(folder)
    assert list(Bundle.load(folder).files) == [
        "NOTICE",
        "denoiser.onnx",
        "denoiser.onnx.data",
        "vae_decoder.onnx",
        "vae_encoder.onnx",
    ]
    (folder / "engines/key/denoiser.plan").write_text("rebuilt")
    Bundle.load(folder)


def test_summary_is_json_and_complete(tmp_path: Path) -> None:
    folder = make(tmp_path / "b")
    summary = json.loads(json.dumps(Bundle.load(folder).summary()))
    written = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    assert {key: summary[key] for key in written} == written
    assert summary["total_bytes"] == sum(map(len, ONNX_FILES.values()))
    assert summary["path"] == str(folder)


@pytest.mark.parametrize("name", ONNX_FILES)
def test_a_flipped_byte_is_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "b") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was altered, .*: {re.escape(AGAIN)}"):
        Bundle.load(tmp_path / "b")
    Bundle.load(tmp_path / "b", verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_or_missing_file_is_refused(tmp_path: Path, verify: bool) -> None:
    path = make(tmp_path / "b") / "vae_decoder.onnx"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=rf"vae_decoder.onnx has {size - 1} bytes, {size} are recorded"):
        Bundle.load(tmp_path / "b", verify=verify)
    path.unlink()
    with pytest.raises(BundleError, match=f"vae_decoder.onnx is missing: {re.escape(AGAIN)}"):
        Bundle.load(tmp_path / "b", verify=verify)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (4, r"schema version 4 is unknown, this program reads 1 to 3: run `pip install --upgrade"),
        (0, r"schema version 0 is unknown, .*: copy or download the bundle again"),
        ("1", r"'schema_version' should be a whole number and is '1'"),
        (True, r"'schema_version' should be a whole number and is True"),
        (None, r"'schema_version' should be a whole number and is None"),
    ],
)
def test_unknown_schema_is_refused(tmp_path: Path, version: object, message: str) -> None:
    edit(make(tmp_path / "b"), lambda data: data.update(schema_version=version, description=7))
    with pytest.raises(BundleError, match=message):
        Bundle.load(tmp_path / "b")


def test_distilled_guidance_raises_the_schema(tmp_path: Path) -> None:
    """A program that reads schema 1 alone would guide such a network a second time, without an error."""
    defaults = {"steps": 20, "guidance": 2.5, "start": "image"}
    folder = make(tmp_path / "b", distilled_guidance=2.5, defaults=defaults)
    written = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    assert (written["schema_version"], written["distilled_guidance"]) == (2, 2.5)
    bundle = Bundle.load(folder)
    assert bundle.distilled_guidance == 2.5
    assert {key: bundle.summary()[key] for key in written} == written
    plain = make(tmp_path / "plain")
    assert "distilled_guidance" not in (plain / "bundle.json").read_text(encoding="utf-8")
    assert Bundle.load(plain).distilled_guidance is None
    assert Bundle.load(plain).summary()["distilled_guidance"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema version 1 does not go with 'distilled_guidance' 2.0"),
        ({"distilled_guidance": None}, "schema version 2 does not go with 'distilled_guidance' None"),
        ({"distilled_guidance": 1.0}, "'distilled_guidance' should be a number of more than 1 and is 1.0"),
        ({"distilled_guidance": "2"}, "'distilled_guidance' should be a number of more than 1 and is '2'"),
        ({"distilled_guidance": True}, "'distilled_guidance' should be a number of more than 1 and is True"),
        ({"distilled_guidance": float("nan")}, "'distilled_guidance' should be a number of more than 1 and is nan"),
        ({"distilled_guidance": 3.0}, "'defaults' has the guidance 2.0, and 3.0 is distilled"),
    ],
)
def test_a_distilled_guidance_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    edit(make(tmp_path / "b", distilled_guidance=2.0), lambda data: data.update(change))
    with pytest.raises(BundleError, match=message):
        Bundle.load(tmp_path / "b")


def test_an_int8_bundle_says_how_it_was_quantised(tmp_path: Path) -> None:
    bundle = Bundle.load(make(tmp_path / "b", precision="int8", int8=INT8))
    assert bundle.int8 == INT8 == bundle.summary()["int8"]
    assert Bundle.load(make(tmp_path / "plain")).int8 is None
    assert '"int8"' not in (tmp_path / "plain" / "bundle.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "float16"}, "'int8' does not go with the precision 'float16'"),
        ({"int8": []}, r"'int8' should be an object and is \[\]"),
        ({"int8": {}}, "'int8.target' should be a text and is missing"),
        ({"int8": {**INT8, "target": 8}}, "'int8.target' should be a text and is 8"),
        ({"int8": {**INT8, "nodes": "a"}}, "'int8.nodes' should be a list and is 'a'"),
        ({"int8": {**INT8, "nodes": ["a", 1]}}, "'int8.nodes' should hold names of nodes and has 1"),
        ({"int8": {**INT8, "products": True}}, "'int8.products' should be a whole number and is True"),
        ({"int8": {**INT8, "share_of_multiplications": None}}, "'int8.share_of_.* should be a number and is None"),
    ],
)
def test_an_int8_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    edit(make(tmp_path / "b", precision="int8", int8=INT8), lambda data: data.update(change))
    with pytest.raises(BundleError, match=f"{message}: copy or download"):
        Bundle.load(tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"schema_version": 1,', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "should hold a JSON object"),
        (b"{}", "'schema_version' should be a whole number and is missing"),
        (b'{"schema_version": 1}', "'name' should be a text and is missing"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (make(tmp_path / "b") / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.load(tmp_path / "b")
    assert str(caught.value).endswith(AGAIN) and "\n" not in str(caught.value)


EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.update(resolution=100), "'resolution' 100 is not a positive multiple of 8"),
    (lambda d: d.update(resolution="256"), "'resolution' should be a whole number and is '256'"),
    (lambda d: d.update(resolution=-256), "'resolution' -256 is not"),
    (lambda d: d.update(latent_size=64), "'latent_size' 64 does not fit 'resolution' 256"),
    (lambda d: d.update(scaling_factor=0), "'scaling_factor' should be positive and is 0"),
    (lambda d: d.update(scaling_factor=float("nan")), "'scaling_factor' should be positive and is nan"),
    (lambda d: d.update(gate=None), "'gate' should be an object and is None"),
    (lambda d: d["scheduler"].update(beta_end=0.02), "scheduler 'beta_end' is 0.02, .* with 0.012"),
    (lambda d: d["scheduler"].pop("prediction"), "scheduler 'prediction' is None, .* 'epsilon'"),
    (lambda d: d["defaults"].pop("guidance"), "'defaults' lacks 'guidance'"),
    (lambda d: d["files"].pop("denoiser.onnx"), "'files' lacks 'denoiser.onnx'"),
    (lambda d: d["files"].update({"denoiser.onnx": "abc"}), "record of file 'denoiser.onnx' should hold"),
    (lambda d: d["files"]["denoiser.onnx"].pop("bytes"), "record of file 'denoiser.onnx' should hold"),
    (lambda d: d["files"].update({"../x.onnx": d["files"]["denoiser.onnx"]}), r"'\.\./x\.onnx' leaves"),
    (lambda d: d["files"].update({"/etc/passwd": d["files"]["denoiser.onnx"]}), "'/etc/passwd' leaves"),
    (lambda d: d["components"].pop("vae_encoder"), "component 'vae_encoder' is missing"),
    (lambda d: d["components"].update(extra={}), "unknown component 'extra'"),
    (lambda d: d["components"]["denoiser"].update(file="x.onnx"), 'has file "x.onnx", .*"denoiser.onnx"'),
    (lambda d: d["components"]["denoiser"].update(more=1), r"has unknown entries \['more'\]"),
    (
        lambda d: d["components"]["denoiser"]["inputs"][1].update(dtype="float16"),
        r'component \'denoiser\' has inputs .*"timestep", "dtype": "float16".* needs .*"float32"',
    ),
    (
        lambda d: d["components"]["vae_decoder"]["outputs"][0].update(shape=["N", 3, 512, 512]),
        r"component 'vae_decoder' has outputs .*\[\"N\", 3, 512, 512\].*needs .*\[\"N\", 3, 256, 256\]",
    ),
    (lambda d: d["components"]["denoiser"]["inputs"].pop(), "component 'denoiser' has inputs"),
]


@pytest.mark.parametrize(("change", "message"), EDITS, ids=[m for _, m in EDITS])
def test_a_field_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(make(tmp_path / "b"), change)
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
    assert resolve_bundle("tiny") == tmp_path / "assets" / "tiny"
    assert Bundle.load("tiny").name == "test"
    (tmp_path / "assets/tiny/denoiser.onnx").unlink()
    with pytest.raises(BundleError, match="denoiser.onnx is missing: run `pip install --force-reinstall"):
        Bundle.load("tiny")
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "tiny", name="mine")
    assert Bundle.load("./tiny").name == "mine"
    assert Bundle.load(Path("tiny")).name == "mine"


def test_write_refuses_what_load_would_refuse(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'resolution' 250 is not a positive multiple of 8"):
        make(tmp_path / "a", resolution=250)
    with pytest.raises(BundleError, match="'defaults' lacks 'start'"):
        make(tmp_path / "b", defaults={"steps": 20, "guidance": 2.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        make(tmp_path / "c", gate={"psnr_db": float("inf")})
    assert not (tmp_path / "c" / "bundle.json").exists()
    (tmp_path / "d").mkdir()
    values = json.loads((make(tmp_path / "e") / "bundle.json").read_text(encoding="utf-8"))
    derived = {"schema_version", "latent_size", "scheduler", "components", "files"}
    with pytest.raises(BundleError, match=r"'files' lacks 'vae_encoder\.onnx'"):
        write_bundle(tmp_path / "d", **{k: v for k, v in values.items() if k not in derived})


def test_settings_that_were_not_chosen_are_the_bundles(tmp_path: Path) -> None:
    defaults = {"steps": 20, "guidance": 2.0, "start": "prefill", "strength": 0.4}
    bundle = Bundle.load(make(tmp_path / "b", defaults=defaults))
    assert bundle.settings(seed=3) == {**defaults, "seed": 3}
    assert bundle.settings(steps=4, strength=1.0) == {**defaults, "steps": 4, "strength": 1.0}
    assert "strength" not in bundle.settings(start="image"), "it suits the bundle's own start alone"


def test_loading_imports_no_runtime(tmp_path: Path) -> None:
    folder = make(tmp_path / "b")
    code = (
        "import sys; from moebius_edge.bundle import Bundle; Bundle.load(sys.argv[1])\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'numpy', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
