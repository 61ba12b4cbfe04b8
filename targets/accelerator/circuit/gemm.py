"""GEMM: the array. A tile of weights is read into shadow registers while the array still computes with the last."""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from targets.accelerator.circuit.multiplier import Copy, Kind, LutMultiplier, Multiplier
from targets.accelerator.circuit.parts import Countdown, Front, delayed, fields, lanes, signal
from targets.accelerator.design import Design
from targets.accelerator.isa import BITS, Gemm, Unit

PRODUCTS = 5
"""Cycles from a row's address to its products: a register, the buffer, another register, the multipliers' two."""
EARLY = 4
"""Cycles that POST's tokens come before that: it reads its first row five cycles after it can take one."""


class GemmUnit(wiring.Component):
    """POST's token, which says that a bank may be written, is taken when a tile is there; the others before it is read.

    Tokens are given when the last sums lie in their bank, but for POST's, which takes some time to begin to read.

    Buffers answer in the cycle after an address; `sums_*` are the two banks, of which one is read and written here.
    """

    def __init__(self, design: Design, kind: Kind) -> None:
        self.design, self.kind = design, kind
        d = design
        super().__init__({
            "queue": In(stream.Signature(BITS)), "available": In(4), "take": Out(4), "give": Out(4), "busy": Out(1),
            "input_row": Out(14), "inputs": In(d.rows * 8), "weight_row": Out(14), "weights": In(d.columns * 8),
            "read_row": Out(10), "read_sums": In(d.columns * 32).array(2),
            "write_row": Out(10), "write": Out(1).array(2), "write_sums": Out(d.columns * 32),
        })  # fmt: skip

    @property
    def depth(self) -> int:
        """Cycles from a row's address until its sums, without what the accumulators hold, are in registers."""
        return PRODUCTS + (self.design.rows - 1).bit_length()

    def elaborate(self, platform: object) -> Module:
        m, at = Module(), self.depth + 1
        m.submodules.front = front = Front()
        wiring.connect(m, wiring.flipped(self.queue), front.queue)
        swap = Signal()
        held, ready, bits, shadow = self._fetch(m, front, swap)
        free, waits = Signal(), fields(Gemm, bits).waits & Unit.POST
        m.d.sync += free.eq(~(waits & ~self.available).any())
        m.d.comb += [
            front.available.eq(self.available | Unit.POST),
            self.take.eq(front.take & ~Unit.POST | waits & swap.replicate(4)),
        ]  # fmt: skip
        now, running, row, row_out, last = self._run(m, swap, held & ready & free, bits)
        sums = self._multiply(m, delayed(m, swap, 3, "swap")[3], shadow)
        active, signals = delayed(m, running, at, "active"), delayed(m, now.signals & last.replicate(4), at, "signals")
        self._accumulate(
            m, active, delayed(m, row_out, at, "row_out"), delayed(m, now.bank, at, "bank"),
            delayed(m, now.clear, at, "clear"), sums,
        )  # fmt: skip
        m.d.sync += self.input_row.eq(row)
        m.d.comb += [
            self.give.eq(signals[at] & ~Unit.POST | signals[at - EARLY] & Unit.POST),
            self.busy.eq(front.go | held | Cat(*active).any()),
        ]  # fmt: skip
        return m

    def _fetch(self, m: Module, front: Front, swap: Signal) -> tuple[Signal, Signal, Signal, list[list[Signal]]]:
        """The next instruction and its tile, into the shadow registers.

        Returns:
            whether there is a next one, whether its tile is complete, its bits, and the shadow registers.
        """
        d, bits = self.design, signal(BITS, "next_bits")
        held, ready, reading, number = Signal(), Signal(), Signal(), Signal(range(self.design.rows))
        count = Countdown(m, d.rows.bit_length(), "tile")
        m.d.comb += front.free.eq(~held)
        with m.If(swap):
            m.d.sync += held.eq(0)
        with m.If(reading):
            m.d.sync += [self.weight_row.eq(self.weight_row + 1), number.eq(number + 1), reading.eq(~count.last)]
            count.step()
        with m.If(front.go):
            m.d.sync += [
                held.eq(1), bits.eq(front.instruction), reading.eq(1), number.eq(0),
                self.weight_row.eq(fields(Gemm, front.instruction).weights),
            ]  # fmt: skip
            count.load(d.rows)
        weights = signal(d.columns * 8, "entry")
        m.d.sync += weights.eq(self.weights)
        come, numbers = delayed(m, reading, 1, "come")[-1], delayed(m, number, 1, "number")[-1]
        done = delayed(m, reading & count.last, 2, "read")
        shadow = [[signal(8, f"shadow_{r}_{c}", sign=True) for c in range(d.columns)] for r in range(d.rows)]
        for r, registers in enumerate(shadow):
            mine = Signal(name=f"row_{r}")
            m.d.sync += mine.eq(come & (numbers == r))
            with m.If(mine):
                m.d.sync += [one.eq(part) for one, part in zip(registers, lanes(weights, 8), strict=True)]
        with m.If(front.go):
            m.d.sync += ready.eq(0)
        with m.Elif(done[2]):
            m.d.sync += ready.eq(1)
        return held, ready, bits, shadow

    def _run(
        self, m: Module, swap: Signal, ready: Any, next_bits: Signal
    ) -> tuple[Any, Signal, Signal, Signal, Signal]:
        """Rows of inputs and of accumulators, one in each cycle from the one after `swap` on.

        Returns:
            the instruction, whether it runs, the row of inputs, that of accumulators, and whether they are the last.
        """
        bits = signal(BITS, "bits")
        now, then = fields(Gemm, bits), fields(Gemm, next_bits)
        running, row, line, row_out, last = Signal(), Signal(14), Signal(14), Signal(10), Signal()
        across, down = Countdown(m, len(now.nx), "across"), Countdown(m, len(now.ny), "down")
        m.d.comb += [last.eq(running & across.last & down.last), swap.eq(ready & (~running | last))]
        with m.If(swap):
            m.d.sync += [
                bits.eq(next_bits), running.eq(1), row.eq(then.row), line.eq(then.row), row_out.eq(then.row_out),
            ]  # fmt: skip
            across.load(then.nx)
            down.load(then.ny)
        with m.Elif(running):
            m.d.sync += [row_out.eq(row_out + 1), running.eq(~last)]
            with m.If(across.last):
                m.d.sync += [row.eq(line + now.step_y), line.eq(line + now.step_y)]
                across.load(now.nx)
                down.step()
            with m.Else():
                m.d.sync += row.eq(row + now.step_x)
                across.step()
        return now, running, row, row_out, last

    def _multiply(self, m: Module, take: Signal, shadow: list[list[Signal]]) -> list[Signal]:
        """A sum for each column, of the rows whose address was given `depth` cycles ago; `take` comes a cycle early."""
        d, inputs = self.design, signal(self.design.rows * 8, "row")
        m.d.sync += inputs.eq(self.inputs)
        found = []
        for c in range(d.columns):
            parts = list[Any]()
            m.submodules[f"take_{c}"] = mine = Copy(self.kind)
            m.d.comb += mine.given.eq(take)
            for r, x in enumerate(lanes(inputs, 8, sign=True)):
                one = LutMultiplier() if d.array_in == "luts" else Multiplier(self.kind, 8, 8)
                m.submodules[f"multiplier_{r}_{c}"] = one
                m.d.comb += [one.a.eq(x), one.b.eq(shadow[r][c]), one.take.eq(mine.held)]
                parts.append(one.product)
            while len(parts) > 1:
                level = []
                for k in range(0, len(parts), 2):
                    total = signal(len(parts[k]) + 1, f"sum_{c}_{len(parts)}_{k}", sign=True)
                    m.d.sync += total.eq(parts[k] + parts[k + 1])
                    level.append(total)
                parts = level
            found.append(parts[0])
        return found

    def _accumulate(
        self, m: Module, active: list[Signal], rows: list[Signal], banks: list[Signal], clears: list[Signal],
        sums: list[Signal],
    ) -> None:
        """Read what a bank holds in time for the sums, add, and write it back."""
        at, held = self.depth, [signal(len(bank), f"held_{k}") for k, bank in enumerate(self.read_sums)]
        before, after = signal(len(held[0]), "before"), signal(len(held[0]), "after")
        m.d.comb += self.read_row.eq(rows[at - 4])
        m.d.sync += [register.eq(bank) for register, bank in zip(held, self.read_sums, strict=True)]
        m.d.sync += before.eq(Mux(clears[at - 1], 0, Mux(banks[at - 1], held[1], held[0])))
        m.d.comb += self.write_sums.eq(after)
        totals = zip(lanes(after, 32), lanes(before, 32, sign=True), sums, strict=True)
        m.d.sync += [total.eq(old + new) for total, old, new in totals]
        m.d.sync += [one.eq(active[at] & (banks[at] == bank)) for bank, one in enumerate(self.write)]
        m.d.comb += self.write_row.eq(rows[at + 1])
