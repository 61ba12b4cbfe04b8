"""Resize rows and columns by tables: which inputs an output mixes and with what weights, worked out at compile time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te

from targets.base import Array


@dataclass(frozen=True, slots=True)
class Taps:
    """For each output along one axis, the inputs it mixes: `index` int32 and `weight` float32, (taps, outputs)."""

    index: Array
    weight: Array


def taps(
    given: int, outputs: int, method: str, transform: str, rounding: str, cubic: float, scale: float | None = None
) -> Taps | None:
    """One axis of ONNX's Resize, by outputs / given unless a scale is told; None for what is not tabled here.

    Source: the ONNX operator specification of Resize, opset 19.
    """
    scale = scale or outputs / given
    at = np.arange(outputs, dtype=np.float64)
    coordinates = {
        "half_pixel": (at + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (at + 0.5) / scale - 0.5 if outputs > 1 else np.zeros(1),
        "align_corners": at * ((given - 1) / (outputs - 1) if outputs > 1 else 0.0),
        "asymmetric": at / scale,
    }
    if transform not in coordinates:
        return None
    where = coordinates[transform]
    below = np.floor(where)
    part = where - below
    if method == "nearest_neighbor":
        nearest = {
            "round_prefer_floor": np.ceil(where - 0.5), "round": np.ceil(where - 0.5), "": np.ceil(where - 0.5),
            "round_prefer_ceil": np.floor(where + 0.5), "floor": below, "ceil": np.ceil(where),
        }
        if rounding not in nearest:
            return None
        return _clamped([nearest[rounding]], [np.ones(outputs)], given)
    if method == "linear":
        return _clamped([below, below + 1], [1 - part, part], given)
    if method == "cubic":
        far = [_cubic(distance, cubic) for distance in (1 + part, part, 1 - part, 2 - part)]
        return _clamped([below - 1, below, below + 1, below + 2], far, given)
    return None


def resize(
    x: te.Tensor, rows: te.Tensor, row_weights: te.Tensor, columns: te.Tensor, column_weights: te.Tensor
) -> te.Tensor:
    """Mix the rows and columns (axes 2 and 3) of `x` as tables of (taps, outputs) say."""
    height, width = int(rows.shape[1]), int(columns.shape[1])

    def value(n: Any, c: Any, h: Any, w: Any, *lane: Any) -> Any:
        total = None
        for a in range(int(rows.shape[0])):
            row = None
            for b in range(int(columns.shape[0])):
                read = x(n, c, rows(a, h), columns(b, w), *lane)
                term = read * column_weights(b, w) if int(columns.shape[0]) > 1 else read
                row = term if row is None else row + term
            row = row * row_weights(a, h) if int(rows.shape[0]) > 1 else row
            total = row if total is None else total + row
        return total

    return te.compute((x.shape[0], x.shape[1], height, width, *x.shape[4:]), value, name="resize")


def resize_axis(x: te.Tensor, index: te.Tensor, weight: te.Tensor, axis: int) -> te.Tensor:
    """Mix what lies along one axis of `x` as a table of (taps, outputs) says."""
    def value(*at: Any) -> Any:
        total = None
        for tap in range(int(index.shape[0])):
            read = x(*at[:axis], index(tap, at[axis]), *at[axis + 1 :])
            term = read * weight(tap, at[axis]) if int(index.shape[0]) > 1 else read
            total = term if total is None else total + term
        return total

    return te.compute((*x.shape[:axis], index.shape[1], *x.shape[axis + 1 :]), value, name="resize")


def _clamped(index: list[Array], weight: list[Array], given: int) -> Taps:
    inside = np.clip(np.stack(index), 0, given - 1).astype(np.int32)
    return Taps(inside, np.stack(weight).astype(np.float32))


def _cubic(distance: Array, a: float) -> Array:
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return np.where(distance <= 1, near, far)
