"""The report's columns: how figures are written and where absent ones say why."""

from __future__ import annotations

from typing import Any

import pytest
from report_sample import configuration, report_of, sample_results

from moebius_edge.report import tables
from moebius_edge.report.tables import ABSENT, COMPARISON, SETTINGS, Column


def texts(rows: list[dict[str, Any]], title: str, *columns: Column) -> list[str]:
    (column,) = (c for c in columns or COMPARISON if c.title == title)
    return [cell.text for cell in tables.cells(column, tables.in_order(report_of(rows)))]


@pytest.mark.parametrize(
    ("values", "digits"),
    [([2352.3, 359.0], 0), ([1835.0, 11.53], 1), ([1.6, 71.0], 2), ([0.079, 7.0], 3), ([0.0, 500.0], 0), ([], 0)],
)
def test_the_smallest_figure_keeps_three_digits(values: list[float], digits: int) -> None:
    assert tables.needed_digits(values) == digits


def test_cells_of_a_column() -> None:
    rows = [configuration("a", latency=1835.2, truth=24.07, reference=200.0), configuration("b", latency=11.53)]
    assert texts(rows, "Median") == ["11.5", "1835.2"], "the fastest first"
    assert texts(rows, "Hole PSNR to truth") == [ABSENT, "24.1"]
    assert texts(rows, "Hole PSNR to reference") == [ABSENT, "equal"]
    assert texts(rows, "Steps") == ["20", "20"]
    assert texts(rows, "Peak memory") == ["300", "300"]
    assert texts(rows, "Standing") == ["not ranked", "recommended"]
    rows[0]["settings"] = None
    assert texts(rows, "Start") == ["image", ABSENT]


def test_sustained_load_is_derived() -> None:
    row = configuration("a", reference=50.0)
    row["sustained"] = {"minutes": 5.0, "cold_median_ms": 200.0, "soaked_median_ms": 250.0, "by_minute_ms": [200.0]}
    assert texts([row], "Change", Column("Change", "derived.soaked_change", "%", 1)) == ["25.0"]


def test_columns_without_a_figure_are_left_out() -> None:
    filled = tables.table(COMPARISON, tables.in_order(report_of([configuration("a", truth=20.0)])))
    titles = {column.title: is_numeric for column, _, is_numeric in filled}
    assert titles["Hole PSNR to truth"] and not titles["Standing"]
    assert {c.title for c in SETTINGS} <= titles.keys()
    assert not {"Hole PSNR to reference", "Energy"} & titles.keys()


def test_failed_rows_stand_with_their_status() -> None:
    assert {c["derived"]["standing"] for c in tables.in_order(sample_results())} == {
        *("recommended", "frontier", "dominated", "baseline"),
        *("gated", "missing", "failed", "out of memory"),
    }


def test_absent_figures_and_their_reasons() -> None:
    results = sample_results()
    numbers = {c["id"]: n for n, c in enumerate(results["configurations"], start=1)}
    found = tables.absences(results, numbers)
    assert ("energy", "no power sensor that this program can read", "1, 2, 3, 4, 5, 8") in found


def test_markdown_has_the_recommendation_and_a_row_for_each_configuration() -> None:
    rows = [configuration("a", latency=1835.2, truth=24.07), configuration("b|c", latency=11.53, truth=22.0)]
    lines = tables.markdown(report_of(rows)).splitlines()
    assert lines[0] == f"# {tables.TITLE}" and any(line.startswith("**") for line in lines)
    head, rule, *body = [line for line in lines if line.startswith("|")]
    assert "| Hole PSNR to truth (dB) |" in head and set(rule) <= set("|- ")
    assert [line.count("|") - line.count("\\|") for line in (head, rule, *body)] == [head.count("|")] * 4
    assert "11.5" in body[0] and "1835.2" in body[1], "the fastest first"
