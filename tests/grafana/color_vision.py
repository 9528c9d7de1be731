"""How far apart two colours are, to people with and without colour blindness.

Sight is simulated with the matrices of Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation
of Color Vision Deficiency", IEEE TVCG 15(6), 2009, for a severity of 1, in linear sRGB. Distances are those of CIE 1976
in L*a*b* under D65: one of 2.3 is just seen side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

Triple = tuple[float, float, float]
Matrix = tuple[Triple, Triple, Triple]

SIGHTS: Final[Mapping[str, Matrix]] = {
    "common": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
_TO_XYZ: Final[Matrix] = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_WHITE: Final[Triple] = (0.95047, 1.0, 1.08883)


def measure_distance(one: str, other: str, sight: str) -> float:
    """Return how far apart ``#rrggbb`` and ``#rrggbb`` are to a kind of sight."""
    return math.dist(_find_lab(one, SIGHTS[sight]), _find_lab(other, SIGHTS[sight]))


def measure_contrast(one: str, other: str) -> float:
    """Return the contrast of WCAG 2: from 1 to 21."""
    brightness = sorted(_multiply(_TO_XYZ, _decode(color))[1] for color in (one, other))
    return (brightness[1] + 0.05) / (brightness[0] + 0.05)


def _decode(color: str) -> Triple:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return _linearize(red), _linearize(green), _linearize(blue)


def _linearize(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)


def _find_lab(color: str, sight: Matrix) -> Triple:
    red, green, blue = (min(1.0, max(0.0, value)) for value in _multiply(sight, _decode(color)))
    x, y, z = (_compress(v / white) for v, white in zip(_multiply(_TO_XYZ, (red, green, blue)), _WHITE, strict=True))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _compress(value: float) -> float:
    return float(value ** (1 / 3)) if value > 216 / 24389 else (24389 / 27 * value + 16) / 116


def _multiply(matrix: Matrix, vector: Triple) -> Triple:
    one, two, three = (sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)
    return one, two, three
