"""Procedural textures of table and wall, computed from a colour, a second one and a seed.

Every pattern is periodic, so tiles fit together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from blm.tasks.variation import Surface, Vector
from blm.types import FloatArray, lookup

Mix = NDArray[np.floating]
"""Share of the second colour at each pixel, 0..1, [side, side]."""


def render_texture(surface: Surface, color: Vector, side: int) -> FloatArray:
    """Return the texture [side, side, 3], 0..1, of a surface whose first colour is `color`."""
    pattern = lookup("pattern", surface.pattern, _PATTERNS)
    mix = pattern(np.random.default_rng(surface.seed), side)[..., None]
    return (1 - mix) * np.array(color) + mix * np.array(surface.other)


def _plain(rng: np.random.Generator, side: int) -> Mix:
    return np.zeros((side, side))


def _checker(rng: np.random.Generator, side: int) -> Mix:
    u, v = _coordinates(side, rng)
    fields = 2 * int(rng.integers(2, 7))
    return ((np.floor(fields * u) + np.floor(fields * v)) % 2).astype(float)


def _stripes(rng: np.random.Generator, side: int) -> Mix:
    u, v = _coordinates(side, rng)
    across, along = int(rng.integers(3, 10)), int(rng.integers(-2, 3))
    return ((across * u + along * v) % 1 < rng.uniform(0.3, 0.7)).astype(float)


def _wood(rng: np.random.Generator, side: int) -> Mix:
    """Long, slightly curved grain and planks of different brightness."""
    u, _ = _coordinates(side, rng)
    planks = int(rng.integers(3, 6))
    grain = 0.5 + 0.5 * np.sin(2 * np.pi * (int(rng.integers(12, 24)) * u + 1.5 * _clouds(rng, side, 2.5)))
    shade = rng.uniform(0, 0.6, planks)[np.floor(planks * (u % 1)).astype(int)]
    return np.clip(0.5 * grain + shade + 0.1 * _clouds(rng, side, 0.5), 0, 1)


def _noise(rng: np.random.Generator, side: int) -> Mix:
    return np.clip(0.5 + 0.35 * _clouds(rng, side, float(rng.uniform(0.5, 1.5))), 0, 1)


def _marble(rng: np.random.Generator, side: int) -> Mix:
    u, v = _coordinates(side, rng)
    veins = np.sin(
        2 * np.pi * (int(rng.integers(1, 4)) * u + int(rng.integers(1, 4)) * v) + 3 * _clouds(rng, side, 1.8)
    )
    return (1 - np.abs(veins)) ** 2


def _dots(rng: np.random.Generator, side: int) -> Mix:
    u, v = _coordinates(side, rng)
    count = int(rng.integers(4, 10))
    distance = np.hypot((count * u) % 1 - 0.5, (count * v) % 1 - 0.5)
    return (distance < rng.uniform(0.2, 0.4)).astype(float)


_PATTERNS: dict[str, Callable[[np.random.Generator, int], Mix]] = {
    "": _plain,
    "checker": _checker,
    "stripes": _stripes,
    "wood": _wood,
    "noise": _noise,
    "marble": _marble,
    "dots": _dots,
}


def _coordinates(side: int, rng: np.random.Generator) -> tuple[Mix, Mix]:
    """Return coordinates with period 1 and a random phase, each [side, side]; their axes may be swapped."""
    u, v = np.meshgrid(*(np.arange(side) / side + rng.uniform(0, 1) for _ in range(2)))
    return (u, v) if rng.random() < 0.5 else (v, u)


def _clouds(rng: np.random.Generator, side: int, smoothness: float) -> Mix:
    """Return periodic noise with mean 0 and standard deviation 1, whose spectrum falls as 1/f^smoothness."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.normal(size=(side, side))) / frequency**smoothness
    clouds = np.fft.ifft2(spectrum).real
    return clouds / clouds.std()
