"""From PyTorch to a bundle that runs without it: ``export_bundle``, one call, ending in a measured gate.

``source.py`` finds and loads the networks, ``graphs.py`` puts them in the bundle's terms, ``onnx_file.py``
writes and checks one ONNX file, ``gate.py`` compares whole trajectories, ``exporter.py`` runs these in order.
Importing this package imports no PyTorch.
"""

from __future__ import annotations

from .exporter import export_bundle

__all__ = ["export_bundle"]
