"""Pictures of small tasks, drawn in NumPy.

Letters: H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLUE", "GREY", "RED", "Canvas"]

BLUE, GREY, RED = (31, 119, 180), (190, 190, 190), (214, 39, 40)

Color = tuple[int, int, int]
Point = tuple[float, float] | NDArray[np.float64]


class Canvas:
    """A white picture of the rectangle `low` to `high`, x to the right and y upwards.

    Args:
        low, high: the corners.
        width: pixels; the height follows from the rectangle's shape.
    """

    def __init__(self, low: tuple[float, float], high: tuple[float, float], width: int = 256) -> None:
        pixel = (high[0] - low[0]) / width
        height = round((high[1] - low[1]) / pixel)
        self._x = low[0] + pixel * (np.arange(width) + 0.5)
        self._y = (high[1] - pixel * (np.arange(height) + 0.5))[:, None]
        self.pixels: NDArray[np.uint8] = np.full((height, width, 3), 255, np.uint8)

    def disc(self, center: Point, radius: float, color: Color) -> None:
        """Fill a disc."""
        self.pixels[np.hypot(self._x - center[0], self._y - center[1]) <= radius] = color

    def line(self, start: Point, end: Point, width: float, color: Color) -> None:
        """Draw a line with round ends."""
        (x, y), (dx, dy) = start, (end[0] - start[0], end[1] - start[1])
        squared = max(dx * dx + dy * dy, 1e-12)
        along = np.clip(((self._x - x) * dx + (self._y - y) * dy) / squared, 0.0, 1.0)
        self.pixels[np.hypot(self._x - x - along * dx, self._y - y - along * dy) <= width / 2] = color

    def bars(self, heights: Sequence[float] | NDArray[np.float64], colors: Sequence[Color]) -> None:
        """Draw bars from y = 0, the i-th from x = i + 0.1 to i + 0.9."""
        for i, (height, color) in enumerate(zip(heights, colors, strict=True)):
            inside = (self._x > i + 0.1) & (self._x < i + 0.9)
            self.pixels[inside & (self._y > min(height, 0.0)) & (self._y < max(height, 0.0))] = color
