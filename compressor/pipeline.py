"""The one place that knows the order: check everything, compress, cut, compile, verify, measure, report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from compressor import compute
from compressor import recipe as recipes
from compressor.bench import Bench, rehearse
from compressor.budgets import Budget
from compressor.deploy import Deployed, deploy
from compressor.errors import CompressError
from compressor.factory import make_workload
from compressor.latency import Timings, time_all
from compressor.macs import count_macs
from compressor.model import MultiTaskModel, load_checkpoint
from compressor.progress import Reporter
from compressor.recipe import Recipe
from compressor.record import StageRecord, make_report, sizes_of
from compressor.report import write
from compressor.report.schema import Report
from compressor.speed import Speed, replayed
from compressor.stages import Stage
from compressor.stages.quantize import Quantize
from compressor.store import Follower, Store, key_of, opened
from compressor.trace import trace
from compressor.training import train
from compressor.tuning import Tuned, tune_artifacts
from profiles import device as devices
from profiles.device import Device
from profiles.host import Environment, environment
from profiles.settings import did_you_mean
from targets import artifact as artifacts
from targets.base import Target
from targets.records import read as read_records
from targets.registry import target as find_target


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe with everything it names found and checked; nothing has been trained or written."""

    recipe: Recipe
    model: MultiTaskModel
    bench: Bench
    target: Target
    device: Device
    task_sets: tuple[tuple[str, ...], ...]
    start: str
    records: Path
    speed: Speed

    def original_key(self) -> str:
        """A key for the original's scores: what it is, and what they are computed with."""
        return key_of(self.start, self.recipe.compute_threads, self.bench.device.type, compute.count())

    def keys(self) -> list[str]:
        """A key for each stage: what it starts from, its own settings, the width it rounds to, and what it measures on.

        Not what is known of that device's kernels: what was pruned stays so when they are tuned.
        """
        found, key = [], self.original_key()
        measured = self.target.name, self.device.model_dump(mode="json"), self.recipe.threads[0]
        for stage in self.recipe.stages:
            key = key_of(key, stage.model_dump(), self.bench.multiple, *(measured if stage.measures else ()))
            found.append(key)
        return found


def prepare(recipe: Recipe, base: Path, progress: Reporter, *, builds: bool = True) -> Job:
    """Find and check all that a run needs, so that nothing fails for lack of it after hours of work.

    Args:
        builds: whether artifacts will be compiled, so that the compiler must be there.

    Raises:
        CompressError, TargetError, ProfileError: the first thing that is missing or does not fit.
    """
    target = find_target(recipe.target)
    device = devices.load(recipes.device(recipe, base))
    if builds:
        target.check(device)
        if target.integers and not any(isinstance(stage, Quantize) for stage in recipe.stages):
            raise CompressError(f"The {recipe.target} target computes in int8; put a 'quantize' stage into the recipe.")
    table = recipe.workload
    workload = make_workload(table.factory, table.options, table.paths, base)
    names = [task.name for task in workload.tasks]
    if unknown := [name for name in recipe.budgets if name not in names]:
        told = " ".join(f"no task '{name}'.{did_you_mean(name, names)}" for name in unknown)
        raise CompressError(f"[budgets] {told}")
    sets = recipes.task_sets(recipe, names)
    if unscored := [name for name in recipe.budgets if name not in workload.metrics()]:
        raise CompressError(f"[budgets] '{unscored[0]}' has a budget, but the workload has no metric for it.")
    checkpoint = recipes.checkpoint(table, base)
    torch.manual_seed(recipe.seed)
    model = load_checkpoint(workload, checkpoint)
    trace(model)
    budgets = {name: Budget.parse(text) for name, text in recipe.budgets.items()}
    bench = Bench(workload, model, budgets, device.channel_multiple, recipe.seed, progress)
    bench.device = compute.join(recipe.train_on)
    for stage in recipe.stages:
        stage.check(model, bench)
    records = base / recipe.records
    speed = Speed(model, target, device, recipe.threads[0], recipe.seed, read_records(records, device))
    bench.speed = speed
    return Job(recipe, model, bench, target, device, tuple(sets), recipes.fingerprint(recipe, base), records, speed)


def run(job: Job, out: Path, command: str, resume: bool = True) -> Report | None:
    """Do the whole job in a run's folder and write its report; finished work found there is not repeated.

    Several processes run the stages together. The first goes on alone, and the others have no report.

    Raises:
        CompressError, TargetError, ProfileError: what was given, what is possible, the nearest fix.
    """
    begun = time.monotonic()
    bench = job.bench
    with _opened(out, resume) as store:
        model, stages = _compress(job, store)
        if compute.rank():
            return None
        deployed = [_deploy(job, model, tasks, store) for tasks in job.task_sets]
        timings, surroundings = _measured(job, store, deployed)
        report = make_report(
            recipe=job.recipe,
            command=command,
            created=datetime.now(UTC),
            duration_s=time.monotonic() - begun,
            bench=bench,
            after=stages[-1].scores if stages else bench.before,
            model=model,
            stages=stages,
            deployed=deployed,
            timings=timings,
            device=job.device,
            directory=out,
            environment=surroundings,
        )
        write(report, out)
    return report


def compress(job: Job, out: Path) -> tuple[MultiTaskModel, dict[str, float]]:
    """Run the stages alone in a run's folder: the compressed model and its scores; finished stages are not repeated.

    Raises:
        CompressError: as `run`.
    """
    with _opened(out, resume=True) as store:
        model, stages = _compress(job, store)
    return model, stages[-1].scores if stages else dict(job.bench.before)


def work_left(original: MultiTaskModel, model: MultiTaskModel) -> float:
    """The share of the original's multiply-adds that is left and has a weight which is not zero."""
    return count_macs(trace(model))[1] / count_macs(trace(original))[0]


def tune(job: Job, out: Path, command: str, seconds: float) -> tuple[list[Tuned], Report]:
    """Run the job, time the kernels of its artifacts, keep the times in the recipe's records, and run it again.

    The second run builds, verifies and measures what the records change; nothing is trained twice.

    Raises:
        CompressError, TargetError, ProfileError: as `run`, or nothing can be tuned for this device here.
    """
    compute.alone("tune")
    run(job, out, command)
    built = [artifacts.read(out / "artifacts" / "+".join(tasks)) for tasks in job.task_sets]
    tuned = tune_artifacts(built, seconds, job.records, job.bench.progress)
    report = run(job, out, command)
    assert report is not None  # there is one process
    return tuned, report


@contextmanager
def _opened(out: Path, resume: bool) -> Iterator[Store]:
    """The run's folder, held by the first process; the others read it once it is in order."""
    if compute.rank():
        compute.wait()
        yield Follower(out)
    else:
        with opened(out, resume) as store:
            compute.wait()
            yield store


def _scored(job: Job, store: Store) -> dict[str, float]:
    """The original's scores."""
    key = job.original_key()
    facts = compute.by_first(partial(store.facts, "original", key))
    if facts is None:
        job.bench.progress.line("Scoring the original network")
        if any(stage.train_steps for stage in job.recipe.stages):
            rehearse(job.bench, ("train", "calibrate"))
        facts = {"scores": job.bench.scores(job.model)}
        with store.entry("original", key, facts):
            pass
        job.bench.progress.line(f"  {_told(facts['scores'])}")
    found: dict[str, float] = facts["scores"]
    return found


def _compress(job: Job, store: Store) -> tuple[MultiTaskModel, list[StageRecord]]:
    """The compressed model and what is known of each stage; all on the recipe's number of threads."""
    with compute.threads(job.recipe.compute_threads):
        job.bench.before = _scored(job, store)
        return _staged(job, store)


def _will_measure(job: Job, store: Store) -> bool:
    """Whether a stage that is not finished asks for latencies: what refuses them should not come after hours."""
    stages = enumerate(zip(job.recipe.stages, job.keys(), strict=True))
    return any(stage.measures and store.facts(f"{n:02d}-{stage.kind}", key) is None for n, (stage, key) in stages)


def _staged(job: Job, store: Store) -> tuple[MultiTaskModel, list[StageRecord]]:
    model, records, bench = job.model, [], job.bench
    if compute.by_first(partial(_will_measure, job, store)) and not compute.rank():
        job.speed.ready()
    for index, (stage, key) in enumerate(zip(job.recipe.stages, job.keys(), strict=True)):
        entry = f"{index:02d}-{stage.kind}"
        facts = compute.by_first(partial(store.facts, entry, key))
        resumed = facts is not None
        bench.progress.line(f"Stage {index + 1} ({stage.kind})" + (", done before" if resumed else ""))
        if facts is None:
            facts = {}
            bench.checkpoints = store.partial(entry, key)
            bench.speed = replayed(job.speed, bench.checkpoints)
            with store.entry(entry, key, facts) as folder:
                begun = time.monotonic()
                bench.directory, bench.notes, bench.short = folder, [], False
                model = stage.run(model, bench)
                compute.check_alike(f"the weights after stage {index + 1}", model.module.state_dict().values())
                macs, parameters, nonzero = sizes_of(model)
                facts |= {
                    "seconds": time.monotonic() - begun,
                    "scores": bench.scores(model),
                    "macs": macs,
                    "parameters": parameters,
                    "nonzero_parameters": nonzero,
                    "note": " ".join(bench.notes),
                    "short": bench.short,
                }
                model.save(folder)
            store.drop_partial()
        else:
            model = MultiTaskModel.load(store.path(entry, key), bench.workload)
        records.append(StageRecord(index, stage.kind, key, resumed=resumed, **facts))
        bench.progress.line(f"  {_told(facts['scores'])}; took {facts['seconds']:.0f} s")
    return model, records


def _deploy(job: Job, model: MultiTaskModel, tasks: tuple[str, ...], store: Store) -> Deployed:
    job.bench.progress.line(f"Artifact {'+'.join(tasks)} for {job.device.name} ({job.target.name})")
    records = read_records(job.records, job.device)
    made = deploy(model, tasks, job.target, job.device, job.bench, store, job.recipe.verify_inputs, records)
    how = "kept as it was" if made.resumed else f"compiled in {made.compile_s:.1f} s"
    proof = "verified" if made.runs_here else f"verified up to Relax, not run here: {made.unverified}"
    job.bench.progress.line(f"  {made.pathway.macs / 1e6:.1f} M MACs, {made.parameters:,} parameters; {how}; {proof}")
    return made


def _measured(job: Job, store: Store, deployed: list[Deployed]) -> tuple[Timings, Environment]:
    """Timings, and the surroundings in which they were taken."""
    surroundings = environment()
    if not any(made.timed_here for made in deployed):
        return Timings((), ()), surroundings
    recipe = job.recipe
    here = [surroundings.cpu, surroundings.affinity, surroundings.variables]
    plans = [made.artifact.manifest.plan for made in deployed]
    key = key_of(job.start, plans, recipe.threads, recipe.measure.model_dump(), here)
    known = TypeAdapter(Environment)
    facts = store.facts("measured", key)
    if facts is None:
        facts = {}
        with store.entry("measured", key, facts):
            facts["timings"] = time_all(job.model, deployed, job.target, recipe, job.bench).to_json()
            facts["environment"] = asdict(surroundings.later())
    return Timings.from_json(facts["timings"]), known.validate_python(facts["environment"])


def dry_run(job: Job, out: Path, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """What `run` would do and what it would cost; trains a few steps on a copy to say how long, writes nothing."""
    stages = job.recipe.stages
    macs, parameters, _ = sizes_of(job.model)
    if any(stage.train_steps for stage in stages):
        rehearse(job.bench, ("train", "calibrate"))
    with compute.threads(job.recipe.compute_threads):
        seconds = [_train_seconds(job, stage, clock) for stage in stages]
    store = Store(out)
    return {
        "name": job.recipe.name,
        "target": job.target.name,
        "device": job.device.name,
        "macs": macs,
        "parameters": parameters,
        "budgets": {name: str(budget) for name, budget in job.bench.budgets.items()},
        "stages": [
            {
                "kind": stage.kind,
                "train_steps": stage.train_steps,
                "seconds": seconds[index],
                "done": store.facts(f"{index:02d}-{stage.kind}", key) is not None,
                "settings": stage.model_dump(),
            }
            for index, (stage, key) in enumerate(zip(stages, job.keys(), strict=True))
        ],
        "artifacts": ["+".join(tasks) for tasks in job.task_sets],
        "measure_seconds": len(job.recipe.threads) * job.recipe.measure.seconds,
    }


def _train_seconds(job: Job, stage: Stage, clock: Callable[[], float]) -> float:
    """About how long a stage trains: two steps of it on a copy of the original are timed, after one to warm up."""
    if stage.training is None or not stage.train_steps:
        return 0.0
    copy = job.model.clone()
    one, two = (stage.training.model_copy(update={"steps": steps, "check_every": 0, "ema": 0.0}) for steps in (1, 2))
    train(copy, job.bench, one, "trying one step", job.recipe.seed)
    begun = clock()
    train(copy, job.bench, two, "timing two steps", job.recipe.seed)
    return stage.train_steps * (clock() - begun) / 2


def _told(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {score:.4g}" for name, score in scores.items()) or "no task is scored"
