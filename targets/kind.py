"""The one question every target asks first: is this device of my kind?"""

from profiles.device import Device, Kind, names
from targets.errors import TargetError


def require_kind(target: str, kind: Kind, device: Device) -> None:
    """Raise TargetError, naming the devices that would do, unless `device` is of `kind`."""
    if device.kind != kind:
        article = "an" if device.kind == "fpga" else "a"
        raise TargetError(
            f"The {target} target cannot compile for '{device.name}', which is {article} {device.kind} device. "
            f"{kind.upper()} devices: {', '.join(names(kind))}."
        )
