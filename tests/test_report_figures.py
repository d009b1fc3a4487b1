"""The figures of a configuration: how text is cleaned, how stages add up to a picture, what is ranked together."""

from __future__ import annotations

from report_sample import configuration, report_of, sample_results

from moebius_edge.report import figures
from moebius_edge.report.figures import REFERENCE, TRUTH


def test_text_cannot_hide_or_reorder_itself() -> None:
    assert figures.clean({" tiny\n": ["\tfp32 ", 1, None]}) == {"tiny": ["fp32", 1, None]}
    assert figures.clean("a\u202eb\u200bc\x1b[31md\ud800e") == "a\ufffdb\ufffdc\ufffd[31md\ufffde"
    assert figures.clean("λ 中 é \N{GRINNING FACE}") == "λ 中 é \N{GRINNING FACE}"


def test_stages_of_one_picture() -> None:
    """``denoise`` has an entry a network call and ``vae_encode`` may have two a picture."""
    row = configuration("a", latency=100.0)
    totals = {"vae_encode": 60.0, "denoise": 400.0, "total": 500.0}
    row["latency"]["stages"] = {name: {"count": 5, "total_ms": ms} for name, ms in totals.items()}
    assert figures.stage_ms(row) == {"vae_encode": 12.0, "denoise": 80.0, "other": 8.0}
    del row["latency"]["stages"]["denoise"], row["latency"]["stages"]["vae_encode"]
    assert figures.stage_ms(row) == {"total": 100.0}
    assert figures.stage_ms(configuration("b", status="failed", reason="r")) == {}


def test_reuse_is_ranked_with_what_it_is_measured_against() -> None:
    """As a lower precision is; but not with what another reference was taken for."""
    rows = [configuration(name, reference=psnr, measured_against="a") for name, psnr in (("a", 200.0), ("b", 50.0))]
    rows[1]["settings"]["cache_interval"] = 5
    (group,) = figures.groups(report_of(rows), REFERENCE).values()
    assert [c["id"] for c in group] == ["a", "b"] and figures.unranked(group, REFERENCE) == {}
    rows[1]["accuracy"]["against_reference"]["reference"] = "b"
    (group,) = figures.groups(report_of(rows), REFERENCE).values()
    assert figures.unranked(group, REFERENCE) == {"b": "measured against another reference"}


def test_against_the_reference_only_like_settings_meet() -> None:
    """Each row's reference is the float32 run of its own settings, so four steps are never beside twenty."""
    groups = figures.groups(sample_results(), REFERENCE)
    sampling = [members for group, members in groups.items() if group.start is not None]
    assert {len({(c["settings"]["steps"], c["settings"]["scheduler"]) for c in members}) for members in sampling} == {1}
    names = {f"{steps} steps executed, guidance 2, ddim" for steps in (19, 3)}
    assert {group.settings for group in groups} >= {*names, None}


def test_memory_of_host_and_device() -> None:
    row = configuration("a", memory=300e6)
    assert figures.memory_bytes(row) == 300e6
    row["memory"]["peak_device_bytes"] = 50_000_000
    assert figures.memory_bytes(row) == 350e6
    row["memory"]["peak_host_bytes"] = None  # half of it would look like all of it
    assert figures.memory_bytes(row) is None


def test_groups_put_baselines_last_on_their_machine() -> None:
    telea = configuration("telea", truth=20.0)
    telea["settings"] = None
    results = report_of([telea, configuration("a", reference=1.0), configuration("b", machine="other")])
    assert figures.against_of(results) == TRUTH, "where any configuration has it"
    assert [figures.group_title(results, group) for group in figures.groups(results, TRUTH)] == [
        *("here; start image", "here; baselines", "other; start image"),
    ]
    assert figures.against_of(report_of([configuration("a", reference=40.0)])) == REFERENCE
    assert figures.against_of(report_of([configuration("a")])) is None
