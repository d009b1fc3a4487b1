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
from .shared import AsJson

if TYPE_CHECKING:
    from ..system.jetson import Board

OK, MISSING, BROKEN, WARNING = "ok", "missing", "broken", "warning"  # the states of a check
_REINSTALL = "pip install --force-reinstall moebius-edge"
_NEEDED = {  # name -> module, remedy: what ``run`` imports
    "numpy": ("numpy", _REINSTALL),
    "opencv": ("cv2", _REINSTALL),
    "pillow": ("PIL", _REINSTALL),
    "onnxruntime": ("onnxruntime", 'pip install "moebius-edge[cpu]"'),
}
_OPTIONAL = {  # name -> distributions, extra, purpose: what other commands need
    "tensorrt": (("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), "tensorrt", "engines and --runtime tensorrt"),
    "tensorrt_rtx": (("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"), "rtx", "--runtime tensorrt-rtx"),
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


def doctor(as_json: AsJson = False) -> int:
    """Show what runs on this machine, and how to add the rest.

    Exit code 0: `run` works here. 3: it does not, and the table says why.
    """
    from ..system.jetson import findings, read_board
    from ..system.machine import machine_info

    machine, board = machine_info(), read_board()
    checks = [*_packages(bool(machine["gpus"])), _model(), *_optional_packages()]
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


def _packages(has_gpu: bool) -> Iterator[Check]:
    from ..system.machine import package_version

    for name, (module, remedy) in _NEEDED.items():
        try:
            package = importlib.import_module(module)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module
            yield Check(name, MISSING if missing else BROKEN, str(error).partition("\n")[0], remedy, required=True)
            continue
        detail, remedy = str(getattr(package, "__version__", "version unknown")), ""
        if name == "onnxruntime":
            providers = [provider.removesuffix("ExecutionProvider") for provider in package.get_available_providers()]
            detail += f", runs on {', '.join(p for p in providers if p in ('CPU', 'CUDA', 'Tensorrt'))}"
            if package_version("onnxruntime") and package_version("onnxruntime-gpu"):
                detail += "; two builds overwrite each other"
                remedy = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "moebius-edge[gpu]"'
            elif has_gpu and "CUDA" not in providers:
                remedy = 'pip uninstall -y onnxruntime && pip install "moebius-edge[gpu]"'
        yield Check(name, OK, detail, remedy, required=True)


def _model() -> Check:
    try:
        from ..bundle.bundle import Bundle

        tiny = Bundle.load("tiny")
    except (MoebiusError, ImportError) as error:
        return Check("model tiny", BROKEN, getattr(error, "problem", str(error)), _REINSTALL, required=True)
    total = console.size(tiny.summary()["total_bytes"])
    detail = f"{tiny.resolution}x{tiny.resolution}, {total}, hashes verified"
    return Check("model tiny", OK, detail, required=True)


def _optional_packages() -> Iterator[Check]:
    from ..system.machine import package_version

    for name, (distributions, extra, purpose) in _OPTIONAL.items():
        version = package_version(*distributions)
        if version is None:
            yield Check(name, MISSING, f"for {purpose}", f'pip install "moebius-edge[{extra}]"')
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
