"""What a run found out, gathered into the report's schema."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch

from compressor import compute
from compressor.bench import Bench
from compressor.deploy import Deployed
from compressor.graph import tensor_of
from compressor.latency import DENSE, Timed, Timings
from compressor.macs import count_macs
from compressor.model import MultiTaskModel
from compressor.recipe import Recipe
from compressor.report.pictures import png
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
from compressor.trace import trace
from compressor.workload import Batch
from profiles.device import Device
from profiles.host import Environment
from profiles.measure import ratio
from targets.accelerator import package
from targets.accelerator.isa import KINDS
from targets.artifact import KERNELS
from targets.fpga import clock_of
from targets.profiling import kernels


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What one stage left; scores and sizes are those after it."""

    index: int
    kind: str
    key: str
    resumed: bool
    seconds: float
    macs: int
    parameters: int
    nonzero_parameters: int
    scores: dict[str, float] = field(default_factory=dict)
    note: str = ""
    short: bool = False


def sizes_of(model: MultiTaskModel) -> tuple[int, int, int]:
    """(multiply-adds of one inference over the example inputs, trained values, those that are not zero)."""
    macs, _ = count_macs(trace(model))
    parameters = list(model.module.parameters())
    return macs, sum(p.numel() for p in parameters), sum(int((p != 0).sum()) for p in parameters)


def make_report(
    *,
    recipe: Recipe,
    command: str,
    created: datetime,
    duration_s: float,
    bench: Bench,
    after: Mapping[str, float],
    model: MultiTaskModel,
    stages: Sequence[StageRecord],
    deployed: Sequence[Deployed],
    timings: Timings,
    device: Device,
    directory: Path,
    environment: Environment,
) -> Report:
    """Everything the run knows, as the report's schema has it."""
    original = _size(bench.original)
    before = bench.before
    split = _split_sha256(bench) if before else None
    budgets = bench.budgets
    tasks = tuple(
        TaskResult.of(
            task.name,
            task.metric,
            higher_is_better=task.higher_is_better,
            before=before.get(task.name),
            after=after.get(task.name),
            budget=budgets[task.name].allowed(before[task.name]) if task.name in budgets else None,
            budget_text=str(budgets[task.name]) if task.name in budgets else "",
            split="validate",
            split_sha256=split,
        )
        for task in model.tasks
    )
    return Report(
        name=recipe.name,
        command=command,
        recipe=recipe.model_dump(mode="json"),
        seed=recipe.seed,
        created=created,
        duration_s=duration_s,
        original=original,
        tasks=tasks,
        stages=tuple(StageResult(**asdict(stage)) for stage in stages),
        layers=_layers(bench.original, model),
        artifacts=tuple(row for made in deployed for row in _artifact_rows(made, timings, device, directory)),
        baselines=tuple(_baseline(timed, original, deployed) for timed in timings.baselines),
        environment=environment,
        computed_on=compute.place(bench.device, recipe.compute_threads),
        pictures=_pictures(bench, model),
        warnings=tuple(_warnings(recipe, stages, deployed, timings)),
    )


def _size(model: MultiTaskModel) -> Size:
    macs, parameters, left = sizes_of(model)
    return Size(macs=macs, parameters=parameters, nonzero_parameters=left)


def _layers(original: MultiTaskModel, model: MultiTaskModel) -> tuple[LayerResult, ...]:
    rows = []
    for name, layer in model.module.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or weight.dim() < 2:
            continue
        side = 1 if isinstance(layer, torch.nn.modules.conv._ConvTransposeNd) else 0
        was = tensor_of(original.module, f"{name}.weight".lstrip("."))
        rows.append(
            LayerResult(
                name=name,
                channels_before=was.shape[side],
                channels_after=weight.shape[side],
                parameters=weight.numel(),
                density=float((weight != 0).float().mean()),
            )
        )
    return tuple(rows)


def _artifact_rows(made: Deployed, timings: Timings, device: Device, directory: Path) -> list[ArtifactResult]:
    manifest = made.artifact.directory / "manifest.json"
    files = [file for file in made.artifact.directory.iterdir() if file.is_file()]
    verified = tuple(
        Verified(rung=c.rung, task=c.task, max_abs_error=c.max_abs_error, tolerance=c.tolerance) for c in made.verified
    )
    rows = []
    mine: list[Timed | None] = [timed for timed in timings.artifacts if timed.artifact == made.program.name]
    for timed in mine or [None]:
        latency = timed.measurement if timed else made.simulated
        dense = next((b for b in timings.baselines if timed and b.name == DENSE and b.threads == timed.threads), None)
        rows.append(
            ArtifactResult(
                name=made.program.name,
                tasks=made.program.tasks,
                target=made.artifact.manifest.target,
                device=device.name,
                directory=os.path.relpath(made.artifact.directory, directory),
                macs=made.pathway.macs,
                parameters=made.parameters,
                bytes=sum(file.stat().st_size for file in files),
                sha256=hashlib.sha256(manifest.read_bytes()).hexdigest(),
                threads=timed.threads if timed else 1,
                load_ms=timed.load_ms if timed else None,
                first_ms=timed.first_ms if timed else None,
                compile_s=made.compile_s,
                latency_ms=Latency.of(latency) if latency else None,
                samples=timed.samples_ms if timed else (),
                ratio_to_dense=(
                    PairedRatio.of(DENSE, ratio(timed.measurement, dense.measurement)) if timed and dense else None
                ),
                verified=verified,
                kernels=_kernels(made),
                accelerator=_accelerated(made),
            )
        )
    return rows


def _accelerated(made: Deployed) -> Accelerated | None:
    folder, device = made.artifact.directory, made.artifact.manifest.device
    if made.artifact.manifest.target != "fpga":
        return None
    seen, design, clock = package.activity(folder), package.read(folder).design, clock_of(device)
    return Accelerated(
        rows=design.rows,
        columns=design.columns,
        megahertz=clock.megahertz,
        clock_by=clock.by,
        cycles=seen.cycles,
        shared_cycles=seen.shared_cycles,
        read_bytes=seen.read_bytes,
        written_bytes=seen.written_bytes,
        program_bytes=seen.program_bytes,
        memory_bytes=(folder / package.IMAGE).stat().st_size,
        buffer_bytes=design.buffers,
        work={kind.__name__.upper(): row for kind, row in zip(KINDS, seen.work.round(4).tolist(), strict=True)},
    )


def _kernels(made: Deployed) -> tuple[Kernel, ...]:
    if KERNELS not in made.artifact.manifest.files:
        return ()
    layers = [call for call in kernels(made.artifact).calls if call.layer]
    return tuple(
        Kernel(
            layer=c.layer,
            kernel=c.kernel,
            macs=c.macs,
            density=c.density,
            instead=c.instead,
            cycles=c.cycles,
            moved_bytes=c.moved_bytes,
        )
        for c in layers
    )


def _baseline(timed: Timed, original: Size, deployed: Sequence[Deployed]) -> BaselineResult:
    own = next((made for made in deployed if made.program.name == timed.artifact), None)
    return BaselineResult(
        name=timed.name,
        artifact=timed.artifact,
        tasks=timed.tasks,
        threads=timed.threads,
        macs=own.pathway.macs if own else original.macs,
        parameters=own.parameters if own else original.parameters,
        latency_ms=Latency.of(timed.measurement),
        samples=timed.samples_ms,
    )


def _pictures(bench: Bench, model: MultiTaskModel) -> tuple[Picture, ...]:
    """Predicted maps before and after on the first validation sample, where the workload can draw them."""
    draw = getattr(bench.workload, "pictures", None)
    if draw is None or not bench.validation:
        return ()
    batch = _first_row(bench.validation[0])
    with torch.no_grad():
        before = draw(bench.original.answers(*batch.inputs), batch)
        after = draw(model.answers(*batch.inputs), batch)
    return tuple(
        Picture(
            name=task.name,
            task=task.name,
            before_png_base64=png(before[task.name]),
            after_png_base64=png(after[task.name]),
            input_png_base64=png(before["input"]) if "input" in before else None,
            truth_png_base64=png(before[f"{task.name} truth"]) if f"{task.name} truth" in before else None,
        )
        for task in model.tasks
        if task.name in before
    )


def _first_row(batch: Batch) -> Batch:
    return Batch(tuple(x[:1] for x in batch.inputs), {name: label[:1] for name, label in batch.labels.items()})


def _split_sha256(bench: Bench) -> str:
    sha = hashlib.sha256()
    for batch in bench.validation:
        for tensor in (*batch.inputs, *(batch.labels[name] for name in sorted(batch.labels))):
            sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def _warnings(
    recipe: Recipe, stages: Sequence[StageRecord], deployed: Sequence[Deployed], timings: Timings
) -> Iterator[str]:
    for stage in stages:
        if stage.note:
            yield f"Stage {stage.index + 1} ({stage.kind}): {stage.note}"
    for made in deployed:
        if not made.runs_here:
            yield (
                f"Artifact '{made.program.name}' was built, and verified up to Relax, but not run here: "
                f"{made.unverified}"
            )
    measured = {timed.threads for timed in timings.artifacts}
    lacking = [str(count) for count in recipe.threads if count not in measured]
    if lacking and any(made.timed_here for made in deployed):
        yield f"Not measured with {', '.join(lacking)} threads: this process may use fewer cores."
    if not all(timed.measurement.stable for timed in (*timings.artifacts, *timings.baselines)):
        yield "Some engines had not settled when their warm-up time was over; see the drift column."
