"""The cpu target: blocked layouts, our schedules, LLVM, one shared library for TVM's runtime."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import relax

from profiles.device import Device, Kind
from targets import artifact as artifacts
from targets.account import account
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
    """Scheduled kernels, and how each layer's was chosen."""

    module: tvm.IRModule
    choices: Choices


class CpuTarget:
    """Compiles for CPUs of any vector width through LLVM and the device's linker."""

    name = "cpu"
    kind: Kind = "cpu"
    integers = False

    def check(self, device: Device) -> None:
        """Raise TargetError unless `device` is a CPU that a linker here can build for."""
        require_kind(self.name, self.kind, device)
        linker(device)

    def plan(self, program: Program, device: Device, records: Records = NONE) -> BuildPlan:
        """Lower and schedule the program: `model.tir` is what LLVM will get, `kernels.json` an account of it."""
        require_kind(self.name, self.kind, device)
        target = tvm.target.Target(dict(device.target))
        with target:
            choices = Choices(records)
            module = cpu_passes(lower(program), device, choices)
        return BuildPlan(
            target=self.name,
            device=device,
            program=program,
            files={
                artifacts.MODEL: program.model.SerializeToString(deterministic=True),
                artifacts.KERNELS: account(module, choices).to_json(),
                "model.tir": module.script(show_meta=False).encode(),
            },
            commands=(f"llvm {target}", link_command(device)),
            options={"versions": artifacts.versions()},
            lowered=Lowered(module, choices),
        )

    def build(
        self, plan: BuildPlan, directory: Path, extra: Mapping[str, bytes], about: Mapping[str, object]
    ) -> Artifact:
        """Compile and link what `plan` holds, and write the artifact folder."""
        self.check(plan.device)
        target = tvm.target.Target(dict(plan.device.target))
        lowered = plan.lowered
        if not isinstance(lowered, Lowered):
            raise TargetError(f"The plan of '{plan.program.name}' is not one that the {self.name} target made.")
        with artifacts.staged(directory) as folder:
            executable = relax.build(lowered.module, target, relax_pipeline=FINISH)
            link(executable, folder / artifacts.LIBRARY, plan.device)
            artifacts.seal(folder, plan, signature(plan.program), answers(plan.program), extra, about)
        return artifacts.read(directory)

    def load(self, artifact: Artifact, threads: int) -> VirtualMachineRunner:
        """Verify the artifact and open its library.

        Raises:
            TargetError: the folder differs from its manifest, it was built for another processor, or `threads`
                cannot be had.
        """
        manifest = artifacts.read(artifact.directory).manifest
        if manifest.target != self.name:
            raise TargetError(f"'{artifact.directory}' was built by the {manifest.target} target, not by {self.name}.")
        require_host_runs(manifest.device)
        module = open_library(artifact)
        return VirtualMachineRunner(module, tvm.cpu(), manifest.inputs, manifest.tasks, threads)

    def simulated(self, artifact: Artifact) -> None:
        """Artifacts of this target are timed."""


def require_host_runs(device: Device) -> None:
    """Refuse code of another architecture or with wider vectors than this machine's, before it can crash."""
    here = platform.machine()
    triple = str(device.target.get("mtriple", here))
    there = {"amd64": "x86_64", "arm64": "aarch64"}.get(triple.partition("-")[0], triple.partition("-")[0])
    if there != here:
        raise TargetError(f"The artifact was built for '{device.name}' ({there}); this machine is {here}.")
    needs = {512: "avx512f", 256: "avx2"}.get(device.vector_bits)
    flags = Path("/proc/cpuinfo")
    if here == "x86_64" and needs and flags.exists() and needs not in flags.read_text().split():
        raise TargetError(f"The artifact was built for '{device.name}' and needs {needs}, which this processor lacks.")
