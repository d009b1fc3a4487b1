"""``moebius-edge doctor``: what this machine can run, and the command that adds what is missing.

What ``run`` needs is really imported and the bundled model really hashed, for an installed package may be
broken. Of everything else only the version is looked up.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import MachineError, MoebiusError
from . import console

if TYPE_CHECKING:
    from ..system.jetson import Board

OK, MISSING, BROKEN, WARNING = "ok", "missing", "broken", "warning"  # what a check finds
_PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider")
_MIN_FREE_BYTES = 3_000_000_000  # the published weights, their VAE, and the bundle made from them


@dataclass(frozen=True)
class Check:
    """One line of the answer. ``required``: ``run`` needs it. ``remedy``: a command, or empty."""

    name: str
    state: str
    detail: str
    remedy: str = ""
    required: bool = False


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False) -> int:
    """Show what runs on this machine, and how to add the rest.

    Exit code 0: `run` works here. 3: it does not, and the table says why.
    """
    from ..system.jetson import read_board
    from ..system.machine import machine_info

    machine, board = machine_info(), read_board()
    checks = [*_needed(bool(machine["gpus"])), *_optional(), *_places(), *_jetson(board)]
    failed = [c for c in checks if c.required and c.state != OK]
    code = MachineError.exit_code if failed else 0
    if as_json:
        verdict = {"can_run": not failed, "version": __version__, "exit_code": code}
        jetson = None if board is None else board.to_dict()
        rows = [asdict(c) for c in checks]
        console.print_json({**verdict, "machine": machine, "jetson": jetson, "checks": rows})
        return code
    _print(machine, board, checks)
    if failed:
        print(f"`moebius-edge run` cannot work here yet: {failed[0].name} is {failed[0].state}")
    else:
        print("`moebius-edge run` works here: moebius-edge run IMAGE MASK")
    return code


def _needed(has_gpu: bool) -> list[Check]:
    """What ``run`` imports and loads."""
    reinstall = "pip install --force-reinstall moebius-edge"
    checks = [
        _imported("numpy", "numpy", reinstall),
        _imported("opencv", "cv2", reinstall),
        _imported("pillow", "PIL", reinstall),
        _onnxruntime(has_gpu),
    ]
    try:
        from ..bundle.bundle import Bundle

        tiny = Bundle.load("tiny")
        total = console.size(tiny.summary()["total_bytes"])
        detail = f"{tiny.resolution}x{tiny.resolution}, {total}, hashes verified"
        checks.append(Check("model tiny", OK, detail, required=True))
    except (MoebiusError, ImportError) as error:
        checks.append(Check("model tiny", BROKEN, _short(error).split(": ")[0], reinstall, required=True))
    return checks


def _imported(name: str, module: str, remedy: str) -> Check:
    try:
        version = str(getattr(importlib.import_module(module), "__version__", "version unknown"))
    except ImportError as error:
        state = MISSING if isinstance(error, ModuleNotFoundError) and error.name == module else BROKEN
        return Check(name, state, _short(error), remedy, required=True)
    return Check(name, OK, version, required=True)


def _onnxruntime(has_gpu: bool) -> Check:
    from ..system.machine import package_version

    check = _imported("onnxruntime", "onnxruntime", 'pip install "moebius-edge[cpu]"')
    if check.state != OK:
        return check
    available = sys.modules["onnxruntime"].get_available_providers()
    providers = [name.removesuffix("ExecutionProvider") for name in available if name in _PROVIDERS]
    detail = f"{check.detail}, runs on {', '.join(providers)}"
    remedy = ""
    if package_version("onnxruntime") and package_version("onnxruntime-gpu"):
        detail += "; two builds overwrite each other"
        remedy = 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "moebius-edge[gpu]"'
    elif has_gpu and "CUDA" not in providers:
        remedy = 'pip uninstall -y onnxruntime && pip install "moebius-edge[gpu]"'
    return Check("onnxruntime", OK, detail, remedy, required=True)


def _optional() -> list[Check]:
    """What other commands need, by its distributions' names."""
    from ..system.machine import package_version

    rows = (
        ("tensorrt", "tensorrt tensorrt-cu13 tensorrt-cu12", "tensorrt", "for engines and --runtime tensorrt"),
        (
            "tensorrt_rtx",
            "tensorrt-rtx-cu13 tensorrt-rtx-cu12 tensorrt-rtx",
            "rtx",
            "for engines and --runtime tensorrt-rtx",
        ),
        ("torch", "torch", "export", "for export and train"),
        ("huggingface_hub", "huggingface_hub", "download", "for download"),
    )
    checks = []
    for name, distributions, extra, purpose in rows:
        found = package_version(*distributions.split())
        if found is None:
            checks.append(Check(name, MISSING, purpose, f'pip install "moebius-edge[{extra}]"'))
        else:
            checks.append(Check(name, OK, f"{found[1]}, {purpose}"))
    return checks


def _jetson(board: Board | None) -> list[Check]:
    """How a Jetson is set up; ``run`` works all the same, so nothing here is required."""
    from ..system.jetson import findings

    if board is None:
        return []
    return [Check(f.name, OK if f.fine else WARNING, f.detail, f.remedy) for f in findings(board)]


def _places() -> list[Check]:
    """Where downloads and results go."""
    from .download import cache_folder

    places = [_place("this folder", Path.cwd())]
    try:
        places.append(_place("download cache", cache_folder()))
    except MachineError as error:
        places.append(Check("download cache", BROKEN, str(error), "export XDG_CACHE_HOME=FOLDER"))
    return places


def _place(name: str, folder: Path) -> Check:
    existing = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {console.size(free)} free"
    if not os.access(existing, os.W_OK):
        return Check(name, BROKEN, f"{detail}, not writable", f"chmod u+w {existing}")
    if free < _MIN_FREE_BYTES:
        needed = console.size(_MIN_FREE_BYTES)
        return Check(name, BROKEN, f"{detail}; published weights need {needed}", f"du -sh {existing}/*")
    return Check(name, OK, detail)


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _print(machine: dict[str, Any], board: Board | None, checks: list[Check]) -> None:
    cpu = machine["cpu"]
    system = f"{machine['system']} {machine['architecture']}"
    print(f"moebius-edge {__version__}, Python {machine['python']}, {system}")
    features = ", ".join(cpu["features"]) or "unknown"
    rows = {
        "board": (board.model if board else machine["board"]) or "",
        "CPU": f"{cpu['model'] or 'unknown'}, {console.counted(cpu['cores_available'], 'core')} to use",
        "instructions": features,
        "memory": console.size(machine["memory_bytes"]) if machine["memory_bytes"] else "unknown",
    }
    for gpu in machine["gpus"]:
        memory = f", {console.size(gpu['memory_bytes'])}" if gpu["memory_bytes"] else ""
        capability = f"compute capability {gpu['compute_capability']}, driver {gpu['driver']}"
        rows["GPU"] = f"{gpu['name']}{memory}, {capability}"
    rows.setdefault("GPU", "none known, asked through nvidia-ml-py" if board is None else "the board's own")
    if board is not None and board.temperatures_c:
        rows["temperature"] = ", ".join(f"{zone} {value:.0f} °C" for zone, value in board.temperatures_c.items())
    for name, value in rows.items():
        if value:
            print(f"  {name:<12}  {value}")
    table = console.table("check", "state", "found")
    for check in checks:
        table.add_row(check.name, check.state, check.detail)
    print()
    console.print_table(table)
    remedies = [check for check in checks if check.remedy]
    if remedies:
        print("\nto add or mend:")
    for check in remedies:  # plain lines, for a command cut in two cannot be copied
        print(f"  {check.name:<16} {check.remedy}")
    print()
