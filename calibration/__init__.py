"""Calibration: from recorded trajectories to an INT8 file. Needs no PyTorch.

``recording.py`` runs the product's own pipeline over photographs with holes (``pictures.py``) on the runtime of
``recorder.py``, which looks at the tensors of ``activations.py``; what is kept are running figures (``statistics.py``,
``histogram.py``). ``ranges.py`` turns those into scales, ``migration.py`` moves outliers of activations into weights.
``blocks.py`` and ``recipe.py`` say what is quantised, ``quantise.py`` does it (``pairs.py``), and
``kernels.py`` sees which products ONNX Runtime then computes in integers.
"""
