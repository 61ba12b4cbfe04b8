"""What a built folder says of the accelerator: its design, its runs, and where their tensors lie in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tvm_ffi
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from profiles.settings import Settings, faults
from targets.accelerator import simulator
from targets.accelerator.activity import Activity, moves, observe
from targets.accelerator.design import WORD_BYTES, Design
from targets.accelerator.isa import decode
from targets.accelerator.layers import Contraction, Layer, Pooling, Product, Window
from targets.accelerator.network import Executable, Network, Packing, macs_of
from targets.accelerator.tensors import Place
from targets.account import Call
from targets.errors import TargetError

FILE, IMAGE = "accelerator.json", "memory.image"


class Packed(Settings):
    """An input that lies in memory as the windows that its layer reads; `order` as `Packing` has it."""

    size: tuple[int, int]
    step: tuple[int, int]
    spread: tuple[int, int]
    pad: tuple[int, int, int, int]
    fill: int
    order: tuple[int, ...]


class Port(Settings):
    """A tensor that the host gives or takes.

    Attributes:
        shape: int8 (channels, height, width), as the host has it.
        scale, zero: the real values are (q - zero) * scale.
        address: in memory, of its first word.
        stored: (channels, height, width) as it lies there, in blocks of the design's columns.
    """

    name: str
    shape: tuple[int, int, int]
    scale: float
    zero: int
    address: int = Field(ge=0)
    stored: tuple[int, int, int]
    packed: Packed | None = None


class Run(Settings):
    """One program: the file of the folder with its instructions, and what the host gives and takes."""

    program: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class Package(Settings):
    """What `accelerator.json` says.

    Attributes:
        functions: prefix of the packed functions that the host's part calls, one for each run, numbered.
    """

    schema_: Literal["taskpress.accelerator/1"] = Field(alias="schema", default="taskpress.accelerator/1")
    design: Design
    functions: str
    runs: tuple[Run, ...]

    def to_json(self) -> bytes:
        """As the file holds it."""
        return (self.model_dump_json(indent=1, by_alias=True) + "\n").encode()


def describe(networks: Sequence[Network], built: Sequence[Executable], functions: str) -> Package:
    """The table of these runs."""
    runs = []
    for k, (network, one) in enumerate(zip(networks, built, strict=True)):
        ports = [[_port(network, one, name) for name in names] for names in (network.inputs, network.outputs)]
        runs.append(Run(program=program_of(k), inputs=tuple(ports[0]), outputs=tuple(ports[1])))
    return Package(design=built[0].design, functions=functions, runs=tuple(runs))


def program_of(run: int) -> str:
    """Name of a run's program."""
    return f"run{run}.program"


def _port(network: Network, built: Executable, name: str) -> Port:
    value, place, how = network.values[name], built.places[name], built.packed.get(name)
    packed = None
    if how is not None:
        window = how.window
        packed = Packed(
            size=window.size, step=window.step, spread=window.spread, pad=window.pad, fill=how.fill,
            order=tuple(int(number) for number in how.order),
        )  # fmt: skip
    return Port(
        name=name, shape=value.shape, scale=value.grid.scale, zero=value.grid.zero, address=place.address,
        stored=(place.channels, place.height, place.width), packed=packed,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Simulated:
    """A run of an opened package on the instruction-level simulator; all runs share a memory, and leave it changed."""

    run: Run
    design: Design
    program: bytes
    memory: NDArray[np.uint8]

    def __call__(self, *tensors: Any) -> None:
        """What the host's part calls: tensors that it gives, then those to fill."""
        given = [tensor.numpy()[0] for tensor in tensors[: len(self.run.inputs)]]
        for answer, tensor in zip(self.answers(given), tensors[len(given) :], strict=True):
            tensor.copyfrom(answer[None])

    def answers(self, inputs: Sequence[NDArray[np.int8]]) -> list[NDArray[np.int8]]:
        """The run's outputs, (channels, height, width) as its inputs."""
        self.give(inputs)
        simulator.execute(self.program, self.memory, self.design)
        return [_place(port).read(self.memory, self.design) for port in self.run.outputs]

    def give(self, inputs: Sequence[NDArray[np.int8]]) -> None:
        """Put the run's inputs where it reads them."""
        for port, given in zip(self.run.inputs, inputs, strict=True):
            _place(port).write(_stored(port, given), self.memory, self.design)

    def cycles(self) -> int:
        """Of one frame, all stalls counted."""
        return simulator.timing(self.program, self.design).cycles


def activity(folder: Path) -> Activity:
    """Of one frame, on the programs of a folder.

    Raises:
        TargetError: as `opened` does.
    """
    runs = opened(folder)
    return observe([run.program for run in runs], runs[0].design)


def opened(folder: Path) -> list[Simulated]:
    """The runs of a folder whose files were verified: its programs are trusted as its library is.

    Raises:
        TargetError: the table is broken, a file is not of the size that it says, or a program has no such instructions.
    """
    package = read(folder)
    memory = np.frombuffer((folder / IMAGE).read_bytes(), np.uint8).copy()
    return [_opened(folder, run, package.design, memory) for run in package.runs]


def read(folder: Path) -> Package:
    """The table of a folder.

    Raises:
        TargetError: it is broken.
    """
    try:
        return Package.model_validate_json((folder / FILE).read_bytes())
    except ValidationError as error:
        raise TargetError("\n".join(faults(error, Package, f"'{folder / FILE}'"))) from error
    except OSError as error:
        raise TargetError(f"'{folder / FILE}' cannot be read: {error.strerror}.") from error


def register(package: Package, runs: Sequence[Callable[..., None]]) -> None:
    """Let the host's part of this process find the runs."""
    for k, run in enumerate(runs):
        tvm_ffi.register_global_func(f"{package.functions}{k}", run, override=True)


def _opened(folder: Path, run: Run, design: Design, memory: NDArray[np.uint8]) -> Simulated:
    program, words = (folder / run.program).read_bytes(), memory.size // WORD_BYTES
    for port in (*run.inputs, *run.outputs):
        if memory.size % WORD_BYTES or port.address + _place(port).words(design) > words:
            raise TargetError(f"'{folder / IMAGE}' has no room for '{port.name}', which {FILE} places there.")
        if port.packed is None and port.shape != port.stored:
            raise TargetError(f"'{folder / FILE}' stores '{port.name}' {port.shape} as {port.stored}.")
    list(decode(program))  # refuses what is no instruction
    return Simulated(run, design, program, memory)


def _place(port: Port) -> Place:
    return Place(port.address, *port.stored)


def _stored(port: Port, value: NDArray[np.int8]) -> NDArray[np.int8]:
    how = port.packed
    if how is None:
        return value
    return Packing(Window(how.size, how.step, how.spread, how.pad), how.fill, np.array(how.order))(value)


def account(network: Network, built: Executable, function: str) -> Iterator[Call]:
    """Each layer of a run; its cycles are those from the last instruction of the layer before it until its own last."""
    times, design = simulator.timing(built.program, built.design), built.design
    owners, words, before = np.asarray(built.layers), moves(built.program, built.design), 0
    for number, node in enumerate(network.nodes):
        until = max(before, int(times.done[owners == number].max(initial=0)))
        cycles, macs = until - before, macs_of(node, network.values)
        full = macs / design.multipliers / max(1, cycles)
        weights = node.layer.weights if isinstance(node.layer, Contraction) else np.zeros(0, np.int8)
        shapes = [" x ".join(map(str, network.values[name].shape)) for name in (node.source, node.result)]
        yield Call(
            function=function, kernel=f"accelerator: {cycles:,} cycles" + (f", array {full:.0%} full" if macs else ""),
            layer=f"{_named(node.layer)}: {' to '.join(shapes)}", layout="int8", macs=macs, work=macs,
            density=float((weights != 0).mean()) if weights.size else 1.0, instead="",
            bytes=sum(int(np.prod(network.values[name].shape)) for name in (*node.reads, node.result)) + weights.size,
            weight_bytes=weights.size, cycles=cycles, moved_bytes=WORD_BYTES * int(words[owners == number].sum()),
        )  # fmt: skip
        before = until


def _named(layer: Layer) -> str:
    if isinstance(layer, Product):
        return "product"
    if isinstance(layer, Pooling):
        return f"{'largest' if layer.kind == 'largest' else 'sum'} of {layer.window.size[0]} x {layer.window.size[1]}"
    return f"conv {layer.window.size[0]} x {layer.window.size[1]}"
