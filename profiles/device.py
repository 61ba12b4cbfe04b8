"""A device: the facts about one kind of machine that a compiler and a report need."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from profiles.errors import ProfileError
from profiles.settings import Settings, did_you_mean, faults

Kind = Literal["cpu", "gpu", "fpga"]


class Device(Settings):
    """One device profile, read from `devices/<name>.toml` or a path.

    Attributes:
        target: what TVM's Target takes, a dict; targets read it, nothing here does.
        cores: cores an inference may use.
        vector_bits, vector_registers: of the SIMD unit (CPU kind).
        channel_multiple: layer widths that waste no lane are multiples of this.
        compiler: command that links a shared library for this device; empty means the host's own.
    """

    name: str
    kind: Kind
    description: str
    target: Mapping[str, object]
    cores: int = Field(ge=1, default=1)
    vector_bits: int = Field(ge=32, default=128)
    vector_registers: int = Field(ge=8, default=16)
    channel_multiple: int = Field(ge=1, default=8)
    compiler: str = ""

    @property
    def vector_lanes(self) -> int:
        """float32 values in one vector register."""
        return self.vector_bits // 32
