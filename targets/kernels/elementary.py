"""exp, sigmoid, tanh and erf as plain arithmetic, so that loops over them become vectors instead of library calls.

Accurate to about 2e-7, relative for exp and sigmoid, absolute for erf; NaN stays NaN; exp overflows to
infinity, and is zero rather than subnormal below -87.33.
Sources: Cephes expf and tanhf (S. Moshier); Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26 for erf.
"""

from collections.abc import Callable
from typing import Any

from tvm import tirx

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def exp(x: Any) -> Any:
    """2 to the nearest whole power, by its bits, times a polynomial for the rest."""
    # The constant stands first: a comparison with NaN fails, and the second operand is then taken.
    bounded = tirx.max(_f32(-87.33), tirx.min(_f32(89.0), x))

    def power(x: Any) -> Any:
        whole = tirx.min(tirx.floor(x * _f32(1.44269504088896341) + _f32(0.5)), _f32(127.0))
        return _let(whole, lambda n: _let(
            x - n * _f32(0.693359375) + n * _f32(2.12194440e-4),
            lambda r: (_polynomial(_EXP, r) * r * r + r + _f32(1.0)) * _two_to(n),
        ))

    return tirx.Select(x < _f32(-87.33), _f32(0.0), _let(bounded, power))


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _f32(1.0) / (_f32(1.0) + exp(_f32(0.0) - x))


def tanh(x: Any) -> Any:
    """A polynomial near zero, where 1 - 2 / (exp(2 x) + 1) would cancel."""
    def value(x: Any) -> Any:
        near = _let(x * x, lambda z: _polynomial(_TANH, z) * z * x + x)
        far = _f32(1.0) - _f32(2.0) / (exp(x + x) + _f32(1.0))
        return tirx.Select(tirx.abs(x) < _f32(0.625), near, far)

    return _let(x, value)


def erf(x: Any) -> Any:
    """One minus a polynomial in 1 / (1 + p x) times exp(-x^2), mirrored for negative x."""
    def value(x: Any) -> Any:
        size = tirx.abs(x)
        rest = _let(_f32(1.0) / (_f32(1.0) + _f32(0.3275911) * size), lambda t: _polynomial(_ERF, t) * t)
        positive = _f32(1.0) - rest * exp(_f32(0.0) - x * x)
        return _let(positive, lambda y: tirx.Select(x < _f32(0.0), _f32(0.0) - y, y))

    return _let(x, value)


ELEMENTARY: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": exp, "tirx.sigmoid": sigmoid, "tirx.tanh": tanh, "tirx.erf": erf,
}


def _f32(value: float) -> Any:
    return tirx.const(value, "float32")


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    name = tirx.Var("t", "float32")
    return tirx.Let(name, value, body(name))


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    total = _f32(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + _f32(coefficient)
    return total


def _two_to(n: Any) -> Any:
    """2 to a whole number from -126 to 127, given as a float."""
    bits = (tirx.Cast("int32", n) + tirx.const(127, "int32")) * tirx.const(1 << 23, "int32")
    return tirx.reinterpret("float32", bits)
