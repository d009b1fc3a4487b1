"""Calibration: recorded trajectories -> the ranges and scales of INT8.

``activations.py`` says which tensors of a component are recorded and builds the sessions' graphs, ``pictures.py``
gives the photographs with their holes, ``recording.py`` runs the product's own pipeline over them on the runtime of
``recorder.py``. What is kept are ``statistics.py``'s running figures, with histograms (``histogram.py``). ``ranges.py``
turns those into scales, and ``migration.py`` moves outliers of activations into the weights. Needs no PyTorch.
"""
