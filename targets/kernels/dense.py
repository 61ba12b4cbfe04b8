"""Matrix product with constant weights, any number of outputs: vectors of outputs, or vectors of inputs for a few."""

from typing import Any

from tvm import s_tir, te, tirx

from profiles.device import Device
from targets.kernels.epilogue import gather_epilogue, store_by_vectors
from targets.kernels.tile import Tile, convolution_tile


def dense(x_RK: te.Tensor, w_OKL: te.Tensor, outputs: int, device: Device) -> te.Tensor:
    """(R, outputs) from R rows and weights packed in blocks of L outputs, the last block filled up with zeros."""
    rows, depth = (int(size) for size in x_RK.shape)
    blocks, _, lanes = (int(size) for size in w_OKL.shape)
    tile = convolution_tile(device, blocks, 1, rows, most_blocks=16)
    _, padded = tile.padded(1, rows)
    k = te.reduce_axis((0, depth), "k")

    def value(r: Any, o: Any, lane: Any) -> Any:
        row = r if padded == rows else tirx.min(r, rows - 1)  # rows beyond the last are computed and never stored
        return te.sum(x_RK(row, k) * w_OKL(o, k, lane), axis=[k])

    attrs = tile.annotations("dense") | {"method": "dense", "macs": rows * depth * outputs}
    whole = te.compute((padded, blocks, lanes), value, name="dense", attrs=attrs)
    return te.compute((rows, outputs), lambda r, o: whole(r, o // lanes, o % lanes), name="crop")


def narrow_dense(x_RK: te.Tensor, w_OKL: te.Tensor) -> te.Tensor:
    """(R, O) for fewer outputs than lanes: weights (O, depth / L, L), the depth's last block filled up with zeros."""
    rows, depth = (int(size) for size in x_RK.shape)
    outputs, blocks, lanes = (int(size) for size in w_OKL.shape)
    if depth != blocks * lanes:
        given = x_RK
        x_RK = te.compute(
            (rows, blocks * lanes),
            lambda r, k: tirx.if_then_else(k < depth, given(r, tirx.min(k, depth - 1)), tirx.const(0, given.dtype)),
            name="pad",
        )
    k = te.reduce_axis((0, blocks), "k")
    lane = te.reduce_axis((0, lanes), "lane")
    partial = te.compute(
        (rows, outputs, lanes),
        lambda r, o, at: te.sum(x_RK(r, k * lanes + at) * w_OKL(o, k, at), axis=[k]),
        name="narrow_dense",
        attrs={"kernel": "narrow_dense", "method": "dense", "macs": rows * depth * outputs},
    )
    return te.compute((rows, outputs), lambda r, o: te.sum(partial(r, o, lane), axis=[lane]), name="across")


def schedule_dense(s: s_tir.Schedule, anchor: Any) -> None:
    """Rows by output blocks in registers, one tile a parallel task.

    The epilogue stores a tile from its registers where rows of outputs are whole vectors; where they are not, it is a
    pass of its own, from cache.
    """
    tile = Tile.of(s.get(anchor).annotations)
    outputs, lanes = int(s.get(s.get_loops(_last(s, anchor))[-1]).extent), int(s.get(s.get_loops(anchor)[2]).extent)
    whole = outputs % lanes == 0
    final = gather_epilogue(s, anchor, "local" if whole else "global")
    r, o, lane, k = s.get_loops(anchor)
    r, ri = s.split(r, [None, tile.columns])
    o, oi = s.split(o, [None, tile.blocks])
    s.reorder(o, r, k, ri, oi, lane)
    copy = final if whole else s.cache_write(anchor, 0, "local")
    s.reverse_compute_at(copy, r, preserve_unit_loops=True)
    s.parallel(s.fuse(o, r))
    s.unroll(ri)
    s.unroll(oi)
    s.vectorize(lane)
    if whole:
        _, lane = s.split(s.get_loops(copy)[-1], [None, lanes])
    store_by_vectors(s, copy, unrolled=2)
    s.decompose_reduction(anchor, k)
    if not whole:
        s.parallel(s.get_loops(final)[0])


def _last(s: s_tir.Schedule, block: Any) -> Any:
    """The block that stores what a kernel makes."""
    while consumers := s.get_consumers(block):
        block = consumers[0]
    return block


def schedule_narrow_dense(s: s_tir.Schedule, anchor: Any) -> None:
    """All outputs of a row accumulate as vectors, one row a parallel task; then each vector is summed."""
    across = s.get_consumers(anchor)[0]
    gather_epilogue(s, across, "global")
    row = s.get_loops(across)[0]
    s.compute_at(anchor, row, preserve_unit_loops=True)
    s.set_scope(anchor, 0, "local")
    *_, o, lane, k = s.get_loops(anchor)
    s.reorder(k, o, lane)
    s.parallel(row)
    s.unroll(o)
    s.vectorize(lane)
    s.decompose_reduction(anchor, k)
