"""Which calls compute the whole denoiser, and whose bundle may leave some of it out."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import UsageError
from moebius_edge.pipeline.deep_cache import check_cache_interval, whole_calls


@pytest.mark.parametrize(
    ("rows", "interval", "whole"),
    [
        ([1] * 5, 1, "WWWWW"),
        ([2] * 7, 3, "W..W..W"),
        ([2] * 3, 100, "W.."),
        ([1, 1, 2, 2, 2, 2, 1], 3, "W.W..WW"),
        ([1, 2, 1, 2], 5, "WWWW"),
        ([], 5, ""),
    ],
)
def test_one_call_in_so_many_and_where_rows_come_or_go(rows: list[int], interval: int, whole: str) -> None:
    assert whole_calls(rows, interval) == [c == "W" for c in whole]


def test_what_a_bundle_can_reuse(tmp_path: Path) -> None:
    plain = Bundle.load(make_toy_bundle(tmp_path / "plain"))
    deep = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))
    check_cache_interval(1, plain)
    check_cache_interval(5, deep)
    with pytest.raises(UsageError, match="cache interval is 0: give a whole number of 1"):
        check_cache_interval(0, deep)
    with pytest.raises(UsageError, match=r"interval is 2, and bundle .*plain was exported without .* export the check"):
        check_cache_interval(2, plain)
