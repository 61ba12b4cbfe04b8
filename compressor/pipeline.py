"""The one place that knows the order: check everything, compress, cut, compile, verify, measure, report."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from compressor import recipe as recipes
from compressor.bench import Bench
from compressor.budgets import Budget
from compressor.deploy import Deployed, deploy
from compressor.errors import CompressError
from compressor.latency import Timings, time_all
from compressor.model import MultiTaskModel, load_checkpoint
from compressor.pathway import count_macs
from compressor.progress import Reporter
from compressor.recipe import Recipe
from compressor.record import StageRecord, make_report, sizes_of
from compressor.report import write
from compressor.report.schema import Report
from compressor.stages import Stage
from compressor.store import Store, opened
from compressor.trace import trace
from profiles import device as devices
from profiles.device import Device
from profiles.host import environment
from profiles.settings import did_you_mean
from targets.base import Target
from targets.registry import target as find_target


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe with everything it names found and checked; nothing has been trained or written."""

    recipe: Recipe
    base: Path
    model: MultiTaskModel
    bench: Bench
    target: Target
    device: Device
    task_sets: tuple[tuple[str, ...], ...]
    start: str

    def keys(self) -> list[str]:
        """A key for each stage: what it starts from, its own settings, and the code that runs it."""
        found, key = [], self.start
        for stage in self.stages:
            settings = json.dumps(stage.model_dump(mode="json"), sort_keys=True)  # type: ignore[attr-defined]
            key = hashlib.sha256(f"{key}|{settings}|{self.bench.multiple}|{_code()}".encode()).hexdigest()
            found.append(key)
        return found

    @property
    def stages(self) -> tuple[Stage, ...]:
        return recipes.stages_of(self.recipe)


def prepare(recipe: Recipe, base: Path, progress: Reporter) -> Job:
    """Find and check all that a run needs, so that nothing fails for lack of it after hours of work.

    Raises:
        CompressError, TargetError, ProfileError: the first thing that is missing or does not fit.
    """
    target = find_target(recipe.target)
    device = devices.load(recipe.device)
    target.check(device)
    workload = recipes.load_workload(recipe.workload, base)
    names = [task.name for task in workload.tasks]
    if unknown := [name for name in recipe.budgets if name not in names]:
        told = "; ".join(f"no task '{name}'.{did_you_mean(name, names)}" for name in unknown)
        raise CompressError(f"[budgets] {told}")
    sets = recipes.task_sets(recipe, names)
    if unscored := [name for name in recipe.budgets if name not in workload.metrics()]:
        raise CompressError(f"[budgets] '{unscored[0]}' has a budget, but the workload has no metric for it.")
    checkpoint = recipes.checkpoint(recipe.workload, base)
    torch.manual_seed(recipe.seed)
    model = load_checkpoint(workload, checkpoint)
    trace(model)
    budgets = {name: Budget.parse(text) for name, text in recipe.budgets.items()}
    bench = Bench(workload, model, budgets, device.channel_multiple, recipe.seed, progress, Path())
    return Job(recipe, base, model, bench, target, device, tuple(sets), recipes.fingerprint(recipe, base))


def run(job: Job, out: Path, command: str, resume: bool = True) -> Report:
    """Do the whole job in a run's folder and write its report; finished work found there is not repeated.

    Raises:
        CompressError, TargetError, ProfileError: what was given, what is possible, the nearest fix.
    """
    begun = time.monotonic()
    progress, bench = job.bench.progress, job.bench
    with opened(out, resume) as store:
        surroundings = environment()
        before = _scored(store, job.start, job.model, bench)
        bench.__dict__["before"] = before  # what `Bench.before` would compute again
        model, stages = _compress(job, store)
        after = stages[-1].scores if stages else before
        deployed = [_deploy(job, model, tasks, store) for tasks in job.task_sets]
        timings = _measured(job, store, deployed)
        report = make_report(
            recipe=job.recipe,
            command=command,
            created=datetime.now(UTC),
            duration_s=time.monotonic() - begun,
            bench=bench,
            before=before,
            after=after,
            model=model,
            stages=stages,
            deployed=deployed,
            timings=timings,
            device=job.device,
            directory=out,
            environment=surroundings.later(),
        )
        write(report, out)
    progress.line(f"Report: {out / 'report.html'}")
    return report


def _compress(job: Job, store: Store) -> tuple[MultiTaskModel, list[StageRecord]]:
    model, records = job.model, []
    for index, (stage, key) in enumerate(zip(job.stages, job.keys(), strict=True)):
        kind = f"{index:02d}-{stage.kind}"
        facts = store.facts(kind, key)
        if facts is not None:
            job.bench.progress.line(
                f"Stage {index + 1} ({stage.kind}): done before, taken from {store.path(kind, key)}"
            )
            model = MultiTaskModel.load(store.path(kind, key), job.bench.workload)
            records.append(StageRecord(index, stage.kind, key, resumed=True, **facts))
            continue
        job.bench.progress.line(f"Stage {index + 1} ({stage.kind})")
        facts = {}
        with store.entry(kind, key, facts) as folder:
            begun = time.monotonic()
            job.bench.directory = folder
            job.bench.notes.clear()
            model = stage.run(model, job.bench)
            facts["seconds"] = time.monotonic() - begun
            facts["scores"] = job.bench.scores(model)
            facts["macs"], facts["parameters"], facts["nonzero_parameters"] = sizes_of(model)
            facts["note"] = " ".join(job.bench.notes)
            model.save(folder)
        records.append(StageRecord(index, stage.kind, key, resumed=False, **facts))
        told = ", ".join(f"{name} {score:.4g}" for name, score in facts["scores"].items())
        job.bench.progress.line(f"  {told}; {facts['seconds']:.0f} s")
    return model, records


def _scored(store: Store, start: str, model: MultiTaskModel, bench: Bench) -> dict[str, float]:
    key = hashlib.sha256(f"{start}|{_code()}".encode()).hexdigest()
    facts = store.facts("original", key)
    if facts is None:
        bench.progress.line("Scoring the original network")
        facts = {"scores": bench.before}
        with store.entry("original", key, facts):
            pass
    found: dict[str, float] = facts["scores"]
    return found


def _deploy(job: Job, model: MultiTaskModel, tasks: tuple[str, ...], store: Store) -> Deployed:
    job.bench.progress.line(f"Artifact {'+'.join(tasks)} for {job.device.name} ({job.target.name})")
    made = deploy(model, tasks, job.target, job.device, job.bench, store, job.recipe.verify_inputs)
    how = "kept as it was" if made.resumed else f"compiled in {made.compile_s:.1f} s"
    proof = "verified" if made.verified else "cannot run on this machine: not verified, not measured"
    job.bench.progress.line(f"  {made.pathway.macs / 1e6:.1f} M MACs, {made.parameters} parameters; {how}; {proof}")
    return made


def _measured(job: Job, store: Store, deployed: list[Deployed]) -> Timings:
    if not any(made.verified for made in deployed):
        return Timings((), ())
    plans = [made.artifact.manifest.plan for made in deployed]
    how = job.recipe.measure.model_dump(mode="json")
    key = hashlib.sha256(json.dumps([plans, job.recipe.threads, how, job.start, _code()]).encode()).hexdigest()
    facts = store.facts("measured", key)
    if facts is None:
        facts = {}
        with store.entry("measured", key, facts):
            facts.update(time_all(job.model, deployed, job.target, job.recipe, job.bench).to_json())
    return Timings.from_json(facts)


def _code() -> str:
    """SHA-256 of the code whose change makes stored work stale."""
    here = Path(__file__).parent
    sha = hashlib.sha256()
    for folder in (here, here / "stages", here / "criteria"):
        for source in sorted(folder.glob("*.py")):
            sha.update(source.read_bytes())
    return sha.hexdigest()


def dry_run(job: Job, out: Path, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """What `run` would do and what it would cost; trains two steps on a copy to say how long, writes nothing."""
    from compressor.training import Training, train

    network = trace(job.model)
    dense, _ = count_macs(network)
    step_s = 0.0
    if any(stage.train_steps for stage in job.stages):
        copy = job.model.clone()
        train(copy, job.bench, Training(steps=1), "trying one step", job.recipe.seed)
        begun = clock()
        train(copy, job.bench, Training(steps=2), "timing two steps", job.recipe.seed)
        step_s = (clock() - begun) / 2
    store = Store(out)
    return {
        "name": job.recipe.name,
        "target": job.target.name,
        "device": job.device.name,
        "macs": dense,
        "parameters": sizes_of(job.model)[1],
        "stages": [
            {
                "kind": stage.kind,
                "train_steps": stage.train_steps,
                "seconds": stage.train_steps * step_s,
                "done": store.facts(f"{index:02d}-{stage.kind}", key) is not None,
            }
            for index, (stage, key) in enumerate(zip(job.stages, job.keys(), strict=True))
        ],
        "artifacts": ["+".join(tasks) for tasks in job.task_sets],
        "measure_seconds": len(job.recipe.threads) * job.recipe.measure.seconds,
    }
