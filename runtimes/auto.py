"""``auto``: the fastest runtime and device that really works on this machine for this bundle, and why.

Candidates stand in one list, fastest first, each with a probe that says in one line why it does not work here. A
device or runtime that was asked for by name is never exchanged for another: the list is only narrowed to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, MachineError, UsageError
from ..system.machine import gpu_name

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

AUTO = "auto"
CPU = "cpu"


@dataclass(frozen=True)
class Candidate:
    """``usable(bundle)`` is empty where this works, else why not and, where there is one, the command that helps."""

    runtime: str
    device: str
    usable: Callable[[Bundle], str]

    @property
    def name(self) -> str:
        return f"{self.runtime} on {self.device}"


@dataclass(frozen=True)
class Selection:
    """What was chosen, and what was passed over for which reason, in the candidates' order.

    ``tried`` is whether its probe was asked; what was left to no choice is not tried, creating it says what is wrong.
    """

    candidate: Candidate
    passed_over: dict[str, str]
    tried: bool = True

    @property
    def reason(self) -> str:
        if not self.passed_over:
            return f"{self.candidate.name} is the fastest there is, and it works here"
        skipped = "; ".join(f"not {name}: {why}" for name, why in self.passed_over.items())
        return f"{self.candidate.name} is the fastest that works here ({skipped})"

    @property
    def notable(self) -> bool:
        """Whether a user must be told: always, but where there was nothing to choose, as without a GPU."""
        return self.tried and (self.candidate.device != CPU or (bool(self.passed_over) and gpu_name() is not None))

    def to_dict(self) -> dict[str, Any]:
        chosen = self.candidate
        return {"runtime": chosen.runtime, "device": chosen.device, "passed_over": self.passed_over}


def select(bundle: Bundle, runtime: str = AUTO, device: str = AUTO) -> Selection:
    """The first usable candidate of those that ``runtime`` and ``device`` leave.

    Raises:
        UsageError: no candidate has that device.
        MachineError: none of several is usable; the message says why, of each.
    """
    named = [c for c in CANDIDATES if runtime in (AUTO, c.runtime)]
    left = [c for c in named if device in (AUTO, c.device)]
    if not left:
        known = ", ".join(dict.fromkeys(c.device for c in named))
        where = "there is" if runtime == AUTO else f"runtime {runtime} has"
        raise UsageError(f"{where} no device {device!r}: choose one of {known}, or auto")
    passed_over: dict[str, str] = {}
    for candidate in left:
        if len(left) == 1:
            return Selection(candidate, {}, tried=False)
        if not (problem := candidate.usable(bundle)):
            return Selection(candidate, passed_over)
        passed_over[candidate.name] = problem
    problems = "; ".join(f"{name}: {why}" for name, why in passed_over.items())
    raise MachineError(f"nothing works here on {device}; {problems}")


def _onnxruntime_gpu(device: str) -> Callable[[Bundle], str]:
    def usable(bundle: Bundle) -> str:
        from .providers import absence, engines_missing, import_onnxruntime, start_problem

        try:
            ort = import_onnxruntime()
        except MachineError as error:
            return str(error)
        if problem := absence(ort, device):
            return problem
        if device == "tensorrt" and engines_missing(bundle, ort.__version__):
            return "no engines are built for this bundle yet: `--device tensorrt` builds them once, in minutes"
        return start_problem(ort, device)

    return usable


def _native(flavour: str) -> Callable[[Bundle], str]:
    def usable(bundle: Bundle) -> str:
        from .cuda import find_gpu
        from .engine_files import FLAVOURS, choose_engine, load_package

        gpu = find_gpu()
        if gpu is None:
            return "this machine has no NVIDIA GPU that its driver answers for: check `nvidia-smi`"
        try:
            package = load_package(FLAVOURS[flavour])
            choose_engine(bundle, FLAVOURS[flavour], str(package.__version__), gpu, verify=False)
        except (MachineError, BundleError) as error:
            return str(error)
        return ""

    return usable


def _always(bundle: Bundle) -> str:
    """The last resort: if it fails as well, creating it says why."""
    return ""


# Fastest first. A new back-end takes its place here.
CANDIDATES: tuple[Candidate, ...] = (
    Candidate("tensorrt", "cuda", _native("tensorrt")),
    Candidate("tensorrt-rtx", "cuda", _native("tensorrt-rtx")),
    Candidate("onnxruntime", "tensorrt", _onnxruntime_gpu("tensorrt")),
    Candidate("onnxruntime", "cuda", _onnxruntime_gpu("cuda")),
    Candidate("onnxruntime", CPU, _always),
)
