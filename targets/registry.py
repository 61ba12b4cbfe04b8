"""Every target by name, in reading order; nothing heavy is imported before one is asked for."""

from importlib import import_module

from profiles.settings import did_you_mean
from targets.base import Target
from targets.errors import TargetError

TARGETS = {
    "cpu": "targets.cpu:CpuTarget",
    "gpu": "targets.gpu:GpuTarget",
    "fpga": "targets.fpga:FpgaTarget",
}


def target(name: str) -> Target:
    """The target called `name`.

    Raises:
        TargetError: no such target (with the nearest name).
    """
    if name not in TARGETS:
        raise TargetError(f"No target '{name}'.{did_you_mean(name, TARGETS)}")
    module, _, attribute = TARGETS[name].partition(":")
    made: Target = getattr(import_module(module), attribute)()
    return made
