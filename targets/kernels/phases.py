"""A strided convolution as one of stride 1 over the phases of its input: every s-th row and column is a picture.

With stride s and padding p, output u reads inputs s * u + k - p; element k of the kernel falls on phase (k - p) mod s,
and within it on pixel u + floor((k - p) / s). Planar input becomes blocked on the way.
"""

from typing import Any

import numpy as np
from tvm import te, tirx

from targets.base import Array
from targets.kernels.window import Window, padded_input


def phase_window(window: Window) -> Window:
    """The window over phases; padding after the end follows from the output size."""
    before, taps = [], []
    for size, stride, padding in zip(window.kernel, window.strides, window.padding[:2], strict=True):
        before.append(-(-padding // stride))
        taps.append((size - 1 - padding) // stride + before[-1] + 1)
    return Window((taps[0], taps[1]), padding=(*before, 0, 0))


def phase_blocks(source: tuple[int, ...], window: Window, lanes: int) -> tuple[int, int]:
    """Blocks of channels, and how many lanes of them carry any, of the phases of blocked or planar `source`."""
    count = window.strides[0] * window.strides[1]
    if len(source) == 5:
        return count * source[1], lanes
    channels = count * source[1]
    return -(-channels // lanes), min(channels, lanes)


def phase_weights(packed_OIHWLL: Array, window: Window, blocks: int, lanes: int) -> Array:
    """Packed weights over phases: (O, blocks, taps, taps, lanes, L) of (O, I, kernel h, kernel w, input lanes, L)."""
    down, across = window.strides
    inner = phase_window(window)
    first = [inner.padding[axis] * window.strides[axis] - window.padding[axis] for axis in (0, 1)]
    outs, ins, _, _, in_lanes, out_lanes = packed_OIHWLL.shape
    taps = inner.kernel
    spread = np.zeros((outs, ins, taps[0] * down, taps[1] * across, in_lanes, out_lanes), packed_OIHWLL.dtype)
    spread[:, :, first[0] : first[0] + window.kernel[0], first[1] : first[1] + window.kernel[1]] = packed_OIHWLL
    split = spread.reshape(outs, ins, taps[0], down, taps[1], across, in_lanes, out_lanes)
    by_channel = split.transpose(0, 3, 5, 1, 6, 2, 4, 7).reshape(outs, -1, *taps, out_lanes)
    found = np.zeros((outs, blocks * lanes, *taps, out_lanes), packed_OIHWLL.dtype)
    found[:, : by_channel.shape[1]] = by_channel
    return found.reshape(outs, blocks, lanes, *taps, out_lanes).transpose(0, 1, 3, 4, 2, 5)


def padded_phases(x: te.Tensor, window: Window, height: int, width: int, lanes: int) -> te.Tensor:
    """(N, blocks, rows, columns, lanes): phases with the padding that height x width outputs read."""
    inner, (down, across) = phase_window(window), window.strides
    if (down, across) == (1, 1) and len(x.shape) == 5:
        return padded_input(x, inner, height, width, 0.0)
    shape = tuple(int(size) for size in x.shape)
    blocks, _ = phase_blocks(shape, window, lanes)

    def value(n: Any, b: Any, h: Any, w: Any, lane: Any) -> Any:
        channel = b if len(shape) == 5 else b * lanes + lane
        phase, c = channel // shape[1], channel % shape[1]
        row = (h - inner.padding[0]) * down + phase // across
        column = (w - inner.padding[1]) * across + phase % across
        inside = [row >= 0, row < shape[2], column >= 0, column < shape[3]]
        if len(shape) == 4 and blocks * lanes > down * across * shape[1]:
            inside.insert(0, channel < down * across * shape[1])
        read = x(n, c, row, column, *(lane,) * (len(shape) - 4))
        return tirx.if_then_else(tirx.all(*inside), read, tirx.const(0, x.dtype))

    sizes = inner.reach(height, 0), inner.reach(width, 1)
    return te.compute((shape[0], blocks, *sizes, lanes), value, name="pad")
