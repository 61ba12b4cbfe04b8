"""Convolution with scattered zero weights, over regions: only what is not zero is loaded, multiplied and added.

Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, for sparse weights against dense activations with vectors over
positions; lanes over regions, instead of over neighbours, keep every shifted read aligned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from profiles.device import Device
from targets.base import Array
from targets.kernels.regions import Regions
from targets.kernels.window import Window

_OTHER_REGISTERS = 4  # beside the accumulators: the weight, and what the compiler needs to move values
_IN_FLIGHT = 8  # accumulators that keep two multiply-adds a cycle busy while each takes four
_NEAREST_BYTES = 32 << 10  # what a core's nearest cache holds, next to weights, on any processor of the last decade
_NEAR, _FAR = 0.75, 1.4  # cycles of a multiply-add that reads from the nearest cache, and from the one behind it
_TURN_CYCLES = 20  # of leaving a loop at a time the processor did not foresee
_ATTRS = {"layout": "regions", "op_pattern": 8, "tirx.noalias": True, "scheduled": True}  # 8: FuseOps leaves it alone


@dataclass(frozen=True, slots=True)
class SparseConvolution:
    """What a kernel is generated for; a picture at a time.

    Attributes:
        inputs: channels of the input, which lies as `regions` and the window ask for, border included.
        regions: of the outputs.
        steps: what follows bias and residual sum, in order: ("max" or "min", bound).
        residual: whether a tensor of the outputs' shape is added.
        chunk: input channels that are added to all outputs of a tile before the next ones are; sums wait in the output.
            All of them, until `chunked` says otherwise.
    """

    inputs: int
    outputs: int
    regions: Regions
    window: Window
    steps: tuple[tuple[str, float], ...] = ()
    residual: bool = False
    chunk: int = 1 << 30

    @property
    def down(self) -> int:
        """Rows of an input region with its border."""
        return self.window.reach(self.regions.rows, 0)

    @property
    def across(self) -> int:
        """Columns of an input region with its border."""
        return self.window.reach(self.regions.columns, 1)

    @property
    def input_size(self) -> int:
        """Values of the flat input, slack included."""
        return (self.inputs * self.down * self.across + 2) * self.regions.lanes

    @property
    def chunks(self) -> int:
        """How often a tile's outputs are visited."""
        return -(-self.inputs // self.chunk)

    def tile(self, device: Device) -> tuple[int, int]:
        """Most rows and columns of a region whose sums fit into registers."""
        most = device.vector_registers - _OTHER_REGISTERS
        columns = _even(self.regions.columns, most)
        return _even(self.regions.rows, max(1, most // columns)), columns

    def chunked(self, nonzeros: int, device: Device) -> "SparseConvolution":
        """The same with the chunk that should take the fewest cycles: near reads, or few visits to the outputs."""
        rows, columns = self.tile(device)
        channel = 4 * self.regions.lanes * self.window.reach(rows, 0) * self.window.reach(columns, 1)

        def cycles(chunk: int) -> float:
            visits = (-(-self.inputs // chunk) - 1) * self.outputs  # beyond the first of each output
            each = 2 * _FAR + _TURN_CYCLES / (rows * columns)
            return nonzeros * (_NEAR if chunk * channel <= _NEAREST_BYTES else _FAR) + visits * each

        near = max(1, min(self.inputs, _NEAREST_BYTES // channel))
        return replace(self, chunk=min((self.inputs, near), key=cycles))

    def weights(self, weights_OIHW: Array) -> tuple[Array, Array, Array]:
        """Where the nonzeros of each (chunk, output) start and the last ones end, their places in x, their values."""
        o, i, kh, kw = np.nonzero(weights_OIHW)
        visit = i // self.chunk * self.outputs + o
        order = np.argsort(visit, kind="stable")
        o, i, kh, kw, visit = (index[order] for index in (o, i, kh, kw, visit))
        starts = np.searchsorted(visit, np.arange(self.chunks * self.outputs + 1))
        rows, columns = kh * self.window.dilation[0], kw * self.window.dilation[1]
        offsets = ((i * self.down + rows) * self.across + columns) * self.regions.lanes
        return starts.astype(np.int32), offsets.astype(np.int32), weights_OIHW[o, i, kh, kw].astype(np.float32)


def sparse_convolution(conv: SparseConvolution, nonzeros: int, device: Device) -> tirx.PrimFunc:
    """(x, starts, offsets, values, bias, the sum where there is one, y), all flat; see `SparseConvolution.weights`."""
    lanes, regions, strides = conv.regions.lanes, conv.regions, conv.window.strides
    high, wide = conv.tile(device)
    each = -(-conv.outputs // min(conv.outputs, device.cores))  # the more outputs, the more often a near read repeats
    tasks = -(-conv.outputs // each)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("sparse_convolution")
            T.func_attr(_ATTRS)
            x = _argument("x", conv.input_size)
            starts = _argument("starts", conv.chunks * conv.outputs + 1, "int32")
            offsets, values = _argument("offsets", nonzeros, "int32"), _argument("values", nonzeros)
            bias = _argument("bias", conv.outputs)
            other = _argument("other", regions.size(conv.outputs)) if conv.residual else None
            y = _argument("y", regions.size(conv.outputs))
            with T.sblock("root"), T.parallel(0, tasks) as task:
                for tile_row, row_count, rows in _pieces(regions.rows, high):
                    for tile_column, column_count, columns in _pieces(regions.columns, wide):
                        tile = T.serial(0, row_count), T.serial(0, column_count), T.serial(0, conv.chunks)
                        with tile[0] as row, tile[1] as column, tile[2] as chunk:
                            top, left = tile_row + row * rows, tile_column + column * columns
                            with T.serial(0, tirx.min(each, conv.outputs - task * each)) as one:
                                output = task * each + one
                                at = [(top + r, left + c) for r in range(rows) for c in range(columns)]
                                reads = [
                                    lanes + (r * strides[0] * conv.across + c * strides[1]) * lanes for r, c in at
                                ]
                                writes = [
                                    _span(lanes + (output * regions.positions + r * regions.columns + c) * lanes, lanes)
                                    for r, c in at
                                ]
                                given = x, (starts, offsets, values), bias, other
                                _visit(conv, given, y, (chunk, output), reads, writes)
        return builder.get()


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
            T.func_attr(_ATTRS)
            given = T.arg("source", T.buffer(source_shape, "float32"))
            places = _argument("places", vectors * lanes, "int32")
            y = _argument("y", (channels * vectors + 2) * lanes)
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
            T.func_attr(_ATTRS)
            source, starts = _argument("source", source_size), _argument("starts", vectors, "int32")
            masks = _argument("masks", vectors * lanes, "int32")
            y = _argument("y", (channels * vectors + 2) * lanes)
            with T.sblock("root"), T.parallel(0, channels) as channel, T.serial(0, vectors) as vector:
                read = source[_span(lanes + channel * stride + starts[vector], lanes)]
                counts = masks[_span(vector * lanes, lanes)] > tirx.Broadcast(tirx.const(0, "int32"), lanes)
                kept = tirx.Select(counts, read, tirx.Broadcast(tirx.const(0, "float32"), lanes))
                T.buffer_store(y, kept, [_span((1 + channel * vectors + vector) * lanes, lanes)])
        return builder.get()


def ungroup(regions: Regions, channels: int) -> tirx.PrimFunc:
    """(source, y): regions as a plain plane, (1, channels, height, width)."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("ungroup")
            T.func_attr(_ATTRS)
            source = _argument("source", regions.size(channels))
            y = T.arg("y", T.buffer((1, channels, regions.height, regions.width), "float32"))
            plane = T.serial(0, regions.height), T.serial(0, regions.width)
            with T.sblock("root"), T.parallel(0, channels) as channel, plane[0] as row, plane[1] as column:
                lane = row // regions.rows * regions.grid_columns + column // regions.columns
                position = row % regions.rows * regions.columns + column % regions.columns
                place = (1 + channel * regions.positions + position) * regions.lanes + lane
                T.buffer_store(y, source[place], [0, channel, row, column])
        return builder.get()


def _visit(
    conv: SparseConvolution, given: tuple[Any, tuple[Any, Any, Any], Any, Any], y: Any, at: tuple[Any, Any],
    reads: Sequence[Any], writes: Sequence[Any],
) -> None:
    """Emit what one chunk of inputs adds to one output channel of a tile; the sums stay in registers meanwhile.

    Few places would wait for each other's additions; their nonzeros are then added into several sums in turn.
    """
    x, (starts, offsets, values), bias, other = given
    (chunk, output), lanes = at, conv.regions.lanes
    count = len(reads)
    turns = max(1, min(4, _IN_FLIGHT // count))
    sums = T.alloc_buffer((turns * count * lanes,), "float32", scope="local")

    def place(k: int, turn: int = 0) -> Any:
        return _span((turn * count + k) * lanes, lanes)

    def add(nonzero: Any, turn: int) -> None:
        weight = tirx.Broadcast(values[nonzero], lanes)
        for k, read in enumerate(reads):
            value = sums[place(k, turn)] + weight * x[_span(read + offsets[nonzero], lanes)]
            T.buffer_store(sums, value, [place(k, turn)])

    def begin(anew: bool) -> None:
        for k, write in enumerate(writes):
            T.buffer_store(sums, tirx.Broadcast(bias[output], lanes) if anew else y[write], [place(k)])

    def end(whole: bool) -> None:
        for k, write in enumerate(writes):
            value = sum((sums[place(k, turn)] for turn in range(1, turns)), sums[place(k)])
            T.buffer_store(y, _finished(conv.steps, value, other, write, lanes) if whole else value, [write])

    _either(chunk == 0, begin, conv.chunks > 1)
    for turn in range(1, turns):
        for k in range(count):
            T.buffer_store(sums, tirx.Broadcast(tirx.const(0, "float32"), lanes), [place(k, turn)])
    visit = chunk * conv.outputs + output
    first, number = starts[visit], starts[visit + 1] - starts[visit]
    with T.serial(0, number // turns) as step:
        for turn in range(turns):
            add(first + step * turns + turn, turn)
    if turns > 1:
        with T.serial(0, number % turns) as step:
            add(first + number // turns * turns + step, 0)
    _either(chunk == conv.chunks - 1, end, conv.chunks > 1)


def _either(condition: Any, emit: Callable[[bool], None], undecided: bool) -> None:
    """`emit(True)` where the condition holds and `emit(False)` where not; always the former unless undecided."""
    if not undecided:
        emit(True)
        return
    with T.If(condition):
        with T.Then():
            emit(True)
        with T.Else():
            emit(False)


def _finished(steps: Sequence[tuple[str, float]], value: Any, other: Any, at: Any, lanes: int) -> Any:
    if other is not None:
        value = value + other[at]
    for step, bound in steps:
        limit = tirx.Broadcast(tirx.const(bound, "float32"), lanes)
        value = tirx.max(value, limit) if step == "max" else tirx.min(value, limit)
    return value


def _even(length: int, most: int) -> int:
    """Size of the larger of as few pieces up to `most` as `length` needs."""
    return -(-length // -(-length // most))


def _pieces(length: int, most: int) -> Iterator[tuple[int, int, int]]:
    """`length` as pieces of nearly equal size up to `most`: (where they start, how many there are, their size)."""
    count = -(-length // most)
    size, larger = divmod(length, count)
    if larger:
        yield 0, larger, size + 1
    if larger < count:
        yield larger * (size + 1), count - larger, size


def _argument(name: str, size: int, dtype: str = "float32") -> Any:
    return T.arg(name, T.buffer((max(size, 1),), dtype))


def _span(start: Any, lanes: int) -> Any:
    return tirx.Ramp(start, 1, lanes)
