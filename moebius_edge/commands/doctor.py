"""``moebius-edge doctor``: what this machine can run, and the command that adds what is missing.

What ``run`` needs is really imported and the bundled model really hashed, for an installed package may be
broken. Of everything else only the version is looked up.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import MachineError, MoebiusError
from . import console
from .shared import AsJson, Verbose

if TYPE_CHECKING:
    from ..system.jetson import Board

OK, MISSING, BROKEN, WARNING = "ok", "missing", "broken", "warning"  # the states of a check
_REINSTALL = "pip install --force-reinstall --no-deps"  # and nothing beside it, which may be a Jetson's own
_NEEDED = {  # name -> module, distribution: what ``run`` imports
    "numpy": ("numpy", "numpy"),
    "opencv": ("cv2", "opencv-python-headless"),
    "pillow": ("PIL", "pillow"),
    "onnxruntime": ("onnxruntime", ""),
}
_OPTIONAL = {  # name -> distributions, extra, purpose: what other commands need
    "tensorrt": (("tensorrt-cu13", "tensorrt-cu12", "tensorrt"), "tensorrt", "engines and --runtime tensorrt"),
    "tensorrt_rtx": (("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"), "rtx", "engines and --runtime tensorrt-rtx"),
    "polygraphy": (("polygraphy",), "", "engines"),
    "openvino": (("openvino",), "openvino", "--runtime openvino, fast on a CPU in fp16 and int8"),
    "torch": (("torch",), "export", "export and train"),
    "huggingface_hub": (("huggingface_hub",), "download", "download"),
}


@dataclass(frozen=True)
class Check:
    """One line of the answer. ``required``: ``run`` needs it. ``remedy``: a command, or empty."""

    name: str
    state: str
    detail: str
    remedy: str = ""
    required: bool = False


def doctor(verbose: Verbose = False, as_json: AsJson = False) -> int:
    """Show what runs on this machine, and how to add the rest.

    Exit code 0: `run` works here. 3: it does not, and the table says why.
    """
    from ..system.jetson import findings, read_board
    from ..system.machine import machine_info

    machine, board = machine_info(), read_board()
    checks = [*_packages(), _model(), *_gpu(), *_optional_packages()]
    for finding in [] if board is None else findings(board):  # ``run`` works all the same
        checks.append(Check(finding.name, OK if finding.fine else WARNING, finding.detail, finding.remedy))
    failed = next((check for check in checks if check.required and check.state != OK), None)
    code = MachineError.exit_code if failed else 0
    if as_json:
        jetson = None if board is None else board.to_dict()
        document = {"can_run": failed is None, "version": __version__, "machine": machine, "jetson": jetson}
        console.print_json({**document, "checks": [asdict(check) for check in checks]}, code)
        return code
    _print(machine, board, checks)
    if failed:
        print(f"`moebius-edge run` cannot work here yet: {failed.name} is {failed.state}")
    else:
        print("`moebius-edge run` works here: moebius-edge run IMAGE MASK")
    return code


def _packages() -> Iterator[Check]:
    from ..system.machine import package_version
    from ..system.packages import install, mend_onnxruntime

    for name, (module, distribution) in _NEEDED.items():
        try:
            package = importlib.import_module(module)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module
            detail, remedy = str(error).partition("\n")[0], f"{_REINSTALL} {distribution}"
            if name == "onnxruntime":
                built = package_version("onnxruntime-gpu", "onnxruntime")
                advice = mend_onnxruntime("--force-reinstall") if built else install("cpu")
                detail, remedy = advice.after(detail), advice.command
            yield Check(name, MISSING if missing else BROKEN, detail, remedy, required=True)
            continue
        detail = str(getattr(package, "__version__", "version unknown"))
        yield _build(package, detail) if name == "onnxruntime" else Check(name, OK, detail, required=True)


def _build(onnxruntime: Any, version: str) -> Check:
    """Which build of ONNX Runtime is there, and what brings the one for the machine's GPU."""
    from ..system.machine import has_nvidia_gpu, package_version
    from ..system.packages import install

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    detail, remedy = f"{version}, runs on {', '.join(p for p in providers if p in ('CPU', 'CUDA'))}", ""
    if package_version("onnxruntime") and package_version("onnxruntime-gpu"):
        advice = install("gpu")
        detail, remedy = advice.after(f"{detail}; two builds overwrite each other"), advice.command
    elif has_nvidia_gpu() and "CUDA" not in providers:
        remedy = install("gpu").command  # on a Jetson there is none, and its GPU is TensorRT's
    return Check("onnxruntime", OK, detail, remedy, required=True)


def _gpu() -> Iterator[Check]:
    """Whether CUDA can use the GPU that is there; without one there is nothing to check."""
    from ..runtimes.cuda import require_gpu
    from ..system.machine import has_nvidia_gpu

    if not has_nvidia_gpu():
        return
    try:
        gpu = require_gpu()
    except MachineError as error:
        yield Check("CUDA", BROKEN, error.problem, error.remedy)
        return
    capability = ".".join(map(str, gpu.compute_capability))
    yield Check("CUDA", OK, f"{gpu.name}, compute capability {capability}, driver for CUDA {gpu.driver}")


def _model() -> Check:
    try:
        from ..bundle.bundle import Bundle

        tiny = Bundle.load("tiny")
    except (MoebiusError, ImportError) as error:
        problem = getattr(error, "problem", str(error))
        return Check("model tiny", BROKEN, problem, f"{_REINSTALL} moebius-edge", required=True)
    total = console.size(tiny.summary()["total_bytes"])
    detail = f"{tiny.resolution}x{tiny.resolution}, {total}, hashes verified"
    return Check("model tiny", OK, detail, required=True)


def _optional_packages() -> Iterator[Check]:
    from ..system.machine import package_version
    from ..system.packages import Advice, install, install_older, too_new

    for name, (distributions, extra, purpose) in _OPTIONAL.items():
        version = package_version(*distributions)
        distribution = distributions[0].removesuffix("-cu13")
        if version is None:
            advice = install(extra) if extra else Advice(f"pip install {name}")
            yield Check(name, MISSING, advice.after(f"for {purpose}"), advice.command)
        elif problem := too_new(distribution):
            yield Check(name, BROKEN, problem, install_older(distribution, extra).command)
        else:
            yield Check(name, OK, f"{version[1]}, for {purpose}")


def _print(machine: dict[str, Any], board: Board | None, checks: list[Check]) -> None:
    print(f"moebius-edge {__version__}, Python {machine['python']}, {machine['system']} {machine['architecture']}")
    facts = {
        "board": board.model if board else machine["board"],
        "CPU": machine["cpu"],
        "memory_bytes": machine["memory_bytes"],
        "temperatures_c": None if board is None else board.temperatures_c,
    }
    gpus = {f"GPU {number}": gpu for number, gpu in enumerate(machine["gpus"])}
    without = "none known, asked through nvidia-ml-py" if board is None else "the board's own"
    console.print_facts(facts | (gpus or {"GPU": without}))
    print()
    console.print_table([{"check": each.name, "state": each.state, "detail": each.detail} for each in checks])
    if remedies := {check.name: check.remedy for check in checks if check.remedy}:
        print("\nto add or mend:")
        console.print_facts(remedies)  # plain lines, for a command cut in two cannot be copied
    print()
