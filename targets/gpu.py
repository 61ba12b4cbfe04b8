"""The gpu target: CUDA kernels, every one bound to threads by TVM's dlight rules, compiled with nvcc."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import tvm
import tvm_ffi
from tvm import relax
from tvm.s_tir import dlight

from profiles.device import Device, Kind
from targets import artifact as artifacts
from targets.base import Artifact, BuildPlan, Program, Runner
from targets.errors import TargetError
from targets.kind import require_kind
from targets.link import link, link_command, linker
from targets.lower import answers, lower, signature
from targets.passes import FINISH
from targets.records import NONE, Records
from targets.runner import VirtualMachineRunner, open_library

SOURCE = "kernels.cu"
BINARY = "kernels.cubin"


class GpuTarget:
    """Compiles for NVIDIA GPUs; the architecture is the device profile's, never the building machine's."""

    name = "gpu"
    kind: Kind = "gpu"
    integers = False

    def check(self, device: Device) -> None:
        """Raise TargetError unless `device` is a GPU, nvcc is on PATH and the device's host has a linker."""
        require_kind(self.name, self.kind, device)
        _architecture(device)
        if shutil.which("nvcc") is None:
            raise TargetError(
                f"The gpu target compiles for '{device.name}' with nvcc, which is not on PATH. Install the CUDA "
                "toolkit (https://developer.nvidia.com/cuda-downloads; Debian: apt install nvidia-cuda-toolkit)."
            )
        linker(device)

    def plan(self, program: Program, device: Device, records: Records = NONE) -> BuildPlan:
        """Lower and schedule the program; `model.tir` is every kernel as CUDA's code generator will get it.

        No layer is chosen by `records` yet.
        """
        require_kind(self.name, self.kind, device)
        architecture = _architecture(device)
        target = tvm.target.Target(dict(device.target))
        with target:
            module = _PIPELINE(lower(program))
        return BuildPlan(
            target=self.name,
            device=device,
            program=program,
            files={
                artifacts.MODEL: program.model.SerializeToString(deterministic=True),
                "model.tir": module.script(show_meta=False).encode(),
            },
            commands=(" ".join(("nvcc", *_nvcc_options(architecture), "-o", BINARY, SOURCE)), link_command(device)),
            options={"versions": artifacts.versions()},
            lowered=module,
        )

    def build(
        self, plan: BuildPlan, directory: Path, extra: Mapping[str, bytes], about: Mapping[str, object]
    ) -> Artifact:
        """Compile what `plan` holds with nvcc, link it, and write the artifact folder."""
        self.check(plan.device)
        target = tvm.target.Target(dict(plan.device.target))
        lowered = plan.lowered or self.plan(plan.program, plan.device).lowered
        with artifacts.staged(directory) as folder:
            executable = relax.build(lowered, target, relax_pipeline=FINISH)
            _compile_kernels(executable, folder, plan.device)
            link(executable, folder / artifacts.LIBRARY, plan.device)
            artifacts.seal(folder, plan, signature(plan.program), answers(plan.program), extra, about)
        return artifacts.read(directory)

    def load(self, artifact: Artifact, threads: int) -> Runner:
        """Verify the artifact and open its library; `threads` counts those of the host.

        Raises:
            TargetError: the folder differs from its manifest, or there is no GPU that can run it.
        """
        manifest = artifacts.read(artifact.directory).manifest
        if manifest.target != self.name:
            raise TargetError(f"'{artifact.directory}' was built by the {manifest.target} target, not by {self.name}.")
        gpu = tvm.cuda()
        if not gpu.exist:
            raise TargetError(
                f"'{artifact.directory}' was built for '{manifest.device.name}' and needs an NVIDIA GPU with its "
                "driver; CUDA finds none here (nvidia-smi shows what it sees). Run it on the device."
            )
        built, here = _architecture(manifest.device), "sm_" + str(gpu.compute_version).replace(".", "")
        if built != here:
            raise TargetError(f"'{artifact.directory}' was built for {built}; the GPU here is {here}.")
        _offer_binary(artifact.directory)
        module = open_library(artifact)
        return VirtualMachineRunner(module, gpu, manifest.inputs, manifest.tasks, threads)

    def simulated(self, artifact: Artifact) -> None:
        """Artifacts of this target are timed."""


_PIPELINE = tvm.transform.Sequential(
    [
        relax.transform.DecomposeOpsForInference(),  # batch norm to scale and shift, dropout to nothing
        relax.transform.FoldConstant(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        dlight.ApplyDefaultSchedule(  # the first rule that knows a kernel schedules it; Fallback knows them all
            dlight.gpu.Matmul(),
            dlight.gpu.GEMV(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        ),
    ]
)


def _architecture(device: Device) -> str:
    """Raise TargetError unless the profile names one: TVM would take this machine's, or an ancient one."""
    if device.target.get("kind") != "cuda" or "arch" not in device.target:
        raise TargetError(f"Device '{device.name}' needs [target] kind = 'cuda' and an 'arch' such as 'sm_87'.")
    return str(device.target["arch"])


def _compile_kernels(executable: tvm.runtime.Executable, folder: Path, device: Device) -> None:
    """Write the CUDA source that `executable` carries, and what nvcc makes of it for the device's architecture."""
    source = _cuda_module(executable.mod).inspect_source("cuda")
    (folder / SOURCE).write_text(source, encoding="utf-8")
    command = ["nvcc", *_nvcc_options(_architecture(device)), "-o", BINARY, SOURCE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise TargetError(f"nvcc could not compile for '{device.name}': {(done.stderr or done.stdout).strip()[-2000:]}")


def _nvcc_options(architecture: str) -> tuple[str, ...]:
    return "-cubin", "-O3", f"-arch={architecture}", "--expt-relaxed-constexpr"


def _cuda_module(module: tvm.runtime.Module) -> tvm.runtime.Module:
    """The module of all kernels, somewhere among the imports of an executable."""
    waiting = [module]
    while waiting:
        module = waiting.pop()
        if module.kind == "cuda":
            return module
        waiting.extend(module.imports)
    raise TargetError("The program has no kernel for a GPU to run.")


_compiled: dict[str, bytes] = {}  # binaries of loaded artifacts by their source


def _offer_binary(directory: Path) -> None:
    """Have TVM take the artifact's binary: its libraries carry source, and ask this function for it when first run."""
    _compiled[(directory / SOURCE).read_text(encoding="utf-8")] = (directory / BINARY).read_bytes()
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _compiled.__getitem__, override=True)
