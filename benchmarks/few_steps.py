"""Fewer and cheaper steps against 20 of DDIM: quality on held-out photographs, and time, all in one run.

    taskset -c 1 python -m benchmarks.few_steps tiny --results few_steps.jsonl --json few_steps.json

Three ways to do less: a schedule of fewer steps (DDIM, DPM-Solver++(2M)); guidance on an interval of the trajectory
alone (Kynkäänniemi et al., arXiv 2404.07724); and reuse of deep features from call to call (DeepCache). Each
setting is compared with 20-step DDIM at the same start, strength, seed and guidance, case by case one after another, so
that a busy machine slows all of them alike. One thread; the time is the process's own on its core. What is in the file
of results is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.train_tiny.photographs import Case, held_out_cases
from moebius_edge.bundle.bundle import Bundle
from moebius_edge.metrics.fidelity import hole_psnr_db, texture_ratio
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.runtimes.base import Arrays
from moebius_edge.runtimes.ort import OrtRuntime
from moebius_edge.spec import DENOISER, SHALLOW

PSNR_LIMIT_DB, TEXTURE_LIMIT = 0.5, 0.05
STEPS = (4, 6, 8, 10, 15, 20)
PAPER_W2, PAPER_SDXL = (37, 499), (73, 813)  # σ in (0.19, 1.61] at guidance 2.0, and (0.28, 5.42]: its tables and text
INTERVALS = (PAPER_SDXL, PAPER_W2, (0, 0))
CACHE_INTERVALS = (2, 3, 5, 10)


@dataclass(frozen=True)
class Setting:
    scheduler: str = "ddim"
    steps: int = 20
    interval: tuple[int, int] | None = None
    cache: int = 1

    @property
    def label(self) -> str:
        text = f"{'DDIM' if self.scheduler == 'ddim' else 'DPM-Solver++(2M)'}, {self.steps}"
        if self.interval is not None:
            low, high = self.interval
            text += f", guidance on [{low}, {high})" if low < high else ", no guidance"
        if self.cache > 1:
            text += f", deep features every {self.cache}"
        return text


REFERENCE = Setting()
COMBINED = (
    Setting("ddim", 15, PAPER_W2),
    Setting("dpm++2m", 15, PAPER_W2),
    Setting("ddim", 8, PAPER_W2),
    Setting("ddim", 6, PAPER_W2),
    Setting("ddim", 15, PAPER_W2, 5),
    Setting("dpm++2m", 15, PAPER_W2, 3),
    Setting("dpm++2m", 15, PAPER_W2, 5),
    Setting("dpm++2m", 15, PAPER_W2, 10),
    Setting("ddim", 10, PAPER_W2, 5),
    Setting("ddim", 8, PAPER_W2, 3),
    Setting("ddim", 8, PAPER_W2, 5),
    Setting("ddim", 6, PAPER_W2, 5),
    Setting("ddim", 18, cache=2),
    Setting("ddim", 17, cache=2),
)
# name -> what is asked of the pipeline beside the setting
REGIMES: dict[str, dict[str, Any]] = {
    "noise": {"start": "noise", "guidance": 2.0},
    "image": {"start": "image", "guidance": 2.0},
    "defaults": {},  # the bundle's own, filled in from the bundle
}


def settings(guided: bool) -> list[Setting]:
    """All that are compared; where guidance is 1 none has an interval of it."""
    several = [Setting(scheduler, steps) for scheduler in ("ddim", "dpm++2m") for steps in reversed(STEPS)]
    several += [Setting(interval=interval) for interval in INTERVALS]
    several += [Setting(cache=cache) for cache in CACHE_INTERVALS]
    several += COMBINED
    return several if guided else list(dict.fromkeys(replace(s, interval=None) for s in several))


class CountingRuntime(OrtRuntime):
    """ONNX Runtime on one thread that counts the denoiser's ``whole`` calls, and the ``rows`` of all."""

    whole = rows = 0

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        if component in (DENOISER, SHALLOW):
            self.whole += component == DENOISER
            self.rows += len(feeds["sample"])
        return super()._run(component, feeds, outputs)


def measure(
    inpainter: Inpainter, runtime: CountingRuntime, case: Case, seed: int, asked: dict[str, Any], setting: Setting
) -> dict[str, Any]:
    """One picture: its calls of the denoiser and their rows, its time, and how good the hole is."""
    runtime.whole = runtime.rows = 0
    began, began_cpu = time.perf_counter(), time.process_time()
    result = inpainter.inpaint(
        case.image,
        case.mask,
        seed=seed,
        steps=setting.steps,
        scheduler=setting.scheduler,
        guidance_interval=setting.interval,
        cache_interval=setting.cache,
        **asked,
    )
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    return {
        "calls": result.settings["steps_executed"],
        "whole": runtime.whole,
        "rows": runtime.rows,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "hole_psnr_db": hole_psnr_db(result.image, case.image, case.mask),
        "texture_ratio": texture_ratio(result.image, case.mask),
    }


def compared(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """A setting's figures over all cases, beside those of the reference on the same cases.

    PSNR is a mean and texture a median. Time, and texture once more, are the median of each
    case's own ratio to the reference: of few cases the median texture depends on which case lies in the middle.
    """

    def ratio(key: str) -> float:
        return float(np.median([a[key] / b[key] for a, b in zip(rows, reference, strict=True)]))

    psnr, base_psnr = (np.mean([r["hole_psnr_db"] for r in x]) for x in (rows, reference))
    texture, base_texture = (np.median([r["texture_ratio"] for r in x]) for x in (rows, reference))
    gain, change = float(psnr - base_psnr), float(texture / base_texture - 1)
    own = ratio("texture_ratio") - 1
    return {
        "calls": rows[0]["calls"],
        "whole": rows[0]["whole"],
        "rows": rows[0]["rows"],
        "time_of_reference": ratio("cpu_seconds"),
        "cpu_ms": 1e3 * float(np.median([r["cpu_seconds"] for r in rows])),
        "hole_psnr_db": float(psnr),
        "hole_psnr_gain_db": gain,
        "texture_ratio": float(texture),
        "texture_change": change,
        "own_texture_change": own,
        "within": abs(gain) <= PSNR_LIMIT_DB and max(abs(change), abs(own)) <= TEXTURE_LIMIT,
    }


HEADING = (
    "| setting | calls | whole | rows | time | hole PSNR, dB | change | texture | change | of each | within |\n|"
    + " --- |" * 11
)


def row(label: str, f: dict[str, Any]) -> str:
    return (
        f"| {label} | {f['calls']} | {f['whole']} | {f['rows']} | {f['time_of_reference']:.2f} | "
        f"{f['hole_psnr_db']:.2f} | {f['hole_psnr_gain_db']:+.2f} | "
        f"{f['texture_ratio']:.4f} | {f['texture_change']:+.1%} | {f['own_texture_change']:+.1%} | "
        f"{'yes' if f['within'] else 'no'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--per-photograph", type=int, default=8, help="cases a held-out photograph; there are four")
    parser.add_argument("--seed", type=int, default=0, help="which cases: see held_out_cases")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="settings whose label holds one of these")
    parser.add_argument("--results", type=Path, required=True, metavar="FILE", help="JSON lines, added to; resumes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the tables' figures")
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    REGIMES["defaults"] = {k: v for k, v in bundle.defaults.items() if k != "steps"}
    cases = held_out_cases(options.per_photograph, bundle.resolution, options.seed)
    assert len({c.image.tobytes() for c in cases}) == len({c.mask.tobytes() for c in cases}) == len(cases)

    chosen = {
        name: [
            s
            for s in settings(guided=REGIMES[name]["guidance"] != 1)
            if s == REFERENCE or not options.only or any(text in s.label for text in options.only)
        ]
        for name in options.regimes
    }
    done = read(options.results)
    runtime = CountingRuntime(bundle.components, bundle.paths, threads=1)
    with Inpainter(bundle, runtime) as inpainter, options.results.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that was cut off
        for number, case in enumerate(cases):
            for regime, several in chosen.items():
                for setting in several:
                    key = key_of(bundle, options.seed, number, regime, setting)
                    if key in done:
                        continue
                    done[key] = measure(inpainter, runtime, case, number, REGIMES[regime], setting)
                    file.write(json.dumps({"key": key, **done[key]}) + "\n")
                    file.flush()

    tables: dict[str, dict[str, Any]] = {}
    for regime, several in chosen.items():
        tables[regime] = {}
        print(f"\n{regime}: {REGIMES[regime]}, {len(cases)} pictures\n")
        print(HEADING)
        of = {s: [done[key_of(bundle, options.seed, n, regime, s)] for n in range(len(cases))] for s in several}
        for setting in several:
            tables[regime][setting.label] = figures = compared(of[setting], of[REFERENCE])
            print(row(setting.label, figures), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


def key_of(bundle: Bundle, seed: int, number: int, regime: str, setting: Setting) -> str:
    denoiser = bundle.files["denoiser.onnx"]["sha256"][:12]
    return json.dumps([denoiser, seed, number, regime, *asdict(setting).values()])


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run has measured; a last line that was cut off is measured again."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off, or empty
            continue
        found[entry.pop("key")] = entry
    return found


if __name__ == "__main__":
    main()
