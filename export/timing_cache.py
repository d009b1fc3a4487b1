"""TensorRT's timing cache in a file: one line of JSON that says what it was measured with, then TensorRT's bytes.

TensorRT ignores a cache that does not fit, too, but says so only on its log. A cache is never needed: without one
the build measures every kernel again.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..system.files import atomic_write

_MARK = "moebius-edge timing cache"
_LONGEST_HEADER = 4096  # bytes


def read_timing_cache(path: Path, version: str, gpu: str) -> tuple[bytes, str]:
    """The cache for this version of TensorRT and this GPU (empty: start anew), and a note if one was ignored."""
    try:
        with open(path, "rb") as stream:
            header, blob = stream.readline(_LONGEST_HEADER), stream.read()
    except FileNotFoundError:
        return b"", ""
    except OSError as error:
        return b"", f"the timing cache {path} is ignored, it cannot be read ({error.strerror})"
    try:
        found = json.loads(header)
        if found["kind"] != _MARK:
            raise KeyError("kind")
        made_with = (str(found["version"]), str(found["gpu"]))
    except (ValueError, KeyError, TypeError):
        return b"", f"the timing cache {path} is ignored and will be replaced, it was not written by this program"
    if made_with != (version, gpu):
        return b"", (
            f"the timing cache {path} is ignored and will be replaced: it was made with TensorRT {made_with[0]} "
            f"on {made_with[1]}, this is {version} on {gpu}"
        )
    return blob, ""


def write_timing_cache(path: Path, version: str, gpu: str, blob: bytes) -> None:
    """Raises ``MachineError`` where the file cannot be written."""
    header = json.dumps({"kind": _MARK, "version": version, "gpu": gpu})
    with atomic_write(path) as temporary:
        temporary.write_bytes(header.encode() + b"\n" + blob)
