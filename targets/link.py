"""Find the linker of a device, and link what TVM compiled into one shared library."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import tvm

from profiles.device import Device
from targets.errors import TargetError

_HOST_LINKERS = ("cc", "gcc", "clang")


def linker(device: Device) -> str:
    """The command that links for a device: its profile's, or the first C compiler on PATH.

    Raises:
        TargetError: naming what was looked for and how to get it.
    """
    wanted = (device.compiler,) if device.compiler else _HOST_LINKERS
    for command in wanted:
        if found := shutil.which(command):
            return found
    package = _package(device.compiler) if device.compiler else "gcc"
    raise TargetError(
        f"No linker for '{device.name}': looked on PATH for {', '.join(wanted)}. "
        f"On Debian or Ubuntu: apt install {package}."
    )


def link_command(device: Device) -> str:
    """What `link` runs, for plans: the same on every machine."""
    return f"{device.compiler or _HOST_LINKERS[0]} -shared -fPIC -o model.so *.o"


def link(executable: tvm.runtime.Executable, library: Path, device: Device) -> None:
    """Write a compiled module as a shared library.

    Raises:
        TargetError: no linker, or what it said when it failed.
    """
    command = linker(device)

    def run(output: str, objects: Sequence[str], **_: object) -> None:
        done = subprocess.run([command, "-shared", "-fPIC", "-o", output, *objects], capture_output=True, text=True)
        if done.returncode != 0:
            raise TargetError(f"{command} could not link for '{device.name}': {done.stderr.strip()}")

    executable.export_library(str(library), fcompile=run)


def _package(compiler: str) -> str:
    """Debian's package of a cross compiler: aarch64-linux-gnu-g++ is in g++-aarch64-linux-gnu."""
    triple, _, tool = compiler.rpartition("-")
    return f"{tool}-{triple}" if triple else compiler
