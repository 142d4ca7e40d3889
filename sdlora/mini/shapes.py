"""The things of the mini world as polygons.

Each thing is a list of parts, back to front: a tone and the corners of a polygon in a box from -1 to 1 (x to the right, y down).
Everything is a polygon, so that turning, mirroring and scaling are one matrix product, and so that every style can draw the same
thing in its own way. Tones are relative ("main", "light", "dark" of the thing's colour) or fixed ("ink", "cream", or a named colour).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Part = tuple[str, Points]


def _oval(cx: float, cy: float, rx: float, ry: float, start: float = 0, end: float = 360) -> Points:
    """Corners along an ellipse from `start` to `end` degrees, clockwise from the right."""
    angle = np.deg2rad(np.linspace(start, end, 41))
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def _poly(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=np.float64)


def _join(*pieces: Points) -> Points:
    return np.concatenate(pieces)


def _rays(count: int, outer: float, inner: float) -> Points:
    """A star polygon with `count` points, the first one upwards."""
    angle = np.deg2rad(-90 + np.arange(2 * count) * 180 / count)
    radius = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _star() -> list[Part]:
    return [("main", _rays(5, 1.0, 0.45) + [0, 0.08]), ("light", _rays(5, 0.5, 0.22) + [0, 0.06])]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 61)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return [("main", np.stack([x, y], axis=1)), ("light", _oval(-0.48, -0.4, 0.18, 0.22))]


def _moon() -> list[Part]:
    outer, inner = _oval(0, 0, 0.95, 0.95, 50, 310), _oval(0.42, 0, 0.62, 0.74, 293, 67)
    return [("main", _join(outer, inner)), ("dark", _oval(-0.62, 0.1, 0.12, 0.12)), ("dark", _oval(-0.35, -0.62, 0.09, 0.09))]


def _house() -> list[Part]:
    return [
        ("main", _poly((-0.7, -0.1), (0.7, -0.1), (0.7, 0.95), (-0.7, 0.95))),
        ("dark", _poly((0, -0.95), (1.0, -0.05), (-1.0, -0.05))),
        ("cream", _poly((-0.5, 0.15), (-0.1, 0.15), (-0.1, 0.5), (-0.5, 0.5))),
        ("ink", _poly((0.15, 0.3), (0.5, 0.3), (0.5, 0.95), (0.15, 0.95))),
    ]


def _tree() -> list[Part]:
    return [
        ("ink", _poly((-0.16, 0.5), (0.16, 0.5), (0.16, 1.0), (-0.16, 1.0))),
        ("main", _poly((0, -0.35), (0.85, 0.65), (-0.85, 0.65))),
        ("light", _poly((0, -0.7), (0.66, 0.18), (-0.66, 0.18))),
        ("main", _poly((0, -1.0), (0.46, -0.3), (-0.46, -0.3))),
    ]


def _fish() -> list[Part]:
    return [
        ("dark", _poly((0.4, 0), (1.0, -0.55), (0.85, 0), (1.0, 0.55))),
        ("main", _oval(-0.18, 0, 0.8, 0.52)),
        ("light", _poly((0.12, -0.4), (0.25, 0), (0.12, 0.4), (0.0, 0))),
        ("cream", _oval(-0.58, -0.1, 0.15, 0.15)),
        ("ink", _oval(-0.6, -0.1, 0.08, 0.08)),
    ]


def _flower() -> list[Part]:
    petals = [("main", _oval(0.58 * np.cos(a), 0.58 * np.sin(a), 0.4, 0.4)) for a in np.deg2rad(-90 + 60 * np.arange(6))]
    return [*petals, ("dark", _oval(0, 0, 0.42, 0.42)), ("cream", _oval(0, 0, 0.3, 0.3))]


def _car() -> list[Part]:
    return [
        ("dark", _poly((-0.62, -0.05), (-0.38, -0.55), (0.35, -0.55), (0.62, -0.05))),
        ("cream", _poly((-0.42, -0.08), (-0.27, -0.42), (-0.05, -0.42), (-0.05, -0.08))),
        ("cream", _poly((0.06, -0.08), (0.06, -0.42), (0.26, -0.42), (0.42, -0.08))),
        ("main", _poly((-1.0, 0.0), (-0.9, -0.1), (0.85, -0.1), (1.0, 0.1), (1.0, 0.4), (-1.0, 0.4))),
        ("ink", _oval(-0.52, 0.4, 0.24, 0.24)),
        ("ink", _oval(0.52, 0.4, 0.24, 0.24)),
    ]


def _boat() -> list[Part]:
    return [
        ("ink", _poly((-0.07, -0.95), (0.05, -0.95), (0.05, 0.4), (-0.07, 0.4))),
        ("main", _poly((0.1, -0.9), (0.85, 0.22), (0.1, 0.22))),
        ("light", _poly((-0.12, -0.65), (-0.12, 0.22), (-0.72, 0.22))),
        ("main", _poly((-1.0, 0.38), (1.0, 0.38), (0.62, 0.9), (-0.62, 0.9))),
    ]


def _cup() -> list[Part]:
    handle = _join(_oval(0.52, 0.05, 0.46, 0.42, -80, 80), _oval(0.52, 0.05, 0.26, 0.24, 80, -80))
    return [
        ("dark", handle),
        ("main", _poly((-0.85, -0.65), (0.6, -0.65), (0.48, 0.75), (-0.73, 0.75))),
        ("cream", _oval(-0.125, -0.65, 0.725, 0.16)),
        ("ink", _oval(-0.125, -0.62, 0.58, 0.1)),
    ]


def _cat() -> list[Part]:
    return [
        ("main", _poly((-0.85, -0.95), (-0.2, -0.55), (-0.8, 0.1))),
        ("main", _poly((0.85, -0.95), (0.2, -0.55), (0.8, 0.1))),
        ("main", _oval(0, 0.15, 0.9, 0.72)),
        ("cream", _oval(-0.38, 0.02, 0.19, 0.19)),
        ("cream", _oval(0.38, 0.02, 0.19, 0.19)),
        ("ink", _oval(-0.36, 0.04, 0.1, 0.13)),
        ("ink", _oval(0.36, 0.04, 0.1, 0.13)),
        ("ink", _poly((-0.13, 0.32), (0.13, 0.32), (0, 0.48))),
    ]


def _mushroom() -> list[Part]:
    return [
        ("cream", _poly((-0.3, 0.0), (0.3, 0.0), (0.4, 0.95), (-0.4, 0.95))),
        ("main", _join(_oval(0, 0.1, 1.0, 1.0, 180, 360), _oval(0, 0.1, 1.0, 0.14, 0, 180))),
        ("cream", _oval(-0.45, -0.3, 0.18, 0.18)),
        ("cream", _oval(0.15, -0.55, 0.15, 0.15)),
        ("cream", _oval(0.55, -0.18, 0.15, 0.15)),
    ]


def _umbrella() -> list[Part]:
    scallops = _join(_oval(0.667, 0.0, 0.333, 0.16, 0, -180), _oval(0, 0.0, 0.333, 0.16, 0, -180), _oval(-0.667, 0.0, 0.333, 0.16, 0, -180))
    hook = _join(_oval(0.15, 0.78, 0.2, 0.2, 0, 180), _oval(0.15, 0.78, 0.1, 0.1, 180, 0))
    return [
        ("ink", _poly((-0.05, -0.9), (0.05, -0.9), (0.05, 0.8), (-0.05, 0.8))),
        ("ink", hook),
        ("main", _join(_oval(0, 0, 1.0, 0.88, 180, 360), scallops)),
        ("light", _join(_oval(0, 0, 0.36, 0.88, 180, 360), _oval(0, 0, 0.333, 0.16, 0, -180))),
    ]


def _apple() -> list[Part]:
    return [
        ("ink", _poly((-0.05, -0.95), (0.09, -0.95), (0.06, -0.4), (-0.06, -0.4))),
        ("main", _oval(-0.32, 0.2, 0.6, 0.72)),
        ("main", _oval(0.32, 0.2, 0.6, 0.72)),
        ("dark", _oval(0.38, -0.72, 0.32, 0.15)),
        ("light", _oval(-0.52, 0.0, 0.14, 0.24)),
    ]


def _key() -> list[Part]:
    ring = _join(_oval(-0.58, 0, 0.42, 0.42), _oval(-0.58, 0, 0.2, 0.2, 360, 0))
    return [
        ("main", ring),
        ("main", _poly((-0.2, -0.11), (1.0, -0.11), (1.0, 0.11), (-0.2, 0.11))),
        ("main", _poly((0.45, 0.1), (0.62, 0.1), (0.62, 0.38), (0.45, 0.38))),
        ("main", _poly((0.8, 0.1), (1.0, 0.1), (1.0, 0.46), (0.8, 0.46))),
    ]


def _bell() -> list[Part]:
    side = _poly((0.32, -0.35), (0.44, 0.2), (0.85, 0.55))
    return [
        ("ink", _oval(0, 0.72, 0.2, 0.2)),
        ("dark", _oval(0, -0.82, 0.17, 0.17)),
        ("main", _join(_oval(0, -0.35, 0.32, 0.42, 180, 360), side, side[::-1] * [-1, 1])),
        ("dark", _poly((-0.9, 0.5), (0.9, 0.5), (0.9, 0.7), (-0.9, 0.7))),
        ("light", _oval(-0.16, -0.2, 0.08, 0.28)),
    ]


def _cactus() -> list[Part]:
    left = _join(_poly((-0.2, 0.3), (-0.8, 0.3)), _oval(-0.68, -0.2, 0.13, 0.13, 180, 360), _poly((-0.55, 0.05), (-0.2, 0.05)))
    return [
        ("main", left),
        ("main", left * [-1, 1] - [0, 0.2]),
        ("main", _join(_oval(0, -0.65, 0.27, 0.32, 180, 360), _poly((0.27, 0.6), (-0.27, 0.6)))),
        ("light", _poly((-0.06, -0.75), (0.06, -0.75), (0.06, 0.5), (-0.06, 0.5))),
        ("ink", _poly((-0.5, 0.5), (0.5, 0.5), (0.36, 0.98), (-0.36, 0.98))),
    ]


def _balloon() -> list[Part]:
    return [
        ("ink", _poly((-0.32, 0.2), (-0.26, 0.2), (-0.14, 0.72), (-0.2, 0.72))),
        ("ink", _poly((0.32, 0.2), (0.26, 0.2), (0.14, 0.72), (0.2, 0.72))),
        ("main", _join(_oval(0, -0.32, 0.7, 0.68, 150, 390), _poly((0.2, 0.46), (-0.2, 0.46)))),
        ("light", _join(_oval(0, -0.32, 0.28, 0.68, 180, 360), _poly((0.12, 0.46), (-0.12, 0.46)))),
        ("dark", _poly((-0.26, 0.66), (0.26, 0.66), (0.2, 1.0), (-0.2, 1.0))),
    ]


def _rocket() -> list[Part]:
    right, left = _oval(0, -0.1, 0.36, 0.6, -40, 40), _oval(0, -0.1, 0.36, 0.6, 140, 220)
    body = _join(_poly((0, -1.0)), right, _poly((0.25, 0.6), (-0.25, 0.6)), left)
    return [
        ("cream", _poly((-0.2, 0.55), (0.2, 0.55), (0, 1.0))),
        ("dark", _poly((-0.25, 0.05), (-0.68, 0.7), (-0.25, 0.55))),
        ("dark", _poly((0.25, 0.05), (0.68, 0.7), (0.25, 0.55))),
        ("main", body),
        ("cream", _oval(0, -0.25, 0.2, 0.2)),
        ("ink", _oval(0, -0.25, 0.12, 0.12)),
    ]


def _crown() -> list[Part]:
    return [
        ("main", _poly((-0.95, -0.55), (-0.5, 0.0), (0, -0.75), (0.5, 0.0), (0.95, -0.55), (0.78, 0.7), (-0.78, 0.7))),
        ("dark", _poly((-0.8, 0.45), (0.8, 0.45), (0.78, 0.72), (-0.78, 0.72))),
        ("light", _oval(-0.92, -0.58, 0.12, 0.12)),
        ("light", _oval(0, -0.78, 0.14, 0.14)),
        ("light", _oval(0.92, -0.58, 0.12, 0.12)),
    ]


THINGS: dict[str, Callable[[], list[Part]]] = {
    "star": _star, "heart": _heart, "moon": _moon, "house": _house, "tree": _tree, "fish": _fish, "flower": _flower,
    "car": _car, "boat": _boat, "cup": _cup, "cat": _cat, "mushroom": _mushroom, "umbrella": _umbrella, "apple": _apple,
    "key": _key, "bell": _bell, "cactus": _cactus, "balloon": _balloon, "rocket": _rocket, "crown": _crown,
}  # fmt: skip


def pip(*, arms: float = 0.0, gaze: float = 0.0) -> list[Part]:
    """The example character: a teal creature with two feelers, big eyes and an orange belly.

    Args:
        arms: how far both arms are raised, -1 (down) to 1 (up).
        gaze: where it looks, -1 (left) to 1 (right).
    """
    tip = np.array([0.98, 0.25 - 0.45 * arms])
    arm = np.array([(0.55, 0.05), tip - [0.02, 0.12], tip + [0.02, 0.12], (0.55, 0.33)])
    feeler = _poly((0.22, -0.62), (0.3, -0.62), (0.5, -0.95), (0.42, -0.97))
    parts: list[Part] = []
    for side in (1, -1):
        parts += [
            ("ink", feeler * [side, 1]),
            ("orange", _oval(side * 0.46, -0.93, 0.13, 0.13)),
            ("dark", arm * [side, 1]),
            ("dark", _oval(side * 0.3, 0.88, 0.26, 0.13)),
        ]
    parts += [("main", _oval(0, 0.05, 0.68, 0.82)), ("orange", _oval(0, 0.42, 0.4, 0.36))]
    for side in (1, -1):
        parts += [("cream", _oval(side * 0.27, -0.27, 0.23, 0.26)), ("ink", _oval(side * 0.27 + 0.09 * gaze, -0.25, 0.11, 0.14))]
    return parts
