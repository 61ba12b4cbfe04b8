"""Search over a recipe's settings for networks of which none is both smaller and better: its Pareto front.

Optuna proposes settings and keeps every trial in SQLite, so that a sweep goes on where it was stopped. A trial runs the
recipe's stages, builds nothing, and has two figures: the share of multiply-adds that is left and not zero, and what the
task nearest its end has left of its budget, as a share of it.
"""

import json
import logging
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import tomli_w

from compressor import compute, pipeline
from compressor import recipe as recipes
from compressor.errors import CompressError
from compressor.progress import Reporter, Silent
from compressor.recipe import Choices
from compressor.store import opened, writing
from targets.errors import TargetError

DATABASE, RESULT, CHOSEN = "sweep.db", "sweep.json", "chosen.toml"
_DONE, _RUNNING = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING


@dataclass(frozen=True, slots=True)
class Point:
    """One trial.

    Attributes:
        work: share of the original's multiply-adds that is left, times the share of weights that is not zero.
        margin: least share of a budget that is left to any task (negative: overspent).
        front: no other trial has both less work and more margin.
        folder: its finished stages, under the sweep's folder.
    """

    number: int
    settings: Mapping[str, Any]
    work: float
    margin: float
    scores: Mapping[str, float]
    front: bool
    folder: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """Finished trials by work, the one to take (least work inside all budgets), and settings that failed with why."""

    trials: tuple[Point, ...]
    chosen: int | None
    failed: Mapping[int, str]


def sweep(path: Path, overrides: Sequence[str], out: Path, trials: int, workers: int, progress: Reporter) -> Sweep:
    """Run trials until so many are finished, counting earlier ones, and write `sweep.json` and `chosen.toml`.

    Raises:
        CompressError: no [sweep], no budgets, another sweep in the folder, or every trial failed.
    """
    compute.alone("sweep")
    recipe, base = recipes.load(path, overrides)
    if not recipe.sweep:
        raise CompressError("The recipe has no [sweep]: name the settings to search, such as 'stages.0.macs'.")
    if not recipe.budgets:
        raise CompressError("A sweep weighs work against budgets, and the recipe has none; give [budgets].")
    pipeline.prepare(recipe, base, Silent(), builds=False)
    with opened(out, resume=True):
        study = _study(out, recipe.seed, path, overrides)
        for stale in study.get_trials(deepcopy=False, states=(_RUNNING,)):  # a killed sweep's
            study.tell(stale.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(stale.params)
        missing = trials - len(study.get_trials(deepcopy=False, states=(_DONE,)))
        given = path.resolve(), tuple(overrides), out.resolve()
        if workers > 1 and missing > 1:
            _in_processes(given, missing, min(workers, missing))
        elif missing > 0:
            _work(*given, missing, 0, progress)
        found = _found(study)
        if not found.trials:
            why = next(iter(found.failed.values()), "none was started")
            raise CompressError(f"No trial of the sweep was finished: {why}")
        _write(found, path, overrides, out)
    return found


def _study(out: Path, seed: int, path: Path, overrides: Sequence[str]) -> optuna.Study:
    optuna.logging.set_verbosity(logging.WARNING)
    url = f"sqlite:///{out.resolve() / DATABASE}"
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(
        storage=url, study_name="sweep", sampler=sampler, directions=["minimize", "maximize"], load_if_exists=True
    )
    asked = json.dumps([str(path.resolve()), list(overrides), recipes.load(path, overrides)[0].model_dump(mode="json")])
    if study.user_attrs.setdefault("asked", asked) != asked:
        raise CompressError(f"'{out}' holds the sweep of another recipe, or of this one before it changed.")
    study.set_user_attr("asked", asked)
    return study


def _in_processes(given: tuple[Path, tuple[str, ...], Path], missing: int, workers: int) -> None:
    spawn = multiprocessing.get_context("spawn")
    shares = [missing // workers + (index < missing % workers) for index in range(workers)]
    running = [
        spawn.Process(target=_worker, args=(*given, share, index + 1), daemon=True)
        for index, share in enumerate(shares)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if broken := [process.exitcode for process in running if process.exitcode]:
        raise CompressError(f"{len(broken)} of {workers} workers ended with exit code {broken[0]}.")


def _worker(path: Path, overrides: tuple[str, ...], out: Path, trials: int, worker: int) -> None:
    _work(path, overrides, out, trials, worker, Silent())


def _work(path: Path, overrides: tuple[str, ...], out: Path, trials: int, worker: int, progress: Reporter) -> None:
    """So many more trials, in this process."""
    recipe, _ = recipes.load(path, overrides)
    study = _study(out, recipe.seed + 1000 * worker, path, overrides)

    def one(trial: optuna.Trial) -> tuple[float, float]:
        settings = {key: _proposed(trial, key, choices) for key, choices in recipe.sweep.items()}
        told = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        progress.line(f"Trial {trial.number}: {', '.join(told)}")
        trial.set_user_attr("settings", settings)
        try:
            job = pipeline.prepare(*recipes.load(path, [*overrides, *told]), progress, builds=False)
            model, scores = pipeline.compress(job, out / "trials" / str(trial.number))
        except (CompressError, TargetError) as error:
            trial.set_user_attr("why", str(error))
            raise
        work = pipeline.work_left(job.model, model)
        margin = min(job.bench.shares(scores).values())
        trial.set_user_attr("scores", scores)
        progress.line(f"  work {work:.1%}, least left of a budget {margin:.0%}")
        return work, margin

    study.optimize(one, n_trials=trials, catch=(CompressError, TargetError))


def _proposed(trial: optuna.Trial, key: str, choices: Choices) -> Any:
    if choices.choices:
        return trial.suggest_categorical(key, list(choices.choices))
    low, high = choices.low, choices.high
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=choices.log)
    assert low is not None and high is not None  # the recipe was checked
    return trial.suggest_float(key, low, high, log=choices.log)


def _found(study: optuna.Study) -> Sweep:
    front = {trial.number for trial in study.best_trials}
    done = study.get_trials(deepcopy=False, states=(_DONE,))
    points = tuple(
        Point(
            t.number, t.user_attrs["settings"], t.values[0], t.values[1], t.user_attrs["scores"], t.number in front,
            f"trials/{t.number}",
        )
        for t in sorted(done, key=lambda t: (t.values[0], -t.values[1], t.number))
    )
    failed = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.FAIL,))
    inside = next((point.number for point in points if point.margin >= 0), None)
    return Sweep(points, inside, {t.number: t.user_attrs["why"] for t in failed if "why" in t.user_attrs})


def _write(found: Sweep, path: Path, overrides: Sequence[str], out: Path) -> None:
    texts = {RESULT: json.dumps({"schema": "taskpress.sweep/1", **asdict(found)}, indent=1) + "\n"}
    if found.chosen is not None:
        settings = next(point.settings for point in found.trials if point.number == found.chosen)
        told = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        texts[CHOSEN] = tomli_w.dumps(recipes.portable(path, [*overrides, *told]))
    with writing(out / RESULT):
        for name, text in texts.items():
            draft = out / f".{name}.draft"
            draft.write_text(text, encoding="utf-8")
            draft.replace(out / name)
