"""Transposed convolution as plain convolution: each phase of the output grid is one, and the phases are interleaved.

With stride s, output u = s * v + r (counted with padding) sums x[v - t] * w[r + s * t] over t: a stride-1 convolution
of ceil(kernel / s) taps for each of the s phases r of an axis. No multiplication by an inserted zero is left.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te

from targets.base import Array
from targets.kernels.window import Window


@dataclass(frozen=True, slots=True)
class Phases:
    """One axis of a transposed convolution: `outputs` values at `stride`, `padding` cut off before the first."""

    kernel: int
    stride: int
    padding: int
    outputs: int

    @property
    def taps(self) -> int:
        """Kernel size of each phase."""
        return -(-self.kernel // self.stride)

    @property
    def first(self) -> int:
        """The smallest v."""
        return self.padding // self.stride

    @property
    def count(self) -> int:
        """How many v there are."""
        return (self.padding + self.outputs - 1) // self.stride - self.first + 1


def phase_window(rows: Phases, columns: Phases) -> Window:
    """The window of the plain convolution; padding after the end follows from the output size."""
    padding = (rows.taps - 1 - rows.first, columns.taps - 1 - columns.first, 0, 0)
    return Window((rows.taps, columns.taps), padding=padding)


def phase_weights(weights_IOHW: Array, groups: int, rows: Phases, columns: Phases) -> Array:
    """(phases * outputs, inputs, taps, taps): phases row-major, a group's zeros written out."""
    inputs, out_each = weights_IOHW.shape[:2]
    whole = np.zeros((inputs, groups * out_each, rows.taps * rows.stride, columns.taps * columns.stride), np.float32)
    for group in range(groups):
        part = slice(group * inputs // groups, (group + 1) * inputs // groups)
        whole[part, group * out_each : (group + 1) * out_each, : rows.kernel, : columns.kernel] = weights_IOHW[part]
    split = whole.reshape(inputs, -1, rows.taps, rows.stride, columns.taps, columns.stride)[:, :, ::-1, :, ::-1]
    return split.transpose(3, 5, 1, 0, 2, 4).reshape(-1, inputs, rows.taps, columns.taps)


def interleave(x: te.Tensor, rows: Phases, columns: Phases) -> te.Tensor:
    """(N, C, outputs, outputs, L) from the phases of (N, phases * C, count, count, L)."""
    n, blocks, _, _, lanes = (int(size) for size in x.shape)
    channels = blocks // (rows.stride * columns.stride)

    def value(n: Any, c: Any, h: Any, w: Any, lane: Any) -> Any:
        at_h, at_w = h + rows.padding, w + columns.padding
        phase = at_h % rows.stride * columns.stride + at_w % columns.stride
        v_h, v_w = at_h // rows.stride - rows.first, at_w // columns.stride - columns.first
        return x(n, phase * channels + c, v_h, v_w, lane)

    return te.compute((n, channels, rows.outputs, columns.outputs, lanes), value, name="interleave")
