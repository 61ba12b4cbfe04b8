"""POST: sums, or the largest or the sum of windows, to int8, a few lanes in each cycle."""

from typing import Any

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from targets.accelerator.arithmetic import FRACTION_BITS
from targets.accelerator.circuit.multiplier import Kind, Multiplier
from targets.accelerator.circuit.parts import Countdown, Front, delayed, fields, lanes, signal
from targets.accelerator.circuit.rounding import CYCLES, ZERO, to_grid
from targets.accelerator.design import Design
from targets.accelerator.isa import BITS, Post, Reduce, Source, Unit
from targets.accelerator.parameters import CHANNEL, FACTORS, GRIDS, Fields

PICK = 6
"""Cycles from the last row of a window until the parameters of its first lanes are asked for."""
STEP = 7
"""Cycles from there until a lane's product is complete."""
ADD = 5
"""Cycles from the first step's result until what the second rounds."""
FIRST, SECOND = STEP + CYCLES, STEP + CYCLES + ADD + CYCLES
"""Cycles from asking for parameters until each step's result."""
WRITE = SECOND + 1
"""Cycles from asking for parameters until the result is written."""
GAP = PICK + 1
"""Cycles that lie at least between an instruction's last part and the first of the next."""


class PostUnit(wiring.Component):
    """The next instruction starts when the last part of the last row is on its way.

    GEMM gets its token when the last row has been read; the others get theirs when the last result lies in the output
    buffer.
    """

    def __init__(self, design: Design, kind: Kind) -> None:
        self.design, self.kind = design, kind
        d = design
        super().__init__({
            "queue": In(stream.Signature(BITS)), "available": In(4), "take": Out(4), "give": Out(4), "busy": Out(1),
            "sums_row": Out(10), "reads_sums": Out(1).array(2), "sums": In(d.columns * 32).array(2),
            "side_row": Out(12), "side": In(d.columns * 8), "parameter_row": Out(10), "parameters": In(d.lanes * 64),
            "write": Out(d.columns // d.lanes), "write_row": Out(12), "write_lanes": Out(d.lanes * 8),
        })  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.front = front = Front()
        wiring.connect(m, wiring.flipped(self.queue), front.queue)
        bits, active, starting = signal(BITS, "bits"), Signal(), Signal()
        self.held = signal(self.design.lanes * 64, "held")  # of the parameters
        m.d.sync += self.held.eq(self.parameters)
        now = fields(Post, bits)
        m.d.comb += [front.available.eq(self.available), self.take.eq(front.take), front.free.eq(~active)]
        m.d.sync += starting.eq(front.go)
        with m.If(front.go):
            m.d.sync += [bits.eq(front.instruction), active.eq(1)]
        reading, first, fire, final = self._walk(m, front, now, starting)
        fired = delayed(m, fire, PICK - 1, "fired")[-1]
        part, valid, row = self._parts(m, now, starting, fired)
        rows = self._capture(m, now, first, fire)
        header = self._header(m, now, starting, fired, valid)
        results = self._compute(m, rows, part, header)
        groups = self.design.columns // self.design.lanes
        ends = delayed(m, final, PICK + groups + WRITE, "ends")
        with m.If(ends[groups + 2]):  # the next one's header is asked for when the last part has been
            m.d.sync += active.eq(0)
        signals = delayed(m, now.signals & final.replicate(4), len(ends) - 1, "signals")
        written = delayed(m, valid, WRITE - 1, "valid")[-1], delayed(m, part, WRITE - 1, "part")[-1]
        m.d.comb += [
            self.give.eq(signals[-1] & ~Unit.GEMM | signals[1] & Unit.GEMM),
            self.busy.eq(front.go | active | Cat(*ends[1:]).any()), self.write_lanes.eq(Cat(*results)),
            self.write_row.eq(delayed(m, row, WRITE, "row")[WRITE]),
        ]  # fmt: skip
        reads = reading & (now.source == Source.ACCUMULATORS)
        m.d.sync += [one.eq(reads & (now.bank == bank)) for bank, one in enumerate(self.reads_sums)]
        m.d.sync += [one.eq(written[0] & (written[1] == k)) for k, one in enumerate(self.write)]
        return m

    def _walk(self, m: Module, front: Front, now: Any, starting: Signal) -> tuple[Signal, Signal, Signal, Signal]:
        """The rows of all windows; (any, a window's first, its last, the last of all) are asked for two cycles on.

        A window of fewer rows than there are parts of a row takes as many cycles as those.
        """
        groups = self.design.columns // self.design.lanes
        running, idling, first, fire, final = (Signal(name=n) for n in ("running", "idling", "first", "fire", "final"))
        across, down = Countdown(m, len(now.nx), "across"), Countdown(m, len(now.ny), "down")
        along, under = Countdown(m, len(now.window_x), "along"), Countdown(m, len(now.window_y), "under")
        idle, missing = Countdown(m, 5, "idle"), Signal(5)
        then, area, short = fields(Post, front.instruction), Signal(8), Signal()
        m.d.sync += area.eq(sum(Mux(bit, then.window_x << k, 0) for k, bit in enumerate(then.window_y)))
        # First rows: of a window, of its line, of a line of windows.
        at, window, line, column = Signal(12), Signal(12), Signal(12), Signal(12)
        last = across.last & down.last
        at_first, ahead = Signal(), Signal()
        m.d.comb += [
            fire.eq(running & ~idling & along.last & under.last), final.eq(fire & last),
            first.eq(running & ~idling & at_first),
            ahead.eq(Mux(idling, idle.last, fire & ~short)),  # to the next window
        ]  # fmt: skip
        side_row = Signal.like(self.side_row)
        m.d.sync += [side_row.eq(now.side + at), self.side_row.eq(side_row), self.sums_row.eq(now.row + at)]

        def begin(row: Any) -> None:
            m.d.sync += [at.eq(row), window.eq(row), line.eq(row), at_first.eq(1)]
            along.load(now.window_x)
            under.load(now.window_y)

        with m.If(~running):
            m.d.sync += [running.eq(starting), missing.eq(groups - area), short.eq(area < groups), at_first.eq(1)]
            for loop, turns in ((across, now.nx), (down, now.ny), (along, now.window_x), (under, now.window_y)):
                loop.load(turns)
        with m.Else():
            m.d.sync += idling.eq(fire & short | idling & ~idle.last)
            with m.If(idling):
                idle.step()
            with m.Else():
                idle.load(missing)
            with m.If(ahead):
                m.d.sync += running.eq(~last)
                with m.If(across.last):
                    m.d.sync += column.eq(column + now.step_y)
                    begin(column + now.step_y)
                    across.load(now.nx)
                    down.step()
                with m.Else():
                    begin(window + now.step_x)
                    across.step()
            with m.Elif(~idling & ~fire):
                m.d.sync += at_first.eq(0)
                with m.If(along.last):
                    m.d.sync += [at.eq(line + now.line), line.eq(line + now.line)]
                    along.load(now.window_x)
                    under.step()
                with m.Else():
                    m.d.sync += at.eq(at + 1)
                    along.step()
        clear = Signal()  # a register, as many wait for it
        m.d.sync += clear.eq(~running & ~front.go & ~starting)
        with m.If(clear):
            m.d.sync += [one.eq(0) for one in (at, window, line, column)]
        return running, first, fire, final

    def _parts(self, m: Module, now: Any, starting: Signal, fired: Signal) -> tuple[Signal, Signal, Signal]:
        """Which part of a row is next, whether there is one, and the row it goes to."""
        groups = self.design.columns // self.design.lanes
        part, valid, row, last = Signal(4), Signal(), Signal(12), Signal()
        m.d.comb += last.eq(part == groups - 1)
        with m.If(starting):
            m.d.sync += row.eq(now.row_out)
        with m.Elif(valid & last):
            m.d.sync += row.eq(row + 1)
        with m.If(fired):
            m.d.sync += [valid.eq(1), part.eq(0)]
        with m.Elif(valid):
            m.d.sync += [valid.eq(~last), part.eq(part + 1)]
        return part, valid, row

    def _capture(self, m: Module, now: Any, first: Signal, fire: Signal) -> tuple[Signal, Signal]:
        """(int32 of all columns, int8 to be added to them) of a window, seven cycles after its last row."""
        d = self.design
        banks = [signal(len(bank), f"bank_{k}") for k, bank in enumerate(self.sums)]
        side = signal(d.columns * 8, "beside")
        m.d.sync += [register.eq(bank) for register, bank in zip(banks, self.sums, strict=True)]
        m.d.sync += side.eq(self.side)
        beside = delayed(m, side, 2, "beside")
        opens, closes = delayed(m, first, 4, "opens")[4], delayed(m, fire, 6, "closes")[6]
        always, alone = signal(1, "always"), signal(1, "alone")  # whether to take a value, and whether only that
        m.d.sync += [always.eq(opens | (now.reduce == Reduce.SUM)), alone.eq(opens | (now.reduce != Reduce.SUM))]
        row, other, found = signal(d.columns * 32, "row"), signal(d.columns * 8, "other"), []
        sums = zip(lanes(banks[0], 32), lanes(banks[1], 32), lanes(side, 8), strict=True)
        for c, (zero, one, eight) in enumerate(sums):
            value, so_far = (signal(32, f"{name}_{c}", sign=True) for name in ("value", "so_far"))
            lifted = Cat(Const(0, FRACTION_BITS), eight, eight[-1].replicate(32 - 8 - FRACTION_BITS))
            m.d.sync += value.eq(Mux(now.source == Source.SIDE, lifted, Mux(now.bank, one, zero)))
            with m.If(always | (value > so_far)):
                m.d.sync += so_far.eq(Mux(alone, value, so_far + value))
            found.append(so_far)
        with m.If(closes):
            m.d.sync += [row.eq(Cat(*found)), other.eq(beside[2])]
        return row, other

    def _header(
        self, m: Module, now: Any, starting: Signal, fired: Signal, valid: Signal
    ) -> "_Header":
        """The parameters' rows, the header first, and what it says."""
        with m.If(starting):
            m.d.sync += self.parameter_row.eq(now.parameters)
        with m.Elif(fired):
            m.d.sync += self.parameter_row.eq(now.parameters + 1)
        with m.Elif(valid):
            m.d.sync += self.parameter_row.eq(self.parameter_row + 1)
        opening = Signal()
        m.d.sync += opening.eq(starting | (opening & ~valid))
        words = {"add": now.add}
        for k, places in enumerate((GRIDS, FACTORS)):
            words |= dict(_parts_of(self.held[64 * k :], places))
        return _Header(m, words, delayed(m, starting, 3, "header")[-1], opening & valid)

    def _compute(self, m: Module, rows: tuple[Signal, Signal], part: Signal, header: "_Header") -> list[Signal]:
        """Both steps, in each lane."""
        d, (row, other) = self.design, rows
        at = delayed(m, part, 2, "at")
        values, others = signal(d.lanes * 32, "values"), signal(d.lanes * 8, "others")
        m.d.sync += [
            values.eq(Array(lanes(row, d.lanes * 32))[at[1]]),
            others.eq(Array(lanes(other, d.lanes * 8))[at[1]]),
        ]  # fmt: skip
        found = []
        for q in range(d.lanes):
            words = dict(_parts_of(self.held[64 * q :], CHANNEL))
            value = lanes(values, 32, sign=True)[q]
            beside = delayed(m, lanes(others, 8, sign=True)[q], FIRST - 2, f"beside_{q}")[-1]
            one = self._scaled(m, value, words, header, q)
            two = self._added(m, one, beside, header, q)
            skipped = delayed(m, one, ADD + CYCLES, f"skipped_{q}")[-1]
            result = signal(8, f"result_{q}")
            m.d.sync += result.eq(Mux(header.at("add", SECOND), two, skipped))
            found.append(result)
        return found

    def _scaled(self, m: Module, value: Any, words: dict[str, Any], header: "_Header", q: int) -> Signal:
        """round((value + bias) * multiplier / 2^shift) + zero; the value and its words lie in registers."""
        total, multiplier = signal(32, f"total_{q}", sign=True), signal(18, f"factor_{q}", sign=True)
        m.d.sync += [total.eq(value + words["bias"]), multiplier.eq(words["multiplier"])]
        halves = Cat(total[:16], Const(0, 1)).as_signed(), total[16:].as_signed()
        products = []
        for name, half in zip(("low", "high"), halves, strict=True):
            m.submodules[f"scale_{name}_{q}"] = one = Multiplier(self.kind, len(half), 18)
            m.d.comb += [one.a.eq(half), one.b.eq(multiplier)]
            products.append(delayed(m, one.product, 1, f"scaled_{name}_{q}")[1])
        product = signal(49, f"product_{q}", sign=True)
        m.d.sync += product.eq((products[1] << 16) + products[0])
        shift = delayed(m, words["shift"], STEP - 2, f"shift_{q}")[-1]
        return to_grid(m, product, shift, header.grid(("zero", "low", "high"), STEP), f"scaled_{q}")

    def _added(self, m: Module, own: Signal, other: Any, header: "_Header", q: int) -> Signal:
        """The second step: what is beside it, scaled as it is itself."""
        parts = []
        for name, value, zero in (("own", own, "zero"), ("other", other, "other_zero")):
            steps = signal(9, f"{name}_steps_{q}", sign=True)
            m.d.sync += steps.eq(value - header.at(zero, FIRST))
            m.submodules[f"add_{name}_{q}"] = one = Multiplier(self.kind, 9, 18)
            m.d.comb += [one.a.eq(steps), one.b.eq(Cat(header.at(name, FIRST + 1), Const(0, 1)).as_signed())]
            parts.append(delayed(m, one.product, 1, f"added_{name}_{q}")[1])
        total, at = signal(28, f"sum_{q}", sign=True), FIRST + ADD
        m.d.sync += total.eq(parts[0] + parts[1])
        grid = header.grid(("sum_zero", "sum_low", "sum_high"), at)
        return to_grid(m, total, header.at("sum_shift", at), grid, f"added_{q}")


class _Header:
    """What an instruction's header says, which moves along the pipeline ahead of the instruction's first part.

    A register hands it on to the next after `GAP` cycles; the first one has it three cycles before the
    instruction's first parameters are asked for.
    """

    def __init__(self, m: Module, words: dict[str, Any], come: Signal, first: Any) -> None:
        self.words = [self._held(m, come, words, 0)]
        last = WRITE // GAP * GAP + 3
        moves = delayed(m, first, last, "moves")
        for at in range(3, last + 1, GAP):
            self.words.append(self._held(m, moves[at - 1], self.words[-1], at))

    def at(self, name: str, first: int, last: int | None = None) -> Signal:
        """A field, in the cycles from `first` to `last` after a part's parameters were asked for."""
        number = (first - 3) // GAP
        assert ((first if last is None else last) - 3) // GAP == number
        return self.words[number + 1][name]

    def grid(self, names: tuple[str, str, str], at: int) -> tuple[Signal, Signal, Signal]:
        """Zero, lowest and highest value for a `to_grid` that begins so many cycles after that."""
        zero, low, high = names
        return self.at(zero, at + ZERO), *(self.at(name, at + ZERO + 1, at + ZERO + 2) for name in (low, high))

    @staticmethod
    def _held(m: Module, when: Any, values: dict[str, Any], number: int) -> dict[str, Signal]:
        found = {name: Signal.like(one, name=f"{name}_at_{number}", reset_less=True) for name, one in values.items()}
        with m.If(when):
            m.d.sync += [one.eq(values[name]) for name, one in found.items()]
        return found


def _parts_of(word: Any, places: Fields) -> list[tuple[str, Any]]:
    parts = [(name, word[at : at + bits.width], bits.signed) for name, (at, bits) in places.items()]
    return [(name, part.as_signed() if sign else part) for name, part, sign in parts]
