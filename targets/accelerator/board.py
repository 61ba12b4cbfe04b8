"""All that a board needs of an artifact: the circuit, its memory and programs, a recorded frame, a driver in C."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
import tvm
from numpy.typing import NDArray

from targets.accelerator import package
from targets.accelerator.circuit.verilog import HARNESS, harness, verilog
from targets.accelerator.design import WORD_BYTES
from targets.accelerator.isa import BYTES
from targets.accelerator.simulator import LATENCY
from targets.accelerator.synthesis import PACKAGE, SIZES
from targets.base import Array, Artifact
from targets.errors import TargetError
from targets.fpga import clock_of
from targets.runner import VirtualMachineRunner, open_library

NETWORK = "network.h"
_SIMULATE = """#!/bin/sh -e
# Replays the recorded frame in RTL; needs Verilator 5.
cd "$(dirname "$0")"
verilator --cc --exe --build -O3 -Wno-fatal -Wno-lint -Wno-style --top-module testbench \\
  -MAKEFLAGS CFG_CXXFLAGS_PCH_I=-include testbench.v accelerator.v clock.cpp
{runs}
"""
_BUILD = """#!/bin/sh -e
# Synthesises, places and routes the circuit behind four pins, as its clock was found. A board's own top module, which
# joins accelerator.v with a memory and a host, takes the harness' place.
cd "$(dirname "$0")"
yosys -p "read_verilog harness.v; synth_ecp5 -nodsp -top {top} -json harness.json"
nextpnr-ecp5 --{size} --package {package} --speed 6 --json harness.json --lpf harness.lpf --lpf-allow-unconstrained \\
  --textcfg harness.config --freq {megahertz:g}
ecppack harness.config --bit harness.bit
"""


@dataclass(slots=True)
class _Recorded:
    """A run that keeps what it did to the memory."""

    run: package.Simulated
    before: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    after: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))

    def __call__(self, *tensors: object) -> None:
        self.run.give([tensor.numpy()[0] for tensor in tensors[: len(self.run.run.inputs)]])  # type: ignore[attr-defined]
        self.before = self.run.memory.copy()
        self.run(*tensors)
        self.after = self.run.memory.copy()


def write(artifact: Artifact, inputs: Sequence[Array], folder: Path) -> None:
    """Write into a folder that is not there yet.

    Args:
        inputs: of the frame that the testbench replays.

    Raises:
        TargetError: the artifact is for another target, or yosys is missing.
    """
    manifest = artifact.manifest
    if manifest.target != "fpga":
        raise TargetError(f"'{artifact.directory}' was built for '{manifest.device.name}', which is no fpga.")
    found, runs = package.read(artifact.directory), package.opened(artifact.directory)
    circuit = verilog(found.design)
    recorded = _record(artifact, found, runs, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    image = (artifact.directory / package.IMAGE).read_bytes()
    addresses, at = [], len(image) // WORD_BYTES
    for run in runs:
        addresses.append(at)
        at += len(run.program) // WORD_BYTES
    (folder / "board.image").write_bytes(b"".join((image, *(run.program for run in runs))))
    (folder / "accelerator.v").write_text(circuit)
    source = files(__package__) / "templates"
    for name in ("testbench.v", "clock.cpp", "driver.h", "driver.c"):
        (folder / name).write_text((source / name).read_text())
    most = max(len(run.program) // BYTES for run in runs)
    sizes = {"WORDS": len(image) // WORD_BYTES, "INSTRUCTIONS": most, "LATENCY": LATENCY}
    (folder / "sizes.vh").write_text("".join(f"`define {name} {value}\n" for name, value in sizes.items()))
    (folder / NETWORK).write_text("\n".join(_header(found, runs, addresses)) + "\n")
    clock = clock_of(manifest.device)
    calls = []
    for k, one in enumerate(recorded):
        for what, raw in (("program", np.frombuffer(one.run.program, np.uint8)), ("before", one.before),
                          ("after", one.after)):  # fmt: skip
            words = raw.view(np.uint64)
            (folder / f"run{k}.{what}.hex").write_text("".join(f"{int(word):016x}\n" for word in words))
        count = len(one.run.program) // BYTES
        calls.append(f"./obj_dir/Vtestbench +run=run{k} +instructions={count} +cycles={one.run.cycles()}")
    _script(folder / "simulate.sh", _SIMULATE.format(runs="\n".join(calls)))
    if (size := SIZES.get(manifest.device.name)) is not None:
        (folder / "harness.v").write_text(harness(found.design, "ecp5"))
        (folder / "harness.lpf").write_text(f'FREQUENCY PORT "clk" {clock.megahertz:g} MHZ;\n')
        how = _BUILD.format(top=HARNESS, size=size, package=PACKAGE, megahertz=clock.megahertz)
        _script(folder / "build.sh", how)


def _script(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def _record(
    artifact: Artifact, found: package.Package, runs: Sequence[package.Simulated], inputs: Sequence[Array]
) -> list[_Recorded]:
    recorded, manifest = [_Recorded(run) for run in runs], artifact.manifest
    package.register(found, recorded)  # a machine that is opened finds these
    VirtualMachineRunner(open_library(artifact), tvm.cpu(), manifest.inputs, manifest.tasks, threads=1)(*inputs)
    return recorded


def _header(found: package.Package, runs: Sequence[package.Simulated], addresses: Sequence[int]) -> Iterator[str]:
    """`network.h`: the tables that `driver.c` goes by."""
    yield "// Where the network's tensors and programs lie; `board.image` is the memory before the first frame."
    yield "#pragma once"
    yield '#include "driver.h"'
    yield f"#define TASKPRESS_COLUMNS {found.design.columns}"
    for k, run in enumerate(runs):
        for kind, ports in (("input", run.run.inputs), ("output", run.run.outputs)):
            for n, port in enumerate(ports):
                if port.packed is not None:
                    order = ", ".join(map(str, port.packed.order))
                    yield f"static const uint32_t taskpress_order_{k}_{n}[] = {{{order}}};"
            yield f"static const struct taskpress_port taskpress_{kind}s_{k}[] = {{"
            yield from (_port(port, f"taskpress_order_{k}_{n}") for n, port in enumerate(ports))
            yield "};"
    yield f"#define TASKPRESS_RUNS {len(runs)}"
    yield "static const struct taskpress_run taskpress_runs[] = {"
    for k, run in enumerate(runs):
        count = len(run.program) // BYTES
        sizes = f"{addresses[k]}, {count}, {len(run.run.inputs)}, {len(run.run.outputs)}"
        yield f"    {{{sizes}, taskpress_inputs_{k}, taskpress_outputs_{k}}},"
    yield "};"


def _port(port: package.Port, order: str) -> str:
    how = port.packed
    window = "NULL, {1, 1}, {1, 1}, {1, 1}, {0, 0}, 0"
    if how is not None:
        pairs = [f"{{{a}, {b}}}" for a, b in (how.size, how.step, how.spread, how.pad[:2])]
        window = f"{order}, {', '.join(pairs)}, {how.fill}"
    numbers = [*port.shape, f"{port.scale!r}f", port.zero, port.address, *port.stored]
    return f'    {{"{port.name}", {", ".join(map(str, numbers))}, {window}}},'
