"""From PyTorch to a bundle that runs without it: ``export_bundle``, one call, ending in a measured gate.

``source.py`` finds and loads the networks, ``specialise.py`` rewrites the student for inference with the lambda
operators of ``operators.py``, ``graphs.py`` puts all in the bundle's terms, ``onnx_file.py`` writes and checks one
ONNX file, ``precision.py`` types it, ``gate.py`` compares whole trajectories, ``exporter.py`` runs these in order.
Importing this package imports no PyTorch.
"""

from __future__ import annotations

from .exporter import PRECISIONS, export_bundle, float32_bundle

__all__ = ["PRECISIONS", "export_bundle", "float32_bundle"]
