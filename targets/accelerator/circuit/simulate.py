"""The circuit in Amaranth's own simulator, a memory of fixed latency around it: some 1,000 cycles a second."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from amaranth.sim import Simulator
from numpy.typing import NDArray

from targets.accelerator.circuit.top import Accelerator
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import BYTES
from targets.accelerator.simulator import LATENCY


class _Reads:
    """Words that a port has asked for, each with the cycle from which it is there."""

    def __init__(self, port: Any, words: NDArray[np.uint64], latency: int) -> None:
        self.port, self.words, self.latency = port, words, latency
        self.waiting: deque[tuple[int, int]] = deque()
        self.last = 0
        self.signals = (
            port.request.valid, port.request.payload.address, port.request.payload.words, port.words.ready,
            port.words.valid,
        )  # fmt: skip

    def step(self, ctx: Any, now: int, seen: tuple[int, ...]) -> None:
        """What the port did in cycle `now`, and what it will see in the next."""
        asked, address, count, ready, valid = seen
        if ready and valid:
            self.waiting.popleft()
        if asked:
            words = self.words[address : address + count].tolist()
            for word in words + [0] * (count - len(words)):
                self.last = max(self.last + 1, now + self.latency)
                self.waiting.append((self.last, word))
        there = bool(self.waiting) and self.waiting[0][0] <= now + 1
        ctx.set(self.port.words.valid, there)
        if there:
            ctx.set(self.port.words.payload, self.waiting[0][1])


class _Writes:
    def __init__(self, port: Any, words: NDArray[np.uint64], latency: int) -> None:
        self.port, self.words, self.latency = port, words, latency
        self.open: deque[list[int]] = deque()  # address, words to come
        self.done: deque[int] = deque()
        self.signals = (
            port.request.valid, port.request.payload.address, port.request.payload.words, port.words.valid,
            port.words.payload,
        )  # fmt: skip

    def step(self, ctx: Any, now: int, seen: tuple[int, ...]) -> None:
        asked, address, count, valid, word = seen
        if asked:
            self.open.append([address, count])
        if valid:
            first = self.open[0]
            self.words[first[0]] = word
            first[0], first[1] = first[0] + 1, first[1] - 1
            if not first[1]:
                self.open.popleft()
                self.done.append(max(now + self.latency, (self.done[-1] if self.done else 0) + 1))
        there = bool(self.done) and self.done[0] <= now + 1
        if there:
            self.done.popleft()
        ctx.set(self.port.done, there)


def run(
    program: bytes, memory: NDArray[np.uint8], design: Design, latency: int = LATENCY, limit: int = 100_000
) -> int:
    """Execute a program; cycles from its start until all is done. Changes the memory image.

    Args:
        latency: cycles from a request until its first word, and from a last word until it is known to be written.
        limit: cycles after which a program counts as stuck.

    Raises:
        ProgramError: it is stuck.
    """
    return run_all([program], memory, design, latency, limit)[0]


def run_all(
    programs: Sequence[bytes], memory: NDArray[np.uint8], design: Design, latency: int = LATENCY, limit: int = 100_000
) -> list[int]:
    """Execute programs one after the other, each started as soon as the one before it is done; the cycles of each."""
    words, circuit = memory.view(np.uint64), Accelerator(design)
    lines = np.frombuffer(b"".join(programs), np.uint64).copy()
    ports: tuple[_Reads | _Writes, ...] = (
        _Reads(circuit.program, lines, latency), _Reads(circuit.read, words, latency),
        _Writes(circuit.write, words, latency),
    )  # fmt: skip
    signals = [one for port in ports for one in port.signals]
    found = list[int]()

    async def bench(ctx: Any) -> None:
        for port in (circuit.program, circuit.read, circuit.write):
            ctx.set(port.request.ready, 1)
        ctx.set(circuit.write.words.ready, 1)
        now = address = 0
        for program in programs:
            ctx.set(circuit.address, address)
            ctx.set(circuit.count, len(program) // BYTES)
            ctx.set(circuit.start, 1)
            begun, address = now, address + len(program) // WORD_BYTES
            while True:
                _, _, idle, *seen = await ctx.tick().sample(circuit.idle, *signals)
                ctx.set(circuit.start, 0)
                for k, port in enumerate(ports):
                    port.step(ctx, now, tuple(seen[5 * k : 5 * k + 5]))
                now += 1
                if idle and now - 1 > begun:
                    found.append(now - 1 - begun)
                    break
                if now - begun > limit:
                    raise ProgramError(f"The circuit is not done after {limit} cycles.")

    simulator = Simulator(circuit)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()
    return found
