"""LOAD: one part asks memory for lines, another puts what comes, and the frame around it, into the buffers."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from targets.accelerator.circuit.parts import Countdown, Front, ReadPort, delayed, fields, signal
from targets.accelerator.design import Design
from targets.accelerator.isa import BITS, Load, Memory

AHEAD = 4
"""Instructions whose lines have been asked for and whose words have not all come."""


FILL = data.StructLayout({"memory": 2, "row": 14, "lane": 4, "part": 4, "whole": 1, "word": 64})
"""One word for a buffer, or with `whole` eight bytes that fill a whole entry."""


class LoadUnit(wiring.Component):
    """Tokens are given when the last word lies in its buffer."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__({
            "queue": In(stream.Signature(BITS)), "available": In(4), "take": Out(4), "give": Out(4), "busy": Out(1),
            "port": Out(ReadPort()), "fill": Out(FILL), "filling": Out(1),
        })  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.front = front = Front()
        m.submodules.ahead = ahead = fifo.SyncFIFOBuffered(width=BITS, depth=AHEAD)
        wiring.connect(m, wiring.flipped(self.queue), front.queue)
        m.d.comb += [front.available.eq(self.available), self.take.eq(front.take)]
        asking = self._ask(m, front, ahead)
        active = self._write(m, ahead)
        filled = delayed(m, self.filling, 1, "filled")[1]
        m.d.comb += self.busy.eq(asking | active | ahead.r_rdy | self.filling | filled | front.go)
        return m

    def _ask(self, m: Module, front: Front, ahead: fifo.SyncFIFOBuffered) -> Signal:
        """A request for each line, one in each cycle that memory takes it."""
        d, now = self.design, fields(Load, front.instruction)
        asking, request = Signal(), self.port.request
        stride, lines = Signal.like(now.stride), Countdown(m, len(now.ny), "lines")
        words = Mux(now.memory == Memory.PARAMETERS, now.nx << _bits(d.lanes), now.nx << _bits(d.block_words))
        m.d.comb += [
            front.free.eq(~asking & ahead.w_rdy), ahead.w_data.eq(front.instruction), ahead.w_en.eq(front.go),
            request.valid.eq(asking),
        ]  # fmt: skip
        with m.If(front.go):
            m.d.sync += [
                asking.eq(1), stride.eq(now.stride), request.payload.address.eq(now.address),
                request.payload.words.eq(words),
            ]  # fmt: skip
            lines.load(now.ny)
        with m.Elif(asking & request.ready):
            m.d.sync += [asking.eq(~lines.last), request.payload.address.eq(request.payload.address + stride)]
            lines.step()
        return asking

    def _write(self, m: Module, ahead: fifo.SyncFIFOBuffered) -> Signal:
        """Entry after entry: those of the frame in a cycle, the others as their words come."""
        d, then = self.design, fields(Load, ahead.r_data)
        bits = signal(BITS, "bits")
        now = fields(Load, bits)
        active, finished, row = Signal(), Signal(), Signal(14)
        across = _Frame(m, "across", 12, now.left, now.nx, now.right)
        down = _Frame(m, "down", 10, now.top, now.ny, now.bottom)
        part, last_part = Signal(4), Signal()
        last = Signal(4)
        m.d.comb += [ahead.r_en.eq(ahead.r_rdy & ~active), last_part.eq(part == last)]
        with m.If(ahead.r_en):
            m.d.sync += [bits.eq(ahead.r_data), active.eq(1), row.eq(then.row), part.eq(0)]
            m.d.sync += last.eq(Mux(then.memory == Memory.PARAMETERS, d.lanes, d.block_words) - 1)
            across.start(then.left, then.nx)
            down.start(then.top, then.ny)
        framing = ~(across.inside & down.inside)
        come = self.port.words.valid
        wrote, entry = Signal(), Signal()
        m.d.comb += [
            self.port.words.ready.eq(active & ~framing), wrote.eq(active & (framing | come)),
            entry.eq(wrote & (framing | last_part)), finished.eq(entry & across.end & down.end),
        ]  # fmt: skip
        with m.If(wrote):
            m.d.sync += part.eq(Mux(framing | last_part, 0, part + 1))
        with m.If(entry):
            m.d.sync += row.eq(row + 1)
            across.step()
            with m.If(across.end):
                down.step()
        with m.If(finished):
            m.d.sync += active.eq(0)
        fill, signals, word = self.fill, Signal(4), signal(64, "word")
        m.d.comb += fill.word.eq(word)
        m.d.sync += [
            self.filling.eq(wrote), signals.eq(now.signals & finished.replicate(4)), self.give.eq(signals),
            fill.memory.eq(now.memory),
            fill.row.eq(row), fill.lane.eq(now.lane), fill.part.eq(part), fill.whole.eq(framing),
            word.eq(Mux(framing, now.pad.as_unsigned().replicate(8), self.port.words.payload)),
        ]  # fmt: skip
        return active


class _Frame:
    """Counts what lies before, inside and behind, over and over; before and behind may be nothing.

    Attributes:
        inside: whether it is inside.
        end: whether this is the last of a round.
    """

    def __init__(self, m: Module, name: str, width: int, before: Signal, within: Signal, behind: Signal) -> None:
        self._m, self._sizes = m, (before, within, behind)
        self._count = Countdown(m, width, name)
        self._at = Signal(2, name=f"{name}_at")
        self.inside, self.end = Signal(name=f"{name}_inside"), Signal(name=f"{name}_end")
        m.d.comb += [
            self.inside.eq(self._at == 1),
            self.end.eq(self._count.last & ((self._at == 2) | ((self._at == 1) & (behind == 0)))),
        ]  # fmt: skip

    def start(self, before: Signal, within: Signal) -> None:
        """A new round, its sizes not yet in registers."""
        self._m.d.sync += self._at.eq(Mux(before == 0, 1, 0))
        self._count.load(Mux(before == 0, within, before))

    def step(self) -> None:
        """Go on by one."""
        before, within, behind = self._sizes
        with self._m.If(~self._count.last):
            self._count.step()
        with self._m.Elif(self._at == 0):
            self._m.d.sync += self._at.eq(1)
            self._count.load(within)
        with self._m.Elif((self._at == 1) & (behind != 0)):
            self._m.d.sync += self._at.eq(2)
            self._count.load(behind)
        with self._m.Else():
            self.start(before, within)


def _bits(power: int) -> int:
    return power.bit_length() - 1
