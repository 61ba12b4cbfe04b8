"""The contract every target keeps: `check`, `plan` (pure), `build` (writes), `load` (runs)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx

from profiles.device import Device

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Program:
    """One task set's network as checked ONNX; every graph output is named after its task.

    Attributes:
        name: file-system safe, e.g. "depth+normals".
        model: float32, static shapes, weights embedded.
        tasks: the outputs, in graph order.
    """

    name: str
    model: onnx.ModelProto
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What a build will do, without having done it: deterministic, no side effects, testable without a toolchain.

    Attributes:
        files: sources by relative path (ONNX, generated code or IR as text), exactly as they will be written.
        commands: what will be run in order, for people and golden tests.
        options: everything else that decides the result.
    """

    target: str
    device: str
    program: Program
    files: Mapping[str, bytes]
    commands: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over target, device, options, commands and every file: equal plans build equal artifacts."""
        head = {"target": self.target, "device": self.device, "options": dict(self.options), "commands": self.commands}
        sha = hashlib.sha256(json.dumps(head, sort_keys=True, default=str).encode())
        for name in sorted(self.files):
            sha.update(name.encode() + b"\0" + hashlib.sha256(self.files[name]).digest())
        return sha.hexdigest()


class Runner(Protocol):
    """A loaded artifact. Call it with the inputs in manifest order; answers are keyed by task name."""

    tasks: tuple[str, ...]

    def __call__(self, *inputs: Array) -> dict[str, Array]: ...


class Target(Protocol):
    """One way to build and run programs.

    `check` raises TargetError when the device is of another kind or a tool is missing (naming the tool, where it was
    looked for and how to get it). `plan` raises TargetError naming an unsupported operator. `build` writes the whole
    artifact folder or nothing. `load` verifies the manifest before any code is opened; `threads` counts all threads
    an inference uses.
    """

    name: str
    kind: str

    def check(self, device: Device) -> None: ...
    def plan(self, program: Program, device: Device) -> BuildPlan: ...
    def build(self, plan: BuildPlan, directory: Path, extra: "Mapping[str, bytes]", about: "Mapping[str, object]") -> "Artifact": ...
    def load(self, artifact: "Artifact", threads: int) -> Runner: ...


@dataclass(frozen=True, slots=True)
class Artifact:
    """A built folder and its parsed manifest."""

    directory: Path
    manifest: Mapping[str, object]
