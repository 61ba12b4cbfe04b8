"""The circuit as plain Verilog."""

import tempfile
from pathlib import Path

from amaranth.back import rtlil
from amaranth.hdl import Value

from targets.accelerator import tools
from targets.accelerator.circuit.harness import Harness
from targets.accelerator.circuit.multiplier import Kind
from targets.accelerator.circuit.top import Accelerator
from targets.accelerator.design import Design

TOP, HARNESS = "accelerator", "harness"


def intermediate(design: Design, kind: Kind) -> str:
    """The circuit in yosys' own language (RTLIL), which needs no tool."""
    circuit = Accelerator(design, kind)
    ports = {
        "_".join(map(str, path)): (Value.cast(value), None) for path, _, value in circuit.signature.flatten(circuit)
    }
    return str(rtlil.convert(circuit, name=TOP, ports=ports))


def verilog(design: Design, kind: Kind = "plain") -> str:
    """One flat module `accelerator`, in Verilog that every tool reads.

    Raises:
        TargetError: yosys is missing.
    """
    return _flat(intermediate(design, kind), TOP)


def harness(design: Design, kind: Kind) -> str:
    """One flat module `harness`: the circuit behind four pins.

    Raises:
        TargetError: yosys is missing.
    """
    return _flat(str(rtlil.convert(Harness(design, kind), name=HARNESS)), HARNESS)


def _flat(circuit: str, top: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "circuit.il").write_text(circuit)
        passes = [
            "read_rtlil circuit.il", f"hierarchy -top {top}", "proc", "flatten", "memory_collect", "opt_clean",
            "write_verilog -noattr circuit.v",
        ]  # fmt: skip
        tools.yosys(passes, folder)
        return (folder / "circuit.v").read_text()
