"""The service as a process: it listens, says where, and ends in good order.

SIGTERM and Ctrl-C finish what is worked on and refuse the rest; a second one ends at once. SIGHUP loads the bundle
anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import MachineError, UsageError
from .app import create_app
from .device import Device
from .forms import Limits
from .guard import is_loopback

_LOOK_S = 15.0  # in which a connection must have sent the head of a request, or read some of an answer


class _Protocol(H11Protocol):
    """HTTP whose connections are not held open by half of a request's head, nor by an answer that is not read."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_LOOK_S, self._watch, None, -1)

    def _watch(self, cycle: Any, unread: int) -> None:
        """Close what has not moved since the last look, when ``cycle`` was its request and ``unread`` bytes waited."""
        still_unread = self.transport.get_write_buffer_size()
        if self.transport.is_closing() and not still_unread:
            return
        silent = self.conn.their_state is h11.IDLE and self.cycle is cycle
        if still_unread == unread if still_unread else silent:
            self.transport.abort()
        else:
            self.loop.call_later(_LOOK_S, self._watch, self.cycle, still_unread)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are ``serve``'s


def check_exposure(host: str, token: str | None) -> str:
    """What a service on ``host`` lets others do, empty on loopback. Raises UsageError where that needs a token."""
    if is_loopback(host):
        return ""
    if token is None:
        problem = f"--host {host} lets other machines in, and there is no token"
        raise UsageError(problem, "add --token, such as one that `openssl rand -hex 16` prints, or leave --host out")
    return (
        f"{host} is beyond this machine: whoever has the token may have pictures filled and read the model's facts and "
        "the metrics, anyone the page and whether the service is well; HTTP is not encrypted, so put TLS before it"
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises MachineError where the address is in use or not this machine's."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MachineError(
            f"cannot listen on {host} port {port} ({reason})", "choose another --port, 0 for a free one"
        ) from None
    return listener


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def serve(listener: socket.socket, device: Device, limits: Limits, token: str | None, rate: int) -> None:
    """Load the bundle, print the address, and answer until a signal ends it. Raises MoebiusError as loading does."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of damaged forms, which are answered
    app = create_app(device, limits, token, rate)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=round(device.deadline_s) + 1,
    )
    server = _Server(config)

    def end() -> None:
        if server.should_exit:
            server.force_exit = True
            logging.getLogger("uvicorn.error").disabled = True  # of the requests that are cut off it has tracebacks
        server.should_exit = True
        device.drain()

    loop, reloads = asyncio.get_running_loop(), set()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)

    def reload() -> None:
        reloads.add(task := asyncio.ensure_future(device.reload()))
        task.add_done_callback(reloads.discard)

    try:
        starting = asyncio.ensure_future(device.start())
        while not starting.done() and not server.should_exit:
            await asyncio.wait([starting], timeout=0.1)
        if server.should_exit:
            return
        starting.result()
        loop.add_signal_handler(signal.SIGHUP, reload)
        print(address_of(listener), flush=True)
        await server.serve([listener])
    finally:
        sys.stdout.flush()
        await device.close()
        listener.close()
