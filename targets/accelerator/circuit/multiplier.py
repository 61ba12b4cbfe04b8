"""What FPGAs have ready made: multipliers with registers at both ends, and registers where they are wanted."""

from typing import Any, Literal

from amaranth.hdl import ClockSignal, Const, Instance, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

Kind = Literal["plain", "ecp5"]
"""Left to the synthesiser, or a MULT18X18D of Lattice's ECP5, which it does not give input and output registers."""


class Copy(wiring.Component):
    """A register near those who read it, which the synthesiser of an ECP5 does not merge with its like."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        super().__init__({"given": In(1), "held": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self.kind == "plain":
            m.d.sync += self.held.eq(self.given)
            return m
        m.submodules.register = Instance(
            "TRELLIS_FF", i_CLK=ClockSignal(), i_LSR=Const(0), i_CE=Const(1), i_DI=self.given, o_Q=self.held,
            p_CLKMUX="CLK", p_CEMUX="1", p_LSRMUX="LSR", p_REGSET="RESET", p_SRMODE="LSR_OVER_CE", p_GSR="DISABLED",
        )  # fmt: skip
        return m


class Multiplier(wiring.Component):
    """`product` is `a * b` of two cycles ago; `b` is taken in only while `take` is high."""

    def __init__(self, kind: Kind, a: int, b: int) -> None:
        self.kind = kind
        super().__init__({"a": In(signed(a)), "b": In(signed(b)), "take": In(1, init=1), "product": Out(signed(a + b))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self.kind == "plain":
            a, b, product = (Signal.like(one, reset_less=True) for one in (self.a, self.b, self.product))
            m.d.sync += [a.eq(self.a), product.eq(a * b)]
            m.d.comb += self.product.eq(product)
            with m.If(self.take):
                m.d.sync += b.eq(self.b)
            return m
        whole = Signal(36)
        up = 18 - len(self.a), 18 - len(self.b)  # left-aligned, so that few of the product's wires are routed
        a18, b18 = Signal(18), Signal(18)
        m.d.comb += [
            a18.eq(self.a << up[0]), b18.eq(self.b << up[1]), self.product.eq(whole[sum(up) :].as_signed()),
        ]  # fmt: skip
        ports: dict[str, Any] = {f"i_A{k}": a18[k] for k in range(18)} | {f"i_B{k}": b18[k] for k in range(18)}
        ports |= {f"o_P{k}": whole[k] for k in range(36)}
        m.submodules.dsp = Instance(
            "MULT18X18D", i_CLK0=ClockSignal(), i_CE0=Const(1), i_CE1=self.take, i_RST0=Const(0),
            i_SIGNEDA=Const(1), i_SIGNEDB=Const(1), i_SOURCEA=Const(0), i_SOURCEB=Const(0),
            p_REG_INPUTA_CLK="CLK0", p_REG_INPUTA_CE="CE0", p_REG_INPUTA_RST="RST0",
            p_REG_INPUTB_CLK="CLK0", p_REG_INPUTB_CE="CE1", p_REG_INPUTB_RST="RST0",
            p_REG_PIPELINE_CLK="NONE", p_REG_OUTPUT_CLK="CLK0", p_REG_OUTPUT_CE="CE0", p_REG_OUTPUT_RST="RST0",
            p_GSR="DISABLED", p_RESETMODE="SYNC", p_SOURCEB_MODE="B_SHIFT", p_MULT_BYPASS="DISABLED", **ports,
        )  # fmt: skip
        return m


class LutMultiplier(wiring.Component):
    """As `Multiplier`, of 8 bits by 8, in look-up tables: registers hold the sums of two partial products each."""

    def __init__(self) -> None:
        super().__init__({"a": In(signed(8)), "b": In(signed(8)), "take": In(1, init=1), "product": Out(signed(16))})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        held, now = (Signal.like(self.b, reset_less=True) for _ in range(2))
        m.d.comb += now.eq(Mux(self.take, self.b, held))
        m.d.sync += held.eq(now)
        total = Const(0, signed(16))
        for k in range(0, 8, 2):
            low, high = (Mux(now[bit], self.a, 0) for bit in (k, k + 1))
            pair = Signal(signed(11), name=f"pair_{k}", reset_less=True)
            m.d.sync += pair.eq(low + (high << 1) if k < 6 else low - (high << 1))  # the sign's bit counts downwards
            total = total + (pair << k)
        m.d.sync += self.product.eq(total)
        return m
