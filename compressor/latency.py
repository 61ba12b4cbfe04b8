"""Latency of artifacts and of what they replace, engines taking turns in one run."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from profiles.measure import Cold, Measurement, cold, interleave
from targets.base import Array, Target


@dataclass(frozen=True, slots=True)
class Timed:
    """One engine at one thread count: `samples_ms` each enclose one inference, inputs in memory to answers in memory."""

    name: str
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
    """`artifacts` are named as their folders; `baselines` after the engine and what it ran."""

    artifacts: tuple[Timed, ...]
    baselines: tuple[Timed, ...]

    def to_json(self) -> dict[str, Any]:
        return {"artifacts": [asdict(t) for t in self.artifacts], "baselines": [asdict(t) for t in self.baselines]}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Timings":
        def timed(row: dict[str, Any]) -> Timed:
            return Timed(**{**row, "tasks": tuple(row["tasks"]), "samples_ms": tuple(row["samples_ms"])})

        return cls(tuple(map(timed, facts["artifacts"])), tuple(map(timed, facts["baselines"])))


DENSE = "onnxruntime, original network"
EAGER = "eager PyTorch, original network"


def time_all(
    original: MultiTaskModel, deployed: Sequence[Deployed], target: Target, recipe: Recipe, bench: Bench
) -> Timings:
    """Artifacts, the original network in ONNX Runtime and in eager PyTorch, and each artifact's own graph in ONNX
    Runtime, at each thread count of the recipe that this machine has.
    """
    tensors = real_inputs(original, bench, 1)[0]
    arrays = tuple(t.numpy() for t in tensors)
    tasks = tuple(task.name for task in original.tasks)
    dense = to_program(extract(original, tasks), original.inputs)[1]
    artifacts: list[Timed] = []
    baselines: list[Timed] = []
    here = len(os.sched_getaffinity(0))
    for threads in [count for count in recipe.threads if count <= here]:
        bench.progress.line(f"Measuring with {threads} thread{'s' * (threads > 1)}")
        runs: dict[str, Callable[[], object]] = {}
        opened: dict[str, tuple[tuple[str, ...], Cold, bool]] = {}

        def add(
            name: str,
            tasks: tuple[str, ...],
            load: Callable[[], Any],
            call: Callable[[Any], object],
            ours: bool,
            runs: dict[str, Callable[[], object]] = runs,
            opened: dict[str, tuple[tuple[str, ...], Cold, bool]] = opened,
        ) -> None:
            loaded, once = cold(load, call)
            runs[name] = lambda: call(loaded)
            opened[name] = (tasks, once, ours)

        for made in (d for d in deployed if d.verified):
            folder, proto = made.artifact, made.program.model
            name = made.program.name
            add(name, made.program.tasks, lambda a=folder, n=threads: target.load(a, n), lambda r: r(*arrays), True)  # type: ignore[misc]
            add(
                f"onnxruntime, {name} artifact's graph",
                made.program.tasks,
                lambda m=proto, n=threads: session(m, n),
                lambda s: run(s, arrays),
                False,
            )  # type: ignore[misc]
        add(DENSE, tasks, lambda n=threads: session(dense.model, n), lambda s: run(s, arrays), False)  # type: ignore[misc]
        add(EAGER, tasks, lambda: original, lambda m, n=threads: _eager(m, tensors, n), False)  # type: ignore[misc]
        before = torch.get_num_threads()
        how = recipe.measure
        try:
            seen = interleave(
                runs, warmup_s=how.warmup_seconds, min_samples=how.samples, max_seconds=how.seconds, seed=recipe.seed
            )
        finally:
            torch.set_num_threads(before)
        for name, measured in seen.items():
            tasks_of, once, ours = opened[name]
            timed = Timed(
                name,
                tasks_of,
                threads,
                measured.samples_ms,
                measured.warmup_calls,
                measured.stable,
                once.load_ms,
                once.first_ms,
            )
            (artifacts if ours else baselines).append(timed)
    return Timings(tuple(artifacts), tuple(baselines))


def _eager(model: MultiTaskModel, inputs: tuple[Tensor, ...], threads: int) -> list[Array]:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return [np.asarray(answer) for answer in model.answers(*inputs).values()]
