"""Accuracy against latency, memory and energy: what ``moebius-edge report`` measures and shows.

``results.py`` says what a ``results.json`` holds, reads and writes it; all that is shown is made from that file alone.
``grid.py`` says what is to be measured, ``collect.py`` has it measured, each configuration in a process of its own.
"""
