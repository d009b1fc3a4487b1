"""What ``run`` prints: each result as soon as it is there, then how it was made, then where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import console

DEMONSTRATION = "tiny"


def print_entry(entry: Mapping[str, Any], name: str, as_json: bool) -> None:
    """One picture's record: what was saved on stdout, unless JSON goes there; the rest on stderr.

    ``name`` is what the picture of a folder is called; of a single one it is empty.
    """
    name = f"{name}: " if name else ""
    if "error" in entry:
        console.error(f"{name}{entry['error']}", entry["exit_code"], as_json=False)
        return
    for text in entry["notes"]:
        console.note(f"{name}{text}")
    if not as_json:
        print(f"saved {entry['output']}", flush=True)


def print_result(document: Mapping[str, Any], report_path: Path | None, batch: bool, as_json: bool) -> None:
    """The whole run: the document of ``--json``, or for a person its settings and latencies."""
    report = document["latency"]
    if as_json:
        console.print_json(dict(document))
    elif report is not None:
        print(_settings_line(report) + _work(report["settings"]))
        _print_latency(report)
        if report_path is not None:
            print(f"latency report {report_path}")
    if report is None and report_path is not None:
        console.note(f"no latency report was written to {report_path}: no picture was processed")
    if "error" in document:
        console.error(document["error"], document["exit_code"], as_json=False)
    elif batch and not as_json:
        print(f"{len(document['results'])} of {len(document['results'])} done")
    if report is not None and report["bundle"]["name"] == DEMONSTRATION and not as_json:
        console.note(
            f"{DEMONSTRATION} is a small demonstration model; for the published weights run "
            "`moebius-edge download places2`, then the `moebius-edge export` command it prints"
        )


def _settings_line(report: Mapping[str, Any]) -> str:
    """All that must be known to make the same picture again."""
    settings, runtime, bundle = report["settings"], report["runtime"], report["bundle"]
    distilled = settings.get("distilled_guidance") is not None
    guidance = f"{settings['guidance']:g}{' (distilled, one call a step)' if distilled else ''}"
    if (interval := settings.get("guidance_interval")) is not None:
        guidance += f" at timesteps {interval[0]} to below {interval[1]}"
    steps = f"{settings['steps']} steps"
    if settings.get("cache_interval", 1) > 1:
        steps += f", deep features every {settings['cache_interval']}"
    preset = f"preset {settings['preset']}, " if settings.get("preset") else ""
    executed = f"{settings['steps_executed']} of " if "steps_executed" in settings else ""
    return (
        f"{preset}start {settings['start']}, {executed}{steps}, guidance {guidance}, "
        f"strength {settings['strength']:g}, {settings['scheduler']}, seed {settings['seed']}\n"
        f"bundle {bundle['name']} ({bundle['precision']}), "
        f"{runtime['name']} {runtime['version']} on {runtime['device']}"
    )


def _work(settings: Mapping[str, Any]) -> str:
    """How much went through the network. In a batch these are left out of the settings where pictures differ."""
    if "windows" not in settings or "network_calls" not in settings:
        return ""
    each = "" if settings["pictures"] == 1 else " a picture"
    calls = console.counted(settings["network_calls"], "network call")
    return f"\n{console.counted(settings['windows'], 'window')}, {calls}{each}"


def _print_latency(report: Mapping[str, Any]) -> None:
    """The stages in milliseconds, and the most memory the process has held."""
    numbers = ("first", "median", "p95", "p99", "total")
    table = console.table("latency (ms)", "count", *numbers, right=("count", *numbers))
    for stage, row in report["stages"].items():
        shown = {name: _ms(row[f"{name}_ms"]) for name in numbers}
        if row["count"] == 1:  # one value has no distribution
            shown.update(median="", p95="", p99="")
        table.add_row(stage, str(row["count"]), *shown.values())
    print()
    console.print_table(table)
    memory = report["peak_memory_bytes"]
    print("\ntotal is one picture in memory, without load, read and write", end="")
    print("" if memory is None else f"; peak memory {console.size(memory)}")


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
