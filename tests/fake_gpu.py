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

from moebius_edge.runtimes import cuda
from moebius_edge.runtimes import providers as providers_module
from moebius_edge.runtimes.cuda import Gpu
from moebius_edge.system import packages

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GPU = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24_000_000_000, False, "12.8")


class FakeGpu:
    """Replaces the parts of ``onnxruntime`` that meet a GPU; see the attributes for what can go wrong.

    ``providers`` are what the build lists, ``broken`` those whose libraries do not load, ``left_to_cpu`` the
    operators for which the provider has no kernel. Where ``failure`` is a text, every execution on the GPU fails with
    it; where ``no_graphs`` is one, opening a session that is to record does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, providers: tuple[str, ...] = (TENSORRT, CUDA, CPU)) -> None:
        self.providers = providers
        self.broken: set[str] = set()
        self.left_to_cpu: set[str] = set()
        self.idle = False  # the provider starts, and is given nothing
        self.failure = self.no_graphs = ""
        self.graphs: list[str] = []  # the number of the CUDA graph each bound execution was for; -1 is none
        self.sessions: list[list[Any]] = []  # the providers and options each session was given
        self.buffers: list[tuple[str, tuple[int, ...]]] = []  # device and shape of every one allocated
        gpu, real_session, real_value = self, onnxruntime.InferenceSession, onnxruntime.OrtValue

        class Session(real_session):  # type: ignore[misc, valid-type]
            def __init__(self, model: Any, options: Any, providers: list[Any], enable_fallback: int) -> None:
                assert not enable_fallback, "onnxruntime would retry on the CPU without a word"
                gpu.sessions.append(providers)
                names = [p if isinstance(p, str) else p[0] for p in providers]
                self.claimed = [n for n in names if n not in gpu.broken]
                self.records = any(o.get("enable_cuda_graph") == "1" for _, o in (p for p in providers if p != CPU))
                if self.records and gpu.no_graphs:
                    raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {gpu.no_graphs}\nstack")
                super().__init__(model, options, providers=[CPU])

            def run(self, *arguments: Any) -> Any:
                self.fail()
                return super().run(*arguments)

            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                self.fail()
                number = options.get_run_config_entry("gpu_graph_id")
                assert number == "-1" or self.records, "a graph of a session that does not record"
                gpu.graphs.append(number)
                super().run_with_iobinding(binding, options)

            def fail(self) -> None:
                if gpu.failure and CUDA in self.claimed:
                    raise RuntimeError(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {gpu.failure}\nstack")

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

        monkeypatch.setattr(cuda, "require_gpu", lambda: GPU)
        monkeypatch.setattr(providers_module, "require_gpu", lambda: GPU)
        monkeypatch.setattr(packages, "cuda_version", lambda: None)
        monkeypatch.setattr(packages, "driver_version", lambda: "580.95.05")
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(self.providers))
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnxruntime, "OrtValue", Value)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda **options: print("Failed to load"), raising=False)
