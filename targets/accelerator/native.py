"""What is done in C: executing programs, counting their cycles (`simulator.c`), trying tokens (`tokens.c`)."""

import ctypes
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

import tvm

from targets.accelerator import tools
from targets.accelerator.arithmetic import FRACTION_BITS
from targets.accelerator.design import Design
from targets.accelerator.isa import KINDS, Bits, layout
from targets.accelerator.parameters import CHANNEL, FACTORS, GRIDS
from targets.errors import TargetError

_SOURCES = "simulator.c", "tokens.c"
_FLAGS = ("-O3", "-march=native", "-std=c99", "-shared", "-fPIC")
_DESIGN = ("rows", "columns", "lanes", "input_rows", "weight_rows", "accumulator_rows", "side_rows", "output_rows",
           "parameter_rows", "queue")  # fmt: skip


def available() -> bool:
    """Whether there is a compiler for it; planning goes without."""
    try:
        tools.compiler("gcc", "clang")
    except TargetError:
        return False
    return True


def sizes(design: Design) -> ctypes.Array[ctypes.c_int64]:
    """A design as C reads it."""
    return (ctypes.c_int64 * len(_DESIGN))(*(getattr(design, name) for name in _DESIGN))


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
def library() -> ctypes.CDLL:
    """Compiled once for each machine and version, in the user's folder for such files."""
    sources = {name: (files(__package__) / name).read_text() for name in ("instructions.h", *_SOURCES)}
    sources["isa.h"] = header()
    compiler = tools.compiler("gcc", "clang")

    def build(folder: Path) -> Path:
        for name, text in sources.items():
            (folder / name).write_text(text)
        tools.run([compiler, *_FLAGS, *_SOURCES, "-o", "done.so"], folder)
        return folder / "done.so"

    processor = str(tvm.target.codegen.llvm_get_system_cpu())
    key = *sources.values(), compiler, processor, *_FLAGS
    found = ctypes.CDLL(str(tools.built("simulator.so", key, build)))
    found.run.restype = ctypes.c_int64
    return found
