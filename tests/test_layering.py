"""Imports point one way, and nothing that runs on a device imports PyTorch.

Read from the syntax tree, so that an import inside a function counts as well; then once in a fresh
interpreter where the heavy packages do not exist.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "moebius_edge"
MAPPED = ("export", "runtimes", "calibration")  # top-level folders that are sub-packages of moebius_edge

# What runs on a device, lowest first: a layer imports the layers before it, never its own or a later one.
# A layer is a module of moebius_edge or a whole sub-package (which may import itself).
DEVICE_LAYERS = (
    {"errors", "options", "progress", "text"},
    {"documents", "spec", "toml"},
    {"sampling", "system"},
    {"bundle", "imaging"},
    {"data", "runtimes"},
    {"pipeline"},
    {"metrics"},
    {"report", "serve"},
)
DEVICE = {name: rank for rank, layer in enumerate(DEVICE_LAYERS) for name in layer}
BELOW_REPORT = DEVICE.keys() - {"report", "serve"}

# What runs on a workstation, and what each part may import.
WORKSTATION: dict[str, set[str]] = {
    "checkpoints": {"errors", "sampling"},
    "model": {"checkpoints", "documents", "errors", "spec", "system"},
    "export": BELOW_REPORT | {"checkpoints", "model"},
    "calibration": BELOW_REPORT | {"model", "export"},
    "training": BELOW_REPORT | {"checkpoints", "model", "export"},
}
COMMAND_LINE = {"__main__", "cli", "commands"}  # imports everything, but inside functions
TORCH_BACKEND = "runtimes.pytorch"  # the reference back-end: the one module of a device folder with torch

FRAMEWORKS = {"diffusers", "fla", "onnx", "onnxscript", "safetensors", "skimage", "torch", "torchvision"}
RUNTIMES = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"}
HEAVY = FRAMEWORKS | RUNTIMES | {"cv2", "fastapi", "numpy", "PIL", "pydantic", "huggingface_hub", "uvicorn"}


@dataclass(frozen=True)
class Import:
    """One import statement: who, what (``moebius_edge`` stripped where ``internal``), how."""

    importer: str
    target: str
    internal: bool
    relative: bool
    module_level: bool
    where: str

    @property
    def top(self) -> str:
        return self.target.split(".")[0]


def modules() -> dict[str, Path]:
    """Dotted name inside moebius_edge ('' for the package itself) -> file."""
    found = {}
    for folder in (PACKAGE, *MAPPED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if folder == PACKAGE else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are executed on import: not the bodies of functions, nor ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _top_level(child)


def imports_of(source: str, module: str, is_package: bool, where: str) -> Iterator[Import]:
    """Every import of a file; ``from .a import b`` counts as a.b when a.b is a module, else as a."""
    tree = ast.parse(source)
    at_import = {id(node) for node in _top_level(tree)}
    known = modules()
    package = module.split(".") if module else []
    if not is_package:
        package = package[:-1]
    for node in ast.walk(tree):
        targets: list[tuple[str, bool]] = []  # dotted name with the package's, relative?
        if isinstance(node, ast.Import):
            targets = [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package[: len(package) - (node.level - 1)]
                base = ".".join([PACKAGE, *up, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                is_module = name.removeprefix(f"{PACKAGE}.") in known
                targets.append((name if is_module else base, bool(node.level)))
        for name, relative in targets:
            internal = name == PACKAGE or name.startswith(f"{PACKAGE}.")
            target = name.removeprefix(PACKAGE).removeprefix(".") if internal else name
            line = f"{where}:{node.lineno}"  # type: ignore[attr-defined]
            yield Import(module, target, internal, relative, id(node) in at_import, line)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found: list[Import] = []
    for module, path in modules().items():
        where = str(path.relative_to(ROOT))
        found += imports_of(path.read_text(), module, path.name == "__init__.py", where)
    assert len(found) > 50, "the walk over the sources found next to nothing"
    return found


def may_import(importer: str, target: str) -> bool:
    """Whether module ``importer`` may import module ``target``, both named inside moebius_edge."""
    a, b = top(importer), top(target)
    if a in COMMAND_LINE | {""} or b == "" or a == b:
        return True  # the command line and the package's own names; the version number; a sub-package's own modules
    if a in DEVICE:
        return b in DEVICE and DEVICE[b] < DEVICE[a]
    return b in WORKSTATION.get(a, set())


def test_every_module_has_its_layer() -> None:
    placed = DEVICE.keys() | WORKSTATION.keys() | COMMAND_LINE | {""}
    assert {name for name in map(top, modules()) if name not in placed} == set(), "place it in DEVICE_LAYERS"


def test_no_folder_holds_more_than_fifteen_modules() -> None:
    """One that does is two ideas, or a heap. ``__init__`` is not counted."""
    counts = Counter(path.parent for path in modules().values() if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > 15} == {}


def test_imports_point_one_way(imports: list[Import]) -> None:
    internal = [i for i in imports if i.internal]
    assert [f"{i.where} imports {i.target}" for i in internal if not may_import(i.importer, i.target)] == []


def test_no_framework_on_the_device_path(imports: list[Import]) -> None:
    """Neither at the top of a file nor inside a function, but for the torch back-end and what counts a file's work.

    The commands of a workstation may, inside functions: see ``test_the_command_line_imports_lazily``.
    """
    wrong = [
        f"{i.where} imports {i.target}"
        for i in imports
        if top(i.importer) in DEVICE and i.importer != TORCH_BACKEND and not i.internal and i.top in FRAMEWORKS
    ]
    assert wrong == []


def test_calibration_runs_without_pytorch() -> None:
    names = [f"{PACKAGE}.{m}" for m in modules() if top(m) == "calibration"]
    assert len(names) > 1
    code = f"import importlib, sys\nsys.modules['torch'] = None\nfor name in {names}: importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_torch_backend_is_imported_inside_functions_only(imports: list[Import]) -> None:
    """But for training, which is PyTorch throughout."""
    backend = [i for i in imports if i.internal and i.target == TORCH_BACKEND]
    wrong = [i.where for i in backend if i.module_level and top(i.importer) != "training"]
    assert wrong == []


def test_the_command_line_imports_lazily(imports: list[Import]) -> None:
    light = {"", "errors", "options", "progress", "spec", "text"} | COMMAND_LINE
    wrong = [
        f"{i.where} imports {i.target}"
        for i in imports
        if top(i.importer) in COMMAND_LINE | {""}
        and i.module_level
        and (top(i.target) not in light if i.internal else i.top in HEAVY)
    ]
    assert wrong == []


def test_mapped_folders_import_relatively(imports: list[Import]) -> None:
    """An absolute import in a mapped folder could load a second copy of a module."""
    internal = [i for i in imports if i.internal and top(i.importer) in MAPPED]
    assert [i.where for i in internal if not i.relative] == []
    stray = [f"{i.where} imports {i.target}" for i in imports if not i.internal and i.top in MAPPED]
    assert stray == [], "the folders are sub-packages: moebius_edge.export, not export"


def test_the_rules_see_what_they_forbid() -> None:
    """The checker's own check, on a file that breaks each rule once."""
    source = (
        "import torch\n"
        "from .. import pipeline, __version__\n"
        "def lazy():\n    from ..runtimes.pytorch import TorchRuntime\n    import moebius_edge.model.student\n"
    )
    found = list(imports_of(source, "sampling.scheduler", False, "scheduler.py"))
    assert [(i.target, i.internal, i.relative, i.module_level) for i in found] == [
        ("torch", False, False, True),
        ("pipeline", True, True, True),
        ("", True, True, True),
        ("runtimes.pytorch", True, True, False),
        ("model.student", True, False, False),
    ]
    assert [may_import("sampling.scheduler", i.target) for i in found if i.internal] == [False, True, False, False]
    (up,) = imports_of("from ..spec import X", "export.exporter", False, "exporter.py")
    (beside,) = imports_of("from .base import X", "runtimes", True, "__init__.py")
    assert (up.target, beside.target) == ("spec", "runtimes.base")


def test_the_device_path_runs_where_no_framework_is_installed() -> None:
    """Import all of it in a fresh interpreter that has numpy, OpenCV and Pillow, but no runtime either."""
    names = [m for m in modules() if top(m) in DEVICE or top(m) in COMMAND_LINE]
    names = [f"{PACKAGE}.{m}" for m in names if m not in (TORCH_BACKEND, "__main__")]
    blocked = sorted(FRAMEWORKS | RUNTIMES | {"huggingface_hub"})
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"  # None there makes an import fail
        f"for name in {names}: importlib.import_module(name)\n"
        "print(len(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
