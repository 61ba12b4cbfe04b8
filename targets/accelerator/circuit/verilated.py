"""The circuit under Verilator: hundreds of thousands of cycles in a second, for whole networks."""

import ctypes
import os
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from targets.accelerator import tools
from targets.accelerator.circuit.verilog import TOP, verilog
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import BYTES
from targets.accelerator.simulator import LATENCY

STUCK, OUTSIDE = -1, -2


def library(design: Design) -> Path:
    """A shared library of the circuit, built once for each design and version of the circuit (about a minute).

    Raises:
        TargetError: yosys, Verilator or a C++ compiler is missing.
    """
    source, around = verilog(design), (files(__package__) / "memory.cpp").read_text()
    binary, root = tools.verilator()
    compiler = tools.compiler("g++", "clang++")
    version = tools.run([str(binary), "--version"], Path.cwd())

    def build(folder: Path) -> Path:
        (folder / "circuit.v").write_text(source)
        (folder / "memory.cpp").write_text(around)
        environment = dict(os.environ) | {"VERILATOR_ROOT": str(root)}
        options = ["--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "-Wno-fatal", "-Wno-lint", "-Wno-style"]
        names = ["--top-module", TOP, "--prefix", f"V{TOP}", "--Mdir", ".", "circuit.v"]
        tools.run([str(binary), *options, *names], folder, environment)
        sources = [*sorted(str(path.name) for path in folder.glob("*.cpp"))]
        runtime = [str(root / "include" / name) for name in ("verilated.cpp", "verilated_threads.cpp")]
        include = ["-I.", f"-I{root / 'include'}", f"-I{root / 'include' / 'vltstd'}"]
        flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-DVERILATOR=1", "-DVM_TRACE=0", "-DVM_COVERAGE=0", "-w"]
        tools.run([compiler, *flags, *include, *sources, *runtime, "-o", "done.so", "-pthread"], folder)
        return folder / "done.so"

    return tools.built("accelerator.so", (source, around, version), build)


def run(
    built: Path, program: bytes, memory: NDArray[np.uint8], latency: int = LATENCY, limit: int = 2**40,
    *, shared: bool = False,
) -> tuple[int, tuple[int, int, int, int]]:
    """Execute a program; (cycles, cycles in which each unit was at work). Changes the memory image.

    Args:
        built: what `library` made.
        latency, limit: as `simulate.run` has them.
        shared: whether the memory's ports share a bus, as `simulator.timing` has it.

    Raises:
        ProgramError: it is stuck, or writes outside the memory.
    """
    call = ctypes.CDLL(str(built)).run
    call.restype = ctypes.c_int64
    busy = np.zeros(4, np.uint64)
    lines = np.frombuffer(program, np.uint64).copy()
    cycles = call(
        ctypes.c_void_p(memory.ctypes.data), ctypes.c_uint64(memory.size // WORD_BYTES),
        ctypes.c_void_p(lines.ctypes.data), ctypes.c_uint32(len(program) // BYTES), ctypes.c_int(latency),
        ctypes.c_int(shared), ctypes.c_int64(limit), ctypes.c_void_p(busy.ctypes.data),
    )  # fmt: skip
    if cycles == STUCK:
        raise ProgramError(f"The circuit is not done after {limit} cycles.")
    if cycles == OUTSIDE:
        raise ProgramError("The circuit wrote outside its memory.")
    return int(cycles), (int(busy[0]), int(busy[1]), int(busy[2]), int(busy[3]))
