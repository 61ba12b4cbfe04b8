"""What a program answers and how many cycles it takes: the instructions one after the other, in C (`simulator.c`)."""

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from targets.accelerator import native
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.errors import ProgramError
from targets.accelerator.isa import BYTES

LATENCY = 20
"""Cycles from a request to memory until its first word, and from a last word until it is known to be written."""


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
    cycles = native.library().run(
        native.sizes(design), ctypes.c_void_p(None if memory is None else memory.ctypes.data),
        ctypes.c_char_p(program), ctypes.c_int64(count), ctypes.c_int64(latency), ctypes.c_int(shared),
        ctypes.c_void_p(times.ctypes.data),
    )  # fmt: skip
    if cycles == -2:
        raise MemoryError("No memory for the accelerator's buffers.")
    if cycles < 0:
        raise ProgramError("An instruction waits for a token that none before it gives.")
    return Timing(int(cycles), times[:, 0], times[:, 1])
