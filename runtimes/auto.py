"""``auto``: the fastest runtime and device that really works on this machine for this bundle, and why.

A device or runtime that was asked for by name is never exchanged for another: the candidates are only narrowed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, MachineError, UsageError
from ..options import AUTO
from ..system.machine import has_nvidia_gpu

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

CPU = "cpu"


@dataclass(frozen=True)
class Candidate:
    """``problem(bundle)`` is empty where this works, else one line on why not and what helps."""

    runtime: str
    device: str
    problem: Callable[[Bundle], str]

    @property
    def name(self) -> str:
        return f"{self.runtime} on {self.device}"


@dataclass(frozen=True)
class Selection:
    """What was chosen, and the faster candidates that were passed over, with the reasons.

    ``tried`` is False where only one candidate was left: creating the runtime says what is wrong with it.
    """

    bundle: Bundle
    candidate: Candidate
    passed_over: dict[str, str]
    tried: bool = True

    @property
    def note(self) -> str:
        """Why it is this one, and how its pictures differ from the gate's; empty where that is plain."""
        skipped = [f"not {name}: {why}" for name, why in self.passed_over.items()]
        if self.candidate.device == CPU and not has_nvidia_gpu():
            skipped = []
        gate = self.bundle.gate.get("runtime", "onnxruntime")
        if self.candidate.runtime == "openvino" and self.tried and gate != "openvino":
            in_bfloat16 = ", and in bfloat16 where the CPU has it" if self.bundle.precision != "float32" else ""
            skipped.append(f"it rounds otherwise than {gate}, in which the gate was taken{in_bfloat16}")
        return f"{self.candidate.name} is the fastest that works here ({'; '.join(skipped)})" if skipped else ""

    def to_dict(self) -> dict[str, Any]:
        chosen = {"runtime": self.candidate.runtime, "device": self.candidate.device}
        return {**chosen, "passed_over": self.passed_over}


def select(bundle: Bundle, runtime: str = AUTO, device: str = AUTO) -> Selection:
    """The first working candidate of those that ``runtime`` and ``device`` leave.

    Raises:
        UsageError: no candidate has that device.
        MachineError: none of several works; the message says why, of each.
    """
    of_runtime = [c for c in CANDIDATES if runtime in (AUTO, c.runtime)]
    candidates = [c for c in of_runtime if device in (AUTO, c.device)]
    if not candidates:
        known = ", ".join(dict.fromkeys(c.device for c in of_runtime))
        where = "there is" if runtime == AUTO else f"runtime {runtime} has"
        others = "; gpu and npu are for --runtime openvino" if runtime == AUTO else ""
        raise UsageError(f"{where} no device {device!r}", f"choose one of {known}, or auto{others}")
    if len(candidates) == 1:
        return Selection(bundle, candidates[0], {}, tried=False)
    passed_over: dict[str, str] = {}
    for candidate in candidates:
        if not (problem := candidate.problem(bundle)):
            return Selection(bundle, candidate, passed_over)
        passed_over[candidate.name] = problem
    problems = "; ".join(f"{name}: {why}" for name, why in passed_over.items())
    raise MachineError(f"nothing works here on {device}; {problems}")


def _cuda_problem(bundle: Bundle) -> str:
    from .providers import absence, import_onnxruntime, start_problem

    try:
        ort = import_onnxruntime()
    except MachineError as error:
        return str(error)
    return absence(ort, "cuda") or start_problem(ort, "cuda")


def _tensorrt_problem(variant: str, bundle: Bundle) -> str:
    from .cuda import require_gpu
    from .engine_files import VARIANTS, choose_engine, load_package

    try:
        gpu = require_gpu()
        package = load_package(VARIANTS[variant])
        choose_engine(bundle, VARIANTS[variant], str(package.__version__), gpu)
    except (MachineError, BundleError) as error:
        return str(error)
    return ""


def _openvino_problem(bundle: Bundle) -> str:
    from .openvino import import_openvino

    try:
        import_openvino()
    except MachineError as error:
        return str(error)
    return ""


# Fastest first. The last one is the last resort: if it fails as well, creating it says why.
CANDIDATES: tuple[Candidate, ...] = (
    Candidate("tensorrt", "cuda", partial(_tensorrt_problem, "tensorrt")),
    Candidate("tensorrt-rtx", "cuda", partial(_tensorrt_problem, "tensorrt-rtx")),
    Candidate("onnxruntime", "cuda", _cuda_problem),
    Candidate("openvino", CPU, _openvino_problem),
    Candidate("onnxruntime", CPU, lambda bundle: ""),
)
