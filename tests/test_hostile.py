"""Files changed at random, by seed: whatever is opened ends, in one line, in little memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

LIMITS = {  # cases, the peak of memory in MB (PyTorch, or ONNX Runtime, is in it), the processor's seconds
    "picture": (mutations.share(600), 2000, 5),
    "checkpoint": (mutations.share(60), 1500, mutations.SECONDS),
    "bundle": (mutations.share(24), 2500, 2 * mutations.SECONDS),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", LIMITS)
def test_whatever_is_opened_ends_in_one_line(tmp_path: Path, kind: str) -> None:
    count, peak_mb, seconds = LIMITS[kind]
    command = [sys.executable, mutations.__file__, kind, "0", str(count), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == count, done.stderr[-2000:]
    for case in cases:
        errors = [line for line in case["said"] if line.startswith("error: ")]
        assert case["outcome"] in (0, 2, 3, 4) and len(errors) == (case["outcome"] != 0), case
        assert errors == (case["said"] if kind == "picture" else case["said"][-1:])[: len(errors)], case
        assert case["peak_mb"] <= peak_mb and case["seconds"] < seconds, case
    assert kind != "picture" or all(len(case["said"]) <= 1 for case in cases), "the libraries beneath print nothing"
    outcomes = [case["outcome"] for case in cases]
    assert outcomes.count(0) > count / 20 and set(outcomes) & {2, 4}, "some are read, some are refused"


def test_the_worker_sees_what_goes_wrong() -> None:
    """A case that hangs, one that raises, one that dies and one that takes memory; in a process without threads."""
    code = (
        "import os, sys, time, json\n"
        f"sys.path.insert(0, {str(Path(mutations.__file__).parent)!r})\n"
        "import mutations\n"
        "cases = {'raise': lambda path: 1 / 0, 'die': lambda path: os.abort(), 'hang': lambda path: time.sleep(60),\n"
        "         'take': lambda path: bytearray(1 << 33), 'fill': lambda path: len(b'x' * (1 << 28)) * 0}\n"
        "for name, case in cases.items():\n"
        "    mutations.SECONDS = 1 if name == 'hang' else 60\n"
        "    print(json.dumps(mutations.run_case(case, None)), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case["outcome"] for case in cases] == ["traceback", -6, "time", "traceback", 0]
    assert cases[-1]["peak_mb"] >= 256
