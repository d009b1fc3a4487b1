"""What ``report`` writes beside its results, and what it prints of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import console

_NUMBERS = ("ms", "images/s", "memory", "vs reference", "vs truth")


def present(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``report.md`` and ``report.html``, and return what was written; ``results.json`` is there already."""
    from ..report.html import write_report
    from ..report.results import RESULTS_FILE

    written, how_to_render = write_report(dict(results), folder)
    if how_to_render:
        console.note(how_to_render)
    return [*written, folder / RESULTS_FILE]


def print_results(results: Mapping[str, Any], written: Sequence[Path]) -> None:
    """A row a configuration: median latency of a picture, peak host memory, PSNR in the hole; then what failed."""
    table = console.table("configuration", *_NUMBERS, right=_NUMBERS)
    for row in results["configurations"]:
        if row["status"] == "ok":
            table.add_row(row["id"], *_numbers(row))
        else:
            table.add_row(row["id"], row["status"], *[""] * (len(_NUMBERS) - 1))
    console.print_table(table)
    print("\nms: median of one picture; memory: peak of its process; PSNR in the hole in dB")
    for row in results["configurations"]:
        if row["status"] != "ok":
            console.note(f"{row['id']}: {row['status']}: {row['reason']}")
    for path in written:
        print(f"saved {path}")


def _numbers(row: Mapping[str, Any]) -> list[str]:
    total = row["latency"]["stages"]["total"]["median_ms"]
    memory = row["memory"]["peak_host_bytes"]
    from ..metrics.fidelity import PSNR_CAP_DB

    sides = [row["accuracy"][f"against_{name}"] for name in ("reference", "truth")]
    psnrs = [None if side is None else side["hole_psnr_db"] for side in sides]
    return [
        f"{total:.1f}" if total < 100 else f"{total:.0f}",
        f"{row['latency']['images_per_second']:.3g}",
        "" if memory is None else console.size(memory),
        *("" if psnr is None else "equal" if psnr >= PSNR_CAP_DB else f"{psnr:.2f}" for psnr in psnrs),
    ]
