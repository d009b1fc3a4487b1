"""``moebius-edge profile``: size, arithmetic and speed of student and teacher, beside the paper's Table 1.

Counting takes PyTorch and seconds. Speed takes minutes and is measured only when asked for; what was not measured says
how it is. A bundle on its runtime is ``report``'s to measure.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Annotated, Any

from typer import Option

from ..progress import Progress
from ..text import counted
from . import console
from .shared import AsJson

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
PYTORCH_FORM, SHALLOW_FORM = "PyTorch, float32", "shallow call, deep features reused"
HOW_TO_MEASURE = "not measured: moebius-edge profile --measure"
_BYTES_A_PARAMETER = 6  # float32, and half as much again for what flows through


def profile(
    measure: Annotated[bool, Option("--measure", help="Time both networks on this CPU, in minutes.")] = False,
    runs: Annotated[int, Option(min=1, metavar="N", help="Timed calls, after one that warms up.")] = 3,
    threads: Annotated[int | None, Option(min=1, metavar="N", help="CPU threads; default all free cores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the networks' size, arithmetic and latency.

    Student and teacher at the published size, beside the paper's figures. The weights are random, which does not matter
    to the time. A step is a guided one, two rows.
    """
    from ..pipeline.inpainter import STRENGTH
    from ..sampling.scheduler import DDIM
    from ..system.machine import available_cores, machine_info

    threads = available_cores() if threads is None else threads
    calls = len(DDIM(STEPS, STRENGTH).timesteps)
    timed = runs if measure else 0
    with console.needs("profile", "export"), console.progress() as on_progress:
        rows = [
            _measure("student", PYTORCH_FORM, timed, threads, calls, on_progress),
            _measure("student", SHALLOW_FORM, timed, threads, None, on_progress),
            _measure("teacher", PYTORCH_FORM, timed, threads, calls, on_progress),
        ]
    document = {
        "convention": CONVENTION,
        "networks": rows,
        "quoted": {"from": QUOTED_FROM, **QUOTED},
        "threads": threads,
        "machine": machine_info(),
    }
    if as_json:
        console.print_json(document)
    else:
        _print(document, measure)


def _measure(name: str, form: str, runs: int, threads: int, calls: int | None, on_progress: Progress) -> dict[str, Any]:
    """A network's figures; its latency is the median of ``runs`` steps, and of a picture all its ``calls``.

    Only some of a picture's calls are shallow, so that such a row has no calls and no total of its own.
    """
    from ..model import profile as networks

    size, seconds, shallow = networks.measure_size(name), [], form == SHALLOW_FORM
    if runs:
        label = f"{name}, {counted(runs, 'shallow call' if shallow else 'timed call')} of two rows"

        def on_run(done: int) -> None:
            on_progress(label, done, runs)

        seconds = networks.measure_step(name, 2, runs, threads, on_run, shallow=shallow)
    median = statistics.median(seconds) if seconds else None
    return {
        "network": name,
        "form": form,
        "parameters": None if shallow else size.parameters,
        "rows_per_step": 2,
        "multiplications": networks.measure_shallow() if shallow else size.multiplications,
        "steps": None if calls is None else STEPS,
        "calls": calls,
        "step_ms": None if median is None else median * 1e3,
        "step_runs_ms": [value * 1e3 for value in seconds],
        "total_s": None if median is None or calls is None else median * calls,
        "reason": None if seconds else HOW_TO_MEASURE,
    }


def _print(document: dict[str, Any], measured: bool) -> None:
    rows = [_row(row["network"], row["form"], row) for row in document["networks"]]
    console.print_table(rows + [_row(name, "quoted from the paper", paper) for name, paper in QUOTED.items()])
    print()
    facts = {
        "T a row": f"10^12 {document['convention']}",
        "a step": "two rows; one where guidance is distilled",
        "total": "all calls of a picture, without the autoencoder",
        "quoted": f"{QUOTED_FROM}; how many rows its step has is not said",
    }
    if measured:
        cpu, threads = document["machine"]["cpu"]["model"], counted(document["threads"], "thread")
        facts["measured"] = f"the median call on {cpu}, {threads}, random weights"
    else:
        memory = console.size(_BYTES_A_PARAMETER * QUOTED["teacher"]["parameters"])
        facts["latency"] = f"{HOW_TO_MEASURE}  (minutes, {memory} of memory)"
    console.print_facts(facts)


def _row(network: str, form: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    size = figures["parameters"]
    return {
        "network": network,
        "measured with": form,
        "parameters": None if size is None else f"{size / 1e9:.3f} B",
        "T a row": figures["multiplications"] / 1e12,
        **{name: figures[name] for name in ("step_ms", "steps", "total_s")},
    }
