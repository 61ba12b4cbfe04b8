"""What this machine can do at best: multiply-adds and memory reads a second, measured through the same compiler."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from profiles.device import Device
from targets.runner import configure

_TURNS = 100_000
_READ_BYTES = 256 << 20
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Peak:
    """Of all threads together: multiply-adds a second, and bytes a second from memory."""

    macs: float
    bytes: float


def peak(device: Device, threads: int) -> Peak:
    """Measure, on this machine, with code for `device`; takes a second."""
    lanes, registers = device.vector_lanes, device.vector_registers // 2
    target = tvm.target.Target(dict(device.target))
    with target:
        sizes = threads, registers, lanes
        library = tvm.compile(tvm.IRModule({"multiply": _multiply(*sizes), "read": _read(*sizes)}), target)
    configure(threads)
    result = tvm.runtime.tensor(np.zeros(threads * registers * lanes, np.float32))
    data = tvm.runtime.tensor(np.zeros(_READ_BYTES // 4, np.float32))
    macs = threads * _TURNS * registers * lanes
    return Peak(macs / _fastest(library["multiply"], result), _READ_BYTES / _fastest(library["read"], data, result))


def _fastest(function: Any, *arguments: Any) -> float:
    times = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - begun)
    return min(times)


def _multiply(threads: int, registers: int, lanes: int) -> tirx.PrimFunc:
    """Independent chains of multiply-adds, as many as half of the registers."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("multiply")
            T.func_attr({"global_symbol": "multiply", "tirx.noalias": True})
            y = T.arg("y", T.buffer((threads * registers * lanes,), "float32"))
            with T.sblock("root"), T.parallel(0, threads) as thread:
                sums = T.alloc_buffer((registers * lanes,), "float32", scope="local")
                spans = [tirx.Ramp(k * lanes, 1, lanes) for k in range(registers)]
                starts = [tirx.Ramp((thread * registers + k) * lanes, 1, lanes) for k in range(registers)]
                for span, start in zip(spans, starts, strict=True):
                    T.buffer_store(sums, y[start], [span])
                with T.serial(0, _TURNS):
                    for span in spans:
                        half = tirx.Broadcast(tirx.const(0.5, "float32"), lanes)
                        T.buffer_store(sums, sums[span] * half + half, [span])
                for span, start in zip(spans, starts, strict=True):
                    T.buffer_store(y, sums[span], [start])
        return builder.get()


def _read(threads: int, registers: int, lanes: int) -> tirx.PrimFunc:
    """Each thread adds up its part of an array that no cache holds."""
    each, ways = _READ_BYTES // 4 // threads // (registers * lanes), registers
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("read")
            T.func_attr({"global_symbol": "read", "tirx.noalias": True})
            x = T.arg("x", T.buffer((_READ_BYTES // 4,), "float32"))
            y = T.arg("y", T.buffer((threads * ways * lanes,), "float32"))
            with T.sblock("root"), T.parallel(0, threads) as thread:
                sums = T.alloc_buffer((ways * lanes,), "float32", scope="local")
                for k in range(ways):
                    zero = tirx.Broadcast(tirx.const(0, "float32"), lanes)
                    T.buffer_store(sums, zero, [tirx.Ramp(k * lanes, 1, lanes)])
                with T.serial(0, each) as step:
                    for k in range(ways):
                        span = tirx.Ramp(k * lanes, 1, lanes)
                        start = ((thread * each + step) * ways + k) * lanes
                        T.buffer_store(sums, sums[span] + x[tirx.Ramp(start, 1, lanes)], [span])
                for k in range(ways):
                    start = (thread * ways + k) * lanes
                    T.buffer_store(y, sums[tirx.Ramp(k * lanes, 1, lanes)], [tirx.Ramp(start, 1, lanes)])
        return builder.get()
