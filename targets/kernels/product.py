"""Product of two computed matrices, batch by batch, as attention needs it: vectors of columns, rows in registers."""

from typing import Any

from tvm import s_tir, te, tirx

from profiles.device import Device
from targets.kernels.epilogue import gather_epilogue, store_by_vectors
from targets.kernels.tile import Tile, convolution_tile


def product(a_BMK: te.Tensor, b_BKN: te.Tensor, device: Device) -> te.Tensor:
    """(B, M, N); blocks of columns of `b` are laid out as vectors first, each once, by the task that needs them."""
    batch, rows, depth = (int(size) for size in a_BMK.shape)
    columns, lanes = int(b_BKN.shape[2]), device.vector_lanes
    blocks = -(-columns // lanes)
    tile = convolution_tile(device, blocks, 1, rows, most_blocks=16)
    _, padded = tile.padded(1, rows)
    k = te.reduce_axis((0, depth), "k")

    def first(o: Any) -> Any:
        """Where a block starts; the last one overlaps the one before, so that all of them are whole vectors."""
        return o * lanes if columns % lanes == 0 else tirx.min(o * lanes, max(columns - lanes, 0))

    def column(b: Any, o: Any, k: Any, lane: Any) -> Any:
        at = first(o) + lane
        return b_BKN(b, k, at if columns >= lanes else tirx.min(at, columns - 1))

    packed = te.compute((batch, blocks, depth, lanes), column, name="columns")

    def value(b: Any, o: Any, r: Any, lane: Any) -> Any:
        row = r if padded == rows else tirx.min(r, rows - 1)  # rows beyond the last are computed and never stored
        return te.sum(a_BMK(b, row, k) * packed(b, o, k, lane), axis=[k])

    attrs = tile.annotations("product") | {"method": "product", "macs": batch * rows * depth * columns}
    whole = te.compute((batch, blocks, padded, lanes), value, name="product", attrs=attrs)
    return te.compute(
        (batch, rows, columns), lambda b, r, n: whole(b, n // lanes, r, n - first(n // lanes)), name="crop"
    )


def schedule_product(s: s_tir.Schedule, anchor: Any) -> None:
    """A task is some blocks of columns of one matrix; the result is laid out row by row in a pass of its own."""
    tile = Tile.of(s.get(anchor).annotations)
    [columns] = s.get_producers(anchor)
    final = gather_epilogue(s, anchor, "global")
    b, o, r, lane, k = s.get_loops(anchor)
    o, oi = s.split(o, [None, tile.blocks])
    r, ri = s.split(r, [None, tile.columns])
    s.reorder(b, o, r, k, ri, oi, lane)
    task = s.fuse(b, o)
    copy = s.cache_write(anchor, 0, "local")
    s.reverse_compute_at(copy, r, preserve_unit_loops=True)
    s.compute_at(columns, task, preserve_unit_loops=True)
    s.parallel(task)
    s.unroll(ri)
    s.unroll(oi)
    s.vectorize(lane)
    store_by_vectors(s, copy, unrolled=2)
    *_, lane = s.get_loops(columns)
    lanes = int(s.get(lane).extent)
    s.vectorize(lane)
    s.decompose_reduction(anchor, k)
    *outer, n = s.get_loops(final)
    n, lane = s.split(n, [None, lanes])
    s.annotate(n, "pragma_loop_partition_hint", True)
    s.vectorize(lane)
    s.parallel(s.fuse(*outer))
