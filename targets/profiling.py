"""Where an artifact's time goes: each kernel call's share, what it reaches, and what this machine could."""

import statistics
import time
from dataclasses import dataclass

from pydantic import ValidationError

from profiles.settings import faults
from targets import artifact as artifacts
from targets.account import Call, Kernels
from targets.base import Array, Artifact
from targets.cpu import CpuTarget
from targets.errors import TargetError
from targets.peak import Peak, peak
from targets.runner import VirtualMachineRunner

_LEAST_RUNS = 20
_IDLE = "vm.builtin.null_value"
_TURN = 5  # runs in a row of one kind


@dataclass(frozen=True, slots=True)
class Timed:
    """One kernel call: median seconds, and the least a machine with this peak needs for its work and its weights."""

    call: Call
    seconds: float
    bound: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Times of one artifact's calls in order.

    Attributes:
        between: seconds the runtime spends on calls that are no kernels.
        wall: median seconds of a whole inference without looking into it, taken in turns with those looked into.
    """

    calls: tuple[Timed, ...]
    between: float
    wall: float
    peak: Peak
    threads: int

    @property
    def total(self) -> float:
        """Sum of all calls; honest if it is near `wall`."""
        return sum(timed.seconds for timed in self.calls) + self.between


def kernels(built: Artifact) -> Kernels:
    """What an artifact says of its kernels.

    Raises:
        TargetError: it says nothing, or what it says is broken.
    """
    file = built.directory / artifacts.KERNELS
    if artifacts.KERNELS not in built.manifest.files:
        raise TargetError(f"Artifact '{built.directory}' ({built.manifest.target}) has no {artifacts.KERNELS}.")
    try:
        return Kernels.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise TargetError("\n".join(faults(error, Kernels, f"'{file}'"))) from error


def host_seconds(built: Artifact, runner: VirtualMachineRunner, inputs: tuple[Array, ...]) -> list[float]:
    """Median seconds of each kernel of an accelerator's host on this machine, in the order of `kernels.json`."""
    listed = [call.function for call in kernels(built).calls if not call.accelerated]
    runs = [[seconds for name, seconds in runner.calls(*inputs) if name in listed] for _ in range(_LEAST_RUNS)]
    return [statistics.median(times) for times in zip(*runs, strict=True)]


def profile(built: Artifact, inputs: tuple[Array, ...], threads: int, seconds: float) -> Profile:
    """Run an artifact for about so many seconds, every other time looking at each of its calls.

    Raises:
        TargetError: it cannot run here, keeps no account of its kernels, or calls other kernels than that says.
    """
    listed = kernels(built).calls
    best = peak(built.manifest.device, threads)
    plain, watched = (CpuTarget().load(built, threads) for _ in range(2))
    runs: list[list[tuple[str, float]]] = []
    walls: list[float] = []
    until = time.perf_counter() + seconds
    while len(runs) < _LEAST_RUNS or time.perf_counter() < until:
        for _ in range(_TURN):
            begun = time.perf_counter()
            plain(*inputs)
            walls.append(time.perf_counter() - begun)
        runs += [watched.calls(*inputs) for _ in range(_TURN)]
    names = [name for name, _ in runs[0]]
    medians = [statistics.median(run[k][1] for run in runs) for k in range(len(names))]
    idle = [median for name, median in zip(names, medians, strict=True) if name == _IDLE]
    asking = statistics.median(idle or [min(medians, default=0.0)])  # what even a call that does nothing seems to take
    functions = {call.function for call in listed}
    own = [k for k, name in enumerate(names) if name in functions]
    if [names[k] for k in own] != [call.function for call in listed]:
        raise TargetError(f"Artifact '{built.directory}' calls other kernels than its {artifacts.KERNELS} says.")
    timed = tuple(
        Timed(call, medians[k] - asking, max(call.work / best.macs, call.weight_bytes / best.bytes))
        for k, call in zip(own, listed, strict=True)
    )
    between = sum(median - asking for k, median in enumerate(medians) if k not in set(own))
    return Profile(timed, between, statistics.median(walls), best, threads)
