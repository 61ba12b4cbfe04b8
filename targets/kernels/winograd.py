"""Winograd convolution in blocked layout: fewer multiplications for a few more additions.

A tile of m x m outputs of an r x r kernel takes (m + r - 1)^2 products a pair of channels instead of r^2 m^2. Source:
Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. A strided convolution is one over the
phases of its input. An input that is not finite makes whole tiles NaN, where the definition makes single outputs NaN or
infinite.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np
from tvm import s_tir, te, tirx

from targets.base import Array
from targets.kernels.epilogue import gather_epilogue, pull_padding, store_by_vectors
from targets.kernels.phases import padded_phases
from targets.kernels.tile import Tile
from targets.kernels.window import Window


@dataclass(frozen=True, slots=True)
class Transforms:
    """The matrices of F(m x m, r x r), all acting on columns: of inputs, of weights and of sums."""

    outputs: int
    kernel: int
    of_inputs: Array
    of_weights: Array
    of_sums: Array

    @property
    def size(self) -> int:
        """Rows and columns of a tile of inputs."""
        return self.outputs + self.kernel - 1


def transforms(kernel: int, points: Sequence[float]) -> Transforms:
    """Cook's and Toom's construction: polynomials are multiplied at `points` and at infinity."""
    count, outputs = len(points), len(points) + 2 - kernel
    inverse = [prod(point - other for other in points if other != point) for point in points]
    infinity = np.zeros((1, kernel))
    infinity[0, -1] = 1
    of_weights = np.vander(points, kernel, increasing=True) / np.array(inverse)[:, None]
    of_sums = np.vander([*points], outputs, increasing=True).T
    of_sums = np.hstack([of_sums, np.eye(len(of_sums))[:, -1:]])
    rows = [np.poly([other for other in points if other != point])[::-1] for point in points]
    of_inputs = np.zeros((count + 1, count + 1))
    for index, row in enumerate([*rows, np.poly(points)[::-1]]):
        of_inputs[index, : len(row)] = row
    return Transforms(outputs, kernel, of_inputs, np.vstack([of_weights, infinity]), of_sums)


# The first need no multiplications; the others keep rounding errors 2.5 times smaller than 0, 1, -1, 2, -2 would.
_POINTS = (0.0, 1.0, -1.0), (0.0, 0.75, -0.75, 1.5, -1.5)


def transforms_for(kernel: int) -> tuple[Transforms, ...]:
    """What is at hand for a kernel of such a size, of tiles of at least 2 x 2 outputs."""
    return tuple(transforms(kernel, points) for points in _POINTS if 2 <= kernel <= len(points))


def winograd_weights(packed: Array, transforms: Transforms) -> Array:
    """Weights (O, I, r, r, i, o) packed in blocks as (tile row, tile column, O, I, i, o)."""
    transform = transforms.of_weights
    made = np.einsum("ah,oihwxy,bw->aboixy", transform, packed.astype(np.float64), transform, optimize=True)
    return np.ascontiguousarray(made, np.float32)


def winograd(
    x: te.Tensor, u_AAOILL: te.Tensor, matrices: Transforms, window: Window, height: int, width: int, tile: Tile,
    about: Mapping[str, Any],
) -> te.Tensor:
    """Output (N, O, height, width, L) of blocked or planar `x` and transformed weights over its phases.

    Args:
        tile: sums of `rows` x `columns` tiles of `blocks` channel blocks in registers.
        about: goes onto the kernel's anchor.
    """
    size, _, blocks, in_blocks, in_lanes, lanes = (int(extent) for extent in u_AAOILL.shape)
    images, a = int(x.shape[0]), matrices.outputs
    down, across = tiles_of(a, height, width, tile)
    padded = padded_phases(x, window, down * a, across * a, lanes)
    by_rows = te.compute(
        (images, in_blocks, down, across, size, size, lanes),
        lambda n, i, y, z, r, c, lane: _combined(
            matrices.of_inputs, r, lambda k: padded(n, i, y * a + k, z * a + c, lane)
        ),
        name="input_rows",
    )
    spread = te.compute(
        (images, size, size, in_blocks, down, across, lanes),
        lambda n, r, c, i, y, z, lane: _combined(matrices.of_inputs, c, lambda k: by_rows(n, i, y, z, r, k, lane)),
        name="spread",
    )
    i, il = te.reduce_axis((0, in_blocks), "i"), te.reduce_axis((0, in_lanes), "il")
    sums = te.compute(
        (images, size, size, blocks, down, across, lanes),
        lambda n, r, c, o, y, z, ol: te.sum(spread(n, r, c, i, y, z, il) * u_AAOILL(r, c, o, i, il, ol), axis=[i, il]),
        name="sums",
    )
    sum_rows = te.compute(
        (images, blocks, down, across, a, size, lanes),
        lambda n, o, y, z, r, c, lane: _combined(matrices.of_sums, r, lambda k: sums(n, k, c, o, y, z, lane)),
        name="sum_rows",
    )
    whole = te.compute(
        (images, blocks, down * a, across * a, lanes),
        lambda n, o, h, w, lane: _combined(
            matrices.of_sums, w % a, lambda k: sum_rows(n, o, h // a, w // a, h % a, k, lane)
        ),
        name="winograd",
        attrs={**tile.annotations("winograd"), "outputs": a, "planar": len(x.shape) == 4, **about},
    )
    if (down * a, across * a) == (height, width):
        return whole
    return te.compute((images, blocks, height, width, lanes), lambda *at: whole(*at), name="crop")


def tiles_of(outputs: int, height: int, width: int, tile: Tile) -> tuple[int, int]:
    """Rows and columns of tiles of m x m outputs, rounded up to whole tasks."""
    down, across = tile.padded(ceil(height / outputs), ceil(width / outputs))
    task = tile.rows * tile.chunk
    return ceil(down / task) * task, across


def schedule_winograd(s: s_tir.Schedule, anchor: Any) -> None:
    """A task transforms some rows of tiles, multiplies, and transforms back; all between stays in its cache."""
    annotations = s.get(anchor).annotations
    tile, m = Tile.of(annotations), int(annotations["outputs"])
    [sum_rows] = s.get_producers(anchor)
    [sums] = s.get_producers(sum_rows)
    [spread] = s.get_producers(sums)
    [input_rows] = s.get_producers(spread)
    final = gather_epilogue(s, anchor)
    n, o, h, w, lane = s.get_loops(anchor)
    share, o = s.split(o, [tile.shares, None])
    h, hc, hi = s.split(h, [None, tile.chunk * tile.rows, m])
    w, wi = s.split(w, [None, m])
    s.reorder(n, h, share, o, hc, w, hi, wi, lane)
    task = s.fuse(n, h, share)
    s.reverse_compute_at(final, w, preserve_unit_loops=True)
    s.compute_at(sum_rows, w, preserve_unit_loops=True)
    s.set_scope(sum_rows, 0, "local")
    s.compute_at(sums, task, preserve_unit_loops=True)
    s.compute_at(spread, task, preserve_unit_loops=True)
    *_, r, c, i, y, z, il = s.get_loops(spread)
    s.reorder(i, y, z, r, c, il)
    s.compute_at(input_rows, z, preserve_unit_loops=True)
    s.set_scope(input_rows, 0, "local")
    pull_padding(s, input_rows, task, planar=bool(annotations["planar"]))
    s.parallel(task)
    for block, count in ((input_rows, 2), (spread, 2), (sum_rows, 2)):
        store_by_vectors(s, block, unrolled=count)
    for loop in (hi, wi):
        s.unroll(loop)
    s.vectorize(lane)
    store_by_vectors(s, final, unrolled=2)
    *_, r, c, o, y, z, lane, i, il = s.get_loops(sums)
    o, oi = s.split(o, [None, tile.blocks])
    y, yi = s.split(y, [None, tile.rows])
    z, zi = s.split(z, [None, tile.columns])
    s.reorder(r, c, o, y, z, i, il, yi, zi, oi, lane)
    copy = s.cache_write(sums, 0, "local")
    s.reverse_compute_at(copy, z, preserve_unit_loops=True)
    for loop in (yi, zi, oi):
        s.unroll(loop)
    s.vectorize(lane)
    store_by_vectors(s, copy, unrolled=3)
    s.decompose_reduction(sums, i)


def _combined(matrix: Array, row: Any, term: Callable[[int], Any]) -> Any:
    """Row `row` of `matrix` times terms; rows become constants once loops are unrolled, and zeros vanish."""
    choices = [_sum(matrix[index], term) for index in range(len(matrix))]
    value = choices[-1]
    for index in reversed(range(len(choices) - 1)):
        value = tirx.Select(row == index, choices[index], value)
    return value


def _sum(factors: Sequence[float], term: Callable[[int], Any]) -> Any:
    """Fused multiply-adds, zeros left out."""
    total = None
    for k, factor in enumerate(factors):
        if abs(factor) == 1:
            one = term(k) if factor > 0 else -term(k)
            total = one if total is None else total + term(k) if factor > 0 else total - term(k)
        elif factor:
            one = term(k) * tirx.const(factor, "float32")
            total = one if total is None else total + one
    return total
