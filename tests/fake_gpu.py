"""ONNX Runtime's GPU build as it shows itself to Python, without a GPU. Not a test.

Sessions execute on the CPU, buffers lie in host memory, and both say what a GPU's would; so results, buffers and
profiles are real, and only where they come from is not. What was asked of it is recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


class FakeGpu:
    """Replaces the parts of ``onnxruntime`` that meet a GPU; see the attributes for what can go wrong.

    ``providers`` are what the build lists, ``broken`` those whose libraries do not load, ``left_to_cpu`` the
    operators for which the provider has no kernel.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, providers: tuple[str, ...] = (TENSORRT, CUDA, CPU)) -> None:
        self.providers = providers
        self.broken: set[str] = set()
        self.left_to_cpu: set[str] = set()
        self.idle = False  # the provider starts, and is given nothing
        self.sessions: list[list[Any]] = []  # the providers and options each session was given
        self.buffers: list[tuple[str, tuple[int, ...]]] = []  # device and shape of every one allocated
        gpu, real_session, real_value = self, onnxruntime.InferenceSession, onnxruntime.OrtValue

        class Session(real_session):  # type: ignore[misc, valid-type]
            def __init__(self, model: Any, options: Any, providers: list[Any], enable_fallback: int) -> None:
                assert not enable_fallback, "onnxruntime would retry on the CPU without a word"
                gpu.sessions.append(providers)
                names = [p if isinstance(p, str) else p[0] for p in providers]
                self.claimed = [n for n in names if n not in gpu.broken]
                if TENSORRT in names and TENSORRT in gpu.broken:  # CUDA's is left out instead, silently
                    place = "/src/python/onnxruntime_pybind_state.cc:729 void Register(Options&, const X&) "
                    raise RuntimeError(f"[ONNXRuntimeError] : 11 : EP_FAIL : {place}Please install TensorRT\nstack")
                super().__init__(model, options, providers=[CPU])

            def get_providers(self) -> list[str]:
                return self.claimed

            def end_profiling(self) -> str:
                path = str(super().end_profiling())
                events = json.loads(Path(path).read_text())
                for event in events:
                    arguments = event.get("args") or {}
                    stays = gpu.idle or arguments.get("op_name") in gpu.left_to_cpu
                    if "provider" in arguments and not stays:
                        arguments["provider"] = self.claimed[0]
                Path(path).write_text(json.dumps(events))
                return path

        class Value:
            @staticmethod
            def ortvalue_from_shape_and_type(shape: list[int], kind: Any, device: str, number: int) -> Any:
                gpu.buffers.append((device, tuple(shape)))
                return real_value.ortvalue_from_shape_and_type(shape, kind, "cpu", number)

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(self.providers))
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnxruntime, "OrtValue", Value)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda **options: print("Failed to load"), raising=False)
