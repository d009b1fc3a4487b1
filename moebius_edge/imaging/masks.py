"""Masks: which pixels to fill, from any array of brightness; grown; and brought to the latent grid.

A mask is a bool array (H, W), True where the picture is to be filled. Files are read by ``mask_files``.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from ..errors import UsageError

Mask = npt.NDArray[np.bool_]
FAINT = 1 / 16  # of white: several values below are the noise of a black mask, as JPEG leaves it


def threshold(values: np.ndarray, name: str = "mask") -> Mask:
    """True where ``values`` are above half of white, which is 255, 65535, or 1 for floats; bool stays as it is.

    Where nothing is above half, as in a mask of 0 and 1 or one painted with a translucent brush, half of the
    brightest value counts instead. Signed integers need one value besides 0, for they have no white.

    Args:
        values: brightness (H, W) or (H, W, 1); bool, integer or float.
        name: what to call the mask in an error.

    Raises:
        UsageError: another type or shape, a value that is not finite, or an integer type with more values.
    """
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim != 2:
        raise UsageError(f"{name} has shape {values.shape}", "give one value a pixel, (height, width)")
    if values.dtype == np.bool_:
        return values
    brightest = values.max(initial=0) if values.dtype.kind in "uif" else 0
    if values.dtype in (np.uint8, np.uint16):
        white = float(np.iinfo(values.dtype).max)
    elif np.issubdtype(values.dtype, np.floating):
        white = 1.0
        if not np.isfinite(values).all():
            raise UsageError(f"{name} has values that are not finite", "give numbers from 0 to 1")
    elif values.dtype.kind in "ui" and ((values == 0) | (values == brightest)).all():
        return np.asarray(values > 0)
    else:
        raise UsageError(f"{name} has type {values.dtype}", "convert it to bool, or to uint8 with white as 255")
    if 0 < brightest <= white / 2:
        one_value = not ((values > 0) & (values < brightest)).any()
        white = float(brightest) if one_value or brightest > FAINT * white else white
    return np.asarray(values > white / 2)


def bounds(mask: Mask) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of the True pixels, the ends exclusive; None when there are none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def distance_outside(mask: Mask) -> npt.NDArray[np.float32]:
    """Euclidean distance in pixels from every pixel to the nearest True one; 0 on those, (H, W)."""
    distance = cv2.distanceTransform((~mask).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Some versions are off in the last bit. Squares of distances are whole numbers: rounding mends it.
    return np.sqrt(np.rint(np.square(np.asarray(distance, np.float32))))


def dilate(mask: Mask, radius: float) -> Mask:
    """``mask`` and every pixel within ``radius`` pixels of it, by Euclidean distance.

    Raises:
        UsageError: ``radius`` is negative or not a number.
    """
    if not radius >= 0:
        raise UsageError(f"mask-dilate is {radius}", "give 0 or more pixels")
    box = bounds(mask)
    if radius == 0 or box is None:
        return mask
    reach = int(min(radius, max(mask.shape))) + 1
    top, left, bottom, right = box
    window = np.s_[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach]
    grown = mask.copy()
    grown[window] = distance_outside(mask[window]) <= radius
    return grown


def latent_mask(mask: Mask, latent_size: int) -> Mask:
    """The cells of the (latent_size, latent_size) grid that the network is to fill.

    The nearest pixel of a cell decides, as upstream: that is its top left one. A stroke narrower than a cell
    would then come out dashed or vanish, and what it greys out of the masked image would pass for known; so
    where no whole cell fits into the mask, one masked pixel is enough.
    """
    height, width = mask.shape
    if height % latent_size or width % latent_size:
        raise ValueError(f"a mask of {width}x{height} does not divide into a grid of {latent_size}")
    y, x = height // latent_size, width // latent_size
    # Opening: all the places of a whole cell inside the mask, then everything such cells cover. OpenCV's own
    # would shift by a pixel, for a cell of even size has no centre; and outside of the picture is no mask.
    cell, border = np.ones((y, x), np.uint8), cv2.BORDER_CONSTANT
    places = cv2.erode(mask.view(np.uint8), cell, anchor=(0, 0), borderType=border, borderValue=0)
    solid = np.asarray(cv2.dilate(places, cell, anchor=(x - 1, y - 1), borderType=border, borderValue=0))
    thin = mask & (solid == 0)
    return mask[::y, ::x] | thin.reshape(latent_size, y, latent_size, x).any(axis=(1, 3))
