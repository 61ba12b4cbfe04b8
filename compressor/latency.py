"""Latency of artifacts and of what they replace, engines taking turns in one run."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.bench import Bench
from compressor.deploy import Deployed, real_inputs
from compressor.export import run, session, to_program
from compressor.model import MultiTaskModel
from compressor.pathway import extract
from compressor.recipe import Recipe
from profiles.measure import Measurement, cold, interleave
from targets.base import Array, Program, Target

DENSE = "ONNX Runtime, dense"
EAGER = "PyTorch, dense"


@dataclass(frozen=True, slots=True)
class Timed:
    """One engine at one thread count: `samples_ms` each enclose one inference, inputs in memory to answers in memory.

    Attributes:
        name: what was timed, for people; of an artifact, its folder's name.
        artifact: the artifact that was timed, or whose graph was; empty for the original network.
    """

    name: str
    artifact: str
    tasks: tuple[str, ...]
    threads: int
    samples_ms: tuple[float, ...]
    warmup_calls: int
    stable: bool
    load_ms: float
    first_ms: float

    @property
    def measurement(self) -> Measurement:
        return Measurement(self.samples_ms, self.warmup_calls, self.stable)


@dataclass(frozen=True, slots=True)
class Timings:
    """What was timed: the artifacts, and what stands beside them."""

    artifacts: tuple[Timed, ...]
    baselines: tuple[Timed, ...]

    def to_json(self) -> dict[str, Any]:
        return {"artifacts": [asdict(t) for t in self.artifacts], "baselines": [asdict(t) for t in self.baselines]}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Timings":
        def timed(row: dict[str, Any]) -> Timed:
            return Timed(**{**row, "tasks": tuple(row["tasks"]), "samples_ms": tuple(row["samples_ms"])})

        return cls(tuple(map(timed, facts["artifacts"])), tuple(map(timed, facts["baselines"])))


@dataclass(frozen=True, slots=True)
class _Engine:
    """Something to time: `load` opens it, `call` runs one inference on what `load` returned."""

    name: str
    artifact: str
    tasks: tuple[str, ...]
    load: Callable[[], Any]
    call: Callable[[Any], object]


def time_all(
    original: MultiTaskModel, deployed: Sequence[Deployed], target: Target, recipe: Recipe, bench: Bench
) -> Timings:
    """Artifacts, the original network in ONNX Runtime and in eager PyTorch, and each artifact's own graph in ONNX
    Runtime, at each thread count of the recipe that this machine has.
    """
    inputs = real_inputs(original, bench, 1)[0]
    dense = to_program(extract(original, [task.name for task in original.tasks]), original.inputs)[1]
    running = [made for made in deployed if made.timed_here]
    names = {made.program.name for made in running}
    artifacts: list[Timed] = []
    baselines: list[Timed] = []
    here = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    for threads in [count for count in recipe.threads if count <= here]:
        bench.progress.line(
            f"Measuring with {threads} thread{'s' * (threads > 1)}, at most {recipe.measure.seconds:g} s"
        )
        engines = list(_engines(original, running, dense, target, threads, inputs))
        try:
            for timed in _time(engines, threads, recipe):
                (artifacts if timed.name in names else baselines).append(timed)
        finally:
            torch.set_num_threads(before)
    return Timings(tuple(artifacts), tuple(baselines))


def _engines(
    original: MultiTaskModel,
    deployed: Sequence[Deployed],
    dense: Program,
    target: Target,
    threads: int,
    inputs: tuple[Tensor, ...],
) -> Iterator[_Engine]:
    arrays = tuple(t.numpy() for t in inputs)
    for made in deployed:
        name, tasks, artifact = made.program.name, made.program.tasks, made.artifact
        yield _Engine(name, name, tasks, partial(target.load, artifact, threads), lambda runner: runner(*arrays))
        graph, load = f"ONNX Runtime, {name}", partial(session, made.program.model, threads)
        yield _Engine(graph, name, tasks, load, lambda loaded: run(loaded, arrays))
    yield _Engine(DENSE, "", dense.tasks, partial(session, dense.model, threads), lambda loaded: run(loaded, arrays))
    yield _Engine(EAGER, "", dense.tasks, lambda: original, lambda model: _eager(model, inputs, threads))


def _time(engines: Sequence[_Engine], threads: int, recipe: Recipe) -> Iterator[Timed]:
    opened = [cold(engine.load, engine.call) for engine in engines]
    runs = {e.name: partial(e.call, loaded) for e, (loaded, _) in zip(engines, opened, strict=True)}
    how = recipe.measure
    seen = interleave(
        runs, warmup_s=how.warmup_seconds, min_samples=how.samples, max_seconds=how.seconds, seed=recipe.seed
    )
    for engine, (_, once) in zip(engines, opened, strict=True):
        found = seen[engine.name]
        yield Timed(
            engine.name,
            engine.artifact,
            engine.tasks,
            threads,
            found.samples_ms,
            found.warmup_calls,
            found.stable,
            once.load_ms,
            once.first_ms,
        )


def _eager(model: MultiTaskModel, inputs: tuple[Tensor, ...], threads: int) -> list[Array]:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return [np.asarray(answer) for answer in model.answers(*inputs).values()]
