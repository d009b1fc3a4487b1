"""How faithfully an autoencoder returns pictures: PSNR, flat colours, texture, and the mesh of the latent grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import cv2
import numpy as np

CELL = 8  # pixels that one latent cell covers, along each side
HALF_WIDTH = 3  # frequency bins to each side of a mesh frequency that count as belonging to it

Reconstruct = Callable[[np.ndarray], np.ndarray]  # uint8 RGB (H, W, 3) to the same


def psnr_db(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of uint8 pictures, in dB."""
    error = np.square(picture.astype(np.float64) - reference).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def laplacian_variance(picture: np.ndarray) -> float:
    """Return the variance of the Laplacian of the brightness, the measure of texture; uint8 RGB (H, W, 3)."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(cv2.Laplacian(grey, cv2.CV_32F).var())


def grid_energies(picture: np.ndarray) -> tuple[float, float]:
    """Return the energy near the frequencies of a mesh of the latent cells, and that half-way between them.

    A pattern that repeats from cell to cell has the frequencies (i/8, j/8) per pixel, not both zero. It is seldom
    equally strong everywhere, which spreads each frequency; hence the bins around it are counted as well.
    """
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64)
    side = min(grey.shape) // (2 * CELL) * 2 * CELL
    window = np.hanning(side)
    grey = (grey[:side, :side] - grey[:side, :side].mean()) * window * window[:, None]
    spectrum = np.square(np.abs(np.fft.fft2(grey)))
    period = side // CELL  # bins from one harmonic to the next
    offsets = range(-HALF_WIDTH, HALF_WIDTH + 1)

    def near(row: int, column: int) -> float:
        return float(sum(spectrum[(row + i) % side, (column + j) % side] for i, j in product(offsets, offsets)))

    pairs = [(i * period, j * period) for i, j in product(range(CELL), range(CELL)) if (i, j) != (0, 0)]
    half = period // 2
    # A neighbour half-way to the zero frequency would hold a natural picture's strongest part: go outwards.
    outward = [
        (row + (half if row <= side // 2 else -half), column + (half if column <= side // 2 else -half))
        for row, column in pairs
    ]
    return sum(near(*pair) for pair in pairs), sum(near(*pair) for pair in outward)


def flat_colour_errors(reconstruct: Reconstruct, values: Sequence[int], side: int = 256) -> np.ndarray:
    """Return the largest error, in levels of 255, of a flat picture of every colour with channels from ``values``."""
    errors = []
    for colour in product(values, repeat=3):
        flat = np.empty((side, side, 3), np.uint8)
        flat[:] = colour
        errors.append(int(np.abs(reconstruct(flat).astype(int) - flat).max()))
    return np.array(errors)


def evaluate(
    reconstruct: Reconstruct, pictures: Sequence[np.ndarray], flat_values: Sequence[int] = (0, 128, 255)
) -> dict[str, float]:
    """Measure an autoencoder on uint8 RGB pictures and on flat colours.

    ``texture_ratio`` is the median over the pictures of decoded over original variance of the Laplacian.
    ``mesh_ratio`` is the energy at the latent cell's frequency and its harmonics, decoded over original, summed over
    the pictures. Blur lowers it as well, so ``mesh_excess`` divides it by the same ratio half-way between those
    frequencies: above 1 there is a mesh, however blurred the picture is.
    """
    decoded = [reconstruct(picture) for picture in pictures]
    textures = [laplacian_variance(d) / max(laplacian_variance(p), 1e-9) for d, p in zip(decoded, pictures, strict=True)]
    grid, between = np.sum([grid_energies(picture) for picture in decoded], 0)
    true_grid, true_between = np.sum([grid_energies(picture) for picture in pictures], 0)
    flat = flat_colour_errors(reconstruct, flat_values, pictures[0].shape[0])
    return {
        "psnr_db": float(np.mean([psnr_db(d, p) for d, p in zip(decoded, pictures, strict=True)])),
        "texture_ratio": float(np.median(textures)),
        "mesh_ratio": float(grid / true_grid),
        "mesh_excess": float(grid / true_grid / (between / true_between)),
        "flat_error_max": float(flat.max()),
        "flat_error_median": float(np.median(flat)),
    }
