"""What the units of the accelerator are at in which cycle of a frame, and what goes over the memory's ports."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from targets.accelerator import simulator
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.isa import BYTES, KINDS, Gemm, Instruction, Load, Memory, Post, Store, layout

SPANS = 240


@dataclass(frozen=True, slots=True)
class Activity:
    """A frame on the accelerator, by its cycle models: its runs, one after the other.

    Attributes:
        cycles: of each run, with a bus for each of the memory's ports.
        shared_cycles: of all, where these share one: not to the cycle.
        work: of LOAD, GEMM, POST and STORE, the share (0-1) of each of `SPANS` equal spans of the frame in which the
            unit works, rather than waits: entries to fill, pixels to multiply, windows to read, words to store.
        read_bytes, written_bytes, program_bytes: that loads, stores and instructions move.
    """

    cycles: tuple[int, ...]
    shared_cycles: int
    work: NDArray[np.float64]
    read_bytes: int
    written_bytes: int
    program_bytes: int


def observe(programs: Sequence[bytes], design: Design) -> Activity:
    """Of a frame that takes these programs."""
    times = [simulator.timing(program, design) for program in programs]
    edges = np.linspace(0, sum(time.cycles for time in times), SPANS + 1)
    before, moved, work = 0, np.zeros(len(KINDS), np.int64), np.zeros((len(KINDS), SPANS))
    for program, time in zip(programs, times, strict=True):
        units, worked, words = units_of(program), works(program, design), moves(program, design)
        for unit in range(len(KINDS)):
            mine = units == unit
            moved[unit] += WORD_BYTES * int(words[mine].sum())
            until = before + time.done[mine]
            work[unit] += np.diff(_sum_until(edges, until - worked[mine], until))
        before += time.cycles
    return Activity(
        cycles=tuple(time.cycles for time in times),
        shared_cycles=sum(simulator.timing(program, design, shared=True).cycles for program in programs),
        work=np.clip(work / np.diff(edges), 0, 1),
        read_bytes=int(moved[KINDS.index(Load)]),
        written_bytes=int(moved[KINDS.index(Store)]),
        program_bytes=sum(map(len, programs)),
    )


def units_of(program: bytes) -> NDArray[np.int64]:
    """Of each instruction, the number of its kind in `KINDS`."""
    return (_words(program)[0] & np.uint64(2 ** layout(Load)["opcode"][1].width - 1)).astype(np.int64)


def works(program: bytes, design: Design) -> NDArray[np.int64]:
    """Of each instruction, the cycles in which its unit does not wait for another, for memory or for its own start."""
    area = _field(program, Post, "window_y") * _field(program, Post, "window_x")
    turns = np.maximum(area, design.columns // design.lanes)
    frame_y, frame_x = (
        sum(_field(program, Load, name) for name in names) for names in (("top", "bottom"), ("left", "right"))
    )
    lines, entries = _field(program, Load, "ny"), _field(program, Load, "nx")
    framed = (lines + frame_y) * (entries + frame_x) - lines * entries
    by_kind: dict[type[Instruction], NDArray[np.int64]] = {
        Load: moves(program, design) + framed,
        Gemm: _field(program, Gemm, "ny") * _field(program, Gemm, "nx"),
        Post: _field(program, Post, "ny") * _field(program, Post, "nx") * turns,
        Store: moves(program, design),
    }
    return np.choose(units_of(program), [by_kind[kind] for kind in KINDS])


def moves(program: bytes, design: Design) -> NDArray[np.int64]:
    """Of each instruction, the words of the bus that it moves."""
    parameters = _field(program, Load, "memory") == Memory.PARAMETERS
    entry = np.where(parameters, design.lanes, design.block_words)
    none = np.zeros(len(program) // BYTES, np.int64)
    by_kind: dict[type[Instruction], NDArray[np.int64]] = {
        Load: _field(program, Load, "ny") * _field(program, Load, "nx") * entry,
        Store: _field(program, Store, "ny") * _field(program, Store, "nx") * design.block_words,
    }
    return np.choose(units_of(program), [by_kind.get(kind, none) for kind in KINDS])


def _words(program: bytes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    low, high = np.frombuffer(program, np.uint64).reshape(-1, 2).T
    return low, high


def _field(program: bytes, kind: type[Instruction], name: str) -> NDArray[np.int64]:
    """An unsigned field of every instruction, as if all were of this kind."""
    (low, high), (at, bits) = _words(program), layout(kind)[name]
    value = high >> np.uint64(at - 64) if at >= 64 else low >> np.uint64(at)
    if at < 64 < at + bits.width:
        value |= high << np.uint64(64 - at)
    return (value & np.uint64(2**bits.width - 1)).astype(np.int64)


def _sum_until(edges: NDArray[np.float64], begun: NDArray[np.int64], done: NDArray[np.int64]) -> NDArray[np.float64]:
    """How much of these spans, which follow each other, lies before each edge."""
    if not len(done):
        return np.zeros_like(edges)
    begun = np.maximum(begun, np.concatenate(([0], done[:-1])))  # none works at two at once
    whole = np.concatenate(([0], np.cumsum(done - begun)))
    at = np.searchsorted(done, edges, side="right")
    part = np.clip(edges - np.append(begun, np.inf)[at], 0, None)
    return whole[at] + np.where(np.isfinite(part), part, 0)
