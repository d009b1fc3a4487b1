"""The report's columns: how figures are written, which columns appear, and where absent figures say why."""

from __future__ import annotations

from typing import Any

import pytest
from report_sample import configuration, sample_results

from moebius_edge.report import table
from moebius_edge.report.recommend import standings


def texts(columns: list[table.Column], rows: list[dict[str, Any]], heading: str) -> list[str]:
    (column,) = (c for c in columns if c.heading == heading)
    return [cell.text for cell in table.cells(column, rows)]


@pytest.mark.parametrize(
    ("values", "digits"),
    [([2352.3, 359.0], 0), ([1835.0, 11.53], 1), ([1.6, 71.0], 2), ([0.079, 7.0], 3), ([0.0, 500.0], 0), ([], 0)],
)
def test_the_smallest_figure_keeps_three_digits(values: list[float], digits: int) -> None:
    assert table.needed_digits(values) == digits


def test_cells_of_a_column() -> None:
    rows = [configuration("a", latency=1835.2, truth=24.07, reference=200.0), configuration("b", latency=11.53)]
    columns = table.comparison_columns({"a": "recommended"})
    assert texts(columns, rows, "Median (ms)") == ["1835.2", "11.5"]
    assert texts(columns, rows, "Hole PSNR to truth (dB)") == ["24.1", table.ABSENT]
    assert texts(columns, rows, "Hole PSNR to reference (dB)") == ["equal", table.ABSENT]
    assert texts(columns, rows, "Steps (executed)") == ["20", "20"]
    assert texts(columns, rows, "Standing") == ["recommended", "not ranked"]


def test_a_seed_keeps_all_its_digits() -> None:
    row = configuration("a", seed=2**63 + 1)
    assert texts(table.settings_columns(), [row], "Seed") == ["9223372036854775809"]


def test_reuse_is_named_and_a_baseline_has_none() -> None:
    rows = [configuration("old"), configuration("new"), configuration("telea")]
    rows[1]["settings"]["cache_interval"] = 5
    rows[2]["settings"] = None
    assert texts(table.settings_columns(), rows, "Cache interval") == ["1", "5", table.ABSENT]


def test_every_table_names_the_settings() -> None:
    wanted = ["Start", "Steps (executed)", "Guidance", "Scheduler", "Cache interval", "Seed"]
    tables = (
        table.comparison_columns({}),
        table.resource_columns(),
        table.stage_columns(["denoise"], lambda c: {}),
        table.sustained_columns(),
        table.drift_columns(),
    )
    for columns in tables:
        headings = [c.heading for c in columns]
        assert [h for h in headings if h in wanted] == wanted


def test_columns_without_a_figure_are_left_out() -> None:
    rows = [configuration("a", truth=20.0)]
    headings = [c.heading for c in table.used(table.comparison_columns({}), rows)]
    assert "Hole PSNR to truth (dB)" in headings
    assert not {"Hole PSNR to reference (dB)", "LPIPS", "FID", "Energy (J/image)"} & set(headings)


def test_failed_rows_stand_with_their_status() -> None:
    results = sample_results()
    rows = results["configurations"]
    found = texts(table.comparison_columns(standings(results)), rows, "Standing")
    assert set(found) == {
        *("recommended", "frontier", "dominated", "baseline"),
        *("gated", "missing", "failed", "out of memory"),
    }
    assert [table.failure(c) for c in rows if c["id"] == "lama"] == ["the process ended with signal 11 (SIGSEGV)"]
    assert [table.failure(c) for c in rows if c["id"] == "telea"] == [None]


def test_absent_figures_and_their_reasons() -> None:
    results = sample_results()
    numbers = {c["id"]: n for n, c in enumerate(results["configurations"], start=1)}
    found = table.absences(results, numbers)
    assert ("energy", "no power sensor that this program can read", "1 to 5, 8, 9") in found
    assert ("FID", "torchmetrics is not installed", "1 to 5, 8, 9, 11 to 13") in found


def test_ranges() -> None:
    found = [table.ranges(rows) for rows in ([], [4], [1, 2], [1, 2, 3, 5, 7, 8])]
    assert found == ["", "4", "1, 2", "1 to 3, 5, 7, 8"]


def test_change_under_load() -> None:
    row = configuration("a")
    row["sustained"] = {"minutes": 5.0, "cold_median_ms": 200.0, "soaked_median_ms": 250.0, "by_minute_ms": [200.0]}
    assert texts(table.sustained_columns(), [row], "Change (%)") == ["25.0"]
