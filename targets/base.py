"""The contract every target keeps: `check`, `plan` (pure), `build` (writes), `load` (runs)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from pydantic import Field

from profiles.device import Device, Kind
from profiles.measure import Emulated, Estimate
from profiles.settings import Settings
from targets.records import Records

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Program:
    """One task set's network as checked ONNX; every graph output is named after its task.

    Attributes:
        name: file-system safe, e.g. "depth+normals".
        model: static shapes, weights embedded.
        tasks: the outputs, in graph order.
        normalisation: in words, what a caller does to raw data before the first input.
    """

    name: str
    model: onnx.ModelProto
    tasks: tuple[str, ...]
    normalisation: str = ""


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What a build will do, without having done it: deterministic, no side effects, testable without a toolchain.

    Attributes:
        files: sources by name (ONNX, generated code or IR as text), exactly as they decide the result.
        commands: what will be run in order, for people and golden tests.
        options: everything else that decides the result.
        lowered: the target's own form of `files` in memory, so that `build` need not lower again; not in the digest.
    """

    target: str
    device: Device
    program: Program
    files: Mapping[str, bytes]
    commands: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    lowered: object = field(default=None, compare=False, repr=False)

    def digest(self) -> str:
        """SHA-256 over target, device, options, commands and every file: equal plans build equal artifacts."""
        head = {
            "target": self.target,
            "device": self.device.model_dump(mode="json"),
            "program": [self.program.name, self.program.tasks, self.program.normalisation],
            "options": dict(self.options),
            "commands": self.commands,
        }
        sha = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for name in sorted(self.files):
            sha.update(name.encode() + b"\0" + hashlib.sha256(self.files[name]).digest())
        return sha.hexdigest()


class Tensor(Settings):
    """Name, shape and NumPy dtype of one input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Manifest(Settings):
    """What `manifest.json` says of an artifact.

    Attributes:
        files: SHA-256 of every file of the folder but the manifest itself.
        outputs: in the order of `tasks`, named after them.
        device: the whole profile the artifact was built for.
        versions: of everything that shaped the code.
        plan: digest of the BuildPlan.
        about: whatever the caller had to say, JSON values.
    """

    schema_: Literal["taskpress.artifact/1"] = Field(alias="schema")
    program: str
    tasks: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    normalisation: str
    target: str
    device: Device
    versions: Mapping[str, str]
    plan: str
    files: Mapping[str, str]
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A built folder and its manifest; `targets.artifact.read` makes one from a folder it has verified."""

    directory: Path
    manifest: Manifest


class Runner(Protocol):
    """A loaded artifact. Call it with the inputs in manifest order; answers are keyed by task name.

    Answers are read-only and outlive the next call. Inputs of another number, shape or dtype raise TargetError.
    """

    tasks: tuple[str, ...]

    def __call__(self, *inputs: Array) -> dict[str, Array]: ...


class Target(Protocol):
    """One way to build and run programs.

    `check` raises TargetError when the device is of another kind or a tool is missing (naming the tool, where it was
    looked for and how to get it). `plan` needs no tool; it raises TargetError for another kind of device and names
    every unsupported operator; `records` are measured times of the device's kernels, for targets that choose by them.
    `build` writes the whole artifact folder (replacing an artifact, never anything else) or nothing; `extra` are
    further files by name, `about` goes into the manifest. `load` verifies every file against the manifest before any
    code is opened; `threads` counts all threads an inference uses. `simulated` is the latency of an artifact that runs
    here on a simulator of its device; None where what runs here is to be timed. `integers` says that a program has to
    be quantized.
    """

    name: str
    kind: Kind
    integers: bool

    def check(self, device: Device) -> None: ...
    def plan(self, program: Program, device: Device, records: Records = ...) -> BuildPlan: ...
    def build(
        self, plan: BuildPlan, directory: Path, extra: Mapping[str, bytes], about: Mapping[str, object]
    ) -> Artifact: ...
    def load(self, artifact: Artifact, threads: int) -> Runner: ...
    def simulated(self, artifact: Artifact) -> Emulated | Estimate | None: ...
