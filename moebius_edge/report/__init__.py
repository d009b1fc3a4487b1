"""Accuracy against latency, memory and energy: measuring configurations, and presenting what was measured."""
