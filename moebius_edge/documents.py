"""JSON documents that came from elsewhere: read within limits, checked field by field, refused in one line.

A document is described by a dataclass, a ``TypedDict`` or a pydantic model, and pydantic checks it. The result has the
declared types and finite numbers, so that no later code can meet anything else. Unknown fields are ignored.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from .errors import MachineError, MoebiusError

# Of a file, where its type has no ``MAX_BYTES`` of its own. A bundle.json of the published size, with the names of all
# quantised nodes, has 0.3 MB.
MAX_BYTES = 2 << 20
MAX_DEPTH = 32

Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]  # one line
FileName = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f\\]+$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
JsonObject = dict[str, JsonValue]

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")  # what pydantic calls a field that it does not know
# Control characters would act on the terminal they are printed to; half a surrogate pair cannot be printed at all.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def read_document(path: Path, kind: Any, error: type[MoebiusError], remedy: str, /, **added: Any) -> Any:
    """The document in the JSON file ``path``, checked against the type ``kind``, with the fields ``added`` to it.

    Raises:
        error: it is not what ``kind`` describes. The message names the first field that is wrong.
        MachineError: the file cannot be read.
    """
    try:
        content = _parse(path, getattr(kind, "MAX_BYTES", MAX_BYTES))
    except OSError as problem:
        raise MachineError(f"cannot read {path}: {problem.strerror}", f"check it with `ls -l {path}`") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: {problem}", remedy) from None
    return check_document({**content, **added}, kind, str(path), error, remedy)


def check_document(content: Any, kind: Any, where: str, error: type[MoebiusError], remedy: str) -> Any:
    """``content``, which was read from ``where``, as the type ``kind``; raises ``error`` as ``read_document`` does."""
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as problem:
        field, text = first_problem(problem)
        if field == "schema_version":
            remedy = f"run `pip install --upgrade moebius-edge`, or {remedy}"
        raise error(f"{where}: {text}", remedy) from None


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The field that is wrong, and what is wrong with it in one line.

    Of several it is ``schema_version``, else an unknown field, for these say most, else the first.
    """
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda p: (p["loc"][:1] != ("schema_version",), p["type"] not in _UNKNOWN))
    # Of a union pydantic adds the alternative that it tried, as "list[str]", and of a dictionary's key "[key]".
    field = f"{'.'.join(str(part) for part in problem['loc'] if not str(part).endswith(']')):.200}"
    if problem["type"] == "missing":
        text = f"{field} is missing"
    elif problem["type"] in _UNKNOWN:
        text = f"{field} is an unknown field"
    elif problem["type"] == "value_error":  # raised by a check of our own
        text = str(problem["ctx"]["error"])
    else:
        expected = problem["msg"].partition(" should ")[2] or problem["msg"]
        expected = expected[3:] if expected.startswith("be ") else f"to {expected}"
        expected = re.sub(r"a (valid )?dictionary.*", "an object", expected)
        text = f"{field} is {problem['input']!r:.60}, expected {expected}"
    return field, "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _parse(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file. Raises ``ValueError`` where there is none, or where it passes a limit."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("this is not a regular file")
    if status.st_size > max_bytes:
        raise ValueError(f"the file has {status.st_size} bytes, expected at most {max_bytes}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        _check_values(document)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise ValueError("this should hold a JSON object")
    return document


def _check_values(value: Any, depth: int = MAX_DEPTH) -> None:
    """Raise ``ValueError`` for a value that JSON cannot hold, or that cannot be printed or computed with."""
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise ValueError(f"it nests more than {MAX_DEPTH} deep")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_values(item, depth - 1)
    elif isinstance(value, str) and _UNPRINTABLE.search(value):
        raise ValueError(f"the text {value!r:.60} has characters that cannot be printed")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"the number {value} is not finite")
    elif isinstance(value, int) and value.bit_length() > 63:
        raise ValueError("a whole number has more than 64 bits")
