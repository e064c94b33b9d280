"""Colours of experts can be told apart without one kind of cone, on white and on black.

Source: simulation of the three deficiencies at their strongest, Machado, Oliveira and Fernandes
2009, https://doi.org/10.1109/TVCG.2009.113, table 1; distances in CIELAB (CIE 1976).
"""

import math
from itertools import combinations

import pytest

from moeadapt.report.palette import COLORS, OTHER

SEEN = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = (0.95047, 1.0, 1.08883)
INKS = {"light": "#1b1f24", "dark": "#e6e9ed"}
LEAST = 15.0
"""Distance of two colours; about 2 is the least that is seen side by side."""


def times(matrix, vector):
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def linear(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def lab(rgb):
    xyz = times(TO_XYZ, [min(max(part, 0.0), 1.0) for part in rgb])
    x, y, z = (
        (v / w) ** (1 / 3) if v / w > 216 / 24389 else (24389 / 27 * v / w + 16) / 116
        for v, w in zip(xyz, WHITE, strict=True)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_the_distance_is_that_of_known_colours():
    assert math.dist(lab(linear("#ffffff")), lab(linear("#000000"))) == pytest.approx(100, abs=0.1)
    assert lab(linear("#ff0000")) == pytest.approx((53.24, 80.09, 67.20), abs=0.05)


@pytest.mark.parametrize("ink", INKS.values(), ids=INKS)
@pytest.mark.parametrize("matrix", SEEN.values(), ids=SEEN)
def test_any_two_colours_can_be_told_apart(matrix, ink):
    colors = [ink if color == "currentColor" else color for color in (*COLORS, OTHER)]
    seen = {color: lab(times(matrix, linear(color))) for color in colors}
    assert len(seen) == 9
    close = {(a, b): math.dist(seen[a], seen[b]) for a, b in combinations(seen, 2)}
    assert min(close.values()) > LEAST, min(close, key=lambda pair: close[pair])
