"""Accuracy against latency, memory and energy: what ``moebius-edge report`` measures and shows.

``schema.py`` says what a ``results.json`` holds and ``results.py`` reads and writes it; all that is shown is made from
that file alone. ``configurations.py`` says what is to be measured, ``collect.py`` has it measured, each in a process
of its own.
"""
