"""The one way in which long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# progress(what, done, total): ``done`` of ``total`` units of the work named ``what`` are finished. A total of 0 means
# that the length is not known. It is called from the thread that works, at most a few times a second.
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """The ``Progress`` of a caller who does not show any."""
