"""STORE: rows of the output buffer to memory, line by line."""

from amaranth.hdl import Array, Module, Mux, Signal
from amaranth.lib import fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from targets.accelerator.circuit.parts import Countdown, Front, WritePort, delayed, fields, lanes, signal
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.isa import BITS, Store

READ = 2
"""Cycles from a row's address until its words are in a register."""
ROOM = 16
"""Words that wait for memory to take them."""
COMING = 6
"""Words, at most, that are read for it before it is known to be full."""


class StoreUnit(wiring.Component):
    """Tokens are given when memory has said of every line that it holds it."""

    def __init__(self, design: Design) -> None:
        self.design = design
        super().__init__({
            "queue": In(stream.Signature(BITS)), "available": In(4), "take": Out(4), "give": Out(4), "busy": Out(1),
            "port": Out(WritePort()), "output_row": Out(12), "outputs": In(design.columns * 8),
        })  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m, d = Module(), self.design
        m.submodules.front = front = Front()
        wiring.connect(m, wiring.flipped(self.queue), front.queue)
        bits, active, done = Signal(BITS), Signal(), Signal()
        now, then = fields(Store, bits), fields(Store, front.instruction)
        m.d.comb += [front.available.eq(self.available), self.take.eq(front.take), front.free.eq(~active)]

        asking, reading, request = Signal(), Signal(), self.port.request
        lines, entries = Countdown(m, len(now.ny), "lines"), Countdown(m, len(now.nx), "entries")
        open_lines = Signal(11)
        part, last_part, issue, roomy = Signal(4), Signal(), Signal(), Signal()
        m.submodules.room = room = fifo.SyncFIFOBuffered(width=64, depth=ROOM)
        come = delayed(m, issue, READ, "come")
        m.d.comb += [
            last_part.eq(part == d.block_words - 1), request.valid.eq(asking),
            request.payload.words.eq(now.nx * d.block_words),
            issue.eq(reading & roomy),
        ]  # fmt: skip
        m.d.sync += roomy.eq(room.level < ROOM - COMING)
        with m.If(front.go):
            m.d.sync += [
                bits.eq(front.instruction), active.eq(1), asking.eq(1), request.payload.address.eq(then.address),
                self.output_row.eq(then.row), part.eq(0), open_lines.eq(then.ny),
            ]  # fmt: skip
            lines.load(then.ny)
        with m.Elif(asking & request.ready):
            m.d.sync += [asking.eq(0), reading.eq(1), request.payload.address.eq(request.payload.address + now.stride)]
            entries.load(now.nx)
        with m.Elif(issue):
            m.d.sync += part.eq(Mux(last_part, 0, part + 1))
            with m.If(last_part):
                m.d.sync += self.output_row.eq(self.output_row + 1)
                entries.step()
                with m.If(entries.last):
                    m.d.sync += [reading.eq(0), asking.eq(~lines.last)]
                    lines.step()
        row, parts = signal(d.columns * 8, "entry"), delayed(m, part, READ, "part")
        m.d.sync += row.eq(self.outputs)
        m.d.comb += [
            room.w_en.eq(come[READ]), room.w_data.eq(Array(lanes(row, 8 * WORD_BYTES))[parts[READ]]),
            self.port.words.valid.eq(room.r_rdy), self.port.words.payload.eq(room.r_data),
            room.r_en.eq(self.port.words.ready & room.r_rdy), done.eq(active & self.port.done & (open_lines == 1)),
            self.give.eq(now.signals & done.replicate(4)), self.busy.eq(front.go | active),
        ]  # fmt: skip
        with m.If(self.port.done):
            m.d.sync += open_lines.eq(open_lines - 1)
        with m.If(done):
            m.d.sync += active.eq(0)
        return m
