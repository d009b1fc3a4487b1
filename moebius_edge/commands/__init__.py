"""One module a command, ``console.py`` for what they print, ``pairs.py`` for images and masks in folders.

At their top they import nothing heavy: ``--help`` must answer in a blink.
"""
