"""``moebius-edge profile``: size, arithmetic and speed of student and teacher, beside the paper's Table 1.

Counting takes PyTorch and seconds. Speed takes minutes and is measured only when asked for; what was not measured says
how it is.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MachineError, UsageError
from . import console

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

# Table 1 of arXiv 2606.19195: one NVIDIA L40S, batch 1, 512x512. Quoted, not measured by us.
QUOTED: dict[str, dict[str, float]] = {
    "student": {"parameters": 0.226e9, "multiplications": 0.154e12, "step_ms": 26.01, "steps": 20, "total_s": 0.52},
    "teacher": {"parameters": 0.862e9, "multiplications": 0.338e12, "step_ms": 46.89, "steps": 20, "total_s": 0.94},
}
QUOTED_FROM = "arXiv 2606.19195, Table 1 (one NVIDIA L40S, batch 1, 512x512)"
CONVENTION = (
    "multiply-adds of convolutions, linear layers and matrix products for one row (one latent, one branch of "
    "guidance); a guided step is two rows"
)
STEPS = 20
SHALLOW_FORM = "shallow call, deep features reused"
HOW_TO_MEASURE = "not measured: moebius-edge profile --measure"
_BYTES_A_PARAMETER = 6  # float32, and half as much again for what flows through
_MEASURING_BYTES = _BYTES_A_PARAMETER * QUOTED["teacher"]["parameters"]


def profile(
    measure: Annotated[bool, typer.Option("--measure", help="Time both networks on this CPU, in minutes.")] = False,
    bundle: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="A bundle of the published size: timed on its runtime too.")
    ] = None,
    runtime: Annotated[str, typer.Option(metavar="NAME", help="What executes the bundle.")] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="Where the bundle is executed.")] = "auto",
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Timed calls, after one that warms up.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads; default as many as cores are free to use.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Show the networks' size, arithmetic and latency.

    Student and teacher at the published size, beside the paper's figures. The weights are random, which does not matter
    to the time. A step is a guided one, two rows.
    """
    from ..pipeline.inpainter import STRENGTH
    from ..sampling.scheduler import DDIM
    from ..system.machine import available_cores, machine_info

    try:
        from ..model import profile as networks
    except ModuleNotFoundError as error:
        raise MachineError(f'profile needs {error.name}: run `pip install "moebius-edge[export]"`') from None
    loaded = None if bundle is None else _full_size(bundle)
    used = available_cores() if threads is None else threads
    calls = len(DDIM(STEPS, STRENGTH).timesteps)
    rows = []
    with console.progress() as update:
        for name in networks.BUILDERS:
            size = networks.measure_size(name)
            row = {"network": name, "form": "PyTorch, float32", "parameters": size.parameters, "rows_per_step": 2,
                   "multiplications": size.multiplications, "steps": STEPS, "calls": calls}  # fmt: skip
            seconds: list[float] = []
            if measure:
                _check_memory(name, _BYTES_A_PARAMETER * size.parameters)
                told = partial(_tell, update, f"{name}, {console.counted(runs, 'timed call')} of two rows", runs)
                told(0)
                seconds = networks.measure_step(name, 2, runs, used, told)
            rows.append(row | _latency(seconds, calls))
            if name == "student":
                shallow = {
                    **row,
                    "form": SHALLOW_FORM,
                    "parameters": None,
                    "multiplications": networks.measure_shallow(),
                }
                if measure:
                    told = partial(_tell, update, f"{name}, {console.counted(runs, 'shallow call')} of two rows", runs)
                    told(0)
                    seconds = networks.measure_step(name, 2, runs, used, told, shallow=True)
                # Only some of a picture's calls are shallow: it has no total of its own.
                rows.append(shallow | {"steps": None, "calls": None} | _latency(seconds, None))
        if loaded is not None:
            update(f"{loaded.name}, {console.counted(runs, 'timed call')}", 0, 0)
            rows.append(_bundle_row(loaded, runtime, device, runs, threads, calls))
    document = {
        "convention": CONVENTION,
        "networks": rows,
        "quoted": {"from": QUOTED_FROM, **QUOTED},
        "threads": used,
        "machine": machine_info(),
        "exit_code": 0,
    }
    if as_json:
        console.print_json(document)
    else:
        _print(document)


def _tell(update: console.Update, label: str, total: int, done: int) -> None:
    update(label, done, total)


def _full_size(name: str) -> Bundle:
    from ..bundle.bundle import Bundle
    from ..model import StudentConfig

    loaded = Bundle.load(name)
    if loaded.model != StudentConfig().to_dict():
        raise UsageError(
            f"bundle {name} is not of the published size ({loaded.resolution}x{loaded.resolution}), which is what is "
            "profiled: export the published weights (`moebius-edge download places2`), or leave --bundle out"
        )
    return loaded


def _check_memory(network: str, needed: int) -> None:
    from ..system.machine import available_memory_bytes

    free = available_memory_bytes()
    if free is not None and free < needed:
        raise MachineError(
            f"the {network} needs {console.size(needed)} of memory and {console.size(free)} are free: close other "
            "programs, or leave --measure out"
        )


def _bundle_row(
    bundle: Bundle, runtime: str, device: str, runs: int, threads: int | None, calls: int
) -> dict[str, Any]:
    """A bundle's denoiser on its runtime; its arithmetic is the file's, which export has rewritten."""
    import time

    from ..report.flops import count_macs
    from ..runtimes import create_runtime
    from ..runtimes.base import drawn_feeds

    count = bundle.branches
    chosen = create_runtime(runtime, bundle, device, threads)
    macs = count_macs(bundle.component_path("denoiser"), 1)
    feeds = drawn_feeds(bundle.components["denoiser"], count)
    seconds = []
    with chosen:
        for _ in range(runs + 1):
            started = time.perf_counter()
            chosen.run("denoiser", feeds)
            seconds.append(time.perf_counter() - started)
        info = chosen.report()
    return {
        "network": "student",
        "form": f"{bundle.name}, {info['name']} {info['version']} on {info['device']}, {bundle.precision}",
        "parameters": None,  # export has baked and folded weights: they are no longer the checkpoint's
        "rows_per_step": count,
        "multiplications": macs.total,
        "multiplications_reason": macs.reason,
        "steps": STEPS,
        "calls": calls,
        "runtime": info,
        **_latency(seconds[1:], calls),
    }


def _latency(seconds: list[float], calls: int | None) -> dict[str, Any]:
    """The median step, and all calls of a picture, if they are all alike; nothing else of a picture is in it."""
    if not seconds:
        return {"step_ms": None, "step_runs_ms": [], "total_s": None, "reason": HOW_TO_MEASURE}
    median = statistics.median(seconds)
    return {
        "step_ms": median * 1e3,
        "step_runs_ms": [s * 1e3 for s in seconds],
        "total_s": None if calls is None else median * calls,
        "reason": None,
    }


def _print(document: dict[str, Any]) -> None:
    columns = ("parameters", "T a row", "ms a step", "steps", "total, s")
    table = console.table("network", "measured with", *columns, right=columns)
    quoted = document["quoted"]
    for row in document["networks"]:
        steps = "" if row["calls"] is None else f"{row['steps']} ({row['calls']} calls)"
        total = "" if row["calls"] is None else _number(row["total_s"], 1)
        table.add_row(row["network"], row["form"], _grouped(row["parameters"]), _tera(row["multiplications"]),
                      _number(row["step_ms"], 1), steps, total)  # fmt: skip
    for name in QUOTED:
        paper = quoted[name]
        table.add_row(name, "quoted from the paper", f"{paper['parameters'] / 1e9:.3f} B",
                      _tera(paper["multiplications"], 3), f"{paper['step_ms']:.2f}", f"{paper['steps']}",
                      f"{paper['total_s']:.2f}")  # fmt: skip
    console.print_table(table)
    machine = document["machine"]
    print(f"\nT a row   10^12 {document['convention']}")
    print("a step    two rows, one where guidance is distilled; total: all calls of a picture, without the autoencoder")
    print(f"quoted    {quoted['from']}; how many rows its step has is not said")
    if any(row["step_ms"] is not None for row in document["networks"]):
        cpu, threads = machine["cpu"]["model"], console.counted(document["threads"], "thread")
        print(f"measured  the median call on {cpu}, {threads}, random weights")
    if any(row["reason"] for row in document["networks"]):
        print(f"latency   {HOW_TO_MEASURE}  (minutes, {console.size(_MEASURING_BYTES)} of memory)")


def _grouped(number: int | None) -> str:
    return "" if number is None else f"{number:,}".replace(",", " ")


def _tera(number: float | None, digits: int = 4) -> str:
    return "" if number is None else f"{number / 1e12:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"
