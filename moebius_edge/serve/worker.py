"""The process that owns the device: it loads a bundle once, and fills one picture after another.

It is a process of its own so that a crash of a decoder or a runtime ends one request and not the service. While the
device works on one picture another thread reads the next or encodes the last. The device is used by the main thread
alone, for CUDA binds to a thread. No file is opened but the bundle's: pictures come and go as bytes.
"""

from __future__ import annotations

import base64
import io
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import cv2
import numpy as np

from ..errors import MoebiusError, OutOfMemory, UsageError
from ..imaging.decoding import picture_format
from ..imaging.mask_files import read_mask
from ..imaging.picture import Picture
from ..imaging.pictures import OUTPUT_FORMATS, encode_picture, missing_in, read_picture
from ..imaging.windows import Window
from ..pipeline.inpainter import Inpainter, Result
from ..pipeline.latency import StageTimer
from ..pipeline.loop import Step
from ..pipeline.presets import preset_notes, preset_settings

AT_ONCE = 2  # orders in the process: one on the device, one that is read or encoded
_MEDIA = {"PNG": "image/png", "JPEG": "image/jpeg", "TIFF": "image/tiff", "WEBP": "image/webp", "BMP": "image/bmp"}
_PREVIEW_SIDE = 768  # pixels
_STOP_CHECK_S = 0.2  # how often an order that waits for the device looks whether it is still wanted
Send = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Order:
    """A picture to fill, as the form of a request describes it; ``number`` is the device's."""

    image: bytes
    mask: bytes
    settings: dict[str, Any] = field(default_factory=dict)
    mask_options: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    streamed: bool = False  # with progress and previews
    max_pixels: int
    number: int = 0


class _Stopped(Exception):
    """Nobody waits for the picture any more."""


def main(connection: Connection, model: tuple[str, str, str]) -> None:
    """The process: orders and the numbers of orders to stop come in, (number, event, values) go out.

    The first event, of number 0, is ``ready`` with facts on the model, or ``error``. The process ends after ``None``,
    and at once when the other end of ``connection`` is closed.
    """
    os.dup2(2, 1)  # what libraries print is no result
    # A terminal and a service manager send these to every process, and the parent acts on them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        with Inpainter(*model) as inpainter:
            connection.send((0, "ready", _facts(inpainter)))
            _Worker(connection, inpainter).serve()
    except (MoebiusError, MemoryError) as error:
        connection.send((0, "error", _error(error, loading=True)))


class _Worker:
    def __init__(self, connection: Connection, inpainter: Inpainter) -> None:
        self._connection, self._inpainter = connection, inpainter
        self._sending = threading.Lock()
        self._stops: dict[int, threading.Event] = {}
        self._device: queue.SimpleQueue[tuple[Callable[[], Result], Future[Result]] | None] = queue.SimpleQueue()

    def serve(self) -> None:
        """Compute on this thread what ``_answer`` asks for, until the other end says that it is enough."""
        threading.Thread(target=self._receive, daemon=True).start()
        while (work := self._device.get()) is not None:
            compute, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)

    def _receive(self) -> None:
        threads = ThreadPoolExecutor(AT_ONCE)
        try:
            while (message := self._connection.recv()) is not None:
                if isinstance(message, Order):
                    self._stops[message.number] = threading.Event()
                    threads.submit(self._answer, message)
                elif (stop := self._stops.get(message)) is not None:
                    stop.set()
        except (EOFError, OSError):
            os._exit(1)
        threads.shutdown()
        self._device.put(None)

    def _answer(self, order: Order) -> None:
        """Work on an order; its last event is ``result``, ``error`` or ``stopped``."""

        def send(event: str, **values: Any) -> None:
            with self._sending:
                self._connection.send((order.number, event, values))

        try:
            send("result", **self._picture(order, send, self._stops[order.number]))
        except _Stopped:
            send("stopped")
        except Exception as error:
            if not isinstance(error, (MoebiusError, MemoryError)):
                traceback.print_exc()
            send("error", **_error(error))
        finally:
            del self._stops[order.number]

    def _picture(self, order: Order, send: Send, stop: threading.Event) -> dict[str, Any]:
        timer = StageTimer()
        with timer.measure("read"):
            picture = read_picture('"image"', io.BytesIO(order.image), order.max_pixels)
            mask = io.BytesIO(order.mask)
            hole, notes = read_mask('"mask"', picture, contents=mask, max_pixels=order.max_pixels, **order.mask_options)
            form, format_notes = _output_format(order.image, picture.opaque_in(hole))
        settings, preset_remarks = self._settings(order)
        preview = _Preview(picture, send) if order.streamed else None

        def on_step(step: Step) -> None:
            if stop.is_set():
                raise _Stopped
            if order.streamed:
                send("progress", step=step.index, of=step.total, window=step.window, windows=step.windows)

        def compute() -> Result:
            send("started")
            on_window = None if preview is None else preview.paste
            return self._inpainter.inpaint(picture, hole, on_step=on_step, on_window=on_window, timer=timer, **settings)

        result = self._on_device(compute, stop)
        stream = io.BytesIO()
        with timer.measure("write"):
            losses = encode_picture(stream, form, result.picture)
        remarks = [*notes, *result.notes, *format_notes, *preset_remarks, *(f"the result is {loss}" for loss in losses)]
        return {
            "image": stream.getvalue(),
            "media_type": _MEDIA[form],
            "settings": {"preset": order.preset, **result.settings, "notes": remarks},
            "timing": {f"{stage}_ms": round(row["total_ms"], 3) for stage, row in timer.summary().items()},
        }

    def _on_device(self, compute: Callable[[], Result], stop: threading.Event) -> Result:
        """Wait for ``compute`` on the thread that owns the device; where it has not begun it can be stopped at once."""
        future: Future[Result] = Future()
        self._device.put((compute, future))
        while True:
            try:
                return future.result(_STOP_CHECK_S)
            except NotYet:
                if stop.is_set() and future.cancel():
                    raise _Stopped from None

    def _settings(self, order: Order) -> tuple[dict[str, Any], list[str]]:
        """The settings of ``Inpainter.inpaint``: the order's, then its preset's, then the bundle's."""
        bundle, chosen, notes = self._inpainter.bundle, order.settings, []
        if order.preset is not None:
            notes = preset_notes(order.preset, chosen, bundle)
            chosen = {**chosen, **preset_settings(order.preset, chosen, bundle)}
        return bundle.settings(**chosen), notes


class _Preview:
    """A small copy of the picture into which each window's fill goes, sent as a JPEG."""

    def __init__(self, picture: Picture, send: Send) -> None:
        pixels = picture.pixels if picture.bits == 8 else (picture.pixels >> 8).astype(np.uint8)
        self._scale = min(1.0, _PREVIEW_SIDE / max(picture.size))
        width, height = (max(1, round(side * self._scale)) for side in picture.size)
        small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        self._canvas = small if small.ndim == 3 else cv2.cvtColor(small, cv2.COLOR_GRAY2RGB)
        self._send = send

    def paste(self, window: Window, generated: np.ndarray, hole: np.ndarray) -> None:
        """``generated`` is RGB (R, R, 3) in about [0, 1], ``hole`` (R, R) bool, both of the square ``window``."""
        top, left, side = (round(value * self._scale) for value in (window.top, window.left, window.side))
        size = (max(1, side), max(1, side))
        fill = cv2.resize(np.clip(generated * 255, 0, 255).astype(np.uint8), size, interpolation=cv2.INTER_AREA)
        inside = cv2.resize(hole.view(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
        rows = np.s_[max(0, top) : top + size[1], max(0, left) : left + size[0]]
        shown = self._canvas[rows]
        own = np.s_[max(0, -top) :, max(0, -left) :]
        fill, inside = (values[own][: shown.shape[0], : shown.shape[1]] for values in (fill, inside))
        shown[inside] = fill[inside]
        _, coded = cv2.imencode(".jpg", self._canvas[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
        self._send("preview", image="data:image/jpeg;base64," + base64.b64encode(coded.tobytes()).decode())


def _output_format(contents: bytes, picture: Picture) -> tuple[str, list[str]]:
    """The format of the input, or PNG where that is not written or cannot hold the result, and a note on it then."""
    form = picture_format(contents[:32]) or "PNG"
    if form not in OUTPUT_FORMATS.values():
        return "PNG", [f"the result is PNG, for {form} is read and not written"]
    if lacks := missing_in(form, picture):
        return "PNG", [f"the result is PNG, for {form} cannot hold {lacks}"]
    return form, []


def _facts(inpainter: Inpainter) -> dict[str, Any]:
    """What /v1/models says, and the runtime's notes for the log."""
    bundle = inpainter.bundle
    names = ("name", "description", "licence", "precision", "resolution", "defaults", "distilled_guidance")
    facts = {name: getattr(bundle, name) for name in names}
    facts["denoiser_sha256"] = bundle.files["denoiser.onnx"]["sha256"]
    return {"model": {**facts, "runtime": inpainter.runtime.report()}, "notes": list(inpainter.runtime.notes)}


def _error(error: Exception, loading: bool = False) -> dict[str, Any]:
    """``status`` is 400 for what a request can mend, 503 for the machine or the bundle, 500 for a bug of ours."""
    if isinstance(error, MemoryError):
        error = OutOfMemory("not enough memory", "send a smaller picture")
    if not isinstance(error, MoebiusError):
        problem = "an unexpected error, see the service's log"
        return {"problem": problem, "remedy": "report it with the log", "status": 500}
    status = 400 if isinstance(error, UsageError) else 503
    values = {"problem": error.problem, "remedy": error.remedy, "status": status}
    return {**values, "error": error} if loading else values
