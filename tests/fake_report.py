"""A report of a run that never was, of any number of tasks and layers; the same at every call."""

import math
import random
from datetime import UTC, datetime

import numpy as np

from compressor.report import pictures
from compressor.report.schema import (
    Accelerated,
    ArtifactResult,
    BaselineResult,
    Kernel,
    Latency,
    LayerResult,
    PairedRatio,
    Picture,
    Report,
    Size,
    StageResult,
    TaskResult,
    Verified,
)
from profiles.host import Environment, Moment
from profiles.measure import Emulated, Measurement, ratio

METRICS = {
    "segmentation": ("mIoU", True, 0.8127),
    "depth": ("abs_rel", False, 0.0512),
    "normals": ("mean_angle_deg", False, 10.84),
}
ENGINES = (("onnxruntime dense", 9.8), ("eager dense", 17.9))

MACHINE = Environment(
    cpu="Example CPU 9000 @ 2.60GHz",
    flags=("avx2", "avx512f", "fma"),
    physical_cores=2,
    logical_cores=4,
    affinity=(0, 1, 2, 3),
    quota_cores=None,
    governor="performance",
    virtual=False,
    memory_bytes=16 << 30,
    gpus=(),
    system="Linux-6.1-x86_64",
    kernel="6.1",
    python="3.11.7",
    libraries={"torch": "2.13.0", "apache-tvm": "0.27.0"},
    variables={"OMP_NUM_THREADS": "2"},
    moments=(
        Moment(1.0, (2600.0, 2600.0), (0.12, 0.2, 0.3), 12 << 30),
        Moment(2.0, (2600.0, 3100.0), (1.9, 0.8, 0.4), 11 << 30),
    ),
)


def report(tasks: int = 3, layers: int = 24, samples: int = 200, threads: tuple[int, ...] = (1, 2)) -> Report:
    """Every field filled; the second task is beyond its budget when there are more than three."""
    results = tuple(_task(index, tasks) for index in range(tasks))
    names = tuple(task.name for task in results)
    timed = {
        (engine, n): _measured(ms / n**0.8, samples, seed=17 * n + at)
        for n in threads
        for at, (engine, ms) in enumerate(ENGINES)
    }
    sets = [names, *((name,) for name in names)] if tasks > 1 else [names]
    return Report(
        name="scenes: three tasks from one view",
        command="compress run examples/scenes/recipe.toml --out runs/scenes",
        recipe={
            "workload": "examples/scenes/workload.py:Scenes",
            "seed": 7,
            "stages": [{"kind": "prune", "step": 0.08}],
        },
        seed=7,
        created=datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC),
        duration_s=243.2,
        original=Size(macs=118_400_000, parameters=1_042_113, nonzero_parameters=1_042_113),
        tasks=results,
        stages=_stages(results),
        layers=tuple(_layer(index) for index in range(layers)),
        artifacts=tuple(
            _artifact(at, tasks_of, n, timed[ENGINES[0][0], n], samples)
            for at, tasks_of in enumerate(sets)
            for n in threads
        ),
        baselines=tuple(
            BaselineResult(
                name=engine,
                tasks=names,
                threads=n,
                macs=118_400_000,
                parameters=1_042_113,
                latency_ms=Latency.of(seen),
                samples=seen.samples_ms,
            )
            for (engine, n), seen in timed.items()
        ),
        environment=MACHINE,
        computed_on="CPU, 2 threads",
        pictures=tuple(_picture(scene, name) for scene in (1, 2) for name in names[:3]),
        warnings=("The load average rose from 0.12 to 1.9 while timing.",),
    )


def _task(index: int, tasks: int) -> TaskResult:
    name, (metric, higher, before) = list(METRICS.items())[index % 3]
    drop = before * 0.03 * (0.86, 0.41, -0.12)[index % 3] * (1.6 if tasks > 3 and index == 1 else 1)
    if tasks > 3 and index == 1:
        drop = before * 0.03 * 1.3
    return TaskResult.of(
        name if tasks <= 3 else f"{name}-{index}",
        metric,
        higher_is_better=higher,
        before=before,
        after=before - drop if higher else before + drop,
        budget=0.03 * before,
        budget_text="3 %",
        split="validate",
        split_sha256="5f1d" * 16,
    )


def _measured(ms: float, samples: int, seed: int) -> Measurement:
    source = random.Random(seed)
    return Measurement(tuple(round(ms * math.exp(abs(source.gauss(0, 0.04))), 6) for _ in range(samples)))


def _artifact(at: int, tasks: tuple[str, ...], threads: int, dense: Measurement, samples: int) -> ArtifactResult:
    seen = _measured((4.1 if len(tasks) > 1 else 2.0 + 0.4 * (at % 4)) / threads**0.8, samples, seed=31 * threads + at)
    return ArtifactResult(
        name="whole" if at == 0 and len(tasks) > 1 else tasks[0],
        tasks=tasks,
        target="cpu",
        device="host",
        directory=f"artifacts/{'whole' if at == 0 and len(tasks) > 1 else tasks[0]}",
        macs=41_300_000 if len(tasks) > 1 else 24_000_000 + 1_500_000 * (at % 4),
        parameters=388_000 if len(tasks) > 1 else 241_000 + 9_000 * (at % 4),
        bytes=1_700_000 if len(tasks) > 1 else 1_050_000 + 40_000 * (at % 4),
        sha256="c0ffee" * 10 + "beef",
        threads=threads,
        latency_ms=Latency.of(seen),
        samples=seen.samples_ms,
        load_ms=18.2,
        first_ms=6.4,
        compile_s=21.7,
        peak_rss_bytes=94 << 20,
        ratio_to_dense=PairedRatio.of(ENGINES[0][0], ratio(seen, dense)),
        verified=tuple(
            Verified(rung=rung, task=task, max_abs_error=error * (1 + i), tolerance=1e-3)
            for rung, error in (("onnx", 2.1e-6), ("relax", 3.3e-6), ("artifact", 4.6e-6))
            for i, task in enumerate(tasks)
        ),
        kernels=(
            Kernel(layer="convolution 1x3x96x96", kernel="direct", macs=995_328, density=1.0),
            Kernel(
                layer="sparse 64x24x24", kernel="sparse", macs=21_233_664, density=0.1,
                instead="dense 2.10x (estimated)",
            ),
        ),
    )


def accelerated() -> Report:
    """Of a run for an fpga: one artifact, two runs of its accelerator, none measured."""
    full = report(tasks=1, layers=2, threads=(1,))
    seen = Accelerated(
        rows=16,
        columns=8,
        megahertz=117.1,
        clock_by="place-and-route",
        cycles=(8_000, 2_000),
        shared_cycles=10_400,
        read_bytes=40_000,
        written_bytes=12_000,
        program_bytes=4_096,
        memory_bytes=200_000,
        buffer_bytes={"inputs": 32_768, "weights": 32_768},
        work={unit: tuple(k % 5 / 4 for k in range(20)) for unit in ("LOAD", "GEMM", "POST", "STORE")},
    )
    layers = (
        Kernel(
            layer="conv 3 x 3: 16 x 24 x 24 to 32 x 24 x 24", kernel="accelerator: 8,000 cycles, array 90% full",
            macs=921_600, density=1.0, cycles=8_000, moved_bytes=44_000,
        ),
        Kernel(
            layer="largest of 2 x 2", kernel="accelerator: 1,990 cycles", macs=0, density=1.0, cycles=1_990,
            moved_bytes=8_000,
        ),
        Kernel(layer="host", kernel="host: softmax", macs=0, density=1.0),
    )
    latency = Latency.of(Emulated(0.0854, "RTL simulation", "10,000 cycles at 117.1 MHz"))
    one = full.artifacts[0].model_copy(
        update={
            "target": "fpga", "latency_ms": latency, "samples": (), "ratio_to_dense": None, "accelerator": seen,
            "kernels": layers,
        }
    )
    return full.model_copy(update={"artifacts": (one,), "baselines": ()})


def _stages(tasks: tuple[TaskResult, ...]) -> tuple[StageResult, ...]:
    scores = {task.name: task.after for task in tasks if task.after is not None}
    steps = (
        ("prune", 112.0, 44_000_000, 410_000, 410_000, "stopped by segmentation's budget after 14 steps"),
        ("finetune", 61.0, 44_000_000, 410_000, 410_000, "300 steps, distilled where labels are missing"),
        ("ticket", 38.5, 44_000_000, 388_000, 164_000, "2 rounds, rewound to the trained weights"),
    )
    return tuple(
        StageResult(
            index=at,
            kind=kind,
            key=f"{at}{kind}",
            resumed=at == 1,
            seconds=took,
            macs=macs,
            parameters=parameters,
            nonzero_parameters=nonzero,
            scores=scores,
            note=note,
        )
        for at, (kind, took, macs, parameters, nonzero, note) in enumerate(steps, start=1)
    )


def _layer(index: int) -> LayerResult:
    before = 32 * (1 + index % 4)
    after = max(8, round(before * (0.35 + 0.5 * ((index * 7) % 11) / 11) / 8) * 8)
    density = 1.0 if index % 5 == 0 else 0.3 + 0.05 * (index % 7)
    name = f"encoder.stage{index // 4}.block{index % 4}.conv1"
    return LayerResult(
        name=name, channels_before=before, channels_after=after, parameters=after * 9 * 32, density=density
    )


def _picture(scene: int, task: str) -> Picture:
    y, x = np.mgrid[0:96, 0:96] / 96
    shades = [np.stack([x, y, (x * y + shift) % 1], axis=-1) for shift in (0.1 * scene, 0.3, 0.34)]
    return Picture(
        name=f"scene {scene}",
        task=task,
        input_png_base64=pictures.png(shades[0]),
        truth_png_base64=pictures.png(shades[1]),
        before_png_base64=pictures.png(shades[1]),
        after_png_base64=pictures.png(shades[2]),
    )
