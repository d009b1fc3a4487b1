"""How faithfully an autoencoder returns pictures, and how a fill compares with what was in the hole.

For the autoencoder: PSNR, flat colours, texture, and the mesh of the latent grid. For fills: texture, specks, and a
distance between features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

CELL = 8  # pixels that one latent cell covers, along each side
SPECK_LEVELS = 24  # of 255, by which a speck lies outside the colours of its hole's surroundings
SURROUNDINGS = 32  # pixels round the hole that are its surroundings
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


def power_spectrum(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return the summed power spectrum of the brightness of square pictures, seen through a Hann window."""
    side = len(pictures[0])
    window = np.outer(np.hanning(side), np.hanning(side))
    greys = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64) for picture in pictures)
    return np.asarray(sum(np.square(np.abs(np.fft.fft2((grey - grey.mean()) * window))) for grey in greys))


def mesh_figures(decoded: Sequence[np.ndarray], pictures: Sequence[np.ndarray]) -> tuple[float, float]:
    """Compare decoded and original square pictures at the frequencies of a mesh of the latent cells.

    A pattern that repeats from cell to cell has the frequencies (i/8, j/8) per pixel, not both zero. It is seldom
    equally strong everywhere, which spreads each frequency; hence the bins around it are counted as well.

    Returns:
        The energy at all those frequencies, decoded over original; and the geometric mean over them of the same ratio
        divided by that of the four places half-way to the neighbouring frequencies. Blur and sharpening leave the
        second at 1, and a mesh raises it.
    """
    spectra = [power_spectrum(decoded), power_spectrum(pictures)]
    side = len(pictures[0])
    period, half = side // CELL, side // CELL // 2  # in frequency bins
    offsets = range(-HALF_WIDTH, HALF_WIDTH + 1)

    def energies(row: int, column: int) -> np.ndarray:
        """The energies of both around a place of the spectrum, (2,)."""
        rows, columns = ([(place + offset) % side for offset in offsets] for place in (row, column))
        return np.array([spectrum[np.ix_(rows, columns)].sum() + 1e-9 for spectrum in spectra])

    def log_ratio(row: int, column: int) -> float:
        first, second = np.log(energies(row, column))
        return float(first - second)

    places = [(i * period, j * period) for i, j in product(range(CELL), repeat=2) if (i, j) != (0, 0)]
    beside = ((half, 0), (-half, 0), (0, half), (0, -half))
    excesses = [
        log_ratio(row, column) - np.mean([log_ratio(row + down, column + right) for down, right in beside])
        for row, column in places
    ]
    total = np.sum([energies(*place) for place in places], 0)
    return float(total[0] / total[1]), float(np.exp(np.mean(excesses)))


def flat_colour_errors(reconstruct: Reconstruct, values: Sequence[int], side: int = 256) -> np.ndarray:
    """Return the errors, in levels of 255, of flat pictures of all colours with channels from ``values``.

    Float (colours, 2): the largest error of each picture, and the one that 99% of its values stay below. They differ
    where the corners of the picture, at which the convolutions see padding, are worse than the rest.
    """
    errors = []
    for colour in product(values, repeat=3):
        flat = np.empty((side, side, 3), np.uint8)
        flat[:] = colour
        error = np.abs(reconstruct(flat).astype(int) - flat)
        errors.append((error.max(), np.quantile(error, 0.99)))
    return np.array(errors, float)


def evaluate(
    reconstruct: Reconstruct, pictures: Sequence[np.ndarray], flat_values: Sequence[int] = (0, 128, 255)
) -> dict[str, float]:
    """Measure an autoencoder on uint8 RGB pictures and on flat colours.

    ``texture_ratio`` is the median over the pictures of decoded over original variance of the Laplacian.
    ``mesh_ratio`` and ``mesh_excess`` are those of ``mesh_figures``; errors of flat colours are in levels of 255:
    the largest of all, the largest 99% quantile of a colour, and the median over the colours of that quantile.
    """
    decoded = [reconstruct(picture) for picture in pictures]
    pairs = list(zip(decoded, pictures, strict=True))
    textures = [laplacian_variance(result) / max(laplacian_variance(original), 1e-9) for result, original in pairs]
    mesh_ratio, mesh_excess = mesh_figures(decoded, pictures)
    flat = flat_colour_errors(reconstruct, flat_values, pictures[0].shape[0])
    return {
        "psnr_db": float(np.mean([psnr_db(result, original) for result, original in pairs])),
        "texture_ratio": float(np.median(textures)),
        "mesh_ratio": mesh_ratio,
        "mesh_excess": mesh_excess,
        "flat_error_max": float(flat[:, 0].max()),
        "flat_error_99": float(flat[:, 1].max()),
        "flat_error_99_median": float(np.median(flat[:, 1])),
    }


def hole_texture_ratio(result: np.ndarray, original: np.ndarray, mask: np.ndarray) -> float:
    """Variance of the Laplacian in the hole over that of the original there; uint8 RGB (H, W, 3), bool (H, W).

    NaN where the original is flat: there is no texture to reach.
    """
    first, second = (
        cv2.Laplacian(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY).astype(np.float32), cv2.CV_32F)[mask].var()
        for p in (result, original)
    )
    return float(first / second) if second > 1 else float("nan")


def speck_share(result: np.ndarray, mask: np.ndarray) -> float:
    """The share of the hole's pixels that lie outside the colours round the hole by more than ``SPECK_LEVELS``.

    Those colours are, for each channel, all from the darkest to the brightest within ``SURROUNDINGS`` pixels.
    """
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3)
    ring = result[(distance > 0) & (distance <= SURROUNDINGS)].astype(int)
    hole = result[mask].astype(int)
    outside = (hole < ring.min(0) - SPECK_LEVELS) | (hole > ring.max(0) + SPECK_LEVELS)
    return float(outside.any(1).mean())


class FeatureDistance:
    """A perceptual distance that needs no download: between the features of an autoencoder's encoder.

    As LPIPS without its learned weights (Zhang et al., arXiv 1801.03924, equation 1): at every level the features are
    brought to unit length at each position, and their squared differences are averaged over the hole, then the levels.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.encoder = vae.encoder.float().eval()

    @torch.no_grad()
    def __call__(self, result: Tensor, original: Tensor, mask: Tensor) -> float:
        """Pictures (1, 3, H, W) in [-1, 1], mask (1, 1, H, W) of 0 and 1."""
        features = self.encoder.conv_in(torch.cat([result, original]))
        distances = []
        for block in self.encoder.down_blocks:
            features = block(features)
            first, second = F.normalize(features, dim=1).chunk(2)
            weight = F.adaptive_avg_pool2d(mask, (first.shape[-2], first.shape[-1]))
            squares = (first - second).square().sum(1, keepdim=True)
            distances.append(float((squares * weight).sum() / weight.sum()))
        return float(np.mean(distances))
