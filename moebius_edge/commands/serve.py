"""``moebius-edge serve``: the model as an HTTP service with a page to paint masks on."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from ..options import AUTO, Device, Runtime
from . import console
from .run import DEMONSTRATION


def serve(
    bundle: Annotated[str, Option("--bundle", "-b", metavar="DIR", help="The model.")] = DEMONSTRATION,
    host: Annotated[str, Option(metavar="ADDRESS", help="Where to listen; beyond 127.0.0.1 it needs --token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, Option(min=0, max=65535, metavar="N", help="0 for any that is free.")] = 8080,
    token: Annotated[
        str | None,
        Option(envvar="MOEBIUS_EDGE_TOKEN", metavar="TEXT", help="What clients must send; see docs/serve.md."),
    ] = None,
    runtime: Annotated[Runtime, Option(help="tensorrt needs engines; auto: the fastest that works.")] = AUTO,
    device: Annotated[Device, Option(help="Where to execute; auto: the fastest that works.")] = AUTO,
    queue: Annotated[int, Option(min=1, max=1000, metavar="N", help="Pictures that may wait.")] = 8,
    deadline: Annotated[
        float, Option(min=1.0, metavar="S", help="Seconds a picture may take, waiting included.")
    ] = 300,
    max_bytes: Annotated[int, Option(min=1000, metavar="N", help="Of a request.")] = 64_000_000,
    max_pixels: Annotated[int, Option(min=1, metavar="N", help="Of a picture.")] = 50_000_000,
    upload_time: Annotated[float, Option(min=0.1, metavar="S", help="Seconds a request may take to arrive.")] = 60,
    rate: Annotated[
        int | None,
        Option(min=0, metavar="N", help="Pictures a minute from one address, 0 any; default 60 beyond loopback."),
    ] = None,
) -> int:
    """Serve a page to paint masks on, and an HTTP interface, until Ctrl-C or SIGTERM. SIGHUP loads the bundle anew.

    The first line that is printed is the address.
    """
    import asyncio

    with console.needs("serve", "serve"):
        from ..serve.device import Device as Owner
        from ..serve.forms import Limits
        from ..serve.server import check_exposure, listen
        from ..serve.server import serve as answer

    if exposure := check_exposure(host, token):
        console.note(exposure)
    listener = listen(host, port)
    owner = Owner((bundle, runtime, device), queue, deadline, console.note)
    limits = Limits(max_bytes, upload_time, max_pixels)
    asyncio.run(answer(listener, owner, limits, token, (60 if exposure else 0) if rate is None else rate))
    return 0
