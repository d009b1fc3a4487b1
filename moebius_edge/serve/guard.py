"""Who may ask the service, how often, and the headers that all of its answers have."""

from __future__ import annotations

import hmac
import ipaddress
import time
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from prometheus_client import Counter

from .device import Refused

_MOST_ADDRESSES = 10_000  # whose rate is remembered
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_OPEN = ("/", "/v1/health", "/openapi.json")  # without a token; so are the files of the page
_OPEN_FOLDERS = ("/page/", "/samples/")


class Rate:
    """At most ``a_minute`` pictures from one address, after a burst of as many; 0 is no limit."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._seen: dict[str, tuple[float, float]] = {}  # address -> pictures left, and when

    def take(self, address: str) -> None:
        """Count a picture. Raises Refused where there were too many."""
        if not self._a_minute:
            return
        now = time.monotonic()
        left, then = self._seen.pop(address, (float(self._a_minute), now))
        left = min(float(self._a_minute), left + (now - then) * self._a_minute / 60)
        self._seen[address] = (left - (left >= 1), now)  # the dictionary is in the order of use
        if len(self._seen) > _MOST_ADDRESSES:
            del self._seen[next(iter(self._seen))]
        if left < 1:
            seconds = int((1 - left) * 60 / self._a_minute) + 1
            problem = f"more than {self._a_minute} pictures a minute came from your address"
            raise Refused(429, problem, f"try again in {seconds} seconds", seconds)


class Guard:
    """What holds for every request: who may ask, under which names, and the headers of the answers (an ASGI app).

    Without a token only this machine may ask, and under its own names, so that no page of another site reaches the
    service by a name of its own that leads here; a browser's request that comes from another site is refused always.
    """

    def __init__(self, app: Any, token: str | None, counter: Counter) -> None:
        self._app, self._token, self._counter = app, token, counter

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                added = ((name.lower().encode(), value.encode()) for name, value in _HEADERS.items())
                message["headers"] = [*message["headers"], *((n, v) for n, v in added if n not in names)]
                route = scope.get("route")
                self._counter.labels(getattr(route, "path", "other"), message["status"]).inc()
            await send(message)

        if refused := self._refusal(request):
            await refusal(refused)(scope, receive, answer)
        else:
            await self._app(scope, receive, answer)

    def _refusal(self, request: Request) -> Refused | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return Refused(403, "the request comes from a page of another site", "open this service's own page")
        if self._token is None:
            if not is_loopback(urlsplit(f"//{host}").hostname or ""):
                return Refused(
                    403, f"the service is not known as {host:.100}", "start it with --token, or use localhost"
                )
            return None
        path = request.url.path
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if (
            path in _OPEN
            or path.startswith(_OPEN_FOLDERS)
            or hmac.compare_digest(given, f"Bearer {self._token}".encode())
        ):
            return None
        return Refused(401, "the token is missing or wrong", "send the header Authorization: Bearer TOKEN")


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a name or address of this machine that no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def refusal(refused: Refused) -> JSONResponse:
    """The answer that says what is wrong and what mends it."""
    headers = {} if refused.retry_after_s is None else {"Retry-After": str(refused.retry_after_s)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": refused.problem, "remedy": refused.remedy}, refused.status, headers)
