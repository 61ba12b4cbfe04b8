"""Kernels that slide over each channel alone: depthwise convolution, maximum and average pooling, blocked layout."""

from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from tvm import s_tir, te, tirx

from profiles.device import Device
from targets.kernels.epilogue import gather_epilogue, pull_padding, store_by_vectors
from targets.kernels.tile import Tile, sliding_tile
from targets.kernels.window import Window, padded_input

_LOWEST = float(np.finfo(np.float32).min)


def depthwise(x: te.Tensor, w_CHWL: te.Tensor, window: Window, height: int, width: int, device: Device) -> te.Tensor:
    """Each channel of (N, C, H, W, L) by its own kernel."""
    outputs = int(x.shape[0]) * int(x.shape[1]) * int(x.shape[4]) * height * width
    about = {"method": "depthwise", "macs": outputs * prod(window.kernel)}
    return _slide(x, window, height, width, device, 0.0, te.sum, lambda read, *at: read * w_CHWL(*at), about)


def max_pool(x: te.Tensor, window: Window, height: int, width: int, device: Device) -> te.Tensor:
    """Largest value under the window; padding never wins."""
    return _slide(x, window, height, width, device, _LOWEST, te.max, lambda read, *_: read)


def sum_pool(x: te.Tensor, window: Window, height: int, width: int, device: Device) -> te.Tensor:
    """Sum of the values under the window; the caller divides by how many there are."""
    return _slide(x, window, height, width, device, 0.0, te.sum, lambda read, *_: read)


def _slide(
    x: te.Tensor, window: Window, height: int, width: int, device: Device, fill: float,
    reduce: Callable[..., Any], term: Callable[..., Any], about: Mapping[str, Any] = MappingProxyType({}),
) -> te.Tensor:
    tile = sliding_tile(device, height, width, int(x.shape[0]) * int(x.shape[1]))
    _, columns = tile.padded(height, width)
    padded = padded_input(x, window, height, columns, fill)
    clamped = padded is not x and fill == _LOWEST and set(window.dilation) == {1}
    padded = x if clamped else padded
    kh, kw = (te.reduce_axis((0, size), name) for size, name in zip(window.kernel, ("kh", "kw"), strict=True))

    def value(n: Any, c: Any, h: Any, w: Any, lane: Any) -> Any:
        row, column = window.at(h, w, kh, kw)
        if clamped:  # the pixel at the border is in every window that reaches beyond it: seen twice, it is no larger
            row = tirx.max(tirx.min(row - window.padding[0], int(x.shape[2]) - 1), 0)
            column = tirx.max(tirx.min(column - window.padding[1], int(x.shape[3]) - 1), 0)
        return reduce(term(padded(n, c, row, column, lane), c, kh, kw, lane), axis=[kh, kw])

    attrs = {**tile.annotations("sliding"), **about}
    whole = te.compute((x.shape[0], x.shape[1], height, columns, x.shape[4]), value, name="sliding", attrs=attrs)
    if columns == width:
        return whole
    return te.compute((x.shape[0], x.shape[1], height, width, x.shape[4]), lambda *at: whole(*at), name="crop")


def schedule_sliding(s: s_tir.Schedule, anchor: Any) -> None:
    """A row of outputs stays in registers; one parallel task is a channel block's rows, or some of them."""
    tile = Tile.of(s.get(anchor).annotations)
    final = gather_epilogue(s, anchor)
    n, c, h, w, lane, kh, kw = s.get_loops(anchor)
    h, hi = s.split(h, [None, tile.chunk])
    w, wi = s.split(w, [None, tile.columns])
    s.reorder(n, c, h, hi, w, kh, kw, wi, lane)
    task = s.fuse(n, c, h)
    s.reverse_compute_at(final, w, preserve_unit_loops=True)
    pull_padding(s, anchor, task)
    s.parallel(task)
    s.unroll(wi)
    if int(s.get(kw).extent) * tile.columns <= 64:
        s.unroll(kw)
    s.vectorize(lane)
    store_by_vectors(s, final, unrolled=1)
    s.decompose_reduction(anchor, kh)


def window_counts(window: Window, size: tuple[int, ...], outputs: tuple[int, ...], include_pad: bool) -> Any:
    """How many values each output of an average divides by: float32 (height, width).

    With `include_pad` those of the padding count, but never those a ceiling put beyond it.
    """
    counts = []
    for axis, (given, count) in enumerate(zip(size, outputs, strict=True)):
        before, after = window.padding[axis], window.padding[axis + 2]
        low, high = (-before, given + after) if include_pad else (0, given)
        first = np.arange(count) * window.strides[axis] - before
        taps = first[:, None] + np.arange(window.kernel[axis])[None] * window.dilation[axis]
        counts.append(((taps >= low) & (taps < high)).sum(1))
    return np.outer(*counts).astype(np.float32)
