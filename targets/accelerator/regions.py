"""Which rows and words an instruction reads and writes; (buffer, int64 array) pairs in the order of its entries."""

from enum import Enum
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.design import Design
from targets.accelerator.isa import Gemm, Instruction, Load, Memory, Post, Source, Store

Rows = NDArray[np.int64]


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


def words_of_entry(one: Load | Store, design: Design) -> int:
    """Bus words of one entry."""
    return design.lanes if isinstance(one, Load) and one.memory is Memory.PARAMETERS else design.block_words


def words(one: Load | Store, design: Design) -> Rows:
    """Addresses (ny, nx, words of an entry)."""
    each = words_of_entry(one, design)
    return one.address + (
        one.stride * np.arange(one.ny)[:, None, None]
        + each * np.arange(one.nx)[None, :, None]
        + np.arange(each)[None, None, :]
    )


def filled(one: Load) -> Rows:
    """Rows (lines, entries of a line) that LOAD writes, its frame included."""
    lines, entries = one.top + one.ny + one.bottom, one.left + one.nx + one.right
    return one.row + np.arange(lines * entries).reshape(lines, entries)


def pixels(one: Gemm) -> Rows:
    """Rows of inputs, one for each pixel."""
    return (one.row + one.step_y * np.arange(one.ny)[:, None] + one.step_x * np.arange(one.nx)).reshape(-1)


def windows(one: Post) -> Rows:
    """Rows (results, rows of a window), from a buffer's first on."""
    first = one.step_y * np.arange(one.ny)[:, None] + one.step_x * np.arange(one.nx)
    within = one.line * np.arange(one.window_y)[:, None] + np.arange(one.window_x)
    return first.reshape(-1, 1) + within.reshape(1, -1)


def reads(one: Instruction, design: Design) -> list[tuple[Buffer, Rows]]:
    """What it reads, by buffer."""
    match one:
        case Load():
            return [(Buffer.MEMORY, words(one, design))]
        case Gemm():
            blocks = pixels(one)[:, None] * design.blocks + np.arange(design.blocks)
            found = [(Buffer.INPUTS, blocks), (Buffer.WEIGHTS, one.weights + np.arange(design.rows))]
            return found if one.clear else [*found, (BANKS[one.bank], _summed(one))]
        case Post():
            found = [(Buffer.PARAMETERS, one.parameters + np.arange(design.parameter_block))]
            if one.source is Source.ACCUMULATORS:
                found.append((BANKS[one.bank], one.row + windows(one)))
            if one.source is Source.SIDE or one.add:
                found.append((Buffer.SIDE, one.side + windows(one)))
            return found
        case Store():
            return [(Buffer.OUTPUTS, one.row + np.arange(one.ny * one.nx))]
        case _:
            assert_never(one)


def writes(one: Instruction, design: Design) -> tuple[Buffer, Rows]:
    """What it writes."""
    match one:
        case Load(memory=Memory.INPUTS):
            return Buffer.INPUTS, filled(one) * design.blocks + one.lane
        case Load():
            return FILLED[one.memory], filled(one)
        case Gemm():
            return BANKS[one.bank], _summed(one)
        case Post():
            return Buffer.OUTPUTS, one.row_out + np.arange(one.ny * one.nx)
        case Store():
            return Buffer.MEMORY, words(one, design)
        case _:
            assert_never(one)


def _summed(one: Gemm) -> Rows:
    return one.row_out + np.arange(one.ny * one.nx)
