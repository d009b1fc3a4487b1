"""The timing cache's file: what fits is handed to TensorRT, what does not is ignored with a note."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.export.timing_cache import read_timing_cache, write_timing_cache
from moebius_edge.export.trt_builder import TrtBuilder
from moebius_edge.runtimes.engine_files import FLAVOURS

BLOB = b"\x00times\n\xff of kernels"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    assert read_timing_cache(path, "10.3.0", "Orin") == (b"", "")
    write_timing_cache(path, "10.3.0", "Orin", BLOB)
    assert read_timing_cache(path, "10.3.0", "Orin") == (BLOB, "")


def test_a_cache_of_another_version_or_gpu_is_ignored_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "timing.cache"
    write_timing_cache(path, "10.3.0", "Orin", BLOB)
    for version, gpu in (("10.13.3", "Orin"), ("10.3.0", "Thor")):
        blob, note = read_timing_cache(path, version, gpu)
        assert blob == b""
        assert f"{path} is ignored and will be replaced: it was made with TensorRT 10.3.0 on Orin" in note
        assert note.endswith(f"this is {version} on {gpu}")


@pytest.mark.parametrize("content", [b"", b"\xff\x00\n", b"{}\nx", b"[]\nx", b'{"kind": 3}\n', b"no newline"])
def test_any_other_file_is_ignored_with_a_note(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(content)
    blob, note = read_timing_cache(path, "10.3.0", "Orin")
    assert blob == b"" and "it was not written by this program" in note
    blob, note = read_timing_cache(tmp_path, "10.3.0", "Orin")
    assert blob == b"" and "cannot be read (Is a directory)" in note


class Config:
    """TensorRT's builder configuration, as far as the cache goes: it refuses bytes it cannot read."""

    def __init__(self) -> None:
        self.made: list[bytes] = []

    def create_timing_cache(self, blob: bytes) -> bytes | None:
        self.made.append(blob)
        return None if blob.startswith(b"corrupt") else b"cache of " + blob

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True


@pytest.mark.parametrize(
    ("stored", "version", "made", "notes"),
    [
        (BLOB, "10.3.0", [BLOB], 0),
        (BLOB, "10.4.0", [b""], 1),
        (b"corrupt", "10.3.0", [b"corrupt", b""], 0),
    ],
)
def test_the_builder_gets_what_fits(
    tmp_path: Path, stored: bytes, version: str, made: list[bytes], notes: int
) -> None:
    path = tmp_path / "timing.cache"
    write_timing_cache(path, "10.3.0", "Orin", stored)
    builder: Any = object.__new__(TrtBuilder)
    builder.package, builder._flavour = types.SimpleNamespace(__version__=version), FLAVOURS["tensorrt"]
    config, told = Config(), []
    request = {"timing_cache": str(path), "gpu": "Orin"}
    cache = builder._load_timing_cache(config, request, lambda event, **values: told.append((event, values)))
    assert config.made == made and config.cache == cache
    assert [event for event, _ in told] == ["note"] * notes
