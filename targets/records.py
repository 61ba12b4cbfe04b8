"""Measured times of kernels, kept from one run to the next: by machine, layer and candidate, as JSON."""

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pydantic import Field, ValidationError

from profiles.device import Device
from profiles.settings import Settings, faults
from targets.errors import TargetError

Records = Mapping[str, Mapping[str, float]]
"""Seconds by layer and candidate, of one machine."""

NONE: Records = MappingProxyType({})


class _File(Settings):
    schema_: str = Field(alias="schema", pattern="^taskpress.records/1$")
    machines: Mapping[str, Mapping[str, Mapping[str, float]]]


def machine(device: Device) -> str:
    """What records of a device are kept under: instruction set, core and number of cores, not the profile's name."""
    architecture = str(device.target.get("mtriple", platform.machine())).partition("-")[0]
    core = device.target.get("mcpu", "any core")
    return f"{architecture} {core}, {device.vector_bits} bits, {device.cores} cores"


def read(path: Path, device: Device) -> Records:
    """A device's records in a file; none where there is no such file.

    Raises:
        TargetError: the file is no records file, or cannot be read.
    """
    return _machines(path).get(machine(device), {})


def write(path: Path, device: Device, records: Records) -> None:
    """Add a device's records to a file, in place of older times of the same candidates; the whole file or nothing.

    Raises:
        TargetError: what is there already is no records file, or the disk refuses.
    """
    machines = {name: {layer: dict(times) for layer, times in kept.items()} for name, kept in _machines(path).items()}
    mine = machines.setdefault(machine(device), {})
    for layer, times in records.items():
        mine[layer] = {**mine.get(layer, {}), **times}
    text = json.dumps({"schema": "taskpress.records/1", "machines": machines}, indent=1, sort_keys=True) + "\n"
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(draft).chmod(0o644)
        Path(draft).replace(path)
    except OSError as error:
        if draft is not None:
            with contextlib.suppress(OSError):
                Path(draft).unlink()
        raise TargetError(f"Cannot write the records '{path}': {error.strerror}.") from error


def _machines(path: Path) -> Mapping[str, Records]:
    try:
        return _File.model_validate_json(path.read_text(encoding="utf-8")).machines
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"Cannot read the records '{path}': {error}.") from error
    except ValidationError as error:
        raise TargetError("\n".join(faults(error, _File, f"Records '{path}'"))) from error
