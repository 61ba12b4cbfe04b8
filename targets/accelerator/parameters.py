"""A block's requantization as rows of the parameter buffer: a header of two words, then a word for each channel."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from targets.accelerator.arithmetic import Addition, Step
from targets.accelerator.design import Design
from targets.accelerator.isa import Bits

Words = NDArray[np.uint64]
Fields = Mapping[str, tuple[int, Bits]]

_S8, _FACTOR, _SHIFT = Bits(8, signed=True), Bits(17), Bits(6)
GRIDS: Fields = {
    "zero": (0, _S8), "low": (8, _S8), "high": (16, _S8), "other_zero": (24, _S8),
    "sum_zero": (32, _S8), "sum_low": (40, _S8), "sum_high": (48, _S8),
}  # fmt: skip
FACTORS: Fields = {"own": (0, _FACTOR), "other": (17, _FACTOR), "sum_shift": (34, _SHIFT)}
CHANNEL: Fields = {
    "bias": (0, Bits(32, signed=True)), "multiplier": (32, Bits(18, signed=True)), "shift": (50, _SHIFT),
}  # fmt: skip


def pack(step: Step, design: Design) -> Words:
    """Words of `design.parameter_block` rows; channels beyond the step's answer `zero` whatever their sums."""
    then = step.addition or Addition(0, 0, 0, 1, 0, -128, 127)
    rows = np.zeros((design.parameter_block, design.lanes), np.uint64)
    rows[0, 0] = _word(GRIDS, {
        "zero": step.zero, "low": step.low, "high": step.high, "other_zero": then.other_zero,
        "sum_zero": then.zero, "sum_low": then.low, "sum_high": then.high,
    })  # fmt: skip
    rows[0, 1] = _word(FACTORS, {"own": then.own, "other": then.other, "sum_shift": then.shift})
    scaling, rest = step.scaling, design.columns - len(step.scaling)
    channels = {"bias": (scaling.bias, 0), "multiplier": (scaling.multiplier, 0), "shift": (scaling.shift, 1)}
    values = {name: np.concatenate([some, np.full(rest, other)]) for name, (some, other) in channels.items()}
    rows[1:] = _word(CHANNEL, values).reshape(-1, design.lanes)
    return rows.reshape(-1)


def _word(fields: Fields, values: Mapping[str, Any]) -> Words:
    found: Any = np.uint64(0)
    for name, (at, bits) in fields.items():
        masked = np.asarray(values[name], np.int64) & (2**bits.width - 1)
        found = found | masked.astype(np.uint64) << np.uint64(at)
    return np.asarray(found, np.uint64)
