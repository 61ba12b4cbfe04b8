"""Time the candidates of a program's layers on this machine, most promising layers and candidates first."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tvm

from profiles.device import Device
from targets.base import Array
from targets.choice import Candidate, Choice
from targets.passes.schedule import schedule
from targets.runner import configure

_COLD_BYTES = 24 << 20  # arguments take turns until as much has passed, so that no cache holds them: as in a network
_ROUNDS = 3
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
    """Seconds of one run with cold arguments: geometric mean over one thread and all of the device's cores."""
    run, arrays = kernel_of(candidate, device)
    copies = min(64, 1 + _COLD_BYTES // max(1, sum(array.nbytes for array in arrays)))
    turns = [[tvm.runtime.tensor(array) for array in arrays] for _ in range(copies)]
    found = []
    for threads in sorted({1, device.cores}):
        configure(threads)
        run(*turns[0])
        medians = []
        for _ in range(_ROUNDS):
            samples: list[float] = []
            until = time.perf_counter() + _TRIAL_SECONDS / _ROUNDS
            while not samples or time.perf_counter() < until:
                for given in turns:
                    start = time.perf_counter()
                    run(*given)
                    samples.append(time.perf_counter() - start)
            medians.append(statistics.median(samples))
        found.append(min(medians))
    return math.prod(found) ** (1 / len(found))


def tune(
    choices: dict[str, Choice], uses: dict[str, int], device: Device, seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Timed]:
    """Measurements until the time is over or nothing is left to measure, each as soon as it is made.

    Layers take turns, those first whose uses should take the longest; within a layer the candidates that should be
    fastest come first, and what `choices` was measured already is not measured again.
    """
    begun = clock()
    waiting = {
        layer: sorted((c for c in choice.candidates if c.name not in choice.seconds), key=lambda c: c.cycles)
        for layer, choice in choices.items() if len(choice.candidates) > 1
    }
    order = sorted(waiting, key=lambda layer: -uses.get(layer, 1) * choices[layer].picked.cycles)
    for turn in range(max(map(len, waiting.values()), default=0)):
        for layer in order:
            if clock() - begun >= seconds:
                return
            if turn < len(waiting[layer]):
                candidate = waiting[layer][turn]
                yield Timed(layer, candidate.name, measure(candidate, device))
