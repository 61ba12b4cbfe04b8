"""What is left of a budget, where scores are single-precision numbers."""

_NOISE = 1e-6
"""Of a score: metrics are computed in float32, so a drop of exactly the budget may look like a hair more."""


def margin(before: float, after: float, allowed: float, *, higher_is_better: bool) -> float:
    """The accepted drop less the drop; negative is overspent, and 0 where it is no more than rounding."""
    left = allowed - (before - after if higher_is_better else after - before)
    return 0.0 if abs(left) <= _NOISE * max(abs(before), abs(after)) else left
