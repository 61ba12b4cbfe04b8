"""Grids of 256 steps, and the record of those that a quantized network's values and weights lie on.

Grids are exact where values' scales are powers of two and weights' are numbers of `SCALE_BITS` bits. Then products
added up in float32, in any order, give the very sum, as long as that has no more than 24 - SCALE_BITS bits, and between
two grids it is multiplied by a short binary fraction: integer hardware, ONNX Runtime and the simulation answer alike,
to the bit.
Source: Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of Deep Neural
Networks", MLSys 2020, whose scales are powers of two for weights as well.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, log2
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import CompressError

LOWEST, HIGHEST = -128, 127
LARGEST_WEIGHT = 127  # symmetric: -128 is left out, so that a product of two negatives fits as well
ACCUMULATOR = -(2**31), 2**31 - 1
SCHEMA = "taskpress.quantization/1"
GRIDS, TENSORS = "quantization.json", "quantization.safetensors"
SCALE_BITS = 5
_SCALE, _OFFSET = "scale.", "offset."
_FINEST = 2.0**-40


@dataclass(frozen=True, slots=True)
class Grid:
    """Real values (q - zero_point) * scale for q in -128...127."""

    scale: float
    zero_point: int

    @classmethod
    def spanning(cls, low: float, high: float, *, exact: bool = False) -> "Grid":
        """The finest grid from `low` to `high` that has an exact zero, which padding and ReLU need.

        The scale is a float32, as every runtime keeps it.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _step((high - low) / (HIGHEST - LOWEST), exact)
        return cls(scale, max(LOWEST, min(HIGHEST, LOWEST - round(low / scale))))

    @classmethod
    def centred(cls, low: float, high: float, *, exact: bool = False) -> "Grid":
        """The finest grid from `low` to `high` whose zero is at 0."""
        return cls(_step(max(-low, high, 0.0) / HIGHEST, exact), 0)

    @property
    def low(self) -> float:
        return (LOWEST - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        return (HIGHEST - self.zero_point) * self.scale


def _step(wanted: float, exact: bool) -> float:
    """A step of a grid; where nothing but zero was seen any will do, and one of 1 keeps factors between grids small."""
    step = max(wanted, _FINEST) if wanted else 1.0
    return float(2.0 ** ceil(log2(step))) if exact else float(torch.tensor(step, dtype=torch.float32))


def short(scales: Tensor) -> Tensor:
    """The next larger numbers of `SCALE_BITS` bits."""
    fraction, exponent = torch.frexp(scales)
    return torch.ldexp((fraction * 2**SCALE_BITS).ceil(), exponent - SCALE_BITS)


@dataclass(frozen=True, slots=True)
class Quantization:
    """The grids of a network, by the names that its trace has.

    Attributes:
        values: of each quantized value, by the node that makes it.
        scales: of each quantized weight, by the contraction that reads it: symmetric, one for each channel written.
        offsets: added to each channel of a contraction's output, by its name (bias correction).
    """

    values: Mapping[str, Grid] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    offsets: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write both into an existing folder."""
        grids = {name: [grid.scale, grid.zero_point] for name, grid in self.values.items()}
        (directory / GRIDS).write_text(json.dumps({"schema": SCHEMA, "values": grids}))
        tensors = {f"{_SCALE}{name}": scale for name, scale in self.scales.items()}
        tensors |= {f"{_OFFSET}{name}": offset for name, offset in self.offsets.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / TENSORS)

    @classmethod
    def load(cls, directory: Path) -> "Quantization | None":
        """What `save` wrote; None where it wrote nothing.

        Raises:
            CompressError: the files are damaged, or of another version.
        """
        path = directory / GRIDS
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            if record["schema"] != SCHEMA:
                raise CompressError(f"{path} has the schema {record['schema']!r}; this version reads {SCHEMA!r}.")
            values = {str(name): Grid(float(scale), int(zero)) for name, (scale, zero) in record["values"].items()}
            tensors = load_file(directory / TENSORS)
            return cls(values, _under(tensors, _SCALE), _under(tensors, _OFFSET))
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise CompressError(f"{path} is not a record of grids ({type(error).__name__}: {error}).") from error


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
