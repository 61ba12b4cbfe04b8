"""What a program answers and how many cycles it takes: the instructions one after the other, in C (`simulator.c`)."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import tvm
from numpy.typing import NDArray

from targets.accelerator import tools
from targets.accelerator.arithmetic import FRACTION_BITS
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import BYTES, KINDS, Bits, layout
from targets.accelerator.parameters import CHANNEL, FACTORS, GRIDS
from targets.errors import TargetError

LATENCY = 20
"""Cycles from a request to memory until its first word, and from a last word until it is known to be written."""

_FLAGS = ("-O3", "-march=native", "-std=c99", "-shared", "-fPIC")
_DESIGN = ("rows", "columns", "lanes", "input_rows", "weight_rows", "accumulator_rows", "side_rows", "output_rows",
           "parameter_rows", "queue")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """When a program's instructions ran.

    Attributes:
        cycles: from the start until everything is done.
        begun, done: of each instruction, the cycle in which it left its queue, and that in which it gave its tokens.
    """

    cycles: int
    begun: NDArray[np.int64]
    done: NDArray[np.int64]


def execute(program: bytes, memory: NDArray[np.uint8], design: Design, latency: int = LATENCY) -> Timing:
    """Change the memory image as the program does.

    Args:
        program: one that `tokens.check` lets pass; no other is safe.
        memory: whole bus words; int8 activations, weights and parameters, as the program addresses them.

    Raises:
        ProgramError: an instruction waits for a token that none before it gives.
    """
    assert memory.flags.c_contiguous and memory.dtype == np.uint8 and memory.size % WORD_BYTES == 0
    return _run(program, memory, design, latency)


def timing(program: bytes, design: Design, latency: int = LATENCY, *, shared: bool = False) -> Timing:
    """The cycles alone, about 20 million instructions in a second.

    Args:
        shared: whether programs, loads and stores share one bus, which moves a word in each cycle. That is near what
            the circuit takes there, not to the cycle.
    """
    return _run(program, None, design, latency, shared)


def _run(
    program: bytes, memory: NDArray[np.uint8] | None, design: Design, latency: int, shared: bool = False
) -> Timing:
    count = len(program) // BYTES
    times = np.zeros((count, 2), np.int64)
    sizes = np.array([getattr(design, name) for name in _DESIGN], np.int64)
    cycles = _library().run(
        ctypes.c_void_p(sizes.ctypes.data), ctypes.c_void_p(None if memory is None else memory.ctypes.data),
        ctypes.c_char_p(program), ctypes.c_int64(count), ctypes.c_int64(latency), ctypes.c_int(shared),
        ctypes.c_void_p(times.ctypes.data),
    )  # fmt: skip
    if cycles == -2:
        raise MemoryError("No memory for the accelerator's buffers.")
    if cycles < 0:
        raise ProgramError("An instruction waits for a token that none before it gives.")
    return Timing(int(cycles), times[:, 0], times[:, 1])


def available() -> bool:
    """Whether there is a compiler to have it; planning goes without."""
    try:
        tools.compiler("gcc", "clang")
    except TargetError:
        return False
    return True


def header() -> str:
    """`isa.h`: where each field of instructions and parameters lies."""
    return "\n".join(["#pragma once", f"#define FRACTION_BITS {FRACTION_BITS}", *_lines()]) + "\n"


def _lines() -> Iterator[str]:
    tables = {kind.__name__: layout(kind) for kind in KINDS}
    for table, places in (tables | {"grids": GRIDS, "factors": FACTORS, "channel": CHANNEL}).items():
        for name, (at, bits) in places.items():
            yield from _defines(f"{table}_{name}".upper(), at, bits)


def _defines(name: str, at: int, bits: Bits) -> Iterator[str]:
    for what, value in (("AT", at), ("WIDTH", bits.width), ("SIGN", int(bits.signed))):
        yield f"#define {name}_{what} {value}"


@cache
def _library() -> ctypes.CDLL:
    """Compiled once for each machine and version, in the user's folder for such files."""
    source = (files(__package__) / "simulator.c").read_text()
    compiler = tools.compiler("gcc", "clang")

    def build(folder: Path) -> Path:
        (folder / "isa.h").write_text(header())
        (folder / "simulator.c").write_text(source)
        tools.run([compiler, *_FLAGS, "simulator.c", "-o", "done.so"], folder)
        return folder / "done.so"

    processor = str(tvm.target.codegen.llvm_get_system_cpu())
    library = ctypes.CDLL(str(tools.built("simulator.so", (source, header(), compiler, processor, *_FLAGS), build)))
    library.run.restype = ctypes.c_int64
    return library
