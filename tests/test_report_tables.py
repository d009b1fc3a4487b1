"""The report's columns: how figures are written and where absent ones say why; and ``report.md``, all of it escaped."""

from __future__ import annotations

import re
from typing import Any

import pytest
from report_sample import configuration, report_of, sample_results

from moebius_edge.report import tables
from moebius_edge.report.tables import ABSENT, COMPARISON, SETTINGS, Column


def texts(rows: list[dict[str, Any]], heading: str, *columns: Column) -> list[str]:
    (column,) = (c for c in columns or COMPARISON if c.heading == heading)
    return [cell.text for cell in tables.cells(column, tables.in_order(report_of(rows)))]


@pytest.mark.parametrize(
    ("values", "digits"),
    [([2352.3, 359.0], 0), ([1835.0, 11.53], 1), ([1.6, 71.0], 2), ([0.079, 7.0], 3), ([0.0, 500.0], 0), ([], 0)],
)
def test_the_smallest_figure_keeps_three_digits(values: list[float], digits: int) -> None:
    assert tables.needed_digits(values) == digits


def test_cells_of_a_column() -> None:
    rows = [configuration("a", latency=1835.2, truth=24.07, reference=200.0), configuration("b", latency=11.53)]
    assert texts(rows, "Median (ms)") == ["11.5", "1835.2"], "the fastest first"
    assert texts(rows, "Hole PSNR to truth (dB)") == [ABSENT, "24.1"]
    assert texts(rows, "Hole PSNR to reference (dB)") == [ABSENT, "equal"]
    assert texts(rows, "Steps (executed)") == ["20", "20"]
    assert texts(rows, "Peak memory (MB)") == ["300", "300"]
    assert texts(rows, "Standing") == ["not ranked", "recommended"]
    rows[0]["settings"], rows[1]["settings"]["seed"] = None, 2**63 + 1
    assert texts(rows, "Seed") == ["9223372036854775809", ABSENT]


def test_drift_and_sustained_load_are_derived() -> None:
    row = configuration("a", reference=50.0)
    row["sustained"] = {"minutes": 5.0, "cold_median_ms": 200.0, "soaked_median_ms": 250.0, "by_minute_ms": [200.0]}
    row["accuracy"]["against_reference"]["latent_rms_drift"] = [1e-4, 3e-3, 2e-3]
    columns = [Column("Change", "derived.soaked_change", "%", 1)]
    columns += [Column(name, f"derived.drift.{name}", "RMS") for name in ("first", "largest", "last")]
    assert [texts([row], c.heading, *columns) for c in columns] == [["25.0"], ["1.0e-04"], ["3.0e-03"], ["2.0e-03"]]


def test_columns_without_a_figure_are_left_out() -> None:
    filled = tables.table(COMPARISON, tables.in_order(report_of([configuration("a", truth=20.0)])))
    headings = {column.heading: is_numeric for column, _, is_numeric in filled}
    assert headings["Hole PSNR to truth (dB)"] and not headings["Standing"]
    assert {c.heading for c in SETTINGS} <= headings.keys()
    assert not {"Hole PSNR to reference (dB)", "LPIPS", "FID", "Energy (J/image)"} & headings.keys()


def test_failed_rows_stand_with_their_status() -> None:
    assert {c["derived"]["standing"] for c in tables.in_order(sample_results())} == {
        *("recommended", "frontier", "dominated", "baseline"),
        *("gated", "missing", "failed", "out of memory"),
    }


def test_absent_figures_and_their_reasons() -> None:
    results = sample_results()
    numbers = {c["id"]: n for n, c in enumerate(results["configurations"], start=1)}
    found = tables.absences(results, numbers)
    assert ("energy", "no power sensor that this program can read", "1, 2, 3, 4, 5, 8, 9") in found
    assert ("FID", "torchmetrics is not installed", "1, 2, 3, 4, 5, 8, 9, 11, 12, 13") in found


def test_what_people_act_on_comes_first() -> None:
    text = tables.render_markdown(sample_results())
    assert re.findall(r"^## (.*)$", text, re.M) == [*("Recommendation", "All configurations", "Conditions")]
    assert "**Take sample float32, ONNX Runtime CPU, 8 steps DPM++2M, guidance 2.** 735 ms an image" in text
    assert ": denoiser returned NaN at step 3 of 19 (t=800)" in text and "| gated |" in text
    assert "| FID | torchmetrics is not installed |" in text


def test_every_table_is_well_formed() -> None:
    found = re.findall(r"(?:^\|.*\|\n)+", tables.render_markdown(sample_results()), re.M)
    assert len(found) >= 4
    for table in found:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table


def test_what_the_document_says_stays_text() -> None:
    evil = "# x | <script>alert(1)</script> [a](javascript:b) `c` *d* _e_ f_g ~h~ &lt; \\ \u202eend\n\n- new"
    row = configuration("a", truth=20.0)
    row["label"] = row["reason"] = evil
    failed = configuration("b", status="failed", reason=evil)
    failed["label"] = evil
    results = report_of([row, failed])
    results["inputs"][0]["name"] = evil
    results["machines"]["here"]["label"] = evil
    text = tables.render_markdown(results)
    assert "<script" not in text and "\u202e" not in text and "\n- new" not in text
    assert not re.search(r"(?<!\\)\[a(?<!\\)\]", text)
    shown = r"# x \| &lt;script&gt;alert(1)&lt;/script&gt; \[a\](javascript:b) \`c\` \*d\* \_e\_ f_g"
    assert shown in text
    assert not re.search(r"^# x", text, re.M)
