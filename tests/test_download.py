"""``moebius-edge download`` against a hub that is not there: what is asked for, said and reused."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest
from commanding import Captured, as_json, printed, refused

from moebius_edge.cli import main
from moebius_edge.commands import download
from moebius_edge.training.perceptual import ELATENTLPIPS_FILES

CHECKPOINT = "ft_places2/diffusion_pytorch_model.bin"
SHA256 = hashlib.sha256(b"weights").hexdigest()
DISTANCE = ("elatentlpips_ckpt/sdxl_latest_vgg16_tuned.pth", "elatentlpips_ckpt/sdxl_latent_vgg16.pth.tar")
VAE = ("vae/config.json", "vae/diffusion_pytorch_model.bin")
PLACES2 = ("download", "places2")


class Hub:
    """``snapshot_download`` on a folder: a cache that is filled by the calls that may use the network."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.remote: dict[str, tuple[str, ...]] = {
            "hustvl/Moebius": (CHECKPOINT, "README.md"),
            "hustvl/PixelHacker": (*VAE, "pretrained/diffusion_pytorch_model.bin"),
            "Mingguksky/elatentlpips": (*DISTANCE, "elatentlpips_ckpt/sd3_latent_vgg16.pth.tar"),
        }
        self.online: list[dict[str, Any]] = []
        self.failure: BaseException | None = None

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        folder = options["local_dir"] or self.cache / repo_id.replace("/", "--")
        if options.pop("local_files_only", False):
            if not folder.is_dir():
                raise hub_errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
            return str(folder)
        self.online.append({"repo_id": repo_id, "allow_patterns": allow_patterns, **options})
        if self.failure is not None:
            raise self.failure
        for name in self.remote[repo_id]:
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"weights")
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setenv("HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(download, "KNOWN", {key: (7, SHA256) for key in download.KNOWN})
    monkeypatch.chdir(tmp_path)
    return made


def test_weights_and_vae_are_fetched_and_the_next_command_named(hub: Hub, capsys: Captured) -> None:
    assert main(["download", "places2"]) == 0
    out, err = capsys.readouterr()
    weights, vae = hub.online
    assert weights["repo_id"] == "hustvl/Moebius" and CHECKPOINT in weights["allow_patterns"]
    assert vae["repo_id"] == "hustvl/PixelHacker", "0.8 GB of teacher stay there"
    assert all(pattern.startswith("vae/") for pattern in vae["allow_patterns"])
    checkpoint, folder = hub.cache / "hustvl--Moebius" / CHECKPOINT, hub.cache / "hustvl--PixelHacker" / "vae"
    command = f"moebius-edge export {checkpoint} --vae {folder} --output moebius-places2"
    assert out.splitlines() == [
        f"weights  {checkpoint} (7 B)",
        f"sha256   {SHA256}",
        f"VAE      {folder} (7 B)",
        f"sha256   {SHA256}",
        f"next:    {command}",
    ]
    assert "downloading hustvl/Moebius ft_places2" in err

    document = as_json(capsys, *PLACES2)
    assert len(hub.online) == 2, "nothing is fetched twice"
    assert (document["checkpoint"], document["vae"], document["next"]) == (str(checkpoint), str(folder), command)
    assert (document["bytes"], document["sha256"]) == (7, {"checkpoint": SHA256, "vae": SHA256})

    hub.remote["hustvl/Moebius"] = (CHECKPOINT, "ft_ffhq/diffusion_pytorch_model.bin")
    assert main(["download", "ffhq"]) == 0, "a cache of another model is not enough"
    assert [call["allow_patterns"][0] for call in hub.online] == ["ft_places2/*.json", "vae/*.json", "ft_ffhq/*.json"]


def test_plain_files_for_another_machine(hub: Hub, tmp_path: Path, capsys: Captured) -> None:
    target = tmp_path / "a folder"
    assert main([*PLACES2, "--output", str(target)]) == 0
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*.*")) == sorted([CHECKPOINT, *VAE])
    asked = len(hub.online)
    next_command = as_json(capsys, *PLACES2, "--output", target)["next"]
    assert len(hub.online) == asked and str(target / "vae") in shlex.split(next_command), "quoted for a shell"


def test_another_repository_and_revision(hub: Hub) -> None:
    hub.remote |= {"me/weights": (CHECKPOINT,), "me/vae": VAE}
    options = ["--repo", "me/weights", "--vae-repo", "me/vae", "--revision", "v2"]
    assert main([*PLACES2, *options]) == 0
    assert [(call["repo_id"], call["revision"]) for call in hub.online] == [("me/weights", "v2"), ("me/vae", "v2")]
    assert main([*PLACES2, *options, "--vae-revision", "v3", "--output", "elsewhere"]) == 0
    assert [call["revision"] for call in hub.online[2:]] == ["v2", "v3"]


def test_the_teacher_and_the_command_that_uses_it(hub: Hub, capsys: Captured) -> None:
    command = shlex.split(as_json(capsys, "download", "teacher")["next"])
    assert [call["allow_patterns"][0] for call in hub.online] == ["pretrained/*.json", "vae/*.json"]
    folder = hub.cache / "hustvl--PixelHacker"
    weights = f"{folder}/pretrained/diffusion_pytorch_model.bin"
    assert command[:2] == ["moebius-edge", "train"]
    assert command[-4:] == ["--teacher", weights, "--vae", f"{folder}/vae"]


@pytest.mark.parametrize("output", ["", "there"])
def test_the_weights_of_the_perceptual_distance(hub: Hub, tmp_path: Path, capsys: Captured, output: str) -> None:
    assert main(["download", "elatentlpips", *(("--output", output) if output else ())]) == 0
    root = tmp_path / output
    assert all((root / path).read_bytes() == b"weights" for path in ELATENTLPIPS_FILES)
    assert not list(root.rglob("sd3_*")) and not list((root / "ckpt").glob(".moebius-*"))
    out, err = capsys.readouterr()
    assert "non-commercial" in err and "elatentlpips" in out.splitlines()[-1]


def test_what_is_missing_or_altered_is_refused(hub: Hub, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "pretrained, places2, celebahq, ffhq, teacher, elatentlpips"
    message = f"unknown model 'imagenet': choose one of {known} ('tiny' comes"
    refused(capsys, 2, message, "download", "imagenet")
    hub.remote["hustvl/Moebius"] = ("README.md",)
    refused(capsys, 3, "hustvl/Moebius holds no ft_places2/diffusion_pytorch_model.bin", *PLACES2)
    hub.remote["hustvl/Moebius"] = (CHECKPOINT,)
    hub.remote["hustvl/PixelHacker"] = VAE[1:]
    refused(capsys, 3, "config.json is missing", *PLACES2)
    hub.remote["Mingguksky/elatentlpips"] = DISTANCE[:1]
    refused(capsys, 3, "lacks sdxl_latent_vgg16.pth.tar: remove it", "download", "elatentlpips")
    monkeypatch.setattr(download, "KNOWN", {key: (7, "0" * 64) for key in download.KNOWN})
    refused(capsys, 4, f"has 7 bytes and the SHA-256 {SHA256}, not the 7 bytes and {'0' * 64}", *PLACES2)
    assert printed(capsys, *PLACES2, "--repo", "hustvl/Moebius", "--revision", "main", code=3) == [], "config.json"


def test_weights_prefer_the_safe_format(hub: Hub, capsys: Captured) -> None:
    hub.remote["hustvl/Moebius"] = (CHECKPOINT, CHECKPOINT.replace(".bin", ".safetensors"))
    assert as_json(capsys, *PLACES2)["checkpoint"].endswith("ft_places2/diffusion_pytorch_model.safetensors")


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(capsys, 3, 'needs huggingface_hub: run `pip install "moebius-edge[download]"`', *PLACES2)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (hub_errors.LocalEntryNotFoundError("Got: ConnectError: Name not known\nMore"), "ConnectError: Name not known"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
        (hub_errors.HFValidationError("Repo id must be OWNER/NAME"), "Repo id must be OWNER/NAME"),
        (
            ValueError("Expecting value: line 1 column 1 (char 0)"),
            "Expecting value: line 1 column 1 (char 0)",
        ),  # a login page
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), "[Errno 13] Permission denied: '/cache/x'"),
    ],
)
def test_what_the_hub_raises_is_one_line(failure: Exception, reason: str, hub: Hub, capsys: Captured) -> None:
    hub.failure = failure
    message = f"cannot fetch hustvl/Moebius ({reason}): check the network, a proxy (HTTPS_PROXY) and the disk, log in"
    refused(capsys, 3, message, *PLACES2)


def test_an_interruption_can_be_resumed(hub: Hub, capsys: Captured) -> None:
    hub.failure = KeyboardInterrupt()
    assert main(["download", "places2"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: run the same command again to resume"


def test_a_user_without_a_home_has_a_cache_of_his_own(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    private = tmp_path / f"moebius-edge-{os.getuid()}"
    assert main(["download", "places2"]) == 0
    note = f"note: there is no home folder: downloads are kept in {private}/huggingface; HF_HOME chooses another"
    assert note in capsys.readouterr().err and private.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setattr("os.getuid", lambda: private.stat().st_uid + 1)
    (tmp_path / f"moebius-edge-{os.getuid()}").mkdir()
    refused(capsys, 3, "belongs to another user: set XDG_CACHE_HOME to a folder of yours", *PLACES2)
