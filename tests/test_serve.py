"""The service through real HTTP on loopback: pictures, refusals, faults, signals."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from commanding import Captured, refused
from PIL import Image
from toy import flip_byte, make_toy_bundle

pytest.importorskip("fastapi", reason="needs the extra serve")

from moebius_edge import Inpainter
from moebius_edge.serve.device import Job, Refused
from moebius_edge.serve.guard import Rate, is_loopback
from moebius_edge.serve.worker import Order

SIZE = (80, 60)
TOKEN = "a-token-of-the-tests"
# A picture that takes a toy many seconds: a thousand steps in each of its windows.
LONG = {"steps": "1000", "guidance": "2"}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document


class Service:
    """A process of ``moebius-edge serve`` on a free port; ``patch`` is executed in it first."""

    def __init__(self, bundle: Path, *options: str, patch: str = "") -> None:
        code = f"import sys\n{patch}\nfrom moebius_edge.cli import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, "serve", "--bundle", str(bundle), "--port", "0"]
        command += ["--runtime", "onnxruntime", *options]  # whatever else is installed
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), self.process.communicate()
        self.port = int(self.address.rpartition(":")[2])

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, **headers)

    def post(self, files: dict[str, bytes], path: str = "/v1/inpaint", _fields: Any = None, **headers: str) -> Answer:
        body, kind = form(files, _fields or {})
        return self.request("POST", path, body, Content_Type=kind, **headers)

    def open(self, files: dict[str, bytes], fields: dict[str, str], path: str = "/v1/inpaint") -> socket.socket:
        """Send a request, and read no answer."""
        body, kind = form(files, fields)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(head.encode() + body)
        return connection

    def wait(self, ready: Callable[[dict[str, Any]], bool], seconds: float = 20) -> dict[str, Any]:
        """The answer of /v1/health as soon as it is ``ready``."""
        end = time.monotonic() + seconds
        while not ready(health := self.get("/v1/health").json):
            assert time.monotonic() < end, health
            time.sleep(0.05)
        return health

    def workers(self) -> list[int]:
        """The processes that own the device."""
        pid = self.process.pid
        children = [
            int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()
        ]
        return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=60)
        finally:
            self.process.kill()


def form(files: dict[str, bytes], fields: dict[str, str]) -> tuple[bytes, str]:
    """A multipart body and its content type."""
    parts = []
    for name, data in files.items():
        parts += [f'--xyz\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'.encode(), data]
        parts += [b"\r\n"]
    for name, text in fields.items():
        parts += [f'--xyz\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()]
    return b"".join([*parts, b"--xyz--\r\n"]), "multipart/form-data; boundary=xyz"


def coded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def hole(size: tuple[int, int] = SIZE) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    return mask


def lines(size: tuple[int, int]) -> Image.Image:
    """Thin lines over all of a picture, which take many windows."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[16::64] = 255
    return Image.fromarray(mask)


PICTURE, MASK = coded(picture()), coded(hole())
BOTH = {"image": PICTURE, "mask": MASK}
LARGE = {"image": coded(picture((512, 512))), "mask": coded(lines((512, 512)))}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("serve") / "toy", deep=True)


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[Service]:
    service = Service(bundle, "--queue", "2", "--max-pixels", "1000000")
    yield service
    service.end()


@pytest.fixture(scope="module")
def strict(bundle: Path) -> Iterator[Service]:
    """A service with a token and with limits that are soon reached; it can write to no file, as on a full disk."""
    options = ("--token", TOKEN, "--max-bytes", "50000", "--upload-time", "0.5")
    patch = "from moebius_edge.serve import server\nserver._LOOK_S = 0.5"
    service = Service(bundle, *options, patch=patch)
    for pid in (service.process.pid, *service.workers()):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))
    yield service
    service.end()


# --- what it answers -----------------------------------------------------------------------------------------------


def test_a_picture_is_filled_as_run_fills_it(service: Service, bundle: Path) -> None:
    fields = {"steps": "6", "guidance": "1.5", "start": "noise", "seed": "3", "mask_dilate": "2", "preset": ""}
    answer = service.post(BOTH, _fields=fields)
    assert answer.status == 200 and answer.headers["Content-Type"] == "image/png", answer.body
    grown = np.asarray(hole()) > 0
    grown = np.pad(grown, 2)  # by two pixels of Euclidean distance
    around = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if y * y + x * x <= 4]
    grown = np.any([np.roll(grown, shift, (0, 1)) for shift in around], axis=0)[2:-2, 2:-2]
    with Inpainter(bundle) as inpainter:
        expected = inpainter.inpaint(np.asarray(picture()), grown, steps=6, guidance=1.5, start="noise", seed=3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.body))), expected.image)
    settings, timing = (json.loads(answer.headers[f"X-Moebius-{name}"]) for name in ("Settings", "Timing"))
    assert settings.items() >= {**expected.settings, "preset": None, "notes": []}.items()
    assert timing["total_ms"] > 0 and timing["queue_ms"] >= 0 and {"read_ms", "denoise_ms", "write_ms"} <= timing.keys()


@pytest.mark.parametrize(("sent", "back"), [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "WEBP"), ("GIF", "PNG")])
def test_the_picture_comes_back_in_the_format_of_the_input(service: Service, sent: str, back: str) -> None:
    answer = service.post({"image": coded(picture(), sent), "mask": MASK}, _fields={"steps": "2"})
    assert answer.status == 200 and answer.headers["Content-Type"] == f"image/{back.lower()}"
    assert Image.open(io.BytesIO(answer.body)).format == back
    notes = json.loads(answer.headers["X-Moebius-Settings"])["notes"]
    assert ("the result is PNG, for GIF is read and not written" in notes) is (sent == "GIF")


def test_a_stream_tells_the_progress_and_ends_with_the_picture(service: Service) -> None:
    files = {"image": coded(picture((160, 120))), "mask": coded(lines((160, 120)))}
    answer = service.post(files, "/v1/inpaint/stream", {"steps": "3", "preset": "fast", "start": "noise"})
    assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/event-stream")
    events = [block.partition("\ndata: ") for block in answer.body.decode().strip().split("\n\n")]
    names, values = [name for name, _, _ in events], [json.loads(text) for _, _, text in events]
    assert names[-1] == "event: result" and {"event: progress", "event: preview"} == set(names[:-1])
    steps = [value for value in values if "step" in value]
    assert [value["step"] for value in steps] == list(range(1, steps[-1]["of"] + 1)) and len(steps) == steps[0]["of"]
    windows = values[-1]["settings"]["windows"]
    assert {(v["window"], v["windows"]) for v in steps} == {(n, windows) for n in range(1, windows + 1)} and windows > 1
    preview = values[names.index("event: preview")]["image"].removeprefix("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(preview))).size == (160, 120)
    plain = service.post(files, _fields={"steps": "3", "preset": "fast", "start": "noise"})
    assert base64.b64decode(values[-1]["image"]) == plain.body and values[-1]["media_type"] == "image/png"
    assert values[-1]["settings"]["preset"] == "fast" and values[-1]["timing"]["total_ms"] > 0


@pytest.mark.parametrize(
    ("files", "fields", "status", "message"),
    [
        ({"image": PICTURE}, {}, 400, 'the form has no file "mask"'),
        ({"image": PICTURE, "mask": coded(hole((8, 8)))}, {}, 400, 'mask "mask" is 8x8 and the picture is 80x60'),
        ({"image": b"GIF89a", "mask": MASK}, {}, 400, '"image"'),
        ({"image": PICTURE[:200], "mask": MASK}, {}, 400, '"image"'),
        ({"image": b"", "mask": MASK}, {}, 400, '"image" is empty'),
        ({"image": coded(Image.new("L", (2000, 1000))), "mask": MASK}, {}, 400, "at most 1 are read"),
        ({"image": PICTURE, "mask": coded(Image.new("L", (2000, 1000)))}, {}, 400, "at most 1 are read"),
        (BOTH, {"steps": "0"}, 400, "steps is '0'"),
        (BOTH, {"steps": "many"}, 400, "steps is 'many'"),
        (BOTH, {"guidance": "nan"}, 400, "guidance is 'nan'"),
        (BOTH, {"start": "nothing"}, 400, "start is 'nothing'"),
        (BOTH, {"mask_from": "index:x"}, 400, "mask_from index:x is unknown"),
        (BOTH, {"guidance_interval": "800,200"}, 400, "interval"),
        (BOTH, {"strength": "0.5", "start": "noise"}, 400, "strength 0.5 does not go with start noise"),
        (BOTH, {"output": "/etc/passwd"}, 400, "output is an unknown field"),
        ({**BOTH, "third": PICTURE}, {}, 400, "Too many files"),
        (BOTH, {"seed": "1" * 2000}, 400, "Part exceeded"),
    ],
)
def test_what_is_wrong_with_a_request_is_one_line(
    service: Service, files: dict[str, bytes], fields: dict[str, str], status: int, message: str
) -> None:
    answer = service.post(files, _fields=fields)
    assert answer.status == status and message in answer.json["error"] and "\n" not in answer.json["error"], answer
    assert set(answer.json) == {"error", "remedy"}


def test_bodies_that_are_no_forms_are_refused(service: Service) -> None:
    kind = "multipart/form-data; boundary=xyz"
    assert service.request("POST", "/v1/inpaint", b"{}", Content_Type="application/json").status == 415
    for body in (b"", b"--xyz", b"--xyz\r\n\r\nname\r\n--xyz--", b"\0" * 1000, form(BOTH, {})[0][:-20]):
        assert service.request("POST", "/v1/inpaint", body, Content_Type=kind).status == 400, body
    assert service.request("POST", "/v1/inpaint", form(BOTH, {})[0], Content_Type="multipart/form-data").status == 400


def test_the_service_describes_itself(service: Service) -> None:
    (model,) = service.get("/v1/models").json["models"]
    assert model["name"] == "toy" and model["resolution"] == 64 and model["runtime"]["name"] == "onnxruntime"
    assert service.get("/v1/health").json.items() >= {"status": "ok", "queue": 2}.items()
    metrics = service.get("/metrics").body.decode()
    assert 'moebius_answers_total{path="/v1/models",status="200"}' in metrics and "moebius_waiting 0.0" in metrics
    document = service.get("/openapi.json").json
    schema = document["paths"]["/v1/inpaint"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "mask", "steps", "guidance", "preset"} <= schema["properties"].keys()
    assert schema["required"] == ["image", "mask"] and "null" not in json.dumps(schema)
    assert schema["properties"]["steps"].items() >= {"type": "integer", "maximum": 1000}.items()
    answers = document["paths"]["/v1/inpaint"]["post"]["responses"]
    assert answers["429"]["content"]["application/json"]["example"].keys() == {"error", "remedy"}


# --- who may ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd", "/samples/0", "/docs"]
)
def test_no_name_of_a_request_reaches_the_file_system(service: Service, path: str) -> None:
    answer = service.get(path)
    assert answer.status == 404 and answer.json["error"].startswith("GET ") and answer.json["remedy"]


def test_no_other_site_may_use_the_service(service: Service) -> None:
    own = f"localhost:{service.port}"
    assert service.get("/v1/models", Host=own, Origin=f"http://{own}").status == 200
    assert service.post(BOTH, Host=own, Origin="http://evil.example").status == 403
    assert service.get("/v1/models", Host="evil.example").status == 403, "a name that leads to 127.0.0.1"
    answer = service.get("/v1/health")
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self';" in policy and "img-src 'self' blob: data:;" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and "server" not in answer.headers


def test_a_token_is_needed_where_there_is_one(strict: Service) -> None:
    assert strict.get("/v1/health").status == 200
    for headers in ({}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN}x"}):
        for path in ("/v1/models", "/metrics"):
            answer = strict.get(path, **headers)
            assert answer.status == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert strict.post(BOTH, **headers).status == 401
    assert strict.get("/v1/models", Authorization=f"Bearer {TOKEN}", Host="any.example").status == 200
    assert strict.post(BOTH, _fields={"steps": "2"}, Authorization=f"Bearer {TOKEN}").status == 200


def test_a_machine_is_let_in_with_a_token_alone(capsys: Captured) -> None:
    refused(capsys, 2, "--host 0.0.0.0 lets other machines in, and there is no token", "serve", "--host", "0.0.0.0")
    assert [h for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost") if not is_loopback(h)] == []
    assert [h for h in ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "") if is_loopback(h)] == []


def test_what_a_start_needs(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(
            capsys, 3, f"cannot listen on 127.0.0.1 port {port} (Address already in use)", "serve", "--port", str(port)
        )
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("moebius_edge.serve")]:
        monkeypatch.delitem(sys.modules, name)
    refused(capsys, 3, 'serve needs fastapi: run `pip install "moebius-edge[serve]"`', "serve")


def test_a_bundle_that_cannot_be_loaded_ends_the_start(capsys: Captured, tmp_path: Path) -> None:
    refused(capsys, 4, "there is no bundle folder", "serve", "--bundle", str(tmp_path / "none"), "--port", "0")


def test_the_rate_of_an_address_is_limited() -> None:
    rate = Rate(2)
    for _ in range(2):
        rate.take("10.0.0.1")
    with pytest.raises(Refused, match="more than 2 pictures a minute") as caught:
        rate.take("10.0.0.1")
    assert caught.value.status == 429 and 29 <= (caught.value.retry_after_s or 0) <= 31
    rate.take("10.0.0.2")
    for _ in range(100):
        Rate(0).take("10.0.0.1")


# --- faults --------------------------------------------------------------------------------------------------------


def test_a_body_of_too_many_bytes_is_refused(strict: Service) -> None:
    answer = strict.post({"image": b"x" * 3_000_000, "mask": MASK}, Authorization=f"Bearer {TOKEN}")
    assert answer.status == 413 and "more than 0.05 MB" in answer.json["error"]


def test_past_its_deadline_a_job_has_failed() -> None:
    async def events() -> list[Any]:
        job = Job(Order(image=b"", mask=b"", max_pixels=1), deadline_s=0.3)
        job.put("progress", {"step": 1})
        return [await job.next(), await job.next(0.01), await job.next(60)]

    first, second, third = asyncio.run(events())
    assert first == ("progress", {"step": 1}) and second is None
    assert third[0] == "error" and third[1]["status"] == 504 and "more than the 0.3 seconds" in third[1]["problem"]


@pytest.mark.slow
def test_past_its_deadline_a_picture_leaves_the_device(bundle: Path) -> None:
    service = Service(bundle, "--deadline", "3")
    try:
        answer = service.post(LARGE, _fields=LONG)
        assert answer.status == 504 and "more than the 3 seconds" in answer.json["error"]
        service.wait(lambda health: health["active"] == 0)
        assert service.post(BOTH, _fields={"steps": "2"}).status == 200
    finally:
        service.end()


def test_slow_senders_are_left_behind(strict: Service) -> None:
    address = ("127.0.0.1", strict.port)
    with socket.create_connection(address, timeout=10) as head, socket.create_connection(address, timeout=10) as body:
        head.sendall(b"GET /v1/health HTT")
        start = f"POST /v1/inpaint HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        body.sendall(
            f"{start}Content-Type: multipart/form-data; boundary=xyz\r\nContent-Length: 9999\r\n\r\n--x".encode()
        )
        assert head.recv(100) == b"", "closed"
        assert body.recv(100).startswith(b"HTTP/1.1 408")


def test_a_full_queue_is_said_and_clients_that_leave_are_forgotten(service: Service) -> None:
    connections = []
    for number in range(4):
        connections.append(service.open(LARGE, LONG, f"/v1/inpaint{'/stream' * (number % 2)}"))
        service.wait(lambda health, all=number + 1: health["active"] + health["waiting"] == all)  # type: ignore[misc]
    answer = service.post(BOTH)
    assert answer.status == 429 and "2 pictures are worked on and 2 wait" in answer.json["error"]
    assert 1 <= int(answer.headers["Retry-After"]) < 60
    for connection in connections:
        connection.close()
    service.wait(lambda health: health["active"] == 0 and health["waiting"] == 0, seconds=5)
    assert service.post(BOTH, _fields={"steps": "2"}).status == 200


def test_when_its_process_is_killed_one_request_fails_and_the_next_works(service: Service) -> None:
    with ThreadPoolExecutor() as threads, service.open(LARGE, LONG, "/v1/inpaint/stream") as long:
        received = b""
        while b"event: progress" not in received:
            received += long.recv(65536)
        short = threads.submit(service.post, BOTH, _fields={"steps": "2"})
        service.wait(lambda health: health["active"] == 2)
        (worker,) = service.workers()
        os.kill(worker, signal.SIGKILL)
        while b"event: error" not in received:
            received += long.recv(65536)
        assert b'"status": 503' in received and b"was killed by SIGKILL" in received
        assert short.result().status == 200, "it had only been read"
    assert service.post(BOTH, _fields={"steps": "2"}).status == 200


@pytest.mark.slow
def test_signals_reload_the_bundle_and_end_in_good_order(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "bundle", name="first")
    service = Service(folder)
    try:
        assert service.get("/v1/models").json["models"][0]["name"] == "first"
        make_toy_bundle(tmp_path / "other", name="second")
        shutil.rmtree(folder)
        (tmp_path / "other").rename(folder)
        assert service.post(BOTH, _fields={"steps": "2"}).status == 200, "the graphs are in memory"
        service.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while service.get("/v1/models").json["models"][0]["name"] != "second":
            assert time.monotonic() < end and service.post(BOTH, _fields={"steps": "2"}).status == 200
        flip_byte(folder / "denoiser.onnx")
        service.process.send_signal(signal.SIGHUP)
        with ThreadPoolExecutor() as threads:
            running = threads.submit(service.post, LARGE, _fields={"steps": "60"})
            service.wait(lambda health: health["active"] == 1)
            time.sleep(0.5)
            service.process.terminate()
            assert running.result().status == 200, "what runs is finished"
        out, err = service.process.communicate(timeout=30)
        assert service.process.returncode == 0 and out == "", err
        with pytest.raises(ConnectionError):
            service.get("/v1/health")
    finally:
        service.process.kill()


@pytest.mark.slow
def test_a_damaged_bundle_is_not_taken(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "bundle")
    service = Service(folder)
    try:
        flip_byte(folder / "denoiser.onnx")
        service.process.send_signal(signal.SIGHUP)
        assert service.process.stderr is not None
        line = service.process.stderr.readline()
        assert line.startswith("note: the bundle is not taken, the old one serves on: ") and "was altered" in line
        assert service.post(BOTH, _fields={"steps": "2"}).status == 200
        (worker,) = service.workers()
        os.kill(worker, signal.SIGKILL)
        health = service.wait(lambda health: health["status"] == "failed")
        assert "was altered" in health["error"] and service.get("/v1/health").status == 503
        answer = service.post(BOTH)
        assert answer.status == 503 and "was altered" in answer.json["error"] and answer.json["remedy"]
        flip_byte(folder / "denoiser.onnx")
        assert service.post(BOTH, _fields={"steps": "2"}).status == 200, "mended, it is tried again"
    finally:
        service.end()
