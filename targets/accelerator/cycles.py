"""How many cycles the circuit takes, from one pass over the program: the same number as its simulation, to the cycle.

The memory answers each port after a fixed latency, a word in each cycle. Every number here says how long a register or
a buffer of `circuit/` takes; times are cycles since the start.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.design import Design
from targets.accelerator.isa import Gemm, Instruction, Load, Post, Store, Unit
from targets.accelerator.regions import words_of_entry

UNITS = (Unit.LOAD, Unit.GEMM, Unit.POST, Unit.STORE)
BURST_WORDS, BURSTS, AHEAD = 32, 4, 4
POST_PICK, POST_WRITE = 3, 23


@dataclass(frozen=True, slots=True)
class Timing:
    """When a program's instructions ran.

    Attributes:
        cycles: from the start until everything is done.
        unit: of each instruction, by its place in `UNITS`.
        begun, done: the cycle in which it left its queue, and that in which it gave its tokens.
    """

    cycles: int
    unit: NDArray[np.int8]
    begun: NDArray[np.int64]
    done: NDArray[np.int64]


def timing(program: Iterable[Instruction], design: Design, latency: int = 20) -> Timing:
    """Run the clock over a program.

    Args:
        latency: cycles from a request until its first word, and from a last word until it is known to be written.
    """
    clock, rows = _Clock(design, latency), []
    for one in program:
        unit = UNITS.index(one.UNIT)
        begun = clock.begin(unit, one)
        rows.append((unit, begun, clock.run(one, begun)))
    unit, begun, done = (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 3
    return Timing(clock.end(), unit.astype(np.int8), begun.astype(np.int64), done.astype(np.int64))


class _Queue:
    """A buffered queue: when an item written can be read, and when there is room for the next."""

    def __init__(self, depth: int) -> None:
        self.readable: deque[int] = deque(maxlen=depth - 1)
        self.popped = -1

    def room(self) -> int:
        """The first cycle in which the next item may be written."""
        return self.readable[0] if len(self.readable) == self.readable.maxlen else 0

    def write(self, at: int) -> int:
        """The first cycle in which an item written then can be read."""
        self.readable.append(max(at + 2, self.popped + 1))
        return self.readable[-1]


class _Clock:
    def __init__(self, design: Design, latency: int) -> None:
        self.design, self.latency = design, latency
        self.fetch = _Fetch(latency)
        self.queues = [_Queue(design.queue) for _ in UNITS]
        self.free, self.idle = [0] * len(UNITS), [0] * len(UNITS)
        self.tokens: list[list[deque[int]]] = [[deque() for _ in UNITS] for _ in UNITS]
        self.ahead, self.written, self.come = _Queue(AHEAD), 0, 0
        self.swapped, self.multiplied = 0, 0
        self.depth = 4 + (design.rows - 1).bit_length()

    def begin(self, unit: int, one: Instruction) -> int:
        """When an instruction leaves its queue."""
        queue = self.queues[unit]
        ready = queue.write(self.fetch.dispatch(queue.room()))
        ready = max(ready, self.free[unit], queue.popped + 1)
        for giver, name in enumerate(UNITS):
            if name in one.waits:
                ready = max(ready, self.tokens[giver][unit].popleft())
        queue.popped = ready + 1
        return queue.popped

    def run(self, one: Instruction, begun: int) -> int:
        """When an instruction gives its tokens; moves its unit's clock on."""
        match one:
            case Load():
                done = self._load(one, begun)
            case Gemm():
                done = self._gemm(one, begun)
            case Post():
                done = self._post(one, begun)
            case Store():
                done = self._store(one, begun)
            case _:
                assert_never(one)
        for taker, name in enumerate(UNITS):
            if name in one.signals:
                self.tokens[UNITS.index(one.UNIT)][taker].append(done + 1)
        return done

    def end(self) -> int:
        return max(self.fetch.idle, *self.idle)

    def _load(self, one: Load, begun: int) -> int:
        start = self.ahead.write(begun)
        cursor = self.ahead.popped = max(start, self.written)
        self.free[0] = max(begun + one.ny + 1, self.ahead.room())
        words = one.nx * words_of_entry(one, self.design)
        frame = one.left + one.nx + one.right
        cursor += 1 + one.top * frame
        for line in range(one.ny):
            first = max(begun + 1 + line + self.latency, self.come + 1)
            self.come = first + words - 1
            cursor = max(cursor + one.left, first) + words + one.right
        done = cursor + one.bottom * frame
        self.written, self.idle[0] = done, done + 1
        return done

    def _gemm(self, one: Gemm, begun: int) -> int:
        swap = max(begun + self.design.rows + 3, self.multiplied)
        self.multiplied = swap + one.ny * one.nx
        self.free[1] = swap + 1
        done = self.multiplied + self.depth + 1
        self.idle[1] = done + 1
        return done

    def _post(self, one: Post, begun: int) -> int:
        groups, area = self.design.columns // self.design.lanes, one.window_y * one.window_x
        last = begun + 2 + (one.ny * one.nx - 1) * max(groups, area) + area - 1
        done = last + POST_PICK + groups - 1 + POST_WRITE + 1
        self.free[2] = self.idle[2] = done + 1
        return done

    def _store(self, one: Store, begun: int) -> int:
        done = begun + 1 + one.ny * (1 + one.nx * self.design.block_words) - 1 + 4 + self.latency
        self.free[3] = self.idle[3] = done + 1
        return done


class _Fetch:
    """When each instruction can go to its queue: two words each, in bursts, a few of which may be open."""

    def __init__(self, latency: int) -> None:
        self.latency, self.word = latency, 0
        self.asked, self.come = 0, 0
        self.first = 0  # cycle of the current burst's first word
        self.popped = 0  # of the last word
        self.dispatched, self.visible, self.idle = 0, 0, 0
        self.freed: deque[int] = deque(maxlen=BURSTS)

    def dispatch(self, room: int) -> int:
        low = max(self._arrives(), self.popped + 1)
        high = max(self._arrives(), low + 1, self.dispatched)
        self.popped = high
        if self.word % BURST_WORDS == 0:
            self.freed.append(high)
        self.dispatched = max(high + 1, room)
        self.idle = self.dispatched + 1
        return self.dispatched

    def _arrives(self) -> int:
        """The first cycle in which the next word can be read."""
        number = self.word % BURST_WORDS
        if number == 0:
            freed = self.freed[0] + 1 if len(self.freed) == BURSTS else 0
            self.asked = max(self.asked + 1, freed)
            self.first = max(self.asked + self.latency, self.come + 1)
            self.come = self.first + BURST_WORDS - 1
        self.word += 1
        return self.first + number + 2
