"""What brings values from one layout to another: planes, blocks of channels, and regions."""

from collections.abc import Sequence
from math import prod

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from targets.kernels.regions import Layout
from targets.kernels.sparse import ATTRS
from targets.kernels.vectors import argument, room, select, span, store_where, transposed

_PIECES = 16  # of a plane, at most, that cores share out


def regroup(
    source_shape: tuple[int, ...], base: int, stride: int, channels: int, places_shape: tuple[int, int]
) -> tirx.PrimFunc:
    """(source, places, y): each lane takes its own value of the source; for forms whose lanes lie apart.

    Args:
        base, stride: channel c of the source starts at base + c * stride.
        places_shape: (vectors, lanes) of the places, which are counted from a channel's start, -1 for zero.
    """
    vectors, lanes = places_shape
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("regroup")
            T.func_attr(ATTRS)
            given = T.arg("source", T.buffer(source_shape, "float32"))
            places = argument("places", vectors * lanes, "int32")
            y = argument("y", (channels * vectors + 2) * lanes)
            with T.sblock("root"), T.parallel(0, channels) as channel, T.serial(0, vectors) as vector:
                source = T.decl_buffer((prod(source_shape),), "float32", data=given.data)
                with T.vectorized(0, lanes) as lane:
                    place = places[vector * lanes + lane]
                    value = source[base + channel * stride + tirx.max(place, 0)]
                    kept = tirx.Select(place >= 0, value, tirx.const(0, "float32"))
                    T.buffer_store(y, kept, [(1 + channel * vectors + vector) * lanes + lane])
        return builder.get()


def shift(source_size: int, stride: int, channels: int, vectors: int, lanes: int) -> tirx.PrimFunc:
    """(source, starts, masks, y): each vector is a span of the source, lanes that do not count zero."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("shift")
            T.func_attr(ATTRS)
            source, starts = argument("source", source_size), argument("starts", vectors, "int32")
            masks = argument("masks", vectors * lanes, "int32")
            y = argument("y", (channels * vectors + 2) * lanes)
            with T.sblock("root"), T.parallel(0, channels) as channel, T.serial(0, vectors) as vector:
                read = source[span(lanes + channel * stride + starts[vector], lanes)]
                counts = masks[span(vector * lanes, lanes)] > tirx.Broadcast(tirx.const(0, "int32"), lanes)
                kept = tirx.Select(counts, read, tirx.Broadcast(tirx.const(0, "float32"), lanes))
                T.buffer_store(y, kept, [span((1 + channel * vectors + vector) * lanes, lanes)])
        return builder.get()


def ungroup(layout: Layout, channels: int) -> tirx.PrimFunc:
    """(source, y): regions as a plain plane, (1, channels, height, width)."""
    regions = layout.regions
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("ungroup")
            T.func_attr(ATTRS | {"layout": "plain"})
            source = argument("source", layout.size(channels))
            y = T.arg("y", T.buffer((1, channels, regions.height, regions.width), "float32"))
            plane = T.serial(0, regions.height), T.serial(0, regions.width)
            with T.sblock("root"), T.parallel(0, channels) as channel, plane[0] as row, plane[1] as column:
                lane = row // regions.rows * regions.grid_columns + column // regions.columns
                down, across = row % regions.rows + layout.border[0], column % regions.columns + layout.border[1]
                place = (1 + (channel * layout.down + down) * layout.across + across) * regions.lanes + lane
                T.buffer_store(y, source[place], [0, channel, row, column])
        return builder.get()


def group_blocks(channels: int, height: int, width: int, places_shape: tuple[int, int]) -> tirx.PrimFunc:
    """(source, places, y): blocked values into vectors over pixels, `lanes` pixels by `lanes` channels at a time.

    Args:
        places_shape: (vectors, lanes) of the places, pixels of the plane row by row, -1 for zero.
    """
    vectors, lanes = places_shape
    blocks = -(-channels // lanes)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("group_blocks")
            T.func_attr(ATTRS)
            given = T.arg("source", T.buffer((1, blocks, height, width, lanes), "float32"))
            places = argument("places", vectors * lanes, "int32")
            y = argument("y", (channels * vectors + 2) * lanes)
            with T.sblock("root"), T.parallel(0, blocks) as block, T.serial(0, vectors) as vector:
                source = T.decl_buffer((blocks * height * width * lanes,), "float32", data=given.data)
                square = room(lanes)
                for k in range(lanes):
                    place = places[vector * lanes + k]
                    value = source[span((block * (height * width) + tirx.max(place, 0)) * lanes, lanes)]
                    T.buffer_store(square, select(place >= 0, value, lanes), [span(k * lanes, lanes)])
                for k, value in enumerate(transposed(square, lanes)):
                    channel = block * lanes + k
                    store_where(
                        channel < channels, (k + 1) <= channels - (blocks - 1) * lanes,
                        y, value, [span((1 + channel * vectors + vector) * lanes, lanes)],
                    )
        return builder.get()


def ungroup_blocks(layout: Layout, channels: int) -> tirx.PrimFunc:
    """(source, places, y): regions into blocked values; places are the pixels of an own vector's lanes, -1 for none."""
    regions = layout.regions
    lanes, height, width = regions.lanes, regions.height, regions.width
    blocks = -(-channels // lanes)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("ungroup_blocks")
            T.func_attr(ATTRS | {"layout": "blocked"})
            source = argument("source", layout.size(channels))
            places = argument("places", regions.positions * lanes, "int32")
            made = T.arg("y", T.buffer((1, blocks, height, width, lanes), "float32"))
            loops = T.serial(0, regions.rows), T.serial(0, regions.columns)
            with T.sblock("root"), T.parallel(0, blocks) as block, loops[0] as row, loops[1] as column:
                y = T.decl_buffer((blocks * height * width * lanes,), "float32", data=made.data)
                square = room(lanes)
                for k in range(lanes):
                    channel = block * lanes + k
                    first = (tirx.min(channel, channels - 1) * layout.down + row + layout.border[0]) * layout.across
                    value = source[span((1 + first + column + layout.border[1]) * lanes, lanes)]
                    T.buffer_store(square, select(channel < channels, value, lanes), [span(k * lanes, lanes)])
                for k, value in enumerate(transposed(square, lanes)):
                    place = places[(row * regions.columns + column) * lanes + k]
                    store_where(
                        place >= 0, False, y, value, [span((block * (height * width) + place) * lanes, lanes)]
                    )
        return builder.get()


def unblock_squares(shape: tuple[int, ...], segments: Sequence[int]) -> tirx.PrimFunc:
    """(source, y): blocked values as planes, as `layout.unblock` does; a plane has at least as many pixels as lanes.

    Where pixels are no multiple of the lanes the last square overlaps the one before, which writes the same there.
    """
    images, blocks, height, width, lanes = shape
    plane, channels = height * width, sum(segments)
    squares = -(-plane // lanes)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("unblock")
            T.func_attr(ATTRS | {"layout": "plain"})
            given = T.arg("source", T.buffer(shape, "float32"))
            made = T.arg("y", T.buffer((images, channels, height, width), "float32"))
            with T.sblock("root"):
                block = channel = 0
                for size in segments:
                    count = -(-size // lanes)
                    pieces = next(piece for piece in range(min(squares, _PIECES), 0, -1) if squares % piece == 0)
                    tasks = T.parallel(0, images * count * pieces), T.serial(0, squares // pieces)
                    with tasks[0] as task, tasks[1] as step:
                        source = T.decl_buffer((prod(shape),), "float32", data=given.data)
                        y = T.decl_buffer((images * channels * plane,), "float32", data=made.data)
                        one, image = task // pieces % count, task // pieces // count
                        first = tirx.min((task % pieces * (squares // pieces) + step) * lanes, plane - lanes)
                        square = room(lanes)
                        start = (image * blocks + block + one) * plane + first
                        for k in range(lanes):
                            T.buffer_store(square, source[span((start + k) * lanes, lanes)], [span(k * lanes, lanes)])
                        rows = transposed(square, lanes)[: size if count == 1 else lanes]
                        for k, value in enumerate(rows):
                            at = (image * channels + channel + one * lanes + k) * plane + first
                            whole = k + 1 <= size - (count - 1) * lanes
                            store_where(one * lanes + k < size, whole, y, value, [span(at, lanes)])
                    block, channel = block + count, channel + size
        return builder.get()
