"""Time the candidates of a program's layers on this machine, most promising layers and candidates first."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm

from profiles.device import Device
from targets.base import Array, BuildPlan
from targets.choice import Candidate, Choices
from targets.cpu import Lowered, require_host_runs
from targets.errors import TargetError
from targets.passes.schedule import schedule
from targets.runner import configure

_COLD_BYTES = 192 << 20  # of constants that take turns, so that no cache holds them; as in an inference of a network
_MOST_COPIES = 64
_ROUNDS = 2
_TRIAL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Timed:
    """One measurement: seconds are the geometric mean over one thread and all."""

    layer: str
    candidate: str
    seconds: float


def kernel_of(candidate: Candidate, device: Device) -> tuple[Callable[..., Any], list[Array]]:
    """A candidate's trial compiled as it would be in a network, and arguments for it, the result last."""
    function, arrays = candidate.trial()
    target = tvm.target.Target(dict(device.target))
    with target:
        module = schedule(tvm.IRModule({"main": function}), device)
        module.update_func(module.get_global_var("main"), module["main"].with_attr("global_symbol", "main"))
        library = tvm.compile(module, target)
    return library["main"], arrays


def measure(candidate: Candidate, device: Device) -> float:
    """Seconds of one run on cold constants: geometric mean over one thread and all of the device's cores."""
    run, (x, *constants, y) = kernel_of(candidate, device)
    copies = min(_MOST_COPIES, 1 + _COLD_BYTES // max(1, sum(array.nbytes for array in constants)))
    given, made = tvm.runtime.tensor(x), tvm.runtime.tensor(y)
    turns = [[given, *map(tvm.runtime.tensor, constants), made] for _ in range(copies)]
    found = []
    for threads in sorted({1, device.cores}):
        configure(threads)
        run(*turns[0])
        medians = []
        for _ in range(_ROUNDS):
            samples: list[float] = []
            until = time.perf_counter() + _TRIAL_SECONDS / _ROUNDS
            while len(samples) < copies or time.perf_counter() < until:
                for arguments in turns:
                    start = time.perf_counter()
                    run(*arguments)
                    samples.append(time.perf_counter() - start)
            medians.append(statistics.median(samples))
        found.append(min(medians))
    return math.prod(found) ** (1 / len(found))


def tune(plans: Sequence[BuildPlan], seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[Timed]:
    """Measurements until the time is over or nothing is left to measure, each as soon as it is made.

    Layers take turns, those first whose uses should take the longest; within a layer the candidates that should be
    fastest come first, and what the plans' records measured already is not measured again.

    Raises:
        TargetError: a plan of another target, or for another machine than this.
    """
    begun = clock()
    for layer, candidate, device in _in_order(plans):
        if clock() - begun >= seconds:
            return
        yield Timed(layer, candidate.name, measure(candidate, device))


def waiting(plans: Sequence[BuildPlan]) -> int:
    """How many measurements `tune` could make."""
    return sum(1 for _ in _in_order(plans))


def choices_of(plan: BuildPlan) -> Choices:
    """How a plan's layers were decided.

    Raises:
        TargetError: its target decides nothing that could be measured.
    """
    if not isinstance(plan.lowered, Lowered):
        raise TargetError(f"The {plan.target} target has nothing to tune.")
    return plan.lowered.choices


def _in_order(plans: Sequence[BuildPlan]) -> Iterator[tuple[str, Candidate, Device]]:
    waiting: dict[str, list[Candidate]] = {}
    cost: dict[str, float] = {}
    for plan in plans:
        require_host_runs(plan.device)
        choices = choices_of(plan)
        for layer, choice in choices.made.items():
            unknown = [c for c in choice.candidates if c.name not in choice.seconds]
            waiting[layer] = sorted(unknown, key=lambda c: c.cycles)  # one alone too: its other form may be faster
            uses = len(choices.occurrences.get(layer, [None]))
            cost[layer] = cost.get(layer, 0) + uses * choice.picked.cycles
    order = sorted(waiting, key=lambda layer: -cost[layer])
    for turn in range(max(map(len, waiting.values()), default=0)):
        for layer in order:
            if turn < len(waiting[layer]):
                yield layer, waiting[layer][turn], plans[0].device
