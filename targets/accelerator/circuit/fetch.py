"""FETCH: reads the program ahead of its execution and hands each instruction to its unit's queue."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from targets.accelerator.circuit.parts import ADDRESS, ReadPort, signal
from targets.accelerator.isa import BITS, KINDS

BURST = 32
"""Words of a request: sixteen instructions."""
BURSTS = 4
"""Requests whose words may be here or on their way."""


class Fetch(wiring.Component):
    """`start` begins with `count` instructions at `address`; `busy` is high until the last is in its queue.

    A program that is no multiple of sixteen instructions is read with what lies behind it, which goes nowhere.
    """

    def __init__(self) -> None:
        super().__init__({
            "start": In(1), "address": In(ADDRESS), "count": In(24), "busy": Out(1), "port": Out(ReadPort()),
            "queues": Out(stream.Signature(BITS)).array(len(KINDS)),
        })  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.words = words = fifo.SyncFIFOBuffered(width=64, depth=BURST * BURSTS)
        left, more, free = Signal(24), Signal(), Signal(range(BURSTS + 1), init=BURSTS)
        unasked, asking, taken = Signal(20), Signal(), Signal(range(BURST))
        request = self.port.request
        asked, freed = Signal(), Signal()
        m.d.comb += [
            request.valid.eq(asking & (free != 0)), request.payload.words.eq(BURST),
            asked.eq(request.valid & request.ready), words.w_data.eq(self.port.words.payload),
            words.w_en.eq(self.port.words.valid), self.port.words.ready.eq(1),
        ]  # fmt: skip
        with m.If(self.start):
            m.d.sync += [
                request.payload.address.eq(self.address), left.eq(self.count), more.eq(self.count != 0),
                unasked.eq((self.count + 15) >> 4), asking.eq(self.count != 0),
            ]  # fmt: skip
        with m.Elif(asked):
            m.d.sync += [
                request.payload.address.eq(request.payload.address + BURST), unasked.eq(unasked - 1),
                asking.eq(unasked != 1),
            ]  # fmt: skip
        m.d.comb += freed.eq(words.r_en & (taken == BURST - 1))
        m.d.sync += free.eq(free - asked + freed)

        low, half, whole = signal(64, "low"), Signal(), Signal(len(KINDS))  # whole: for whom there is an instruction
        instruction, ready = signal(BITS, "instruction"), Signal(len(KINDS))
        word, here, take = signal(64, "word"), Signal(), Signal()
        m.d.comb += [take.eq(here & ~(half & whole.any())), words.r_en.eq(words.r_rdy & (~here | take))]
        m.d.sync += here.eq(words.r_en | here & ~take)
        with m.If(words.r_en):
            m.d.sync += [word.eq(words.r_data), taken.eq(taken + 1)]
        with m.If((whole & ready).any()):
            m.d.sync += whole.eq(0)
        with m.If(take):
            m.d.sync += half.eq(~half)
            with m.If(half):
                m.d.sync += instruction.eq(Cat(low, word))
            with m.Else():
                m.d.sync += low.eq(word)
            with m.If(half & more):
                m.d.sync += [left.eq(left - 1), more.eq(left != 1)]
                m.d.sync += [whole[k].eq(low[:4] == k) for k in range(len(KINDS))]
        for k, queue in enumerate(self.queues):
            m.d.comb += [queue.payload.eq(instruction), queue.valid.eq(whole[k]), ready[k].eq(queue.ready)]
        m.d.comb += self.busy.eq(more | whole.any() | asking | self.start)
        return m
