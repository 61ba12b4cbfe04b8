"""Tokens: put where instructions need them, or proved to be where they must.

A program answers the same whatever its units' timing when tokens order every two instructions of different units that
touch the same row, one of them writing it; of accumulators the same bank, whose one way to be read two units share.
Vector clocks tell (Mattern, "Virtual Time and Global States of Distributed Systems", 1989): each unit knows up to which
instruction of each other unit all are done, and a token hands on what its giver knew when it was done. But
POST's tokens for GEMM are given when POST has read its sums, and taken when GEMM is to write some: they say no more.

A program whose instructions each find their tokens given before them cannot stop for ever: units get instructions in
the program's order, so the givers are on their way.
"""

import ctypes
from bisect import bisect
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from targets.accelerator import native
from targets.accelerator.design import Design
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import BYTES, Gemm, Instruction, Post, Unit
from targets.accelerator.regions import BANKS, Buffer, Rows, reads, sizes, writes

UNITS = (Unit.LOAD, Unit.GEMM, Unit.POST, Unit.STORE)
LARGEST_COUNT = 63
"""Tokens that one unit may have given another that its instructions so far have not taken."""

GEMM, POST = UNITS.index(Unit.GEMM), UNITS.index(Unit.POST)
SUMS_READ = len(UNITS)
"""The entry of a clock that counts POSTs of which all sums have been read; the others count what a unit has done."""
EVENTS = len(UNITS) + 1

Clock = NDArray[np.int32]
"""For each unit, then for `SUMS_READ`, how many of its instructions are known to be so far; (..., EVENTS)."""

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
        for event in map(int, np.argsort(-needed, kind="stable")):  # what one token brings may spare another
            number, giver = int(needed[event]), _giver(event)
            if number <= state.known[unit, event]:
                continue
            takers = taken[giver, unit]
            if len(takers) - bisect(takers, at[giver][number - 1]) >= LARGEST_COUNT:
                number = len(at[giver])  # one token in place of many that would wait for their takers
            takers.append(position)
            source = at[giver][number - 1]
            found[source] = replace(found[source], signals=found[source].signals | UNITS[unit])
            waits |= UNITS[giver]
            state.learn(unit, giver, given[giver][number - 1])
        state.done(unit, one)
        at[unit].append(position)
        given[unit].append(state.known[unit].copy())
        found.append(replace(one, waits=waits))
    return found


def quickly(program: bytes, design: Design, words: int) -> bytes:
    """As `synchronised`, of encoded instructions and in C: for programs whose cycles alone matter; nothing proves it.

    Raises:
        ProgramError: an instruction leaves a buffer or the memory.
    """
    found = ctypes.create_string_buffer(program, len(program))
    count = ctypes.c_int64(len(program) // BYTES)
    if result := native.library().synchronise(native.sizes(design), ctypes.c_int64(words), found, count):
        if result == -2:
            raise MemoryError("No memory for the clocks of the accelerator's units.")
        raise ProgramError("An instruction leaves a buffer or the memory.")
    return found.raw


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
                state.learn(unit, giver, queues[giver, unit].popleft())
            needed = state.conflicts(unit, one)
            if (missing := needed > state.known[unit]).any():
                other = UNITS[_giver(int(missing.argmax()))].name
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
    """Which instruction of each unit touched each row last, and which each unit knows to be done; both count from 1.

    Attributes:
        known: the clock of each unit.
    """

    def __init__(self, design: Design, words: int) -> None:
        self.design = design
        self.sizes = sizes(design) | {Buffer.MEMORY: words}
        self._read, self._written = (
            {buffer: np.zeros((EVENTS, size), np.int32) for buffer, size in self.sizes.items()} for _ in range(2)
        )
        self.known = np.zeros((len(UNITS), EVENTS), np.int32)

    def learn(self, unit: int, giver: int, clock: Clock) -> None:
        """Take a token over, with the clock that its giver had once its instruction was done."""
        if (giver, unit) == (POST, GEMM):
            clock = np.where(np.arange(EVENTS) == SUMS_READ, clock, 0)
        self.known[unit] = np.maximum(self.known[unit], clock)

    def conflicts(self, unit: int, one: Instruction) -> Clock:
        """The clock that a unit must have reached before this instruction of it."""
        needed = np.zeros(EVENTS, np.int32)
        for buffer, rows in reads(one, self.design):
            needed = np.maximum(needed, self._last(self._written, buffer, rows))
        buffer, rows = writes(one, self.design)
        for earlier in (self._written, self._read):
            needed = np.maximum(needed, self._last(earlier, buffer, rows))
        needed[[event for event in range(EVENTS) if _giver(event) == unit]] = 0
        return needed

    def done(self, unit: int, one: Instruction) -> None:
        """Mark what it touches as touched by this unit's next instruction."""
        self.known[unit, unit] += 1
        if unit == POST:
            self.known[unit, SUMS_READ] += 1
        for buffer, rows in reads(one, self.design):
            event = SUMS_READ if unit == POST and buffer in BANKS else unit
            _shared(buffer, rows).of(self._read[buffer])[event] = self.known[unit, unit]
        buffer, rows = writes(one, self.design)
        _shared(buffer, rows).of(self._written[buffer])[unit] = self.known[unit, unit]

    def _last(self, earlier: dict[Buffer, Clock], buffer: Buffer, rows: Rows) -> Clock:
        if rows.last >= self.sizes[buffer]:
            size = self.sizes[buffer]
            raise ProgramError(f"it goes to row {rows.last} of the {buffer.value} buffer, which has {size}")
        found = _shared(buffer, rows).of(earlier[buffer])
        return np.asarray(found.max(tuple(range(1, found.ndim)), initial=0), np.int32)


def _giver(event: int) -> int:
    """The unit whose instructions an entry of a clock counts."""
    return POST if event == SUMS_READ else event


def _shared(buffer: Buffer, rows: Rows) -> Rows:
    """What other units must not touch at the same time as these rows: a whole bank counts as one."""
    return Rows(0, ((1, 1),)) if buffer in BANKS else rows


class _At:
    """Says of a ProgramError which instruction it is about."""

    def __init__(self, position: int, one: Instruction) -> None:
        self.position, self.one = position, one

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, ProgramError):
            raise ProgramError(f"Instruction {self.position}, {self.one}: {error}.") from None
