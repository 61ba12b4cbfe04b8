"""Tokens: put where instructions need them, or proved to be where they must.

A program answers the same whatever its units' timing when tokens order every two instructions of different units that
touch the same row, one of them writing it; of accumulators the same bank, whose one way to be read two units share.
Vector clocks tell (Mattern, "Virtual Time and Global States of Distributed Systems", 1989): each unit knows up to which
instruction of each other unit all are done, and a token hands on what its giver knew when it was done.

A program whose instructions each find their tokens given before them cannot stop for ever: units get instructions in
the program's order, so the givers are on their way.
"""

from bisect import bisect
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.design import Design
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import Gemm, Instruction, Post, Unit
from targets.accelerator.regions import BANKS, Buffer, Rows, reads, sizes, writes

UNITS = (Unit.LOAD, Unit.GEMM, Unit.POST, Unit.STORE)
LARGEST_COUNT = 63
"""Tokens that one unit may have given another that its instructions so far have not taken."""

Clock = NDArray[np.int32]

_PAIRS = [(giver, taker) for giver in range(len(UNITS)) for taker in range(len(UNITS))]


def synchronised(program: Iterable[Instruction], design: Design, words: int) -> list[Instruction]:
    """The program with the fewest tokens that make its answers those of running it one instruction after the other.

    Args:
        program: without tokens.
        words: size of the memory.

    Raises:
        ProgramError: an instruction leaves a buffer or the memory.
    """
    state, found = _State(design, words), list[Instruction]()
    at: list[list[int]] = [[] for _ in UNITS]
    given: list[list[Clock]] = [[] for _ in UNITS]
    taken: dict[tuple[int, int], list[int]] = {pair: [] for pair in _PAIRS}
    for position, one in enumerate(program):
        unit = UNITS.index(one.UNIT)
        with _At(position, one):
            needed = state.conflicts(unit, one)
        waits = Unit.NONE
        for giver in map(int, np.argsort(-needed)):  # what one token brings may spare another
            number = int(needed[giver])
            if giver == unit or number <= state.known[unit, giver]:
                continue
            takers = taken[giver, unit]
            if len(takers) - bisect(takers, at[giver][number - 1]) >= LARGEST_COUNT:
                number = len(at[giver])  # one token in place of many that would wait for their takers
            takers.append(position)
            source = at[giver][number - 1]
            found[source] = replace(found[source], signals=found[source].signals | UNITS[unit])
            waits |= UNITS[giver]
            state.known[unit] = np.maximum(state.known[unit], given[giver][number - 1])
        state.done(unit, one)
        at[unit].append(position)
        given[unit].append(state.known[unit].copy())
        found.append(replace(one, waits=waits))
    return found


def check(program: Sequence[Instruction], design: Design, words: int) -> None:
    """Refuse a program that could answer by its timing, stop for ever, or leave a buffer or the memory.

    Raises:
        ProgramError: naming the instruction, by its position, and the rows.
    """
    state = _State(design, words)
    before: list[Gemm | None] = [None, None]
    queues: dict[tuple[int, int], deque[Clock]] = {pair: deque() for pair in _PAIRS}
    for position, one in enumerate(program):
        with _At(position, one):
            unit = UNITS.index(one.UNIT)
            if one.UNIT in one.waits or one.UNIT in one.signals:
                raise ProgramError("a unit can neither wait for itself nor signal itself")
            if min(one.ny, one.nx, *((one.window_y, one.window_x) if isinstance(one, Post) else ())) < 1:
                raise ProgramError("a loop of no turns never ends")
            if isinstance(one, Post) and one.add and (one.window_y, one.window_x) != (1, 1):
                raise ProgramError("what it adds has to be windows of one row")
            for giver, name in enumerate(UNITS):
                if name not in one.waits:
                    continue
                if not queues[giver, unit]:
                    raise ProgramError(f"it waits for a token that {name.name} has not given before it")
                state.known[unit] = np.maximum(state.known[unit], queues[giver, unit].popleft())
            needed = state.conflicts(unit, one)
            if (missing := needed > state.known[unit]).any():
                other = UNITS[int(missing.argmax())].name
                raise ProgramError(f"no token orders it after an instruction of {other} that touches the same rows")
            if isinstance(one, Gemm):
                _check_sums(before[one.bank], one)
                before[one.bank] = one
            state.done(unit, one)
            for taker, name in enumerate(UNITS):
                if name in one.signals:
                    queues[unit, taker].append(state.known[unit].copy())
                    if len(queues[unit, taker]) > LARGEST_COUNT:
                        raise ProgramError(f"{name.name} leaves more than {LARGEST_COUNT} tokens untaken")
    for (giver, taker), queue in queues.items():
        if queue:
            given, taken = UNITS[giver].name, UNITS[taker].name
            raise ProgramError(f"{taken} never takes {len(queue)} of the tokens that {given} gives it.")


def _check_sums(before: Gemm | None, one: Gemm) -> None:
    """Refuse sums that are read before those of the GEMM before it, elsewhere among its own, are written."""
    if before is None or one.clear or before.row_out == one.row_out:
        return
    first, second = (range(gemm.row_out, gemm.row_out + gemm.ny * gemm.nx) for gemm in (before, one))
    if first.start < second.stop and second.start < first.stop:
        raise ProgramError("its sums are some of those of the GEMM before it, but not from the same row on")


class _State:
    """Which instruction of each unit touched each row last, and which each unit knows to be done; both count from 1."""

    def __init__(self, design: Design, words: int) -> None:
        self.design = design
        self.sizes = sizes(design) | {Buffer.MEMORY: words}
        self._read, self._written = (
            {buffer: np.zeros((len(UNITS), size), np.int32) for buffer, size in self.sizes.items()} for _ in range(2)
        )
        self.known = np.zeros((len(UNITS), len(UNITS)), np.int32)

    def conflicts(self, unit: int, one: Instruction) -> Clock:
        """For each unit, the last of its instructions that has to be done before this one."""
        needed = np.zeros(len(UNITS), np.int32)
        for buffer, rows in reads(one, self.design):
            needed = np.maximum(needed, self._last(self._written, buffer, rows))
        buffer, rows = writes(one, self.design)
        for earlier in (self._written, self._read):
            needed = np.maximum(needed, self._last(earlier, buffer, rows))
        needed[unit] = 0
        return needed

    def done(self, unit: int, one: Instruction) -> None:
        """Mark what it touches as touched by this unit's next instruction."""
        self.known[unit, unit] += 1
        for buffer, rows in reads(one, self.design):
            self._read[buffer][unit, _shared(buffer, rows)] = self.known[unit, unit]
        buffer, rows = writes(one, self.design)
        self._written[buffer][unit, _shared(buffer, rows)] = self.known[unit, unit]

    def _last(self, earlier: dict[Buffer, Clock], buffer: Buffer, rows: Rows) -> Clock:
        rows = rows.reshape(-1)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.sizes[buffer]:
            size = self.sizes[buffer]
            raise ProgramError(f"it goes to row {rows.max()} of the {buffer.value} buffer, which has {size}")
        return np.asarray(earlier[buffer][:, _shared(buffer, rows)].max(1, initial=0), np.int32)


def _shared(buffer: Buffer, rows: Rows) -> Rows:
    """What other units must not touch at the same time as these rows: a whole bank counts as one."""
    return np.zeros(1, np.int64) if buffer in BANKS else rows.reshape(-1)


class _At:
    """Says of a ProgramError which instruction it is about."""

    def __init__(self, position: int, one: Instruction) -> None:
        self.position, self.one = position, one

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, ProgramError):
            raise ProgramError(f"Instruction {self.position}, {self.one}: {error}.") from None
