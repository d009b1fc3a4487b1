"""``moebius-edge download`` against a hub that is not there: what is asked for, said and reused."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest

from moebius_edge.cli import main
from moebius_edge.commands import download
from moebius_edge.commands.download import cache_folder
from moebius_edge.training.perceptual import ELATENTLPIPS_FILES

Captured = pytest.CaptureFixture[str]
CHECKPOINT = "ft_places2/diffusion_pytorch_model.bin"
SHA256 = hashlib.sha256(b"weights").hexdigest()
DISTANCE = ("elatentlpips_ckpt/sdxl_latest_vgg16_tuned.pth", "elatentlpips_ckpt/sdxl_latent_vgg16.pth.tar")
VAE = ("vae/config.json", "vae/diffusion_pytorch_model.bin")


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
    return made


def test_weights_and_vae_are_fetched_and_the_next_command_named(hub: Hub, capsys: Captured) -> None:
    assert main(["download", "places2"]) == 0
    weights, vae = hub.online
    assert weights["repo_id"] == "hustvl/Moebius" and vae["repo_id"] == "hustvl/PixelHacker"
    assert "ft_places2/diffusion_pytorch_model.bin" in weights["allow_patterns"]
    assert all(pattern.startswith("vae/") for pattern in vae["allow_patterns"]), (
        "0.8 GB of teacher stay there"
    )
    out, err = capsys.readouterr()
    checkpoint = hub.cache / "hustvl--Moebius" / CHECKPOINT
    folder = hub.cache / "hustvl--PixelHacker" / "vae"
    command = f"moebius-edge export {checkpoint} --vae {folder} --output moebius-places2"
    assert out.splitlines()[-1].split(maxsplit=1) == ["next:", command]
    assert f"downloading hustvl/Moebius ft_places2 to {hub.cache}" in err


def test_nothing_is_fetched_twice(hub: Hub, capsys: Captured) -> None:
    assert main(["download", "places2"]) == 0
    asked = len(hub.online)
    assert main(["download", "places2", "--json"]) == 0
    assert len(hub.online) == asked
    capsys.readouterr()
    assert main(["download", "places2", "--offline", "--json"]) == 0
    assert len(hub.online) == asked
    document = json.loads(capsys.readouterr().out)
    assert document["checkpoint"].endswith(CHECKPOINT)
    assert shlex.split(document["next"])[:2] == ["moebius-edge", "export"]
    assert (document["bytes"], document["exit_code"]) == (7, 0)


def test_a_cache_of_another_model_is_not_enough(hub: Hub) -> None:
    hub.remote["hustvl/Moebius"] = (CHECKPOINT, "ft_ffhq/diffusion_pytorch_model.bin")
    assert main(["download", "places2"]) == 0
    assert main(["download", "ffhq"]) == 0
    assert [call["allow_patterns"][0] for call in hub.online] == [
        "ft_places2/*.json",
        "vae/*.json",
        "ft_ffhq/*.json",
    ]


def test_plain_files_for_another_machine(hub: Hub, tmp_path: Path, capsys: Captured) -> None:
    target = tmp_path / "a folder"
    assert main(["download", "places2", "--output", str(target)]) == 0
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*.*")) == sorted([CHECKPOINT, *VAE])
    asked = len(hub.online)
    capsys.readouterr()
    assert main(["download", "places2", "--output", str(target), "--offline"]) == 0
    assert len(hub.online) == asked
    assert f"'{target / CHECKPOINT}' --vae '{target / 'vae'}'" in capsys.readouterr().out, (
        "quoted for a shell"
    )


def test_another_repository_and_revision(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub.remote |= {"me/weights": (CHECKPOINT,), "me/vae": VAE}
    options = ["--repo", "me/weights", "--vae-repo", "me/vae", "--revision", "v2"]
    assert main(["download", "places2", *options]) == 0
    assert [(call["repo_id"], call["revision"]) for call in hub.online] == [
        ("me/weights", "v2"),
        ("me/vae", "v2"),
    ]
    assert main(["download", "places2", *options, "--vae-revision", "v3", "--output", "elsewhere"]) == 0
    assert [call["revision"] for call in hub.online[2:]] == ["v2", "v3"]


def test_the_teacher_and_the_command_that_uses_it(hub: Hub, capsys: Captured) -> None:
    assert main(["download", "teacher"]) == 0
    assert [(call["repo_id"], call["allow_patterns"][0]) for call in hub.online] == [
        ("hustvl/PixelHacker", "pretrained/*.json"),
        ("hustvl/PixelHacker", "vae/*.json"),
    ]
    folder = hub.cache / "hustvl--PixelHacker"
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next:").split()
    assert command[:2] == ["moebius-edge", "train"]
    assert command[-4:] == [
        *("--teacher", f"{folder}/pretrained/diffusion_pytorch_model.bin"),
        *("--vae", f"{folder}/vae"),
    ]


@pytest.mark.parametrize("output", [None, "there"])
def test_the_weights_of_the_perceptual_distance(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, output: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["download", "elatentlpips", *(() if output is None else ("--output", output))]) == 0
    root = tmp_path / (output or "")
    assert all((root / path).read_bytes() == b"weights" for path in ELATENTLPIPS_FILES)
    assert not list(root.rglob("sd3_*")) and not list((root / "ckpt").glob(".moebius-*"))
    out, err = capsys.readouterr()
    assert "non-commercial" in err and "elatentlpips" in out.splitlines()[-1]
    hub.remote["Mingguksky/elatentlpips"] = DISTANCE[:1]
    assert main(["download", "elatentlpips", "--output", "lacking"]) == 3
    assert "lacks sdxl_latent_vgg16.pth.tar: remove it" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["places2", "vae"])
def test_another_file_than_the_known_one(hub: Hub, damaged: str, capsys: Captured) -> None:
    assert main(["download", "places2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == {"checkpoint": SHA256, "vae": SHA256}
    name = f"hustvl--Moebius/{CHECKPOINT}" if damaged == "places2" else f"hustvl--PixelHacker/{VAE[1]}"
    (hub.cache / name).write_bytes(b"weighty")
    assert main(["download", "places2"]) == 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"has 7 bytes and the SHA-256 {hashlib.sha256(b'weighty').hexdigest()}, not the 7 bytes and {SHA256}" in line
    assert "add --revision main" in line
    assert main(["download", "places2", "--revision", "main"]) == 0, "whoever names a revision knows what it is"
    assert hashlib.sha256(b"weighty").hexdigest() in capsys.readouterr().out


def failed(hub: Hub, failure: BaseException, capsys: Captured, *options: str) -> tuple[int, str]:
    hub.failure = failure
    code = main(["download", "places2", *options])
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return code, err.splitlines()[-1]


class ConnectError(Exception):
    """As httpx has one."""

    __module__ = "httpx"


def response_error(kind: type[Exception], message: str) -> Exception:
    """Made without its constructor, which wants a response of whichever HTTP library is installed."""
    error = kind.__new__(kind, message)
    error.args = (message,)
    return error


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (
            hub_errors.LocalEntryNotFoundError(
                "Got: ConnectError: Name or service not known\nAn error happened"
            ),
            3,
            "error: cannot reach hustvl/Moebius (ConnectError: Name or service not known): check the "
            "connection, or run it with `--output DIR` on a machine that has a network, and copy DIR here",
        ),
        (ConnectError("timed out"), 3, "cannot reach hustvl/Moebius (timed out)"),
        (ConnectionResetError("reset by peer"), 3, "cannot reach hustvl/Moebius (reset by peer)"),
        (hub_errors.OfflineModeIsEnabled("x"), 3, "HF_HUB_OFFLINE is set: unset it, or run it with"),
        (hub_errors.HFValidationError("x"), 2, "'hustvl/Moebius' is no repository: write OWNER/NAME"),
        (response_error(hub_errors.GatedRepoError, "x"), 3, "asks for a login: run `hf auth login`"),
        (response_error(hub_errors.RepositoryNotFoundError, "x"), 2, "there is no repository hustvl/Moebius"),
        (response_error(hub_errors.RevisionNotFoundError, "x"), 2, "has no revision 'v9'"),
        (
            response_error(hub_errors.HfHubHTTPError, "503 Service Unavailable"),
            3,
            "(503 Service Unavailable)",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "No space left on device: free space there"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
            3,
            "Permission denied: '/cache/x': free",
        ),
    ],
)
def test_what_the_hub_raises_is_one_line(
    failure: Exception, code: int, message: str, hub: Hub, capsys: Captured
) -> None:
    got, line = failed(hub, failure, capsys, "--revision", "v9")
    assert message in line and line.startswith("error: ")
    assert got == code


def test_an_interrupted_download_can_be_resumed(hub: Hub, capsys: Captured) -> None:
    assert failed(hub, KeyboardInterrupt(), capsys) == (
        130,
        "interrupted: run the same command again to resume",
    )


def test_a_bug_in_the_hub_keeps_its_traceback(hub: Hub) -> None:
    hub.failure = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        main(["download", "places2"])


def test_offline_without_the_files(hub: Hub, capsys: Captured) -> None:
    assert main(["download", "places2", "--offline"]) == 3
    line = capsys.readouterr().err
    assert line.startswith(f"error: hustvl/Moebius ft_places2 is not in {hub.cache}: run")
    assert hub.online == []


def test_repositories_without_the_file(hub: Hub, capsys: Captured) -> None:
    hub.remote["hustvl/Moebius"] = ("README.md",)
    assert main(["download", "places2"]) == 3
    assert "hustvl/Moebius holds no ft_places2/diffusion_pytorch_model.bin" in capsys.readouterr().err
    hub.remote["hustvl/Moebius"] = (CHECKPOINT,)
    hub.remote["hustvl/PixelHacker"] = VAE[1:]
    assert main(["download", "places2"]) == 3
    assert "config.json is missing" in capsys.readouterr().err


def test_unknown_names_list_the_known(capsys: Captured) -> None:
    assert main(["download", "imagenet"]) == 2
    err = capsys.readouterr().err
    known = "pretrained, places2, celebahq, ffhq, teacher, elatentlpips"
    assert f"unknown model 'imagenet': choose one of {known} ('tiny' comes" in err


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError("No module named 'huggingface_hub'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "huggingface_hub")
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["download", "places2"]) == 3
    assert 'run `pip install "moebius-edge[download]"`' in capsys.readouterr().err


def test_the_cache_is_where_huggingface_hub_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert cache_folder() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/c")
    assert cache_folder() == Path("/c")


def test_weights_prefer_the_safe_format(hub: Hub, capsys: Captured) -> None:
    hub.remote["hustvl/Moebius"] = (CHECKPOINT, CHECKPOINT.replace(".bin", ".safetensors"))
    assert main(["download", "places2"]) == 0
    assert "ft_places2/diffusion_pytorch_model.safetensors --vae" in capsys.readouterr().out
    assert download.WEIGHTS[0].endswith(".safetensors")


# --- a server in place of the hub ------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that gives everybody ``answer``: status, headers, body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = made.answer  # type: ignore[attr-defined]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


HTML = b"<html>please log in</html>"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"Content-Type": "text/html"}, HTML), "answered with something else than a list of files: open it in a"),
        ((200, {"Content-Type": "application/json"}, b"[]"), "answered with something else than a list of files"),
        ((200, {"Content-Type": "application/json"}, b'{"a":'), "answered with something else than a list of files"),
        ((401, {}, b""), "it answered 401: run `hf auth login`, or unset HF_TOKEN"),
        ((401, {"X-Error-Code": "GatedRepo"}, b""), "asks for a login: run `hf auth login`, accept its terms"),
        ((403, {}, HTML), "it answered 403: accept the licence on http://127.0.0.1:"),
        ((404, {}, HTML), "it answered 404: name another repository with --repo or --vae-repo, or check HF_ENDPOINT"),
        ((407, {}, b""), "it answered 407: the proxy asks for a login: set HTTPS_PROXY="),
        ((418, {}, b""), "it answered 418: open http://127.0.0.1:"),
        ((429, {}, b""), "it answered 429: these were too many requests: wait some minutes"),
        ((503, {}, HTML), "it answered 503: the server has a fault: run the same command again later"),
    ],
)
def test_what_a_server_answers_is_one_line_with_its_own_remedy(
    answer: tuple[int, dict[str, str], bytes], message: str, server: Any, capsys: Captured
) -> None:
    server.answer = answer
    assert main(["download", "places2"]) == 3
    out, err = capsys.readouterr()
    note, line = err.splitlines()
    assert out == "" and note.startswith("note: downloading hustvl/Moebius")
    assert line.startswith("error: ") and message in line and "check the connection" not in line


def test_a_user_without_a_home_has_a_cache_of_his_own(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    private = tmp_path / f"moebius-edge-{os.getuid()}"
    assert main(["download", "places2"]) == 0
    err = capsys.readouterr().err
    assert f"note: there is no home folder: downloads are kept in {private}/huggingface; HF_HOME chooses another" in err
    assert private.stat().st_mode & 0o777 == 0o700

    monkeypatch.delenv("HF_HOME")
    monkeypatch.setattr("os.getuid", lambda: private.stat().st_uid + 1)
    (tmp_path / f"moebius-edge-{os.getuid()}").mkdir()
    assert main(["download", "places2"]) == 3
    assert "belongs to another user: set XDG_CACHE_HOME to a folder of yours" in capsys.readouterr().err
    assert main(["doctor"]) in (0, 3)
    assert "belongs to another user" in capsys.readouterr().out
