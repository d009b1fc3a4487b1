"""moebius-edge: put the Moebius inpainting network (arXiv 2606.19195) on a Jetson, a GPU or a CPU.

``from moebius_edge import Bundle, Inpainter`` is the Python interface; both are imported when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle.bundle import Bundle as Bundle
    from .pipeline.inpainter import Inpainter as Inpainter

__version__ = "0.1.0"
__all__ = ["Bundle", "Inpainter", "__version__"]

_MODULES = {"Bundle": ".bundle.bundle", "Inpainter": ".pipeline.inpainter"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
