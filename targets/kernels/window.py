"""Sliding windows: their geometry, and the padded copy of an input that lets a kernel slide without asking."""

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel slides: pairs are (vertical, horizontal), `padding` is (top, left, bottom, right)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1)

    def reach(self, outputs: int, axis: int) -> int:
        """Input rows (axis 0) or columns (axis 1), padding included, that so many outputs read."""
        return (outputs - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1

    def at(self, h: Any, w: Any, kh: Any, kw: Any) -> tuple[Any, Any]:
        """Where in the padded input output (h, w) meets kernel element (kh, kw)."""
        return h * self.strides[0] + kh * self.dilation[0], w * self.strides[1] + kw * self.dilation[1]


def padded_input(x: te.Tensor, window: Window, height: int, width: int, fill: float) -> te.Tensor:
    """`x` with the window's padding, and beyond it as far as height x width outputs read; `x` itself if that is all.

    Axes 2 and 3 of `x` are rows and columns.
    """
    top, left = window.padding[:2]
    rows, columns = window.reach(height, 0), window.reach(width, 1)
    given_rows, given_columns = int(x.shape[2]), int(x.shape[3])
    if (top, left) == (0, 0) and rows <= given_rows and columns <= given_columns:
        return x

    def value(n: Any, c: Any, h: Any, w: Any, *lane: Any) -> Any:
        inside = tirx.all(h >= top, h < top + given_rows, w >= left, w < left + given_columns)
        return tirx.if_then_else(inside, x(n, c, h - top, w - left, *lane), tirx.const(fill, x.dtype))

    return te.compute((x.shape[0], x.shape[1], rows, columns, *x.shape[4:]), value, name="pad")
