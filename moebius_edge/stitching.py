"""Putting what the network made back into the picture, through a seam that fades into the original.

The seam lies outside the mask. Beyond it every pixel keeps its bytes, at 8 and at 16 bits: nothing is
computed there, so nothing can be rounded.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from .masks import Mask, distance_outside
from .regions import Floats, Region

_FEATHER_SHARE = 0.03  # of the square's side: about one latent cell of a 256-pixel model
_LEAST_FEATHER = 4
_ROWS = 512  # blended at a time, to bound the memory
_GREY = np.array([[0.299], [0.587], [0.114]], np.float32)  # brightness of RGB, ITU-R BT.601


def stitch(canvas: np.ndarray, generated: Floats, region: Region, mask: Mask, feather: float) -> None:
    """Blend ``generated`` (R, R, 3 in [0, 1]) into ``canvas`` (H, W, C), in place, where ``seam`` is above 0.

    All other pixels keep their bytes. ``feather`` in pixels is limited to ``region.room``: a wider seam would
    end in a step at the square's edge.
    """
    height, width = mask.shape
    feather = min(feather, region.room(height, width))
    reach = math.ceil(feather)
    top, left = max(0, region.hole[0] - reach), max(0, region.hole[1] - reach)
    bottom, right = region.hole[2] + reach, region.hole[3] + reach  # slices end at the picture's edge
    alpha = seam(mask[top:bottom, left:right], feather)
    full = _enlarged(generated, region.side)
    scale = np.float32(np.iinfo(canvas.dtype).max) / np.float32(1 if full.dtype == np.float32 else 65535)
    for row in range(0, len(alpha), _ROWS):
        part = alpha[row : row + _ROWS]
        touched = part > 0
        y, x = top + row - region.top, left - region.left
        colour = full[y : y + part.shape[0], x : x + part.shape[1]][touched].astype(np.float32) * scale
        if canvas.shape[2] == 1:
            colour = colour @ _GREY
        target = canvas[top + row : top + row + part.shape[0], left : left + part.shape[1]]
        weight = part[touched][:, None]
        blended = weight * colour + (1 - weight) * target[touched]
        target[touched] = np.rint(blended).clip(0, np.iinfo(canvas.dtype).max).astype(canvas.dtype)


def seam(mask: Mask, feather: float) -> Floats:
    """Share of the generated picture, (H, W): 1 in the mask, exactly 0 from ``feather`` pixels outside on.

    Between, at distance d: (g(d) - g(feather)) / (1 - g(feather)) with the Gaussian g of σ = feather / 3.
    """
    if feather <= 0:
        return mask.astype(np.float32)
    distance = distance_outside(mask)
    end = math.exp(-4.5)  # g(3 σ)
    alpha = (np.exp(-4.5 * np.square(distance / np.float32(feather))) - np.float32(end)) / np.float32(1 - end)
    alpha[distance >= feather] = 0
    alpha[mask] = 1
    return alpha


def default_feather(region: Region) -> int:
    """Width of the seam in pixels: 3% of the square's side, at least 4."""
    return max(_LEAST_FEATHER, round(_FEATHER_SHARE * region.side))


def _enlarged(generated: Floats, side: int) -> np.ndarray:
    """(side, side, 3): float32 as it is, or interpolated bicubically as uint16, half as large as floats."""
    if len(generated) == side:
        return generated.clip(0, 1)
    levels = np.rint(generated.clip(0, 1) * 65535).astype(np.uint16)
    return np.asarray(cv2.resize(levels, (side, side), interpolation=cv2.INTER_CUBIC))
