"""The service's requests and answers: pictures, their progress as server-sent events, health, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import json
import mimetypes
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from .device import Device, Job, Refused
from .forms import Limits, drain, read_form, request_schema
from .guard import Guard, Rate, refusal

PAGE = Path(__file__).with_name("page")
_PING_S = 10.0  # between two signs of life in a stream, so that no proxy closes it
Handler = Callable[[Request], Awaitable[Response]]


class _Metrics:
    def __init__(self, device: Device) -> None:
        self.registry = CollectorRegistry()
        labels = ["path", "status"]
        self.answers = Counter("moebius_answers", "Answers by path and status.", labels, registry=self.registry)
        self.seconds = Histogram(
            "moebius_picture_seconds",
            "From a picture's arrival to its answer.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
            registry=self.registry,
        )
        gauges = {
            "moebius_waiting": ("Pictures that wait.", lambda: device.waiting),
            "moebius_active": ("Pictures that are worked on.", lambda: device.active),
            "moebius_device_seconds": ("Time the device has worked.", lambda: device.busy_s),
            "moebius_process_starts": ("Starts of the process that owns the device.", lambda: device.starts),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(value)


def create_app(device: Device, limits: Limits, token: str | None = None, rate: int = 0, page: Path = PAGE) -> Guard:
    """The service as an ASGI application; ``device`` is started and closed by the caller."""
    app = FastAPI(title="moebius-edge", version=__version__, docs_url=None, redoc_url=None)
    metrics = _Metrics(device)
    _add_errors(app, limits)
    _add_pictures(app, device, limits, Rate(rate), metrics)
    _add_page(app, page)

    @app.get("/v1/health", tags=["service"], responses=_json_example(503, _health_example("no process")))
    async def health() -> JSONResponse:
        """Whether pictures can be filled, and how many wait. Needs no token."""
        status = device.status
        facts = {"status": status, "active": device.active, "waiting": device.waiting, "queue": device.queue}
        problem = {"error": device.problem.problem, "remedy": device.problem.remedy} if device.problem else {}
        return JSONResponse({**facts, **problem}, 200 if status == "ok" else 503)

    @app.get("/v1/models", tags=["service"])
    async def models() -> dict[str, Any]:
        """The model that is loaded, its own settings, and what executes it."""
        return {"models": [device.facts]}

    @app.get("/metrics", tags=["service"], response_class=Response)
    async def measured() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Guard(app, token, metrics.answers)


# --- pictures ------------------------------------------------------------------------------------------------------


def _add_pictures(app: FastAPI, device: Device, limits: Limits, rate: Rate, metrics: _Metrics) -> None:
    uploads = 0

    async def submit(request: Request, streamed: bool) -> Job:
        nonlocal uploads
        rate.take(request.client.host if request.client else "")
        if device.full or uploads > device.queue:  # before memory is given to its body
            raise device.busy()
        uploads += 1
        try:
            order = await read_form(request, limits, streamed)
        finally:
            uploads -= 1
        return device.submit(order)

    form = {"requestBody": request_schema()}

    @app.post("/v1/inpaint", tags=["pictures"], openapi_extra=form, response_class=Response, responses=_answers())
    async def inpaint(request: Request) -> Response:
        """Fill what the mask marks; the picture comes back in the format of the input."""
        job = await submit(request, streamed=False)
        try:
            outcome = await _outcome(job, request)
        finally:
            device.leave(job)
        if outcome is None:
            return Response(status_code=499)
        metrics.seconds.observe(time.monotonic() - job.begun)
        name, values = outcome
        if name == "error":
            raise Refused(values["status"], values["problem"], values["remedy"])
        headers = {f"X-Moebius-{name.title()}": json.dumps(values[name]) for name in ("settings", "timing")}
        return Response(values["image"], media_type=values["media_type"], headers=headers)

    @app.post(
        "/v1/inpaint/stream", tags=["pictures"], openapi_extra=form, response_class=Response, responses=_answers(True)
    )
    async def stream(request: Request) -> StreamingResponse:
        """As ``/v1/inpaint``, as server-sent events: ``progress``, ``preview``, then ``result`` or ``error``."""
        job = await submit(request, streamed=True)

        async def events() -> AsyncIterator[str]:
            try:
                async for text in _sse(job):
                    yield text
            finally:
                device.leave(job)
                metrics.seconds.observe(time.monotonic() - job.begun)

        return StreamingResponse(events(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _outcome(job: Job, request: Request) -> tuple[str, dict[str, Any]] | None:
    """A job's last event, or None where the client has gone before."""
    tasks = [asyncio.ensure_future(_last(job)), asyncio.ensure_future(_gone(request))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()


async def _last(job: Job) -> tuple[str, dict[str, Any]]:
    while (event := await job.next()) is None or event[0] not in ("result", "error"):
        pass
    return event


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _sse(job: Job) -> AsyncIterator[str]:
    name = ""
    while name not in ("result", "error"):
        event = await job.next(_PING_S)
        if event is None:
            yield ": still at it\n\n"
            continue
        name, values = event
        if name == "result":
            values = {**values, "image": base64.b64encode(values["image"]).decode()}
        elif name == "error":
            values = {"error": values["problem"], "remedy": values["remedy"], "status": values["status"]}
        yield f"event: {name}\ndata: {json.dumps(values)}\n\n"


# --- the page, from memory: no name of a request reaches the file system -------------------------------------------


def _add_page(app: FastAPI, folder: Path) -> None:
    files = {f"/page/{path.name}": path for path in folder.glob("*.*") if path.is_file()}
    files |= {"/": folder / "index.html"} if "/page/index.html" in files else {}
    samples = sorted(path for path in (folder / "samples").glob("*") if path.is_file())
    files |= {f"/samples/{number}": path for number, path in enumerate(samples, start=1)}
    for route, path in files.items():
        app.add_api_route(route, _served(path), include_in_schema=False)


def _served(path: Path) -> Handler:
    contents, kind = path.read_bytes(), mimetypes.guess_type(path.name)[0] or "application/octet-stream"

    async def serve(request: Request) -> Response:
        return Response(contents, media_type=kind, headers={"Cache-Control": "no-cache"})

    return serve


# --- errors, and what OpenAPI says of answers ----------------------------------------------------------------------


def _add_errors(app: FastAPI, limits: Limits) -> None:
    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        await drain(request, limits)
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        problem = f"{request.method} {request.url.path:.100}: {error.detail}"
        answer = refusal(Refused(error.status_code, problem, "see /openapi.json"))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return refusal(Refused(500, "an unexpected error, see the service's log", "report it with the log"))


def _json_example(status: int, example: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": "", "content": {"application/json": {"example": example}}}}


def _health_example(problem: str) -> dict[str, Any]:
    return {"status": "failed", "active": 0, "waiting": 0, "queue": 8, "error": problem, "remedy": "see the log"}


def _answers(stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of a request for a picture, with an example of each."""
    refusals = {
        400: ("the picture or a field is wrong", 'mask "mask" is 64x64 and the picture is 80x60', "resize it to 80x60"),
        401: ("the token is missing", "the token is missing or wrong", "send the header Authorization: Bearer TOKEN"),
        403: ("another site's page", "the request comes from a page of another site", "open this service's own page"),
        408: ("the body came too slowly", "the form did not arrive within 60 seconds", "send a smaller picture"),
        413: ("too many bytes", "the request has more than 64 MB", "scale the picture down"),
        415: ("no multipart form", "the request is no multipart form", 'send the files "image" and "mask"'),
        429: (
            "busy; Retry-After has seconds",
            "the service is busy: 2 are worked on and 8 wait",
            "try again in 4 seconds",
        ),
        503: ("the device or its process failed", "the process that fills pictures was killed", "send it again"),
        504: ("the deadline has passed", "the picture took more than 300 seconds", "use fewer steps"),
    }
    answers: dict[int | str, dict[str, Any]] = {}
    for status, (description, problem, remedy) in refusals.items():
        example = {"error": problem, "remedy": remedy}
        answers[status] = {"description": description, "content": {"application/json": {"example": example}}}
    if stream:
        progress = 'event: progress\ndata: {"step": 3, "of": 19, "window": 1, "windows": 1}\n\n'
        return {**answers, 200: {"description": "events", "content": {"text/event-stream": {"example": progress}}}}
    content = {
        f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
        for kind in ("png", "jpeg", "tiff", "webp", "bmp")
    }
    texts = {"Settings": '{"start": "prefill", "steps": 20}', "Timing": '{"total_ms": 812.5, "queue_ms": 3.1}'}
    headers = {f"X-Moebius-{name}": {"schema": {"type": "string"}, "example": text} for name, text in texts.items()}
    return {**answers, 200: {"description": "the picture", "content": content, "headers": headers}}
