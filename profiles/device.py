"""A device: the facts about one kind of machine that a compiler and a report need."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from profiles.errors import ProfileError
from profiles.settings import Settings, did_you_mean, faults

Kind = Literal["cpu", "gpu", "fpga"]

HOST = "host"


class Clock(Settings):
    """How fast the accelerator's circuit is on an FPGA.

    Attributes:
        by: a circuit that was routed, or a guess.
        how: tool, part, speed grade and seeds of a routed one; what a guess goes by.
    """

    megahertz: float = Field(gt=0)
    by: Literal["place-and-route", "estimate"]
    how: str = Field(min_length=1)


class Device(Settings):
    """One device profile, read from `devices/<name>.toml` or a path.

    Attributes:
        name: the file's stem; `host` for the machine this runs on.
        target: what TVM's Target takes, a dict; targets read it, nothing here does. Empty only for an fpga.
        cores: physical CPU cores an inference may use; for a gpu those of its host.
        vector_bits, vector_registers: of the SIMD unit (cpu kind).
        channel_multiple: layer widths that waste no lane are multiples of this.
        compiler: command that links a shared library for this device; empty means the host's own.
        array: of an fpga, what of its accelerator is not the default (`targets/accelerator/design.py`).
        clock: of an fpga, its accelerator's.
    """

    name: str
    kind: Kind
    description: str
    target: Mapping[str, object] = Field(default_factory=dict)
    cores: int = Field(ge=1, default=1)
    vector_bits: int = Field(ge=32, default=128)
    vector_registers: int = Field(ge=8, default=16)
    channel_multiple: int = Field(ge=1, default=8)
    compiler: str = ""
    array: Mapping[str, int | str] = Field(default_factory=dict)
    clock: Clock | None = None

    @property
    def vector_lanes(self) -> int:
        """float32 values in one vector register."""
        return self.vector_bits // 32

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.kind != "fpga" and "kind" not in self.target:
            raise ValueError(f"[target] of a {self.kind} needs 'kind', such as 'llvm' or 'cuda'")
        if (self.kind == "fpga") != (self.clock is not None):
            raise ValueError("an fpga, and no other device, needs [clock] with 'megahertz', 'by' and 'how'")
        cores = self.target.get("num-cores", self.cores)
        if cores != self.cores:
            raise ValueError(f"[target] 'num-cores' is {cores}, but 'cores' is {self.cores}")
        return self


def load(name_or_path: str | Path, search: Sequence[Path] = ()) -> Device:
    """The profile of that name, or at that path when it ends in `.toml`.

    `host` is detected. Other names are looked for in the folders of `search` first, then among the built-in ones.

    Raises:
        ProfileError: no such profile (with the nearest name), or every fault of the file at once.
    """
    text = str(name_or_path)
    if text == HOST:
        from profiles.host import device

        return device()
    if text.endswith(".toml"):
        return _read(Path(text))
    found = dict(_profiles(search))
    if text not in found:
        path = " A path ends in '.toml'." if "/" in text else ""
        raise ProfileError(f"No device '{text}'.{did_you_mean(text, (HOST, *found))}{path}")
    return _read(found[text])


def names(kind: Kind | None = None, search: Sequence[Path] = ()) -> tuple[str, ...]:
    """Every device `load` knows by name, `host` first, then by alphabet; of one kind only when given."""
    known = sorted(name for name, file in _profiles(search) if kind is None or _read(file).kind == kind)
    return (HOST, *known) if kind in (None, "cpu") else tuple(known)


def _profiles(search: Sequence[Path]) -> Iterator[tuple[str, Traversable]]:
    """Name and file of each profile once; earlier folders win."""
    seen = {HOST}
    for folder in (*search, files("profiles") / "devices"):
        if not folder.is_dir():
            raise ProfileError(f"No folder '{folder}' to look for device profiles in.")
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            name = file.name.removesuffix(".toml")
            if file.name.endswith(".toml") and name not in seen:
                seen.add(name)
                yield name, file


def _read(file: Traversable) -> Device:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"Cannot read the device profile '{file}': {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"The device profile '{file}' is not TOML: {error}.") from error
    where = f"Device profile '{file.name}'"
    if "name" in table:
        raise ProfileError(f"{where}: a device is called as its file is; remove 'name'.")
    try:
        return Device.model_validate({"name": file.name.removesuffix(".toml"), **table})
    except ValidationError as error:
        raise ProfileError("\n".join(faults(error, Device, where))) from error
