"""Accuracy against latency, memory and energy: what ``moebius-edge report`` measures and shows."""
