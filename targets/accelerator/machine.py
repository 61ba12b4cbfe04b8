"""The instructions, executed one after the other: what the circuit answers, without its timing."""

from collections.abc import Iterable
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.arithmetic import lifted, requantized
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.isa import Gemm, Instruction, Load, Memory, Post, Source, Store
from targets.accelerator.parameters import unpack
from targets.accelerator.regions import filled, pixels, windows, words

Image = NDArray[np.uint8]


class Machine:
    """An accelerator's buffers. `run` changes the memory image that it is given.

    Buffers start with values that are not zero, so that what was never loaded shows.
    """

    def __init__(self, design: Design) -> None:
        d = self.design = design
        chance = np.random.default_rng(0)

        def some(*shape: int, dtype: Any = np.int8) -> NDArray[Any]:
            return chance.integers(-99, 99, shape, dtype)

        self._inputs = some(d.input_rows, d.blocks, d.columns)
        self._weights = some(d.weight_rows, d.columns)
        self._side = some(d.side_rows, d.columns)
        self._parameters = some(d.parameter_rows, d.lanes, dtype=np.int64).view(np.uint64)
        self._sums = some(2, d.accumulator_rows, d.columns, dtype=np.int32)
        self._outputs = some(d.output_rows, d.columns)

    def run(self, program: Iterable[Instruction], memory: Image) -> None:
        """Execute a program whose order is one that its tokens allow (`tokens.check`).

        Args:
            memory: whole bus words; int8 activations, weights and parameters, as the program addresses them.
        """
        lines = memory.reshape(-1, WORD_BYTES)
        for one in program:
            match one:
                case Load():
                    self._load(one, lines)
                case Gemm():
                    self._gemm(one)
                case Post():
                    self._post(one)
                case Store():
                    entries = self._outputs[one.row : one.row + one.ny * one.nx].view(np.uint8)
                    lines[words(one, self.design)] = entries.reshape(one.ny, one.nx, -1, WORD_BYTES)
                case _:
                    assert_never(one)

    def _load(self, one: Load, lines: Image) -> None:
        given = lines[words(one, self.design)]  # (ny, nx, words, 8)
        if one.memory is Memory.PARAMETERS:
            self._parameters[filled(one)] = given.view(np.uint64)[..., 0]
            return
        entries = given.reshape(one.ny, one.nx, -1).view(np.int8)
        frame = (one.top, one.bottom), (one.left, one.right), (0, 0)
        framed = np.pad(entries, frame, constant_values=one.pad)
        if one.memory is Memory.INPUTS:
            self._inputs[filled(one), one.lane] = framed
        else:
            (self._weights if one.memory is Memory.WEIGHTS else self._side)[filled(one)] = framed

    def _gemm(self, one: Gemm) -> None:
        rows = self._inputs[pixels(one)].reshape(-1, self.design.rows).astype(np.int32)
        tile = self._weights[one.weights : one.weights + self.design.rows].astype(np.int32)
        sums = self._sums[one.bank, one.row_out : one.row_out + len(rows)]
        sums[:] = rows @ tile + (0 if one.clear else sums)

    def _post(self, one: Post) -> None:
        d, count = self.design, one.ny * one.nx
        block = self._parameters[one.parameters : one.parameters + d.parameter_block]
        step = unpack(block.reshape(-1), d, add=bool(one.add))
        other = self._side[windows(one)[:, 0]] if one.add else None
        if one.source is Source.ACCUMULATORS:
            sums: NDArray[Any] = self._sums[one.bank, one.row : one.row + count]
        else:
            window = self._side[windows(one)]
            sums = lifted(window.max(1) if one.source is Source.LARGEST else window.sum(1, dtype=np.int64))
        self._outputs[one.row_out : one.row_out + count] = requantized(sums, step, other)
