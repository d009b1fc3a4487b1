"""One module a command. At their top they import nothing heavy: ``--help`` must answer in a blink.

``console.py`` is what they print with; ``batch.py`` pairs images with masks for ``run``.
"""
