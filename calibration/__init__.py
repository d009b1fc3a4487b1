"""From recorded trajectories to an INT8 file: blocks and recipes, ranges, explicit quantisation."""
