from __future__ import annotations

from pathlib import Path

import pytest

from moebius_edge.errors import MachineError
from moebius_edge.system.fingerprint import ResultCache, fingerprint, first_difference


def test_results_are_found_under_the_same_facts_alone(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "cache")
    cache.put("a", {"seed": 1, "steps": 20}, [1.5, "x"])
    assert ResultCache(tmp_path / "cache").get("a", {"steps": 20, "seed": 1}) == [1.5, "x"]
    assert cache.get("a", {"seed": 2, "steps": 20}) is None
    assert cache.get("b", {"seed": 1, "steps": 20}) is None
    (tmp_path / "cache" / "a.json").write_text('{"fingerprint": ')
    assert cache.get("a", {"seed": 1, "steps": 20}) is None
    with pytest.raises(MachineError, match="cannot make .*cache .*: name another output") as caught:
        ResultCache(tmp_path / "cache" / "a.json" / "cache")
    assert caught.value.remedy == "name another output"


def test_the_first_difference_is_named_by_its_path() -> None:
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 there, 2 here"
    assert first_difference({"a": 1, "c": 3}, {"a": 1}) == "c is 3 there, None here"
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
