"""What the units share: how instructions come in, and how they talk to memory and buffers."""

from typing import Any

from amaranth.hdl import Module, Shape, Signal, signed, unsigned
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from targets.accelerator.isa import BITS, Instruction, Load, layout

ADDRESS = layout(Load)["address"][1].width
LENGTH = 20
"""Bits of the number of words of a request."""
TOKEN_BITS = 7
"""63 tokens that the program leaves untaken, and one for each instruction that a queue holds (`tokens.py`)."""


def fields(kind: type[Instruction], bits: Any) -> Any:
    """An instruction's fields by name, as a view of its bits."""
    places = {
        name: data.Field(Shape(one.width, signed=one.signed), at) for name, (at, one) in layout(kind).items()
    }
    return data.View(data.FlexibleLayout(BITS, places), bits)


REQUEST = data.StructLayout({"address": ADDRESS, "words": LENGTH})
"""So many words from an address on; the words themselves go over a stream of their own."""


class ReadPort(wiring.Signature):
    """A master that reads: requests go out, words come in, in their order."""

    def __init__(self) -> None:
        super().__init__({"request": Out(stream.Signature(REQUEST)), "words": In(stream.Signature(64))})


class WritePort(wiring.Signature):
    """A master that writes: a request and its words go out; `done` is high for a cycle as each request is in memory."""

    def __init__(self) -> None:
        super().__init__({
            "request": Out(stream.Signature(REQUEST)), "words": Out(stream.Signature(64)), "done": In(1),
        })  # fmt: skip


class Front(wiring.Component):
    """Lets the first instruction of a queue go once its unit is free and its tokens are there.

    `go` is high for one cycle, in which `instruction` holds it; two cycles lie between two of them at least.
    """

    def __init__(self) -> None:
        super().__init__({
            "queue": In(stream.Signature(BITS)), "free": In(1), "available": In(4), "take": Out(4), "go": Out(1),
            "instruction": Out(BITS),
        })  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        waits = fields(Load, self.queue.payload).waits  # which all kinds have at the same place
        m.d.comb += [
            self.instruction.eq(self.queue.payload), self.queue.ready.eq(self.go),
            self.take.eq(waits & self.go.replicate(4)),
        ]  # fmt: skip
        m.d.sync += self.go.eq(self.queue.valid & self.free & ~self.go & ~(waits & ~self.available).any())
        return m


class Tokens(wiring.Component):
    """Counts, for each two units, the tokens that one has given and the other has not taken.

    `give[u]` and `take[u]` have a bit for each other unit; `available[u]` says who has given some to unit u.
    """

    def __init__(self) -> None:
        super().__init__({
            "give": In(4).array(4), "take": In(4).array(4), "available": Out(4).array(4),
        })  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for giver in range(4):
            for taker in range(4):
                if giver == taker:
                    continue
                count = Signal(TOKEN_BITS, name=f"tokens_{giver}_{taker}")
                m.d.sync += count.eq(count + self.give[giver][taker] - self.take[taker][giver])
                m.d.comb += self.available[taker][giver].eq(count != 0)
        return m


class Countdown:
    """A loop of `count` turns (at least one): `last` is high in the last, and `load` starts it anew."""

    def __init__(self, m: Module, width: int, name: str) -> None:
        self._m = m
        self.left, self.last = Signal(width, name=f"{name}_left"), Signal(name=f"{name}_last")

    def load(self, count: Any) -> None:
        """Start, in the current branch, with so many turns."""
        self._m.d.sync += [self.left.eq(count), self.last.eq(count == 1)]

    def step(self) -> None:
        """Go on to the next turn, in the current branch."""
        self._m.d.sync += [self.left.eq(self.left - 1), self.last.eq(self.left == 2)]


def delayed(m: Module, signal: Any, cycles: int, name: str) -> list[Any]:
    """The signal, and what it was 1, 2, ... cycles ago; no reset clears that, so resets last longer than pipelines."""
    found = [signal]
    for k in range(1, cycles + 1):
        later = Signal.like(found[-1], name=f"{name}_{k}", reset_less=True)
        m.d.sync += later.eq(found[-1])
        found.append(later)
    return found


def buffer(m: Module, name: str, width: int, depth: int, granularity: int) -> tuple[Any, Any]:
    """A block memory's write and read port."""
    held = memory.Memory(shape=unsigned(width), depth=depth, init=[])
    m.submodules[name] = held
    return held.write_port(granularity=granularity), held.read_port()


def lanes(bits: Any, width: int, *, sign: bool = False) -> list[Any]:
    """Consecutive parts of so many bits."""
    parts = [bits[k : k + width] for k in range(0, len(bits), width)]
    return [part.as_signed() for part in parts] if sign else parts


def signal(width: int, name: str, *, sign: bool = False) -> Signal:
    """A register of data, which no reset clears: a wire to each of them would be most of the circuit's wires."""
    return Signal(signed(width) if sign else unsigned(width), name=name, reset_less=True)
