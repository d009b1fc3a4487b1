"""Bundles that a seeded mutator damaged, through ``inspect``, ``run`` and the choice of an engine.

Whatever stands in them, a command ends with an exit code of its own and one line, soon and in little memory.
``pytest -m slow -s tests/test_hostile_bundles.py`` prints the figures of docs/reliability.md.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trt import ORIN, VERSION, write_engine
from mutations import share
from PIL import Image
from toy import INT8, make_toy_bundle

from moebius_edge.bundle.bundle import ASSETS, Bundle
from moebius_edge.bundle.manifest import component_tables, resolved_components
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, MachineError
from moebius_edge.runtimes.engine_files import FLAVOURS, choose_engine

BUNDLES = share(500)
SECONDS = 5.0
BYTES = 1_000_000_000
CODES = {0, 2, 3, 4}

Captured = pytest.CaptureFixture[str]

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 64, 1000, 2**31, 2**63, 10**15, 10**30, 0.5, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "0", "64", "x" * 5000, "two\nlines", "\x1b[2J", "\0", "\ud800", "/etc/passwd", "../bundle.json", "é" * 200),
    *([], {}, [None], [[]], ["a", 1], {"a": 1}, {"a": {"b": []}}, {"": None}, [1.5] * 20, [0, 0, 0]),
]
NAMES = ["", "x", "x" * 999, "two\nlines", "\0", "\ud800", "/etc/passwd", "..", "engines", "a/../b", "a\\b", "é" * 99]


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def places(document: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """Every container and key of a document: where something can be changed."""
    found = [] if found is None else found
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        found.append((document, key))
        places(document[key], found)
    return found


def change_value(document: Any, rng: random.Random) -> None:
    container, key = rng.choice(places(document))
    container[key] = copy.deepcopy(rng.choice([*VALUES, nested(40), nested(400)]))


def change_top(document: Any, rng: random.Random) -> None:
    """One of the whole fields; those with long tables would hide the others."""
    document[rng.choice(list(document))] = copy.deepcopy(rng.choice(VALUES))


def change_named(document: Any, rng: random.Random) -> None:
    """A field that the commands compute with or show, whole or one of its entries."""
    names = ("defaults", "gate", "model", "float32_islands", "int8", "key", "settings", "onnx", "profiles", "built")
    name = rng.choice([name for name in names if name in document])
    inner = places(document[name])
    if inner and rng.random() < 0.8:
        container, key = rng.choice(inner)
        container[key] = copy.deepcopy(rng.choice(VALUES))
    else:
        document[name] = {rng.choice(NAMES): copy.deepcopy(rng.choice(VALUES))}


def remove(document: Any, rng: random.Random) -> None:
    container, key = rng.choice(places(document))
    del container[key]


def rename(document: Any, rng: random.Random) -> None:
    container, key = rng.choice([(c, k) for c, k in places(document) if isinstance(c, dict)])
    container[rng.choice(NAMES)] = container.pop(key)


def exchange(document: Any, rng: random.Random) -> None:
    (a, i), (b, j) = rng.choice(places(document)), rng.choice(places(document))
    a[i], b[j] = copy.deepcopy(b[j]), copy.deepcopy(a[i])


def resize(document: Any, rng: random.Random) -> None:
    """Another resolution or number of deep channels, in all of ``bundle.json`` alike; its graphs stay."""
    if "resolution" not in document:
        return change_value(document, rng)
    resolution = rng.choice([8, 16, 128, 512, 2048, 4096, 2**20, 8 * 10**15])
    deep = rng.choice([document.get("deep_channels"), 1, 8192, 10**9])
    document.update(resolution=resolution, latent_size=resolution // 8, deep_channels=deep)
    tables = component_tables(resolved_components(resolution, deep))
    document["components"] = {name: vars(table) | _rows(table) for name, table in tables.items()}
    return None


def _rows(table: Any) -> dict[str, Any]:
    return {key: [vars(tensor) for tensor in getattr(table, key)] for key in ("inputs", "outputs")}


EDITS = [change_value, change_value, change_top, change_named, change_named, remove, rename, exchange, resize]


def spoil_text(text: bytes, rng: random.Random) -> bytes:
    """What is no JSON any more, or JSON that no program should read."""
    at = rng.randrange(len(text))
    return rng.choice(
        [
            lambda: text[:at],
            lambda: text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :],
            lambda: text[:at] + text[at + rng.randrange(1, 40) :],
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text.decode().encode("utf-16"),
            lambda: b"[" * 200_000,
            lambda: text + b" " * (20 << 20),
            lambda: text.rstrip()[:-1] + b', "name": 1, "name": 2}',
            lambda: b'{"a": [' + b"[]," * 690_000 + b"[]]}",
            lambda: text.replace(b": ", b": 9" + b"9" * 5000, 1),
            lambda: b"",
        ]
    )()


def spoil_file(path: Path, rng: random.Random) -> None:
    """Put something that is no file, or another one, in the place of ``path``."""
    path.unlink()
    kind = rng.randrange(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind < 4:
        path.symlink_to(("/dev/zero", "/etc/passwd")[kind - 2])
    elif kind == 4:
        path.symlink_to(path)
    elif kind == 5:
        with path.open("wb") as stream:  # sparse: it takes no room, and hashing it would take minutes
            stream.truncate(1 << 40)


class Figures:
    """What the commands answered."""

    def __init__(self) -> None:
        self.codes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.worst_seconds = self.worst_processor_seconds = 0.0

    def measure(self, name: str, case: str, command: Callable[[], tuple[int, str]]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        try:
            code, error = command()
        except Exception as failure:
            self.faults.append(f"{case}: {name} raised {type(failure).__name__}: {failure!s:.200}")
            return
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        self.worst_seconds = max(self.worst_seconds, wall)
        self.worst_processor_seconds = max(self.worst_processor_seconds, processor)
        self.codes[f"{name} {code}"] += 1
        errors = [line for line in error.splitlines() if line.startswith("error: ")]
        if code not in CODES or len(errors) != (code != 0) or len(errors[0] if errors else "") > 1500:
            self.faults.append(f"{case}: {name} exits {code} with {error[-600:]!r}")
        if processor > SECONDS:
            self.faults.append(f"{case}: {name} took {processor:.1f} s of processor time")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(ASSETS / "tiny", folder / "tiny")
    toy = make_toy_bundle(folder / "toy", deep=True)
    int8 = shutil.copytree(toy, folder / "int8")
    write_engine(Bundle.load(toy))
    document = json.loads((int8 / "bundle.json").read_text())
    islands = {"denoiser": {"Sin": ["a"]}, "vae_decoder": "all"}
    document |= {"precision": "int8", "int8": INT8, "float32_islands": islands}
    (int8 / "bundle.json").write_text(json.dumps(document))
    write_engine(Bundle.load(int8))
    noise = np.random.default_rng(0).integers(0, 256, (80, 96, 3), np.uint8)
    mask = np.zeros((80, 96), np.uint8)
    mask[32:48, 40:56] = 255
    Image.fromarray(noise).save(folder / "photo.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return {path.name: path for path in folder.iterdir()}


def commands(bundle: Path, bundles: dict[str, Path], capsys: Captured) -> dict[str, Callable[[], tuple[int, str]]]:
    def call(*arguments: str | Path) -> tuple[int, str]:
        code = main([*map(str, arguments)])
        return code, capsys.readouterr().err

    def engine() -> tuple[int, str]:
        try:
            choose_engine(Bundle.load(bundle, verify=False), FLAVOURS["tensorrt"], VERSION, ORIN)
        except (BundleError, MachineError) as error:
            return error.exit_code, f"error: {error}"
        return 0, ""

    steps = ["--steps", "1", "--strength", "1"] if bundle.name == "tiny" else []
    output = bundle.parent / "result.png"
    run = ("run", bundles["photo.png"], bundles["mask.png"], "-o", output, "-b", bundle, "--device", "cpu", *steps)
    return {
        "inspect": lambda: call("inspect", bundle),
        "inspect --json --no-verify": lambda: call("inspect", bundle, "--json", "--no-verify"),
        "run": lambda: call(*run),
        "choose engine": engine,
    }


def mutate(bundle: Path, rng: random.Random) -> str:
    """Damage ``bundle`` in one way; which it was."""
    engines = [*bundle.glob("engines/*/engine.json")]
    path = rng.choice([bundle / "bundle.json", *engines]) if engines else bundle / "bundle.json"
    kind = rng.random()
    if kind < 0.1:
        path = rng.choice([path, *bundle.glob("*.onnx"), *bundle.glob("engines/*/*.plan")])
        spoil_file(path, rng)
        return f"{path.name} spoiled"
    if kind < 0.25:
        path.write_bytes(spoil_text(path.read_bytes(), rng))
        return f"{path.name} text"
    document = json.loads(path.read_text(encoding="utf-8"))
    edits = [rng.choice(EDITS) for _ in range(rng.choice([1, 1, 1, 2]))]
    for edit in edits:
        edit(document, rng)
    path.write_text(json.dumps(document), encoding="utf-8")
    return f"{path.name} {' '.join(edit.__name__ for edit in edits)}"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_damaged_bundle_ends_in_one_line(
    bundles: dict[str, Path], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figures = Figures()
    before = 0
    for number in range(BUNDLES + 3):
        name = ("tiny", "toy", "int8")[number % 3]
        bundle = tmp_path / name
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(bundles[name], bundle, copy_function=os.link if name == "tiny" else shutil.copy)
        rng = random.Random(number)
        case = "unchanged"
        if number >= 3:
            (bundle / "bundle.json").unlink()  # of tiny it is a link to the one that is to stay
            shutil.copy(bundles[name] / "bundle.json", bundle)
            case = f"{number} {name} {mutate(bundle, rng)}"
        for command, call in commands(bundle, bundles, capsys).items():
            figures.measure(command, case, call)
        if case == "unchanged":
            assert not figures.faults and set(figures.codes) >= {"inspect 0", "run 0"}, figures.codes
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    with capsys.disabled():
        print(f"\n{BUNDLES} bundles: {dict(sorted(figures.codes.items()))}")
        print(f"worst {figures.worst_seconds:.1f} s, {figures.worst_processor_seconds:.1f} s of processor time")
        print(f"peak memory {before / 1e6:.0f} MB before, {grown / 1e6:.0f} MB more after")
    assert figures.faults == []
    assert grown < BYTES
