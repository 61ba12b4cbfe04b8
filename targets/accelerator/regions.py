"""Which rows and words an instruction reads and writes."""

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.design import Design
from targets.accelerator.isa import Gemm, Instruction, Load, Memory, Post, Source, Store


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a buffer: loops of so many turns with a step each, one inside the other, from the first row on."""

    first: int
    loops: tuple[tuple[int, int], ...]

    @property
    def last(self) -> int:
        return self.first + sum((turns - 1) * step for turns, step in self.loops)

    def of(self, table: NDArray[np.int32]) -> NDArray[np.int32]:
        """A view (kinds, turns, ...) of what a table (kinds, rows) has of them."""
        each = table.itemsize
        shape = table.shape[0], *(turns for turns, _ in self.loops)
        strides = table.strides[0], *(step * each for _, step in self.loops)
        return np.ndarray(shape, table.dtype, table.data, self.first * each, strides)


class Buffer(Enum):
    """Everything that instructions share."""

    INPUTS = "input"
    WEIGHTS = "weight"
    SIDE = "side"
    PARAMETERS = "parameter"
    BANK0 = "accumulator bank 0"
    BANK1 = "accumulator bank 1"
    OUTPUTS = "output"
    MEMORY = "memory"


FILLED = {
    Memory.INPUTS: Buffer.INPUTS, Memory.WEIGHTS: Buffer.WEIGHTS, Memory.SIDE: Buffer.SIDE,
    Memory.PARAMETERS: Buffer.PARAMETERS,
}  # fmt: skip
BANKS = Buffer.BANK0, Buffer.BANK1


def sizes(design: Design) -> dict[Buffer, int]:
    """Rows of each buffer; those of INPUTS count channel blocks, so that lanes are told apart."""
    return {
        Buffer.INPUTS: design.input_rows * design.blocks, Buffer.WEIGHTS: design.weight_rows,
        Buffer.SIDE: design.side_rows, Buffer.PARAMETERS: design.parameter_rows,
        Buffer.BANK0: design.accumulator_rows, Buffer.BANK1: design.accumulator_rows,
        Buffer.OUTPUTS: design.output_rows,
    }  # fmt: skip


def reads(one: Instruction, design: Design) -> list[tuple[Buffer, Rows]]:
    """What it reads, by buffer."""
    match one:
        case Load():
            return [(Buffer.MEMORY, _words(one, design))]
        case Gemm():
            blocks = design.blocks
            pixels = (one.ny, one.step_y * blocks), (one.nx, one.step_x * blocks), (blocks, 1)
            found = [(Buffer.INPUTS, Rows(one.row * blocks, pixels)), (Buffer.WEIGHTS, _line(one.weights, design.rows))]
            return found if one.clear else [*found, writes(one, design)]
        case Post():
            windows = (one.ny, one.step_y), (one.nx, one.step_x), (one.window_y, one.line), (one.window_x, 1)
            found = [(Buffer.PARAMETERS, _line(one.parameters, design.parameter_block))]
            if one.source is Source.ACCUMULATORS:
                found.append((BANKS[one.bank], Rows(one.row, windows)))
            if one.source is Source.SIDE or one.add:
                found.append((Buffer.SIDE, Rows(one.side, windows)))
            return found
        case Store():
            return [(Buffer.OUTPUTS, _line(one.row, one.ny * one.nx))]
        case _:
            assert_never(one)


def writes(one: Instruction, design: Design) -> tuple[Buffer, Rows]:
    """What it writes."""
    match one:
        case Load():
            entries = (one.top + one.ny + one.bottom) * (one.left + one.nx + one.right)
            if one.memory is Memory.INPUTS:
                return Buffer.INPUTS, Rows(one.row * design.blocks + one.lane, ((entries, design.blocks),))
            return FILLED[one.memory], _line(one.row, entries)
        case Gemm():
            return BANKS[one.bank], _line(one.row_out, one.ny * one.nx)
        case Post():
            return Buffer.OUTPUTS, _line(one.row_out, one.ny * one.nx)
        case Store():
            return Buffer.MEMORY, _words(one, design)
        case _:
            assert_never(one)


def _line(first: int, count: int) -> Rows:
    return Rows(first, ((count, 1),))


def _words(one: Load | Store, design: Design) -> Rows:
    """Addresses of its lines."""
    parameters = isinstance(one, Load) and one.memory is Memory.PARAMETERS
    return Rows(one.address, ((one.ny, one.stride), (one.nx * (design.lanes if parameters else design.block_words), 1)))
