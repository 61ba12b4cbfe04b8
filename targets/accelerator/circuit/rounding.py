"""Steps of POST's pipeline that occur twice: the shift that rounds, and the clamp."""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed

from targets.accelerator.circuit.parts import delayed

CYCLES = 6
"""From a value to its clamped result, both in registers."""
_KEPT = 18


def to_grid(m: Module, value: Any, shift: Any, zero: Any, low: Any, high: Any, name: str) -> Signal:
    """clamp(round(value / 2^shift) + zero, low, high), halves rounded up, 6 cycles on.

    Args:
        shift: 1 to 48, in the same cycle as the value; the grid stays the same all the time.
    """
    width = len(value)
    less = Signal(6, reset_less=True, name=f"{name}_less")  # one step less, so that the half is still there
    wide = Signal(signed(width), reset_less=True, name=f"{name}_wide")
    m.d.sync += [less.eq(shift - 1), wide.eq(value)]
    coarse, fine = Signal(signed(width), reset_less=True, name=f"{name}_coarse"), Signal(signed(width), reset_less=True, name=f"{name}_fine")
    with m.Switch(less[3:6]):
        for k in range(6):
            with m.Case(k):
                m.d.sync += coarse.eq(wide >> min(8 * k, width - 1))
        with m.Default():
            m.d.sync += coarse.eq(wide >> (width - 1))
    m.d.sync += fine.eq(coarse >> delayed(m, less[:3], 1, f"{name}_rest")[1])
    kept, sign = Signal(signed(_KEPT), reset_less=True, name=f"{name}_kept"), Signal(reset_less=True, name=f"{name}_sign")
    over = Signal(reset_less=True, name=f"{name}_over")
    top = fine[_KEPT - 1 :]
    m.d.sync += [kept.eq(fine[:_KEPT]), sign.eq(fine[-1]), over.eq(Mux(fine[-1], ~top.all(), top.any()))]
    moved = Signal(signed(_KEPT), reset_less=True, name=f"{name}_moved")
    bounded = Mux(over, Cat((~sign).replicate(_KEPT - 1), sign).as_signed(), kept)
    m.d.sync += moved.eq(((bounded + 1) >> 1) + zero)
    found = Signal(signed(8), reset_less=True, name=f"{name}_found")
    m.d.sync += found.eq(Mux(moved > high, high, Mux(moved < low, low, moved)))
    return found


def held(m: Module, bits: Any, name: str) -> Signal:
    """A register that follows the bits."""
    found = Signal.like(Const(0, len(bits)), name=name, reset_less=True)
    m.d.sync += found.eq(bits)
    return found
