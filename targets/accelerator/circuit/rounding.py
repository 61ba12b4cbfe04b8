"""Steps of POST's pipeline that occur twice: the shift that rounds, and the clamp."""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal

from targets.accelerator.circuit.parts import delayed, signal

CYCLES, ZERO = 7, 4
"""From a value to its clamped result, both in registers, and to when the zero is added; the bounds are read then."""
_KEPT = 18


def to_grid(m: Module, value: Any, shift: Any, grid: tuple[Any, Any, Any], name: str) -> Signal:
    """clamp(round(value / 2^shift) + zero, low, high), halves to even, `CYCLES` on.

    Args:
        shift: 1 to 48, in the same cycle as the value.
        grid: zero, `ZERO` cycles after the value; low and high in the two cycles after that.
    """
    (zero, low, high), width = grid, len(value)
    less = signal(6, f"{name}_less")  # one step less, so that the half is still there
    wide = signal(width, f"{name}_wide", sign=True)
    m.d.sync += [less.eq(shift - 1), wide.eq(value)]
    coarse, fine = signal(width, f"{name}_coarse", sign=True), signal(width, f"{name}_fine", sign=True)
    with m.Switch(less[3:6]):
        for k in range(6):
            with m.Case(k):
                m.d.sync += coarse.eq(wide >> min(8 * k, width - 1))
        with m.Default():
            m.d.sync += coarse.eq(wide >> (width - 1))
    rest = delayed(m, less[:3], 1, f"{name}_rest")[1]
    m.d.sync += fine.eq(coarse >> rest)
    # Was anything dropped behind the half: whole octets, then single bits?
    octets, dropped = signal(5, f"{name}_octets"), signal(2, f"{name}_dropped")
    m.d.sync += octets.eq(Cat(wide[8 * k : 8 * (k + 1)].any() & (less[3:6] > k) for k in range(5)))
    m.d.sync += dropped.eq(Cat(octets.any(), Cat(coarse[k] & (rest > k) for k in range(7)).any()))
    kept, sign = signal(_KEPT, f"{name}_kept", sign=True), signal(1, f"{name}_sign")
    over, behind = signal(1, f"{name}_over"), signal(1, f"{name}_behind")
    top = fine[_KEPT - 1 :]
    m.d.sync += [kept.eq(fine[:_KEPT]), sign.eq(fine[-1]), over.eq(Mux(fine[-1], ~top.all(), top.any()))]
    m.d.sync += behind.eq(dropped.any())
    moved = signal(_KEPT, f"{name}_moved", sign=True)
    bounded = Mux(over, Cat((~sign).replicate(_KEPT - 1), sign).as_signed(), kept)
    up = kept[0] & (kept[1] | behind)
    total = Cat(Const(1, 1), bounded[1:]).as_signed() + Cat(up, zero).as_signed()  # what is below carries, in one chain
    m.d.sync += moved.eq(total >> 1)
    above, below = (signal(1, f"{name}_{side}") for side in ("above", "below"))
    m.d.sync += [above.eq(moved > high), below.eq(moved < low)]
    inside, found = (signal(8, f"{name}_{what}", sign=True) for what in ("inside", "found"))
    m.d.sync += [inside.eq(moved), found.eq(Mux(above, high, Mux(below, low, inside)))]
    return found
