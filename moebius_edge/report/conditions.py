"""What the figures were measured under and on: conditions, machines, inputs."""

from __future__ import annotations

from .figures import Results, clean, counted, label, machine_label, number, words
from .table import ABSENT

Rows = tuple[tuple[str, ...], list[list[str]], tuple[int, ...]]  # headings, rows, which columns are numbers
_MACHINE_HEADINGS = (
    *("Machine", "Processor", "Cores", "Memory (GB)", "GPU", "System"),
    *("Peak (10\u2079 multiplications/s)", "Peak (GB/s)", "Peak measured with"),
)


def machine_rows(results: Results) -> Rows:
    rows = []
    for identity, machine in results["machines"].items():
        info, peaks = machine["info"], machine["peaks"]
        gpus = info.get("gpus")
        names = [words(gpu, "name") or "" for gpu in gpus] if isinstance(gpus, list) else []
        with_what = [words(peaks, "runtime"), words(peaks, "precision")]
        figures = [
            _figure(number(info, "cpu", "cores_available"), 1, 0),
            _figure(number(info, "memory_bytes"), 1e-9, 1),
            _figure(number(peaks, "multiplications_per_second"), 1e-9, 1),
            _figure(number(peaks, "bytes_per_second"), 1e-9, 1),
        ]
        rows.append(
            [
                machine_label(results, identity),
                words(info, "cpu", "model") or ABSENT,
                *figures[:2],
                ", ".join(filter(None, names)) or ABSENT,
                words(info, "system") or ABSENT,
                *figures[2:],
                " ".join(filter(None, with_what)) or ABSENT,
            ]
        )
    return _MACHINE_HEADINGS, rows, (2, 3, 6, 7)


def conditions_line(results: Results) -> str:
    conditions = results["conditions"]
    reference = next((label(c) for c in results["configurations"] if c["id"] == conditions["reference"]), None)
    runs = f"{counted(conditions['warmup'], 'warm-up run')} and {counted(conditions['runs'], 'measured run')} an input"
    return f"Seed {conditions['seed']}; {runs}; " + (
        f"reference: {reference}." if reference else "no float32 reference."
    )


def input_rows(results: Results) -> Rows:
    rows = [
        [
            clean(entry["name"]),
            str(entry["width"]),
            str(entry["height"]),
            f"{100 * entry['hole_share']:.1f}",
            "yes" if entry["truth"] else "no",
        ]
        for entry in results["inputs"]
    ]
    return ("Input", "Width (px)", "Height (px)", "Hole (%)", "Ground truth"), rows, (1, 2, 3)


def _figure(value: float | None, factor: float, digits: int) -> str:
    return ABSENT if value is None else f"{value * factor:.{digits}f}"
