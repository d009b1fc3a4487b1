"""``report.md``: what it says, and that nothing in the document can become markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_sample import configuration, report_of, sample_results

from moebius_edge.errors import MachineError
from moebius_edge.report import markdown


def test_what_people_act_on_comes_first(tmp_path: Path) -> None:
    path = markdown.write(sample_results(), tmp_path)
    text = path.read_text(encoding="utf-8")
    assert path.name == "report.md"
    assert re.findall(r"^## (.*)$", text, re.M) == [*("Recommendation", "All configurations", "Conditions")]
    assert "**Take sample float32, ONNX Runtime CPU, 8 steps DPM++2M, guidance 2.** 735 ms an image" in text
    assert ": denoiser returned NaN at step 3 of 19 (t=800)" in text and "| gated |" in text
    assert "| FID | torchmetrics is not installed |" in text


def test_every_table_is_well_formed() -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", markdown.render(sample_results()), re.M)
    assert len(tables) >= 4
    for table in tables:
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
    text = markdown.render(results)
    assert "<script" not in text and "\u202e" not in text and "\n- new" not in text
    assert not re.search(r"(?<!\\)\[a(?<!\\)\]", text)
    shown = r"# x \| &lt;script&gt;alert(1)&lt;/script&gt; \[a\](javascript:b) \`c\` \*d\* \_e\_ f_g"
    assert shown in text
    assert not re.search(r"^# x", text, re.M)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot write .*report\.md: the folder .* does not exist: run `mkdir"):
        markdown.write(sample_results(), tmp_path / "none")
