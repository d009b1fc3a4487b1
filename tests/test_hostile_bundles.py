"""Bundles that a seeded mutator damaged, through ``inspect``, ``run`` and the choice of an engine.

Whatever is in them, a command ends with an exit code of its own and one line, soon and in little memory.
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

import pytest
from fake_trt import ORIN, VERSION, write_engine
from mutations import share
from pictures import noise, square
from PIL import Image
from toy import call_int8, make_toy_bundle

from moebius_edge.bundle.bundle import ASSETS, Bundle
from moebius_edge.bundle.manifest import component_tables, resolved_components
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, MachineError
from moebius_edge.runtimes.engine_files import VARIANTS, choose_engine

BUNDLES = share(500)
SECONDS = 5.0
BYTES = 1_000_000_000

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 64, 1000, 2**31, 2**63, 10**15, 10**30, 0.5, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
    *("", "0", "64", "x" * 5000, "two\nlines", "\x1b[2J", "\0", "\ud800", "/etc/passwd", "../bundle.json", "é" * 200),
    *([], {}, [None], [[]], ["a", 1], {"a": 1}, {"a": {"b": []}}, {"": None}, [1.5] * 20, [0, 0, 0]),
]
NAMES = ["", "x", "x" * 999, "two\nlines", "\0", "\ud800", "/etc/passwd", "..", "engines", "a/../b", "a\\b", "é" * 99]


NAMED = ("defaults", "gate", "model", "float32_islands", "int8", "key", "settings", "onnx", "profiles", "built")
EDITS = ("value", "value", "top", "named", "named", "remove", "rename", "exchange", "resize")


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every container and key of a document: where something can be changed."""
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in ((document, key), *places(document[key]))]


def edit(kind: str, document: Any, rng: random.Random) -> None:
    """One change: ``top`` is of a whole field, ``named`` of one that the commands compute with or show."""
    container, key = document, None
    if kind == "resize":  # in all of bundle.json alike; its graphs stay
        resolution = rng.choice([8, 16, 128, 512, 2048, 4096, 2**20, 8 * 10**15])
        deep = rng.choice([document.get("deep_channels"), 1, 8192, 10**9])
        document.update(resolution=resolution, latent_size=resolution // 8, deep_channels=deep)
        document["components"] = component_tables(resolved_components(resolution, deep))
        return
    if kind == "top":
        key = rng.choice(list(document))
    elif kind == "named":
        name = rng.choice([name for name in NAMED if name in document])
        container, key = rng.choice(places(document[name]) or [(document, name)])
    else:
        container, key = rng.choice([p for p in places(document) if kind != "rename" or isinstance(p[0], dict)])
    if kind == "remove":
        del container[key]
    elif kind == "rename":
        container[rng.choice(NAMES)] = container.pop(key)
    elif kind == "exchange":
        other, name = rng.choice(places(document))
        container[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(container[key])
    else:
        values = [*VALUES, nested(40), nested(400)] if kind == "value" else VALUES
        container[key] = copy.deepcopy(rng.choice(values))


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
    rng.choice(
        [
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to("/etc/passwd"),
            lambda: path.symlink_to(path),
            lambda: (path.touch(), os.truncate(path, 1 << 40)),  # hashing it would take minutes
            lambda: None,
        ]
    )()


def mutate(bundle: Path, rng: random.Random) -> str:
    """Damage ``bundle`` in one way, and name it."""
    documents = [bundle / "bundle.json", *bundle.glob("engines/*/engine.json")]
    path, chance = rng.choice(documents), rng.random()
    if chance < 0.1:
        path = rng.choice([path, *bundle.glob("*.onnx"), *bundle.glob("engines/*/*.plan")])
        spoil_file(path, rng)
        return f"{path.name} spoiled"
    if chance < 0.25:
        path.write_bytes(spoil_text(path.read_bytes(), rng))
        return f"{path.name} text"
    document = json.loads(path.read_text(encoding="utf-8"))
    edits = [rng.choice(EDITS) for _ in range(rng.choice([1, 1, 1, 2]))]
    for kind in edits:
        edit(kind, document, rng)
    path.write_text(json.dumps(document), encoding="utf-8")
    return f"{path.name} {' '.join(edits)}"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three bundles, two of them with engines, a picture and a mask."""
    folder = tmp_path_factory.mktemp("bundles")
    shutil.copytree(ASSETS / "tiny", folder / "tiny")
    toy = make_toy_bundle(folder / "toy", deep=True)
    int8 = shutil.copytree(toy, folder / "int8")
    write_engine(Bundle.load(toy))
    document = json.loads((call_int8(int8) / "bundle.json").read_text())
    document["float32_islands"] = {"denoiser": {"Sin": ["a"]}, "vae_decoder": "all"}
    (int8 / "bundle.json").write_text(json.dumps(document))
    write_engine(Bundle.load(int8))
    Image.fromarray(noise(80)).save(folder / "photo.png")
    Image.fromarray(square(80, 32, 48)).save(folder / "mask.png")
    return folder


def commands(bundle: Path, bundles: Path, error: Callable[[], str]) -> dict[str, Callable[[], tuple[int, str]]]:
    """Name -> what runs a command on ``bundle`` and returns its exit code and what it wrote to stderr."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        return main([*map(str, arguments)]), error()

    def engine() -> tuple[int, str]:
        try:
            choose_engine(Bundle.load(bundle, verify=False), VARIANTS["tensorrt"], VERSION, ORIN)
        except (BundleError, MachineError) as problem:
            return problem.exit_code, f"error: {problem}"
        return 0, ""

    steps = ["--steps", "1", "--strength", "1"] if bundle.name == "tiny" else []
    pair = (bundles / "photo.png", bundles / "mask.png", "-o", bundle.parent / "result.png")
    return {
        "inspect": lambda: call("inspect", bundle),
        "inspect --json --no-verify": lambda: call("inspect", bundle, "--json", "--no-verify"),
        "run": lambda: call("run", *pair, "-b", bundle, "--device", "cpu", *steps),
        "choose engine": engine,
    }


def fault(command: Callable[[], tuple[int, str]]) -> tuple[int | None, str]:
    """The exit code, and what is wrong with the way in which the command ended."""
    start = time.process_time()
    try:
        code, error = command()
    except Exception as failure:
        return None, f"raised {type(failure).__name__}: {failure!s:.200}"
    seconds = time.process_time() - start
    errors = [line for line in error.splitlines() if line.startswith("error: ")]
    if code not in (0, 2, 3, 4) or len(errors) != (code != 0) or len("".join(errors)) > 1500:
        return code, f"exits {code} with {error[-600:]!r}"
    return code, f"took {seconds:.1f} s of processor time" if seconds > SECONDS else ""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_damaged_bundle_ends_in_one_line(
    bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    codes: Counter[str] = Counter()
    faults, before = [], 0
    for number in range(BUNDLES + 3):
        name = ("tiny", "toy", "int8")[number % 3]
        bundle = tmp_path / name
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(bundles / name, bundle, copy_function=os.link if name == "tiny" else shutil.copy)
        case = "unchanged"
        if number >= 3:
            (bundle / "bundle.json").unlink()  # of tiny it is a link to the one that is to stay
            shutil.copy(bundles / name / "bundle.json", bundle)
            case = f"{number} {name} {mutate(bundle, random.Random(number))}"
        for command, call in commands(bundle, bundles, lambda: capsys.readouterr().err).items():
            code, problem = fault(call)
            codes[f"{command} {code}"] += 1
            faults += [f"{case}: {command} {problem}"] if problem else []
        if case == "unchanged":
            assert not faults and set(codes) >= {"inspect 0", "run 0"}, codes
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    with capsys.disabled():
        print(f"\n{BUNDLES} bundles: {dict(sorted(codes.items()))}, {grown / 1e6:.0f} MB more than before")
    assert faults == [] and grown < BYTES
