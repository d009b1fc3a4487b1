"""Calibration: from recorded trajectories to an INT8 bundle. Needs no PyTorch.

``int8.py`` is the whole way. ``record.py`` runs the product's own pipeline over photographs with holes and keeps the
``statistics.py`` of every activation, which ``ranges.py`` turns into scales. ``blocks.py`` says what can be quantised
and what a recipe is, ``quantise.py`` quantises by a recipe, after ``smoothing.py`` has moved outliers into weights.
``evaluate.py`` measures candidates and times the result, ``search.py`` finds a recipe with it.
"""
