"""Convolution with scattered zero weights, over regions: only what is not zero is loaded, multiplied and added.

Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, for sparse weights against dense activations with vectors over
positions; lanes over regions, instead of over neighbours, keep every shifted read aligned.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from profiles.device import Device
from targets.base import Array
from targets.kernels.regions import Layout
from targets.kernels.vectors import argument, span
from targets.kernels.window import Window

_OTHER_REGISTERS = 4  # beside the accumulators: the weight, and what the compiler needs to move values
_IN_FLIGHT = 8  # accumulators that keep two multiply-adds a cycle busy while each takes four
_NEAREST_BYTES = 32 << 10  # what a core's nearest cache holds, next to weights, on any processor of the last decade
_NEAR, _FAR = 0.55, 1.35  # cycles of a vector read from the nearest cache, and from the one behind it
_TURN_CYCLES = 20  # of leaving a loop at a time the processor did not foresee
ATTRS = {"layout": "regions", "op_pattern": 8, "tirx.noalias": True, "scheduled": True}  # 8: FuseOps leaves it alone


@dataclass(frozen=True, slots=True)
class Grid:
    """How a kernel's input lies: rows and columns of vectors a channel, and where the first output starts to read."""

    down: int
    across: int
    row: int = 0
    column: int = 0

    def first(self, row: Any, column: Any) -> Any:
        """The vector where an output starts to read that is so many rows and columns of inputs from the first one."""
        return 1 + (row + self.row) * self.across + column + self.column


@dataclass(frozen=True, slots=True)
class SparseConvolution:
    """What a kernel is generated for; a picture at a time.

    Attributes:
        inputs: channels of the input, which lies as `grid` says.
        made: of the outputs.
        steps: what follows bias and residual sum, in order: ("max" or "min", bound).
        residual: of a tensor of the outputs' shape that is added.
        groups: of the convolution; as many as channels for a depthwise one.
        chunk: input channels that are added to all outputs of a tile before the next ones are; sums wait in the output.
            All of them, unless said otherwise.
        tile: most rows and columns of a region whose sums are in registers together.
        team: outputs that are summed together; a weight that is not zero for one of them is read for all, and what it
            is multiplied with is read once. More than one pays where whole blocks of weights are zero.
    """

    inputs: int
    outputs: int
    grid: Grid
    made: Layout
    window: Window
    steps: tuple[tuple[str, float], ...] = ()
    residual: Layout | None = None
    groups: int = 1
    chunk: int = 1 << 30
    tile: tuple[int, int] = (1, 1)
    team: int = 1

    @property
    def lanes(self) -> int:
        """Of a vector."""
        return self.made.regions.lanes

    @property
    def input_size(self) -> int:
        """Values of the flat input, slack included."""
        return (self.inputs * self.grid.down * self.grid.across + 2) * self.lanes

    @property
    def chunks(self) -> int:
        """How often a tile's outputs are visited."""
        return -(-self.inputs // self.chunk)

    @property
    def teams(self) -> int:
        """Of outputs."""
        return self.outputs // self.team

    def splits(self, device: Device) -> "list[SparseConvolution]":
        """Every tile whose sums fit into registers, with all inputs at once and with as many as the cache holds."""
        most, regions = (device.vector_registers - _OTHER_REGISTERS) // self.team, self.made.regions
        found = []
        for parts in range(1, regions.columns + 1):
            columns = -(-regions.columns // parts)
            for rows in {_even(regions.rows, most_rows) for most_rows in range(1, most // columns + 1)}:
                one = replace(self, tile=(rows, columns))
                near = max(1, min(self.inputs, _NEAREST_BYTES // one._channel_bytes))
                found += [one, replace(one, chunk=near)] if self.groups == 1 else [one]
        return found

    @property
    def _channel_bytes(self) -> int:
        """Of the input pixels that a tile reads."""
        rows, columns = self.tile
        return 4 * self.lanes * self.window.reach(rows, 0) * self.window.reach(columns, 1)

    def cycles(self, places: int) -> float:
        """Estimate for one core: two loads a cycle, from the nearest cache or the one behind it, and turns of loops.

        `places` counts the weights that are not zero, those of a team at one place as one.
        """
        (rows, columns), regions = self.tile, self.made.regions
        count, tiles = rows * columns, -(-regions.rows // rows) * -(-regions.columns // columns)
        inputs = min(self.chunk, self.inputs) if self.groups == 1 else self.inputs // self.groups
        near = inputs * self._channel_bytes <= _NEAREST_BYTES
        sums = count * self.team
        each = max((count + self.team + 1) * _NEAR, sums / 2, 4.0 / _turns(sums), count * (0.0 if near else _FAR))
        visit = _TURN_CYCLES + sums * (2 * _FAR if self.chunks > 1 else 1.0)
        return tiles * (places * each + self.chunks * self.teams * visit)

    def weights(self, weights_OIHW: Array) -> tuple[Array, Array, Array]:
        """Where the nonzeros of each (chunk, team) start and the last ones end, their places in x, a team's values.

        Inputs of `weights_OIHW` are those of one group. Where all are zero one is listed that nobody reads.
        """
        by_team = weights_OIHW.reshape(self.teams, self.team, *weights_OIHW.shape[1:])
        o, local, kh, kw = np.nonzero((by_team != 0).any(1))
        i = local + o // (self.teams // self.groups) * (self.inputs // self.groups)
        visit = i // self.chunk * self.teams + o
        order = np.argsort(visit, kind="stable")
        o, i, local, kh, kw, visit = (index[order] for index in (o, i, local, kh, kw, visit))
        starts = np.searchsorted(visit, np.arange(self.chunks * self.teams + 1))
        rows, columns = kh * self.window.dilation[0], kw * self.window.dilation[1]
        offsets = ((i * self.grid.down + rows) * self.grid.across + columns) * self.lanes
        values = by_team[o, :, local, kh, kw].astype(np.float32).reshape(-1)
        if not len(values):
            offsets, values = np.zeros(1, np.int32), np.zeros(self.team, np.float32)
        return starts.astype(np.int32), offsets.astype(np.int32), values

    def place(self, layout: Layout, output: Any, row: Any, column: Any) -> Any:
        """The vector of an output's pixel in a flat tensor of such a layout."""
        top, left = layout.border[:2]
        return span((1 + (output * layout.down + row + top) * layout.across + column + left) * self.lanes, self.lanes)


def sparse_convolution(
    conv: SparseConvolution, places: int, device: Device, about: Mapping[str, Any]
) -> tirx.PrimFunc:
    """(x, starts, offsets, values, bias, copies and masks for a border, the sum where there is one, y), all flat.

    See `SparseConvolution.weights` and `Layout.copies`; `about` goes onto the kernel.
    """
    lanes, regions, strides, grid = conv.lanes, conv.made.regions, conv.window.strides, conv.grid
    high, wide = conv.tile
    each = -(-conv.teams // min(conv.teams, device.cores))  # the more outputs, the more often a near read repeats
    tasks = -(-conv.teams // each)
    repeated = len(conv.made.copies()[0])
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("sparse_convolution")
            T.func_attr({**ATTRS, **about})
            x = argument("x", conv.input_size)
            starts = argument("starts", conv.chunks * conv.teams + 1, "int32")
            offsets, values = argument("offsets", places, "int32"), argument("values", places * conv.team)
            bias = argument("bias", conv.outputs)
            tables = (("copies", 2 * repeated), ("masks", repeated * lanes)) if repeated else ()
            border = [argument(name, size, "int32") for name, size in tables]
            other = argument("other", conv.residual.size(conv.outputs)) if conv.residual else None
            y = argument("y", conv.made.size(conv.outputs))
            with T.sblock("root"), T.parallel(0, tasks) as task:
                mine = tirx.min(each, conv.teams - task * each)
                for tile_row, row_count, rows in _pieces(regions.rows, high):
                    for tile_column, column_count, columns in _pieces(regions.columns, wide):
                        tile = T.serial(0, row_count), T.serial(0, column_count), T.serial(0, conv.chunks)
                        with tile[0] as row, tile[1] as column, tile[2] as chunk:
                            top, left = tile_row + row * rows, tile_column + column * columns
                            with T.serial(0, mine) as one:
                                at = [(top + r, left + c) for r in range(rows) for c in range(columns)]
                                reads = [grid.first(r * strides[0], c * strides[1]) * lanes for r, c in at]
                                given = x, (starts, offsets, values), bias, other
                                _visit(conv, given, y, (chunk, task * each + one), reads, at)
                if border:
                    with T.serial(0, mine * conv.team) as one, T.serial(0, repeated) as copy:
                        _repeat(conv.made, border, y, (task * each * conv.team + one) * conv.made.vectors, copy)
        return builder.get()


def _repeat(made: Layout, tables: Sequence[Any], y: Any, channel: Any, copy: Any) -> None:
    """Emit one vector of a channel that repeats a span of the same channel, zero in lanes that do not count."""
    (copies, masks), lanes = tables, made.regions.lanes
    count = int(copies.shape[0]) // 2
    value = y[span((1 + channel) * lanes + copies[count + copy], lanes)]
    counts = masks[span(copy * lanes, lanes)] > tirx.Broadcast(tirx.const(0, "int32"), lanes)
    kept = tirx.Select(counts, value, tirx.Broadcast(tirx.const(0, "float32"), lanes))
    T.buffer_store(y, kept, [span((1 + channel + copies[copy]) * lanes, lanes)])


def _visit(
    conv: SparseConvolution, given: tuple[Any, tuple[Any, Any, Any], Any, Any], y: Any, visited: tuple[Any, Any],
    reads: Sequence[Any], pixels: Sequence[tuple[Any, Any]],
) -> None:
    """Emit what one chunk of inputs adds to a team of outputs of a tile; the sums stay in registers meanwhile.

    Few places would wait for each other's additions; their nonzeros are then added into several sums in turn.
    """
    x, (starts, offsets, values), bias, other = given
    (chunk, team), lanes, members = visited, conv.lanes, range(conv.team)
    outputs = [team * conv.team + member for member in members]
    writes = [conv.place(conv.made, output, *pixel) for output in outputs for pixel in pixels]
    residual = conv.residual
    added = [conv.place(residual, output, *pixel) for output in outputs for pixel in pixels] if residual else writes
    count = len(writes)
    turns = _turns(count)
    sums = T.alloc_buffer((turns * count * lanes,), "float32", scope="local")

    def place(k: int, turn: int = 0) -> Any:
        return span((turn * count + k) * lanes, lanes)

    def add(nonzero: Any, turn: int) -> None:
        weights = [tirx.Broadcast(values[nonzero * conv.team + member], lanes) for member in members]
        for k, read in enumerate(reads):
            for member, weight in enumerate(weights):
                at = place(member * len(reads) + k, turn)
                T.buffer_store(sums, sums[at] + weight * x[span(read + offsets[nonzero], lanes)], [at])

    def begin(anew: bool) -> None:
        for k, write in enumerate(writes):
            first = tirx.Broadcast(bias[outputs[k // len(reads)]], lanes)
            T.buffer_store(sums, first if anew else y[write], [place(k)])

    def end(whole: bool) -> None:
        for k, write in enumerate(writes):
            value = sum((sums[place(k, turn)] for turn in range(1, turns)), sums[place(k)])
            T.buffer_store(y, _finished(conv.steps, value, other, added[k], lanes) if whole else value, [write])

    _either(chunk == 0, begin, conv.chunks > 1)
    for turn in range(1, turns):
        for k in range(count):
            T.buffer_store(sums, tirx.Broadcast(tirx.const(0, "float32"), lanes), [place(k, turn)])
    visit = chunk * conv.teams + team
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


def _turns(count: int) -> int:
    """How many sums each of `count` places gets, so that enough additions do not wait for each other."""
    return max(1, min(4, _IN_FLIGHT // count))


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
