"""From PyTorch to a bundle that runs without it, and from a bundle to TensorRT engines.

``source.py`` finds and loads the networks, ``specialise.py`` rewrites them for inference with the lambda operators of
``operators.py``, ``onnx_file.py`` writes and checks ONNX files, ``precision.py`` types them, ``autoencoder.py`` keeps
the autoencoder within FP16's range, ``exporter.py`` runs these in order and ends in a measured gate. ``engines.py``
builds engines through ``trt_builder.py``. ``layers.py`` finds where two conversions part.
Importing this package imports neither PyTorch nor onnx.
"""

from .engines import EngineOptions, build_engines
from .exporter import BundleOptions, export_bundle, float32_bundle

__all__ = ["BundleOptions", "EngineOptions", "build_engines", "export_bundle", "float32_bundle"]
