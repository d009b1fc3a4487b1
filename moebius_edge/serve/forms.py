"""From a multipart form to an ``Order``, within limits of bytes and time and in memory alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ..documents import first_problem
from ..errors import UsageError
from ..imaging.mask_files import check_source
from ..options import Preset, Scheduler, Start
from .device import Refused
from .worker import Order

_FIELD_BYTES = 1024
_DRAINED_BYTES = 1 << 30
_MASK_OPTIONS = {"invert_mask": "invert", "mask_dilate": "dilate", "mask_from": "source"}  # as ``read_mask`` calls them
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Limits:
    """What a request may bring: bytes of its body, seconds to send it, pixels of a picture."""

    body_bytes: int
    body_s: float
    pixels: int


class Options(BaseModel):
    """The options of ``run``, by their long names with underscores. What is left out is the bundle's own."""

    model_config = ConfigDict(extra="forbid")

    steps: Annotated[int | None, Field(ge=1, le=1000, description="Steps of the sampler.", examples=[20])] = None
    guidance: Annotated[Amount | None, Field(description="1 halves the time.", examples=[2.0])] = None
    guidance_interval: Annotated[
        str | None, Field(pattern=r"^\d{1,4},\d{1,4}$", description="LOW,HIGH: guidance at these timesteps alone.")
    ] = None
    cache_interval: Annotated[int | None, Field(ge=1, le=1000, description="Deep features in every Nth call.")] = None
    start: Annotated[Start | None, Field(description="prefill removes objects.", examples=["prefill"])] = None
    strength: Annotated[float | None, Field(gt=0, le=1, description="Share of the steps to execute.")] = None
    scheduler: Annotated[Scheduler | None, Field(description="dpm++2m needs fewer steps.")] = None
    preset: Annotated[Preset | None, Field(description="fast: fewer and cheaper steps.")] = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="The same seed gives the same noise.")] = 0
    invert_mask: Annotated[bool, Field(description="Fill black instead of white.")] = False
    mask_from: Annotated[str | None, Field(max_length=32, description="What marks the hole.")] = None
    mask_dilate: Annotated[Amount, Field(description="Grow the mask by so many pixels.")] = 0
    feather: Annotated[Amount | None, Field(description="Width of the seam in pixels.")] = None
    match_colours: Annotated[bool, Field(description="Match the fill's colours to those round the hole.")] = True
    match_depth: Annotated[Amount | None, Field(description="Depth to which colours follow a smooth fill.")] = None

    @field_validator("mask_from")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        try:
            return value and check_source(value)
        except UsageError as error:
            raise ValueError(str(error).removeprefix("--").replace("mask-from", "mask_from")) from None

    def order(self, image: bytes, mask: bytes, streamed: bool, limits: Limits) -> Order:
        """The order for these options; numbers are checked further by the pipeline."""
        values = self.model_dump(exclude_none=True)
        mask_options = {name: values.pop(field) for field, name in _MASK_OPTIONS.items() if field in values}
        preset = values.pop("preset", None)
        if interval := values.pop("guidance_interval", None):
            values["guidance_interval"] = tuple(map(int, interval.split(",")))
        orders: dict[str, Any] = {"settings": values, "mask_options": mask_options, "preset": preset}
        return Order(image=image, mask=mask, streamed=streamed, max_pixels=limits.pixels, **orders)


def request_schema() -> dict[str, Any]:
    """The form as OpenAPI describes it."""
    schema = Options.model_json_schema()
    for field in schema["properties"].values():  # a form has no null: what is not wanted is left out
        field |= next((kind for kind in field.pop("anyOf", []) if kind.get("type") != "null"), {})
        if field.get("default", "") is None:
            del field["default"]
    files = {
        "image": {"type": "string", "format": "binary", "description": "PNG, JPEG, TIFF, WebP, BMP, GIF or AVIF."},
        "mask": {"type": "string", "format": "binary", "description": "Of the same size; white or strokes are filled."},
    }
    schema |= {"properties": {**files, **schema["properties"]}, "required": ["image", "mask"]}
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


async def read_form(request: Request, limits: Limits, streamed: bool) -> Order:
    """The order that a request holds.

    Raises Refused: it is no form, lacks a file, has an unknown or wrong field, is too large, or comes too slowly.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        remedy = 'send the files "image" and "mask", as `curl -F image=@photo.jpg -F mask=@mask.png` does'
        raise Refused(415, "the request is no multipart form", remedy)
    try:
        items = await asyncio.wait_for(_parse(request, limits), limits.body_s)
    except asyncio.TimeoutError:
        problem = f"the form did not arrive within {limits.body_s:g} seconds"
        raise Refused(408, problem, "send a smaller picture, or over a faster line") from None
    except MultiPartException as error:
        raise Refused(400, f"the form is damaged: {error.message}", "send it again") from None
    files = {name: data for name, data in items.items() if isinstance(data, bytes)}
    for name in ("image", "mask"):
        if name not in files:
            raise Refused(400, f'the form has no file "{name}"', "add it, with a file name")
    fields = {name: value for name, value in items.items() if name not in ("image", "mask") and value != ""}
    try:
        options = Options.model_validate(fields)
    except ValidationError as error:
        problem = first_problem(error)[1]
        raise Refused(400, problem, f"the fields are {', '.join(Options.model_fields)}") from None
    return options.order(files["image"], files["mask"], streamed, limits)


async def _parse(request: Request, limits: Limits) -> dict[str, str | bytes]:
    """The fields of a form as text and its files as bytes."""
    fields = len(Options.model_fields)
    stream = _limited(request, limits.body_bytes)
    parser = MultiPartParser(request.headers, stream, max_files=2, max_fields=fields, max_part_size=_FIELD_BYTES)
    parser.spool_max_size = 0  # no file is ever spooled to a disk
    items: dict[str, str | bytes] = {}
    for name, value in (await parser.parse()).multi_items():
        if name in items:
            raise MultiPartException(f'"{name:.50}" is there twice')
        items[name] = await value.read() if isinstance(value, UploadFile) else value
    return items


async def _limited(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body, of at most ``most`` bytes."""
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > most:
            remedy = "scale the picture down, or save it as JPEG or WebP"
            raise Refused(413, f"the request has more than {most / 1e6:g} MB", remedy)
        yield chunk


async def drain(request: Request, limits: Limits) -> None:
    """Read and drop what is left of a body that was refused: most clients read no answer before all is sent."""
    # Of a body that was read to its end starlette says that with a RuntimeError.
    with suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):
        await asyncio.wait_for(_drop(request), limits.body_s)


async def _drop(request: Request) -> None:
    total = 0
    async for chunk in request.stream():
        if (total := total + len(chunk)) > _DRAINED_BYTES:
            return
