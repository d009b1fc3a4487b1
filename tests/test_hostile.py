"""Files changed at random, by seed: whatever is opened ends, in one line, in little memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import share

WORKER = Path(__file__).with_name("hostile_worker.py")
COUNT = share(60)
PEAK_MB = {"checkpoint": 1500, "bundle": 2500}  # PyTorch, or ONNX Runtime, is in it


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", sorted(PEAK_MB))
def test_whatever_is_opened_ends_in_one_line(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, str(WORKER), kind, "0", str(COUNT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == COUNT, done.stderr[-2000:]
    bad = [
        case
        for case in cases
        if case["outcome"] not in (0, 2, 3, 4)
        or (case["outcome"] != 0 and (case["lines"] != 1 or not case["message"].startswith("error: ")))
        or case["peak_mb"] > PEAK_MB[kind]
    ]
    assert bad == []
    assert {0, 4} <= {case["outcome"] for case in cases}, "some are read, some are refused"


def test_the_worker_sees_what_goes_wrong(tmp_path: Path) -> None:
    """A case that hangs, one that raises, one that dies and one that takes memory."""
    code = (
        "import os, sys, time, json\n"
        f"sys.path.insert(0, {str(WORKER.parent)!r})\n"
        "import hostile_worker as worker\n"
        "cases = {'hang': lambda path: time.sleep(60), 'raise': lambda path: 1 / 0, 'die': lambda path: os.abort(),\n"
        "         'take': lambda path: bytearray(1 << 33), 'fill': lambda path: len(b'x' * (1 << 28)) * 0}\n"
        "found = {}\n"
        "for name, case in cases.items():\n"
        "    worker.SECONDS = 1 if name == 'hang' else 60\n"
        "    found[name] = worker.run_case(case, None)\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["hang"]["outcome"] == "time" and found["raise"]["outcome"] == "traceback"
    assert found["die"]["outcome"] == -6 and found["take"]["outcome"] == "traceback"
    assert found["fill"]["outcome"] == 0 and found["fill"]["peak_mb"] >= 256
