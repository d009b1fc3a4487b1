"""results.json: what is refused and how it is named, and what merging keeps, renames and refuses."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.errors import MachineError, UsageError
from moebius_edge.report.merge import copy_pictures, merge
from moebius_edge.report.results import load, save

SAMPLE = Path(__file__).parent / "data" / "report"
SERVER, BOARD = "sample-server-2-cores", "sample-board-8gb"


@pytest.fixture
def results() -> dict[str, Any]:
    return load(SAMPLE)


def only(results: dict[str, Any], machine: str) -> dict[str, Any]:
    """The part of a document that one machine measured, as that machine wrote it."""
    part = copy.deepcopy(results)
    part["machines"] = {machine: part["machines"][machine]}
    part["configurations"] = [row for row in part["configurations"] if row["machine"] == machine]
    part["conditions"]["reference"] = None
    return part


def test_the_sample_has_every_status_and_survives_a_round(results: dict[str, Any], tmp_path: Path) -> None:
    statuses = {row["status"] for row in results["configurations"]}
    assert statuses == {"ok", "failed", "gated", "out of memory", "missing"}
    assert {row["kind"] for row in results["configurations"]} == {"bundle", "baseline"}
    assert load(save(results, tmp_path)) == results
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def change(document: dict[str, Any], place: str, value: Any) -> None:
    """Set, or with ``...`` remove, the field at ``place`` (dots between keys)."""
    *parents, last = [int(p) if p.isdigit() else p for p in place.split(".")]
    target: Any = document
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("schema_version", 2, "schema_version is 2, expected 1: run `pip install --upgrade moebius-edge`"),
        ("machines", ..., "machines is missing"),
        ("conditions.runs", "5", "conditions.runs is '5', expected a valid integer"),
        ("inputs.1.hole_share", True, "inputs.1.hole_share is True, expected a valid number"),
        ("configurations.0.status", "fine", "configurations.0.status is 'fine', expected 'ok', 'failed', 'gated'"),
        (
            "configurations.2.latency.stages.denoise.median_ms",
            None,
            "configurations.2.latency.stages.denoise.median_ms is None, expected a valid number",
        ),
        ("configurations.0.settings.seed", ..., "configurations.0.settings.seed is missing"),
        ("configurations.0.machine", "moon", "machine 'moon' of a configuration is none of machines"),
        ("configurations.1.id", "telea", "the configuration 'telea' is there twice"),
        ("configurations.0.latency", None, "has no latency of total, and its status is ok"),
        ("configurations.5.reason", None, "has no reason, and its status is gated"),
        ("configurations", {}, "configurations is {}, expected a valid list"),
    ],
)
def test_what_is_wrong_is_named(results: dict[str, Any], tmp_path: Path, place: str, value: Any, message: str) -> None:
    change(results, place, value)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(UsageError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    with pytest.raises(ValueError, match="these are no results"):
        save(results, tmp_path / "other")


def test_files_that_are_none_and_a_nan_that_is_never_written(results: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot read .*results.json: No such file"):
        load(tmp_path)
    for text, message in (("[", "not valid JSON"), ("[]", "should hold a JSON object")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            load(tmp_path)
    results["configurations"][0]["latency"]["load_ms"] = float("nan")
    with pytest.raises(ValueError, match="load_ms"):
        save(results, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_two_machines_are_put_together(results: dict[str, Any]) -> None:
    server, board = only(results, SERVER), only(results, BOARD)
    server["conditions"]["reference"] = results["conditions"]["reference"]
    shared = server["configurations"][0]["id"]
    board["configurations"][0]["id"] = shared  # as it was called before it was merged
    for row in board["configurations"]:
        if row["accuracy"]["against_reference"]:
            row["accuracy"]["against_reference"]["reference"] = shared
    merged = merge([(Path("a"), server), (Path("b"), board)])
    assert list(merged["machines"]) == [SERVER, BOARD]
    ids = [row["id"] for row in merged["configurations"]]
    assert ids == [*(r["id"] for r in server["configurations"]), f"{shared}_{BOARD}", *ids[10:]]
    assert merged["configurations"][9]["accuracy"]["against_reference"]["reference"] == f"{shared}_{BOARD}"
    assert merged["conditions"]["reference"] == shared
    assert server == only(results, SERVER) | {"conditions": results["conditions"]}, "its arguments stay"


def test_another_machine_of_the_same_name_is_renamed(results: dict[str, Any]) -> None:
    first, second = only(results, BOARD), only(results, BOARD)
    second["machines"][BOARD]["info"]["memory_bytes"] = 1
    merged = merge([(Path("a"), first), (Path("b"), second)])
    assert list(merged["machines"]) == [BOARD, f"{BOARD}-2"]
    assert {row["machine"] for row in merged["configurations"][len(first["configurations"]) :]} == {f"{BOARD}-2"}
    assert len({row["id"] for row in merged["configurations"]}) == 2 * len(first["configurations"])
    with pytest.raises(UsageError, match="b holds sample-float32_.* of machine sample-board-8gb, and so does one"):
        merge([(Path("a"), first), (Path("b"), first)])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("conditions.seed", 1, "a and b cannot be compared: seed is 0 there, 1 here: merge reports on the same images"),
        ("inputs.0.name", "c.jpg", "inputs.c.jpg is None there"),
        ("inputs.0.sha256", "0", "inputs.beach.jpg.sha256 is"),
        ("inputs.2.truth_sha256", None, "inputs.street.jpg.truth_sha256 is"),
    ],
)
def test_what_cannot_be_compared_is_not_merged(results: dict[str, Any], place: str, value: Any, message: str) -> None:
    server, board = only(results, SERVER), only(results, BOARD)
    change(board, place, value)
    with pytest.raises(UsageError) as caught:
        merge([(Path("a"), server), (Path("b"), board)])
    assert message in str(caught.value)


def test_another_reference_is_refused(results: dict[str, Any]) -> None:
    parts = [(Path(machine), only(results, machine)) for machine in (SERVER, BOARD)]
    for _, part in parts:
        part["conditions"]["reference"] = part["configurations"][0]["id"]
    merge(parts)
    change(parts[1][1], "configurations.0.bundle.denoiser_sha256", "e" * 64)
    with pytest.raises(UsageError, match="reference.denoiser is 'a1a1.*' there, 'eeee.*' here"):
        merge(parts)


def test_pictures_follow_where_they_are(results: dict[str, Any], tmp_path: Path) -> None:
    parts = [(tmp_path / name, only(results, machine)) for name, machine in (("a", SERVER), ("b", BOARD))]
    for folder, part in parts:
        for row in part["configurations"]:
            for path in row["pictures"].values():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(f"{folder.name} {row['id']}")
        (folder / "pictures" / "inputs").mkdir()
        (folder / "pictures" / "inputs" / "beach.png").write_text("input")
    shutil.rmtree(parts[1][0] / "pictures" / parts[1][1]["configurations"][0]["id"])
    merged = merge(parts)
    assert copy_pictures(merged, parts, tmp_path / "out") == 3 and merged["configurations"][9]["pictures"] == {}
    assert (tmp_path / "out" / "pictures" / "inputs" / "beach.png").read_text() == "input"
    for row in merged["configurations"]:
        for path in row["pictures"].values():
            assert (tmp_path / "out" / path).read_text().endswith(row["id"])
