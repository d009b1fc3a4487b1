"""Deep features reused from call to call: which calls of the denoiser compute all of it, and which a part.

DeepCache (Ma et al., arXiv 2312.00858, section 3): what the coarse levels of the U-Net make changes little from step to
step. So a call computes the finest level alone, and takes what enters its way up from the last call that computed all.
An approximation: docs/few-steps.md has what it costs and what it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle


def check_cache_interval(interval: int, bundle: Bundle) -> None:
    """Raise ``UsageError`` unless ``interval`` is a number of calls that ``bundle`` can reuse its deep feature for."""
    if interval < 1:
        raise UsageError(f"cache interval is {interval}: give a whole number of 1 (nothing is reused) or more")
    if interval > 1 and bundle.deep_channels is None:
        raise UsageError(
            f"cache interval is {interval}, and bundle {bundle.path} was exported without the part that reuses deep "
            "features: leave it out, or export the checkpoint again"
        )


def whole_calls(rows: Sequence[int], interval: int) -> list[bool]:
    """For each call of a trajectory, of that many rows, whether it computes the whole denoiser.

    One in ``interval`` does, and each whose number of rows is another than the last call's, whose feature has too many
    or lacks some.
    """
    whole: list[bool] = []
    age = 0  # calls since the feature was made
    for index, count in enumerate(rows):
        fresh = index == 0 or count != rows[index - 1] or age + 1 >= interval
        age = 0 if fresh else age + 1
        whole.append(fresh)
    return whole
