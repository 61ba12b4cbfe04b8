"""Convolution in blocked layout: a tile of outputs stays in registers, weights are read as vectors, inputs broadcast.

Source: Liu et al., "Optimizing CNN Model Inference on CPUs" (NeoCPU), USENIX ATC 2019, for the layout.
"""

from collections.abc import Mapping
from typing import Any

from tvm import s_tir, te

from targets.kernels.epilogue import gather_epilogue, pull_padding, store_by_vectors
from targets.kernels.tile import Tile
from targets.kernels.window import Window, padded_input


def convolution(
    x: te.Tensor, w_OIHWLL: te.Tensor, window: Window, height: int, width: int, tile: Tile, about: Mapping[str, Any]
) -> te.Tensor:
    """Output (N, O, height, width, L) of blocked `x`, or of planar (N, channels, H, W) with one-lane weights.

    Weights of a grouped convolution have fewer input blocks than `x`; each group's outputs are whole blocks. `about`
    goes onto the kernel's anchor.
    """
    blocks, in_blocks, kernel_h, kernel_w, in_lanes, lanes = (int(size) for size in w_OIHWLL.shape)
    blocks_per_group = blocks * in_blocks // int(x.shape[1])
    rows, columns = tile.padded(height, width)
    padded = padded_input(x, window, rows, columns, 0.0)
    i, kh, kw, il = (te.reduce_axis((0, size), name) for size, name in
                     ((in_blocks, "i"), (kernel_h, "kh"), (kernel_w, "kw"), (in_lanes, "il")))

    def value(n: Any, o: Any, h: Any, w: Any, ol: Any) -> Any:
        first = 0 if blocks_per_group == blocks else o // blocks_per_group * in_blocks
        lane = (il,) if len(padded.shape) == 5 else ()
        read = padded(n, first + i, *window.at(h, w, kh, kw), *lane)
        return te.sum(read * w_OIHWLL(o, i, kh, kw, il, ol), axis=[i, kh, kw, il])

    attrs = {**tile.annotations("convolution"), **about}
    whole = te.compute((x.shape[0], blocks, rows, columns, lanes), value, name="convolution", attrs=attrs)
    if (rows, columns) == (height, width):
        return whole
    return te.compute((x.shape[0], blocks, height, width, lanes), lambda *at: whole(*at), name="crop")


def schedule_convolution(s: s_tir.Schedule, anchor: Any) -> None:
    """Tile the anchor into registers; padding moves into the parallel task, the epilogue to where a tile is stored."""
    tile = Tile.of(s.get(anchor).annotations)
    final = gather_epilogue(s, anchor)
    n, o, h, w, ol, i, kh, kw, il = s.get_loops(anchor)
    share, o, oi = s.split(o, [tile.shares, None, tile.blocks])
    h, hc, hi = s.split(h, [None, tile.chunk, tile.rows])
    w, wi = s.split(w, [None, tile.columns])
    # Channel blocks innermost: an input value is broadcast once, used for every block, and its register is free again.
    s.reorder(n, h, share, o, hc, w, i, kh, kw, il, hi, wi, oi, ol)
    task = s.fuse(n, h, share)
    s.reverse_compute_at(final, w, preserve_unit_loops=True)
    pull_padding(s, anchor, task)
    s.parallel(task)  # before decompose_reduction, which would be refused after
    for loop in (hi, wi, oi):
        s.unroll(loop)
    s.vectorize(ol)
    store_by_vectors(s, final, unrolled=3)
    s.decompose_reduction(anchor, i)
