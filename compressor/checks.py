"""Check and measure an artifact that is all one has: its folder holds the ONNX it was built from."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from compressor.errors import CompressError
from compressor.export import run, session
from compressor.leeway import leeway
from compressor.report.schema import Latency
from compressor.verify import Compared, compare, difference, on_grids, onnx_answers, told
from profiles.measure import interleave, ratio
from targets import artifact as artifacts
from targets.base import Array, Artifact, Program
from targets.fpga import FpgaTarget, clock_of
from targets.profiling import host_seconds, kernels, profile
from targets.registry import target as find_target


def verify_artifact(folder: Path, count: int, inputs: list[tuple[Array, ...]] | None = None) -> list[Compared]:
    """Compare an artifact's answers with ONNX Runtime's of its own graph, on given or on `count` random inputs.

    Raises:
        TargetError: the folder does not match its manifest, or cannot run here.
        CompressError: a task's answers differ.
    """
    built = artifacts.read(folder)
    runner = find_target(built.manifest.target).load(built, threads=1)
    model = _model(built)
    trusted = onnx_answers(Program(built.manifest.program, model, built.manifest.tasks))
    inputs = inputs or [random_inputs(built, seed) for seed in range(count)]
    pairs = [(runner(*x), trusted(*x)) for x in inputs]
    rounding = leeway(model, inputs) if on_grids(model) else None
    found = []
    for task in built.manifest.tasks:
        answers = [(want[task], have[task]) for have, want in pairs]
        compared = compare("artifact", task, answers, None if rounding is None else rounding[task])
        if not compared.holds:
            worst = max(answers, key=lambda pair: difference(*pair))
            raise CompressError(f"Task '{task}' of '{folder}' {told(compared, *worst)} ONNX Runtime.")
        found.append(compared)
    return found


def is_simulated(folder: Path) -> bool:
    """Does an artifact run here on a simulator of its device?"""
    built = artifacts.read(folder)
    return find_target(built.manifest.target).simulated(built) is not None


def bench_artifact(folder: Path, threads: int, seconds: float, samples: int) -> dict[str, Any]:
    """Latency of an artifact and of its own graph in ONNX Runtime, interleaved, on one random input.

    Of an artifact that runs here on a simulator, what that says, and no ratio.
    """
    built = artifacts.read(folder)
    inputs, target = random_inputs(built, 0), find_target(built.manifest.target)
    if (simulated := target.simulated(built)) is not None:
        engines = {"artifact": Latency.of(simulated).model_dump() | {"samples_ms": ()}}
        return {"artifact": str(folder), "threads": threads, "engines": engines, "ratio": None}
    runner = target.load(built, threads)
    peer = session(_model(built), threads)
    seen = interleave(
        {"artifact": lambda: runner(*inputs), "onnxruntime": lambda: run(peer, inputs)},
        min_samples=samples,
        max_seconds=seconds,
    )
    return {
        "artifact": str(folder),
        "threads": threads,
        "engines": {name: Latency.of(m).model_dump() | {"samples_ms": m.samples_ms} for name, m in seen.items()},
        "ratio": ratio(seen["artifact"], seen["onnxruntime"]).value,
    }


def profile_artifact(folder: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Where an artifact's time goes, kernel by kernel, on one random input; times in ms.

    GFLOP/s count the layer's work by definition, zeros and all; `of_roofline` is the least time for the work that is
    really done, and to bring the weights from memory, beside the time it took.
    """
    built = artifacts.read(folder)
    found = profile(built, random_inputs(built, 0), threads, seconds)
    calls = [
        timed.call.model_dump()
        | {
            "ms": timed.seconds * 1e3,
            "gflops": 2e-9 * timed.call.macs / timed.seconds,
            "of_roofline": timed.bound / timed.seconds,
        }
        for timed in found.calls
    ]
    return {
        "artifact": str(folder),
        "threads": threads,
        "calls": calls,
        "kernels_ms": (found.total - found.between) * 1e3,
        "between_ms": found.between * 1e3,
        "sum_ms": found.total * 1e3,
        "wall_ms": found.wall * 1e3,
        "peak_gflops": found.peak.macs * 2e-9,
        "peak_gbytes": found.peak.bytes * 1e-9,
    }


def profile_accelerated(folder: Path) -> list[dict[str, Any]]:
    """Every layer of an accelerator with its cycles at its clock, and every kernel of its host, timed here.

    Raises:
        TargetError: the folder does not match its manifest, or is of no fpga.
    """
    built = artifacts.read(folder)
    clock = clock_of(built.manifest.device)
    runner = FpgaTarget().load(built, threads=1)
    timed = iter(host_seconds(built, runner, random_inputs(built, 0)))
    rows = []
    for call in kernels(built).calls:
        ms = call.cycles / clock.megahertz / 1e3 if call.accelerated else next(timed) * 1e3
        how = f"RTL simulation, {clock.by}" if call.accelerated else "measured here"
        rows.append({"kernel": call.kernel, "layer": call.layer, "macs": call.macs, "ms": ms, "how": how})
    return rows


def _model(built: Artifact) -> onnx.ModelProto:
    return onnx.load_model_from_string((built.directory / artifacts.MODEL).read_bytes())


def random_inputs(built: Artifact, seed: int) -> tuple[Array, ...]:
    """Inputs of the manifest's shapes: uniform in [0, 1), or small whole numbers for integer inputs."""
    chance = np.random.default_rng(seed)
    return tuple(
        chance.random(t.shape).astype(t.dtype)
        if np.issubdtype(np.dtype(t.dtype), np.floating)
        else chance.integers(0, 2, t.shape).astype(t.dtype)
        for t in built.manifest.inputs
    )
