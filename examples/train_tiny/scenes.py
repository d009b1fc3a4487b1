"""Synthetic scenes with the statistics of photographs: what the bundled model mostly learns from.

A dead-leaves picture (occluding shapes with a power-law size distribution; Lee, Mumford and Huang,
"Occlusion models for natural images", 2001) has the edges, the flat parts and the scale invariance of
natural images. Here each leaf carries a gradient and a texture of its own, over a graded backdrop.
No files are read; the random generator is passed in.
"""

from __future__ import annotations

import cv2
import numpy as np


def power_law_noise(rng: np.random.Generator, size: int, exponent: float, anisotropy: float = 1.0) -> np.ndarray:
    """Gaussian noise with amplitude spectrum 1/f^exponent; float32 (size, size), zero mean, unit deviation.

    ``anisotropy`` above 1 stretches it along a random direction (wood, hair, water).
    """
    fy = np.fft.fftfreq(size)[:, None]
    fx = np.fft.rfftfreq(size)[None, :]
    angle = rng.uniform(0, np.pi)
    u = fx * np.cos(angle) + fy * np.sin(angle)
    v = (-fx * np.sin(angle) + fy * np.cos(angle)) * anisotropy
    radius = np.sqrt(u * u + v * v)
    radius[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * radius**-exponent
    noise = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    return (noise - noise.mean()) / (noise.std() + 1e-8)


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """A sinusoidal or square grating, slightly warped; float32 (size, size) in [-1, 1]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 48)
    warp = power_law_noise(rng, size, 2.0) * rng.uniform(0, 0.15) * period
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle) + warp) / period)
    return np.tanh(4 * wave) if rng.random() < 0.4 else wave


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """An RGB colour in [0, 1], float32 (3,), mostly of low saturation as photographs are."""
    value, saturation, hue = rng.beta(1.6, 1.6), rng.beta(1.3, 2.5), rng.uniform(0, 360)
    pixel = np.array([[[hue, saturation, value]]], np.float32)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0]


def textured(rng: np.random.Generator, size: int, shared: np.ndarray) -> np.ndarray:
    """A surface: colour, linear gradient and texture; float32 (size, size, 3), roughly in [0, 1].

    ``shared`` is a stack of ready textures (n, size, size), so that fifty leaves do not cost fifty FFTs.
    """
    y, x = np.mgrid[-0.5 : 0.5 : size * 1j, -0.5 : 0.5 : size * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (x * np.cos(angle) + y * np.sin(angle)) * rng.exponential(0.35)
    surface = random_colour(rng) + ramp[..., None] * (0.5 + 0.5 * random_colour(rng))
    texture = np.roll(shared[rng.integers(len(shared))], tuple(rng.integers(0, size, 2)), (0, 1))
    strength = rng.exponential(0.06)
    return surface + (strength * texture)[..., None] * (0.6 + 0.4 * random_colour(rng))


def _leaf_outline(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    kind = rng.random()
    turn = rng.uniform(0, 2 * np.pi)
    if kind < 0.35:  # an ellipse
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        radii = np.ones(40)
    elif kind < 0.7:  # a polygon of three to six corners
        corners = int(rng.integers(3, 7))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        radii = np.ones(corners)
    else:  # a smooth blob
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        waves = [rng.normal(0, 0.25 / k) * np.cos(k * angles + rng.uniform(0, 6.3)) for k in range(2, 6)]
        radii = 1 + np.sum(waves, axis=0)
    stretch = np.exp(rng.normal(0, 0.45))
    points = radius * radii[:, None] * np.stack([stretch * np.cos(angles), np.sin(angles) / stretch], 1)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return centre + points @ rotation.T


def draw_scene(rng: np.random.Generator, size: int) -> np.ndarray:
    """One scene, uint8 RGB (size, size, 3)."""
    textures = [power_law_noise(rng, size, rng.uniform(0.6, 1.8), np.exp(rng.exponential(0.5))) for _ in range(3)]
    shared = np.stack([*textures, stripes(rng, size)])
    canvas = textured(rng, size, shared)
    canvas += (power_law_noise(rng, size, 2.0) * rng.exponential(0.08))[..., None]
    leaves = int(rng.choice([0, 3, 10, 30, 80], p=[0.08, 0.25, 0.30, 0.25, 0.12]))
    smallest, largest = 0.03 * size, rng.uniform(0.2, 0.6) * size
    # Inverse-cube radii, the scale-invariant case; large leaves lie below, so that small ones stay visible.
    draws = rng.random(leaves)
    radii = (smallest**-2 + draws * (largest**-2 - smallest**-2)) ** -0.5
    for radius in sorted(radii, reverse=True):
        outline = _leaf_outline(rng, rng.uniform(0, size, 2), radius)
        shape = np.zeros((size, size), np.uint8)
        cv2.fillPoly(shape, [np.round(outline * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
        left, top, width, height = cv2.boundingRect(shape)
        if width == 0 or height == 0:
            continue
        window = np.s_[top : top + height, left : left + width]
        alpha = shape[window].astype(np.float32)[..., None] / 255
        # The whole surface would cost more than the leaf: draw it at the leaf's own size.
        patch = textured(rng, max(width, height), shared[:, : max(width, height), : max(width, height)])
        canvas[window] += alpha * (patch[:height, :width] - canvas[window])
    if rng.random() < 0.5:  # light from one side
        y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
        angle = rng.uniform(0, 2 * np.pi)
        canvas *= (1 + 0.35 * rng.random() * (x * np.cos(angle) + y * np.sin(angle)))[..., None]
    if rng.random() < 0.5:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.2))
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8)
