"""This machine: its device profile, and the surroundings that a timing taken on it depends on."""

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from profiles.device import HOST, Device
from profiles.errors import ProfileError

CPUINFO = Path("/proc/cpuinfo")
CPU_FOLDER = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")

# LLVM's names, most capable first; the first whose flags are all there is taken. The flags are those that LLVM would
# use in plain code for that name, so that a virtual machine which masks some of them still gets code it can run.
_V3 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_ICELAKE = _V4 | {"avx512_vnni", "avx512_vbmi2", "avx512_bitalg", "avx512_vpopcntdq", "avx512ifma", "avx512vbmi"}
_ICELAKE |= {"gfni", "vaes"}
X86: dict[str, set[str]] = {
    "sapphirerapids": _ICELAKE | {"avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"},
    "znver4": _ICELAKE | {"avx512_bf16", "sse4a", "clzero"},
    "icelake-server": _ICELAKE,
    "cascadelake": _V4 | {"avx512_vnni"},
    "x86-64-v4": _V4,
    "x86-64-v3": _V3,
    "x86-64-v2": {"sse4_2", "ssse3", "popcnt"},
    "x86-64": set(),
}
# Linux's flag of an AArch64 core to LLVM's feature.
AARCH64 = {"asimd": "+neon", "asimddp": "+dotprod", "asimdhp": "+fullfp16", "i8mm": "+i8mm", "bf16": "+bf16"}

# What decides a timing or an answer: installed versions and thread settings.
LIBRARIES = ("taskpress", "torch", "apache-tvm", "onnx", "onnxsim", "onnxruntime", "openvino", "torch-pruning", "numpy")
VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "KMP_AFFINITY", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY"),
    *("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TVM_NUM_THREADS", "TVM_BIND_THREADS", "CUDA_VISIBLE_DEVICES"),
)


@dataclass(frozen=True, slots=True)
class Moment:
    """What changes while a run lasts; a clock or load that moved is a reason to distrust the timings between.

    Attributes:
        at: seconds since 1970.
        clock_mhz: of each logical CPU in order, as Linux reports it; empty where it does not.
        load_average: over 1, 5 and 15 minutes.
    """

    at: float
    clock_mhz: tuple[float, ...]
    load_average: tuple[float, float, float]
    memory_available_bytes: int


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything about this machine and process that a timing depends on.

    Attributes:
        flags: of the CPU, the vector and matrix extensions only.
        physical_cores, logical_cores: of the whole machine.
        affinity: the logical CPUs this process may run on.
        quota_cores: the container's CPU quota in cores; None without one.
        governor: frequency governors in use, joined by "+"; "not exposed" on most virtual machines.
        virtual: whether the CPU says that it runs under a hypervisor.
        gpus: models that NVIDIA's driver lists.
        libraries: installed versions by distribution name; nothing is imported to learn them.
        variables: the environment variables set that steer threads.
        moments: at least one; take another after the timings with `later`.
    """

    cpu: str
    flags: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    affinity: tuple[int, ...]
    quota_cores: float | None
    governor: str
    virtual: bool
    memory_bytes: int
    gpus: tuple[str, ...]
    system: str
    kernel: str
    python: str
    libraries: dict[str, str]
    variables: dict[str, str]
    moments: tuple[Moment, ...]

    def later(self) -> Self:
        """The same surroundings with the present moment added."""
        return replace(self, moments=(*self.moments, _moment()))


def environment() -> Environment:
    """The surroundings now.

    Raises:
        ProfileError: not Linux, whose /proc and /sys this reads.
    """
    info = _cpuinfo()
    flags = _flags(info)
    return Environment(
        cpu=_model(info),
        flags=tuple(sorted(flag for flag in flags if flag.startswith(("avx", "amx", "sse4", "fma", "asimd", "sve")))),
        physical_cores=len(set(_core_of().values())) or os.cpu_count() or 1,
        logical_cores=os.cpu_count() or 1,
        affinity=tuple(sorted(os.sched_getaffinity(0))),
        quota_cores=_quota(),
        governor=_governor(),
        virtual="hypervisor" in flags,
        memory_bytes=_memory("MemTotal"),
        gpus=tuple(_gpus()),
        system=platform.platform(),
        kernel=platform.release(),
        python=platform.python_version(),
        libraries=dict(_versions()),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        moments=(_moment(),),
    )


def device() -> Device:
    """The profile of this machine's CPU, with the physical cores this process may use.

    Raises:
        ProfileError: not Linux, or neither x86-64 nor AArch64.
    """
    return describe(_cpuinfo(), platform.machine(), cores())


def describe(cpuinfo: str, machine: str, cores: int) -> Device:
    """The profile that a text of /proc/cpuinfo, `uname -m` and a number of cores amount to."""
    flags = _flags(cpuinfo)
    target: dict[str, object] = {"kind": "llvm", "num-cores": cores}
    if machine == "x86_64":
        target["mcpu"] = next(name for name, needed in X86.items() if needed <= flags)
        bits, registers = (512, 32) if flags >= _V4 else (256, 16) if flags >= _V3 else (128, 16)
    elif machine == "aarch64":
        mattr = [feature for flag, feature in AARCH64.items() if flag in flags]
        target |= {"mtriple": "aarch64-linux-gnu", "mcpu": "generic", "mattr": mattr}
        bits, registers = 128, 32
    else:
        raise ProfileError(f"No host profile for '{machine}' CPUs, only x86_64 and aarch64. Name a device instead.")
    return Device(
        name=HOST,
        kind="cpu",
        description=f"this machine: {_model(cpuinfo)}, {target['mcpu']}, {cores} core{'s' * (cores > 1)}",
        target=target,
        cores=cores,
        vector_bits=bits,
        vector_registers=registers,
        channel_multiple=bits // 32,
    )


def cores() -> int:
    """Physical cores this process may use: its affinity, without hyper-threads, within a container's quota."""
    core_of, allowed = _core_of(), os.sched_getaffinity(0)
    physical = len({core_of.get(cpu, str(cpu)) for cpu in allowed})
    quota = _quota()
    return physical if quota is None else max(1, min(physical, int(quota)))


def _core_of() -> dict[int, str]:
    """Logical CPU to its core, named by the CPUs which share it."""
    siblings = CPU_FOLDER.glob("cpu[0-9]*/topology/thread_siblings_list")
    return {int(file.parts[-3].removeprefix("cpu")): _line(file) for file in siblings}


def _quota() -> float | None:
    """cgroup v2's CPU quota in cores."""
    limit, _, period = _line(QUOTA).partition(" ") if QUOTA.is_file() else ("max", "", "")
    return None if limit == "max" else int(limit) / int(period)


def _governor() -> str:
    found = {_line(file) for file in CPU_FOLDER.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    return "+".join(sorted(found)) or "not exposed"


def _moment() -> Moment:
    clocks = tuple(float(value) for value in _values(_cpuinfo(), "cpu MHz"))
    return Moment(time.time(), clocks, os.getloadavg(), _memory("MemAvailable"))


def _cpuinfo() -> str:
    if not CPUINFO.is_file():
        raise ProfileError(f"The host is detected from {CPUINFO}, which Linux has. Name a device instead.")
    return CPUINFO.read_text(encoding="utf-8")


def _model(cpuinfo: str) -> str:
    """The CPU's name; boards name themselves on a line of their own."""
    found = [*_values(cpuinfo, "model name"), *_values(cpuinfo, "Model"), *_values(cpuinfo, "CPU part")]
    return found[0] if found else platform.machine()


def _flags(cpuinfo: str) -> frozenset[str]:
    """Those every CPU has."""
    sets = [set(line.split()) for name in ("flags", "Features") for line in _values(cpuinfo, name)]
    return frozenset(set.intersection(*sets)) if sets else frozenset()


def _values(text: str, name: str) -> list[str]:
    """The value of each line `name : value`."""
    pairs = (line.partition(":") for line in text.splitlines())
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def _memory(name: str) -> int:
    kilobytes = _values(Path("/proc/meminfo").read_text(encoding="utf-8"), name)[0].split()[0]
    return int(kilobytes) * 1024


def _gpus() -> Iterator[str]:
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        yield from _values(file.read_text(encoding="utf-8"), "Model")


def _versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _line(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip()
