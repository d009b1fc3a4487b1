"""A stand-in for ``moebius-edge serve``: the page and the interface that it calls, with a plain colour for a network.

It refuses and stalls when asked to, which a real service does only under load or in another setting.
"""

from __future__ import annotations

import base64
import email
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

import moebius_edge
from moebius_edge.imaging.decoding import picture_format, read_picture
from moebius_edge.imaging.mask_files import read_mask

PAGE = Path(moebius_edge.__file__).parent / "serve" / "page"
CSP = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}
COLOUR = (40, 200, 90)  # of what is filled
STEPS = 4


class PageService(ThreadingHTTPServer):
    """At ``url`` while it is entered. The attributes say how it behaves and what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = ""  # asked for, if it is not empty
        self.busy = 0  # so many requests are refused
        self.error: dict[str, Any] | None = None  # in place of a result
        self.stalls = False  # never gets beyond the first step
        self.gone = threading.Event()  # a client closed its request before the result
        self.forms: list[dict[str, bytes]] = []

    def __enter__(self) -> PageService:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: PageService

    def log_message(self, *values: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"models": [{"name": "stand-in", "precision": "fp32"}]})
            return
        files = {"/": PAGE / "index.html", **{f"/page/{path.name}": path for path in PAGE.glob("*.*")}}
        files |= {f"/samples/{n}": path for n, path in enumerate(sorted((PAGE / "samples").iterdir()), start=1)}
        if (path := files.get(self.path)) is None:
            self._json(404, {"error": "there is no such page", "remedy": "open /"})
            return
        self._answer(200, path.read_bytes(), {"Content-Type": TYPES[path.suffix], "Content-Security-Policy": CSP})

    def do_POST(self) -> None:
        form = self._form()
        if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self._json(401, {"error": "the token is missing or wrong", "remedy": "send the service's token"})
        elif self.server.busy:
            self.server.busy -= 1
            self._json(429, {"error": "the queue is full", "remedy": "try again later"}, {"Retry-After": "1"})
        else:
            self.server.forms.append(form)
            self._stream(form)

    def _form(self) -> dict[str, bytes]:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + body).walk()
        fields = {
            str(part.get_param("name", header="content-disposition")): part for part in parts if not part.is_multipart()
        }
        return {name: bytes(part.get_payload(decode=True)) for name, part in fields.items()}

    def _stream(self, form: dict[str, bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            if self.server.error:
                return self._event("error", self.server.error)
            for step in range(1, STEPS + 1):
                self._event("progress", {"step": step, "of": STEPS, "window": 1, "windows": 1})
                while self.server.stalls:
                    time.sleep(0.05)
                    self.wfile.write(b": still here\n\n")
            picture, media_type = fill(form["image"], form["mask"])
            self._event("preview", {"image": f"data:{media_type};base64,{base64.b64encode(picture).decode()}"})
            coded = base64.b64encode(picture).decode()
            settings = {"steps": STEPS, "seed": int(form.get("seed", 0)), "notes": []}
            self._event("result", {"image": coded, "media_type": media_type, "settings": settings, "timing": {}})
        except OSError:
            self.server.gone.set()

    def _event(self, name: str, data: Any) -> None:
        self.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())

    def _json(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def fill(image: bytes, mask: bytes) -> tuple[bytes, str]:
    """The picture, upright, with ``COLOUR`` where the mask is white; in its own format."""
    picture = read_picture("image", io.BytesIO(image))
    hole, _ = read_mask("mask", picture, contents=io.BytesIO(mask))
    pixels = picture.pixels.copy()
    pixels[hole] = COLOUR
    form = picture_format(image) or "PNG"
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, lossless=True)
    return stream.getvalue(), f"image/{form.lower()}"
