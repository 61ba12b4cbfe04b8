"""The circuit behind four pins, so that it can be placed and routed alone: what goes in is shifted in, what comes out
is folded.
"""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from targets.accelerator.circuit.multiplier import Kind
from targets.accelerator.circuit.top import Accelerator
from targets.accelerator.design import Design

FOLD = 4


class Harness(wiring.Component):
    """Every input is a register that the outside can set, every output a register that the outside can tell."""

    def __init__(self, design: Design, kind: Kind) -> None:
        self.design, self.kind = design, kind
        super().__init__({"given": In(1), "found": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.accelerator = inner = Accelerator(self.design, self.kind)
        ports = list(inner.signature.flatten(inner))
        inputs = Cat(value for _, member, value in ports if member.flow == In)
        outputs = Cat(value for _, member, value in ports if member.flow == Out)
        chain, held, folded = Signal(len(inputs)), Signal(len(inputs)), Signal(len(outputs))
        m.d.sync += [chain.eq(Cat(self.given, chain)), held.eq(chain), folded.eq(outputs)]
        m.d.comb += inputs.eq(held)
        while len(folded) > 1:
            smaller = Signal(-(-len(folded) // FOLD), name=f"folded_{len(folded)}")
            m.d.sync += [one.eq(folded[FOLD * k : FOLD * k + FOLD].xor()) for k, one in enumerate(smaller)]
            folded = smaller
        m.d.comb += self.found.eq(folded)
        return m
