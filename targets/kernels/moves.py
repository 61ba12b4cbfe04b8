"""What brings values into regions, out of them, and from one layout of them to another."""

from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from targets.kernels.regions import Layout
from targets.kernels.sparse import ATTRS, argument, span


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
                square = T.alloc_buffer((lanes.bit_length() * lanes * lanes,), "float32", scope="local")
                for k in range(lanes):
                    place = places[vector * lanes + k]
                    value = source[span((block * (height * width) + tirx.max(place, 0)) * lanes, lanes)]
                    T.buffer_store(square, _if(place >= 0, value, lanes), [span(k * lanes, lanes)])
                for k, value in enumerate(_transposed(square, lanes)):
                    channel = block * lanes + k
                    _where(
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
                square = T.alloc_buffer((lanes.bit_length() * lanes * lanes,), "float32", scope="local")
                for k in range(lanes):
                    channel = block * lanes + k
                    first = (tirx.min(channel, channels - 1) * layout.down + row + layout.border[0]) * layout.across
                    value = source[span((1 + first + column + layout.border[1]) * lanes, lanes)]
                    T.buffer_store(square, _if(channel < channels, value, lanes), [span(k * lanes, lanes)])
                for k, value in enumerate(_transposed(square, lanes)):
                    place = places[(row * regions.columns + column) * lanes + k]
                    _where(
                        place >= 0, False, y, value, [span((block * (height * width) + place) * lanes, lanes)]
                    )
        return builder.get()


def _if(condition: Any, vector: Any, lanes: int) -> Any:
    """A vector under a scalar condition, else zero."""
    return tirx.Select(tirx.Broadcast(condition, lanes), vector, tirx.Broadcast(tirx.const(0, "float32"), lanes))


def _where(condition: Any, always: bool, buffer: Any, value: Any, at: list[Any]) -> None:
    """Emit a store that happens under a condition, or always."""
    if always:
        T.buffer_store(buffer, value, at)
        return
    with T.If(condition), T.Then():
        T.buffer_store(buffer, value, at)


def _transposed(square: Any, lanes: int) -> list[Any]:
    """Rows of the transpose of a buffer's first `lanes` vectors; it has room for log2(lanes) such squares more."""
    step, level = 1, 0
    while step < lanes:
        given, made = level * lanes * lanes, (level + 1) * lanes * lanes
        low = [k if not k & step else lanes + k - step for k in range(lanes)]
        high = [k + step if not k & step else lanes + k for k in range(lanes)]
        for row in (row for row in range(lanes) if not row & step):
            pair = [square[span(given + r * lanes, lanes)] for r in (row, row + step)]
            for target, order in ((row, low), (row + step, high)):
                mixed = tirx.Shuffle(pair, [tirx.const(k, "int32") for k in order])
                T.buffer_store(square, mixed, [span(made + target * lanes, lanes)])
        step, level = 2 * step, level + 1
    return [square[span(level * lanes * lanes + row * lanes, lanes)] for row in range(lanes)]
