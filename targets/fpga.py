"""The fpga target: int8 layers on the accelerator, what it cannot do on its host, through the cpu target's passes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tvm
from pydantic import ValidationError
from tvm import relax

from profiles import host
from profiles.device import Clock, Device, Kind
from profiles.measure import Emulated, Estimate
from profiles.settings import faults
from targets import artifact as artifacts
from targets.accelerator import package, tools
from targets.accelerator.design import Design
from targets.accelerator.network import Executable, compile_networks
from targets.accelerator.partition import Partition, partition
from targets.account import Call, Kernels, account
from targets.base import Artifact, BuildPlan, Program
from targets.choice import Choices
from targets.errors import TargetError
from targets.kind import require_kind
from targets.link import link, link_command, linker
from targets.lower import answers, lower, signature
from targets.passes import FINISH, cpu_passes
from targets.records import NONE, Records
from targets.runner import VirtualMachineRunner, open_library


@dataclass(frozen=True, slots=True)
class Lowered:
    """Both parts, compiled as far as it needs no tool."""

    host: tvm.IRModule
    choices: Choices
    parts: Partition
    runs: tuple[Executable, ...]

    def kernels(self) -> Kernels:
        """An account of both: the accelerator's layers with their cycles, then the host's kernels."""
        calls, machine = list[Call](), account(self.host, self.choices)
        for k, (network, run) in enumerate(zip(self.parts.networks, self.runs, strict=True)):
            calls += package.account(network, run, self.parts.name(k))
        for call in machine.calls:
            calls.append(call.model_copy(update={"kernel": f"host: {call.kernel}", "layer": call.layer or "host"}))
        return machine.model_copy(update={"calls": tuple(calls)})


class FpgaTarget:
    """Compiles quantized programs for the accelerator of `targets/accelerator`; its host is this machine.

    What is built answers here through the instruction-level simulator, bit for bit as the circuit does.
    """

    name = "fpga"
    kind: Kind = "fpga"
    integers = True

    def check(self, device: Device) -> None:
        """Raise TargetError unless `device` is an FPGA, and compilers for its host and for the simulator are here."""
        require_kind(self.name, self.kind, device)
        design_of(device)
        linker(device)
        tools.compiler("gcc", "clang")

    def plan(self, program: Program, device: Device, records: Records = NONE) -> BuildPlan:
        """Split the program, compile each run of the accelerator, and schedule the host's part (`model.tir`).

        `records` are of the host's kernels.

        Raises:
            TargetError: the program is not quantized, or a layer does not fit the device's design.
        """
        require_kind(self.name, self.kind, device)
        design, model = design_of(device), program.model.SerializeToString(deterministic=True)
        functions = f"taskpress.{hashlib.sha256(model + design.model_dump_json().encode()).hexdigest()[:16]}."
        parts = partition(lower(program, integers=True), functions)
        runs = compile_networks(parts.networks, design)
        machine = host.device()
        target = tvm.target.Target(dict(machine.target))
        with target:
            choices = Choices(records)
            scheduled = cpu_passes(parts.host, machine, choices)
        files = {
            artifacts.MODEL: model,
            package.FILE: package.describe(parts.networks, runs, functions).to_json(),
            package.IMAGE: runs[0].image.tobytes(),
            "model.tir": scheduled.script(show_meta=False).encode(),
        }
        files |= {package.program_of(k): run.program for k, run in enumerate(runs)}
        return BuildPlan(
            target=self.name,
            device=device,
            program=program,
            files=files,
            commands=(f"llvm {target}", link_command(device)),
            options={"versions": artifacts.versions()},
            lowered=Lowered(scheduled, choices, parts, runs),
        )

    def build(
        self, plan: BuildPlan, directory: Path, extra: Mapping[str, bytes], about: Mapping[str, object]
    ) -> Artifact:
        """Compile and link the host's part, and write it beside the runs' programs and memory images."""
        self.check(plan.device)
        lowered = plan.lowered
        if not isinstance(lowered, Lowered):
            raise TargetError(f"The plan of '{plan.program.name}' is not one that the {self.name} target made.")
        target = tvm.target.Target(dict(host.device().target))
        with artifacts.staged(directory) as folder:
            executable = relax.build(lowered.host, target, relax_pipeline=FINISH)
            link(executable, folder / artifacts.LIBRARY, plan.device)
            (folder / artifacts.KERNELS).write_bytes(lowered.kernels().to_json())
            for name in (package.FILE, package.IMAGE, *map(package.program_of, range(len(lowered.runs)))):
                (folder / name).write_bytes(plan.files[name])
            artifacts.seal(folder, plan, signature(plan.program), answers(plan.program), extra, about)
        return artifacts.read(directory)

    def load(self, artifact: Artifact, threads: int) -> VirtualMachineRunner:
        """Verify the artifact, prove its programs, and run them on the simulator; `threads` counts the host's.

        Raises:
            TargetError: the folder differs from its manifest, or holds a program that is none for its design.
        """
        manifest = artifacts.read(artifact.directory).manifest
        if manifest.target != self.name:
            raise TargetError(f"'{artifact.directory}' was built by the {manifest.target} target, not by {self.name}.")
        package.register(package.read(artifact.directory), package.opened(artifact.directory))
        return VirtualMachineRunner(open_library(artifact), tvm.cpu(), manifest.inputs, manifest.tasks, threads)

    def simulated(self, artifact: Artifact) -> Emulated | Estimate:
        """The accelerator's cycles, all stalls counted, at the device's clock; the host's part is not in it."""
        manifest = artifacts.read(artifact.directory).manifest
        clock = clock_of(manifest.device)
        cycles = sum(run.cycles() for run in package.opened(artifact.directory))
        milliseconds = cycles / clock.megahertz / 1e3
        basis = f"{cycles:,} cycles of the accelerator at {clock.megahertz:g} MHz ({clock.by}: {clock.how})"
        if clock.by == "place-and-route":
            return Emulated(milliseconds, "RTL simulation", basis)
        return Estimate(milliseconds, f"RTL simulation: {basis}")


def design_of(device: Device) -> Design:
    """The accelerator that the device's profile has.

    Raises:
        TargetError: every fault of its sizes.
    """
    try:
        return Design.model_validate(dict(device.array))
    except ValidationError as error:
        raise TargetError("\n".join(faults(error, Design, f"Device '{device.name}', [array]"))) from error


def clock_of(device: Device) -> Clock:
    """The accelerator's clock there.

    Raises:
        TargetError: the device is no fpga.
    """
    if device.clock is None:
        raise TargetError(f"'{device.name}' is a {device.kind} device, which has no accelerator with a clock.")
    return device.clock
