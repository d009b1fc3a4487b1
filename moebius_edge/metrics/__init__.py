"""What is measured: decibels, trajectories and latency."""
